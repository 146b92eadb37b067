"""The protocol on one task: choose on training images, train again on all of them, answer for test.

    choose(ground, method, ..)     train800 -> val200, or folds; the point of the grid with the best accuracy
    finals(ground, method, ..)     train800val200, a network a seed, last epoch; answers for test
    few_shots, shot_fits           k images a class, drawn by each seed; nothing is chosen
    clock(ground, method, ..)      seconds of an epoch, memory and parameters of the chosen recipe

Nothing here reads a label of test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidetune.bench.accuracy.fits import Fit, run_fits
from sidetune.bench.accuracy.grid import Method, at
from sidetune.bench.accuracy.ground import Ground, Images
from sidetune.bench.accuracy.ledger import Entry, digest
from sidetune.bench.accuracy.voices import answers, held_answers
from sidetune.recipe import Recipe
from sidetune.side_fit import described, new_member, open_fleet, solo_epoch_seconds
from sidetune.sides.linear import LinearRecipe
from sidetune.sweep.score import Choosing, Rows, best
from sidetune.waves import member_bytes

SHOTS_L2 = 1e-2  # of the linear probe where nothing can be chosen: the middle of what it tries elsewhere
SHOTS_SHARE = 0.6  # of ridge likewise
TIMED = 2  # epochs of one network alone, after one that warms up; the quickest counts


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
    fits = [
        Fit(_named("choice", fold, choosing), one, part.train, {"held": _held(ground, part.held)})
        for one in [at(recipe, point) for point in points]
        for fold, part in enumerate(choosing.folds)
    ]
    answered = held_answers(ground, method, fits)
    if method.with_ridge:
        points = [{**point, "ridge": share} for point, (share, _) in zip(points, answered, strict=True)]
    scores = [None if held is None else choosing.score(held) for _, held in answered]
    tried = tuple(
        (point, None if score is None else score.headline)
        for point, score in zip(points, scores, strict=True)
    )
    known = [(i, score) for i, score in enumerate(scores) if score is not None]
    if not known:
        return Choice(method, None, None, tried)
    winner = best(known)
    return Choice(method, at(recipe, points[winner]), tried[winner][1], tried)


def finals(ground: Ground, method: Method, recipe: Recipe, seeds: Sequence[int]) -> list[Entry]:
    """Networks trained on train and validation, one a seed, each with its own start and order.

    Args:
        ground: the task.
        method: that is trained.
        recipe: chosen.
        seeds: of the networks; a solved method has no use for them and is solved once.
    """
    return answers(ground, method, _final_fits(ground, method, recipe, seeds))


def few_shots(ground: Ground, method: Method, recipe: Recipe, shots: int) -> Recipe:
    """What a method is with k images a class, which leave none to choose on.

    So nothing is chosen: it has the first point of its grid and the epochs of all k images, ridge its penalty
    by leaving one of the images out, the linear probe a fixed one, and so ridge its share.

    Args:
        ground: the task.
        method: that is trained.
        recipe: what the grid changes.
        shots: k.
    """
    if isinstance(recipe.side, LinearRecipe):
        side = recipe.side.model_copy(update={"pool": "mean", "l2": SHOTS_L2})
        return recipe.model_copy(update={"side": side})
    first = recipe if method.solved else at(recipe, next(method.points(1)))
    if method.with_ridge:
        first = at(first, {"ridge": SHOTS_SHARE})
    train = first.train.resolved(len(ground.shots(shots, 0)))
    return first.model_copy(update={"train": train})


def shot_fits(ground: Ground, method: Method, recipe: Recipe, seeds: Sequence[int], shots: int) -> list[Fit]:
    """Networks of k images a class, one a seed, which draws the images, too.

    Args:
        ground: the task.
        method: that is trained.
        recipe: of `few_shots`.
        seeds: of draws and networks; a solved method is solved on each draw.
        shots: k.
    """
    return [
        Fit(f"shots-{shots}-seed-{seed}", _seeded(recipe, seed), ground.shots(shots, seed), ground.tests)
        for seed in method.of(seeds)
    ]


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
    ledger, key = ground.ledger(method), digest(["clock", fits[0].learns(ground)])
    kept = ledger.read("clock", key)
    if kept is None:
        kept = Entry(_measured(ground, method, fits))
        ledger.write("clock", key, kept)
    return {name: kept.facts[name] for name in ("epoch_seconds", "epochs", "bytes", "parameters")}


def _choose_solved(ground: Ground, method: Method, recipe: Recipe) -> Choice:
    """Ridge by leaving one out of train and validation; the linear probe by validation."""
    (entry,) = run_fits(ground, method, [Fit("choice", recipe, ground.rows, {})])
    if entry.diverged:
        return Choice(method, None, None, (({}, None),))
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
    """All trained methods in the same way and one after another: how they were trained is no part of it."""
    if method.solved:
        seconds = run_fits(ground, method, fits)[0].facts["seconds"]
        return {"epoch_seconds": seconds, "epochs": 1, "bytes": 0, "parameters": 0}
    job, fit = ground.job, fits[0]
    member = new_member(job, fit.recipe, name="clock", rows=fit.rows)
    fleet = open_fleet(job, [member.recipe], fit.rows, scaled_on=fit.rows)
    return {
        "epoch_seconds": solo_epoch_seconds(job, member, TIMED),
        "epochs": member.epochs,
        "bytes": member_bytes(fleet, member),
        "parameters": described(job, member.recipe, job.task.num_outputs).num_parameters(),
    }


def _named(name: str, fold: int, choosing: Choosing) -> str:
    return name if len(choosing.folds) == 1 else f"{name}-fold-{fold}"


def _held(ground: Ground, rows: Rows) -> Images:
    return Images.of(ground.job, ground.keys, rows)
