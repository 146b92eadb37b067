"""Read mutated files of every kind and count what becomes of them, as `make fuzz` does.

    python scripts/fuzz.py --files 2000 --seed 0 --out docs/reference/reliability/fuzz.json

Each file is read in a process of its own with a bound on its memory and an alarm. Exit 1 where one is not
simply read, or refused with a sidetune error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402 - the helpers of the tests are no package

from fuzzing import GROWTH, SECONDS, Outcome, Target, attempt, build, mutate  # noqa: E402

ENDS = ("refused", "valid", "crashed", "hung", "memory")


def main() -> None:
    """Parse, run, print a line a kind, write, and exit 1 on a defect."""
    parser = argparse.ArgumentParser(description="Read mutated files of every kind.")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only this one")
    parser.add_argument("--keep", type=Path, help="a folder for files that are not simply read or refused")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON lines")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "files"
        root.mkdir()
        targets = [one for one in build(root) if arguments.kind in (None, one.kind)]
        found = run(targets, root, arguments.files, arguments.seed, arguments.keep)
    command = f"python scripts/fuzz.py --files {arguments.files} --seed {arguments.seed}"
    rows = [row(kind, outcomes, arguments.seed, command) for kind, outcomes in sorted(found.items())]
    rows.append(row("all", [one for outcomes in found.values() for one in outcomes], arguments.seed, command))
    text = "".join(f"{json.dumps(one)}\n" for one in rows)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
    sys.exit(int(any(rows[-1][key] for key in ("crashed", "hung", "memory", "written"))))


def run(
    targets: list[Target], root: Path, files: int, seed: int, keep: Path | None
) -> dict[str, list[Outcome]]:
    """The outcomes by kind: kinds in turn, and the files of a kind in turn."""
    by_kind: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        by_kind[target.kind].append(target)
    kinds = sorted(by_kind)
    found: dict[str, list[Outcome]] = {kind: [] for kind in kinds}
    started = time.monotonic()
    for number in range(files):
        kind = kinds[number % len(kinds)]
        target = by_kind[kind][number // len(kinds) % len(by_kind[kind])]
        rng = np.random.default_rng([seed, number])
        content = mutate((root / target.file).read_bytes(), target.file, rng)
        outcome = attempt(target, root, content)
        found[kind].append(outcome)
        if outcome.end not in ("valid", "refused") or outcome.written:
            print(
                f"{number} {target.file}: {outcome.end} {outcome.written} {outcome.detail[-1500:]}",
                file=sys.stderr,
            )
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}-{Path(target.file).name}").write_bytes(content)
        if (number + 1) % 200 == 0:
            print(f"{number + 1}/{files} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return found


def row(kind: str, outcomes: list[Outcome], seed: int, command: str) -> dict[str, Any]:
    """One line of the figures."""
    ends = Counter(one.end for one in outcomes)
    return {
        "kind": kind,
        "files": len(outcomes),
        **{end: ends[end] for end in ENDS},
        "written": sum(bool(one.written) for one in outcomes),
        "slowest_seconds": round(max((one.seconds for one in outcomes), default=0.0), 2),
        "largest_growth_mib": round(max((one.growth for one in outcomes), default=0) / 2**20),
        "limit_seconds": SECONDS,
        "limit_growth_mib": GROWTH // 2**20,
        "seed": seed,
        "command": command,
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
