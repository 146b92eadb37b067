"""What a windowed shuffle costs in accuracy: results/shuffle-112.jsonl.

    python scripts/shuffle_results.py runs/demo/elpv.csv --store runs/shuffle/store

LoSA on the demo's data at 112 px, features extracted once into shards of 128 samples (20 shards). Each
seed is trained with all shards shuffled together and with two at a time, a tenth of the store; then with
two at a time as if the shards were sorted by class, which `extract` never makes: what its order by hash is
for. A seed has one start; only the order differs. Probes, leak check and report are left out. What stands
in the file already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from provenance import HARDWARE, git

from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
from sidetune.extract import extract, sample_keys
from sidetune.features import Spec
from sidetune.job import Job, Work
from sidetune.methods import Row, score
from sidetune.reader import Layout
from sidetune.recipe import Recipe
from sidetune.runs import environment
from sidetune.side_fit import fit_sides
from sidetune.sources import StoredSource
from sidetune.tasks import build_task

SHARD_RECORDS = 128
METRICS = ("balanced_accuracy", "accuracy", "auroc", "log_loss")
WINDOWS: dict[str, int | None] = {"all": None, "two of twenty": 2, "two of twenty, sorted by class": 2}


def main() -> None:
    """Extract, train, write the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--store", type=Path, default=Path("runs/shuffle/store"))
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/shuffle-112.jsonl"))
    options = parser.parse_args()
    if git("status", "--porcelain", "--untracked-files=no"):
        sys.exit("the tree has changes, and a result line names a commit. Type: git commit")
    job = open_job(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    lines: list[dict[str, Any]] = [json.loads(line) for line in options.out.read_text("utf-8").splitlines()]
    finished = {(line["seed"], line["shuffled"]) for line in lines}
    for seed in range(options.seeds):
        for name, window in WINDOWS.items():
            if (seed, name) in finished:
                continue
            train = {"epochs": options.epochs, "seed": seed, "shuffle_window": window}
            recipe = Recipe.build({**job.recipe.model_dump(mode="json"), "train": train})
            row = fit_own(replace(job, recipe=recipe), in_order="sorted" in name)
            lines += result_lines(options, recipe, row, name)
            options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            val, test = (100 * one.scores["balanced_accuracy"] for one in (row.val, row.test))
            print(f"seed {seed}, {name}: {val:.1f} {test:.1f}, {row.fitted.seconds:.0f} s", flush=True)


def open_job(options: argparse.Namespace) -> Job:
    """Features in small shards, splits, task."""
    importlib.import_module("sidetune.extract").SHARD_RECORDS = SHARD_RECORDS
    recipe = Recipe.build({"backbone": {"name": "demo", "size": options.size}})
    dataset, backbone = load_dataset(options.data), build_backbone("demo", size=options.size)
    keys = sample_keys(dataset)
    source = StoredSource(extract(dataset, backbone, options.store, keys=keys), keys)
    split = {name: dataset.rows(name) for name in ("train", "val", "test")}
    task = build_task("classify", dataset, split["train"], class_weights="none", label_smoothing=0.0)
    out = options.store.parent / "no-run"
    return Job(recipe, dataset, backbone, out, True, source, source.summary(), split, task, 0.0)


def fit_own(job: Job, *, in_order: bool) -> Row:
    """Train the side alone; `in_order`: as if its rows stood in shards sorted by class."""
    (job.out / "checkpoint.safetensors").unlink(missing_ok=True)  # the run before this one left it
    if in_order:
        source = copy.copy(job.source)
        source.layout = partial(sorted_by_class, job)  # type: ignore[method-assign]
        job = replace(job, source=source)
    return score(job, fit_sides(Work((job,), job.recipe, job.out))[0])


def sorted_by_class(job: Job, rows: NDArray[np.int64], spec: Spec) -> Layout:
    """Where rows would be read, had as many shards been filled class by class."""
    layout = job.source.layout(rows, spec)
    assert layout is not None
    rank = np.argsort(np.argsort(job.dataset.targets[rows], kind="stable"), kind="stable")
    shards = rank * len(layout.num_bytes) // len(rank)
    return replace(layout, shards=shards, fetch=lambda numbers: None)


def result_lines(options: argparse.Namespace, recipe: Recipe, row: Row, name: str) -> list[dict[str, Any]]:
    """One line a metric."""
    assert row.test is not None
    return [
        {
            "method": "losa",
            "task": f"elpv-2 at {options.size} px",
            "seed": recipe.train.seed,
            "shuffled": name,
            "metric": f"test_{metric}",
            "value": row.test.scores[metric],
            "interval": row.test.to_json()["intervals"].get(metric),
            "validation": row.val.scores[metric],
            "detail": row.fitted.detail,
            "parameters": row.fitted.parameters,
            "command": f"python scripts/shuffle_results.py elpv.csv --epochs {options.epochs}",
            "commit": git("rev-parse", "HEAD"),
            "hardware": HARDWARE,
            "recipe": recipe.hash,
            "environment": environment(torch.device("cpu")),
        }
        for metric in METRICS
    ]


if __name__ == "__main__":
    main()
