import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidetune.ensemble import pooled
from sidetune.errors import RequestError, SidetuneError
from sidetune.selection import EPSILON, MARGIN, select_greedily
from sidetune.tasks import Classify, MultiLabel, Regress, Task

CLASSIFY = Classify(("a", "b", "c"), (0.4, 0.3, 0.3))
MULTILABEL = MultiLabel(("a", "b", "c"), (0.5, 0.5, 0.5))
REGRESS = Regress(("a", "b", "c"), (0.0, 5.0, -1.0), (1.0, 3.0, 0.5))
TASKS = {task.kind: task for task in (CLASSIFY, MULTILABEL, REGRESS)}


def drawn(kind: str, members: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(members, samples, 3))
    if kind == "classify":
        targets = rng.integers(0, 3, samples)
        values += rng.uniform(0, 2, (members, 1, 1)) * np.eye(3)[targets]
        return np.exp(values) / np.exp(values).sum(-1, keepdims=True), targets
    truth = rng.integers(0, 2, (samples, 3)) if kind == "multilabel" else rng.normal(size=(samples, 3)) * 2
    targets = truth.astype(np.float32)
    targets[rng.random((samples, 3)) < 0.2] = np.nan
    if kind == "multilabel":
        return 1 / (1 + np.exp(-values - rng.uniform(0, 2, (members, 1, 1)) * (2 * truth - 1))), targets
    return truth + values, targets


def loss(task: Task, prediction: np.ndarray, targets: np.ndarray) -> float:
    """The mean loss of one prediction (n, K), sample by sample."""
    if task.kind == "classify":
        return float(np.mean([-np.log(max(p[t], EPSILON)) for p, t in zip(prediction, targets, strict=True)]))
    means = []
    for p, t in zip(prediction, targets.astype(np.float64), strict=True):
        known = ~np.isnan(t)
        if isinstance(task, Regress):
            terms = ((p - t) / np.array(task.std))[known] ** 2
        else:
            terms = -np.log(np.maximum(np.where(t > 0.5, p, 1 - p)[known], EPSILON))
        if len(terms):
            means.append(terms.mean())
    return float(np.mean(means))


def together(task: Task, predictions: np.ndarray) -> np.ndarray:
    """What these members answer, each as often as it stands there."""
    parts = [torch.from_numpy(np.asarray(one, np.float64)) for one in predictions]
    return pooled(task, parts, [1 / len(parts)] * len(parts)).numpy()


def brute(task: Task, predictions: np.ndarray, targets: np.ndarray, most: int) -> np.ndarray:
    path: list[tuple[float, list[int]]] = []
    chosen: list[int] = []
    for _ in range(most):
        losses = [
            loss(task, together(task, predictions[[*chosen, m]]), targets) for m in range(len(predictions))
        ]
        chosen = [*chosen, int(np.argmin(losses))]
        path.append((min(losses), chosen))
    least = min(value for value, _ in path)
    kept = next(members for value, members in path if value <= least * (1 + MARGIN))
    return np.bincount(kept, minlength=len(predictions))


def value(task: Task, predictions: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> float:
    return loss(task, together(task, np.repeat(predictions, counts, 0)), targets)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.integers(1, 8), st.integers(4, 30), st.integers(0, 10**6))
def test_it_is_what_trying_every_member_at_every_step_gives(
    kind: str, members: int, samples: int, seed: int
) -> None:
    predictions, targets = drawn(kind, members, samples, seed)
    task = TASKS[kind]
    counts = select_greedily(predictions, targets, task, most=8)
    assert counts.dtype == np.int64 and counts.tolist() == brute(task, predictions, targets, 8).tolist()
    assert 1 <= counts.sum() <= 8
    best = min(loss(task, prediction, targets) for prediction in predictions)
    assert value(task, predictions, targets, counts) <= best * (1 + 1e-9)


@pytest.mark.parametrize("kind", TASKS)
def test_members_that_err_in_different_places_are_taken_together(kind: str) -> None:
    predictions, targets = drawn(kind, 3, 60, 0)
    right = predictions.copy()
    if kind == "classify":
        right[:] = 0.9 * np.eye(3)[targets] + 0.1 / 3
    else:
        right[:] = np.nan_to_num(targets) * 0.8 + 0.1
    wrong = np.roll(right, 1, axis=-1) if kind == "classify" else 1 - right
    half = np.arange(60) % 2 == 0
    pair = np.stack([wrong[0], np.where(half[:, None], right[0], wrong[0])])
    pair = np.concatenate([pair, np.where(half[:, None], wrong[0], right[0])[None]])
    counts = select_greedily(pair, targets, TASKS[kind])
    assert counts[0] == 0 and counts[1] > 0 and counts[2] > 0
    assert kind == "regress" or counts.tolist() == [0, 1, 1]


@pytest.mark.parametrize("kind", TASKS)
def test_one_alone_is_kept_where_it_is_best_and_of_equal_ones_the_first(kind: str) -> None:
    predictions, targets = drawn(kind, 5, 40, 1)
    if kind == "classify":
        predictions[3] = 0.97 * np.eye(3)[targets] + 0.01
    else:
        predictions[3] = np.nan_to_num(targets) * (0.98 if kind == "multilabel" else 1)
    assert select_greedily(predictions, targets, TASKS[kind]).tolist() == [0, 0, 0, 1, 0]
    twice = np.concatenate([predictions, predictions])
    assert select_greedily(twice, targets, TASKS[kind]).tolist() == [0, 0, 0, 1] + [0] * 6


def test_a_member_that_harms_at_half_and_helps_at_a_tenth_is_found() -> None:
    targets = np.zeros((200, 1), np.float32)
    errors = np.random.default_rng(0).normal(size=(2, 200, 1)) * np.array([1.0, 2.0])[:, None, None]
    task = Regress(("x",), (0.0,), (1.0,))
    counts = select_greedily(errors, targets, task)
    assert counts[0] > 2 * counts[1] > 0
    assert value(task, errors, targets, counts) < value(task, errors, targets, np.array([1, 0]))
    assert value(task, errors, targets, np.array([1, 1])) > value(task, errors, targets, np.array([1, 0]))


def test_impossible_predictions_cost_much_and_not_infinitely() -> None:
    certain = np.array([[[1.0, 0, 0], [1, 0, 0]], [[0.5, 0.5, 0], [0.5, 0.5, 0]]])
    assert select_greedily(certain, np.array([0, 1]), CLASSIFY).tolist() == [0, 1]
    assert select_greedily(certain[:1], np.array([0, 1]), CLASSIFY).tolist() == [1]


def test_single_precision_is_read_and_most_bounds_the_size() -> None:
    predictions, targets = drawn("classify", 30, 300, 5)
    assert select_greedily(predictions.astype(np.float32), targets, CLASSIFY, most=1).sum() == 1
    counts = select_greedily(predictions.astype(np.float32), targets, CLASSIFY, most=6)
    assert counts.tolist() == select_greedily(predictions, targets, CLASSIFY, most=6).tolist()


@pytest.mark.parametrize(
    ("kind", "shape", "targets", "text"),
    [
        ("classify", (2, 4, 2), np.zeros(4, int), r"shape \(2, 4, 2\) and targets \(4,\), .*\(M, 4, 3\)"),
        ("regress", (2, 4, 3), np.zeros(4), r"targets \(4,\), expected .* and \(4, 3\)"),
        ("classify", (0, 4, 3), np.zeros(4, int), "got 0 members and 4 samples"),
        ("classify", (1, 2, 3), np.array([0, -1]), "from -1 to 0, expected class indices from 0 to 2"),
        ("multilabel", (1, 2, 3), np.full((2, 3), np.nan), "no sample has a label"),
    ],
)
def test_what_does_not_fit(kind: str, shape: tuple, targets: np.ndarray, text: str) -> None:
    with pytest.raises(SidetuneError, match=text):
        select_greedily(np.full(shape, 0.3), targets, TASKS[kind])


def test_a_member_that_diverged_is_named() -> None:
    predictions, targets = drawn("regress", 3, 5, 0)
    predictions[1, 2, 0] = np.nan
    with pytest.raises(SidetuneError, match="predictions of member 1 are NaN or infinite"):
        select_greedily(predictions, targets, REGRESS)
    with pytest.raises(RequestError, match="at most 0 members"):
        select_greedily(predictions[:1], targets, REGRESS, most=0)
