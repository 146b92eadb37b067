"""Every method of a run, fitted on the same features and scored alike: the probes, then the side.

fit_methods(work)      ridge on the last tap and on all, the linear probe, the side: a `Fitted` each, a job
score(job, fitted)     its line of the score table: a `Row`
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidetune.calibration import fit_temperature
from sidetune.evaluate import Evaluation, evaluate
from sidetune.figures import duration, label, number
from sidetune.fleet_fit import fit_fleets
from sidetune.job import Fitted, Job, Work
from sidetune.memory import PeakMemory
from sidetune.probes import Pooled, Probe, fit_linear, fit_ridge
from sidetune.recipe import FleetRecipe
from sidetune.side_fit import fit_sides
from sidetune.sides import SOLVED
from sidetune.sides.linear import LinearRecipe
from sidetune.sides.ridge import RidgeRecipe, beyond_summary
from sidetune.summary import Summary


def fit_methods(work: Work) -> Iterator[tuple[Job, Fitted]]:
    """The opponents of each job, then, all in one fleet, the jobs' own sides: their rows come last."""
    for job in work.jobs:
        for probe in _solve_probes(job):
            yield job, probe
    if work.recipe.side.name not in SOLVED:
        own = fit_sides(work) if work.recipe.fleet == FleetRecipe() else fit_fleets(work)
        yield from zip(work.jobs, own, strict=True)


def _solve_probes(job: Job) -> Iterator[Fitted]:
    """Stage two: ridge on the last tap, ridge on all taps, and the linear probe."""
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
            summary = job.source.richer(beyond_summary(recipe))
            probe = _solve(job, summary, recipe)
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


def _solve(job: Job, summary: Summary, recipe: RidgeRecipe | LinearRecipe) -> Probe:
    pooled = Pooled(summary, job.targets, job.split["train"], job.split["val"], job.dataset.group)
    if isinstance(recipe, RidgeRecipe):
        return fit_ridge(recipe, pooled, job.task)
    norm, final_norm = job.recipe.head.norm, job.source.final_norm
    return fit_linear(recipe, pooled, job.task, norm=norm, final_norm=final_norm)


def _probe_outputs(job: Job, probe: Probe, split: str) -> Tensor:
    rows = job.split[split]
    more = beyond_summary(probe.recipe)
    views = [probe.outputs(job.source.richer(more, view), rows) for view in job.scored_views]
    return torch.stack(views).mean(0)


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
    temperature, predictions = _predictions(job, fitted)
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


def _predictions(job: Job, fitted: Fitted) -> tuple[float, dict[str, Tensor]]:
    """The temperature, and what is predicted for each split; members of a fleet have their own."""
    if fitted.fleet is not None and fitted.fleet.predictions is not None:
        return 1.0, {name: fitted.fleet.predictions(name) for name in ("val", "test")}
    outputs = {name: fitted.outputs(name) for name in ("val", "test")}
    temperature = fit_temperature(job.task, outputs["val"], job.targets[job.split["val"]])
    return temperature, {name: job.task.predictions(values / temperature) for name, values in outputs.items()}
