"""A checkpoint: one safetensors file with weights, moments and where training stands.

Renamed into place, so it is whole or the one before. It holds no generator state: all randomness is
keyed by (seed, purpose, epoch, step).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sidetune.errors import ArtifactError
from sidetune.files import write_tensors

Scores: TypeAlias = dict[str, float | None]


@dataclass(frozen=True)
class Epoch:
    """One line of history.

    Args:
        epoch: from 0.
        loss: mean training loss, one a member; NaN for a member that was dropped.
        lr: at the epoch's last step.
        val: validation scores, one dict a member.
        seconds: that the epoch took, validation included.
    """

    epoch: int
    loss: tuple[float, ...]
    lr: float
    val: tuple[Scores, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A row of history.jsonl; a single member's values stand bare."""
        finite = [value if math.isfinite(value) else None for value in self.loss]
        single = len(finite) == 1
        return {
            "epoch": self.epoch,
            "loss": finite[0] if single else finite,
            "lr": self.lr,
            "val": self.val[0] if single else list(self.val),
            "seconds": self.seconds,
        }


@dataclass
class State:
    """Where training stands; everything a checkpoint holds beside weights and moments."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # of this epoch, until the checkpoint
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    alive: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    history: list[Epoch] = field(default_factory=list)
    best: float = -math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    path: Path, run_hash: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: State
) -> None:
    """Write weights, moments and state. `run_hash` says which run they belong to."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best_weights.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors |= {"state.loss_sum": state.loss_sum, "state.alive": state.alive}
    progress = {
        "run": run_hash,
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.seconds,
        "best": None if state.best == -math.inf else state.best,
        "history": [vars(epoch) for epoch in state.history],
    }
    write_tensors(path, tensors, {"state": json.dumps(progress)})


def load_checkpoint(
    path: Path, run_hash: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: State
) -> None:
    """Restore what `save_checkpoint` wrote, in place.

    Raises:
        ArtifactError: it belongs to another run, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            progress = json.loads(stored.metadata()["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}. Type: rm {path}, then the same fit command, which trains anew"
        ) from error
    if progress["run"] != run_hash:
        raise ArtifactError(f"{path} is a checkpoint of another run. Type: --out with a new folder")
    model.load_state_dict(_under(tensors, "model."))
    saved = optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer.").items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({**saved, "state": moments})
    state.epoch, state.step = progress["epoch"], progress["step"]
    state.seconds = progress["seconds"]
    state.best = -math.inf if progress["best"] is None else progress["best"]
    state.best_weights = _under(tensors, "best.")
    state.loss_sum, state.alive = tensors["state.loss_sum"], tensors["state.alive"]
    state.history = [
        Epoch(row["epoch"], tuple(row["loss"]), row["lr"], tuple(row["val"]), row["seconds"])
        for row in progress["history"]
    ]


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
