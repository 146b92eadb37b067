"""Adapt a frozen vision foundation model in minutes, on the machine you have.

run = sidetune.fit("photos/", out="runs/first")
sidetune.load("runs/first").predict(["new.jpg"])
"""

from sidetune.artifact import Artifact
from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone
from sidetune.backbones.wrap import wrap
from sidetune.column_predict import ColumnsPredictor, load_columns_run
from sidetune.columns import ColumnsRun
from sidetune.data import Dataset, Preprocess, load_dataset
from sidetune.errors import SidetuneError
from sidetune.evaluate import Evaluation, evaluate
from sidetune.extract import extract
from sidetune.features import Features, Spec, Tap
from sidetune.fit import fit, fit_columns
from sidetune.predict import Prediction, Predictor, load
from sidetune.recipe import Recipe
from sidetune.runs import Run
from sidetune.sides import SIDES
from sidetune.store import Store
from sidetune.sweep import sweep

__all__ = [
    "SIDES",
    "Artifact",
    "Backbone",
    "ColumnsPredictor",
    "ColumnsRun",
    "Dataset",
    "Evaluation",
    "Features",
    "Prediction",
    "Predictor",
    "Preprocess",
    "Recipe",
    "Run",
    "SidetuneError",
    "Spec",
    "Store",
    "Tap",
    "build_backbone",
    "evaluate",
    "extract",
    "fit",
    "fit_columns",
    "load",
    "load_columns_run",
    "load_dataset",
    "sweep",
    "wrap",
]
