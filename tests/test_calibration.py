import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sidetune.calibration import answered, calibration_curve, calibration_error, fit_temperature
from sidetune.errors import SidetuneError
from sidetune.keyed import generator
from sidetune.tasks import Classify, MultiLabel, Regress

CLASSIFY = Classify(("a", "b", "c"), (0.4, 0.3, 0.3))


def drawn(n: int, sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs whose softmax is true once they are divided by `sharpness`."""
    keyed = generator(0, "outputs")
    logits = 2 * torch.randn(n, 3, generator=keyed)
    target = torch.multinomial(logits.softmax(-1), 1, generator=keyed)[:, 0]
    return logits * sharpness, target


@pytest.mark.parametrize("sharpness", [0.25, 1.0, 4.0])
def test_the_temperature_is_the_one_that_the_outputs_were_sharpened_by(sharpness: float) -> None:
    output, target = drawn(20_000, sharpness)
    assert fit_temperature(CLASSIFY, output, target) == pytest.approx(sharpness, rel=0.03)


def test_without_prior_it_is_the_minimum_of_the_log_loss() -> None:
    output, target = drawn(300, 3.0)

    def loss(log_t: np.ndarray) -> float:
        return torch.nn.functional.cross_entropy(output.double() / np.exp(log_t[0]), target).item()

    oracle = float(np.exp(minimize(loss, [0.0], tol=1e-10).x[0]))
    assert fit_temperature(CLASSIFY, output, target, prior_std=None) == pytest.approx(oracle, rel=1e-3)


def test_a_dozen_images_that_are_all_right_do_not_make_certainties() -> None:
    target = torch.arange(12) % 3
    output = 2 * torch.nn.functional.one_hot(target, 3).float()
    assert fit_temperature(CLASSIFY, output, target, prior_std=None) < 0.1
    assert 0.4 < fit_temperature(CLASSIFY, output, target) < 1.0


def test_class_weights_and_smoothing_do_not_bend_probabilities() -> None:
    output, target = drawn(2_000, 2.0)
    bent = Classify(CLASSIFY.outputs, CLASSIFY.shares, (3.0, 0.5, 0.5), 0.3)
    assert fit_temperature(bent, output, target) == fit_temperature(CLASSIFY, output, target)


def test_labels_share_one_temperature_and_unlabelled_entries_do_not_count() -> None:
    keyed = generator(0, "labels")
    logits = 2 * torch.randn(20_000, 2, generator=keyed)
    target = torch.bernoulli(logits.sigmoid(), generator=keyed)
    target[::3, 1] = torch.nan
    task = MultiLabel(("a", "b"), (0.5, 0.5), positive_weights=(2.0, 2.0), negative_weights=(1.0, 1.0))
    assert fit_temperature(task, 3 * logits, target) == pytest.approx(3.0, rel=0.03)


def test_a_regression_and_an_empty_split_have_none() -> None:
    assert fit_temperature(Regress(("x",), (0.0,), (1.0,)), torch.ones(4, 1), torch.ones(4, 1)) == 1.0
    assert fit_temperature(CLASSIFY, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 1.0


def test_the_curve_is_what_the_error_sums_over() -> None:
    rng = np.random.default_rng(0)
    confidence = np.append(rng.uniform(0.3, 1, 200), 1.0)
    correct = rng.uniform(size=201) < confidence**2
    curve = calibration_curve(confidence, correct)
    assert sum(row["count"] for row in curve) == 201
    assert all(row["low"] <= row["confidence"] <= row["high"] and row["count"] for row in curve)
    total = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in curve) / 201
    assert total == pytest.approx(calibration_error(confidence, correct))


def test_what_is_left_where_answers_are_withheld() -> None:
    rows = answered(np.array([0.55, 0.65, 0.85, 0.97]), np.array([0, 1, 1, 1]))
    found = {row["threshold"]: (row["share"], row["accuracy"]) for row in rows}
    assert found[0.5] == (1.0, 0.75) and found[0.6] == (0.75, 1.0)
    assert found[0.95] == (0.25, 1.0) and found[0.99] == (0.0, None)


def test_confidence_and_correct_must_belong_together() -> None:
    with pytest.raises(SidetuneError, match=r"confidence has shape \(2,\) and correct \(3,\), expected one"):
        calibration_curve(np.zeros(2), np.zeros(3))
