"""Members of one architecture that read the same batches: one model, one optimiser, one step for all.

A member never meets another: its loss, its gradient's norm, its rate and its slice of every parameter are
its own, so it ends where it would have ended alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.blend import AUTO, Solved
from sidetune.features import Features
from sidetune.keyed import Draws
from sidetune.model import SideModel
from sidetune.optimizer import MemberAdamW, MemberState, Update
from sidetune.recipe import Recipe, TrainRecipe
from sidetune.sides.chunks import threads_to_chunks
from sidetune.tasks import Classify, MultiLabel, Task
from sidetune.threads import tiny_to_zero

Build = Callable[[Sequence[Recipe], int], SideModel]


@dataclass(frozen=True, eq=False)
class Member:
    """One side network of a fleet.

    Args:
        name: its own within the fleet.
        recipe: of side, head and training, with the epochs filled in. What it says of data, backbone and
            features is what all members share.
        task: its loss and what its outputs mean.
        targets: of every row of the data, as the task takes them.
        rows: (n,) that it trains on, among those that the fleet reads.
        ridge: on these rows, with which it answers; None where its recipe has no share of it.
    """

    name: str
    recipe: Recipe
    task: Task
    targets: Tensor
    rows: NDArray[np.int64]
    ridge: Solved | None = None

    @property
    def epochs(self) -> int:
        """How many it trains for."""
        assert self.recipe.train.epochs is not None, "resolve the recipe first"
        return self.recipe.train.epochs

    @property
    def share(self) -> float:
        """Of ridge in its answer while it trains: none where that is chosen afterwards."""
        share = self.recipe.head.ridge
        return 0.0 if share == AUTO else float(share)

    @property
    def stream(self) -> tuple[int, int]:
        """Members of one stream read the same batches: (seed of their order, batch size)."""
        train = self.recipe.train
        return (train.seed if train.order_seed is None else train.order_seed, train.batch_size)

    @property
    def architecture(self) -> str:
        """Members of one architecture are one model."""
        side = self.recipe.side.model_dump(mode="json", exclude={"drop_path"})
        return repr(
            (
                sorted(side.items()),
                self.recipe.head.norm,
                self.recipe.head.ridge != 0,
                self.recipe.train.precision,
            )
        )


@dataclass
class Place:
    """A member's place in a fleet: where its training stands.

    Args:
        member: whose it is.
        joined: the fleet's epoch in which it began.
        steps: that its schedule has come through, those without a sample of its own among them.
        loss_sum: over the samples of this epoch.
        seen: how many those are.
        died: epoch and step at which its loss was not finite.
        state: weights and moments, where no bucket holds them.
    """

    member: Member
    joined: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    seen: int = 0
    died: tuple[int, int] | None = None
    state: MemberState | None = field(default=None, repr=False)

    @property
    def alive(self) -> bool:
        """Whether it is still updated."""
        return self.died is None

    def learning_rate(self, step: int, steps: int) -> float:
        """At a step of its schedule, of so many steps an epoch."""
        return learning_rate(step, self.member.epochs * steps, self.member.recipe.train)

    def weight_decay(self, steps: int) -> float:
        """Of so many steps an epoch."""
        return self.member.recipe.weight_decay(self.member.epochs * steps)


class Bucket:
    """Members of one architecture and stream.

    Args:
        places: theirs, M of them.
        build: recipes of M members of one architecture, and K -> a model, on its device, not yet started.
        num_outputs: K of the widest member of the fleet; a narrower one has zeros behind its own.
        read: (n,) rows that the fleet reads.
    """

    def __init__(
        self, places: Sequence[Place], build: Build, num_outputs: int, read: NDArray[np.int64]
    ) -> None:
        self.places = list(places)
        members = [place.member for place in places]
        self.model = build([member.recipe for member in members], num_outputs)
        self.device = next(self.model.parameters()).device
        self.seeds = [member.recipe.train.seed for member in members]
        fresh = [place.state is None for place in places]
        self.model.start(
            [seed if new else None for seed, new in zip(self.seeds, fresh, strict=True)],
            [member.task.num_outputs for member in members],
        )
        for m, member in enumerate(members):
            if self.model.blend is not None and member.ridge is not None:
                self.model.blend.put(m, member.ridge, member.share)
        self.optimizer = MemberAdamW(self.model.parameters())
        for m, place in enumerate(places):
            if place.state is not None:
                self.optimizer.put(m, place.state)
                place.state = None
        self._losses = _group(members, read)
        self._autocast = members[0].recipe.train.is_bf16(self.device)

    @property
    def names(self) -> list[str]:
        """Of the members, in their order."""
        return [place.member.name for place in self.places]

    def leave(self) -> None:
        """Give every member's weights and moments back to its place."""
        for m, place in enumerate(self.places):
            place.state = self.optimizer.get(m)

    def step(self, rows: NDArray[np.int64], features: Features, *, epoch: int, step: int, total: int) -> None:
        """One update of every member that has a sample in the batch.

        Args:
            rows: (B,) of the data.
            features: of these rows, on the device.
            epoch: of the fleet.
            step: of the epoch.
            total: steps of an epoch.
        """
        if not any(place.alive for place in self.places):
            return
        self.model.train()
        draws = Draws(self.seeds, [epoch - place.joined for place in self.places], step)
        with step_threads(self.model):
            with self.autocast():
                output_MBK = self.model(features, draws)
            losses_M, counts = self._loss(output_MBK, torch.from_numpy(rows))
            losses_M.sum().backward()  # each member's own gradient is in its own slice
            self._account(losses_M.detach().double().tolist(), counts, (epoch, step))
            self.optimizer.step(self._updates(counts, total))
        for place in self.places:
            place.steps += 1

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the members' recipe asks for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

    def _loss(self, output_MBK: Tensor, rows: Tensor) -> tuple[Tensor, list[int]]:
        """Mean loss of each member over its own samples, (M,), and how many those are."""
        losses: list[Tensor] = [output_MBK.new_zeros(())] * len(self.places)
        counts = [0] * len(self.places)
        for group in self._losses:
            for m, loss, count in zip(group.members, *group.loss(output_MBK, rows), strict=True):
                losses[m], counts[m] = loss, count
        return torch.stack(losses), counts

    def _account(self, losses: list[float], counts: list[int], when: tuple[int, int]) -> None:
        for place, loss, count in zip(self.places, losses, counts, strict=True):
            if place.alive and not math.isfinite(loss):
                place.died = when
            place.loss_sum += loss * count
            place.seen += count

    def _updates(self, counts: list[int], total: int) -> dict[int, Update]:
        updates = {}
        for m, (place, count) in enumerate(zip(self.places, counts, strict=True)):
            if place.alive and count:
                recipe = place.member.recipe
                rate, decay = place.learning_rate(place.steps, total), place.weight_decay(total)
                updates[m] = Update(rate, decay, recipe.train.clip_norm)
        return updates

    def outputs(self, features: Features) -> Tensor:
        """Outputs outside training: (M, B, K), float32 or float64, on the CPU."""
        self.model.eval()
        with torch.no_grad(), step_threads(self.model):
            output_MBK = self.model(features)
        widened: Tensor = output_MBK if output_MBK.dtype == torch.float64 else output_MBK.float()
        return widened.cpu()

    def alone(self, m: int, build: Build) -> SideModel:
        """A member as a model of its own, on the CPU, in eval mode."""
        member = self.places[m].member
        own = build([member.recipe], member.task.num_outputs).cpu()
        theirs = self.model.state_dict()
        stacked = {name for name, _ in self.model.named_parameters()}
        tensors = {}
        for name, tensor in own.state_dict().items():
            found = theirs[name][m : m + 1] if name in stacked else theirs[name]
            if name.startswith("head.") or name in ("blend.weight_MFK", "blend.bias_MK"):
                found = found[..., : member.task.num_outputs]
            assert found.shape == tensor.shape, name
            tensors[name] = found
        own.load_state_dict(tensors)
        return own.eval()


@dataclass(frozen=True)
class _SameLoss:
    """Members that one call of a task's loss serves.

    Args:
        members: their numbers in the bucket.
        task: of the first; its loss is that of all.
        targets: of every row.
        trains_GN: whether a member trains on a row, for all rows of the data; None: all of them do.
    """

    members: list[int]
    task: Task
    targets: Tensor
    trains_GN: Tensor | None

    def loss(self, output_MBK: Tensor, rows_B: Tensor) -> tuple[Tensor, list[int]]:
        """Mean loss of each of these members over its samples of the batch, (G,), and their number."""
        output_GBK = output_MBK if len(self.members) == len(output_MBK) else output_MBK[self.members]
        target = self.targets[rows_B].to(output_MBK.device)
        loss_GB = self.task.loss(output_GBK[..., : self.task.num_outputs], target)
        if self.trains_GN is None:
            return loss_GB.mean(1), [len(rows_B)] * len(self.members)
        trains_GB = self.trains_GN[:, rows_B]
        counts_G = trains_GB.sum(1)
        own_GB = loss_GB.masked_fill(~trains_GB.to(loss_GB.device), 0.0)
        return own_GB.sum(1) / counts_G.clamp(min=1).to(loss_GB.device), counts_G.tolist()


def _group(members: Sequence[Member], read: NDArray[np.int64]) -> list[_SameLoss]:
    """Members by loss and targets: one call serves all that share both."""
    groups: dict[Any, list[int]] = {}
    for m, member in enumerate(members):
        groups.setdefault((_loss_of(member.task), id(member.targets)), []).append(m)
    found = []
    for numbers in groups.values():
        first = members[numbers[0]]
        trains_GN = torch.zeros(len(numbers), len(first.targets), dtype=torch.bool)
        for row, m in enumerate(numbers):
            trains_GN[row, torch.from_numpy(members[m].rows)] = True
        all_do = bool(trains_GN[:, torch.from_numpy(read)].all())
        found.append(_SameLoss(numbers, first.task, first.targets, None if all_do else trains_GN))
    return found


def _loss_of(task: Task) -> Task:
    """What the loss depends on: shares of classes, measured on a member's own rows, have no part in it."""
    if isinstance(task, Classify | MultiLabel):
        return replace(task, shares=(0.0,) * task.num_outputs)
    return task


@contextmanager
def step_threads(model: SideModel) -> Iterator[None]:
    """On the CPU the threads of a step are a chunked side's own, and tiny numbers are zero."""
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    with tiny_to_zero(), threads_to_chunks(when=model.side.form == "fast"):
        yield


def learning_rate(step: int, total: int, recipe: TrainRecipe) -> float:
    """Linear from lr/100 over the warm-up's steps, then cosine to lr/1000 at the last step.

    Args:
        step: from 0.
        total: steps of the whole training.
        recipe: its peak and the share of the warm-up.
    """
    warm = round(recipe.warmup * total)
    if step < warm:
        return recipe.lr * (0.01 + 0.99 * step / warm)
    through = (step - warm) / max(total - 1 - warm, 1)
    return recipe.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(through, 1.0))))
