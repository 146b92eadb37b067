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
        epoch: from 0; one a member where members that joined later count their own.
        step: within the epoch, from 0.
    """

    seeds: Sequence[int]
    epoch: int | Sequence[int] = 0
    step: int = 0

    @property
    def epochs(self) -> tuple[int, ...]:
        """One a member."""
        if isinstance(self.epoch, int):
            return (self.epoch,) * len(self.seeds)
        assert len(self.epoch) == len(self.seeds), (len(self.epoch), len(self.seeds))
        return tuple(self.epoch)

    def views(self, num_views: int, batch: int) -> list[int]:
        """Which view of each sample is read: (B,) in 0..num_views - 1. One for all, by the first seed.

        A fleet draws them by the seed of the batches' order, which its members share.
        """
        keyed = generator(self.seeds[0], "view", self.epochs[0], self.step)
        return torch.randint(num_views, (batch,), generator=keyed).tolist()

    def keep(self, purpose: str, rate: float | Sequence[float], batch: int, device: torch.device) -> Tensor:
        """Which samples keep a branch: (M, B), 1/(1-rate) where kept and 0 where dropped.

        Args:
            purpose: names the branch.
            rate: probability that a sample drops it; one for all, or one a member.
            batch: B.
            device: of the result.
        """
        rates = (rate,) * len(self.seeds) if isinstance(rate, int | float) else rate
        rows = [
            self._kept(generator(seed, purpose, epoch, self.step), one, batch)
            for seed, epoch, one in zip(self.seeds, self.epochs, rates, strict=True)
        ]
        return torch.stack(rows).to(device)

    @staticmethod
    def _kept(keyed: torch.Generator, rate: float, batch: int) -> Tensor:
        if not rate:
            return torch.ones(batch)  # its generator serves nothing else: nothing is drawn in vain
        return (torch.rand(batch, generator=keyed) >= rate).float() / (1.0 - rate)
