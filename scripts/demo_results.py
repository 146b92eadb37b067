"""LoSA and LAST against ridge, linear and attentive probe on the demo's data: results/demo.jsonl.

    python scripts/demo_results.py runs/demo/elpv.csv runs/demo/store --work runs/results

Settings are chosen on validation with seed 0 (balanced accuracy, of equals the higher AUROC); the chosen
ones are then run with every seed and reported on test. Solved probes have no seed. Runs that are
finished are read, not run again; `--workers` runs share the machine, so their seconds are no benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from provenance import HARDWARE, git

SEEDS = (0, 1, 2)
GRID: dict[str, list[tuple[str, ...]]] = {  # a probe is an opponent only when it is fitted to the end
    "attentive": [
        ("train.lr=3e-4",),
        ("train.lr=1e-3",),
        ("train.lr=3e-4", "train.epochs=100"),
        ("train.lr=1e-3", "train.epochs=100"),
    ],
    "losa": [("train.lr=3e-4",), ("train.lr=1e-3",), ("side.drop_path=0.2",)],
    "last": [("train.lr=3e-4",), ("train.lr=1e-3",), ("side.drop_path=0.2",)],
}
METRICS = ("balanced_accuracy", "accuracy", "auroc", "log_loss")


def main() -> None:
    """Choose, run, write the lines, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--out", type=Path, default=Path("results/demo.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if git("status", "--porcelain", "--untracked-files=no"):
        sys.exit("the tree has changes, and a result line names a commit. Type: git commit")
    with ThreadPoolExecutor(options.workers) as pool:
        tried = {
            side: [pool.submit(run, options, side, settings, 0) for settings in GRID[side]] for side in GRID
        }
        chosen = {}
        for side, futures in tried.items():
            ranked = [score_on_validation(future.result()) for future in futures]
            chosen[side] = GRID[side][ranked.index(max(ranked))]
            print(
                f"{side}: {' '.join(chosen[side])} of {list(zip(GRID[side], ranked, strict=True))}",
                flush=True,
            )
        jobs = [(side, seed) for side in chosen for seed in SEEDS]
        finished = list(pool.map(lambda job: run(options, job[0], chosen[job[0]], job[1]), jobs))
    lines = []
    for (side, seed), metrics in zip(jobs, finished, strict=True):
        lines += result_lines(options, metrics, side, chosen[side], seed)
    for method in ("ridge-last", "ridge", "linear"):
        lines += result_lines(options, finished[0], method, (), None)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} lines in {options.out}. Type: python scripts/results_table.py")


def command(
    options: argparse.Namespace, side: str, settings: tuple[str, ...], seed: int, out: str
) -> list[str]:
    """The command line of one run."""
    changed = (f"train.epochs={options.epochs}", *settings, f"train.seed={seed}")
    words = ["fit", str(options.data), "--backbone", "demo", "--size", str(options.size), "--side", side]
    words += ["--store", str(options.store), "--out", out]
    return words + [word for setting in changed for word in ("--set", setting)]


def run(options: argparse.Namespace, side: str, settings: tuple[str, ...], seed: int) -> dict[str, Any]:
    """One `sidetune fit`; its --json object."""
    out = options.work / "-".join((side, *settings, f"seed{seed}")).replace("=", "")
    words = command(options, side, settings, seed, str(out))
    threads = str(max(1, (os.cpu_count() or 1) // options.workers))
    done = subprocess.run(
        [sys.executable, "-m", "sidetune", *words, "--json", "--quiet"],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    stamp = out.with_name(f"{out.name}.commit")  # of the code that made the run, not of what reads it again
    if not stamp.exists():
        stamp.write_text(git("rev-parse", "HEAD"))
    return {**found, "commit": stamp.read_text()}


def score_on_validation(metrics: dict[str, Any]) -> tuple[float, float]:
    """What settings are chosen by."""
    scores = metrics["rows"][-1]["val"]["scores"]
    return scores["balanced_accuracy"], scores["auroc"]


def result_lines(
    options: argparse.Namespace,
    metrics: dict[str, Any],
    method: str,
    settings: tuple[str, ...],
    seed: int | None,
) -> list[dict[str, Any]]:
    """One line a metric of one method of one run."""
    row = next(row for row in metrics["rows"] if row["method"] == method)
    words = command(options, metrics["side"], settings, seed or 0, "RUN")
    return [
        {
            "method": method,
            "task": f"elpv-2 at {options.size} px",
            "seed": seed,
            "metric": f"test_{metric}",
            "value": row["test"]["scores"][metric],
            "interval": row["test"]["intervals"].get(metric),
            "validation": row["val"]["scores"][metric],
            "detail": row["detail"],
            "parameters": row["parameters"],
            "command": shlex.join(["sidetune", *words]),
            "commit": metrics["commit"],
            "hardware": HARDWARE,
            "recipe": metrics["recipe_hash"],
            "environment": metrics["environment"],
        }
        for metric in METRICS
    ]


if __name__ == "__main__":
    main()
