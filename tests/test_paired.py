import numpy as np
import pytest

from sidetune.evaluate import bootstrap, scores
from sidetune.paired import paired_difference
from sidetune.tasks import Classify, Regress


def probabilities(rng, targets, strength):
    logits = rng.normal(size=(len(targets), 3))
    logits[np.arange(len(targets)), targets] += strength
    exp = np.exp(logits)
    return exp / exp.sum(1, keepdims=True)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    targets = np.arange(150) % 3
    task = Classify(("a", "b", "c"), (1 / 3, 1 / 3, 1 / 3))
    return task, targets, probabilities(rng, targets, 2.0), probabilities(rng, targets, 0.5)


def test_the_difference_is_that_of_the_headline_scores(case):
    task, targets, ours, theirs = case
    found = paired_difference(task, ours, theirs, targets)
    first, second = (scores(task, one, targets)["balanced_accuracy"] for one in (ours, theirs))
    assert found.metric == "balanced_accuracy"
    assert found.value == pytest.approx(first - second)
    low, high = found.interval
    assert 0 < low < found.value < high


def test_the_other_way_round_it_is_the_same_mirrored(case):
    task, targets, ours, theirs = case
    there = paired_difference(task, ours, theirs, targets)
    back = paired_difference(task, theirs, ours, targets)
    assert back.value == pytest.approx(-there.value)
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))


def test_a_method_is_level_with_itself(case):
    task, targets, ours, _ = case
    found = paired_difference(task, ours, ours, targets)
    assert (found.value, found.interval) == (0.0, (0.0, 0.0))


def test_pairing_makes_the_interval_of_two_alike_narrower_than_their_own(case):
    task, targets, ours, _ = case
    nearly = ours.copy()
    nearly[:5] = nearly[:5, [1, 2, 0]]
    low, high = paired_difference(task, ours, nearly, targets).interval
    own = bootstrap(task, ours, targets)["balanced_accuracy"]
    assert high - low < own[1] - own[0]


def test_an_undefined_score_has_no_difference():
    task = Regress(("x",), (0.0,), (1.0,))
    found = paired_difference(task, np.zeros((4, 1)), np.ones((4, 1)), np.ones((4, 1)))
    assert found.to_json() == {"metric": "r2", "value": None, "interval": None}
