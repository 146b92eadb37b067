"""The linear probe is solved to the end: against scikit-learn, and by its own gradient."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sidetune.errors import DivergedError
from sidetune.keyed import generator
from sidetune.sides import linear
from sidetune.sides.linear import GRADIENT_TOLERANCE, Coordinates, solve_linear
from sidetune.tasks import Classify, Task


def make_problem(num_classes: int) -> tuple[torch.Tensor, torch.Tensor, Task]:
    keyed = generator(0, "linear")
    target = torch.arange(60) % num_classes
    centres = torch.randn(num_classes, 5, generator=keyed)
    x = centres[target] + torch.randn(60, 5, generator=keyed)
    names = tuple(f"class{k}" for k in range(num_classes))
    return x, target, Classify(names, tuple([1 / num_classes] * num_classes))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_equals_scikit_learn(num_classes: int) -> None:
    x, target, task = make_problem(num_classes)
    l2 = 0.05
    found = solve_linear(Coordinates(x), target, task, l2)
    assert found.gradient <= 10 * GRADIENT_TOLERANCE
    standardised = (x - x.mean(0)) / x.std(0, unbiased=False)
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000)
    reference.fit(standardised.double().numpy(), target.numpy())
    logits = x.double() @ found.weight + found.bias
    expected = reference.predict_proba(standardised.double().numpy())
    if num_classes == 2:  # its one row of weights is the difference of our two, with half the penalty
        reference.set_params(C=2 / (l2 * len(x))).fit(standardised.double().numpy(), target.numpy())
        expected = reference.predict_proba(standardised.double().numpy())
    np.testing.assert_allclose(logits.softmax(-1).numpy(), expected, atol=2e-5)


def test_a_start_from_another_penalty_changes_nothing_but_time() -> None:
    x, target, task = make_problem(3)
    cold = solve_linear(Coordinates(x), target, task, 1e-3)
    warm = solve_linear(
        Coordinates(x), target, task, 1e-3, start=solve_linear(Coordinates(x), target, task, 1e-2)
    )
    np.testing.assert_allclose(warm.weight.numpy(), cold.weight.numpy(), atol=1e-3)


def test_an_unfinished_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target, task = make_problem(3)
    monkeypatch.setattr(linear, "MAX_ITERATIONS", 2)
    with pytest.raises(DivergedError, match=r"gradient is .* after 2 L-BFGS iterations, expected at most"):
        solve_linear(Coordinates(x), target, task, 1e-3)
