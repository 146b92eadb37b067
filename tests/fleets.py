"""A tiny fleet: forty samples of random taps, and what every test of the loop needs around it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sidetune.artifact import build_model
from sidetune.bucket import Member
from sidetune.checkpoint import Scores
from sidetune.features import Features, Spec, Tap
from sidetune.fleet import Fleet, TrainingSet
from sidetune.keyed import Draws, generator
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.tasks import Classify
from sidetune.train import Trained, train

SPEC = Spec(
    (
        Tap("embedding", "embedding", 6, (1, 2, 2)),
        *(Tap(f"block.{i}", "block", 6, (1, 2, 2)) for i in (1, 2, 3)),
    )
)
TASK = Classify(("a", "b"), (0.5, 0.5))
TARGETS = torch.arange(40) % 2


def make_layers() -> list[torch.Tensor]:
    keyed = generator(0, "layers")
    return [torch.randn(40, 4, 6, generator=keyed) + TARGETS[:, None, None] * 0.5 for _ in SPEC.taps]


LAYERS = make_layers()


def inputs(rows: Sequence[int], spec: Spec, draws: Draws) -> Features:
    every = Features(tuple(layer[list(rows)] for layer in LAYERS), SPEC)
    return every.select(spec.names)


def in_order(rows: NDArray[np.int64], spec: Spec, view: int) -> Iterator[Features]:
    yield inputs(rows.tolist(), spec, Draws([0]))


DATA = TrainingSet(inputs, in_order, np.arange(30), SPEC)


def recipe_of(side: str = "losa", drop_path: float = 0.0, **train: object) -> Recipe:
    return Recipe.build({"side": {"name": side, "rank": 2, "drop_path": drop_path}, "train": train})


def build(recipes: Sequence[Recipe], num_outputs: int) -> SideModel:
    rates = [recipe.side.drop_path for recipe in recipes]  # type: ignore[union-attr]
    return build_model(recipes[0], SPEC, num_outputs, None, drop_paths=rates)


def member(recipe: Recipe, name: str = "one", **more: object) -> Member:
    fields = {"task": TASK, "targets": TARGETS, "rows": DATA.rows, **more}
    return Member(name, recipe, **fields)  # type: ignore[arg-type]


def no_scores(fleet: Fleet) -> dict[str, Scores]:
    return {name: {"balanced_accuracy": 0.5} for name in fleet.names}


def run(recipe: Recipe, data: TrainingSet = DATA, **more: object) -> Trained:
    """One member, alone."""
    return run_all([member(recipe)], data, **more)["one"]


def run_all(members: Sequence[Member], data: TrainingSet = DATA, **more: object) -> dict[str, Trained]:
    arguments = {"validate": no_scores, "quiet": True, **more}
    return train(Fleet(data, build, 2), members, **arguments)  # type: ignore[arg-type]


def weights(trained: Trained) -> list[torch.Tensor]:
    assert trained.model is not None
    return list(trained.model.parameters())
