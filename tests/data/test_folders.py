import os
from pathlib import Path

import numpy as np
import pytest

from images import make_folder
from sidetune.data import load_dataset
from sidetune.errors import DataError


def touch(root: Path, *names: str) -> Path:
    """Files without content: reading folders never opens an image."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def several(folder: str, count: int = 4) -> list[str]:
    return [f"{folder}/{i}.jpg" for i in range(count)]


def test_class_folders_are_carved_and_stratified(image_folder: Path) -> None:
    dataset = load_dataset(image_folder)
    assert dataset.outputs == ("class0", "class1", "class2")
    assert dataset.task == "classify"
    assert dataset.targets.dtype == np.int64
    assert dataset.carved == ("test", "val")
    assert [path.as_posix() for path in dataset.paths] == sorted(path.as_posix() for path in dataset.paths)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        assert np.bincount(dataset.targets[dataset.rows(split)]).tolist() == [count] * 3
    for i in range(60):
        assert dataset.paths[i].parts[0] == dataset.outputs[dataset.targets[i]]


def test_the_seed_decides_the_split(image_folder: Path, tmp_path: Path) -> None:
    first, again, other = (load_dataset(image_folder, split_seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.split, again.split)
    assert not np.array_equal(first.split, other.split)
    copy = load_dataset(make_folder(tmp_path / "elsewhere", 3, 60))
    assert np.array_equal(first.split, copy.split)


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_split_folders_are_kept(tmp_path: Path, word: str) -> None:
    for name, count in (("train", 5), (word, 2), ("test", 3)):
        touch(tmp_path, *several(f"{name}/cat", count), *several(f"{name}/dog", count))
    dataset = load_dataset(tmp_path)
    assert [len(dataset.rows(split)) for split in ("train", "val", "test")] == [10, 4, 6]
    assert dataset.carved == ()
    for path, split in zip(dataset.paths, dataset.split, strict=True):
        assert path.parts[0] == (word if split == "val" else split)


@pytest.mark.parametrize(
    ("given", "carved", "sizes"),
    [
        (["train"], ("test", "val"), [12, 4, 4]),
        (["train", "test"], ("val",), [16, 4, 4]),
        (["train", "val"], ("test",), [16, 4, 4]),
    ],
)
def test_missing_splits_are_carved_from_train(
    tmp_path: Path, given: list, carved: tuple, sizes: list
) -> None:
    for name in given:
        count = 10 if name == "train" else 2
        touch(tmp_path, *several(f"{name}/cat", count), *several(f"{name}/dog", count))
    dataset = load_dataset(tmp_path)
    assert dataset.carved == carved
    assert [len(dataset.rows(split)) for split in ("train", "val", "test")] == sizes


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    touch(tmp_path, *several("train"), *several("car"), *several("bicycle"))
    assert load_dataset(tmp_path).outputs == ("bicycle", "car", "train")


def test_suffixes_hidden_files_and_other_files(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.JPG", "a/deep/er/2.TiFF", "a/3.webp", "a/notes.txt", "a/.DS_Store", "a/.cache/9.png")
    touch(tmp_path, *several("b", 3), "b/Thumbs.db", ".hidden/1.png", "readme.md")
    dataset = load_dataset(tmp_path)
    assert [path.as_posix() for path in dataset.paths[:3]] == ["a/1.JPG", "a/3.webp", "a/deep/er/2.TiFF"]
    assert len(dataset) == 6
    assert dataset.ignored == 2


def test_links_are_followed_but_do_not_loop(tmp_path: Path) -> None:
    store = touch(tmp_path / "store", "1.jpg", "2.jpg", "more/3.jpg")
    root = touch(tmp_path / "data", *several("b", 3), "a/deep/0.jpg")
    (root / "a" / "one.jpg").symlink_to(store / "1.jpg")
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "deep" / "up").symlink_to(root / "a")
    (root / "a" / "more").symlink_to(store / "more")
    (root / "c").symlink_to(store)
    dataset = load_dataset(root)
    found = [path.as_posix() for path in dataset.paths if path.parts[0] != "b"]
    assert found == ["a/deep/0.jpg", "a/more/3.jpg", "a/one.jpg", "c/1.jpg", "c/2.jpg", "c/more/3.jpg"]


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    touch(tmp_path, *several("cat"), "dog/notes.txt")
    with pytest.raises(DataError, match=r"class 'dog' is empty: no image in .*dog\. Add images \(\.bmp"):
        load_dataset(tmp_path)


def test_fewer_than_two_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class folder; classification needs at least two classes"):
        load_dataset(touch(tmp_path, "1.jpg", "2.jpg"))
    with pytest.raises(DataError, match="has one class, 'cat'; classification needs at least two classes"):
        load_dataset(touch(tmp_path, *several("cat")))


def test_a_class_that_train_does_not_have(tmp_path: Path) -> None:
    touch(tmp_path, *several("train/cat"), *several("train/dog"), *several("test/cat"), *several("test/cow"))
    with pytest.raises(DataError, match="class 'cow' is in test but not in train, so nothing can learn it"):
        load_dataset(tmp_path)


def test_a_class_of_one_image_cannot_be_carved(tmp_path: Path) -> None:
    touch(tmp_path, *several("cat"), "dog/1.jpg")
    with pytest.raises(
        DataError, match=r"class 'dog' has 1 image; each class needs at least 3 \(train, val, test\)"
    ):
        load_dataset(tmp_path)


def test_folders_that_are_partly_splits(tmp_path: Path) -> None:
    touch(tmp_path, *several("train/cat"), *several("test/cat"), *several("labels"))
    with pytest.raises(
        DataError, match=r"folders of splits \(test, train\) beside 'labels'.* Move 'labels' away"
    ):
        load_dataset(tmp_path)


def test_splits_without_train_and_twice_val(tmp_path: Path) -> None:
    touch(tmp_path, *several("val/cat"), *several("test/cat"))
    with pytest.raises(DataError, match="has test, val but no train folder"):
        load_dataset(tmp_path)
    touch(tmp_path, *several("train/cat"), *several("valid/cat"))
    with pytest.raises(DataError, match="has both 'val' and 'valid'; keep one of them"):
        load_dataset(tmp_path)


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *several("cat"), *several("dog"), *several("dog/locked"))
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked cannot be listed: Permission denied"):
        load_dataset(tmp_path)
