"""What each choice of LoSA and LAST is worth: results/ablations-112.jsonl.

    python scripts/ablations.py ../shared/data/vtab-mini --stores runs/stores
    python scripts/ablations.py --table

Trained on train800 and scored on val200, the last epoch: test images are never looked at. Every variant
changes one thing of the recipe as given, with AdamW's usual decay; the other side networks stand beside them.
All that read the same taps train in one fleet, batches in one order. A group of variants is written as soon
as it is done, and what stands in the file already is not trained again: seed 0 of everything comes first,
then seed 1.

`--stores` has a folder a task, as `sidetune extract --backbone demo --size 112 --out STORES/TASK` makes
them; they are only read. Branches of attention and feed-forward layers are no part of such a store: those of
the training and validation images are extracted into `--branches` when they are first asked for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_sides import HYBRIDS, build_hybrid
from numpy.typing import NDArray
from provenance import HARDWARE, git

from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
from sidetune.data.dataset import Dataset
from sidetune.extract import extract, sample_keys
from sidetune.fleet import Fleet
from sidetune.job import Job
from sidetune.probes import Pooled, fit_ridge
from sidetune.recipe import Recipe
from sidetune.runs import environment
from sidetune.side_fit import new_member, open_fleet, validate
from sidetune.sides.ridge import beyond_summary
from sidetune.sources import StoredSource
from sidetune.store import Store
from sidetune.tasks import build_task
from sidetune.train import train

TASKS = ("shapes_count", "elpv", "sprites_ori")
SEEDS = (0, 1)
GROUP = 6  # variants that train together; what is lost to a kill
OUT = Path("results/ablations-112.jsonl")
DECAY = 0.05  # AdamW's, unless a variant says another
LAYERS = range(1, 13)
TAPS = {
    "all": None,
    "attention": ("embedding", *(f"attention.{i}" for i in LAYERS), "block.12"),
    "ffn": ("embedding", *(f"ffn.{i}" for i in LAYERS), "block.12"),
}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        side: of the recipe.
        name: what is changed; empty: nothing.
        settings: the same, as ``--set`` takes it.
        taps: a key of `TAPS`.
    """

    side: str
    name: str = ""
    settings: tuple[str, ...] = ()
    taps: str = "all"

    @property
    def method(self) -> str:
        """As result lines have it."""
        return f"{self.side}, {self.name}" if self.name else self.side

    @property
    def fleet(self) -> tuple[str, str, str]:
        """Variants of one fleet share it: taps, their scale, and how models are built."""
        scale = "none" if "features.tap_scale=none" in self.settings else "rms"
        return self.taps, scale, self.method if self.method in HYBRIDS else self.side * (self.side == "ridge")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of ridge nothing is drawn."""
        return SEEDS[:1] if self.side == "ridge" else SEEDS

    def recipe(self, size: int, epochs: int, seed: int) -> Recipe:
        """All of it; seeds differ in their start and drop-path, and share the order of the batches."""
        fields = {
            "backbone": {"name": "demo", "size": size, "taps": TAPS[self.taps]},
            "side": {"name": self.side},
            "train": {"epochs": epochs, "weight_decay": DECAY, "seed": seed, "order_seed": 0},
        }
        return Recipe.build(fields, self.settings)


def _set(side: str, *settings: str) -> Variant:
    return Variant(side, ", ".join(setting.partition(".")[2] for setting in settings), settings)


def _decays(side: str, *rates: float) -> Iterator[Variant]:
    """A decay that adds up, at the usual rate and at others."""
    for given, total in itertools.product(((), *((f"train.lr={rate:g}",) for rate in rates)), (2, 6)):
        variant = _set(side, *given, f"train.total_decay={total}")
        yield replace(variant, settings=(*variant.settings, "train.weight_decay=null"))


# In the order of what is asked first; those of one architecture (rate, drop-path) stand together: one bucket.
VARIANTS = (
    Variant("losa"),
    *(_set("losa", f"train.lr={lr}") for lr in ("3e-4", "3e-3")),
    *(_set("losa", f"side.drop_path={rate}") for rate in (0.1, 0.2)),
    *_decays("losa", 3e-3),
    _set("losa", "side.mix_tokens=false"),
    Variant("last"),
    *_decays("last"),
    *(_set("last", f"train.lr={lr}") for lr in ("3e-4", "3e-3")),
    *(_set("last", f"side.drop_path={rate}") for rate in (0.1, 0.2)),
    _set("last", "side.keep_last=false"),
    Variant("fusion"),
    Variant("attentive"),
    *_decays("fusion"),
    *_decays("attentive"),
    *(_set("losa", f"side.order={order}") for order in ("token->channel", "parallel")),
    _set("losa", "side.a=0.1"),
    _set("losa", "side.first_state=zero"),
    *(_set(side, "features.tap_scale=none") for side in ("losa", "last")),
    Variant("last", "a static token mixer for its attention"),
    *(_set("losa", f"side.rank={rank}") for rank in (4, 16)),
    _set("losa", "side.every=2"),
    _set("losa", "side.pool=cls+mean"),
    _set("losa", "head.norm=trained"),
    _set("losa", "side.first_state=z_0"),
    *(_set("last", f"side.rank={rank}") for rank in (8, 32)),
    _set("last", "side.heads=4"),
    _set("last", "side.every=2"),
    _set("last", "side.pool=cls+mean"),
    _set("last", "head.norm=trained"),
    *(Variant(side, f"{taps} taps", taps=taps) for side in ("losa", "last") for taps in ("attention", "ffn")),
    Variant("losa", "attention for its token mixer"),
    Variant("ladder"),
    Variant("bypass"),
    _set("ladder", "side.keep_last=false"),
    *(_set("losa", f"side.rank={rank}") for rank in (2, 32)),
    *(_set(side, f"side.pool={pool}") for side in ("losa", "last") for pool in ("cls", "all")),
    *(_set(side, "head.norm=none") for side in ("losa", "last")),
    *(_set(side, "side.every=3") for side in ("losa", "last")),
    _set("last", "side.rank=4"),
    _set("last", "side.heads=2"),
    Variant("ridge"),
    *(_set("ridge", f"side.statistics=cls+mean{more}") for more in ("+std", "+quadrants", "+std+quadrants")),
    _set("ridge", "side.taps=last"),
)


def main() -> None:
    """Train what is missing, write its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder with a folder a task")
    parser.add_argument("--stores", type=Path, default=Path("runs/stores"))
    parser.add_argument("--branches", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--sides", default="", help="of these alone, as a,b")
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    options = parser.parse_args()
    OUT.touch()
    if options.table:
        print(table(_lines()))
        return
    if options.data is None:
        parser.error("which data? Type: python scripts/ablations.py DATA --stores STORES")
    if git("status", "--porcelain", "--untracked-files=no", "--", "src", "scripts"):
        sys.exit("the tree has changes, and a result line names a commit. Type: git commit")
    common = {
        "command": f"python scripts/ablations.py vtab-mini --epochs {options.epochs} --size {options.size}",
        "commit": git("rev-parse", "HEAD"),
        "hardware": HARDWARE,
    }
    tasks = options.tasks.split(",")
    for group, seed in _groups(tasks, [side for side in options.sides.split(",") if side], options):
        for name in tasks:
            for line in _train(name, group, seed, options):
                _append(line | common)


def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in OUT.read_text("utf-8").splitlines()]


def _append(line: dict[str, Any]) -> None:
    with OUT.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _done() -> set[tuple[str, str, str]]:
    """Method, task and recipe of what is there. A hybrid has the recipe of the side that it is made from."""
    return {(line["method"], line["task"], line["recipe"]) for line in _lines()}


def _groups(
    tasks: Sequence[str], sides: Sequence[str], options: argparse.Namespace
) -> Iterator[tuple[list[Variant], int]]:
    """Variants of one fleet that lack a line of a seed, a few at a time: all of them once, then again."""
    done = _done()
    size, epochs = options.size, options.epochs
    for seed in SEEDS:
        waiting = [
            one
            for one in VARIANTS
            if (one.side in sides or not sides) and seed in one.seeds
            if any(
                (one.method, f"{task} at {size} px", one.recipe(size, epochs, seed).hash) not in done
                for task in tasks
            )
        ]
        while waiting:
            group = [one for one in waiting if one.fleet == waiting[0].fleet][:GROUP]
            waiting = [one for one in waiting if one not in group]
            yield group, seed


def _train(
    name: str, group: Sequence[Variant], seed: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Lines of a group of variants on a task."""
    done = _done()
    task = f"{name} at {options.size} px"
    recipes = {
        one.method: one.recipe(options.size, options.epochs, seed)
        for one in group
        if (one.method, task, one.recipe(options.size, options.epochs, seed).hash) not in done
    }
    if not recipes:
        return []
    taps, scale, hybrid = group[0].fleet
    job = open_job(name, taps, scale, options)
    print(f"{task}: {', '.join(one.method for one in group)}", flush=True)
    if group[0].side == "ridge":
        return [_solve(job, task, method, recipe) for method, recipe in recipes.items()]
    members = [
        new_member(job, recipe, name=method, rows=job.split["train"]) for method, recipe in recipes.items()
    ]
    fleet = open_fleet(job, list(recipes.values()), job.split["train"])
    if hybrid in HYBRIDS:
        fleet.build = _scaled(fleet, partial(build_hybrid, hybrid, job.source.spec, job.source.final_norm))
    trained = train(fleet, members, validate=partial(_at_the_end, job, options.epochs))
    lines = []
    for method, recipe in recipes.items():
        one = trained[method]
        assert one.model is not None, f"{method} diverged"
        line = {"method": method, "task": task, "seed": seed, "metric": "val_accuracy"}
        line |= {"value": one.history[-1].val["accuracy"], "loss": one.history[-1].loss}
        line |= {"parameters": one.model.num_parameters(), "recipe": recipe.hash}
        lines.append(line | {"environment": environment(torch.device("cpu"))})
    return lines


def _solve(job: Job, task: str, method: str, recipe: Recipe) -> dict[str, Any]:
    """The line of a ridge."""
    summary = job.source.richer(beyond_summary(recipe.side))
    probe = fit_ridge(
        recipe.side, Pooled(summary, job.targets, job.split["train"], job.split["val"]), job.task
    )
    right = probe.outputs(summary, job.split["val"]).argmax(1) == job.targets[job.split["val"]]
    line = {"method": method, "task": task, "seed": 0, "metric": "val_accuracy", "recipe": recipe.hash}
    line |= {"value": right.double().mean().item(), "detail": probe.detail}
    return line | {"environment": environment(torch.device("cpu"))}


def _scaled(fleet: Fleet, build: Any) -> Any:  # noqa: ANN401 - two ways to build a model
    """Hybrids on the tap scale that the fleet's own models have."""
    own = fleet.build

    def scaled(recipes: Sequence[Recipe], num_outputs: int) -> Any:  # noqa: ANN401 - as above
        model = build(recipes, num_outputs)
        model.side.tap_scale.copy_(own(recipes, num_outputs).side.tap_scale)
        return model

    return scaled


def _at_the_end(job: Job, epochs: int, fleet: Fleet) -> dict[str, Any]:
    """Scores after the last epoch alone."""
    if fleet.epoch < epochs:
        return {}
    return validate(dict.fromkeys(fleet.names, job), fleet)  # type: ignore[return-value]


def open_job(name: str, taps: str, scale: str, options: argparse.Namespace) -> Job:
    """A task's features, splits and targets."""
    dataset, store = load_dataset(options.data / name), options.stores / name
    dataset = only(dataset, np.flatnonzero(dataset.split != "test"))
    backbone = build_backbone("demo", size=options.size, taps=TAPS[taps])
    if taps == "all":
        opened = Store.open(store)
        assert opened.plan.identity == backbone.identity, f"{store} is another backbone's"
    else:
        every = {tap for names in TAPS.values() for tap in names or ()}
        whole = build_backbone("demo", size=options.size, taps=sorted(every))
        opened = extract(dataset, whole, options.branches / name, keys=sample_keys(dataset))
    source = StoredSource(opened, sample_keys(dataset), backbone.spec)
    split = {part: dataset.rows(part) for part in ("train", "val")}
    recipe = Recipe.build({"features": {"tap_scale": scale}})
    task = build_task("classify", dataset, split["train"])
    return Job(recipe, dataset, backbone, Path(), False, source, source.summary(), split, task, 0.0)


def only(dataset: Dataset, rows: NDArray[np.int64]) -> Dataset:
    """These samples of a data set that has neither groups nor folds."""
    assert dataset.group is None and dataset.fold is None
    return replace(
        dataset,
        paths=tuple(dataset.paths[row] for row in rows),
        targets=dataset.targets[rows],
        split=dataset.split[rows],
    )


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A row a variant: accuracy in percent, mean over its seeds, and what it is apart from the side as given.

    Differences are over the seeds that both have; their mean stands where no task is missing.
    """
    value = {(line["method"], line["task"], line["seed"]): 100 * line["value"] for line in lines}
    tasks = sorted({line["task"] for line in lines})
    rows = [["side", "what is changed", *(task.partition(" ")[0] for task in tasks), "mean", "seeds"]]
    rows.append(["---"] * len(rows[0]))
    sides = list(dict.fromkeys(one.side for one in VARIANTS))
    for one in sorted(VARIANTS, key=lambda one: sides.index(one.side)):
        own = [{seed for seed in SEEDS if (one.method, task, seed) in value} for task in tasks]
        if not any(own):
            continue
        cells, apart = [], []
        for task, seeds in zip(tasks, own, strict=True):
            both = [seed for seed in seeds if (one.side, task, seed) in value]
            mean = f"{np.mean([value[one.method, task, seed] for seed in seeds]):.1f}" if seeds else "–"
            if both:
                found = [value[one.method, task, seed] - value[one.side, task, seed] for seed in both]
                apart.append(float(np.mean(found)))
            cells.append(f"{mean} ({apart[-1]:+.1f})" if both and one.name else mean)
        total = f"{np.mean(apart):+.1f}" if one.name and len(apart) == len(tasks) else ""
        count = "/".join(str(len(seeds)) for seeds in own)
        rows.append([one.side, one.name or "nothing", *cells, total, count])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
