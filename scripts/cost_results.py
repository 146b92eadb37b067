"""What training costs, by method: result lines in results/cost.jsonl, and README's table from them.

    python scripts/cost_results.py [--runs 3] [-- --cases losa,lora]   measure; the bench gets the rest
    python scripts/cost_results.py --json run0.json run1.json   what the bench's --json gave
    python scripts/cost_results.py --table                      print the table alone

Each run is a process of its own. Lines of the same setting and cases are replaced, others stay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from speed_results import ROOT, lines, measure

RESULTS = ROOT / "results" / "cost.jsonl"
NAMES = {
    "forward": "backbone alone",
    "losa": "**LoSA**",
    "last": "**LAST**",
    "losa-stored": "**LoSA**, stored features",
    "last-stored": "**LAST**, stored features",
    "lora": "LoRA",
    "norms": "norm tuning",
    "bitfit": "BitFit",
    "adaptformer": "AdaptFormer",
    "vpt": "VPT-deep",
    "full": "full fine-tuning",
}
HEADINGS = (
    "",
    "a step, s",
    "of the backbone's",
    "of LoRA's",
    "memory, MB",
    "of LoRA's",
    "parameters",
    "job, of LoRA's",
)


def words_of(setting: dict[str, Any]) -> str:
    """The command that a setting stands for, without what is default."""
    from sidetune.bench.cost_cases import DEFAULT, CostSetting

    usual = {**CostSetting().to_json(), "cases": setting["cases"], "growth": setting["growth"]}
    given = [f"--{name} {value}" for name, value in setting.items() if value != usual.get(name)]
    if tuple(setting["cases"]) != DEFAULT:
        given.append(f"--cases {','.join(setting['cases'])}")
    if setting["growth"]:
        given.append(f"--growth {','.join(setting['growth'])}")
    return " ".join(["cost", *given])


def write(runs: list[dict[str, Any]]) -> None:
    """Put the lines of these runs into the file, in place of earlier ones of the same command."""
    fresh = [
        line
        for run, found in enumerate(runs)
        for line in lines(found, words_of(found["environment"]["setting"]), run)
    ]
    commands = {json.loads(line)["command"] for line in fresh}
    kept = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    kept = [line for line in kept if json.loads(line)["command"] not in commands]
    RESULTS.write_text("\n".join([*kept, *fresh]) + "\n", encoding="utf-8")


def table(command: str = "sidetune bench cost") -> str:
    """A line a method, medians over the runs of one command; a dash where nothing was measured."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["command"] == command]

    def shown(
        case: str, metric: str, against: str | None = None, scale: float = 1, digits: str = ".2f"
    ) -> str:
        found = [row for row in rows if (row["case"], row["metric"]) == (case, metric)]
        if against is not None:
            found = [row for row in found if row["against"] == against]
        values = [row["value"] / scale if against is None else row["ratio"] for row in found]
        return format(median(values), digits) if values else "–"

    text = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1))]
    for case, name in NAMES.items():
        text.append(
            (
                name,
                shown(case, "step_s"),
                shown(case, "step_s", "forward"),
                shown(case, "step_s", "lora"),
                shown(case, "peak_bytes", scale=1e6, digits=".0f"),
                shown(case, "peak_bytes", "lora"),
                shown(case, "parameters", digits=",.0f"),
                shown(case, "job_s", "lora", digits=".3f"),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def main() -> None:
    """Measure or read, write the lines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, nargs="+", help="files with the output of earlier runs")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("more", nargs="*", help="options of the bench, after --")
    asked = parser.parse_args()
    if asked.json:
        write([json.loads(file.read_text(encoding="utf-8").splitlines()[-1]) for file in asked.json])
    elif not asked.table:
        write([measure(["cost", *asked.more]) for _ in range(asked.runs)])
    print(table())


if __name__ == "__main__":
    main()
