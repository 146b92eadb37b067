"""README's table from the result lines: balanced accuracy on test, mean and range over seeds.

python scripts/results_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
METHODS = {
    "ridge-last": "ridge, last tap",
    "ridge": "ridge, all taps",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "losa": "**LoSA**",
    "last": "**LAST**",
}
TASKS = {
    "demo.jsonl": "solar cells, 224 px, 8 epochs",
    "elpv-112.jsonl": "solar cells, 112 px, 30 epochs",
    "shapes-112.jsonl": "counting shapes, 112 px, 25 epochs",
}


def table() -> str:
    """One row a method, one column a file of result lines."""
    rows = [["", *TASKS.values()], ["---", *["---:"] * len(TASKS)]]
    rows += [[name, *(cell(file, method) for file in TASKS)] for method, name in METHODS.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(file: str, method: str) -> str:
    """`76.1`, or `76.1 (75.2 .. 77.0)` where there are several seeds; a dash where nothing was measured."""
    lines = [json.loads(line) for line in (RESULTS / file).read_text(encoding="utf-8").splitlines()]
    asked = (method, "test_balanced_accuracy")
    values = [100 * line["value"] for line in lines if (line["method"], line["metric"]) == asked]
    if not values:
        return "–"
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} .. {max(values):.1f})"


if __name__ == "__main__":
    print(table())
