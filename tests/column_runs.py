"""A table with two label columns, and runs on it."""

import csv
from pathlib import Path

import numpy as np

from images import draw_shape
from sidetune import ColumnsRun, Recipe, Run, fit, fit_columns

NAMES = ("colour", "a/b side")


def write_table(root: Path, *, sparse: bool, split: bool = True) -> Path:
    """36 images; the colour of a shape, and the side on which it stands, unknown of some where `sparse`."""
    rng = np.random.default_rng(3)
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(36):
        right = bool(i // 3 % 2)
        name = f"images/{i:02d}.png"
        draw_shape(i % 3, 3, rng, size=32, centre=(0.7 if right else 0.3, 0.5)).save(root / name)
        part = ("train", "train", "val", "test")[i // 6 % 4]
        side = "" if sparse and i % 5 == 4 else ("left", "right")[right]
        rows.append([name, ("red", "green", "blue")[i % 3], side, *([part] if split else [])])
    with (root / "table.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["path", *NAMES, *(["split"] if split else [])], *rows])
    return root / "table.csv"


def recipe(*settings: str, labels: tuple[str, ...] = NAMES, **parts: dict) -> Recipe:
    fields = {
        "backbone": {"name": "toy"},
        "data": {"labels": labels},
        "train": {"epochs": 3, "batch_size": 8, "lr": 1e-2},
        **parts,
    }
    return Recipe.build(fields, settings)


class Columns:
    """Tables, and the runs on them, each made when first asked for. Read only."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.table = write_table(root / "full", sparse=False)
        self.sparse = write_table(root / "sparse", sparse=True)
        self.drawn = write_table(root / "drawn", sparse=True, split=False)

    def fit(self, name: str, table: Path, asked: Recipe) -> ColumnsRun:
        store = self.root / "stores" / table.parent.name
        return fit_columns(table, out=self.root / name, recipe=asked, store=store, quiet=True)

    def alone(self, name: str, table: Path, asked: Recipe) -> Run:
        store = self.root / "stores" / table.parent.name
        return fit(table, out=self.root / name, recipe=asked, store=store, quiet=True)
