"""Runs of several networks on the toy backbone: a table whose folds are given and whose labels are noisy.

Noise is what makes an ensemble better than its best member.
"""

import csv
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fitted_runs import read_csv, toy_recipe
from images import make_csv
from sidetune import Recipe, Run, fit
from sidetune.data import Dataset, load_dataset
from sidetune.predict import Predictor

FOLDS = 3
MEMBERS = "side=losa,last;seed=0,1"
SETTINGS = ("train.epochs=6", "train.lr=0.03", "train.weight_decay=0.05", "features.dtype=fp32")


def fleet_recipe(members: str | None, *settings: str, side: str = "losa", **fleet: object) -> Recipe:
    """A recipe of a fleet on the toy backbone, features in full precision."""
    fields = toy_recipe(side, "features.dtype=fp32", *settings).model_dump(mode="json")
    return Recipe.build({**fields, "fleet": {"members": members, **fleet}})


def write_table(table: Path, rows: list[dict[str, object]]) -> Path:
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


def noisy_table(folder: Path) -> Path:
    """``table.csv`` of 60 images: 12 of test, 48 in folds, two of five labels drawn anew."""
    table = make_csv(folder, "classify", 60)
    rng = np.random.default_rng(0)
    rows = []
    for i, row in enumerate(read_csv(table)):
        label = f"class{rng.integers(3)}" if rng.random() < 0.4 else row["label"]
        split = "test" if i % 5 == 0 else "val" if i % 5 == 1 else "train"
        fold = "" if split == "test" else (i // 5) % FOLDS
        rows.append({"path": row["path"], "label": label, "split": split, "fold": fold})
    return write_table(table, rows)


class Fleet:
    """A finished ensemble of two variations and three folds each, with its table.

    Args:
        root: its own folder.
    """

    def __init__(self, root: Path) -> None:
        self.table, self.store = noisy_table(root / "data"), root / "store"
        self.recipe = fleet_recipe(MEMBERS, *SETTINGS, folds="column", ensemble=True)
        self.run: Run = fit(self.table, out=root / "run", recipe=self.recipe, store=self.store, quiet=True)

    @property
    def folder(self) -> Path:
        return self.run.folder

    def members(self) -> list[dict[str, str]]:
        """Lines of members.csv."""
        return read_csv(self.folder / "members.csv")

    def dataset(self) -> Dataset:
        return load_dataset(self.table, task="classify")

    def copy(self, to: Path) -> Path:
        """A copy that a test may damage."""
        shutil.copytree(self.folder, to)
        return to


def values_of(predictor: Predictor, images: list[Path]) -> NDArray[np.float64]:
    """What a run says about images: (n, K)."""
    return np.array([list(one.values.values()) for one in predictor.predict(images)])
