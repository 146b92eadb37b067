"""Equal time: how long one training may take on a task, decided once.

The first command that asks for it in OUT decides, and the time is frozen there like a recipe: a quicker
method that joins later, or one that is left out, changes nobody's epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sidetune.bench.accuracy.grid import Method
from sidetune.bench.accuracy.ledger import freeze, read_frozen
from sidetune.errors import ArtifactError
from sidetune.recipe import Recipe

Costs = Mapping[Method, Mapping[str, float]]


@dataclass(frozen=True)
class Budget:
    """Time of one training.

    Args:
        seconds: of it.
        by: the method that takes so long, or the option that says so.
    """

    seconds: float
    by: str

    def epochs(self, cost: Mapping[str, float]) -> int:
        """That fit into it, 0 where not even one does.

        Args:
            cost: seconds of an epoch.
        """
        return math.floor(self.seconds / cost["epoch_seconds"] + 1e-6)


def find_budget(out: Path, task: str, minutes: float | None) -> Budget | None:
    """What an earlier command froze; None where there is nothing yet.

    Args:
        out: OUT.
        task: its name.
        minutes: that this command asks for; None: whatever was frozen.

    Raises:
        ArtifactError: this command asks for another time, or the file is damaged.
    """
    fields = read_frozen(out).get(_name(task))
    if fields is None:
        return None
    try:
        budget = Budget(float(fields["seconds"]), str(fields["by"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{out}: {_name(task)} is damaged. Type: --out with a new folder") from error
    if minutes is not None and not math.isclose(60 * minutes, budget.seconds):
        raise ArtifactError(
            f"--minutes is {minutes:g}, and in {out} a training of {task} may take {budget.seconds / 60:.3g} "
            f"minutes ({budget.by}), as the first command decided. Leave --minutes out. Or type: --out with "
            "a new folder"
        )
    return budget


def freeze_budget(out: Path, task: str, minutes: float | None, costs: Costs) -> Budget | None:
    """What was frozen, else what this command gives: its minutes, or what its quickest method takes.

    Args:
        out: OUT.
        task: its name.
        minutes: as for `find_budget`.
        costs: of every trained method; none: nothing is decided yet.
    """
    kept = find_budget(out, task, minutes)
    if kept is not None or not costs:
        return kept
    whole = {method.name: cost["epoch_seconds"] * cost["epochs"] for method, cost in costs.items()}
    quickest = min(whole, key=whole.__getitem__)
    made = Budget(whole[quickest], quickest) if minutes is None else Budget(60 * minutes, "--minutes")
    freeze(out, {_name(task): asdict(made)})
    return made


def fill(chosen: Mapping[Method, Recipe], costs: Costs, budget: Budget) -> dict[Method, Recipe]:
    """Each trained recipe with as many epochs as fit, at least one; schedules end with them.

    Args:
        chosen: recipes.
        costs: of the trained ones.
        budget: of each.
    """
    limited = dict(chosen)
    for method, cost in costs.items():
        train = chosen[method].train.model_copy(update={"epochs": max(1, budget.epochs(cost))})
        limited[method] = chosen[method].model_copy(update={"train": train})
    return limited


def budgets(out: Path, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of these tasks, plain JSON values; of those that have one.

    Args:
        out: OUT.
        tasks: their names.
    """
    found = {task: find_budget(out, task, None) for task in tasks}
    return {task: asdict(budget) for task, budget in found.items() if budget is not None}


def _name(task: str) -> str:
    return f"{task} at equal time"
