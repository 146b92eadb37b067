from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sidetune.data import Dataset, load_columns, load_dataset, load_datasets
from sidetune.data.folds import dataset_folds
from sidetune.errors import DataError


def table(root: Path, header: str, rows: list[str]) -> Path:
    for row in rows:
        (root / row.partition(",")[0]).touch()
    (root / "table.csv").write_text("\n".join([header, *rows]))
    return root / "table.csv"


def cells(number: int, *columns: str, extra: str = "") -> list[str]:
    """Rows ``00.png,..``; of each column its letters in turn, ``-`` for an empty cell."""
    texts = [[column[i % len(column)].replace("-", "") for column in columns] for i in range(number)]
    return [f"{i:02d}.png,{','.join(text)}{extra}" for i, text in enumerate(texts)]


def splits(dataset: Dataset) -> list[list[int]]:
    return [dataset.rows(split).tolist() for split in ("train", "val", "test")]


def test_a_dataset_a_column_of_the_same_rows_and_splits(tmp_path: Path) -> None:
    file = table(tmp_path, "path,colour,shape", cells(40, "rg", "xyz"))
    colour, shape = load_columns(file, labels=["colour", " shape"])
    assert (colour.outputs, shape.outputs) == (("g", "r"), ("x", "y", "z"))
    assert (colour.name, shape.name) == ("table/colour", "table/shape")
    assert colour.targets.tolist() == [1, 0] * 20
    assert shape.targets.tolist() == [i % 3 for i in range(40)]
    assert colour.labelled is None and shape.labelled is None
    assert splits(colour) == splits(shape)
    assert colour.carved == shape.carved == ("test", "val")


def test_the_first_column_alone_is_the_dataset_that_was(tmp_path: Path) -> None:
    """So are its fingerprint and splits: a member on a column of a full table is the run on it."""
    file = table(tmp_path, "path,colour,shape", cells(40, "rg", "xyz"))
    alone, together = load_dataset(file, labels=["colour"]), load_columns(file, labels=["colour", "shape"])[0]
    assert splits(alone) == splits(together)
    keys = tuple(path.as_posix() for path in alone.paths)
    assert alone.fingerprint(keys) == together.fingerprint(keys)


def test_an_empty_cell_is_unlabelled_in_its_column(tmp_path: Path) -> None:
    file = table(tmp_path, "path,colour,shape", cells(60, "rg-", "xyxy-"))
    colour, shape = load_columns(file, labels=["colour", "shape"])
    assert colour.labelled is not None and shape.labelled is not None
    assert colour.labelled.tolist() == [True, True, False] * 20
    assert shape.targets.tolist() == [0, 1, 0, 1, -1] * 12
    assert np.array_equal(colour.split, shape.split)
    assert [len(rows) for rows in splits(colour)] == [24, 8, 8]
    for dataset in (colour, shape):
        assert all((dataset.targets[rows] >= 0).all() for rows in splits(dataset))
        assert dataset.rows("all").tolist() == np.flatnonzero(dataset.labelled).tolist()
        assert sorted(row for rows in splits(dataset) for row in rows) == dataset.rows("all").tolist()
    # the unlabelled rows of the first column are split like a class
    assert [int((colour.split[2::3] == name).sum()) for name in ("train", "val", "test")] == [12, 4, 4]
    rows = np.sort(np.concatenate([colour.rows("train"), colour.rows("val")]))
    assert np.bincount(dataset_folds(colour, rows, num_folds=4, seed=0)).tolist() == [8] * 4


def test_few_unlabelled_rows_and_rows_without_any_class_are_allowed(tmp_path: Path) -> None:
    file = table(tmp_path, "path,colour,shape", [*cells(30, "rg", "xyz"), "40.png,,", "41.png,,x"])
    colour, shape = load_columns(file, labels=["colour", "shape"])
    assert len(colour) == len(shape) == 32
    assert [len(dataset.rows("all")) for dataset in (colour, shape)] == [30, 31]


def test_unlabelled_rows_change_the_fingerprint_and_none_does_not(tmp_path: Path) -> None:
    full = load_columns(table(tmp_path, "path,a,b", cells(30, "xy", "uv")), labels=["a", "b"])[1]
    keys = tuple(path.as_posix() for path in full.paths)
    assert replace(full, labelled=np.ones(30, bool)).fingerprint(keys) == full.fingerprint(keys)
    sparse = load_columns(
        table(tmp_path, "path,a,b", [*cells(29, "xy", "uv"), "29.png,y,"]), labels=["a", "b"]
    )
    assert sparse[1].fingerprint(keys) != full.fingerprint(keys)


def test_given_splits_and_groups_are_kept(tmp_path: Path) -> None:
    rows = [f"{row},g{i // 3}" for i, row in enumerate(cells(60, "rg", "xyz"))]
    colour, shape = load_columns(table(tmp_path, "path,colour,shape,group", rows), labels=["colour", "shape"])
    assert colour.group is not None
    for name in np.unique(colour.group):
        assert len(set(shape.split[colour.group == name])) == 1
    rows = [f"{row},{'train' if i < 9 else 'val'}" for i, row in enumerate(cells(12, "rg", "xyz"))]
    given = load_columns(table(tmp_path, "path,colour,shape,split", rows), labels=["shape", "colour"])
    assert [[len(part) for part in splits(dataset)] for dataset in given] == [[9, 3, 0]] * 2
    assert given[0].carved == ()


@pytest.mark.parametrize(
    ("header", "rows", "text"),
    [
        (
            "path,a,b",
            cells(12, "xy", "u"),
            r"table.csv: column 'b' has one class in train, 'u'; .* leave the",
        ),
        ("path,a,b", cells(12, "xy", "-"), r"table.csv: column 'b' has no class in train; classification"),
        (
            "path,a,b,split",
            [*cells(12, "xy", "uv", extra=",train"), "20.png,x,w,test"],
            r"line 14: class 'w' of column 'b' is in test but never in train, .*Known: u, v\.",
        ),
        (
            "path,a,b,split",
            [*cells(12, "xy", "uv", extra=",train"), "20.png,x,,val"],
            r"column 'b' has no class in val\. Add some, or leave the column out",
        ),
        (
            "path,a,b",
            [*cells(12, "xy", "uv"), "20.png,z,u"],
            "class 'z' has 1 image; each class needs at least",
        ),
        ("path,a", cells(12, "xy"), r"has no column 'b'"),
    ],
)
def test_errors_name_the_column(tmp_path: Path, header: str, rows: list[str], text: str) -> None:
    with pytest.raises(DataError, match=text):
        load_columns(table(tmp_path, header, rows), labels=["a", "b"])


def test_a_class_that_carving_took_out_of_train_is_named_and_only_where_it_is_to_be_learnt(
    tmp_path: Path,
) -> None:
    file = table(tmp_path, "path,a,b", [*cells(30, "xy", "uv"), "30.png,x,w"])
    drawn = {}
    for seed in range(30):
        try:
            drawn[seed] = load_columns(file, labels=["a", "b"], split_seed=seed)
        except DataError as error:
            text = str(error)
            assert "class 'w' of column 'b' is not in train as it was drawn; give a split column, or" in text
            again = load_columns(file, labels=["a", "b"], split_seed=seed, to_train=False)
            assert again[1].split[30] != "train"
    assert 0 < len(drawn) < 30
    assert all(datasets[1].split[30] == "train" for datasets in drawn.values())


def test_columns_are_those_of_a_table(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"is no .csv file, got --labels a,b; .*Type: sidetune fit TABLE.csv"):
        load_columns(image_folder, labels=["a", "b"])
    file = table(tmp_path, "path,a,b", cells(12, "xy", "uv"))
    for labels in ([], ["a", "a"], ["a", "fold"]):
        with pytest.raises(DataError, match="expected different columns, none of them path, split, group"):
            load_columns(file, labels=labels)


def test_one_column_may_have_empty_cells_as_one_of_several_may(tmp_path: Path) -> None:
    file = table(tmp_path, "path,colour,shape", cells(60, "rg-", "xyxy-"))
    alone, together = load_dataset(file, labels=["colour"]), load_columns(file, labels=["colour", "shape"])[0]
    assert splits(alone) == splits(together)
    assert len(alone.rows("all")) == 40
    assert alone.fingerprint(tuple("k" * 60)) == together.fingerprint(tuple("k" * 60))


def test_split_by_gives_a_column_alone_the_splits_that_it_has_among_others(tmp_path: Path) -> None:
    file = table(tmp_path, "path,colour,shape", cells(60, "rg-", "xyxy-"))
    _, together = load_datasets(file, labels=["colour", "shape"])
    (alone,) = load_datasets(file, labels=["shape"], split_by="colour")
    other = load_dataset(file, labels=["shape"])
    assert splits(alone) == splits(together) != splits(other)
    assert alone.fingerprint(tuple("k" * 60)) == together.fingerprint(tuple("k" * 60))
    numbers = table(tmp_path, "path,n,site", cells(40, "0123456789", "ab"))
    regress = load_dataset(numbers, task="regress", labels=["n"], split_by="site")
    assert regress.strata is not None and regress.targets.shape == (40, 1)
    assert [int(regress.strata[rows].sum()) for rows in (regress.rows("val"), regress.rows("test"))] == [4, 4]


def test_an_image_is_in_the_same_drawn_fold_for_every_column(tmp_path: Path) -> None:
    file = table(tmp_path, "path,colour,shape", cells(60, "rg-", "xyxy-"))
    colour, shape = load_datasets(file, labels=["colour", "shape"])
    rows = np.arange(60)
    folds = [dataset_folds(dataset, rows, num_folds=4, seed=0) for dataset in (colour, shape)]
    assert np.array_equal(*folds)
    assert np.bincount(folds[0]).tolist() == [15] * 4
    assert np.bincount(folds[0][colour.rows("all")]).tolist() == [10] * 4


def test_a_class_that_the_folds_of_another_column_leave_alone_is_named(tmp_path: Path) -> None:
    file = table(tmp_path, "path,a,b", [*cells(30, "xy", "uv"), "30.png,x,w", "31.png,y,w"])
    b = load_columns(file, labels=["a", "b"], val_fraction=0.0, test_fraction=0.0)[1]
    said = []
    for seed in range(12):
        try:
            dataset_folds(b, np.arange(32), num_folds=2, seed=seed)
        except DataError as error:
            said.append(str(error))
    assert 0 < len(said) < 12
    assert all("class 'w' is in fold" in text for text in said)


def test_folders_have_no_column_to_split_by(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder, got data.split_by=site; .* Leave it out"):
        load_dataset(image_folder, split_by="site")
