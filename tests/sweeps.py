"""Small sweeps on the toy backbone, and what must be equal of two of them."""

import json
from pathlib import Path

from fitted_runs import toy_recipe
from sidetune import Run, sweep
from sidetune.files import sha256_file

TRIALS, EPOCHS = 6, 4
SETTINGS = {"trials": TRIALS, "folds": 2, "places": 3, "quiet": True}


def small_sweep(images: Path, folder: Path, name: str = "sweep", recipe=None, **changed) -> Run:
    """A sweep of six trials of two folds, three at a time, over four epochs; a second."""
    recipe = toy_recipe("losa", f"train.epochs={EPOCHS}") if recipe is None else recipe
    asked = {key: value for key, value in (SETTINGS | changed).items() if value is not None}
    return sweep(images, out=folder / name, recipe=recipe, store=folder / "store", **asked)


def sweep_words(images: Path, folder: Path, name: str = "sweep", trials: int = TRIALS) -> list[object]:
    """The same as a command."""
    words = ["sweep", images, "--backbone", "toy", "--store", folder / "store", "--out", folder / name]
    return [*words, "--trials", trials, "--folds", 2, "--places", 3, "--epochs", EPOCHS]


def result(folder: Path) -> dict[str, object]:
    """What a sweep decided and made, without what took how long."""
    found = json.loads((folder / "sweep.json").read_text())
    found.pop("cost")
    names = ("trials.csv", "predictions.csv", "side.safetensors")
    return {**found, **{name: sha256_file(folder / name) for name in names}}
