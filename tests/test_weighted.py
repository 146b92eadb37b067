import numpy as np
import pytest
from sklearn import metrics as sk

from sidetune.weighted import (
    WEIGHTED,
    grouped,
    weighted_auroc,
    weighted_average_precision,
    weighted_balanced_accuracy,
    weighted_macro_f1,
)


def draw(seed, num_samples=60, num_weightings=5):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, num_samples) / 12.0  # many ties
    positive = rng.random(num_samples) < 0.3
    weights = rng.random((num_samples, num_weightings)) * (rng.random((num_samples, num_weightings)) < 0.7)
    return scores, positive, weights


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_scikit_learn_under_weights_and_ties(seed):
    scores, positive, weights = draw(seed)
    expected = [sk.roc_auc_score(positive, scores, sample_weight=w) for w in weights.T]
    np.testing.assert_allclose(weighted_auroc(scores, positive, weights), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_scikit_learn_under_weights_and_ties(seed):
    scores, positive, weights = draw(seed)
    expected = [sk.average_precision_score(positive, scores, sample_weight=w) for w in weights.T]
    actual = weighted_average_precision(scores, positive, weights)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_class_means_equal_scikit_learn_under_weights():
    rng = np.random.default_rng(0)
    targets, weights = rng.integers(4, size=80), rng.integers(0, 4, (80, 6)).astype(np.float64)
    predictions = rng.dirichlet(np.ones(4), 80)
    guesses = predictions.argmax(1)
    balanced = [sk.balanced_accuracy_score(targets, guesses, sample_weight=w) for w in weights.T]
    f1 = [sk.f1_score(targets, guesses, average="macro", sample_weight=w) for w in weights.T]
    np.testing.assert_allclose(weighted_balanced_accuracy(predictions, targets, weights), balanced)
    np.testing.assert_allclose(weighted_macro_f1(predictions, targets, weights), f1)


def test_what_a_weighting_leaves_undefined_is_nan():
    scores, positive = np.array([0.1, 0.4, 0.8]), np.array([False, True, True])
    weights = np.array([[1.0, 0.0], [1.0, 2.0], [0.0, 1.0]])  # the second has no negative
    np.testing.assert_array_equal(weighted_auroc(scores, positive, weights), [1.0, np.nan])
    r2 = WEIGHTED["regress"]["r2"]
    targets = np.array([[1.0], [3.0], [3.0]])
    assert np.isnan(r2(targets + 0.5, targets, weights)[1])


def test_grouped_sums_the_rows_of_each_group_and_leaves_empty_groups_zero():
    sums = grouped(np.array([2, 0, 2]), np.array([[1.0], [2.0], [4.0]]), 4)
    np.testing.assert_array_equal(sums, [[2.0], [0.0], [5.0], [0.0]])
