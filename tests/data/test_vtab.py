import json
from pathlib import Path

import numpy as np
import pytest

from sidetune.data import load_dataset
from sidetune.errors import DataError

LISTS = ("train800.txt", "val200.txt", "train800val200.txt", "test.txt")


def make_task(root: Path, *, own_folders: bool = False) -> Path:
    """A small task of 4 classes: 8 train, 4 val, 6 test; as published each list has its own folder."""
    rows = {
        "train800": [(i, i % 4) for i in range(8)],
        "val200": [(i, i % 4) for i in range(8, 12)],
        "test": [(i, i % 3) for i in range(6)],
    }
    rows["train800val200"] = rows["train800"] + rows["val200"]
    for name, lines in rows.items():
        folder = name if own_folders or name == "test" else "train800val200"
        (root / "images" / folder).mkdir(parents=True, exist_ok=True)
        for i, _ in lines:
            (root / "images" / folder / f"{i:06d}.jpg").touch()
        text = "".join(f"images/{folder}/{i:06d}.jpg {label}\n" for i, label in lines)
        (root / f"{name}.txt").write_text(text)
    return root


@pytest.mark.parametrize("own_folders", [False, True])
def test_both_layouts(tmp_path: Path, own_folders: bool) -> None:
    dataset = load_dataset(make_task(tmp_path, own_folders=own_folders))
    assert [len(dataset.rows(split)) for split in ("train", "val", "test")] == [8, 4, 6]
    folder = "train800" if own_folders else "train800val200"
    assert dataset.paths[5] == Path(f"images/{folder}/000005.jpg")
    assert dataset.targets.tolist() == [0, 1, 2, 3] * 3 + [0, 1, 2] * 2
    assert dataset.outputs == ("0", "1", "2", "3")
    assert dataset.carved == ()


def test_class_names_come_from_info(tmp_path: Path) -> None:
    make_task(tmp_path)
    (tmp_path / "info.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"], "group": "Natural"}))
    assert load_dataset(tmp_path).outputs == ("a", "b", "c", "d")
    (tmp_path / "info.json").write_text(json.dumps({"classes": ["a", "b", "c", "d", "never seen"]}))
    assert len(load_dataset(tmp_path).outputs) == 5
    (tmp_path / "info.json").write_text(json.dumps({"group": "Natural"}))
    assert load_dataset(tmp_path).outputs == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"classes": ["a", "b"]}', "names 2 different classes, but the lists have labels up to 3"),
        ('{"classes": ["a", "b", "b", "d"]}', "names 3 different classes"),
        ('{"classes": [', "line 1: not JSON"),
    ],
)
def test_info_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    (make_task(tmp_path) / "info.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)


def test_a_class_may_be_missing_from_train(tmp_path: Path) -> None:
    make_task(tmp_path)
    (tmp_path / "test.txt").write_text("images/test/000000.jpg 9\n")
    assert len(load_dataset(tmp_path).outputs) == 10


@pytest.mark.parametrize("name", ["train800.txt", "val200.txt", "test.txt"])
def test_a_missing_or_empty_list_is_named(tmp_path: Path, name: str) -> None:
    (make_task(tmp_path) / name).write_text("\n")
    with pytest.raises(DataError, match=f"{name} is empty; expected lines"):
        load_dataset(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"has no {name}; expected train800val200.txt, train800.txt"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/test/000001.jpg", "got 'images/test/000001.jpg', expected 'images/<split>"),
        ("images/test/000001.jpg -1", "got 'images/test/000001.jpg -1', expected"),
        ("images/test/000001.jpg 1.0", "with a label 0, 1, 2, .."),
        ("../other/000001.jpg 1", "'../other/000001.jpg' leaves the task's folder"),
        ("images/../../000001.jpg 1", "leaves the task's folder"),
        ("/images/000001.jpg 1", "'/images/000001.jpg' leaves the task's folder"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    make_task(tmp_path)
    (tmp_path / "test.txt").write_text(f"images/test/000000.jpg 0\n{line}\n")
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path)
    assert str(caught.value).startswith("test.txt, line 2: ")
    assert message in str(caught.value)


def test_dots_inside_the_folder_are_fine(tmp_path: Path) -> None:
    make_task(tmp_path)
    (tmp_path / "test.txt").write_text("images/train800/../test/000000.jpg 0\n")
    (tmp_path / "images" / "train800").mkdir()
    assert len(load_dataset(tmp_path).rows("test")) == 1


@pytest.mark.parametrize("own_folders", [False, True])
def test_the_thousand_must_be_the_eight_hundred_and_the_two_hundred(
    tmp_path: Path, own_folders: bool
) -> None:
    file = make_task(tmp_path, own_folders=own_folders) / "train800val200.txt"
    whole = file.read_text()
    file.write_text(whole.replace("000003.jpg 3", "000003.jpg 2"))
    example = "" if own_folders else ": images/train800val200/000003.jpg 2 is on one side only"
    with pytest.raises(DataError, match=f"train800.txt and val200.txt together{example}. Write it again"):
        load_dataset(tmp_path)
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="does not hold the images and labels"):
        load_dataset(tmp_path)


def test_an_image_listed_twice_or_missing(tmp_path: Path) -> None:
    make_task(tmp_path)
    leak = "images/train800val200/000002.jpg 2\n"
    (tmp_path / "test.txt").write_text(leak)
    with pytest.raises(DataError, match=r"listed twice: train800.txt, line 3 and test.txt, line 1"):
        load_dataset(tmp_path)
    (tmp_path / "test.txt").write_text("images/test/000000.jpg 0\nimages/test/000099.jpg 0\n")
    with pytest.raises(DataError, match=r"test.txt, line 2: images/test/000099.jpg is not in .* \(1 of 14"):
        load_dataset(tmp_path)


def test_order_follows_the_lists(tmp_path: Path) -> None:
    make_task(tmp_path)
    lines = (tmp_path / "test.txt").read_text().splitlines()
    (tmp_path / "test.txt").write_text("\n".join(lines[::-1]))
    dataset = load_dataset(tmp_path)
    assert np.array_equal(dataset.targets[dataset.rows("test")], [2, 1, 0, 2, 1, 0])


def test_a_list_that_the_system_does_not_hand_out(tmp_path, monkeypatch):
    (tmp_path / "train800val200.txt").write_text("images/a.png 0\n")
    (tmp_path / "train800.txt").write_text("images/a.png 0\n")

    def refuse(path, encoding=None):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(DataError) as error:
        load_dataset(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'train800.txt'} cannot be read: Permission denied. Mend that, or its rights"
    )
