"""Stage three: side networks in one fleet, on a job's features.

open_fleet(job, recipes)       what they read, and how each is built
new_member(job, recipe, ..)    one of them
train_members(work, ..)        all of them, to their ends
fit_sides(work)                a side a job: trained, ready to predict
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.artifact import build_model
from sidetune.blend import AUTO, Solved, give_best_share, ridge_alone
from sidetune.bucket import Member
from sidetune.checkpoint import Scores
from sidetune.errors import DivergedError
from sidetune.evaluate import headline_score, scores
from sidetune.features import Features, Spec
from sidetune.fleet import Fleet, TrainingSet
from sidetune.job import MANY_OUTPUTS, Fitted, Job, Work, union
from sidetune.keyed import Draws
from sidetune.machine import total_memory
from sidetune.memory import PeakMemory
from sidetune.model import SideModel
from sidetune.probes import Pooled, fit_ridge
from sidetune.reader import Layout
from sidetune.recipe import Recipe
from sidetune.sides.ridge import Ridge, RidgeRecipe
from sidetune.summary import Summary
from sidetune.tasks import Task
from sidetune.train import Trained, train
from sidetune.waves import members_at_once


def open_fleet(
    job: Job,
    recipes: Sequence[Recipe],
    rows: NDArray[np.int64],
    *,
    num_outputs: int | None = None,
    scaled_on: NDArray[np.int64] | None = None,
) -> Fleet:
    """A fleet on a job's features that nobody trains in yet.

    Args:
        job: its features.
        recipes: of all members that may join.
        rows: (n,) that an epoch reads.
        num_outputs: K of the widest member; None: the job's.
        scaled_on: (n,) that taps are scaled on, for all members alike; None: the job's training rows.
    """
    num_outputs = job.task.num_outputs if num_outputs is None else num_outputs
    scaled = job.recipe.features.tap_scale == "rms"
    scaled_on = job.split["train"] if scaled_on is None else scaled_on
    training = job.summary.rows(torch.from_numpy(scaled_on)) if scaled else None
    read = {name for recipe in recipes for name in described(job, recipe, num_outputs).side.spec.names}
    spec = job.source.spec.select([name for name in job.source.spec.names if name in read])
    layout = _layouts(job, rows)
    window = _window(job, layout(spec), recipes[0].train.shuffle_window)
    data = TrainingSet(
        partial(_inputs, job), partial(_in_order, job), rows, spec, layout, window, job.source.ahead
    )
    return Fleet(data, partial(_build, job, training), num_outputs)


def new_member(
    job: Job,
    recipe: Recipe,
    *,
    name: str,
    rows: NDArray[np.int64],
    task: Task | None = None,
) -> Member:
    """A member of a job's fleet.

    Args:
        job: whose features it reads and whose targets it learns.
        recipe: of side, head and training; epochs that are None are derived from its rows.
        name: its own.
        rows: (n,) that it trains on.
        task: measured on these rows; None: the job's.
    """
    resolved = recipe.model_copy(update={"train": recipe.train.resolved(len(rows))})
    task = job.task if task is None else task
    solved = _solved(job, resolved, rows, task) if recipe.head.ridge else None
    return Member(name, resolved, task, job.targets, rows, solved)


def _solved(job: Job, recipe: Recipe, rows: NDArray[np.int64], task: Task) -> Solved:
    """Ridge on these rows, solved once for all members that share them."""
    spec = described(job, recipe, task.num_outputs).side.spec
    key = (spec.names, rows.tobytes(), task)
    if key not in job.solved:
        nobody = np.zeros(0, np.int64)
        data = Pooled(job.summary.select(spec), job.targets, rows, nobody, job.dataset.group)
        probe = fit_ridge(RidgeRecipe(), data, task)
        side, head = probe.model.side, probe.model.head
        assert isinstance(side, Ridge)
        weight, bias = head.weight_MDK[0].detach(), head.bias_MK[0].detach()
        job.solved[key] = Solved(side.centre, side.spread, weight, bias)
    return job.solved[key]


def fit_sides(work: Work) -> list[Fitted]:
    """Train the own side of every job, all in one fleet.

    Raises:
        DivergedError: the side of a job diverged.
    """
    owners = {job.named(job.recipe.side.name): job for job in work.jobs}
    members = [
        new_member(job, job.recipe, name=name, rows=job.split["train"]) for name, job in owners.items()
    ]
    fleet = open_work(work, [member.recipe for member in members], work.rows("train"))
    for job, member in zip(work.jobs, members, strict=True):
        name, recipe = member.recipe.side.name, member.recipe.train
        model = described(job, member.recipe, job.task.num_outputs)
        parameters = model.num_parameters()
        how = f"{name}, {model.side.form} form" if hasattr(job.recipe.side, "form") else name
        job.say(
            f"training {how}: {parameters:,} parameters, {len(member.rows):,} images, {recipe.epochs} epochs"
        )
    with PeakMemory() as memory:
        trained = train_members(work, fleet, members, owners)
    return [
        _fitted(job, member, trained[member.name], fleet.window, memory.peak)
        for job, member in zip(work.jobs, members, strict=True)
    ]


def open_work(work: Work, recipes: Sequence[Recipe], rows: NDArray[np.int64]) -> Fleet:
    """A fleet for the members of all jobs. Taps have one scale, or they could not be read once for all."""
    scaled_on = work.rows("train")
    return open_fleet(work.common, recipes, rows, num_outputs=work.num_outputs, scaled_on=scaled_on)


def train_members(
    work: Work, fleet: Fleet, members: Sequence[Member], owners: Mapping[str, Job] | None
) -> dict[str, Trained]:
    """Train members to their ends, in as many passes as memory asks for.

    Args:
        work: whose checkpoint it is.
        fleet: that nobody trains in yet.
        members: all of them.
        owners: name of a member -> the job on whose validation it is scored after each epoch; None: no
            scores before the end, as with folds: every sample would be read once more an epoch.

    Raises:
        DivergedError: no member's loss stayed finite.
    """
    return train(
        fleet,
        members,
        validate=None if owners is None else partial(validate, owners),
        at_once=members_at_once(work.common, fleet, members) if len(members) > 1 else None,
        checkpoint=work.checkpoint,
        run_hash=work.recipe.hash,
        quiet=work.common.quiet,
    )


def _fitted(job: Job, member: Member, trained: Trained, window: int | None, peak_memory: int) -> Fitted:
    if trained.model is None:
        raise DivergedError(
            f"the network of column {job.column!r} diverged. Type: --set train.lr=3e-4, or leave "
            "the column out of --labels"
        )
    train_recipe = member.recipe.train.model_copy(update={"shuffle_window": window})
    recipe = member.recipe.train
    share = choose_share(job, trained.model) if job.recipe.head.ridge == AUTO else None
    return Fitted(
        job.recipe.side.name,
        trained.model,
        job.recipe.model_copy(update={"train": train_recipe}),
        trained.model.num_parameters(),
        seconds=sum(epoch.seconds for epoch in trained.history),
        peak_memory=peak_memory,
        detail={"epochs": recipe.epochs, "lr": recipe.lr}
        | ({} if window is None else {"shuffle_window": window})
        | ({} if share is None else {"ridge": share}),
        outputs=partial(model_outputs, job, trained.model),
        history=trained.history,
    )


def choose_share(job: Job, model: SideModel) -> float:
    """Give ridge the share in a network's answer that is best on validation. Returns it."""
    assert model.blend is not None
    network_nK = model_outputs(job, model, "val")
    with ridge_alone([model.blend]):
        ridge_nK = model_outputs(job, model, "val")
    targets = torch.from_numpy(job.dataset.targets[job.split["val"]])
    give_best_share([model.blend], job.task, network_nK, ridge_nK, targets)
    job.say(f"ridge's share in the answer: {model.blend.share:g}, by validation")
    return model.blend.share


def _build(job: Job, training: Summary | None, recipes: Sequence[Recipe], num_outputs: int) -> SideModel:
    """M members of one architecture, on the backbone's device."""
    rates = [getattr(recipe.side, "drop_path", 0.0) for recipe in recipes]
    model = build_model(
        recipes[0],
        job.source.spec,
        num_outputs,
        job.source.final_norm,
        drop_paths=rates,
        backbone=job.backbone,
    )
    if training is not None:
        model.side.tap_scale.copy_(training.select(model.side.spec).tap_scale())
    return model.to(job.backbone.device)


def described(job: Job, recipe: Recipe, num_outputs: int) -> SideModel:
    """What a recipe describes, without its numbers."""
    with torch.device("meta"):
        return build_model(recipe, job.source.spec, num_outputs, job.source.final_norm, backbone=job.backbone)


def _window(job: Job, layout: Layout | None, asked: int | None) -> int | None:
    """Shards that are shuffled together, said where they are not all."""
    if layout is None:
        return None
    window = layout.window(total_memory()) if asked is None else asked
    if window is not None and window < len(layout.num_bytes):
        job.say(f"shuffling {window} of {len(layout.num_bytes)} shards at a time")
        if not layout.by_hash:
            job.say(
                "the store holds samples in the order of their paths, as an earlier version made it. Where "
                "files are sorted by class, such a window costs accuracy. Type: the same command with "
                "--store and a new folder, which extracts again"
            )
    return window


def _inputs(job: Job, rows: Sequence[int], spec: Spec, draws: Draws) -> Features:
    num_views = len(job.source.reading.views)
    return job.source.features(rows, spec, draws.views(num_views, len(rows)) if num_views > 1 else 0)


def _in_order(job: Job, rows: NDArray[np.int64], spec: Spec, view: int) -> Iterator[Features]:
    return job.source.batches(rows, spec, view)


def _layouts(job: Job, rows: NDArray[np.int64]) -> Callable[[Spec], Layout | None]:
    """Where the rows are read, found once for each set of taps."""
    found: dict[tuple[str, ...], Layout | None] = {}

    def layout(spec: Spec) -> Layout | None:
        if spec.names not in found:
            found[spec.names] = job.source.layout(rows, spec)
        return found[spec.names]

    return layout


def mean_outputs(
    job: Job, fleet: Fleet, rows: NDArray[np.int64], names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Outputs of members for some rows, averaged over the views that are scored: (n, K), on the CPU."""
    of_views = [fleet.outputs(rows, names=names, view=view) for view in job.scored_views]
    return {name: torch.stack([one[name] for one in of_views]).mean(0) for name in of_views[0]}


def validate(owners: Mapping[str, Job], fleet: Fleet) -> dict[str, Scores]:
    """Scores of every member on the validation split of the job that it belongs to."""
    jobs = [owners[name] for name in fleet.names]
    rows = union([job.split["val"] for job in jobs])
    outputs = mean_outputs(jobs[0], fleet, rows)
    at = {id(job): torch.from_numpy(np.searchsorted(rows, job.split["val"])) for job in jobs}
    return {name: _scores(owners[name], output[at[id(owners[name])]]) for name, output in outputs.items()}


def _scores(job: Job, output: Tensor) -> Scores:
    predictions = job.task.predictions(output).double().numpy()
    if not np.isfinite(predictions).all():
        return {}
    targets = job.dataset.targets[job.split["val"]]
    if job.task.num_outputs > MANY_OUTPUTS:  # all scores after every epoch would take longer than the epoch
        return {job.task.headline: headline_score(job.task, predictions, targets)}
    return scores(job.task, predictions, targets)


def solo_epoch_seconds(job: Job, member: Member, timed: int) -> float:
    """Seconds of an epoch of one network that trains alone: the quickest, after one that warms up.

    Args:
        job: its features.
        member: as it trains; nothing of it is kept.
        timed: epochs that are timed.
    """
    fleet = open_fleet(job, [member.recipe], member.rows)
    fleet.add([member])
    seconds = []
    for _ in range(1 + timed):
        started = time.monotonic()
        fleet.train_epoch()
        seconds.append(time.monotonic() - started)
    return min(seconds[1:])


def model_outputs(job: Job, model: SideModel, split: str) -> Tensor:
    """Outputs of a split, averaged over the views that are scored: (n, K), on the CPU."""
    return row_outputs(job, model, job.split[split])


def row_outputs(job: Job, model: SideModel, rows: NDArray[np.int64]) -> Tensor:
    """Outputs of some rows, averaged over the views that are scored: (n, K), on the CPU.

    Args:
        job: whose features are read; the model may have been trained on another's.
        model: moved to the device of the job's backbone.
        rows: (n,) of the job's data.
    """
    if not len(rows):
        return torch.zeros(0, job.task.num_outputs)
    model.to(job.backbone.device)

    def output(batch: Features) -> Tensor:
        return model(batch.to(job.backbone.device))[0].float().cpu()  # type: ignore[no-any-return]

    of_views = []
    with torch.no_grad():
        for view in job.scored_views:
            batches = job.source.batches(rows, model.side.spec, view)
            of_views.append(torch.cat(list(map(output, batches))))  # `map` lets go of what it gave
    return torch.stack(of_views).mean(0)
