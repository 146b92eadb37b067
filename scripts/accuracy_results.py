"""Result lines of a `sidetune bench accuracy --reveal`: results/accuracy-112.jsonl, and README's table.

    python scripts/accuracy_results.py OUT --command 'sidetune bench accuracy vtab-mini ..'
    python scripts/accuracy_results.py --table
    python scripts/accuracy_results.py --table --picture docs/accuracy-112.png

A line a method, task and seed, each with the hash of its predictions and how often the task's test scores had
been looked at; and a line a difference with its interval and what it carries. The commit is that of the
checkout that a network was fitted from; where a fit does not say it, this one's. All lines of a backbone,
task and method that are in the report are replaced, and differences of such a method with them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from provenance import HARDWARE, git

from sidetune.bench.accuracy.picture import COSTS, draw_points, shown_cost

OUT = Path("results/accuracy-112.jsonl")
MEANS = ("mean of groups", "mean of tasks")
EQUAL_TIME = " at equal time"
TABLES = {"outcomes": "", "timed_outcomes": EQUAL_TIME, "shots_outcomes": ""}
COMPARISONS = {"comparisons": "", "timed_comparisons": EQUAL_TIME}
Line = dict[str, Any]


def main() -> None:
    """Read a report, write the lines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="the bench's OUT")
    parser.add_argument("--command", help="as it was typed")
    parser.add_argument("--commit", help="that it ran at; default: each fit's own, else HEAD")
    parser.add_argument("--hardware", default=HARDWARE)
    parser.add_argument("--into", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--picture", type=Path, help="draw the first backbone's means against what they cost")
    options = parser.parse_args()
    if options.table == (options.out is not None):
        parser.error("give OUT, or --table")
    if not options.table:
        if options.command is None:
            parser.error("--command is missing, expected the bench's, as it was typed")
        if git("status", "--porcelain", "--untracked-files=no"):
            sys.exit("the tree has changes, and a result line names a commit. Type: git commit")
        report = json.loads((options.out / "accuracy.json").read_text("utf-8"))
        if differing := list(differences(report)):
            sys.exit("\n".join([*differing, "Fit these again, or give them an OUT of their own"]))
        about = {"command": options.command, "hardware": options.hardware}
        about["commit"] = options.commit or git("rev-parse", "HEAD")
        fresh = lines(report, about, own_commit=options.commit is None)
        text = "".join(json.dumps(line) + "\n" for line in merged(read(options.into), fresh))
        options.into.write_text(text, encoding="utf-8")
    rows = read(options.into)
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        own = [row for row in rows if row["backbone"] == backbone]
        second = ["at equal time", "", timed_table(own), ""] if of_second_table(own) else []
        print("\n".join([backbone, "", table(own), "", *second, *claims(own), ""]))
    if options.picture is not None:
        picture([row for row in rows if row["backbone"] == rows[0]["backbone"]], options.picture)


def read(path: Path) -> list[Line]:
    """The lines of a file; none where there is none."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def differences(report: Line) -> Iterator[str]:
    """How fits were made elsewhere than the report: other versions, another machine, other threads."""
    here = report["environment"]
    for one in (one for name in TABLES for one in report[name]):
        for seed, made in zip(one["seeds"], one["made"], strict=True):
            for part, value in made["environment"].items():
                if value != here[part]:
                    where = f"{one['task']}/{one['method']}, seed {seed}"
                    yield f"{where}: {part} was {value} and is {here[part]} in the report, expected the same"


def merged(kept: list[Line], fresh: list[Line]) -> list[Line]:
    """Fresh lines in place of all that say something of the same backbone, task and method."""
    named = {(line["backbone"], line["task"], name) for line in fresh for name in line["of"]}
    anywhere = {(backbone, name) for backbone, _, name in named}
    tasks = {(line["backbone"], line["task"]) for line in kept + fresh if "claim" not in line}

    def stale(line: Line) -> bool:
        backbone, task = line["backbone"], line["task"]
        if (backbone, task) in tasks:
            return any((backbone, task, name) in named for name in line["of"])
        return any((backbone, name) in anywhere for name in line["of"])  # a mean over tasks

    return [line for line in kept if not stale(line)] + fresh


def lines(report: Line, about: dict[str, str], *, own_commit: bool) -> list[Line]:
    """Scores of every seed, then differences."""
    setting = report["environment"]["setting"]
    size = setting["backbone"]["preprocess"]["size"]
    environment = {name: value for name, value in report["environment"].items() if name != "setting"}
    shared = {**about, "backbone": setting["backbone"]["architecture"], "environment": environment}
    found = []
    for table_of, suffix in TABLES.items():
        for one in report[table_of]:
            found += scores(one, suffix, {**shared, "task": f"{one['task']} at {size} px"}, own_commit)
    for table_of, suffix in COMPARISONS.items():
        for one in report[table_of]:
            pair = [one["method"], one["against"]]
            found.append(
                {
                    "method": f"{one['method']} - {one['against']}{suffix}",
                    "of": pair,
                    "seed": f"0 to {setting['seeds'] - 1}",
                    "metric": "test_accuracy",
                    **{name: one[name] for name in ("value", "interval", "images", "claim")},
                    **shared,
                    "task": f"{one['where']} at {size} px",
                    "recipe": _recipes(found, pair),
                }
            )
    return found


def _recipes(found: list[Line], pair: list[str]) -> str:
    """sha256 over the recipes of all networks of two methods."""
    recipes = sorted({line["recipe"] for line in found if "claim" not in line and line["of"][0] in pair})
    return hashlib.sha256("\n".join(recipes).encode()).hexdigest()


def scores(one: Line, suffix: str, shared: Line, own_commit: bool) -> list[Line]:
    """A line a seed of a method on a task."""
    found = []
    parts = zip(one["seeds"], one["test"] or (), one["prediction_hashes"], one["made"], strict=True)
    for seed, value, digest, made in parts:
        line = {
            "method": one["method"] + suffix,
            "of": [one["method"]],
            "seed": seed,
            "metric": "test_accuracy",
            "value": value,
            **shared,
            "recipe": one["recipe"],
            "group": one["group"],
            "validation": one["val"],
            "detail": one["point"],
            "cost": one["cost"],
            "over": one["over"],
            "seeds_wanted": one["wanted"],
            "predictions": digest,
            "looks": one["looks"],
        }
        if own_commit and made["commit"]:
            line["commit"] = made["commit"]
        found.append(line if one["shots"] is None else {**line, "shots": one["shots"]})
    return found


def picture(rows: list[Line], path: Path) -> None:
    """Means over tasks of each method that has all of them, against parameters, time and memory."""
    plain = of_first_table(rows)
    tasks = {row["task"] for row in plain}
    panels: dict[str, list[tuple[str, float, float]]] = {cost: [] for cost in COSTS}
    for method in dict.fromkeys(row["method"] for row in plain):
        by_task = {
            task: [row for row in plain if (row["task"], row["method"]) == (task, method)] for task in tasks
        }
        if not all(by_task.values()):
            continue
        score = 100 * mean(mean(row["value"] for row in found) for found in by_task.values())
        star = "*" * any(_short(found) for found in by_task.values())
        for cost, points in panels.items():
            taken = mean(shown_cost(found[0]["cost"], cost) for found in by_task.values())
            points.append((method + star, taken, score))
    wanted = max(row["seeds_wanted"] for row in plain)
    cpus = {row["environment"]["cpu"] for row in plain}
    where = f", times of {len(cpus)} kinds of CPU" if len(cpus) > 1 else ""
    draw_points(
        panels, path, ("Test accuracy", f"mean of {len(tasks)} tasks, {wanted} seeds (*: fewer){where}")
    )


def of_first_table(rows: list[Line]) -> list[Line]:
    """Scores of all images at equal epochs, of the tasks that have a group."""
    return [row for row in _scores(rows) if not row["method"].endswith(EQUAL_TIME)]


def of_second_table(rows: list[Line]) -> list[Line]:
    """Likewise at equal time, under the methods' own names."""
    timed = [row for row in _scores(rows) if row["method"].endswith(EQUAL_TIME)]
    return [{**row, "method": row["method"].removesuffix(EQUAL_TIME)} for row in timed]


def _scores(rows: list[Line]) -> list[Line]:
    plain = [row for row in rows if "claim" not in row and "shots" not in row and "cost" in row]
    return [row for row in plain if row["group"]]


def table(rows: list[Line]) -> str:
    """A row a task, a column a method, then both means: of the bench's first table, all images."""
    return _table(of_first_table(rows))


def timed_table(rows: list[Line]) -> str:
    """Likewise of the second table; a dagger where not even one epoch fits."""
    return _table(of_second_table(rows))


def _table(plain: list[Line]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in plain))
    groups = {row["task"]: row["group"] for row in plain}
    cells = {
        (task, method): [row for row in plain if (row["task"], row["method"]) == (task, method)]
        for task in groups
        for method in methods
    }
    score = {key: 100 * mean(row["value"] for row in found) for key, found in cells.items() if found}
    text = [f"| | {' | '.join(methods)} |", f"| --- |{' ---: |' * len(methods)}"]
    for task in sorted(groups, key=lambda name: (groups[name], name)):
        shown = [_cell(cells[task, method], score.get((task, method))) for method in methods]
        text.append(f"| {task.partition(' ')[0]} ({groups[task].lower()}) | {' | '.join(shown)} |")
    for words, of in (("groups", _of_groups), ("tasks", _of_tasks)):
        shown = [_mean(of({task: score.get((task, m)) for task in groups}, groups)) for m in methods]
        text.append(f"| **mean of {words}** | {' | '.join(shown)} |")
    return "\n".join(text)


def _cell(found: list[Line], score: float | None) -> str:
    if score is None:
        return "–"
    return f"{score:.1f}{'*' * _short(found)}{'†' * found[0]['over']}"


def _short(found: list[Line]) -> bool:
    """Whether there are fewer seeds than of the others."""
    return found[0]["seed"] is not None and len(found) < found[0]["seeds_wanted"]


def _mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _of_tasks(scores_of: dict[str, float | None], groups: dict[str, str]) -> float | None:
    known = [score for score in scores_of.values() if score is not None]
    return mean(known) if len(known) == len(scores_of) and known else None


def _of_groups(scores_of: dict[str, float | None], groups: dict[str, str]) -> float | None:
    parts = []
    for group in dict.fromkeys(groups.values()):
        inside = {task: scores_of[task] for task in scores_of if groups[task] == group}
        parts.append(_of_tasks(inside, groups))
    known = [part for part in parts if part is not None]
    return mean(known) if len(known) == len(parts) and known else None


def claims(rows: list[Line]) -> list[str]:
    """A line a difference of the two means, with its interval and what it carries."""
    text = []
    for row in rows:
        if "claim" in row and row["task"].rpartition(" at ")[0] in MEANS:
            low, high = (f"{100 * bound:+.1f}" for bound in row["interval"])
            where = row["task"].rpartition(" at ")[0]
            text.append(
                f"- {row['method']}, {where}: {100 * row['value']:+.1f} ({low} .. {high}), {row['claim']}"
            )
    return text


if __name__ == "__main__":
    main()
