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
        (
            "file,label\n0.png,a\n",
            r"line 1: has no column 'path'\. Got the columns 'file', 'label'\. Rename 'file' to 'path' in",
        ),
        (
            "path,labels\n0.png,a\n",
            r"has no column 'label'\. Got the columns 'path', 'labels'\. Type: --labels 'labels'",
        ),
        ("path,label,label\n0.png,a,a\n", "line 1: column 'label' stands there twice"),
        ("path,label\n0.png,a\n1.png,b,c\n", "line 3: got 3 cells, expected 2: path,label"),
        ("path,label\n0.png,a\n1.png\n", "line 3: got 1 cells, expected 2"),
        ('path,label\n0.png,"a\n', "line 2: unexpected end of data; a quote is opened here and not closed"),
        (
            "path,label\n0.png,a\n\n50.png,b\n60.png,b\n",
            r"line 4: no file '50\.png' in .* \(2 of 3 are missing\)",
        ),
        ("path,label\n0.png,a\n,b\n", "line 3: path is empty"),
        ("path,label\n0.png,a\n1.png,b\n./x/../0.png,b\n", "line 4: './x/../0.png' is on line 2 already"),
        ("path,label\n0.png,a\n1.png,\n", "column 'label' has one class in train, 'a'"),
        ("path,label\n0.png,a\n1.png,a\n", "one class in train, 'a'; classification needs at least two"),
        (
            "path,label,split\n0.png,a,train\n1.png,b,trian\n",
            r"line 3: no split named 'trian'\. Did you mean 'train'",
        ),
        ("path,label,split\n0.png,a,train\n1.png,b,\n", "line 3: split is empty; fill every row"),
        ("path,label,split\n0.png,a,test\n1.png,b,val\n", "has no row with split train"),
        (
            "path,label,split\n0.png,cat,train\n1.png,dog,train\n2.png,dgo,test\n",
            r"line 4: class 'dgo' of column 'label' is in test but never in train, .*Did you mean 'dog'\?",
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
            "column 'n' is 1 in every labelled row of train; leave it out of --labels",
        ),
        (
            "multilabel",
            "path,n\n0.png,1\n1.png,1\n2.png,1\n3.png,1\n",
            "column 'n' is 1 in every labelled row of the file; leave it out of --labels",
        ),
        (
            "multilabel",
            "path,n,split\n0.png,1,train\n1.png,1,train\n2.png,1,train\n3.png,1,train\n4.png,0,test\n",
            "row of train as it was drawn; give a split column, or another seed, or leave",
        ),
        ("classify", "path,n\n0.png,\n1.png,\n", "column 'n' has no class in train; .* leave the column out"),
    ],
)
def test_errors_of_numbers(tmp_path: Path, task: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(table(tmp_path, text), task=task, labels=["n"])


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("classify", ["a", "b"], "a dataset has one class column, got 2: a, b.*--task multilabel"),
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
    with pytest.raises(DataError, match=r"absent\.csv: nothing there, expected"):
        load_dataset(tmp_path / "absent.csv")


@pytest.mark.parametrize(("separator", "task", "cell"), [(";", "classify", "a, b"), ("\t", "regress", "1.5")])
def test_other_separators(tmp_path: Path, separator: str, task: str, cell: str) -> None:
    rows = [separator.join(["path", "label"])]
    rows += [separator.join([f"{i}.png", cell if i % 2 else "3"]) for i in range(10)]
    dataset = load_dataset(table(tmp_path, "\n".join(rows)), task=task)
    assert dataset.paths[3] == Path("3.png")
    if task == "classify":
        assert dataset.outputs == ("3", "a, b")
    else:
        assert dataset.targets[:2, 0].tolist() == [3, 1.5]


def test_commas_count_before_other_separators(tmp_path: Path) -> None:
    rows = ["path,label;x,label", *[f"{i}.png,z,{'a;b' if i % 2 else 'c'}" for i in range(10)]]
    dataset = load_dataset(table(tmp_path, "\n".join(rows)))
    assert dataset.outputs == ("a;b", "c")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_encodings_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    file = table(tmp_path, "")
    file.write_bytes((mark + lines("path\tlabel", *[r.replace(",", "\tä") for r in ten()])).encode(encoding))
    assert load_dataset(file).outputs == ("äa", "äb")


def test_the_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = table(tmp_path, "")
    file.write_bytes(lines("path,label", *ten(), "10.png,é").encode("cp1252"))
    with pytest.raises(DataError) as caught:
        load_dataset(file)
    assert str(caught.value) == (
        f"{file}, line 12: is not UTF-8 text: got byte 0xe9. Save it as 'CSV UTF-8', or type: "
        f"iconv -f cp1252 -t utf-8 {file} > utf8.csv"
    )
    file.write_bytes("\ufeffpath,label".encode("utf-16-le")[:-1])
    with pytest.raises(DataError, match="line 1: is not UTF-16 text, as it begins"):
        load_dataset(file)


def test_names_of_columns_in_another_case(tmp_path: Path) -> None:
    rows = [f"{row},scene{i // 2}" for i, row in enumerate(ten())]
    dataset = load_dataset(table(tmp_path, lines(' Path ," LABEL",Group', *rows)))
    assert dataset.outputs == ("a", "b")
    assert dataset.group is not None  # a column "Group" that were passed over would leak
    exact = [f"{row},{i}" for i, row in enumerate(ten())]
    dataset = load_dataset(table(tmp_path, lines("path,label,Label", *exact)), labels=["label"])
    assert dataset.outputs == ("a", "b")


def test_what_excel_leaves_behind(tmp_path: Path) -> None:
    """Commas after the last column, in the header, in some rows, and rows of commas alone."""
    rows = [row + "," * (i % 3) for i, row in enumerate(ten())]
    for header in ("path,label", "path,label,", "path,label,,"):
        dataset = load_dataset(table(tmp_path, lines(header, *rows, ",", ",,", " , ")))
        assert (len(dataset), dataset.outputs) == (10, ("a", "b"))


@pytest.mark.parametrize(
    ("header", "labels", "message"),
    [
        (
            "Filename,class",
            None,
            r"no column 'path'\. Got the columns 'Filename', 'class'\. Rename 'File",
        ),
        ("path,class", None, r"line 1: has no column 'label'\. Got the columns .* Type: --labels 'class'"),
        ("Image Path,label", None, r"Rename 'Image Path' to 'path' in line 1"),
        ("path,wett", ["wet"], r"no column 'wet'\. Did you mean 'wett'\? Known: path, wett\. Name the label"),
        (
            "path,colour",
            None,
            r"no column 'label'\..* Known: colour, path\. Name the label columns with",
        ),
        ("path,label,Path", None, "line 1: got 'x' in column 3|line 2: got 2 cells, expected 3"),
        ("path,label,label", None, "line 1: column 'label' stands there twice; rename one"),
        (",", None, "is empty|line 1: has no column 'path'"),
    ],
)
def test_errors_of_the_header(tmp_path: Path, header: str, labels: list | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(table(tmp_path, lines(header, *ten())), labels=labels)


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0.png,a", "1.png,b,", "2.png,,c"], "line 4: got 3 cells, expected 2: path,label"),
        (["0.png,a", '1.png,"b', *ten()], "line 3: unexpected end of data; a quote is opened here and not"),
        (['"a\nb.png",x', '"a"b,c'], "line 4: .*; expected CSV: a cell with a comma or a quote in it"),
        (
            ["0.png,a", f'1.png,"b{LONG}{LONG}'],
            r"line 3: field larger than field limit \(131072\); a quote",
        ),
        (["0.png,a", "x," * 5_000_000], "line 3: got 5000001 cells, expected 2: path,label"),
        (["0.png,a", f"{LONG},b"], r"line 3: no file '(x{60})' \.\. \(100,000 characters\) in "),
        (["0.png,a", "1\x00.png,b"], r"line 3: no file '1\\x00\.png' in .* \(1 of 2 are missing\)\. Paths"),
        (["0.png,a", "../nowhere/1.png,b"], r"line 3: no file '\.\./nowhere/1\.png'"),
        (["0.png,a", '"0\n.png",b'], r"line 3: no file '0\\n\.png' in"),
    ],
    ids=range(9),
)
def test_errors_of_rows(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(table(tmp_path, lines("path,label", *rows)))
    assert len(str(caught.value)) < 700


def test_a_column_without_a_name_that_holds_something(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"line 5: got 'oops' in column 3, which has no name in line 1\. Name it"
    ):
        load_dataset(table(tmp_path, lines("path,label,", *ten()[:3], "3.png,b,oops")))


def test_dots_and_links_in_paths(tmp_path: Path) -> None:
    """A path may lead anywhere: images are only read. A link and its target are two images."""
    (tmp_path / "sub").mkdir()
    table(tmp_path, "")
    (tmp_path / "sub" / "link.png").symlink_to(tmp_path / "0.png")
    (tmp_path / "sub" / "broken.png").symlink_to(tmp_path / "absent.png")
    rows = [f"../{row}" for row in ten()]
    file = tmp_path / "sub" / "table.csv"
    file.write_text(lines("path,label", *rows, "link.png,a"))
    assert load_dataset(file).file(10).read_bytes() == b""
    file.write_text(lines("path,label", *rows, "broken.png,a"))
    with pytest.raises(DataError, match=r"line 12: no file 'broken\.png' in"):
        load_dataset(file)
    file.write_text(lines("path,label", *rows, "./../0.png,a"))
    with pytest.raises(
        DataError, match=r"line 12: '\./\.\./0\.png' is on line 2 already; keep one of the two"
    ):
        load_dataset(file)


def test_folds_and_numbers_say_what_is_wrong(tmp_path: Path) -> None:
    for fold in ("-1", "1.0", "9" * 5000):
        with pytest.raises(DataError, match=r"line 2: fold is '.* expected a whole number from 0 to 999999"):
            load_dataset(table(tmp_path, lines("path,label,fold", f"0.png,a,{fold}", "1.png,b,0")))
    with pytest.raises(DataError, match=r"line 2: label is '1,5'; expected a finite number with a point"):
        load_dataset(table(tmp_path, lines("path;label", "0.png;1,5")), task="regress")


def test_ten_thousand_classes(tmp_path: Path) -> None:
    """None of it takes the square of the number of classes: the test would take minutes."""
    rows = [f"{i}.png,class {i // 3},{('train', 'val', 'test')[i % 3]}" for i in range(30_000)]
    file = table(tmp_path, lines("path,label,split", *rows), images=30_000)
    dataset = load_dataset(file)
    assert (len(dataset.outputs), sizes(dataset)) == (10_000, [10_000] * 3)
    file.write_text(lines("path,label,split", *rows, "./a.png,klass 7,test"))
    (tmp_path / "a.png").touch()
    with pytest.raises(
        DataError, match="class 'klass 7' of column 'label' is in test but never in train"
    ) as caught:
        load_dataset(file)
    assert "Did you mean 'class 7'?" in str(caught.value)
    assert str(caught.value).endswith(" .. (10000 in all).")


def test_a_table_that_the_system_does_not_hand_out(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    file.write_text("path,label\n")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError) as error:
        load_dataset(file)
    assert str(error.value) == (f"{file} cannot be read: Permission denied. Give the path of a .csv file")


def test_a_table_that_is_only_scored_may_have_a_column_of_one_value(tmp_path: Path) -> None:
    file = table(tmp_path, "path,n\n0.png,0\n1.png,\n2.png,0\n")
    with pytest.raises(DataError, match="is 0 in every labelled row of the file"):
        load_dataset(file, task="multilabel", labels=["n"], val_fraction=0.0, test_fraction=0.0)
    dataset = load_dataset(
        file, task="multilabel", labels=["n"], val_fraction=0.0, test_fraction=0.0, to_train=False
    )
    assert np.isnan(dataset.targets[:, 0]).tolist() == [False, True, False]


def test_a_file_that_is_no_csv_is_not_its_own_suggestion(tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("path,label\n")
    with pytest.raises(DataError, match=r"table\.txt: a file that is no \.csv") as caught:
        load_dataset(tmp_path / "table.txt")
    assert "Did you mean" not in str(caught.value)
