"""Kill extract, fit and gc with `kill -9` at seeded moments; each must end as if nothing had happened.

    python scripts/kill.py                    # 200 kills; writes docs/reference/reliability/kill.json
    python scripts/kill.py --kills 20 --seed 1 --out /tmp/kill.json

Three moments of four are events (an image half decoded, a shard written but not its checksum file, ..),
each kind as likely as another; the others are drawn by the clock. The process writes down each event, so
where it died is known and not supposed. A job is killed one to four times, then runs to its end. Exit 1 if
a byte differs from the uninterrupted run, a file is left over, a finished shard was lost, or a kind of moment
was never hit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from killing import KINDS, Server, kill_job, make_jobs  # noqa: E402

JOBS, SHARES = ("extract", "fit", "gc"), (0.4, 0.5, 0.1)


def main() -> None:
    """Run, write the figures, and say them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/reference/reliability/kill.json")
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sidetune-kill-") as folder:
        figures = run_kills(Path(folder), asked.kills, asked.seed)
    figures["command"] = f"python scripts/kill.py --kills {asked.kills} --seed {asked.seed}"
    figures["minutes"] = round((time.monotonic() - started) / 60, 1)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
    sys.exit(any(figures[name] for name in ("differing_files", "lost_shards", "kinds_never_hit")))


def run_kills(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """So many kills over drawn jobs: the figures."""
    rng = np.random.default_rng(seed)
    logs = folder / "logs"
    logs.mkdir()
    server = Server(logs)
    jobs = make_jobs(server, folder)
    kinds: Counter[str] = Counter()
    by_job: Counter[str] = Counter()
    differing: list[str] = []
    lost: list[str] = []
    clocked = runs = number = 0
    while kinds.total() < kills:
        name = JOBS[int(rng.choice(len(JOBS), p=SHARES))]
        wanted = min(int(rng.integers(1, 5)), kills - kinds.total())
        number += 1
        one = kill_job(server, jobs[name], folder / f"{number}-{name}", rng, wanted)
        kinds.update(one.kinds)
        by_job[name] += len(one.kinds)
        clocked, runs = clocked + one.clocked, runs + one.runs
        differing += [f"{number}-{name}/{file}" for file in one.differing]
        lost += [f"{number}-{name}/{file}" for file in one.lost]
        print(
            f"{kinds.total()} of {kills} kills; {name}: {', '.join(one.kinds)}", file=sys.stderr, flush=True
        )
    server.close()
    return {
        "kills": kinds.total(),
        "kills_by_the_clock": clocked,
        "kills_by_kind": dict(sorted(kinds.items())),
        "kinds_never_hit": sorted({*KINDS.values(), "store gc"} - kinds.keys()),
        "kills_by_job": dict(sorted(by_job.items())),
        "jobs": number,
        "processes": runs,
        "differing_files": differing,
        "lost_shards": lost,
        "seed": seed,
    }


if __name__ == "__main__":
    main()
