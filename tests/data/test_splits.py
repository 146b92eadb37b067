from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidetune.data import Carving, Dataset, stratified_split
from sidetune.data.splits import carve
from sidetune.errors import DataError

FRACTIONS = st.floats(0.05, 0.9)
SEEDS = st.integers(0, 2**32)


def dataset_of(targets: np.ndarray, group: np.ndarray | None = None) -> Dataset:
    return Dataset(
        root=Path("data"),
        paths=tuple(Path(f"{i:05d}.png") for i in range(len(targets))),
        task="classify" if targets.ndim == 1 else "regress",
        targets=targets,
        outputs=tuple("abcdefghijklmnop"[: targets.max() + 1 if targets.ndim == 1 else targets.shape[1]]),
        split=np.full(len(targets), "train"),
        group=group,
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=120), FRACTIONS, SEEDS)
def test_each_class_gives_its_share(labels: list[int], fraction: float, seed: int) -> None:
    targets = np.array(labels)
    counts = np.bincount(targets)
    if counts.max() < 2:
        with pytest.raises(DataError, match="no split of"):
            stratified_split(targets, fraction=fraction, seed=seed)
        return
    drawn = stratified_split(targets, fraction=fraction, seed=seed)
    for label, count in enumerate(counts):
        taken = int(drawn[targets == label].sum())
        assert abs(taken - fraction * count) < 1 or taken in (1, count - 1)
        assert taken == 0 if count == 1 else count == 0 or 0 < taken < count
    assert np.array_equal(drawn, stratified_split(targets, fraction=fraction, seed=seed))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=4, max_size=150),
    FRACTIONS,
    SEEDS,
)
def test_no_group_straddles(samples: list[tuple[int, int]], fraction: float, seed: int) -> None:
    targets = np.array([label for label, _ in samples])
    groups = np.array([f"g{group}" for _, group in samples])
    try:
        drawn = stratified_split(targets, fraction=fraction, seed=seed, groups=groups)
    except DataError:
        # Allowed only where each group holds the last samples of some class.
        for group in np.unique(groups):
            assert set(targets[groups != group]) != set(targets)
        return
    assert not set(groups[drawn]) & set(groups[~drawn])
    assert set(targets[~drawn]) == set(targets)
    assert drawn.any()
    order = np.random.default_rng(seed).permutation(len(targets))
    again = stratified_split(targets[order], fraction=fraction, seed=seed, groups=groups[order])
    assert np.array_equal(again, drawn[order])


@settings(max_examples=100, deadline=None)
@given(st.floats(0.1, 0.5), SEEDS, st.integers(0, 1000))
def test_groups_reach_the_fraction_and_the_classes(fraction: float, seed: int, data_seed: int) -> None:
    rng = np.random.default_rng(data_seed)
    group = rng.integers(0, 60, 600)
    targets = rng.integers(0, 3, 600)
    largest = np.bincount(group).max()
    drawn = stratified_split(targets, fraction=fraction, seed=seed, groups=group.astype(str))
    assert -largest <= drawn.sum() - fraction * 600 <= largest / 2
    for label in range(3):
        assert abs(drawn[targets == label].mean() - fraction) < 0.15


def test_another_seed_is_another_split() -> None:
    targets = np.arange(100) % 5
    groups = np.array([f"g{i // 4}" for i in range(100)])
    for chosen in (None, groups):
        splits = {
            stratified_split(targets, fraction=0.3, seed=seed, groups=chosen).tobytes() for seed in range(8)
        }
        assert len(splits) == 8


def test_groups_larger_than_the_share_give_the_smallest_error() -> None:
    groups = np.array(["a"] * 50 + ["b"] * 50)
    drawn = stratified_split(np.arange(100) % 2, fraction=0.1, seed=0, groups=groups)
    assert drawn.sum() == 50


def test_regression_is_stratified_by_deciles_of_the_first_column() -> None:
    rng = np.random.default_rng(0)
    targets = rng.lognormal(size=(400, 2)).astype(np.float32)
    targets[:20, 0] = np.nan
    drawn = stratified_split(targets, fraction=0.2, seed=3)
    assert drawn.sum() == 80
    assert drawn[:20].sum() == 4
    known = targets[20:, 0]
    tenth = known > np.quantile(known, 0.9)
    assert drawn[20:][tenth].sum() in (7, 8)


def test_constant_and_unknown_numbers_are_split_too() -> None:
    for value in (3.5, np.nan):
        targets = np.full((40, 1), value, dtype=np.float32)
        assert stratified_split(targets, fraction=0.25, seed=0).sum() == 10


def test_multilabel_keeps_rare_labels_on_both_sides() -> None:
    rng = np.random.default_rng(1)
    targets = (rng.random((300, 4)) < (0.5, 0.3, 0.1, 0.02)).astype(np.float32)
    for seed in range(5):
        drawn = stratified_split(targets, fraction=0.3, seed=seed)
        assert abs(drawn.sum() - 90) <= 5
        assert (targets[drawn].sum(0) > 0).all()
        assert (targets[~drawn].sum(0) > 0).all()
        assert abs(targets[drawn, 2].mean() - targets[:, 2].mean()) < 0.04


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="expected more than 0 and less than 1"):
        stratified_split(np.array([0, 1, 0, 1]), fraction=fraction, seed=0)


def test_carving_fractions_are_of_all_training_samples() -> None:
    dataset = carve(dataset_of(np.arange(200) % 4), missing=["val", "test"], carving=Carving(0.1, 0.3))
    assert [len(dataset.rows(split)) for split in ("train", "val", "test")] == [120, 20, 60]
    assert dataset.carved == ("test", "val")
    for split, count in (("train", 30), ("val", 5), ("test", 15)):
        assert np.bincount(dataset.targets[dataset.rows(split)]).tolist() == [count] * 4


def test_carving_none_leaves_all_in_train() -> None:
    dataset = dataset_of(np.array([0, 1]))
    assert carve(dataset, missing=[], carving=Carving()).carved == ()
    assert len(carve(dataset, missing=["val"], carving=Carving(val=0)).rows("train")) == 2


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (["val", "test"], r"class 'b' has 1 image; each class needs at least 3 \(train, val, test\)"),
        (["val"], r"class 'b' has 1 image; each class needs at least 2 \(train, val\)"),
    ],
)
def test_a_class_too_small_to_carve(missing: list, text: str) -> None:
    with pytest.raises(DataError, match=text):
        carve(dataset_of(np.array([0] * 9 + [1])), missing=missing, carving=Carving())


def test_several_classes_too_small_are_counted() -> None:
    with pytest.raises(DataError, match=r"class 'a' has 2 images; .* \(2 more classes have too few\)"):
        carve(dataset_of(np.array([0, 0, 1, 2])), missing=["val", "test"], carving=Carving())


def test_too_few_groups_and_too_few_samples() -> None:
    groups = np.array(["x", "y"] * 10)
    with pytest.raises(DataError, match="got 2 groups; expected at least 3, one each for train, val, test"):
        carve(dataset_of(np.arange(20) % 2, groups), missing=["val", "test"], carving=Carving())
    with pytest.raises(DataError, match="got 2 training samples; expected at least 3"):
        carve(dataset_of(np.zeros((2, 1), np.float32)), missing=["val", "test"], carving=Carving())
    pure = np.array(["x", "y"] * 10)
    with pytest.raises(DataError, match=r"no split of 2 groups leaves every class in train.*in more groups"):
        carve(dataset_of(np.arange(20) % 2, pure), missing=["val"], carving=Carving())


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.2), (0.5, 0.5), (float("nan"), 0.1)])
def test_carving_refuses_shares_out_of_range(val: float, test: float) -> None:
    with pytest.raises(DataError, match="less than 1 together"):
        Carving(val, test)
