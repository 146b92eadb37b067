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
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sidetune.errors import ArtifactError, first_complaint
from sidetune.files import write_tensors

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's
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
    window: int | None = None  # shards shuffled together: a machine with other memory goes on as it was begun
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
        "window": state.window,
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
            progress = _Progress.model_validate_json(stored.metadata()["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        if progress.run != run_hash:
            raise ArtifactError(f"{path} is a checkpoint of another run. Type: --out with a new folder")
        _check_like(state, tensors)
        model.load_state_dict(_under(tensors, "model."))
        _load_moments(optimizer, _under(tensors, "optimizer."))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ArtifactError):
            raise
        reason = first_complaint(error) if isinstance(error, ValidationError) else error
        raise ArtifactError(
            f"{path} is damaged: {reason}. Type: rm {path}, then the same fit command, which trains anew"
        ) from error
    state.epoch, state.step = progress.epoch, progress.step
    state.seconds, state.window = progress.seconds, progress.window
    state.best = -math.inf if progress.best is None else progress.best
    state.best_weights = _under(tensors, "best.")
    state.loss_sum, state.alive = tensors["state.loss_sum"], tensors["state.alive"]
    state.history = list(progress.history)


class _Progress(BaseModel):
    """What a checkpoint's metadata hold."""

    run: str
    epoch: NonNegativeInt
    step: NonNegativeInt
    seconds: float
    window: PositiveInt | None = None
    best: float | None
    history: tuple[Epoch, ...]


def _check_like(state: State, tensors: Mapping[str, Tensor]) -> None:
    """Sums and members must be as many and of the kind that training has."""
    for name, tensor in (("loss_sum", state.loss_sum), ("alive", state.alive)):
        found = tensors[f"state.{name}"]
        if len(tensor) and (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}")


def _load_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Moments by the position of their parameter; each must have its shape, a count of steps has none."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, moment = name.partition(".")
        parameter = parameters[int(index)] if index.isdecimal() and int(index) < len(parameters) else None
        if parameter is None or tensor.shape != (torch.Size([]) if moment == "step" else parameter.shape):
            raise ValueError(f"optimizer.{name} has shape {tuple(tensor.shape)}")
        moments.setdefault(int(index), {})[moment] = tensor
    for index_of, found in moments.items():
        if found.keys() != MOMENTS:
            raise ValueError(f"optimizer.{index_of} holds {', '.join(sorted(found))}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
