import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from sidetune.data.dataset import Dataset
from sidetune.errors import ArtifactError, DataError, RecipeError
from sidetune.tasks import Classify, MultiLabel, Regress, Task, build_task

CLASSES = np.array([0, 0, 0, 0, 1, 1, 2, 2], np.int64)
LABELS = np.array([[0, 1], [0, 0], [1, np.nan], [0, 1], [np.nan, np.nan], [1, 1]], np.float32)
NUMBERS = np.array([[1, 10], [2, np.nan], [4, 40], [np.nan, np.nan], [5, 20], [0, 30]], np.float32)
TARGETS = {"classify": CLASSES, "multilabel": LABELS, "regress": NUMBERS}


def make_dataset(kind, targets=None):
    targets = TARGETS[kind] if targets is None else targets
    num_outputs = int(targets.max()) + 1 if kind == "classify" else targets.shape[1]
    return Dataset(
        root=Path(),
        paths=tuple(Path(f"{i}.png") for i in range(len(targets))),
        task=kind,
        targets=targets,
        outputs=tuple(f"output {k}" for k in range(num_outputs)),
        split=np.array(["train"] * len(targets)),
    )


def make_task(kind, targets=None, rows=None, **options):
    dataset = make_dataset(kind, targets)
    return build_task(kind, dataset, np.arange(len(dataset)) if rows is None else rows, **options)


def random_output(task, num_samples, dtype=torch.float64, members=2):
    draw = torch.Generator().manual_seed(3)
    shape = (members, num_samples, task.num_outputs)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()


def test_a_task_names_its_outputs_and_its_headline():
    tasks = [make_task(kind) for kind in TARGETS]
    assert [task.kind for task in tasks] == ["classify", "multilabel", "regress"]
    assert [task.headline for task in tasks] == ["balanced_accuracy", "auroc", "r2"]
    assert [task.num_outputs for task in tasks] == [3, 2, 2]
    assert [type(task) for task in tasks] == [Classify, MultiLabel, Regress]
    with pytest.raises(TypeError, match="abstract"):
        Task()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classify_loss_equals_torch_in_values_and_gradients(smoothing):
    task = make_task("classify", label_smoothing=smoothing)
    output, target = random_output(task, len(CLASSES)), torch.from_numpy(CLASSES)
    loss = task.loss(output, target)
    expected = torch.stack(
        [functional.cross_entropy(o, target, reduction="none", label_smoothing=smoothing) for o in output]
    )
    assert loss.shape == (2, len(CLASSES)) and loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    mine, theirs = (torch.autograd.grad(value.sum(), output)[0] for value in (loss, expected))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_balanced_class_weights_come_from_the_training_rows_and_average_to_one():
    rows = np.array([0, 1, 2, 4, 5, 6])  # 3, 2, 1 samples of the classes
    task = make_task("classify", rows=rows, class_weights="balanced")
    assert task.class_weights == pytest.approx((6 / 9, 6 / 6, 6 / 3))
    assert task.shares == pytest.approx((1 / 2, 1 / 3, 1 / 6))
    weights = np.array(task.class_weights)[CLASSES[rows]]
    assert weights.mean() == pytest.approx(1.0)
    output, target = random_output(task, len(CLASSES)), torch.from_numpy(CLASSES)
    weight = torch.tensor(task.class_weights, dtype=torch.float64)
    expected = torch.stack([functional.cross_entropy(o, target, weight, reduction="none") for o in output])
    torch.testing.assert_close(task.loss(output, target), expected, rtol=0, atol=1e-12)


def test_a_class_without_training_samples_keeps_weight_one():
    task = make_task("classify", rows=np.array([0, 1, 4]), class_weights="balanced")
    assert task.class_weights == pytest.approx((0.75, 1.5, 1.0))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_multilabel_loss_equals_torch_over_the_labelled_entries(smoothing, class_weights):
    task = make_task("multilabel", label_smoothing=smoothing, class_weights=class_weights)
    output, target = random_output(task, len(LABELS)), torch.from_numpy(LABELS)
    loss = task.loss(output, target)
    weights = {0.0: task.negative_weights or (1, 1), 1.0: task.positive_weights or (1, 1)}
    for m, b in np.ndindex(*loss.shape):
        terms = [
            weights[float(LABELS[b, k])][k]
            * functional.binary_cross_entropy_with_logits(
                output[m, b, k].detach(),
                torch.tensor((1 - smoothing) * float(LABELS[b, k]) + smoothing / 2, dtype=torch.float64),
            )
            for k in range(2)
            if not np.isnan(LABELS[b, k])
        ]
        expected = float(sum(terms)) / max(len(terms), 1)
        assert loss[m, b].item() == pytest.approx(expected, abs=1e-12)


def test_balanced_multilabel_weights_give_both_values_the_same_sum():
    task = make_task("multilabel", class_weights="balanced")
    assert task.shares == pytest.approx((2 / 5, 3 / 4))
    assert task.negative_weights == pytest.approx((5 / 6, 4 / 2))
    assert task.positive_weights == pytest.approx((5 / 4, 4 / 6))


def test_regress_loss_equals_mse_on_standardised_targets():
    task = make_task("regress", rows=np.array([0, 1, 2, 4]))
    assert task.mean == pytest.approx((3.0, 70 / 3))
    assert task.std == pytest.approx((np.std([1, 2, 4, 5]), np.std([10, 40, 20])))
    target = torch.from_numpy(NUMBERS[[0, 2, 4]])
    output = random_output(task, 3)
    standardised = (target.double() - torch.tensor(task.mean)) / torch.tensor(task.std, dtype=torch.float64)
    expected = functional.mse_loss(output, standardised.expand_as(output), reduction="none").mean(-1)
    torch.testing.assert_close(task.loss(output, target), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["multilabel", "regress"])
def test_unlabelled_entries_give_no_loss_and_no_gradient(kind):
    task = make_task(kind)
    target = torch.from_numpy(TARGETS[kind])
    output = random_output(task, len(target))
    loss = task.loss(output, target)
    empty = target.isnan().all(1)
    assert empty.any() and (loss[:, empty] == 0).all() and (loss[:, ~empty] > 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    missing = target.isnan().expand_as(gradient)
    assert (gradient[missing] == 0).all() and (gradient[~missing] != 0).all()


@pytest.mark.parametrize("kind", TARGETS)
def test_sixteen_bit_outputs_are_widened_and_float64_stays(kind):
    task = make_task(kind)
    target = torch.from_numpy(TARGETS[kind])
    narrow = random_output(task, len(target), torch.bfloat16)
    assert task.loss(narrow, target).dtype == torch.float32
    assert task.predictions(narrow).dtype == torch.float32
    torch.testing.assert_close(task.loss(narrow, target), task.loss(narrow.float(), target))
    assert task.predictions(narrow.double()).dtype == torch.float64


def test_predictions_are_probabilities_or_the_targets_units():
    output = random_output(make_task("classify"), 4)
    torch.testing.assert_close(make_task("classify").predictions(output), output.softmax(-1))
    output = output[..., :2]
    torch.testing.assert_close(make_task("multilabel").predictions(output), output.sigmoid())
    task = make_task("regress")
    expected = output * torch.tensor(task.std) + torch.tensor(task.mean)
    torch.testing.assert_close(task.predictions(output), expected, rtol=1e-6, atol=1e-6)


def test_centred_targets_have_mean_zero_over_the_labelled_training_rows():
    for kind, targets in TARGETS.items():
        target = torch.from_numpy(targets)
        task = make_task(kind)
        centred = task.centred_targets(target)
        assert centred.shape == (len(targets), task.num_outputs) and centred.dtype == torch.float64
        torch.testing.assert_close(centred.sum(0), torch.zeros(task.num_outputs, dtype=torch.float64))
        assert task.target_mean.dtype == torch.float64
        if kind != "classify":
            assert (centred[target.isnan()] == 0).all()


def test_centred_targets_plus_their_mean_are_the_coded_targets():
    coded = {kind: make_task(kind) for kind in TARGETS}
    coded = {
        kind: task.centred_targets(torch.from_numpy(TARGETS[kind])) + task.target_mean
        for kind, task in coded.items()
    }
    torch.testing.assert_close(
        coded["classify"], functional.one_hot(torch.from_numpy(CLASSES)).to(torch.float64)
    )
    labelled = ~np.isnan(LABELS)
    np.testing.assert_allclose(coded["multilabel"].numpy()[labelled], LABELS[labelled] - 0.5, atol=1e-12)
    predicted = make_task("regress").predictions(coded["regress"]).numpy()
    labelled = ~np.isnan(NUMBERS)
    np.testing.assert_allclose(predicted[labelled], NUMBERS[labelled], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("classify", {"class_weights": "balanced", "label_smoothing": 0.1}),
        ("classify", {}),
        ("multilabel", {"class_weights": "balanced"}),
        ("multilabel", {"label_smoothing": 0.1}),
        ("classify", {"focal_gamma": 2.0}),
        ("multilabel", {"focal_gamma": 0.5, "label_smoothing": 0.1}),
        ("regress", {}),
    ],
)
def test_json_restores_the_task_exactly(kind, options):
    task = make_task(kind, **options)
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_json_from_before_there_was_focus_is_read_and_written_as_it_was():
    for kind in ("classify", "multilabel"):
        fields = make_task(kind).to_json()
        assert "focal_gamma" not in fields
        assert Task.from_json(fields) == make_task(kind)
        assert make_task(kind, focal_gamma=2.0).to_json()["focal_gamma"] == 2.0


def test_damaged_json_is_refused():
    with pytest.raises(ArtifactError, match=r"kind is 'classfy'. Did you mean 'classify'\?"):
        Task.from_json({"kind": "classfy"})
    with pytest.raises(ArtifactError, match=r"expected \['kind', 'mean', 'outputs', 'std'\]"):
        Task.from_json({"kind": "regress", "outputs": ["a"]})


def test_wrong_requests_say_what_to_type():
    with pytest.raises(DataError, match=r"targets are for classify, not regress. Type: --task classify"):
        build_task("regress", make_dataset("classify"), np.arange(3))
    with pytest.raises(DataError, match="no training samples"):
        make_task("classify", rows=np.arange(0))
    with pytest.raises(RecipeError, match=r"'balance'. Did you mean 'balanced'\?"):
        make_task("classify", class_weights="balance")
    with pytest.raises(RecipeError, match=r"label_smoothing is 1.0, expected 0 or more and below 1"):
        make_task("classify", label_smoothing=1.0)
    with pytest.raises(RecipeError, match="a regression has no classes"):
        make_task("regress", class_weights="balanced")
    with pytest.raises(RecipeError, match=r"focal_gamma=2\.0: a regression has no classes"):
        make_task("regress", focal_gamma=2.0)
    for gamma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match=f"focal_gamma is {gamma}, expected 0 or more"):
            make_task("classify", focal_gamma=gamma)


def test_outputs_that_cannot_be_learnt_are_named():
    with pytest.raises(DataError, match=r"\['output 1'\] have no labelled training sample"):
        make_task("multilabel", rows=np.array([2, 4]), targets=LABELS)
    constant = np.array([[1, 7], [2, 7], [3, np.nan]], np.float32)
    with pytest.raises(DataError, match=r"\['output 1'\] have one single value"):
        make_task("regress", targets=constant)
