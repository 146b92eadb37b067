import math
from pathlib import Path

import numpy as np
import pytest

from images import make_csv
from sidetune.data import Dataset, load_dataset
from sidetune.errors import DataError


def table(root: Path, text: str, *, images: int = 12) -> Path:
    """A CSV beside images 0.png .. that hold nothing: reading a table never opens an image."""
    for i in range(images):
        (root / f"{i}.png").touch()
    (root / "table.csv").write_bytes(text.encode())
    return root / "table.csv"


def lines(header: str, *rows: str) -> str:
    return "\n".join([header, *rows]) + "\n"


def ten(column: str = "") -> list[str]:
    """Ten rows ``i.png,a|b`` in turn, and one more cell."""
    return [f"{i}.png,{'ab'[i % 2]}{column}" for i in range(10)]


def sizes(dataset: Dataset) -> list[int]:
    return [len(dataset.rows(split)) for split in ("train", "val", "test")]


def test_classify(tmp_path: Path) -> None:
    dataset = load_dataset(make_csv(tmp_path, "classify", 30))
    assert dataset.outputs == ("class0", "class1", "class2")
    assert dataset.targets.tolist() == [i % 3 for i in range(30)]
    assert dataset.file(4) == tmp_path / "images" / "0004.png"
    assert dataset.carved == ("test", "val")
    assert sizes(dataset) == [18, 6, 6]
    assert dataset.group is None
    assert dataset.fold is None


def test_multilabel_takes_words_and_empty_cells(tmp_path: Path) -> None:
    rows = [
        f"{i}.png,{w},{i % 2}" for i, w in enumerate(["Yes", "no", "TRUE", "false", "1", "0", ""] + ["1"] * 3)
    ]
    file = table(tmp_path, lines("path,wet,old", *rows))
    dataset = load_dataset(file, task="multilabel", labels=["wet", "old"])
    assert dataset.outputs == ("wet", "old")
    assert dataset.targets.dtype == np.float32
    np.testing.assert_array_equal(dataset.targets[:, 0], [1, 0, 1, 0, 1, 0, math.nan, 1, 1, 1])
    np.testing.assert_array_equal(dataset.targets[:, 1], [0, 1] * 5)


def test_regress_takes_numbers_and_empty_cells(tmp_path: Path) -> None:
    dataset = load_dataset(make_csv(tmp_path, "regress", 40), task="regress", labels=["x", "y"])
    assert dataset.targets.shape == (40, 2)
    assert sizes(dataset) == [24, 8, 8]
    file = table(tmp_path, lines("path,label", "0.png,-1.5e3", "1.png,", "2.png,7", "3.png,8"))
    np.testing.assert_array_equal(load_dataset(file, task="regress").targets[:, 0], [-1500, math.nan, 7, 8])


def test_quotes_byte_order_mark_windows_lines_and_spaces(tmp_path: Path) -> None:
    (tmp_path / "a, b.png").touch()
    rows = ['"a, b.png"," big, ""red"" "', *[f"{i}.png , {'xy'[i % 2]}" for i in range(10)], "", "10.png,x"]
    rows += ['11.png,"big, ""red"""']
    text = "\ufeff" + "\r\n".join(["path,label", *rows])
    dataset = load_dataset(table(tmp_path, text), val_fraction=0, test_fraction=0)
    assert dataset.outputs == ('big, "red"', "x", "y")
    assert dataset.paths[0] == Path("a, b.png")
    assert len(dataset) == 13


def test_absolute_paths(tmp_path: Path) -> None:
    rows = [f"{tmp_path}/{i}.png,{'ab'[i % 2]}" for i in range(10)]
    (tmp_path / "sub").mkdir()
    table(tmp_path, "")
    (tmp_path / "sub" / "far.csv").write_text(lines("path,label", *rows))
    dataset = load_dataset(tmp_path / "sub" / "far.csv")
    assert dataset.file(3) == tmp_path / "3.png"


@pytest.mark.parametrize(
    ("words", "carved", "expected"),
    [
        (["train"] * 10, ("test", "val"), [6, 2, 2]),
        (["train"] * 8 + ["test"] * 2, ("val",), [6, 2, 2]),
        (["Train"] * 8 + ["validation"] * 2, (), [8, 2, 0]),
        (["train"] * 6 + ["valid"] * 2 + ["TEST"] * 2, (), [6, 2, 2]),
    ],
)
def test_the_rule_of_missing_splits(tmp_path: Path, words: list, carved: tuple, expected: list) -> None:
    rows = [f"{row},{word}" for row, word in zip(ten(), words, strict=True)]
    dataset = load_dataset(table(tmp_path, lines("path,label,split", *rows)))
    assert dataset.carved == carved
    assert sizes(dataset) == expected


def test_the_order_of_the_rows_does_not_change_the_split(tmp_path: Path) -> None:
    for header, rows in (
        ("path,label", ten()),
        ("path,label,group", [f"{r},g{i // 2}" for i, r in enumerate(ten())]),
    ):
        first = load_dataset(table(tmp_path, lines(header, *rows)))
        other = load_dataset(table(tmp_path, lines(header, *rows[::-1])))
        assert dict(zip(first.paths, first.split, strict=True)) == dict(
            zip(other.paths, other.split, strict=True)
        )


def test_groups_and_folds(tmp_path: Path) -> None:
    rows = [f"{row},scene {i // 2},{i % 5}" for i, row in enumerate(ten())]
    dataset = load_dataset(table(tmp_path, lines("path,label,group,fold", *rows)))
    assert dataset.fold is not None
    assert dataset.fold.tolist() == [0, 1, 2, 3, 4] * 2
    assert sizes(dataset) == [6, 2, 2]
    assert dataset.group is not None
    for name in np.unique(dataset.group):
        assert len(set(dataset.split[dataset.group == name])) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: got nothing, expected a header 'path,label'"),
        ("path,label\n", "is empty: got a header and no rows"),
        ("file,label\n0.png,a\n", r"has no column 'path'\. Known: file, label\."),
        ("path,labels\n0.png,a\n", r"has no column 'label'\. Did you mean 'labels'\?.* with --labels"),
        ("path,label,label\n0.png,a,a\n", "line 1: column 'label' stands there twice"),
        ("path,label\n0.png,a\n1.png,b,c\n", "line 3: got 3 cells, expected 2: path,label"),
        ("path,label\n0.png,a\n1.png\n", "line 3: got 1 cells, expected 2"),
        ('path,label\n0.png,"a\n', "line 2: unexpected end of data; expected CSV"),
        (
            "path,label\n0.png,a\n\n50.png,b\n60.png,b\n",
            r"line 4: no file '50\.png' in .* \(2 of 3 are missing\)",
        ),
        ("path,label\n0.png,a\n,b\n", "line 3: path is empty"),
        ("path,label\n0.png,a\n1.png,b\n./x/../0.png,b\n", "line 4: './x/../0.png' is on line 2 already"),
        ("path,label\n0.png,a\n1.png,\n", "line 3: label is empty; expected a class name"),
        ("path,label\n0.png,a\n1.png,a\n", "one class in train, 'a'; classification needs at least two"),
        (
            "path,label,split\n0.png,a,train\n1.png,b,trian\n",
            r"line 3: no split named 'trian'\. Did you mean 'train'",
        ),
        ("path,label,split\n0.png,a,train\n1.png,b,\n", "line 3: split is empty; fill every row"),
        ("path,label,split\n0.png,a,test\n1.png,b,val\n", "has no row with split train"),
        (
            "path,label,split\n0.png,cat,train\n1.png,dog,train\n2.png,dgo,test\n",
            r"line 4: class 'dgo' is in test but never in train, .*Did you mean 'dog'\?",
        ),
        ("path,label,group\n0.png,a,x\n1.png,b,\n", "line 3: group is empty"),
        (
            "path,label,split,group\n0.png,a,train,x\n1.png,b,train,y\n2.png,b,test,y\n",
            "line 4: group 'y' is in test here and in train on line 3; a group belongs to one split",
        ),
        ("path,label,fold\n0.png,a,1\n1.png,b,1.5\n", r"line 3: fold is '1\.5'; expected a whole number"),
        ("path,label\n" + lines(*ten(), "10.png,c"), "class 'c' has 1 image; each class needs at least 3"),
    ],
)
def test_errors_say_where(tmp_path: Path, text: str, message: str) -> None:
    file = table(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(file)
    if "line" not in message:
        assert caught.value.exit_code == 2
    else:
        assert str(caught.value).startswith(f"{file}, line ")


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("regress", "path,n\n0.png,1\n1.png,two\n", "line 3: n is 'two'; expected a finite number"),
        ("regress", "path,n\n0.png,inf\n", "line 2: n is 'inf'; expected a finite number"),
        ("regress", "path,n\n0.png,nan\n", "line 2: n is 'nan'; expected a finite number"),
        ("regress", "path,n\n0.png,1e39\n", "line 2: n is '1e39'; expected a finite number"),
        ("regress", "path,n\n0.png,\n1.png,\n2.png,\n", "column 'n' has no value in train"),
        ("multilabel", "path,n\n0.png,1\n1.png,2\n", "line 3: n is '2'; expected 0/1, true/false"),
        (
            "multilabel",
            "path,n,split\n0.png,1,train\n1.png,,train\n2.png,0,val\n",
            "column 'n' is 1 in every labelled row of train; or leave it out of --labels",
        ),
        (
            "multilabel",
            "path,n\n0.png,1\n1.png,1\n2.png,1\n3.png,1\n",
            "column 'n' is 1 in every labelled row of train as it was drawn; give a split column",
        ),
    ],
)
def test_errors_of_numbers(tmp_path: Path, task: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(table(tmp_path, text), task=task, labels=["n"])


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("classify", ["a", "b"], "--task classify takes one label column, got 2: a, b.*--task multilabel"),
        ("regress", ["a", "a"], "--labels is 'a,a'; expected different columns"),
        ("regress", ["fold"], "none of them path, split, group, fold"),
        ("regress", [], "--labels is ''"),
    ],
)
def test_errors_of_the_request(tmp_path: Path, task: str, labels: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(table(tmp_path, lines("path,label", *ten())), task=task, labels=labels)


def test_a_file_that_is_no_text_or_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("path,label\nä.png,a\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_dataset(tmp_path / "latin.csv")
    with pytest.raises(DataError, match=r"absent\.csv cannot be read: No such file"):
        load_dataset(tmp_path / "absent.csv")
