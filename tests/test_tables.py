import numpy as np
import pytest

from sidetune.evaluate import evaluate
from sidetune.recipe import Recipe
from sidetune.tables import choices, print_evaluation
from sidetune.tasks import MultiLabel


def test_labels_that_do_not_count_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    predictions = np.array([[0.9, 0.2, 0.3], [0.1, 0.3, 0.4], [0.8, 0.1, 0.2]], np.float32)
    mixed = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]], np.float32)
    task = MultiLabel(("dent", "rust", "burn"), (0.4, 0.4, 0.4))
    print_evaluation(evaluate(task, predictions, mixed, intervals=False), "all")
    assert "AUROC is over" not in capsys.readouterr().out
    flat = np.array([[1, 0, np.nan], [0, 0, np.nan], [1, 0, np.nan]], np.float32)
    print_evaluation(evaluate(task, predictions, flat, intervals=False), "all")
    out = capsys.readouterr().out
    assert "AUROC is over 1 of 3 labels; these have not both yes and no here: rust, burn" in out


def test_views_are_among_the_choices_that_are_printed() -> None:
    plain, some = (Recipe.build({"features": {"views": views}}) for views in (0, 3))
    averaged = Recipe.build({"features": {"views": 3, "average_views": True}})
    assert "features stored, fp16 · device cpu" in choices(plain, "cpu")
    assert "features stored, fp16, 3 more views · device cpu" in choices(some, "cpu")
    assert "features stored, fp16, 3 more views, averaged · device cpu" in choices(averaged, "cpu")
