"""Stage three: side networks in one fleet, on a job's features.

open_fleet(job, recipes)       what they read, and how each is built
new_member(job, recipe, ..)    one of them
fit_side(job)                  a run's own: trained, ready to predict
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.artifact import build_model
from sidetune.bucket import Member
from sidetune.checkpoint import Scores
from sidetune.data.dataset import Dataset
from sidetune.evaluate import headline_score, scores
from sidetune.features import Features, Spec
from sidetune.fleet import Fleet, TrainingSet
from sidetune.job import MANY_OUTPUTS, Fitted, Job
from sidetune.keyed import Draws
from sidetune.machine import total_memory
from sidetune.memory import PeakMemory
from sidetune.model import SideModel
from sidetune.reader import Layout
from sidetune.recipe import Recipe
from sidetune.summary import Summary
from sidetune.tasks import Task
from sidetune.train import train


def open_fleet(
    job: Job, recipes: Sequence[Recipe], rows: NDArray[np.int64], *, num_outputs: int | None = None
) -> Fleet:
    """A fleet on a job's features that nobody trains in yet.

    Args:
        job: its features, and the training rows that taps are scaled on.
        recipes: of all members that may join.
        rows: (n,) that an epoch reads.
        num_outputs: K of the widest member; None: the job's.
    """
    num_outputs = job.task.num_outputs if num_outputs is None else num_outputs
    scaled = job.recipe.features.tap_scale == "rms"
    training = job.summary.rows(torch.from_numpy(job.split["train"])) if scaled else None
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
    dataset: Dataset | None = None,
) -> Member:
    """A member of a job's fleet.

    Args:
        job: whose features it reads.
        recipe: of side, head and training; epochs that are None are derived from its rows.
        name: its own.
        rows: (n,) that it trains on.
        task: measured on these rows; None: the job's.
        dataset: whose targets it learns; None: the job's.
    """
    resolved = recipe.model_copy(update={"train": recipe.train.resolved(len(rows))})
    targets = job.targets if dataset is None else torch.from_numpy(dataset.targets)
    return Member(name, resolved, job.task if task is None else task, targets, rows)


def fit_side(job: Job) -> Fitted:
    """Train a run's own side by the one loop."""
    rows = job.split["train"]
    member = new_member(job, job.recipe, name=job.recipe.side.name, rows=rows)
    fleet = open_fleet(job, [member.recipe], rows)
    recipe = member.recipe.train
    parameters = described(job, member.recipe, job.task.num_outputs).num_parameters()
    form = getattr(job.recipe.side, "form", None)
    how = member.name if form is None else f"{member.name}, {form} form"
    job.say(f"training {how}: {parameters:,} parameters, {len(rows):,} images, {recipe.epochs} epochs")
    with PeakMemory() as memory:
        trained = train(
            fleet,
            [member],
            validate=partial(validate, job),
            checkpoint=job.out / "checkpoint.safetensors",
            run_hash=job.recipe.hash,
            quiet=job.quiet,
        )[member.name]
    model = trained.model
    assert model is not None, "a run of one member that diverges is an error"
    window = fleet.window
    return Fitted(
        member.name,
        model,
        job.recipe.model_copy(update={"train": recipe.model_copy(update={"shuffle_window": window})}),
        parameters,
        seconds=sum(epoch.seconds for epoch in trained.history),
        peak_memory=memory.peak,
        detail={"epochs": recipe.epochs, "lr": recipe.lr}
        | ({} if window is None else {"shuffle_window": window}),
        outputs=partial(model_outputs, job, model),
        history=trained.history,
    )


def _build(job: Job, training: Summary | None, recipes: Sequence[Recipe], num_outputs: int) -> SideModel:
    """M members of one architecture, on the backbone's device."""
    rates = [getattr(recipe.side, "drop_path", 0.0) for recipe in recipes]
    model = build_model(recipes[0], job.source.spec, num_outputs, job.source.final_norm, drop_paths=rates)
    if training is not None:
        model.side.tap_scale.copy_(training.select(model.side.spec).tap_scale())
    return model.to(job.backbone.device)


def described(job: Job, recipe: Recipe, num_outputs: int) -> SideModel:
    """What a recipe describes, without its numbers."""
    with torch.device("meta"):
        return build_model(recipe, job.source.spec, num_outputs, job.source.final_norm)


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
    num_views = len(job.source.views)
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


def validate(job: Job, fleet: Fleet) -> dict[str, Scores]:
    """Scores of every member on validation."""
    outputs = mean_outputs(job, fleet, job.split["val"])
    return {name: _scores(job, output) for name, output in outputs.items()}


def _scores(job: Job, output: Tensor) -> Scores:
    predictions = job.task.predictions(output).double().numpy()
    if not np.isfinite(predictions).all():
        return {}
    targets = job.dataset.targets[job.split["val"]]
    if job.task.num_outputs > MANY_OUTPUTS:  # all scores after every epoch would take longer than the epoch
        return {job.task.headline: headline_score(job.task, predictions, targets)}
    return scores(job.task, predictions, targets)


def model_outputs(job: Job, model: SideModel, split: str) -> Tensor:
    """Outputs of a split, averaged over the views that are scored: (n, K), on the CPU."""
    rows = job.split[split]
    if not len(rows):
        return torch.zeros(0, job.task.num_outputs)
    model.to(job.backbone.device)
    of_views = []
    with torch.no_grad():
        for view in job.scored_views:
            batches = job.source.batches(rows, model.side.spec, view)
            parts = [model(batch.to(job.backbone.device))[0].float().cpu() for batch in batches]
            of_views.append(torch.cat(parts))
    return torch.stack(of_views).mean(0)
