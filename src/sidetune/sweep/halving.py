"""Asynchronous successive halving: most trials end early, the best 1/eta of each rung go on.

Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020 (arXiv 1810.05934).
What differs: a trial is stopped or goes on at the moment it reaches a rung, and never waits there to be
promoted later, because its place in the fleet is worth more than its weights.

Optuna's SuccessiveHalvingPruner decides a trial at a time, so of those that reach a rung together the first
one always goes on, and it keeps what it has decided in the trial's attributes after the fact. Here trials
that reach a rung in one epoch are compared with one another first, and a decision is a line of the
journal, which a resumed worker follows.
"""

from __future__ import annotations

import math
from collections.abc import Collection


def rungs(epochs: int, eta: int) -> tuple[int, ...]:
    """Epochs after which trials are compared, the last one included: E/eta^2, E/eta, E.

    Args:
        epochs: E of a whole training.
        eta: one of so many goes on.
    """
    return tuple(sorted({max(1, epochs // eta**2), max(1, epochs // eta), epochs}))


def goes_on(number: int, scores: dict[int, float], eta: int) -> bool:
    """Whether a trial is among the best 1/eta, rounded up, of all that have reached its rung.

    Rounded down, a rung that the first five trials reach together lets one go on, chosen by a score that
    is early and rough. Rounded up, 64 trials cost a tenth more epochs and a third more are trained to their
    ends (simulated, 16 places).

    Args:
        number: of the trial.
        scores: of each trial that has reached the rung, this one too; higher is better. Of equals the
            earlier one is the better.
        eta: one of so many goes on.
    """
    better = sum((-score, other) < (-scores[number], number) for other, score in scores.items())
    return better < math.ceil(len(scores) / eta)


def expected_epochs(trials: int, epochs: int, eta: int) -> int:
    """Epochs of so many trials if every rung lets 1/eta of them go on: what progress is counted against."""
    total, before, left = 0.0, 0, float(trials)
    for rung in rungs(epochs, eta):
        total += left * (rung - before)
        before, left = rung, max(1.0, left / eta)
    return round(total)


def share_trained(counts: Collection[int], epochs: int) -> float:
    """Epochs that were trained, as a share of training every trial to its end.

    Args:
        counts: epochs of each trial.
        epochs: E.
    """
    return sum(counts) / (epochs * len(counts))
