"""The one loop: one member or many, epoch after epoch, until every member has ended.

A member ends after its own epochs, or when its loss is not finite; its place is given back. Where not
all fit into memory at once they train in waves, and each wave begins as if it were alone. All randomness is
keyed by (seed, purpose, epoch, step), so a checkpoint holds no generator state and a resumed run ends with
the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sidetune.bucket import Member
from sidetune.checkpoint import Epoch, Saved, Scores, Track, load_checkpoint, save_checkpoint
from sidetune.errors import DivergedError
from sidetune.fleet import Fleet
from sidetune.model import SideModel
from sidetune.progress import Progress, say

CHECKPOINT_SECONDS = 20.0  # at most this much training is lost to a kill

Validate = Callable[[Fleet], Mapping[str, Scores]]


@dataclass(frozen=True)
class Trained:
    """What became of a member.

    Args:
        model: as it was selected, on the CPU, in eval mode; None: its loss was not finite.
        history: one `Epoch` an epoch.
        wave: number of that in which it trained.
    """

    model: SideModel | None
    history: list[Epoch]
    wave: int = 0


def train(
    fleet: Fleet,
    members: Sequence[Member],
    *,
    validate: Validate | None = None,
    at_once: int | None = None,
    checkpoint: Path | None = None,
    run_hash: str = "",
    quiet: bool = False,
) -> dict[str, Trained]:
    """Train members to their ends.

    Args:
        fleet: that nobody trains in yet.
        members: all of them; `Recipe.train.select` and each task's headline say which epoch is kept.
        validate: called after every epoch; scores of members by name, of those that have any. None: no
            scores before the end.
        at_once: members of a wave; None: all.
        checkpoint: file to resume from and to write to; None: neither.
        run_hash: what the checkpoint must belong to.
        quiet: no progress.

    Returns:
        What became of each, by name, in the order of `members`. The fleet is empty again.

    Raises:
        DivergedError: no member's loss stayed finite.
        ArtifactError: the checkpoint belongs to another run.
    """
    loop = _Loop(fleet, {member.name: member for member in members}, validate, quiet)
    if checkpoint is not None and checkpoint.exists():
        loop.saved = load_checkpoint(checkpoint, run_hash, fleet, loop.members)
    at_once = len(members) if at_once is None else at_once
    saved = time.monotonic()

    def after_step() -> None:
        nonlocal saved
        progress.advance(1, loop.note())
        if checkpoint is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
            loop.saved.seconds = loop.seconds()
            save_checkpoint(checkpoint, run_hash, fleet, loop.saved)
            saved = time.monotonic()

    total, left = (_steps(fleet, part, at_once) for part in (members, loop.left()))
    with Progress("train", total, "steps", done=total - left + loop.begun(), quiet=quiet) as progress:
        while fleet.names or loop.waiting():
            if not fleet.names:
                loop.begin(loop.waiting()[:at_once])
            loop.run_epoch(after_step)
    return {name: loop.result(name) for name in loop.members}


class _Loop:
    """Members on their way through the epochs."""

    def __init__(
        self, fleet: Fleet, members: dict[str, Member], validate: Validate | None, quiet: bool
    ) -> None:
        self.fleet, self.members, self.validate, self.quiet = fleet, members, validate, quiet
        self.saved = Saved()
        self._started = time.monotonic()

    def waiting(self) -> list[Member]:
        """Members that have not begun."""
        return [member for name, member in self.members.items() if name not in self.saved.tracks]

    def left(self) -> list[Member]:
        """Members that have not ended."""
        tracks = self.saved.tracks
        return [m for name, m in self.members.items() if name not in tracks or not tracks[name].ended]

    def begun(self) -> int:
        """Steps that the wave under way has made."""
        fleet = self.fleet
        sizes = [stream.batch_size for stream in fleet.streams()]
        whole = fleet.epoch * sum(map(fleet.steps, sizes))
        return whole + sum(map(fleet.steps, sizes[: fleet.stream])) + fleet.step

    def begin(self, wave: Sequence[Member]) -> None:
        """Let members train that have not begun."""
        self.fleet.restart()
        self.fleet.add(wave)
        number = 1 + max((track.wave for track in self.saved.tracks.values()), default=-1)
        self.saved.tracks |= {member.name: Track(wave=number) for member in wave}

    def seconds(self) -> float:
        """That this epoch has taken so far."""
        return time.monotonic() - self._started

    def run_epoch(self, after_step: Callable[[], None]) -> None:
        """One pass, its scores, and who leaves after it."""
        self._started = time.monotonic() - self.saved.seconds
        epoch = self.fleet.epoch
        losses = self.fleet.train_epoch(after_step)
        scores = self.validate(self.fleet) if self.validate is not None and self._anybody() else {}
        self.saved.seconds = 0.0
        for name, place in self.fleet.places.items():
            lr = place.learning_rate(place.steps - 1, self.fleet.steps(place.member.stream[1]))
            line = Epoch(epoch - place.joined, losses[name], lr, scores.get(name, {}), self.seconds())
            self.saved.tracks[name].history.append(line)
        self._drop([name for name, place in self.fleet.places.items() if not place.alive])
        for name in self.fleet.names:
            self._keep_best(name)
        self._end([name for name in self.fleet.names if self._is_done(name)])

    def _anybody(self) -> bool:
        return any(place.alive for place in self.fleet.places.values())

    def _is_done(self, name: str) -> bool:
        return self.fleet.epochs_done(name) == self.members[name].epochs

    def _drop(self, names: Collection[str]) -> None:
        """Members whose loss is not finite take no further part.

        Raises:
            DivergedError: none is left.
        """
        for name in names:
            died = self.fleet.places[name].died
            assert died is not None
            where = f"at epoch {died[0]}, step {died[1]}"
            track = self.saved.tracks[name]
            track.ended = track.dropped = True
            if all(one.dropped for one in self.saved.tracks.values()) and not self.waiting():
                lower = "" if len(self.members) == 1 else ", or lower rates in --members"
                raise DivergedError(
                    f"the loss is not finite {where}: every member diverged. Type: --set train.lr=3e-4{lower}"
                )
            say(f"{name} diverged {where} and is dropped; the others go on", quiet=self.quiet)
        self.fleet.remove(names)

    def _keep_best(self, name: str) -> None:
        """Remember the model of the best epoch on validation."""
        member, track = self.members[name], self.saved.tracks[name]
        if member.recipe.train.select != "best":
            return
        if not track.history[-1].val and track.model is not None:
            return  # its outputs are not finite
        score = track.history[-1].val.get(member.task.headline)
        if score is None or score > track.best:  # where the score is not defined, the last epoch is kept
            track.best = track.best if score is None else score
            track.model = self.fleet.model(name)

    def _end(self, names: Collection[str]) -> None:
        for name, model in self.fleet.remove(names).items():
            track = self.saved.tracks[name]
            track.ended = True
            if self.members[name].recipe.train.select == "last":
                track.model = model

    def result(self, name: str) -> Trained:
        """Of a member that has ended."""
        track = self.saved.tracks[name]
        return Trained(None if track.dropped else track.model, track.history, track.wave)

    def note(self) -> str:
        """Where training stands, for people."""
        places = list(self.fleet.places.values())
        first = places[0]
        losses = [place.loss_sum / place.seen for place in places if place.alive and place.seen]
        loss = sum(losses) / len(losses) if losses else math.nan
        text = f"epoch {self.fleet.epoch - first.joined + 1}/{first.member.epochs} loss {loss:.3f}"
        tracks = [self.saved.tracks[place.member.name] for place in places]
        scores = [
            score
            for place, track in zip(places, tracks, strict=True)
            if track.history and (score := track.history[-1].val.get(place.member.task.headline)) is not None
        ]
        if len(places) > 1:
            text = f"{len(places)} members, {text}"
        return f"{text} val {max(scores):.3f}" if scores else text


def _steps(fleet: Fleet, members: Sequence[Member], at_once: int) -> int:
    """That so many members take in waves, if all reach their ends."""
    total = 0
    for first in range(0, len(members), at_once):
        epochs: dict[tuple[int, int], int] = {}
        for member in members[first : first + at_once]:
            epochs[member.stream] = max(member.epochs, epochs.get(member.stream, 0))
        total += sum(count * fleet.steps(stream[1]) for stream, count in epochs.items())
    return total
