import os
from pathlib import Path

import numpy as np
import pytest

from sidetune import data
from sidetune.data import load_dataset, load_image
from sidetune.data.preprocess import Preprocess
from sidetune.errors import DataError

# classes, train + val, test.
VTAB_MINI = {
    "caltech101": (102, 1020, 2040),
    "cifar": (100, 1000, 4000),
    "dtd10": (10, 800, 400),
    "elpv": (4, 1000, 1024),
    "rsscn7": (7, 980, 1820),
    "shapes_count": (8, 1000, 4000),
    "sprites_loc": (16, 1000, 4000),
    "sprites_ori": (16, 1000, 4000),
}


@pytest.fixture
def real_data() -> Path:
    if "SIDETUNE_TEST_DATA" not in os.environ:
        pytest.skip("SIDETUNE_TEST_DATA does not name the folder of real data")
    return Path(os.environ["SIDETUNE_TEST_DATA"])


def test_exports_are_sorted_and_there() -> None:
    assert data.__all__ == sorted(data.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(data, name) for name in data.__all__)


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nothing there, expected a folder of class folders.*Type: sidetune fit"
    ):
        load_dataset(tmp_path / "absent")
    (tmp_path / "data.json").touch()
    with pytest.raises(DataError, match=r"a file that is no \.csv, expected a folder"):
        load_dataset(tmp_path / "data.json")


def test_an_unknown_task(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"no task named 'clasify'\. Did you mean 'classify'\?"):
        load_dataset(image_folder, task="clasify")  # type: ignore[arg-type]


def test_a_folder_only_classifies(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"got --task regress\. Give a table: .*--task regress --labels"):
        load_dataset(image_folder, task="regress")
    with pytest.raises(DataError, match="got --labels a,b"):
        load_dataset(image_folder, labels=["a", "b"])


def test_fractions_and_seed_are_passed_on(image_folder: Path) -> None:
    dataset = load_dataset(image_folder, val_fraction=0.1, test_fraction=0.0)
    assert [len(dataset.rows(split)) for split in ("train", "val", "test")] == [54, 6, 0]
    assert dataset.carved == ("val",)
    with pytest.raises(DataError, match=r"val_fraction is 0.9 and test_fraction 0.2; expected"):
        load_dataset(image_folder, val_fraction=0.9)


def test_the_made_images_can_be_learned(image_folder: Path) -> None:
    """Nearest class mean tells the classes of the shared fixture apart, so runs on it can succeed."""
    dataset = load_dataset(image_folder)
    images = np.stack([load_image(dataset.file(i), Preprocess(size=16)).mean((1, 2)) for i in range(60)])
    train, test = dataset.rows("train"), dataset.rows("test")
    means = np.stack([images[train][dataset.targets[train] == k].mean(0) for k in range(3)])
    guess = ((images[test][:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == dataset.targets[test]).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(VTAB_MINI))
def test_every_vtab_mini_task(real_data: Path, task: str) -> None:
    dataset = load_dataset(real_data / "vtab-mini" / task)
    classes, train, test = VTAB_MINI[task]
    counted = [len(dataset.rows(split)) for split in ("train", "val", "test")]
    assert (len(dataset.outputs), counted[0] + counted[1], counted[2]) == (classes, train, test)
    assert counted[1] == train // 5
    assert len(np.unique(dataset.targets[dataset.rows("train")])) == classes
    assert load_image(dataset.file(0), Preprocess(size=28)).shape == (3, 28, 28)


@pytest.mark.slow
def test_counts_of_blood_cells(real_data: Path) -> None:
    names = ["rbc", "wbc", "platelets"]
    dataset = load_dataset(real_data / "bccd_count" / "counts.csv", task="regress", labels=names)
    assert (dataset.outputs, dataset.targets.shape) == (tuple(names), (364, 3))
    assert dataset.targets[:4].tolist() == [[19, 1, 0], [18, 1, 0], [15, 1, 0], [15, 1, 1]]
    assert dataset.fold is not None
    assert np.unique(dataset.fold).tolist() == [0, 1, 2, 3, 4]
    assert abs(len(dataset.rows("test")) - 73) <= 1
    assert abs(len(dataset.rows("val")) - 73) <= 1
