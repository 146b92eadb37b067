"""Many side networks in one pass over the features.

    Member    what one trains on and how: recipe, task, targets, rows
    Place     where its training stands
    Bucket    members of one architecture: one model, one optimiser
    stream    buckets that read the same batches
    Fleet     all of it; members join and leave between epochs

A batch is read once for all members of a stream, and a tap is read once for all members of a bucket.
Training one network is a fleet of one: there is no second code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.bucket import Bucket, Build, Member, Place
from sidetune.features import Features, Spec
from sidetune.keyed import Draws
from sidetune.model import SideModel
from sidetune.optimizer import MemberState
from sidetune.reader import AHEAD, Ahead, EpochOrder, Layout, pinned, sent

__all__ = ["Batch", "Fleet", "Inputs", "Member", "Place", "TrainingSet"]


class Inputs(Protocol):
    """Gives a batch of what the models read: `Features` for sides."""

    def __call__(self, rows: Sequence[int], spec: Spec, draws: Draws) -> Features:
        """These taps of these rows, in this order; `draws` chooses among views of them."""


class InOrder(Protocol):
    """Gives what is only scored."""

    def __call__(self, rows: NDArray[np.int64], spec: Spec, view: int) -> Iterator[Features]:
        """A view of many rows, some at a time, in order."""


@dataclass(frozen=True)
class TrainingSet:
    """What a fleet reads.

    Args:
        inputs: rows, taps and the step's draws -> a batch.
        in_order: rows, taps and the number of a view -> batches to score.
        rows: (n,) that an epoch reads; each member trains on some of them.
        spec: all taps that a member may read.
        layout: of taps, where the rows are read; None: their order makes no difference.
        window: shards of the layout that are shuffled together; None: all.
        ahead: batches that `inputs` prepares on another thread while one is used, in the steps' order.
    """

    inputs: Inputs
    in_order: InOrder
    rows: NDArray[np.int64]
    spec: Spec
    layout: Callable[[Spec], Layout | None] = lambda spec: None
    window: int | None = None
    ahead: int = AHEAD


@dataclass(frozen=True)
class Batch:
    """One step's inputs.

    Args:
        rows: (B,) of the data.
        inputs: of these rows.
    """

    rows: NDArray[np.int64]
    inputs: Features


@dataclass(frozen=True)
class _Stream:
    """Buckets that read the same batches."""

    order_seed: int
    batch_size: int
    buckets: tuple[Bucket, ...]

    @property
    def alive(self) -> bool:
        """Whether any of their members is still updated."""
        return any(place.alive for bucket in self.buckets for place in bucket.places)

    def spec(self, every: Spec) -> Spec:
        """The taps that any of them reads."""
        read = {name for bucket in self.buckets for name in bucket.model.side.spec.names}
        return every.select([name for name in every.names if name in read])


class Fleet:
    """Side networks that train in one pass.

    Args:
        data: what they read.
        build: recipes of M members of one architecture, and K -> a model on its device.
        num_outputs: K of the widest member that will ever join.
    """

    def __init__(self, data: TrainingSet, build: Build, num_outputs: int) -> None:
        self.data, self.build, self.num_outputs = data, build, num_outputs
        self.window = data.window
        self.epoch, self.stream, self.step = 0, 0, 0  # where the next batch stands
        self.places: dict[str, Place] = {}
        self._streams: tuple[_Stream, ...] = ()
        self._changed = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the members that train."""
        return tuple(self.places)

    def add(self, members: Sequence[Member]) -> None:
        """Let members join at the next epoch, from their own starts.

        Args:
            members: of names that the fleet does not have.
        """
        assert self.at_rest, "members join between epochs"
        for member in members:
            assert member.name not in self.places, member.name
            assert member.task.num_outputs <= self.num_outputs, member.name
            self._seat(Place(member, joined=self.epoch))

    def _seat(self, place: Place) -> None:
        self.places[place.member.name] = place
        self._changed = True

    def resume(self, places: Sequence[Place], epoch: int, stream: int, step: int, window: int | None) -> None:
        """Stand where a checkpoint stood.

        Args:
            places: of its members, with their states.
            epoch: of the fleet.
            stream: whose turn it is.
            step: of that stream's epoch.
            window: shards shuffled together: a machine with other memory goes on as it was begun.

        Raises:
            ValueError: a state is not of its member's size.
        """
        assert not self.places, "a fleet resumes before anybody trains"
        self.epoch, self.stream, self.step, self.window = epoch, stream, step, window
        for place in places:
            self._seat(place)
        self.streams()

    def restart(self) -> None:
        """Count epochs from 0 again, where no member is left: the next ones begin as if they were alone."""
        assert not self.places and self.at_rest, self.names
        self.epoch = 0

    def states(self) -> dict[str, MemberState]:
        """Weights and moments of every member, copied."""
        states = {
            place.member.name: bucket.optimizer.get(m)
            for bucket in self.buckets()
            for m, place in enumerate(bucket.places)
        }
        return {name: states[name] for name in self.places}

    def remove(self, names: Collection[str]) -> dict[str, SideModel]:
        """Let members leave. Their place is given back: the next epoch costs less.

        Args:
            names: of members that train.

        Returns:
            Each as a model of its own, on the CPU, in eval mode.
        """
        assert self.at_rest, "members leave between epochs"
        alone = {name: self.model(name) for name in names}
        for name in names:
            self._changed |= self.places.pop(name) is not None
        return alone

    def model(self, name: str) -> SideModel:
        """A member as it stands: a model of its own, on the CPU, in eval mode."""
        bucket, m = self._find(name)
        return bucket.alone(m, self.build)

    @property
    def at_rest(self) -> bool:
        """Whether no epoch is under way."""
        return self.stream == self.step == 0

    def epochs_done(self, name: str) -> int:
        """Whole epochs that a member has trained for."""
        return self.epoch - self.places[name].joined

    def steps(self, batch_size: int) -> int:
        """Of an epoch."""
        return math.ceil(len(self.data.rows) / batch_size)

    def streams(self) -> tuple[_Stream, ...]:
        """Members by what they read, then by architecture; buckets that have not changed stay."""
        if self._changed:
            self._seat_all()
        return self._streams

    def buckets(self) -> Iterator[Bucket]:
        """All of them."""
        return (bucket for stream in self.streams() for bucket in stream.buckets)

    def train_epoch(self, after_step: Callable[[], None] = lambda: None) -> dict[str, float]:
        """One pass for all members, or the rest of one that was begun.

        Args:
            after_step: called after each.

        Returns:
            Mean loss of each member over its samples of this epoch; NaN where it was not finite at some
            step: such a member is no longer updated, and the caller lets it leave.
        """
        for number, stream in enumerate(self.streams()):
            if number < self.stream:
                continue
            with self._batches(stream) as batches:
                for batch in batches:
                    self._step(stream, batch)
                    del batch  # before the next is made: a live backbone's taps would stand twice
                    self.step += 1
                    after_step()
                    if not stream.alive:
                        break  # nobody learns from the rest
            self.stream, self.step = number + 1, 0
        return self._end_epoch()

    def _step(self, stream: _Stream, batch: Batch) -> None:
        features = sent(batch.inputs, stream.buckets[0].device)
        total = self.steps(stream.batch_size)
        for bucket in stream.buckets:
            own = features.select(bucket.model.side.spec.names)
            bucket.step(batch.rows, own, epoch=self.epoch, step=self.step, total=total)
            if not self.data.ahead:  # a live backbone runs next: it takes seconds, and needs the memory
                bucket.model.side.rest()

    def _end_epoch(self) -> dict[str, float]:
        losses = {}
        for name, place in self.places.items():
            losses[name] = place.loss_sum / max(place.seen, 1) if place.alive else math.nan
            place.loss_sum, place.seen = 0.0, 0
        self.epoch, self.stream, self.step = self.epoch + 1, 0, 0
        return losses

    def outputs(
        self, rows: NDArray[np.int64], *, names: Collection[str] | None = None, view: int = 0
    ) -> dict[str, Tensor]:
        """Outputs of members for some rows, read once for all.

        Args:
            rows: (n,) of the data.
            names: of members; None: all.
            view: number of the view of each image.

        Returns:
            name -> (n, K) on the CPU.
        """
        wanted = set(self.names if names is None else names)
        asked = [bucket for bucket in self.buckets() if not wanted.isdisjoint(bucket.names)]
        members = {place.member.name: place.member for bucket in asked for place in bucket.places}
        # of no rows there is no batch, and still an output
        parts = {name: [torch.zeros(0, self.num_outputs)] for name in members if name in wanted}
        spec = _Stream(0, 1, tuple(asked)).spec(self.data.spec)
        for batch in self.data.in_order(rows, spec, view) if len(rows) else ():
            features = batch.to(asked[0].device)
            for bucket in asked:
                outputs_MBK = bucket.outputs(features.select(bucket.model.side.spec.names))
                for name, output_BK in zip(bucket.names, outputs_MBK, strict=True):
                    if name in parts:
                        parts[name].append(output_BK)
            del batch, features  # before the next batch is made
        return {
            name: torch.cat(outputs)[:, : members[name].task.num_outputs] for name, outputs in parts.items()
        }

    def _find(self, name: str) -> tuple[Bucket, int]:
        for bucket in self.buckets():
            if name in bucket.names:
                return bucket, bucket.names.index(name)
        raise KeyError(name)

    def _seat_all(self) -> None:
        grouped: dict[tuple[int, int], dict[str, list[Place]]] = {}
        for place in self.places.values():
            of_stream = grouped.setdefault(place.member.stream, {})
            of_stream.setdefault(place.member.architecture, []).append(place)
        standing = {_seats(bucket.places): bucket for stream in self._streams for bucket in stream.buckets}
        staying = {_seats(places) for of_stream in grouped.values() for places in of_stream.values()}
        for seats, bucket in standing.items():
            if seats not in staying:
                bucket.leave()
        self._streams = tuple(
            _Stream(
                *stream,
                tuple(
                    standing.get(_seats(places))
                    or Bucket(places, self.build, self.num_outputs, self.data.rows)
                    for places in of_stream.values()
                ),
            )
            for stream, of_stream in grouped.items()
        )
        self._changed = False

    def _batches(self, stream: _Stream) -> Ahead[int, Batch]:
        """The rest of a stream's epoch. Its order hangs on seed, epoch and window alone."""
        data, size, epoch, begin = self.data, stream.batch_size, self.epoch, self.step
        spec = stream.spec(data.spec)
        layout = data.layout(spec)
        shards = np.zeros(len(data.rows), np.int64) if layout is None else layout.shards
        order = EpochOrder.draw(data.rows, shards, self.window, seed=stream.order_seed, epoch=epoch)
        on_gpu = stream.buckets[0].device.type == "cuda"

        def make(step: int) -> Batch:
            if layout is not None and order.shards:
                layout.fetch(order.soon(step * size, (step + 1) * size, begins=step == begin))
            rows = order.rows[step * size : (step + 1) * size]
            inputs = data.inputs(rows.tolist(), spec, Draws((stream.order_seed,), epoch, step))
            # what is on the GPU already comes from a backbone that runs there
            pin = on_gpu and inputs.layers[0].device.type == "cpu"
            return Batch(rows, pinned(inputs) if pin else inputs)

        return Ahead(range(begin, self.steps(size)), make, ahead=data.ahead)


def _seats(places: Sequence[Place]) -> tuple[int, ...]:
    """What a bucket is known by: the places themselves, in their order."""
    return tuple(map(id, places))
