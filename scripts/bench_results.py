"""Result lines of any `sidetune bench` that prints rows: what --json gave, run by run.

    python scripts/bench_results.py run0.json --command 'stream --frames 8' --into results/stream.jsonl

Earlier lines of the same command are replaced, others stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_results import lines


def merged(kept: Sequence[str], fresh: Sequence[str]) -> list[str]:
    """Fresh lines in the place of all of their commands."""
    commands = {json.loads(line)["command"] for line in fresh}
    return [*(line for line in kept if json.loads(line)["command"] not in commands), *fresh]


def main() -> None:
    """Read, merge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="files with the output of a run each")
    parser.add_argument("--command", required=True, help="as it was typed, without `sidetune bench`")
    parser.add_argument("--into", type=Path, required=True)
    asked = parser.parse_args()
    found: list[dict[str, Any]] = [
        json.loads(file.read_text(encoding="utf-8").splitlines()[-1]) for file in asked.runs
    ]
    fresh = [line for run, one in enumerate(found) for line in lines(one, asked.command, run)]
    kept = asked.into.read_text(encoding="utf-8").splitlines() if asked.into.exists() else []
    asked.into.write_text("\n".join(merged(kept, fresh)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
