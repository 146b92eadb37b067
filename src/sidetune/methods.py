"""Every method of a run, fitted on the same features and scored alike: the probes, then the side.

Job                    features, targets, splits: what every method works from
fit_methods(job)       ridge on the last tap and on all, the linear probe, the side: a `Fitted` each
score(job, fitted)     its line of the score table: a `Row`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sidetune.artifact import build_model
from sidetune.backbones.base import Backbone
from sidetune.calibration import fit_temperature
from sidetune.checkpoint import Epoch, Scores
from sidetune.data.dataset import Dataset
from sidetune.evaluate import Evaluation, evaluate, headline_score, scores
from sidetune.features import Features, Spec
from sidetune.figures import duration, label, number
from sidetune.keyed import Draws
from sidetune.machine import total_memory
from sidetune.memory import PeakMemory
from sidetune.model import SideModel
from sidetune.probes import Pooled, Probe, fit_linear, fit_ridge
from sidetune.progress import say
from sidetune.recipe import Recipe, TrainRecipe
from sidetune.sides import SOLVED
from sidetune.sides.linear import LinearRecipe
from sidetune.sides.ridge import RidgeRecipe
from sidetune.sources import Source
from sidetune.summary import Summary
from sidetune.tasks import Task
from sidetune.train import TrainingSet, train

MANY_OUTPUTS = 200


@dataclass(frozen=True)
class Job:
    """What every method works from.

    Args:
        recipe: as asked for.
        dataset: every sample.
        backbone: where the source comes from.
        out: the run folder.
        quiet: no progress.
        source: features of every row.
        summary: the same, pooled.
        split: rows of each split that could be read.
        task: measured on the training rows.
        seconds: that features and summary took.
    """

    recipe: Recipe
    dataset: Dataset
    backbone: Backbone
    out: Path
    quiet: bool
    source: Source
    summary: Summary
    split: dict[str, NDArray[np.int64]]
    task: Task
    seconds: float

    @property
    def scored_views(self) -> range:
        """Numbers of the views whose outputs are averaged where a split is scored."""
        return range(len(self.source.views) if self.recipe.features.average_views else 1)

    @property
    def targets(self) -> Tensor:
        """Of every row, as the task takes them."""
        return torch.from_numpy(self.dataset.targets)

    def say(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        say(text, quiet=self.quiet)


@dataclass(frozen=True)
class Fitted:
    """A method that is ready to predict: a probe, or the side itself.

    Args:
        name: of its row in the score table.
        model: side, norm and head.
        recipe: with every choice filled in.
        parameters: without the head.
        seconds: that fitting took.
        peak_memory: bytes of this process while it was fitted.
        detail: what was chosen, for the tables.
        outputs: split -> the head's outputs (n, K), on the CPU.
        history: one `Epoch` an epoch; none for what was solved.
        left_out: ridge: outputs (n, K) of the training rows, each fitted on all the others.
    """

    name: str
    model: SideModel
    recipe: Recipe
    parameters: int
    seconds: float
    peak_memory: int
    detail: dict[str, Any]
    outputs: Callable[[str], Tensor]
    history: Sequence[Epoch] = ()
    left_out: Tensor | None = None


def fit_methods(job: Job) -> Iterator[Fitted]:
    """The opponents, then the run's own side: its row comes last."""
    yield from _solve_probes(job)
    if job.recipe.side.name not in SOLVED:
        yield _train_side(job)


def _solve_probes(job: Job) -> Iterator[Fitted]:
    """Stage two: ridge on the last tap, ridge on all taps, and the linear probe."""
    pooled = Pooled(job.summary, job.targets, job.split["train"], job.split["val"], job.dataset.group)
    probes: dict[str, RidgeRecipe | LinearRecipe] = {
        "ridge-last": RidgeRecipe(taps="last"),
        "ridge": RidgeRecipe(),
        "linear": LinearRecipe(),
    }
    asked = job.recipe.side
    if isinstance(asked, RidgeRecipe | LinearRecipe):
        probes.pop(asked.name)
        probes[asked.name] = asked  # with its own settings, and last
    for name, recipe in probes.items():
        started = time.monotonic()
        with PeakMemory() as memory:
            probe = _solve(job, pooled, recipe)
        yield Fitted(
            name,
            probe.model,
            job.recipe.model_copy(update={"side": probe.recipe}),
            parameters=0,
            seconds=time.monotonic() - started,
            peak_memory=memory.peak,
            detail=probe.detail,
            outputs=partial(_probe_outputs, job, probe),
            left_out=probe.left_out,
        )


def _solve(job: Job, pooled: Pooled, recipe: RidgeRecipe | LinearRecipe) -> Probe:
    if isinstance(recipe, RidgeRecipe):
        return fit_ridge(recipe, pooled, job.task)
    norm, final_norm = job.recipe.head.norm, job.source.final_norm
    return fit_linear(recipe, pooled, job.task, norm=norm, final_norm=final_norm)


def _probe_outputs(job: Job, probe: Probe, split: str) -> Tensor:
    rows = job.split[split]
    return torch.stack([probe.outputs(job.source.summary(view), rows) for view in job.scored_views]).mean(0)


def _train_side(job: Job) -> Fitted:
    """Stage three: the side, by the one loop."""
    recipe = job.recipe.train.resolved(len(job.split["train"]))
    model = build_model(job.recipe, job.source.spec, job.task.num_outputs, job.source.final_norm)
    if job.recipe.features.tap_scale == "rms":
        training = job.summary.rows(torch.from_numpy(job.split["train"]))
        model.side.tap_scale.copy_(training.select(model.side.spec).tap_scale())
    model.start([recipe.seed])
    model.to(job.backbone.device)
    parameters = model.side.num_parameters() + sum(p.numel() for p in model.norm.parameters())
    name = job.recipe.side.name
    images = len(job.split["train"])
    form = getattr(job.recipe.side, "form", None)
    how = name if form is None else f"{name}, {form} form"
    job.say(f"training {how}: {parameters:,} parameters, {images:,} images, {recipe.epochs} epochs")
    with PeakMemory() as memory:
        trained = train(
            model,
            _training_set(job, recipe, model.side.spec),
            job.task,
            recipe,
            seeds=[recipe.seed],
            validate=partial(_validate, job),
            checkpoint=job.out / "checkpoint.safetensors",
            run_hash=job.recipe.hash,
            quiet=job.quiet,
        )
    return Fitted(
        name,
        model.eval(),
        job.recipe.model_copy(update={"train": recipe.model_copy(update={"shuffle_window": trained.window})}),
        parameters,
        seconds=sum(epoch.seconds for epoch in trained.history),
        peak_memory=memory.peak,
        detail={"epochs": recipe.epochs, "lr": recipe.lr}
        | ({} if trained.window is None else {"shuffle_window": trained.window}),
        outputs=partial(_side_outputs, job, model),
        history=trained.history,
    )


def _training_set(job: Job, recipe: TrainRecipe, spec: Spec) -> TrainingSet:
    rows = job.split["train"]
    layout, window = job.source.layout(rows, spec), recipe.shuffle_window
    if layout is not None and window is None:
        window = layout.window(total_memory())
    if layout is not None and window is not None and window < len(layout.num_bytes):
        job.say(f"shuffling {window} of {len(layout.num_bytes)} shards at a time")
        if not layout.by_hash:
            job.say(
                "the store holds samples in the order of their paths, as an earlier version made it. Where "
                "files are sorted by class, such a window costs accuracy. Type: the same command with "
                "--store and a new folder, which extracts again"
            )
    read = partial(_inputs, job, spec)
    return TrainingSet(read, job.targets, rows, layout, window, ahead=job.source.ahead)


def _inputs(job: Job, spec: Spec, rows: Sequence[int], draws: Draws) -> Features:
    num_views = len(job.source.views)
    return job.source.features(rows, spec, draws.views(num_views, len(rows)) if num_views > 1 else 0)


def _validate(job: Job, model: nn.Module) -> list[Scores]:
    assert isinstance(model, SideModel)
    targets = job.dataset.targets[job.split["val"]]
    members = job.task.predictions(_member_outputs(job, model, "val")).double().numpy()
    if job.task.num_outputs > MANY_OUTPUTS:  # all scores after every epoch would take longer than the epoch
        return [_headline(job.task, one, targets) if np.isfinite(one).all() else {} for one in members]
    return [scores(job.task, one, targets) if np.isfinite(one).all() else {} for one in members]


def _headline(task: Task, predictions: NDArray[Any], targets: NDArray[Any]) -> Scores:
    return {task.headline: headline_score(task, predictions, targets)}


def _side_outputs(job: Job, model: SideModel, split: str) -> Tensor:
    return _member_outputs(job, model, split)[0]


def _member_outputs(job: Job, model: SideModel, split: str) -> Tensor:
    """Outputs of a split, averaged over the views that are scored: (M, n, K), on the CPU."""
    if not len(job.split[split]):
        return torch.zeros(1, 0, job.task.num_outputs)
    of_views = []
    with torch.no_grad():
        for view in job.scored_views:
            batches = job.source.batches(job.split[split], model.side.spec, view)
            parts = [model(batch.to(job.backbone.device)).float().cpu() for batch in batches]
            of_views.append(torch.cat(parts, 1))
    return torch.stack(of_views).mean(0)


@dataclass(frozen=True)
class Row:
    """One line of the score table, with the predictions behind it.

    Args:
        fitted: the method.
        predictions: of ``val`` and ``test``, (n, K).
        temperature: that outputs were divided by, fitted on ``val``.
        val: its scores.
        test: its scores; None where there is no test split.
        seconds: that predicting and scoring took.
    """

    fitted: Fitted
    predictions: dict[str, Tensor]
    temperature: float
    val: Evaluation
    test: Evaluation | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As metrics.json holds it."""
        return {
            "method": self.fitted.name,
            "parameters": self.fitted.parameters,
            "seconds": self.fitted.seconds,
            "peak_memory_bytes": self.fitted.peak_memory,
            "detail": self.fitted.detail
            | ({} if self.fitted.recipe.data.task == "regress" else {"temperature": self.temperature}),
            "val": self.val.to_json(),
            "test": None if self.test is None else self.test.to_json(),
        }


def score(job: Job, fitted: Fitted) -> Row:
    """Predict validation and test, score them, and say the headline.

    Outputs are divided by the temperature that validation chooses: one number, which leaves what is
    likeliest as it is.
    """
    started = time.monotonic()
    outputs = {name: fitted.outputs(name) for name in ("val", "test")}
    temperature = fit_temperature(job.task, outputs["val"], job.targets[job.split["val"]])
    predictions = {name: job.task.predictions(values / temperature) for name, values in outputs.items()}
    found = {
        name: evaluate(job.task, values.double().numpy(), job.dataset.targets[job.split[name]])
        for name, values in predictions.items()
        if len(values)
    }
    headline = job.task.headline
    words, unit = label(headline)
    shown = [f"{name} {number(headline, one.scores[headline])} {unit}" for name, one in found.items()]
    job.say(f"{fitted.name}: {words}, {', '.join(map(str.strip, shown))} ({duration(fitted.seconds)})")
    seconds = time.monotonic() - started
    return Row(fitted, predictions, temperature, found["val"], found.get("test"), seconds)
