"""Datasets from folders, CSV files and VTAB lists, and the one preprocessing object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from sidetune.data.csv_table import read_csv_columns, read_csv_table
from sidetune.data.dataset import SPLITS, Dataset, Split, TaskKind, sample_key
from sidetune.data.folders import list_images, read_folders
from sidetune.data.preprocess import Preprocess, load_image, open_image
from sidetune.data.splits import Carving, stratified_split
from sidetune.data.vtab import is_vtab, read_vtab
from sidetune.errors import DataError, nearest, nearest_path

__all__ = [
    "SPLITS",
    "Carving",
    "Dataset",
    "Preprocess",
    "Split",
    "TaskKind",
    "list_images",
    "load_columns",
    "load_dataset",
    "load_datasets",
    "load_image",
    "open_image",
    "sample_key",
    "stratified_split",
]


def load_dataset(  # noqa: PLR0913 - each is a field of the recipe
    path: Path,
    *,
    task: TaskKind = "classify",
    labels: Sequence[str] | None = None,
    split_by: str | None = None,
    split_seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    to_train: bool = True,
    clips: bool = False,
) -> Dataset:
    """Read a dataset: a folder in VTAB's layout, another folder of class folders, or a CSV file.

    Splits that the data has are kept as they are. What is missing is carved out of the training
    samples, stratified, and group-disjoint where there are groups:

    - a folder without ``val`` gets one; a folder without ``test`` gets one;
    - a CSV without a ``split`` column, or with ``train`` alone in it, gets both;
    - a CSV with ``train`` and ``test`` gets ``val``;
    - a CSV with ``train`` and ``val`` keeps an empty test split: a fit reports validation only.

    Without a test split, and with `test_fraction` 0, the folds that a CSV has stay whole as groups do.

    `Dataset.carved` names the splits that were carved.

    Args:
        path: of the folder or the ``.csv`` file.
        task: what the targets are; folders can only ``classify``.
        labels: the label columns of a CSV, ``label`` if not given. An empty cell is unlabelled.
        split_by: the class column of a CSV that carved splits and drawn folds are stratified by; None: the
            targets.
        split_seed: draws the carved splits.
        val_fraction: share of the training samples, before anything is carved, that becomes val.
        test_fraction: the same for test.
        to_train: refuse a label column that teaches nothing, as one that is 0 in every row of train; False
            where the data are only scored.
        clips: the samples are videos, animations or folders of frames, not images.

    Raises:
        DataError: the data is not there, or is not what the task needs.
    """
    if task not in get_args(TaskKind):
        raise DataError(f"no task named {task!r}.{nearest(task, get_args(TaskKind))}")
    carving = Carving(val=val_fraction, test=test_fraction, seed=split_seed)
    if path.suffix.lower() == ".csv" and path.is_file():
        how: dict[str, Any] = {"split_by": split_by, "carving": carving, "to_train": to_train, "clips": clips}
        table = read_csv_table(path, task=task, labels=labels, **how)
        return replace(table, name=path.stem)
    if not path.is_dir():
        found = "a file that is no .csv" if path.exists() else "nothing there"
        near = "" if path.exists() else nearest_path(path)
        raise DataError(
            f"{path}: {found}, expected a folder of class folders, a folder with VTAB lists, or a .csv "
            f"file.{near} Type: sidetune fit FOLDER, or sidetune fit TABLE.csv"
        )
    if task != "classify" or labels is not None:
        asked = f"--task {task}" if task != "classify" else f"--labels {','.join(labels or ())}"
        raise DataError(
            f"{path} is a folder: its class folders are the labels, so only --task classify without --labels "
            f"is possible, got {asked}. Give a table: sidetune fit TABLE.csv --task {task} --labels a,b"
        )
    if split_by is not None:
        raise DataError(
            f"{path} is a folder, got data.split_by={split_by}; its splits are stratified by its classes. "
            "Leave it out, or give a table: sidetune fit TABLE.csv"
        )
    if is_vtab(path) and not clips:
        return replace(read_vtab(path), name=path.resolve().name)
    dataset = read_folders(path, carving=carving, clips=clips)
    return replace(dataset, name=path.resolve().name)


def load_columns(  # noqa: PLR0913 - each is a field of the recipe
    path: Path,
    *,
    labels: Sequence[str],
    split_by: str | None = None,
    split_seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    to_train: bool = True,
    clips: bool = False,
) -> tuple[Dataset, ...]:
    """Read several class columns of one CSV file: a `Dataset` a column, all of the same rows and splits.

    An empty cell means that the image is unlabelled in that column: its target is -1, and `Dataset.rows`
    leaves it out. Splits that the CSV does not have are carved once.

    Args:
        path: of the ``.csv`` file.
        labels: the columns, one or more.
        split_by: the column that carved splits and drawn folds are stratified by; None: the first.
        split_seed: draws the carved splits.
        val_fraction: share of the training rows, before anything is carved, that becomes val.
        test_fraction: the same for test.
        to_train: refuse a class that is not in train, and a column without a class in val.
        clips: the samples are clips.

    Returns:
        In the order of `labels`, each with the classes of its column, named ``table/column``.

    Raises:
        DataError: the data is not there, or a column is not what classifying needs.
    """
    if path.suffix.lower() != ".csv" or not path.is_file():
        raise DataError(
            f"{path} is no .csv file, got --labels {','.join(labels)}; label columns are those of a table. "
            f"Type: sidetune fit TABLE.csv --labels {','.join(labels)}"
        )
    carving = Carving(val=val_fraction, test=test_fraction, seed=split_seed)
    how: dict[str, Any] = {"split_by": split_by, "carving": carving, "to_train": to_train, "clips": clips}
    datasets = read_csv_columns(path, labels=labels, **how)
    names = [f"{path.stem}/{label.strip()}" for label in labels]
    return tuple(replace(dataset, name=name) for dataset, name in zip(datasets, names, strict=True))


def load_datasets(
    path: Path,
    *,
    task: TaskKind = "classify",
    labels: Sequence[str] | None = None,
    **how: Any,  # noqa: ANN401 - of several types
) -> tuple[Dataset, ...]:
    """A `Dataset` a network: of each column as `load_columns` where a CSV's classes stand in several.

    Args:
        path: as `load_dataset` takes it.
        task: likewise.
        labels: likewise; with classify any number of columns.
        how: the rest of its arguments.

    Raises:
        DataError: as these two.
    """
    if task == "classify" and labels is not None and len(labels) > 1:
        return load_columns(path, labels=labels, **how)
    return (load_dataset(path, task=task, labels=labels, **how),)
