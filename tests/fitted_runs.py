"""Runs on the toy backbone, each fitted once a session, for tests that only read them."""

import csv
import shutil
from pathlib import Path

import torch
from torch import nn

from sidetune import Recipe, Run, fit, wrap
from sidetune.backbones.wrap import WrappedBackbone
from sidetune.data.preprocess import Preprocess

EPOCHS = 2


def toy_recipe(side: str = "losa", *settings: str) -> Recipe:
    """Two epochs of a side on the toy backbone, and settings as --set takes them."""
    fields = {"backbone": {"name": "toy"}, "side": {"name": side}, "train": {"epochs": EPOCHS}}
    return Recipe.build(fields, settings)


class FittedRuns:
    """``runs("losa")`` is a finished run; the second time it is the same one."""

    def __init__(self, root: Path, images: Path) -> None:
        self.root, self.images = root, images
        self._made: dict[str, Run] = {}

    def __call__(self, side: str = "losa", *, dtype: str = "fp16", mode: str = "stored") -> Run:
        name = f"{side}-{mode}-{dtype}"
        if name not in self._made:
            recipe = toy_recipe(side, f"features.mode={mode}", f"features.dtype={dtype}")
            store = None if mode == "live" else self.root / f"store-{dtype}"
            out = self.root / name
            self._made[name] = fit(self.images, out=out, recipe=recipe, store=store, quiet=True)
        return self._made[name]

    def copy(self, to: Path, side: str = "losa") -> Path:
        """A copy that a test may damage."""
        shutil.copytree(self(side).folder, to)
        return to


def conv_net(seed: int = 0) -> nn.Module:
    """Two stages of different width and grid, with running statistics that training must not touch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)),
        )


def wrapped_conv_net(seed: int = 0) -> WrappedBackbone:
    """The net as a user's own backbone, its maps as the taps of two blocks."""
    return wrap(conv_net(seed), {"block.1": "0", "block.2": "1"}, preprocess=Preprocess(size=32))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, hidden ones too."""
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}
