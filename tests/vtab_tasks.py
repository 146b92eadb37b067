"""Tiny tasks in VTAB's layout, for tests of what compares methods."""

import json
from pathlib import Path

import numpy as np

from images import draw_shape

COUNTS = {"train800": 18, "val200": 9, "test": 24}


def make_task(root: Path, *, group: str = "Natural", classes: int = 3, seed: int = 0, names=None) -> Path:
    """A folder of learnable images with its four lists and an ``info.json``."""
    rng = np.random.default_rng(seed)
    lists = {}
    for part, count in COUNTS.items():
        folder = "test" if part == "test" else "train800val200"
        (root / "images" / folder).mkdir(parents=True, exist_ok=True)
        lists[part] = [f"images/{folder}/{part}{i:04d}.png {i % classes}" for i in range(count)]
        for i, line in enumerate(lists[part]):
            draw_shape(i % classes, classes, rng).save(root / line.split()[0])
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for part, lines in lists.items():
        write_list(root, part, lines)
    names = [f"class{k}" for k in range(classes)] if names is None else names
    (root / "info.json").write_text(json.dumps({"classes": names, "group": group}))
    return root


def write_list(root: Path, part: str, lines: list[str]) -> None:
    """One of the lists."""
    (root / f"{part}.txt").write_text("".join(f"{line}\n" for line in lines))


def read_list(root: Path, part: str) -> list[str]:
    """The lines of a list."""
    return (root / f"{part}.txt").read_text().splitlines()


def make_suite(root: Path) -> Path:
    """Two tasks of two groups."""
    for seed, (name, group) in enumerate({"colours": "Natural", "shapes": "Structured"}.items()):
        make_task(root / name, group=group, seed=seed)
    return root
