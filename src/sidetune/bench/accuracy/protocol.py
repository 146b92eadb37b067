"""The protocol on one task: choose on training images, train again on all of them, answer for test.

    choose(ground, method, ..)     train800 -> val200, or folds; the point of the grid with the best accuracy
    finals(ground, method, ..)     train800val200, a network a seed, last epoch; answers for test
    few_shots(ground, method, ..)  k images a class, drawn by each seed; nothing is chosen
    clock(ground, method, ..)      seconds of an epoch, memory and parameters of the chosen recipe

Nothing here reads a label of test.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidetune.bench.accuracy.grid import Method, at
from sidetune.bench.accuracy.ground import METRIC, Ground, Images
from sidetune.bench.accuracy.ledger import Entry, Ledger, digest
from sidetune.bucket import Member
from sidetune.checkpoint import Scores
from sidetune.errors import DivergedError
from sidetune.evaluate import headline_score
from sidetune.fleet import Fleet
from sidetune.job import Job
from sidetune.probes import Pooled, fit_linear, fit_ridge
from sidetune.recipe import Recipe
from sidetune.side_fit import described, new_member, open_fleet, row_outputs, solo_epoch_seconds
from sidetune.sides.linear import LinearRecipe
from sidetune.sides.ridge import RidgeRecipe, beyond_summary
from sidetune.summary import Statistic, Summary
from sidetune.sweep.score import Choosing, Rows, Score, best, measured_task
from sidetune.tasks import Task
from sidetune.train import Trained, train
from sidetune.waves import member_bytes, members_at_once

SHOTS_L2 = 1e-2  # of the linear probe where nothing can be chosen: the middle of what it tries elsewhere
TIMED = 2  # epochs of one network alone, after one that warms up; the quickest counts


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

    def key(self, ground: Ground) -> str:
        """What it is known by."""
        recipe = self.recipe.model_copy(update={"train": self.recipe.train.resolved(len(self.rows))})
        asked = {name: images.digest for name, images in self.asked.items()}
        backbone = ground.job.backbone.identity.digest
        return digest([recipe.hash, backbone, ground.labelled(self.rows), asked])


@dataclass(frozen=True)
class Choice:
    """What a method was chosen to be on a task.

    Args:
        method: whose choice it is.
        recipe: chosen; None: it diverged at every point.
        score: accuracy on what it was chosen by; of ridge on each image left out.
        tried: the points in their order, each with its score, None where it diverged.
    """

    method: Method
    recipe: Recipe | None
    score: float | None
    tried: tuple[tuple[dict[str, Any], float | None], ...]


def choose(ground: Ground, method: Method, recipe: Recipe, grid_size: int) -> Choice:
    """The best point of a method's grid on held-out training images.

    Args:
        ground: the task.
        method: that chooses.
        recipe: what its points change.
        grid_size: points.
    """
    if method.solved:
        return _choose_solved(ground, method, recipe)
    choosing = ground.choosing
    points = list(method.points(grid_size))
    recipes = [at(recipe, point) for point in points]
    fits = [
        Fit(_named("choice", fold, choosing), one, part.train, {"held": _held(ground, part.held)})
        for one in recipes
        for fold, part in enumerate(choosing.folds)
    ]
    entries = run_fits(ground, method, fits)
    per = len(choosing.folds)
    scores = [_score(choosing, entries[i * per : (i + 1) * per]) for i in range(len(points))]
    tried = tuple(
        (point, None if score is None else score.headline)
        for point, score in zip(points, scores, strict=True)
    )
    known = [(i, score) for i, score in enumerate(scores) if score is not None]
    if not known:
        return Choice(method, None, None, tried)
    winner = best(known)
    return Choice(method, recipes[winner], tried[winner][1], tried)


def finals(ground: Ground, method: Method, recipe: Recipe, seeds: Sequence[int]) -> list[Entry]:
    """Networks trained on train and validation, one a seed, each with its own start and order.

    Args:
        ground: the task.
        method: that is trained.
        recipe: chosen.
        seeds: of the networks; a solved method has no use for them and is solved once.
    """
    return run_fits(ground, method, _final_fits(ground, method, recipe, seeds))


@dataclass(frozen=True, eq=False)
class FewShots:
    """A method with k images a class.

    Args:
        ground: the task.
        recipe: that it has for any such k; epochs are those of all k images.
        method: that is trained.
        shots: k.
    """

    ground: Ground
    recipe: Recipe
    method: Method
    shots: int

    def fits(self, seeds: Sequence[int]) -> list[Fit]:
        """One a seed, which draws the images, too."""
        ground, shots = self.ground, self.shots
        return [
            Fit(
                f"shots-{shots}-seed-{seed}",
                _seeded(self.recipe, seed),
                ground.shots(shots, seed),
                ground.tests,
            )
            for seed in self.method.of(seeds)
        ]


def few_shots(ground: Ground, method: Method, recipe: Recipe, shots: int) -> FewShots:
    """What a method is with k images a class, which leave none to choose on.

    So nothing is chosen: it has the first point of its grid, ridge its penalty by leaving one of the images
    out, the linear probe a fixed one.

    Args:
        ground: the task.
        method: that is trained.
        recipe: what the grid changes.
        shots: k.
    """
    if isinstance(recipe.side, LinearRecipe):
        side = recipe.side.model_copy(update={"pool": "mean", "l2": SHOTS_L2})
        return FewShots(ground, recipe.model_copy(update={"side": side}), method, shots)
    first = recipe if method.solved else at(recipe, next(method.points(1)))
    train = first.train.resolved(len(ground.shots(shots, 0)))
    return FewShots(ground, first.model_copy(update={"train": train}), method, shots)


def clock(ground: Ground, method: Method, recipe: Recipe, seeds: Sequence[int]) -> dict[str, float]:
    """What training one network of a chosen recipe takes: seconds of an epoch, bytes, parameters.

    Seconds: one network alone, from the store. Bytes: what a step keeps for backward, and the optimiser. A
    solved method: seconds of the solution; nothing is kept.

    Args:
        ground: the task.
        method: whose it is.
        recipe: chosen; `finals` has run.
        seeds: that it ran with.
    """
    fits = _final_fits(ground, method, recipe, seeds)
    ledger, key = ground.ledger(method), digest(["clock", fits[0].key(ground)])
    kept = ledger.read("clock", key)
    if kept is None:
        kept = Entry(_measured(ground, method, fits))
        ledger.write("clock", key, kept)
    return {name: kept.facts[name] for name in ("epoch_seconds", "epochs", "bytes", "parameters")}


def run_fits(ground: Ground, method: Method, fits: Sequence[Fit]) -> list[Entry]:
    """What fits leave, read where they have ended, else trained: in one fleet where the method can.

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
    groups = [missing] if method.in_fleet and not method.solved else [{key: missing[key]} for key in missing]
    for group in filter(None, groups):
        made = _solve(ground, group) if method.solved else _train(ground, ledger, group)
        for key, entry in made.items():
            ledger.write(group[key].name, key, entry)
            found[key] = entry
    ledger.clear()
    return [found[key] for key in keys]


def _train(ground: Ground, ledger: Ledger, fits: Mapping[str, Fit]) -> dict[str, Entry]:
    """Train some in one fleet, to their last epochs."""
    job, started = ground.job, time.monotonic()
    members = [
        new_member(job, fit.recipe, name=key, rows=fit.rows, task=measured_task(job, fit.recipe, fit.rows))
        for key, fit in fits.items()
    ]
    rows = np.unique(np.concatenate([fit.rows for fit in fits.values()]))
    fleet = open_fleet(job, [member.recipe for member in members], rows)
    whole = digest(list(fits))
    try:
        trained = train(
            fleet,
            members,
            validate=_unscored,
            at_once=members_at_once(job, fleet, members) if len(members) > 1 else None,
            checkpoint=ledger.checkpoint(whole),
            run_hash=whole,
            quiet=job.quiet,
        )
    except DivergedError:
        trained = {key: Trained(None, []) for key in fits}
    seconds = time.monotonic() - started
    return {
        key: _answer(member, fit, trained[key], {"fleet_seconds": seconds, "networks": len(fits)})
        for (key, fit), member in zip(fits.items(), members, strict=True)
    }


def _unscored(fleet: Fleet) -> dict[str, Scores]:
    """Nothing is chosen along the way: the last epoch counts."""
    return {}


def _answer(member: Member, fit: Fit, trained: Trained, facts: dict[str, Any]) -> Entry:
    facts = {**facts, "epochs": member.epochs, "lr": member.recipe.train.lr}
    if trained.history:
        facts["epoch_seconds"] = min(epoch.seconds for epoch in trained.history)
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
        started, (job, recipe) = time.monotonic(), (ground.job, fit.recipe.side)
        open_choice = isinstance(recipe, LinearRecipe) and (recipe.l2 is None or recipe.pool == "best")
        train_rows, val_rows = (job.split["train"], job.split["val"]) if open_choice else (fit.rows, fit.rows)
        more = beyond_summary(recipe)
        pooled = Pooled(_summary(job, more), job.targets, train_rows, val_rows, job.dataset.group)
        task = measured_task(job, fit.recipe, train_rows)
        if isinstance(recipe, RidgeRecipe):
            probe = fit_ridge(recipe, pooled, task)
        else:
            assert isinstance(recipe, LinearRecipe)
            norm, final_norm = fit.recipe.head.norm, job.source.final_norm
            probe = fit_linear(recipe, pooled, task, norm=norm, final_norm=final_norm)
        outputs = {name: probe.outputs(_summary(one.job, more), one.rows) for name, one in fit.asked.items()}
        facts = {"side": probe.recipe.model_dump(mode="json"), "seconds": time.monotonic() - started}
        if probe.left_out is not None:
            facts["val"] = _accuracy(task, probe.left_out, job, train_rows)
        elif open_choice:
            facts["val"] = _accuracy(task, probe.outputs(_summary(job, more), val_rows), job, val_rows)
        entries[key] = Entry(facts, outputs)
    return entries


def _accuracy(task: Task, outputs: Tensor, job: Job, rows: Rows) -> float | None:
    """Of outputs (n, K) of these rows."""
    predictions = task.predictions(outputs).double().numpy()
    return headline_score(task, predictions, job.dataset.targets[rows], METRIC)


def _summary(job: Job, more: tuple[Statistic, ...]) -> Summary:
    return job.source.richer(more) if more else job.summary


def _choose_solved(ground: Ground, method: Method, recipe: Recipe) -> Choice:
    """Ridge by leaving one out of train and validation; the linear probe by validation."""
    (entry,) = run_fits(ground, method, [Fit("choice", recipe, ground.rows, {})])
    fields = recipe.model_dump(mode="json") | {"side": entry.facts["side"]}
    point = {name: value for name, value in entry.facts["side"].items() if name in ("l2", "pool", "taps")}
    score = entry.facts.get("val")
    return Choice(method, Recipe.model_validate(fields), score, ((point, score),))


def _final_fits(ground: Ground, method: Method, recipe: Recipe, seeds: Sequence[int]) -> list[Fit]:
    if method.solved:
        return [Fit("solved", recipe, ground.rows, ground.tests)]
    return [
        Fit(f"seed-{seed}", _seeded(recipe, seed), ground.rows, ground.tests) for seed in method.of(seeds)
    ]


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})


def _measured(ground: Ground, method: Method, fits: Sequence[Fit]) -> dict[str, Any]:
    entries = run_fits(ground, method, fits)
    if method.solved:
        return {"epoch_seconds": entries[0].facts["seconds"], "epochs": 1, "bytes": 0, "parameters": 0}
    job, fit = ground.job, fits[0]
    member = new_member(job, fit.recipe, name="clock", rows=fit.rows)
    alone = [entry.facts["epoch_seconds"] for entry in entries if "epoch_seconds" in entry.facts]
    if method.in_fleet or not alone:  # baselines were alone already
        alone = [solo_epoch_seconds(job, member, TIMED)]
    fleet = open_fleet(job, [member.recipe], fit.rows)
    return {
        "epoch_seconds": min(alone),
        "epochs": member.epochs,
        "bytes": member_bytes(fleet, member),
        "parameters": described(job, member.recipe, job.task.num_outputs).num_parameters(),
    }


def _named(name: str, fold: int, choosing: Choosing) -> str:
    return name if len(choosing.folds) == 1 else f"{name}-fold-{fold}"


def _held(ground: Ground, rows: Rows) -> Images:
    return Images.of(ground.job, ground.keys, rows)


def _score(choosing: Choosing, entries: Sequence[Entry]) -> Score | None:
    """Of the folds' held rows together; None where one diverged."""
    if any(entry.diverged for entry in entries):
        return None
    order = np.argsort(np.concatenate([fold.held for fold in choosing.folds]), kind="stable")
    outputs: Tensor = torch.cat([entry.outputs["held"] for entry in entries])
    return choosing.score(outputs[torch.from_numpy(order)])


def cut(recipe: Recipe, epochs: int) -> Recipe:
    """The same with fewer epochs; its schedule ends with them."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs})})
