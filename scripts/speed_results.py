"""Measure `sidetune bench side` and `bench read` several times: a result line a row in results/speed.jsonl.

python scripts/speed_results.py [--runs 3] [--picture docs/explanation/growth.svg]

Each run is a process of its own. `table()` is the table of docs/explanation/speed.md: medians over the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "speed.jsonl"
SHOWN = {
    ("losa-fast", "ms_per_image"): "LoSA, fast: ms an image",
    ("last-fast", "ms_per_image"): "LAST, fast: ms an image",
    ("losa-fast", "times_floor"): "LoSA: times its floor",
    ("last-fast", "times_floor"): "LAST: times its floor",
    ("losa-fast", "kept_bytes"): "LoSA: kept for backward, MB",
    ("last-fast", "kept_bytes"): "LAST: kept for backward, MB",
    ("losa-fast", "peak_bytes"): "LoSA: peak of a step, MB",
    ("last-fast", "peak_bytes"): "LAST: peak of a step, MB",
    ("read-shuffled", "gb_per_s"): "reading in random order, GB/s",
    ("read-in-order", "gb_per_s"): "reading in order, GB/s",
}
UNITS = {"B": 1e6}


def measure(arguments: list[str]) -> dict[str, Any]:
    """One bench in a process of its own."""
    command = [sys.executable, "-m", "sidetune", "bench", *arguments, "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines(found: dict[str, Any], command: str, run: int) -> list[str]:
    """A result line a row. The sizes are the recipe of a benchmark."""
    environment = found["environment"]
    if environment.get("changed"):
        sys.exit(f"{environment['commit']} had changes when this was measured. Type: git commit, and measure")
    sizes = json.dumps(environment["setting"], sort_keys=True)
    common = {
        "task": f"bench {command.split(maxsplit=1)[0]}",
        "seed": run,
        "command": f"sidetune bench {command}",
        "commit": environment["commit"],
        "hardware": f"{environment['threads']} threads of {environment['cores']} cores, {environment['cpu']}",
        "recipe": hashlib.sha256(sizes.encode()).hexdigest(),
        "environment": environment,
    }
    return [json.dumps({"method": row["case"], **row, **common}, default=str) for row in found["rows"]]


def table() -> str:
    """A line a row that is shown: median of the runs, the ratio with its range, and its goal."""
    rows = defaultdict(list)
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["case"], row["metric"]].append(row)
    text = [["", "median", "of", "ratio (runs)", "goal"], ["---", "---:", "---", "---:", "---:"]]
    for key, name in SHOWN.items():
        found = rows[key]
        value = median(row["value"] for row in found) / UNITS.get(found[0]["unit"], 1)
        ratios = sorted(row["ratio"] for row in found if row["ratio"] is not None)
        goal = found[0]["goal"]
        sign = "at least" if found[0]["metric"] == "gb_per_s" else "at most"
        shown = f"{median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})" if ratios else ""
        against = found[0]["against"] or ""
        text.append([name, f"{value:.3g}", against, shown, f"{sign} {goal:g}" if goal is not None else ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in text)


def main() -> None:
    """Measure, and write the lines."""
    parser = argparse.ArgumentParser(description="Result lines of the benchmarks.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    text: list[str] = []
    for run in range(asked.runs):
        for command in ("side", "read"):
            text += lines(measure([command]), command, run)
    if asked.picture is not None:
        arguments = ["side", "--growth", "--picture", str(asked.picture)]
        growth = measure(arguments)
        growth["rows"] = [row for row in growth["rows"] if row["case"].startswith("growth/")]
        text += lines(growth, " ".join(arguments), 0)
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
