"""Randomness without a global generator: every draw is keyed by what it is for.

A generator is a pure function of (member seed, purpose, epoch, step). Resuming needs no stored
generator state, and a member of a fleet draws what it would have drawn alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> torch.Generator:
    """A CPU generator keyed by (member seed, purpose, epoch, step)."""
    key = hashlib.sha256(f"{seed}/{purpose}/{epoch}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


@dataclass(frozen=True)
class Draws:
    """The random draws of one training step: one stream a member and purpose.

    Args:
        seeds: one a member, M in all.
        epoch: from 0.
        step: within the epoch, from 0.
    """

    seeds: Sequence[int]
    epoch: int = 0
    step: int = 0

    def views(self, num_views: int, batch: int) -> list[int]:
        """Which view of each sample is read: (B,) in 0..num_views - 1. One for all members, as the order."""
        keyed = generator(self.seeds[0], "view", self.epoch, self.step)
        return torch.randint(num_views, (batch,), generator=keyed).tolist()

    def keep(self, purpose: str, rate: float, batch: int, device: torch.device) -> Tensor:
        """Which samples keep a branch: (M, B), 1/(1-rate) where kept and 0 where dropped."""
        rows = [
            torch.rand(batch, generator=generator(seed, purpose, self.epoch, self.step)) >= rate
            for seed in self.seeds
        ]
        return (torch.stack(rows).float() / (1.0 - rate)).to(device)
