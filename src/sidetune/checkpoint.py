"""A checkpoint: one safetensors file with every member's weights and moments, and where training stands.

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

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidetune.bucket import Member, Place
from sidetune.errors import ArtifactError, first_complaint
from sidetune.files import write_tensors
from sidetune.fleet import Fleet
from sidetune.model import SideModel
from sidetune.optimizer import MemberState

Scores: TypeAlias = dict[str, float | None]
STATE = ("weights", "mean", "square")


@dataclass(frozen=True)
class Epoch:
    """One line of a member's history.

    Args:
        epoch: from 0.
        loss: mean training loss; NaN for a member that was dropped.
        lr: at the epoch's last step.
        val: validation scores.
        seconds: that the epoch took for all members, validation included.
    """

    epoch: int
    loss: float
    lr: float
    val: Scores
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A row of history.jsonl."""
        return {**vars(self), "loss": self.loss if math.isfinite(self.loss) else None}


@dataclass
class Track:
    """What is kept of a member beside its place.

    Args:
        history: one `Epoch` an epoch.
        best: of its headline scores.
        model: of the best epoch where that is asked for; of the last once it has ended.
        ended: it has left the fleet.
        dropped: it left because its loss was not finite.
        wave: number of that in which it trains.
    """

    history: list[Epoch] = field(default_factory=list)
    best: float = -math.inf
    model: SideModel | None = None
    ended: bool = False
    dropped: bool = False
    wave: int = 0


@dataclass
class Saved:
    """What a checkpoint holds beside the fleet.

    Args:
        tracks: by the member's name.
        seconds: of this epoch, until the checkpoint.
        extra: what the caller wants back, as JSON holds it.
    """

    tracks: dict[str, Track] = field(default_factory=dict)
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, run_hash: str, fleet: Fleet, saved: Saved) -> None:
    """Write the fleet as it stands. `run_hash` says which run it belongs to."""
    tensors: dict[str, Tensor] = {}
    states = fleet.states()
    for name, state in states.items():
        tensors |= {f"{name}/{part}": getattr(state, part) for part in STATE}
    for name, track in saved.tracks.items():
        if track.model is not None:
            tensors |= {f"{name}/model/{key}": tensor for key, tensor in track.model.state_dict().items()}
    progress = {
        "run": run_hash,
        "epoch": fleet.epoch,
        "stream": fleet.stream,
        "step": fleet.step,
        "window": fleet.window,
        "seconds": saved.seconds,
        "places": [
            {
                "name": name,
                "joined": place.joined,
                "steps": place.steps,
                "updates": states[name].steps,
                "loss_sum": place.loss_sum,
                "seen": place.seen,
                "died": place.died,
            }
            for name, place in fleet.places.items()
        ],
        "tracks": [
            {
                "name": name,
                "history": [vars(epoch) for epoch in track.history],
                "best": None if track.best == -math.inf else track.best,
                "ended": track.ended,
                "dropped": track.dropped,
                "wave": track.wave,
            }
            for name, track in saved.tracks.items()
        ],
        "extra": saved.extra,
    }
    write_tensors(path, tensors, {"state": json.dumps(progress)})


def load_checkpoint(path: Path, run_hash: str, fleet: Fleet, members: Mapping[str, Member]) -> Saved:
    """Seat the members of a checkpoint in a fleet that has none.

    Args:
        path: of the file.
        run_hash: what it must belong to.
        fleet: of the same data.
        members: those that may be in it, by name.

    Returns:
        The rest of what was saved.

    Raises:
        ArtifactError: it belongs to another run, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            progress = _Progress.model_validate_json(stored.metadata()["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        if progress.run != run_hash:
            raise ArtifactError(f"{path} is a checkpoint of another run. Type: --out with a new folder")
        tracks = {one.name: one.track(members[one.name], fleet, tensors) for one in progress.tracks}
        places = [one.place(members[one.name], tensors) for one in progress.places]
        fleet.resume(places, progress.epoch, progress.stream, progress.step, progress.window)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ArtifactError):
            raise
        reason = first_complaint(error) if isinstance(error, ValidationError) else str(error)
        reason = reason.partition("\n")[0].rstrip(".: ")
        raise ArtifactError(
            f"{path} is damaged, or of another version: {reason}. Type: rm {path}, then the same command, "
            "which trains anew"
        ) from error
    return Saved(tracks, progress.seconds, progress.extra)


class _Place(BaseModel):
    """A `Place` in a checkpoint's metadata."""

    name: str
    joined: NonNegativeInt
    steps: NonNegativeInt
    updates: NonNegativeInt
    loss_sum: float
    seen: NonNegativeInt
    died: tuple[NonNegativeInt, NonNegativeInt] | None

    def place(self, member: Member, tensors: Mapping[str, Tensor]) -> Place:
        """With the state that the file holds."""
        weights, mean, square = (tensors[f"{self.name}/{part}"] for part in STATE)
        state = MemberState(weights, mean, square, self.updates)
        fields = self.model_dump(exclude={"name", "updates"})
        return Place(member, state=state, **fields)


class _Track(BaseModel):
    """A `Track` in a checkpoint's metadata."""

    name: str
    history: list[Epoch]
    best: float | None
    ended: bool
    dropped: bool
    wave: NonNegativeInt

    def track(self, member: Member, fleet: Fleet, tensors: Mapping[str, Tensor]) -> Track:
        """With the model that the file holds, if any."""
        begin = f"{self.name}/model/"
        found = {name.removeprefix(begin): one for name, one in tensors.items() if name.startswith(begin)}
        model = None
        if found:
            model = fleet.build([member.recipe], member.task.num_outputs).cpu().eval()
            model.load_state_dict(found)
        best = -math.inf if self.best is None else self.best
        return Track(list(self.history), best, model, self.ended, self.dropped, self.wave)


class _Progress(BaseModel):
    """What a checkpoint's metadata hold."""

    run: str
    epoch: NonNegativeInt
    stream: NonNegativeInt
    step: NonNegativeInt
    window: PositiveInt | None
    seconds: float
    places: list[_Place]
    tracks: list[_Track]
    extra: dict[str, Any]
