"""Golden values: a change of numbers must be meant. ``SIDETUNE_GOLDEN=write pytest tests/test_golden.py``
writes them anew; the commit says why.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracts.test_sides import ROWS, draw_all, make_features, make_model
from sidetune.bucket import Member
from sidetune.features import Features
from sidetune.fleet import Fleet, TrainingSet
from sidetune.keyed import generator
from sidetune.recipe import Recipe
from sidetune.recipes.demo import SIDES, demo
from sidetune.tasks import Classify
from sidetune.train import train

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str, found: Any) -> Any:
    """What stands in golden/NAME.json; written first when asked for."""
    path = GOLDEN / f"{name}.json"
    if os.environ.get("SIDETUNE_GOLDEN") == "write":
        path.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(path.read_text())


def test_outputs_of_every_side() -> None:
    found = {
        name: draw_all(make_model(name))(make_features(batch=2).to("cpu"))[0].detach().tolist()
        for name, row in ROWS.items()
        if row.side != "ridge"  # its features are not drawn: it has no parameters
    }
    expected = golden("sides", found)
    assert found.keys() == expected.keys()
    for name, outputs in found.items():
        np.testing.assert_allclose(outputs, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ["losa", "last", "attentive", "ladder", "bypass", "fusion"])
def test_a_ten_step_loss_curve(name: str) -> None:
    target = torch.arange(24) % 3
    keyed = generator(0, "golden")
    shift = torch.randn(3, 12, generator=keyed, dtype=torch.float64)[target][:, None]
    features = make_features(batch=24)
    shifted = Features(tuple(layer + shift for layer in features.layers), features.spec)
    task, rows = Classify(("a", "b", "c"), (1 / 3, 1 / 3, 1 / 3)), np.arange(24)
    member = Member(
        name,
        Recipe.build({"train": {"epochs": 10, "batch_size": 24, "lr": 1e-2, "weight_decay": 0.05}}),
        task,
        target,
        rows,
    )
    data = TrainingSet(
        lambda rows, spec, draws: shifted.select(spec.names).rows(torch.tensor(rows)),
        lambda rows, spec, view: iter(()),
        rows,
        shifted.spec,
    )
    fleet = Fleet(data, lambda recipes, num_outputs: make_model(name), 3)
    trained = train(fleet, [member], validate=lambda _: {}, quiet=True)[name]
    found = [epoch.loss for epoch in trained.history]
    assert found[-1] < 0.8 * found[0]
    np.testing.assert_allclose(found, golden(f"loss-{name}", found), rtol=1e-7)


@pytest.mark.parametrize("side", SIDES)
def test_resolved_text_of_the_demo_recipe(side: str) -> None:
    recipe = demo(side)
    found = {"recipe": recipe.model_dump(mode="json"), "hash": recipe.hash}
    assert found == golden(f"recipe-demo-{side}", found)
