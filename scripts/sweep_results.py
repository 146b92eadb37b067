"""Result lines of a finished sweep: results/sweep-112.jsonl.

python scripts/sweep_results.py RUN --commit COMMIT

The winner and the recipe as given on test, how they differ with its paired interval, and what the search
cost beside as many networks one by one, which is computed from one network's measured epoch. The commit is
that of the sweep's own code, not of this script's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from provenance import HARDWARE

METRICS = ("balanced_accuracy", "accuracy", "log_loss", "calibration_error")
OUT = Path("results/sweep-112.jsonl")


def main() -> None:
    """Read a run, write the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--commit", required=True)
    options = parser.parse_args()
    metrics, sweep, recipe = (
        json.loads((options.run / f"{name}.json").read_text("utf-8"))
        for name in ("metrics", "sweep", "recipe")
    )
    task = f"{metrics['data']['name']} at {recipe['recipe']['backbone']['size']} px"
    shared = {
        "task": task,
        "seed": recipe["recipe"]["train"]["seed"],
        "command": f"sidetune sweep {metrics['data']['name']} --size 112 --trials {len(sweep['trials'])}",
        "commit": options.commit,
        "hardware": HARDWARE,
        "recipe": recipe["hash"],
        "environment": metrics["environment"],
    }
    lines = [line | shared for line in _lines(metrics, sweep)]
    kept = [line for line in _read() if line["task"] != task]
    OUT.write_text("".join(json.dumps(line) + "\n" for line in kept + lines), encoding="utf-8")
    for line in lines:
        print(line["method"], line["metric"], line["value"], line.get("interval"))


def _lines(metrics: dict[str, Any], sweep: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for row in metrics["rows"]:
        for metric in METRICS:
            about = {"method": f"sweep, {row['method']}", "metric": f"test_{metric}"}
            scored = row["test"]
            interval = scored["intervals"].get(metric)
            lines.append({**about, "value": scored["scores"][metric], "interval": interval})
    apart = sweep["difference"]
    if apart is not None:
        lines.append(
            {
                "method": "sweep, winner - default",
                "metric": f"{apart['split']}_{metrics['headline']}",
                **{name: value for name, value in apart.items() if name in ("value", "interval")},
            }
        )
    for name, value in sweep["cost"].items():
        lines.append({"method": "sweep", "metric": name, "value": value})
    return lines


def _read() -> list[dict[str, Any]]:
    if not OUT.exists():
        return []
    return [json.loads(line) for line in OUT.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    main()
