from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidetune.data import Dataset, load_dataset
from sidetune.data.folds import dataset_folds, draw_folds, given_folds, own_folds
from sidetune.data.splits import Carving, carve
from sidetune.errors import DataError

SEEDS = st.integers(0, 2**32)
NUM_FOLDS = st.integers(2, 6)
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=6, max_size=100)


def dataset_of(targets: np.ndarray, **fields: object) -> Dataset:
    rows = Dataset(
        root=Path("data"),
        paths=tuple(Path(f"{i:05d}.png") for i in range(len(targets))),
        task="classify" if targets.ndim == 1 else "regress",
        targets=targets,
        outputs=tuple("abcdefghijklmnop"[: targets.max() + 1 if targets.ndim == 1 else targets.shape[1]]),
        split=np.full(len(targets), "train"),
        name="table",
    )
    return replace(rows, **fields)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), NUM_FOLDS, SEEDS)
def test_sizes_differ_by_one_of_every_class_too(counts: list[int], num_folds: int, seed: int) -> None:
    targets = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if len(targets) < num_folds:
        with pytest.raises(
            DataError, match=f"got {len(targets)} samples of train and val for {num_folds} fol"
        ):
            draw_folds(targets, num_folds=num_folds, seed=seed)
        return
    fold = draw_folds(targets, num_folds=num_folds, seed=seed)
    assert fold.shape == targets.shape and fold.dtype == np.int64
    assert fold.min() == 0 and fold.max() == num_folds - 1
    table = np.stack([np.bincount(fold[targets == k], minlength=num_folds) for k in range(len(counts))])
    assert np.ptp(table.sum(0)) <= 1
    assert (np.ptp(table, axis=1) <= 1).all()
    assert ((table > 0).sum(1) >= 2).all()
    assert np.array_equal(fold, draw_folds(targets, num_folds=num_folds, seed=seed))


@pytest.mark.parametrize(
    ("classes", "images", "num_folds", "sizes", "left"),
    [
        (2, 2, 2, (2, 2), (1, 1)),
        (10, 2, 5, (4, 4), (1, 2)),
        (10, 3, 5, (6, 6), (2, 3)),
        (10, 4, 3, (13, 14), (2, 3)),
        (10, 5, 5, (10, 10), (4, 4)),
        (100, 5, 5, (100, 100), (4, 4)),
        (100, 10, 5, (200, 200), (8, 8)),
    ],
)
def test_small_balanced_sets_lose_as_few_images_of_a_class_as_can_be(
    classes: int, images: int, num_folds: int, sizes: tuple[int, int], left: tuple[int, int]
) -> None:
    """The table of docs/log.md: sizes of folds, and images of a class that are left to train on."""
    targets = np.repeat(np.arange(classes), images)
    found_sizes, found_left = set(), set()
    for seed in range(20):
        fold = draw_folds(targets, num_folds=num_folds, seed=seed)
        found_sizes |= set(np.bincount(fold).tolist())
        for one in range(num_folds):
            found_left |= set(np.bincount(targets[fold != one], minlength=classes).tolist())
    assert (min(found_sizes), max(found_sizes)) == sizes
    assert (min(found_left), max(found_left)) == left


@settings(max_examples=200, deadline=None)
@given(PAIRS, NUM_FOLDS, SEEDS)
def test_groups_are_whole_and_classes_in_two_folds(
    samples: list[tuple[int, int]], num_folds: int, seed: int
) -> None:
    targets, groups = np.array([k for k, _ in samples]), np.array([f"g{g}" for _, g in samples])
    spread = {k: len(set(groups[targets == k])) for k in set(targets.tolist())}
    try:
        fold = draw_folds(targets, num_folds=num_folds, seed=seed, groups=groups)
    except DataError:
        assert len(set(groups)) < num_folds or min(spread.values()) < 2 or monochromatic(targets, groups)
        return
    assert set(fold.tolist()) == set(range(num_folds))
    for group in set(groups):
        assert len(set(fold[groups == group].tolist())) == 1
    for k in spread:
        assert len(set(fold[targets == k].tolist())) >= 2
    order = np.random.default_rng(seed).permutation(len(targets))
    again = draw_folds(targets[order], num_folds=num_folds, seed=seed, groups=groups[order])
    assert np.array_equal(again, fold[order])


def monochromatic(targets: np.ndarray, groups: np.ndarray) -> bool:
    """Whether every way to part the groups in two leaves some class on one side."""
    names = sorted(set(groups))
    has = [{names.index(g) for g in groups[targets == k]} for k in np.unique(targets)]
    for code in range(2 ** len(names)):
        side = {i for i in range(len(names)) if code >> i & 1}
        if all(one & side and one - side for one in has):
            return False
    return True


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=6, max_size=40), NUM_FOLDS, SEEDS)
def test_groups_of_one_stratum_are_balanced_up_to_a_group(
    sizes: list[int], num_folds: int, seed: int
) -> None:
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    targets = np.zeros((len(groups), 1), np.float32)
    fold = draw_folds(targets, num_folds=num_folds, seed=seed, groups=groups)
    counts = np.bincount(fold, minlength=num_folds)
    assert (counts > 0).all()
    assert np.ptp(counts) <= max(sizes)


def test_many_groups_of_several_classes_come_near_to_equal_shares() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 80, 800)
    targets = (rng.random(800) < 0.1) * 1 + (group % 4 == 0)
    for seed in range(5):
        fold = draw_folds(targets, num_folds=5, seed=seed, groups=group.astype(str))
        assert np.abs(np.bincount(fold) - 160).max() <= 8
        for k in range(3):
            counts = np.bincount(fold[targets == k], minlength=5)
            assert np.abs(counts - counts.mean()).max() <= 6  # a group has 10 samples


def test_a_class_that_hangs_on_one_place_of_a_group_is_found() -> None:
    """Classes a in {x, z}, b in {y, z}: two folds need x and y together against z."""
    groups = np.repeat(["x", "y", "z"], 4)
    targets = np.array([0] * 4 + [1] * 4 + [0, 0, 1, 1])
    for seed in range(20):
        fold = draw_folds(targets, num_folds=2, seed=seed, groups=groups)
        assert fold[0] == fold[4] != fold[8]


def test_another_seed_is_another_draw() -> None:
    targets = np.arange(60) % 3
    groups = np.array([f"g{i // 3}" for i in range(60)])
    for chosen in (None, groups):
        drawn = {draw_folds(targets, num_folds=4, seed=s, groups=chosen).tobytes() for s in range(8)}
        assert len(drawn) == 8


def test_numbers_and_rare_labels_are_stratified() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.lognormal(size=(200, 2)).astype(np.float32)
    numbers[:10, 0] = np.nan
    fold = draw_folds(numbers, num_folds=5, seed=0)
    top = numbers[:, 0] > np.nanquantile(numbers[:, 0], 0.9)
    assert np.bincount(fold).tolist() == [40] * 5
    assert np.ptp(np.bincount(fold[top], minlength=5)) <= 2
    labels = (rng.random((200, 3)) < (0.5, 0.3, 0.05)).astype(np.float32)
    rare = labels[:, 2] == 1
    assert np.ptp(np.bincount(draw_folds(labels, num_folds=4, seed=1)[rare], minlength=4)) <= 1


@pytest.mark.parametrize(
    ("targets", "groups", "num_folds", "text"),
    [
        ([0, 0, 1, 1], None, 1, "got 1 folds; expected 2 or more. Type: --folds 5"),
        ([0, 0, 1, 1], None, 5, "got 4 samples of train and val for 5 folds; .* Type: --folds 4"),
        ([0, 0, 1, 1], "xyxy", 3, "got 2 groups in train and val for 3 folds; .* Type: --folds 2"),
        ([0, 0, 1, 2], None, 2, r"class 'b' has 1 image in .* \(1 more classes have 1\). Add images"),
        ([0, 0, 1, 1], "xyzz", 2, "class 'b' is in one group, 'z'; .* at least 2 groups. Give images"),
    ],
)
def test_what_cannot_be_drawn(targets: list, groups: str | None, num_folds: int, text: str) -> None:
    dataset = dataset_of(np.array(targets), group=None if groups is None else np.array(list(groups)))
    with pytest.raises(DataError, match=text):
        dataset_folds(dataset, dataset.rows("train"), num_folds=num_folds, seed=0)


def test_classes_that_no_parting_of_the_groups_can_keep() -> None:
    """Three groups in two folds: two of them are together, and hold all of one class."""
    groups = np.array(list("xyyzzx"))
    with pytest.raises(DataError, match=r"class 0 is in fold \d alone|class [012] is in fold"):
        draw_folds(np.array([0, 0, 1, 1, 2, 2]), num_folds=2, seed=0, groups=groups)


def test_folds_of_a_dataset_follow_its_paths_and_not_its_rows() -> None:
    dataset = dataset_of(np.arange(40) % 4)
    order = np.random.default_rng(0).permutation(40)
    other = replace(dataset, paths=tuple(dataset.paths[i] for i in order), targets=dataset.targets[order])
    first, second = (dataset_folds(d, d.rows("train"), num_folds=3, seed=2) for d in (dataset, other))
    assert np.array_equal(first[order], second)
    some = np.arange(5, 35)
    assert len(dataset_folds(dataset, some, num_folds=3, seed=2)) == 30


def test_given_folds_are_those_of_the_column() -> None:
    fold = np.array([3, 3, 7, 7, -1, 9])
    dataset = dataset_of(np.array([0, 1, 0, 1, 0, 1]), fold=fold)
    assert given_folds(dataset, np.array([2, 0, 1, 3])).tolist() == [7, 3, 3, 7]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"fold": None}, "table has no column 'fold'. Add one .* Type: --folds 5"),
        ({"fold": [0, 1, -1, 0, 1, -1]}, r"fold is empty for 2 of 6 rows .*the first: 00002.png\)"),
        ({"fold": [4] * 6}, "column 'fold' has 4 alone in train and val; expected 2 folds or more"),
        ({"fold": [0, 1] * 3, "group": list("xxyzyz")}, "group 'x' is in folds 0 and 1; a group"),
        ({"fold": [0, 1, 0, 1, 2, 2]}, "class 'c' is in fold 2 alone: while it is held out"),
    ],
)
def test_given_folds_that_do_not_serve(fields: dict, text: str) -> None:
    arrays = {name: None if values is None else np.array(values) for name, values in fields.items()}
    dataset = dataset_of(np.array([0, 0, 1, 1, 2, 2]), **arrays)
    with pytest.raises(DataError, match=text):
        given_folds(dataset, dataset.rows("train"))


def test_an_empty_cell_is_no_fold_and_test_rows_need_none(tmp_path: Path) -> None:
    rows = ["path,label,split,fold"]
    for i in range(8):
        (tmp_path / f"{i}.png").touch()
        split, fold = ("test", "") if i > 5 else ("train", i // 2)
        rows.append(f"{i}.png,{'ab'[i % 2]},{split},{fold}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    dataset = load_dataset(tmp_path / "table.csv")
    assert dataset.fold is not None
    assert dataset.fold.tolist() == [0, 0, 1, 1, 2, 2, -1, -1]
    trained = np.sort(np.concatenate([dataset.rows("train"), dataset.rows("val")]))
    assert set(given_folds(dataset, trained).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ({"fold": np.array([0, 0, 1, 1, 4, 4])}, 3),
        ({"fold": np.array([0, 0, 1, 1, 4, 4]), "split": np.array(["train"] * 4 + ["test"] * 2)}, 2),
        ({"fold": np.array([0, 0, 1, 1, -1, 4])}, 0),  # a sample is in none
        # one that does not count is in none
        ({"fold": np.array([0, 0, 1, 1, -1, 4]), "labelled": np.arange(6) != 4}, 3),
        ({"fold": np.array([0, 1, 0, 1, 0, 1])}, 0),  # a class is in one alone
        ({"fold": np.array([0, 0, 1, 1, 4, 4]), "group": np.array(list("abbcdd"))}, 0),  # a group is torn
        ({}, 0),
    ],
)
def test_own_folds_are_those_that_could_be_used(rows, found):
    dataset = replace(dataset_of(np.array([0, 1, 0, 1, 0, 1])), **rows)
    assert own_folds({"": dataset}) == found


@pytest.mark.parametrize(
    ("group", "whole"),
    [(None, "fold"), (list("aabbccddee"), "fold"), (list("abcdeabcde"), "group")],
)
def test_without_a_test_split_validation_is_whole_folds_unless_they_tear_groups(group, whole):
    fold = np.arange(10) // 2
    dataset = replace(
        dataset_of(np.arange(10) % 2), fold=fold, group=None if group is None else np.array(group)
    )
    found = carve(dataset, missing=["val", "test"], carving=Carving(val=0.2, test=0.0))
    of = fold if whole == "fold" else np.array(group)
    held = found.split == "val"
    assert held.sum() == 2
    assert not set(of[held]) & set(of[~held])
