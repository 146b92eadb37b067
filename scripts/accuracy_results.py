"""Result lines of a `sidetune bench accuracy --reveal`: results/accuracy-112.jsonl, and README's table.

    python scripts/accuracy_results.py OUT --command 'sidetune bench accuracy vtab-mini ..' --commit C
    python scripts/accuracy_results.py --table

A line a method, task and seed, each with the hash of its predictions and how often the task's test scores had
been looked at; and a line a difference with its interval and what it carries. The commit is that of the code
that trained, not of this script. Lines of the same task, method and seed are replaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from provenance import HARDWARE

OUT = Path("results/accuracy-112.jsonl")
MEANS = ("mean of groups", "mean of tasks")
TABLES = {"outcomes": "", "timed_outcomes": " at equal time", "shots_outcomes": ""}
COMPARISONS = {"comparisons": "", "timed_comparisons": " at equal time"}


def main() -> None:
    """Read a report, write the lines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="the bench's OUT")
    parser.add_argument("--command", help="as it was typed")
    parser.add_argument("--commit", help="that it ran at; default: what the report says")
    parser.add_argument("--hardware", default=HARDWARE)
    parser.add_argument("--into", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if options.table == (options.out is not None):
        parser.error("give OUT, or --table")
    if not options.table:
        report = json.loads((options.out / "accuracy.json").read_text("utf-8"))
        about = {
            "command": options.command or "sidetune bench accuracy",
            "commit": options.commit or report["environment"]["commit"],
            "hardware": options.hardware,
        }
        fresh = lines(report, about)
        named = {identity(line) for line in fresh}
        kept = [line for line in read(options.into) if identity(line) not in named]
        text = "".join(json.dumps(line) + "\n" for line in kept + fresh)
        options.into.write_text(text, encoding="utf-8")
    print(table(read(options.into)))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where there is none."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def identity(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line is replaced by."""
    return tuple(line.get(name) for name in ("method", "task", "seed", "metric", "shots"))


def lines(report: dict[str, Any], about: dict[str, str]) -> list[dict[str, Any]]:
    """Scores of every seed, then differences."""
    setting = report["environment"]["setting"]
    size = setting["backbone"]["preprocess"]["size"]
    environment = {name: value for name, value in report["environment"].items() if name != "setting"}
    shared = {**about, "environment": environment}
    found = []
    for table_of, suffix in TABLES.items():
        for one in report[table_of]:
            found += scores(one, suffix, {**shared, "task": f"{one['task']} at {size} px"})
    for table_of, suffix in COMPARISONS.items():
        for one in report[table_of]:
            found.append(
                {
                    "method": f"{one['method']} - {one['against']}{suffix}",
                    "seed": f"0 to {setting['seeds'] - 1}",
                    "metric": "test_accuracy",
                    **{name: one[name] for name in ("value", "interval", "images", "claim")},
                    **shared,
                    "task": f"{one['where']} at {size} px",
                    "recipe": None,
                }
            )
    return found


def scores(one: dict[str, Any], suffix: str, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a seed of a method on a task."""
    found = []
    for seed, value, digest in zip(one["seeds"], one["test"] or (), one["prediction_hashes"], strict=False):
        line = {
            "method": one["method"] + suffix,
            "seed": seed,
            "metric": "test_accuracy",
            "value": value,
            **shared,
            "recipe": one["recipe"],
            "group": one["group"],
            "validation": one["val"],
            "detail": one["point"],
            "cost": one["cost"],
            "seeds_wanted": one["wanted"],
            "predictions": digest,
            "looks": one["looks"],
        }
        found.append(line if one["shots"] is None else {**line, "shots": one["shots"]})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A row a task, a column a method, then both means: of the first table, all images."""
    plain = [row for row in rows if "claim" not in row and "shots" not in row and "cost" in row]
    plain = [row for row in plain if not row["method"].endswith("at equal time") and row["group"]]
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
    return "\n".join([*text, "", *claims(rows)])


def _cell(found: list[dict[str, Any]], score: float | None) -> str:
    if score is None:
        return "–"
    short = found[0]["seed"] is not None and len(found) < found[0]["seeds_wanted"]
    return f"{score:.1f}{'*' * short}"


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


def claims(rows: list[dict[str, Any]]) -> list[str]:
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
