import json

import numpy as np
import pytest
from sklearn import metrics as sk

from sidetune.errors import RequestError, SidetuneError
from sidetune.evaluate import bootstrap, calibration_error, confusion, draws, evaluate, per_class, scores
from sidetune.tasks import Classify, MultiLabel, Regress


def classify(num_samples=120, num_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(num_classes, size=num_samples)
    logits = rng.normal(size=(num_samples, num_classes))
    logits[np.arange(num_samples), targets] += 1.0
    predictions = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = tuple(f"class {k}" for k in range(num_classes))
    return Classify(names, (1 / num_classes,) * num_classes), predictions.astype(np.float32), targets


def multilabel(num_samples=90, num_labels=3, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_samples, num_labels)) < 0.4).astype(np.float32)
    noise = rng.normal(size=targets.shape)
    predictions = np.round(1 / (1 + np.exp(-(2 * targets - 1 + noise))), 2)  # rounded: ties
    targets[rng.random(targets.shape) < 0.2] = np.nan
    return MultiLabel(("a", "b", "c")[:num_labels], (0.4,) * num_labels), predictions, targets


def regress(num_samples=50, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.normal(size=(num_samples, 2)) * [1.0, 20.0] + [0.0, 100.0]).astype(np.float32)
    predictions = targets + rng.normal(size=targets.shape)
    targets[:10, 1] = np.nan
    return Regress(("u", "v"), (0.0, 100.0), (1.0, 20.0)), predictions, targets


CASES = {"classify": classify, "multilabel": multilabel, "regress": regress}


@pytest.mark.parametrize("num_classes", [2, 4])
def test_classify_scores_equal_scikit_learn(num_classes):
    task, predictions, targets = classify(num_classes=num_classes)
    wide = predictions.astype(np.float64)
    wide /= wide.sum(1, keepdims=True)
    guesses = predictions.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(targets, guesses),
        "balanced_accuracy": sk.balanced_accuracy_score(targets, guesses),
        "macro_f1": sk.f1_score(targets, guesses, average="macro"),
        "auroc": sk.roc_auc_score(targets, wide[:, 1] if num_classes == 2 else wide, multi_class="ovr"),
        "log_loss": sk.log_loss(targets, wide),
    }
    actual = scores(task, predictions, targets)
    assert set(actual) == {*expected, "calibration_error"}
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, abs=1e-6), name


def test_classes_that_a_split_lacks_are_left_out_of_the_means():
    task, predictions, targets = classify()
    keep = np.isin(targets, [0, 2])
    predictions, targets = predictions[keep], targets[keep]
    guesses = predictions.argmax(1)
    assert set(guesses) - {0, 2}  # an absent class is predicted too
    actual = scores(task, predictions, targets)
    recalls = [(guesses[targets == k] == k).mean() for k in (0, 2)]
    aurocs = [sk.roc_auc_score(targets == k, predictions[:, k]) for k in (0, 2)]
    f1s = sk.f1_score(targets, guesses, average=None, labels=[0, 2])
    assert actual["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert actual["auroc"] == pytest.approx(np.mean(aurocs))
    assert actual["macro_f1"] == pytest.approx(np.mean(f1s))
    row = per_class(task, predictions, targets)[1]
    assert row["support"] == 0 and row["recall"] is None and row["auroc"] is None


def test_the_auroc_of_a_single_class_is_none_and_so_is_its_interval():
    task, predictions, targets = classify()
    alone = targets == 1
    evaluation = evaluate(task, predictions[alone], targets[alone])
    assert evaluation.scores["auroc"] is None and evaluation.intervals["auroc"] is None
    assert evaluation.scores["balanced_accuracy"] == pytest.approx(evaluation.scores["accuracy"])


def test_multilabel_scores_equal_scikit_learn_over_the_labelled_entries():
    task, predictions, targets = multilabel()
    known = ~np.isnan(targets)
    columns = [(targets[known[:, k], k], predictions[known[:, k], k]) for k in range(3)]
    actual = scores(task, predictions, targets)
    expected = {
        "auroc": np.mean([sk.roc_auc_score(*pair) for pair in columns]),
        "macro_f1": np.mean([sk.f1_score(truth, guess > 0.5) for truth, guess in columns]),
        "mean_average_precision": np.mean([sk.average_precision_score(*pair) for pair in columns]),
        "calibration_error": slow_calibration_error(predictions[known], targets[known]),
    }
    assert actual == pytest.approx(expected)


def test_labels_without_both_values_are_left_out_of_the_means():
    task, predictions, targets = multilabel()
    targets[:, 1] = np.where(np.isnan(targets[:, 1]), np.nan, 0.0)
    targets[:, 2] = np.nan
    actual = scores(task, predictions, targets)
    row = per_class(task, predictions, targets)[0]
    assert actual["auroc"] == row["auroc"] and actual["macro_f1"] == row["f1"]
    assert actual["mean_average_precision"] == row["average_precision"]
    targets[:, :] = np.nan
    assert set(scores(task, predictions, targets).values()) == {None}
    assert set(bootstrap(task, predictions, targets, resamples=5).values()) == {None}


def test_regress_scores_are_means_over_outputs_of_their_labelled_rows():
    task, predictions, targets = regress()
    rows = per_class(task, predictions, targets)
    assert [row["support"] for row in rows] == [50, 40]
    assert rows[1]["r2"] == pytest.approx(sk.r2_score(targets[10:, 1], predictions[10:, 1]))
    assert rows[0]["mae"] == pytest.approx(sk.mean_absolute_error(targets[:, 0], predictions[:, 0]))
    actual = scores(task, predictions, targets)
    assert actual["r2"] == pytest.approx((rows[0]["r2"] + rows[1]["r2"]) / 2)
    assert actual["mae"] == pytest.approx((rows[0]["mae"] + rows[1]["mae"]) / 2)
    targets[:, 0] = 3.0
    assert per_class(task, predictions, targets)[0]["r2"] is None
    assert scores(task, predictions, targets)["r2"] == pytest.approx(rows[1]["r2"])


def slow_calibration_error(confidence, correct, bins=15):
    total = 0.0
    for b in range(bins):
        inside = [
            i
            for i, c in enumerate(confidence)
            if b / bins <= c < (b + 1) / bins or (c == 1.0 and b == bins - 1)
        ]
        if inside:
            gap = np.mean([float(correct[i]) for i in inside]) - np.mean([confidence[i] for i in inside])
            total += abs(gap) * len(inside) / len(confidence)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_the_slow_loop(bins):
    rng = np.random.default_rng(bins)
    confidence = np.append(rng.random(300), [0.0, 1.0, 1.0])
    correct = rng.random(303) < confidence**2
    expected = slow_calibration_error(confidence, correct, bins)
    assert calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_known_cases():
    assert calibration_error(np.ones(4), np.ones(4)) == 0.0
    assert calibration_error(np.ones(4), np.zeros(4)) == 1.0
    assert calibration_error(np.full(4, 0.9), np.array([1, 1, 0, 0])) == pytest.approx(0.4)
    with pytest.raises(SidetuneError, match=r"confidence has shape \(2,\) and correct \(3,\)"):
        calibration_error(np.ones(2), np.ones(3))


def test_confusion_counts_true_classes_in_rows():
    task, predictions, targets = classify(num_samples=30)
    matrix = confusion(task, predictions, targets)
    assert matrix.shape == (4, 4)
    for truth, guess in np.ndindex(4, 4):
        assert matrix[truth, guess] == ((targets == truth) & (predictions.argmax(1) == guess)).sum()
    assert confusion(*multilabel()) is None


@pytest.mark.parametrize("kind", CASES)
def test_the_bootstrap_equals_rescoring_each_resample(kind):
    task, predictions, targets = CASES[kind](num_samples=25)
    names = list(scores(task, predictions, targets))
    actual = bootstrap(task, predictions, targets, metrics=names, resamples=60, seed=5, level=0.9)
    drawn = np.concatenate(list(draws(len(targets), 60, 5)))
    assert drawn.shape == (60, len(targets))
    rescored = [scores(task, predictions[rows], targets[rows]) for rows in drawn]
    assert set(actual) == set(rescored[0])
    for name, interval in actual.items():
        values = [score[name] for score in rescored if score[name] is not None]
        expected = np.quantile(values, [0.05, 0.95])
        assert interval == pytest.approx(expected, abs=1e-9), name


def test_the_bootstrap_counts_only_resamples_in_which_a_score_is_defined():
    task, predictions, targets = classify(num_samples=6, num_classes=2)
    targets[:] = [0, 0, 0, 0, 0, 1]
    drawn = np.concatenate(list(draws(6, 50, 0)))
    values = [scores(task, predictions[rows], targets[rows])["auroc"] for rows in drawn]
    assert None in values
    expected = np.quantile([value for value in values if value is not None], [0.025, 0.975])
    assert bootstrap(task, predictions, targets, resamples=50, metrics=["auroc"])["auroc"] == pytest.approx(
        expected
    )


def test_the_bootstrap_is_seeded_and_refuses_unknown_metrics():
    case = classify()
    one, same, other = (bootstrap(*case, metrics=["accuracy"], resamples=50, seed=s) for s in (0, 0, 1))
    assert one == same != other
    with pytest.raises(RequestError, match=r"no score 'acuracy' for classify. Did you mean 'accuracy'\?"):
        bootstrap(*case, metrics=["acuracy"])
    with pytest.raises(RequestError, match=r"got 0 resamples and level 0.95"):
        bootstrap(*case, resamples=0)


@pytest.mark.parametrize("kind", CASES)
def test_an_evaluation_is_plain_json_and_complete(kind):
    task, predictions, targets = CASES[kind]()
    evaluation = evaluate(task, predictions, targets)
    plain = evaluation.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["num_samples"] == len(targets)
    assert plain["scores"] == scores(task, predictions, targets) and task.headline in plain["scores"]
    assert [row["name"] for row in plain["per_class"]] == list(task.outputs)
    for name, (low, high) in plain["intervals"].items():
        assert low < plain["scores"][name] < high, name
    assert set(plain["intervals"]) == set(plain["scores"]) - {"calibration_error"}
    if kind == "classify":
        assert sum(count for _, _, count in plain["confusion"]) == len(targets)
    assert evaluate(task, predictions, targets, intervals=False).intervals == {}


def test_bad_input_is_refused():
    task, predictions, targets = classify()
    with pytest.raises(SidetuneError, match=r"predictions have shape \(120, 3\) and targets \(120,\)"):
        scores(task, predictions[:, :3], targets)
    with pytest.raises(SidetuneError, match="the split is empty"):
        evaluate(task, predictions[:0], targets[:0])
    with pytest.raises(SidetuneError, match="rows that sum to 1"):
        scores(task, predictions * 2, targets)
    with pytest.raises(
        SidetuneError, match="targets are int64 from 0 to 4, expected class indices from 0 to 3"
    ):
        scores(task, predictions, np.where(targets == 3, 4, targets))
    predictions[7, 1] = np.nan
    with pytest.raises(SidetuneError, match="predictions of 1 of 120 samples are NaN or infinite"):
        scores(task, predictions, targets)


def test_bad_labels_are_refused():
    task, predictions, targets = multilabel()
    with pytest.raises(SidetuneError, match="other values than 0, 1 and NaN"):
        scores(task, predictions, targets * 2)
    with pytest.raises(SidetuneError, match=r"predictions lie in .* expected probabilities"):
        scores(task, predictions * 3, targets)
    task, predictions, targets = regress()
    with pytest.raises(SidetuneError, match="targets hold infinite values"):
        scores(task, predictions, np.where(targets > 0, np.inf, targets))
