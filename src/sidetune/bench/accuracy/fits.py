"""Fits: what is trained or solved, on which rows, and for which images it answers.

    run_fits(ground, method, fits)    what they leave: read where they have ended, else trained

Nothing here reads a label of test.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sidetune.bench.accuracy.grid import Method
from sidetune.bench.accuracy.ground import METRIC, Ground, Images
from sidetune.bench.accuracy.ledger import Entry, digest
from sidetune.bench.rows import commit
from sidetune.bucket import Member
from sidetune.errors import DivergedError
from sidetune.evaluate import headline_score
from sidetune.job import Job
from sidetune.probes import Pooled, fit_linear, fit_ridge
from sidetune.recipe import Recipe
from sidetune.runs import environment
from sidetune.side_fit import new_member, open_fleet, row_outputs
from sidetune.sides.linear import LinearRecipe
from sidetune.sides.ridge import RidgeRecipe, beyond_summary
from sidetune.summary import Statistic, Summary
from sidetune.sweep.score import Rows, measured_task
from sidetune.tasks import Task
from sidetune.train import Trained, train
from sidetune.waves import members_at_once

FITTED = 2  # how fits are computed: one more where numbers change, so that what is kept is not taken for them


@dataclass(frozen=True, eq=False)
class Fit:
    """One fit: what is trained or solved, on which rows, and for which images it answers.

    Args:
        name: of its file.
        recipe: of side and training; epochs that are None are derived from the rows.
        rows: (n,) that it learns from.
        asked: name -> images.
    """

    name: str
    recipe: Recipe
    rows: Rows
    asked: Mapping[str, Images]

    @property
    def resolved(self) -> Recipe:
        """With the epochs that its rows give."""
        return self.recipe.model_copy(update={"train": self.recipe.train.resolved(len(self.rows))})

    def learns(self, ground: Ground) -> str:
        """Digest of what it is trained or solved with, whatever it answers for afterwards."""
        backbone = ground.job.backbone.identity.digest
        return digest([FITTED, self.resolved.hash, backbone, ground.labelled(self.rows)])

    def key(self, ground: Ground) -> str:
        """What it is known by."""
        asked = {name: images.digest for name, images in self.asked.items()}
        return digest([self.learns(ground), asked])


def run_fits(ground: Ground, method: Method, fits: Sequence[Fit]) -> list[Entry]:
    """What fits leave, read where they have ended, else trained: in a fleet where the method can.

    Args:
        ground: the task.
        method: that all of them are of.
        fits: in any number.
    """
    ledger = ground.ledger(method)
    keys = [fit.key(ground) for fit in fits]
    read = {key: ledger.read(fit.name, key) for fit, key in zip(fits, keys, strict=True)}
    found = {key: entry for key, entry in read.items() if entry is not None}
    missing = {key: fit for fit, key in zip(fits, keys, strict=True) if key not in found}
    for group in _groups(method, missing):
        checkpoint = ledger.checkpoint(digest(list(group)))
        made = _solve(ground, group) if method.solved else _train(ground, checkpoint, group)
        for key, entry in made.items():
            ledger.write(group[key].name, key, entry)
            found[key] = entry
        checkpoint.unlink(missing_ok=True)  # its own alone: another fit may be under way
    return [found[key] for key in keys]


def _groups(method: Method, fits: Mapping[str, Fit]) -> Iterator[dict[str, Fit]]:
    """What trains together: fits on the same rows.

    A fleet reads the rows of all its members. With others' rows among them a member would have smaller
    batches and more steps than alone, and more the more fits were missing.
    """
    if method.solved or not method.in_fleet:
        yield from ({key: fit} for key, fit in fits.items())
        return
    of_rows: dict[bytes, dict[str, Fit]] = {}
    for key, fit in fits.items():
        of_rows.setdefault(fit.rows.tobytes(), {})[key] = fit
    yield from of_rows.values()


def _train(ground: Ground, checkpoint: Path, fits: Mapping[str, Fit]) -> dict[str, Entry]:
    """Train some, all on the same rows, in one fleet to their last epochs."""
    job, started = ground.job, time.monotonic()
    members = [
        new_member(job, fit.recipe, name=key, rows=fit.rows, task=measured_task(job, fit.recipe, fit.rows))
        for key, fit in fits.items()
    ]
    rows = members[0].rows
    fleet = open_fleet(job, [member.recipe for member in members], rows, scaled_on=rows)
    try:
        trained = train(
            fleet,
            members,
            at_once=members_at_once(job, fleet, members) if len(members) > 1 else None,
            checkpoint=checkpoint,
            run_hash=digest(list(fits)),
            quiet=job.quiet,
        )
    except DivergedError:
        trained = {key: Trained(None, []) for key in fits}
    seconds = time.monotonic() - started
    return {
        key: _answer(
            member, fit, trained[key], {**_made(job, fit), "fleet_seconds": seconds, "networks": len(fits)}
        )
        for (key, fit), member in zip(fits.items(), members, strict=True)
    }


def _answer(member: Member, fit: Fit, trained: Trained, facts: dict[str, Any]) -> Entry:
    facts = {**facts, "epochs": member.epochs, "lr": member.recipe.train.lr}
    if trained.model is None:
        return Entry({**facts, "diverged": True})
    outputs = {name: row_outputs(one.job, trained.model, one.rows) for name, one in fit.asked.items()}
    trained.model.cpu()
    if not all(output.isfinite().all() for output in outputs.values()):
        return Entry({**facts, "diverged": True})
    return Entry(facts, outputs)


def _solve(ground: Ground, fits: Mapping[str, Fit]) -> dict[str, Entry]:
    """Solve some, one after another; what is asked of them comes straight from pooled taps."""
    entries = {}
    for key, fit in fits.items():
        started = time.monotonic()
        try:
            entry = _solved(ground.job, fit)
        except DivergedError:
            entry = Entry({"diverged": True})
        facts = {**entry.facts, **_made(ground.job, fit), "seconds": time.monotonic() - started}
        entries[key] = Entry(facts, entry.outputs)
    return entries


def _solved(job: Job, fit: Fit) -> Entry:
    recipe = fit.recipe.side
    open_choice = isinstance(recipe, LinearRecipe) and (recipe.l2 is None or recipe.pool == "best")
    train_rows, val_rows = (job.split["train"], job.split["val"]) if open_choice else (fit.rows, fit.rows)
    more = beyond_summary(recipe)
    pooled = Pooled(_summary(job, more), job.targets, train_rows, val_rows, job.dataset.group)
    task = measured_task(job, fit.recipe, train_rows)
    if isinstance(recipe, RidgeRecipe):
        probe = fit_ridge(recipe, pooled, task, metric=METRIC)
    else:
        assert isinstance(recipe, LinearRecipe)
        norm, final_norm = fit.recipe.head.norm, job.source.final_norm
        probe = fit_linear(recipe, pooled, task, norm=norm, final_norm=final_norm, metric=METRIC)
    outputs = {name: probe.outputs(_summary(one.job, more), one.rows) for name, one in fit.asked.items()}
    facts: dict[str, Any] = {"side": probe.recipe.model_dump(mode="json")}
    if probe.left_out is not None:
        facts["val"] = _accuracy(task, probe.left_out, job, train_rows)
    elif open_choice:
        facts["val"] = _accuracy(task, probe.outputs(_summary(job, more), val_rows), job, val_rows)
    return Entry(facts, outputs)


def _made(job: Job, fit: Fit) -> dict[str, Any]:
    """What it was made of and with; of a checkout, the commit."""
    return {
        "recipe": fit.resolved.model_dump(mode="json"),
        "environment": environment(job.backbone.device),
        "commit": commit(),
    }


def _accuracy(task: Task, outputs: Tensor, job: Job, rows: Rows) -> float | None:
    """Of outputs (n, K) of these rows."""
    predictions = task.predictions(outputs).double().numpy()
    return headline_score(task, predictions, job.dataset.targets[rows], METRIC)


def _summary(job: Job, more: tuple[Statistic, ...]) -> Summary:
    return job.source.richer(more) if more else job.summary
