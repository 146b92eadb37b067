"""Whether side networks gain from time on real clips: results/clips.jsonl.

    python scripts/clip_results.py ../shared/data/fights/clips.csv --out runs/clips

Every clip is answered for by the network of its fold, which did not train on it; folds are the data's own
column. Ridge on means over frames is the probe that single frames allow. Each side network trains twice: on
clips as they are, and on the same whose frames are in an order drawn for each clip and sampling, also where
they are scored: what it gains over that is what order is worth. Intervals are of clips and seeds, paired.

Outputs are kept under --out, so that what is there already is not trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from provenance import HARDWARE, git

from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
from sidetune.data.folds import given_folds
from sidetune.extract import extract, sample_keys
from sidetune.features import Features, Spec
from sidetune.fleet_fit import fit_fleets
from sidetune.job import Job, Work
from sidetune.keyed import generator
from sidetune.paired import middle, seeds_difference
from sidetune.probes import Pooled, fit_ridge
from sidetune.recipe import Recipe
from sidetune.runs import environment
from sidetune.sides.ridge import RidgeRecipe
from sidetune.sources import StoredSource
from sidetune.tasks import build_task

SIDES = ("attentive", "losa", "last")
SHUFFLED = ", frames shuffled"
OUT = Path("results/clips.jsonl")
Right = NDArray[np.float64]  # (seeds, clips): 1 where a clip's own network is right


def main() -> None:
    """Train what is missing, write the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="CSV of clips with a column of folds")
    parser.add_argument("--out", type=Path, default=Path("runs/clips"))
    parser.add_argument("--into", type=Path, default=OUT)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if git("status", "--porcelain", "--untracked-files=no"):
        sys.exit("the tree has changes, and a result line names a commit. Type: git commit")
    options.out.mkdir(parents=True, exist_ok=True)
    job, fold_n = open_job(options)
    ridge = recipe_of(options, "losa").model_copy(update={"side": RidgeRecipe()})
    found: dict[str, tuple[str, Right]] = {"ridge": (ridge.hash, of_ridge(job, fold_n))}
    commits: dict[str, str] = {}
    content = digest_of(job, fold_n)
    for side in filter(None, options.sides.split(",")):
        for shuffled in (False, True):
            recipe = recipe_of(options, side)
            name = f"{side}{SHUFFLED}" if shuffled else side
            kept = options.out / f"{recipe.hash[:12]}-{content[:12]}{'-shuffled' if shuffled else ''}.npz"
            if not kept.exists():
                right_SN = of_side(job, recipe, options.out / kept.stem, shuffled=shuffled)
                np.savez(kept, right=right_SN, commit=git("rev-parse", "HEAD"))
            found[name] = recipe.hash, np.load(kept)["right"]
            commits[name] = str(np.load(kept)["commit"])
    lines = [*result_lines(options, found, commits)]
    others = options.into.read_text("utf-8").splitlines() if options.into.exists() else []
    fresh = {_place(line) for line in lines}
    kept_lines = [one for one in others if _place(json.loads(one)) not in fresh]
    options.into.write_text("\n".join([*kept_lines, *map(json.dumps, lines)]) + "\n", encoding="utf-8")
    for line in lines:
        if "interval" in line:
            low, high = (f"{100 * bound:+.1f}" for bound in line["interval"])
            print(f"{line['method']}: {100 * line['value']:+.1f} ({low} .. {high})")
        else:
            print(f"{line['method']}, seed {line['seed']}: {100 * line['value']:.1f}")


def _place(line: dict[str, Any]) -> tuple[str, ...]:
    """What a line is of: another of the same replaces it."""
    return line["task"], line["backbone"], line["method"], str(line["seed"])


def digest_of(job: Job, fold_n: NDArray[np.int64]) -> str:
    """Of all that outputs depend on beside the recipe: backbone, clips, their labels and folds."""
    targets = job.dataset.targets[job.split["train"]]
    truth = [f"{target} {fold}" for target, fold in zip(targets, fold_n, strict=True)]
    about = "|".join([job.backbone.identity.digest, *sample_keys(job.dataset), *truth])
    return hashlib.sha256(about.encode()).hexdigest()


def recipe_of(options: argparse.Namespace, side: str) -> Recipe:
    """Of all seeds and folds of a side network."""
    seeds = ",".join(map(str, range(options.seeds)))
    return Recipe.build(
        {
            "backbone": {"name": options.backbone, "size": options.size},
            "clips": {"frames": options.frames, "stored": 2 * options.frames},
            "side": {"name": side},
            "train": {"epochs": options.epochs, "order_seed": 0},
            "fleet": {"members": f"seed={seeds}", "folds": "column"},
        }
    )


def open_job(options: argparse.Namespace) -> tuple[Job, NDArray[np.int64]]:
    """All clips, stored; and the fold of each that can be read."""
    recipe = recipe_of(options, "losa")
    dataset = load_dataset(options.data, clips=True, val_fraction=0.0, test_fraction=0.0)
    backbone, keys = build_backbone(options.backbone, size=options.size), sample_keys(dataset)
    reading = recipe.reading(backbone.frames)
    store = extract(dataset, backbone, options.out / "store", keys=keys, views=reading.stored)
    source = StoredSource(store, keys, reading=reading)
    rows = np.flatnonzero(source.valid)
    nothing = np.empty(0, np.int64)
    split = {"train": rows, "val": nothing, "test": nothing}
    task = build_task("classify", dataset, rows)
    summary = source.summary()
    job = Job(recipe, dataset, backbone, options.out, False, source, summary, split, task, 0.0)
    return job, given_folds(dataset, rows)


def of_ridge(job: Job, fold_n: NDArray[np.int64]) -> Right:
    """Ridge on means over frames, solved on the other folds."""
    rows, right = job.split["train"], np.zeros(len(job.dataset))
    for fold in np.unique(fold_n):
        held, seen = rows[fold_n == fold], rows[fold_n != fold]
        data = Pooled(job.summary, job.targets, seen, held, job.dataset.group)
        probe = fit_ridge(RidgeRecipe(), data, job.task)
        answers = probe.outputs(job.summary, held).argmax(1).numpy()
        right[held] = answers == job.dataset.targets[held]
    return right[rows][None]


def of_side(job: Job, recipe: Recipe, out: Path, *, shuffled: bool) -> Right:
    """Each clip by the network that did not see it, a row a seed."""
    source = job.source
    assert isinstance(source, StoredSource)
    if shuffled:
        source = ShuffledFrames(source.store, sample_keys(job.dataset), reading=source.reading)
    out.mkdir(exist_ok=True)  # of this output alone: a checkpoint does not say what data it is of
    own = replace(job, recipe=recipe, source=source)
    fleet = fit_fleets(Work((own,), recipe, out))[0].fleet
    assert fleet is not None
    by_seed = {one.variation.recipe.train.seed: one.predictions for one in fleet.ranked}
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    targets = job.dataset.targets[job.split["train"]]
    return np.stack([by_seed[seed].argmax(1).numpy() == targets for seed in sorted(by_seed)]).astype(
        np.float64
    )


class ShuffledFrames(StoredSource):
    """The frames of each clip and sampling in an order of their own."""

    def features(
        self, rows: Sequence[int], spec: Spec | None = None, views: Sequence[int] | int = 0
    ) -> Features:
        """See `Source.features`."""
        found = super().features(rows, spec, views)
        chosen = [views] * len(rows) if isinstance(views, int) else views
        frames = self.reading.together
        orders = torch.stack(
            [
                torch.randperm(frames, generator=generator(0, f"shuffle/{row}/{view}"))
                for row, view in zip(rows, chosen, strict=True)
            ]
        )
        at = torch.arange(len(orders))[:, None]
        layers = (layer.unflatten(1, (frames, -1))[at, orders].flatten(1, 2) for layer in found.layers)
        return Features(tuple(layers), found.spec)


def result_lines(
    options: argparse.Namespace, found: dict[str, tuple[str, Right]], commits: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Accuracy of each method and seed, then what each side network gains."""
    shared = {
        "metric": "out_of_fold_accuracy",
        "task": f"{options.data.parent.name} at {options.size} px, {options.frames} frames",
        "backbone": options.backbone,
        "command": f"python scripts/clip_results.py {'/'.join(options.data.parts[-2:])} "
        f"--sides {options.sides} --backbone {options.backbone} --size {options.size} "
        f"--frames {options.frames} --epochs {options.epochs} --seeds {options.seeds}",
        "commit": git("rev-parse", "HEAD"),
        "hardware": HARDWARE,
        "environment": environment(torch.device("cpu")),
    }
    for name, (recipe, right_SN) in found.items():
        for seed, right in enumerate(right_SN):
            known = None if name == "ridge" else seed
            line = {"method": name, "seed": known, "value": float(right.mean()), "recipe": recipe, **shared}
            yield {**line, "commit": commits.get(name, shared["commit"])}
    for name, (recipe, right_SN) in found.items():
        for other in ("ridge", f"{name}{SHUFFLED}"):
            if name != other and not name.endswith(SHUFFLED) and other in found:
                value, resampled = seeds_difference(right_SN, found[other][1])
                line = {"method": f"{name} - {other}", "seed": f"0 to {len(right_SN) - 1}", "value": value}
                line |= {"interval": middle(resampled), "recipe": recipe, **shared}
                yield {**line, "commit": commits[name]}


if __name__ == "__main__":
    main()
