"""Small requests of `sidetune bench accuracy`, and what is read of their reports."""

import json

from sidetune.bench.accuracy import Request
from sidetune.bench.accuracy.grid import parse_methods
from sidetune.bench.accuracy.tasks import find_tasks
from sidetune.recipe import Recipe

BASE = {"backbone": {"name": "toy"}, "train": {"epochs": 2, "batch_size": 8}}


def request(data, folder, methods="ridge,linear,losa", **changed):
    base = Recipe.build(BASE, changed.pop("settings", ()))
    fields = {"seeds": 2, "grid_size": 2, "against": ("ridge",), "looks": folder / "looks.jsonl"}
    return Request(
        tasks=find_tasks(data),
        methods=parse_methods(methods),
        out=folder / "out",
        base=base,
        stores=folder / "stores",
        quiet=True,
        **(fields | changed),
    )


def frozen(folder):
    return json.loads((folder / "out" / "frozen.json").read_text())


def of(report, task, method):
    (found,) = (one for one in report.outcomes if (one.task, one.method) == (task, method))
    return found


def hashes(report):
    return [(one.task, one.method, one.recipe, one.val, one.hashes) for one in report.outcomes]
