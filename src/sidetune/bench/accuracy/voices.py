"""Two voices of a method whose name ends in ``+ridge``: its network's, and ridge's on the same rows.

The network never meets ridge in training and the share changes nothing in it. So its fits are those of the
side alone, trained once for both methods, and what ridge says is solved beside them. Outputs are mixed as
`sidetune.blend` mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sidetune.bench.accuracy.fits import Fit, run_fits
from sidetune.bench.accuracy.grid import WITH_RIDGE, Method
from sidetune.bench.accuracy.ground import Ground
from sidetune.bench.accuracy.ledger import Entry
from sidetune.blend import best_share
from sidetune.recipe import Recipe
from sidetune.side_fit import described
from sidetune.sweep.score import Choosing


def answers(ground: Ground, method: Method, fits: Sequence[Fit]) -> list[Entry]:
    """What fits leave, as `run_fits` says it; ridge has the share in it that each fit's recipe gives it.

    Args:
        ground: the task.
        method: that all of them are of.
        fits: in any number.
    """
    if not method.with_ridge:
        return run_fits(ground, method, fits)
    networks, ridges = both_voices(ground, method, fits)
    return [
        _mixed(network, ridge, float(fit.recipe.head.ridge))
        for network, ridge, fit in zip(networks, ridges, fits, strict=True)
    ]


def both_voices(ground: Ground, method: Method, fits: Sequence[Fit]) -> tuple[list[Entry], list[Entry]]:
    """What each fit's network says, and what ridge says, solved on the same rows from the taps of the side.

    Args:
        ground: the task.
        method: with ridge.
        fits: of it.
    """
    alone = replace(method, name=method.name.removesuffix(WITH_RIDGE), with_ridge=False)
    networks = run_fits(ground, alone, [replace(fit, recipe=_alone(fit.recipe)) for fit in fits])
    ridge = Method(method.name, {"name": "ridge"})
    return networks, run_fits(ground, ridge, [_ridge(ground, fit) for fit in fits])


def held_answers(ground: Ground, method: Method, fits: Sequence[Fit]) -> list[tuple[float, Tensor | None]]:
    """Of each point of a grid ridge's share, and what is said of the rows that points are chosen by.

    The share is the one with the least loss there, as `fit` chooses it: it costs no training.

    Args:
        ground: the task.
        method: that chooses.
        fits: of its points, those of the folds of a point behind one another.

    Returns:
        A share and outputs (n, K) a point; None where a fold diverged, share 0 where ridge has no part.
    """
    choosing = ground.choosing
    if not method.with_ridge:
        return [(0.0, held) for held in _of_points(choosing, run_fits(ground, method, fits))]
    networks, ridges = (_of_points(choosing, voice) for voice in both_voices(ground, method, fits))
    target = choosing.job.targets[choosing.held]
    found: list[tuple[float, Tensor | None]] = []
    for network, ridge in zip(networks, ridges, strict=True):
        if network is None or ridge is None:
            found.append((0.0, None))
            continue
        share = best_share(choosing.job.task, network, ridge, target)
        found.append((share, (1 - share) * network + share * ridge))
    return found


def _of_points(choosing: Choosing, entries: Sequence[Entry]) -> list[Tensor | None]:
    """What the folds of each point say of their held rows, in the order of the rows."""
    per = len(choosing.folds)
    parts = [entries[first : first + per] for first in range(0, len(entries), per)]
    return [
        None
        if any(entry.diverged for entry in part)
        else choosing.in_order([entry.outputs["held"] for entry in part])
        for part in parts
    ]


def _alone(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"head": recipe.head.model_copy(update={"ridge": 0.0})})


def _ridge(ground: Ground, fit: Fit) -> Fit:
    taps = described(ground.job, fit.recipe, ground.job.task.num_outputs).side.spec.names
    own = {"side": {"name": "ridge", "taps": taps}, "train": {}, "head": {}}
    recipe = Recipe.model_validate(fit.recipe.model_dump(mode="json") | own)
    return replace(fit, name="ridge", recipe=recipe)


def _mixed(network: Entry, ridge: Entry, share: float) -> Entry:
    if network.diverged or ridge.diverged:
        return Entry({**network.facts, "diverged": True})
    outputs = {
        name: (1 - share) * output + share * ridge.outputs[name] for name, output in network.outputs.items()
    }
    return Entry(network.facts, outputs)
