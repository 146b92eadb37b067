"""``sidetune demo``: DINOv2-S on real solar-cell photographs, features once, then four sides.

Each stage is one ``sidetune`` command in its own process, so that time and peak memory are its own.
What a finished stage wrote is found again: an interrupted demo resumes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sidetune.backbones import build_backbone
from sidetune.errors import MissingExtraError, SidetuneError
from sidetune.files import csv_text, write_json, write_text
from sidetune.recipe import Recipe
from sidetune.recipes.demo import SIDES, demo

BLOCK = 64  # neighbouring cells come from one module: whole blocks of cells go to one split
SPLIT_OF_BLOCK = ("train", "train", "val", "test", "test")  # block number mod 5
MAX_TRAIN = 1_000
SETTINGS = ("epochs", "lr", "weight_decay", "seed")  # of training, that the demo's recipes have of their own


def run_demo(out: Path) -> dict[str, Any]:
    """Run the demo and write OUT/summary.json.

    Args:
        out: the demo's folder: the data table, the feature store, a run folder a side.

    Returns:
        ``{"rows": [{side, seed, parameters, val_balanced_accuracy, test_accuracy, ..}]}``.

    Raises:
        MissingExtraError: the demo's packages are not installed.
        SidetuneError: a stage failed.
    """
    table = out / "elpv.csv"
    write_text(table, elpv_table())
    build_backbone("demo")  # says at once what is missing, before anything is decoded
    store = out / "store"
    _sidetune("extract", str(table), "--backbone", "demo", "--size", "224", "--out", str(store))
    rows = []
    for side in SIDES:
        recipe = demo(side)
        run = out / side
        settings = [f"train.{name}={getattr(recipe.train, name)}" for name in SETTINGS]
        plain = {"backbone": {"name": "demo", "size": 224}, "side": {"name": side}}
        assert Recipe.build(plain, settings) == recipe, f"{side}: the command below is not its recipe"
        _sidetune(
            *("fit", str(table), "--backbone", "demo", "--size", "224", "--side", side),
            *("--store", str(store), "--out", str(run)),
            *(word for setting in settings for word in ("--set", setting)),
        )
        rows.append(_summary_row(run, recipe.train.seed))
    summary = {"rows": rows}
    write_json(out / "summary.json", summary)
    _print(rows, out)
    return summary


def elpv_table() -> str:
    """A CSV (path, label, split, group) of the installed ELPV photographs.

    Two classes: a likelihood of defect above one half is ``defective``. Splits are by blocks of 64
    consecutive cells; at most 1,000 training images, evenly spaced. A group is a block.

    Raises:
        MissingExtraError: elpv-dataset is not installed.
    """
    try:
        package = distribution("elpv-dataset")
    except PackageNotFoundError:
        raise MissingExtraError("elpv-dataset", "pip install 'sidetune[demo]'") from None
    labels = Path(str(package.locate_file("elpv_dataset/data/labels.csv")))
    cells = [line.split() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
    blocks = np.arange(len(cells)) // BLOCK
    splits = np.array(SPLIT_OF_BLOCK)[blocks % len(SPLIT_OF_BLOCK)]
    train = np.flatnonzero(splits == "train")
    kept = train[np.linspace(0, len(train) - 1, min(MAX_TRAIN, len(train))).round().astype(int)]
    rows = sorted([*kept, *np.flatnonzero(splits != "train")])
    table = [["path", "label", "split", "group"]]
    for row in rows:
        name, likelihood, _ = cells[row]
        label = "defective" if float(likelihood) > 0.5 else "functional"
        table.append([str(labels.parent / name), label, splits[row], f"block {blocks[row]}"])
    return csv_text(table)


def _sidetune(*arguments: str) -> None:
    print("$ sidetune", *arguments, file=sys.stderr, flush=True)  # noqa: T201
    done = subprocess.run(
        [sys.executable, "-m", "sidetune", *arguments], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise SidetuneError(
            f"sidetune {arguments[0]} ended with {done.returncode}, expected 0: its own message stands "
            "above. Type: sidetune demo, which resumes, or sidetune demo --out NEW"
        )


def _summary_row(run: Path, seed: int) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    own = metrics["rows"][-1]
    scores = {
        f"{split}_{name}": value for split in ("val", "test") for name, value in own[split]["scores"].items()
    }
    intervals = {f"test_{name}_interval": pair for name, pair in own["test"]["intervals"].items()}
    return {
        "side": metrics["side"],
        "seed": seed,
        "parameters": own["parameters"],
        **scores,
        **intervals,
        "train_seconds": own["seconds"],
        "features_seconds": metrics["cost"]["seconds"]["features"],
        "peak_memory_bytes": own["peak_memory_bytes"],
    }


def _print(rows: list[dict[str, Any]], out: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("side")
    for column in (
        "parameters",
        "val\nbal.",
        "test\nacc.",
        "test\nbal.",
        "test\nAUROC",
        "train\ns",
        "peak\nMiB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["side"],
            f"{row['parameters']:,}",
            _percent(row["val_balanced_accuracy"]),
            *(
                f"{_percent(row[f'test_{name}'])}\n{_range(row[f'test_{name}_interval'])}"
                for name in ("accuracy", "balanced_accuracy", "auroc")
            ),
            f"{row['train_seconds']:.0f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
        )
    Console().print(table)
    for row in rows:
        print(out / row["side"] / "report.html")  # noqa: T201


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _range(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f}..{100 * pair[1]:.1f}"
