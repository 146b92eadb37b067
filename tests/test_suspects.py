import numpy as np
import pytest

from sidetune.suspects import find_suspects
from sidetune.tasks import Classify, MultiLabel, Regress

CLASSIFY = Classify(("a", "b", "c"), (0.4, 0.3, 0.3))


def test_a_label_that_others_contradict_is_suspect():
    probabilities = np.array(
        [[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.1, 0.85, 0.05], [0.05, 0.9, 0.05], [0.02, 0.03, 0.95]]
    )
    labels = np.array([0, 1, 1, 1, 2])  # the second is an a
    [found] = find_suspects(CLASSIFY, probabilities, labels)
    assert (found.sample, found.label, found.suggested) == (1, 1, 0)
    assert (found.p_label, found.p_suggested) == (0.1, 0.8)


def test_less_than_the_classes_own_confidence_suggests_nothing():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.95, 0.05, 0.0], [0.55, 0.45, 0.0], [0.2, 0.8, 0.0]])
    labels = np.array([0, 0, 1, 1])  # the third leans to a, by far less than an a does
    assert find_suspects(CLASSIFY, probabilities, labels) == []


def test_a_class_without_samples_is_never_suggested():
    probabilities = np.array([[0.3, 0.3, 0.4], [0.3, 0.3, 0.4]])
    assert find_suspects(CLASSIFY, probabilities, np.array([0, 1])) == []


@pytest.mark.parametrize("num_wrong", [1, 10, 40])
def test_exchanged_labels_are_found_among_many(num_wrong):
    rng = np.random.default_rng(num_wrong)
    truth = rng.integers(3, size=400)
    logits = 4 * np.eye(3)[truth] + rng.normal(0, 1, (400, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = rng.choice(400, num_wrong, replace=False)
    labels = truth.copy()
    labels[wrong] = (labels[wrong] + 1) % 3
    found = find_suspects(CLASSIFY, probabilities, labels)
    hits = {one.sample for one in found} & set(wrong.tolist())
    assert len(hits) >= 0.75 * num_wrong and len(found) <= num_wrong + 8
    assert [one.doubt for one in found] == sorted((one.doubt for one in found), reverse=True)


def test_each_label_is_two_classes_and_unlabelled_entries_are_passed_over():
    task = MultiLabel(("scratch", "dent"), (0.5, 0.5))
    yes = np.array([[0.9, 0.1], [0.85, 0.9], [0.1, 0.2], [0.95, 0.9], [0.15, 0.95]])
    target = np.array([[1, 0], [1, 1], [0, np.nan], [0, 1], [0, np.nan]])
    [found] = find_suspects(task, yes, target)
    assert (found.sample, found.output, found.label, found.suggested) == (3, 0, 0, 1)
    assert found.p_suggested == 0.95


def test_a_number_far_from_what_the_others_say_is_suspect():
    rng = np.random.default_rng(0)
    truth = rng.normal(50, 10, (200, 2))
    predictions = truth + rng.normal(0, 1, (200, 2))
    targets = truth.copy()
    targets[7, 1] += 30
    targets[9, 0] = np.nan
    found = find_suspects(Regress(("x", "y"), (50.0, 50.0), (10.0, 10.0)), predictions, targets)
    assert (found[0].sample, found[0].output, found[0].label) == (7, 1, targets[7, 1])
    assert found[0].suggested == predictions[7, 1] and found[0].p_label is None
    assert len(found) <= 2
