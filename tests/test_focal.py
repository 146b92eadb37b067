import numpy as np
import pytest
import torch

from sidetune.calibration import fit_temperature
from sidetune.keyed import generator
from sidetune.tasks import Classify, MultiLabel

CLASSIFY = Classify(("a", "b", "c"), (0.4, 0.3, 0.3), class_weights=(2.0, 1.0, 0.5))
MULTILABEL = MultiLabel(("a", "b", "c"), (0.5, 0.5, 0.5), (1.0, 2.0, 1.0), (0.5, 1.0, 3.0))
CLASSES = torch.tensor([0, 1, 2, 2, 1])
LABELS = torch.tensor([[1.0, 0, 1], [0, 0, torch.nan], [1, 1, 0], [0, 1, 1], [torch.nan, 0, 0]])
GAMMAS = (0.3, 1.0, 2.0, 5.0)


def outputs(scale: float = 2.0) -> torch.Tensor:
    drawn = torch.randn(2, 5, 3, generator=generator(0, "focal"), dtype=torch.float64)
    return (scale * drawn).requires_grad_()


def with_focus(task: Classify | MultiLabel, gamma: float, smoothing: float) -> Classify | MultiLabel:
    fields = {**task.to_json(), "focal_gamma": gamma, "label_smoothing": smoothing}
    fields.pop("kind")
    return type(task)(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def classify_oracle(output: np.ndarray, gamma: float, smoothing: float) -> np.ndarray:
    """Entry by entry: (1 - p_t)^gamma times the cross-entropy of the smoothed target times the weight."""
    loss = np.zeros(output.shape[:2])
    for m, b in np.ndindex(*loss.shape):
        p = np.exp(output[m, b]) / np.exp(output[m, b]).sum()
        t = int(CLASSES[b])
        smoothed = (1 - smoothing) * np.eye(3)[t] + smoothing / 3
        loss[m, b] = CLASSIFY.class_weights[t] * (1 - p[t]) ** gamma * -(smoothed * np.log(p)).sum()
    return loss


def multilabel_oracle(output: np.ndarray, gamma: float, smoothing: float) -> np.ndarray:
    loss = np.zeros(output.shape[:2])
    for m, b in np.ndindex(*loss.shape):
        terms = []
        for k in range(3):
            y = float(LABELS[b, k])
            if np.isnan(y):
                continue
            p = 1 / (1 + np.exp(-output[m, b, k]))
            p_t = p if y == 1 else 1 - p
            s = (1 - smoothing) * y + smoothing / 2
            weight = (MULTILABEL.positive_weights if y == 1 else MULTILABEL.negative_weights)[k]
            terms.append(weight * (1 - p_t) ** gamma * -(s * np.log(p) + (1 - s) * np.log(1 - p)))
        loss[m, b] = np.mean(terms)
    return loss


CASES = [(CLASSIFY, CLASSES, classify_oracle), (MULTILABEL, LABELS, multilabel_oracle)]


@pytest.mark.parametrize(("task", "target", "oracle"), CASES, ids=["classify", "multilabel"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_loss_and_gradient_are_those_of_the_equation(task, target, oracle, smoothing, gamma) -> None:
    focused, output = with_focus(task, gamma, smoothing), outputs()
    expected = oracle(output.detach().numpy(), gamma, smoothing)
    np.testing.assert_allclose(focused.loss(output, target).detach().numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda one: focused.loss(one, target), (output,))


@pytest.mark.parametrize(("task", "target", "_"), CASES, ids=["classify", "multilabel"])
def test_gamma_zero_is_the_plain_loss_to_the_bit_and_its_limit(task, target, _) -> None:
    output = outputs()
    plain = with_focus(task, 0.0, 0.1).loss(output, target)
    assert torch.equal(plain, type(task)(*_fields(task), label_smoothing=0.1).loss(output, target))
    near = with_focus(task, 1e-12, 0.1).loss(output, target)
    torch.testing.assert_close(near, plain, rtol=1e-9, atol=0)


def _fields(task: Classify | MultiLabel) -> tuple:
    if isinstance(task, Classify):
        return task.outputs, task.shares, task.class_weights
    return task.outputs, task.shares, task.negative_weights, task.positive_weights


@pytest.mark.parametrize(("task", "target", "_"), CASES, ids=["classify", "multilabel"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_certain_outputs_have_a_finite_loss_and_gradient(task, target, _, gamma) -> None:
    """In float32 a probability past 1 - 6e-8 is 1: (1 - p)^0.3 would have no gradient there."""
    right = target.nan_to_num(0.0)
    sure = torch.nn.functional.one_hot(right, 3).float() if task is CLASSIFY else right
    for sign in (-1.0, 1.0):
        output = (sign * 300 * (2 * sure - 1))[None].requires_grad_()
        loss = with_focus(task, gamma, 0.0).loss(output, target)
        (gradient,) = torch.autograd.grad(loss.sum(), output)
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert (loss < 1e-6).all() if sign > 0 else (loss > 1).all()


def test_focus_does_not_bend_calibrated_probabilities() -> None:
    keyed = generator(0, "calibrated")
    logits = 2 * torch.randn(500, 3, generator=keyed)
    target = torch.multinomial(logits.softmax(-1), 1, generator=keyed)[:, 0]
    plain = fit_temperature(with_focus(CLASSIFY, 0.0, 0.0), logits, target)
    assert fit_temperature(with_focus(CLASSIFY, 2.0, 0.0), logits, target) == plain
    labels = torch.bernoulli(logits.sigmoid(), generator=keyed)
    plain = fit_temperature(with_focus(MULTILABEL, 0.0, 0.0), logits, labels)
    assert fit_temperature(with_focus(MULTILABEL, 2.0, 0.0), logits, labels) == plain
