import shutil
from pathlib import Path

import pytest
import torch

from extracting import EXTRACT, FEW
from fitted_fleets import Fleet
from fitted_runs import FittedRuns
from images import make_folder
from sidetune.data import pictures as decoding


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 learnable images of 3 classes in class folders. Read only: all tests share it."""
    return make_folder(tmp_path_factory.mktemp("images"), 3, 60)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> FittedRuns:
    """Finished runs on `image_folder` with the toy backbone, made when first asked for. Read only."""
    return FittedRuns(tmp_path_factory.mktemp("runs"), image_folder)


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A finished run that six networks answer for. Read only."""
    return Fleet(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of 3 classes. Read only."""
    return make_folder(tmp_path_factory.mktemp("pictures"), 3, FEW, seed=7)


@pytest.fixture
def own(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the pictures that a test may change."""
    return Path(shutil.copytree(pictures, tmp_path / "own"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five records a shard, two a micro-batch."""
    monkeypatch.setattr(EXTRACT, "SHARD_RECORDS", 5)
    monkeypatch.setattr(decoding, "MICRO_BATCH", 2)
