"""A CSV file as a dataset: ``path``, label columns, and optionally ``split``, ``group``, ``fold``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidetune.data.csv_file import Table, is_file, quoted, read_table
from sidetune.data.dataset import SPLIT_WORDS, Dataset, Split, TaskKind
from sidetune.data.splits import Carving, carve
from sidetune.errors import DataError, nearest

RESERVED = ("path", "split", "group", "fold")
DIGITS = 6  # of a fold's number
TRUTH = {"1": 1.0, "true": 1.0, "yes": 1.0, "0": 0.0, "false": 0.0, "no": 0.0, "": math.nan}


def read_csv_table(
    file: Path,
    *,
    task: TaskKind,
    labels: Sequence[str] | None = None,
    carving: Carving,
    to_train: bool = True,
) -> Dataset:
    """Read a CSV file, as `read_table` takes it.

    Columns: ``path``, relative to the CSV's folder or absolute; ``label``, or the columns named by
    `labels`; optionally ``split`` (train, val, test), ``group`` (never straddles splits) and ``fold``
    (integers, or empty where a row has none). Spaces around a cell do not count. classify takes the text of
    one column, and declares the classes of the training rows, sorted by name; multilabel takes 0/1,
    true/false, yes/no; regress takes numbers; an empty cell of these two is unlabelled. `load_dataset`
    says which splits are carved, and what `to_train` is.

    Raises:
        DataError: with the line number where there is one.
    """
    columns = _label_columns(task, labels)
    table = read_table(file, required=("path", *columns), optional=RESERVED)
    paths = _paths(table)
    split = _splits(table)
    targets, outputs = _targets(table, task, columns, split)
    dataset = Dataset(
        root=file.parent,
        paths=paths,
        task=task,
        targets=targets,
        outputs=outputs,
        split=split,
        group=_groups(table, split),
        fold=_folds(table),
    )
    given = set(split.tolist())
    # Whoever names val and not test has chosen to have no test split.
    missing: list[Split] = [] if "val" in given else ["val"] if "test" in given else ["val", "test"]
    dataset = carve(dataset, missing=missing, carving=carving)
    if to_train:
        _check_training(table, dataset)
    return dataset


def _label_columns(task: TaskKind, labels: Sequence[str] | None) -> tuple[str, ...]:
    columns = ("label",) if labels is None else tuple(label.strip() for label in labels)
    if not columns or len(set(columns)) != len(columns) or set(columns) & set(RESERVED):
        raise DataError(
            f"--labels is {','.join(columns)!r}; expected different columns, none of them "
            f"{', '.join(RESERVED)}. Type: --labels a,b"
        )
    if task == "classify" and len(columns) > 1:
        raise DataError(
            f"--task classify takes one label column, got {len(columns)}: {', '.join(columns)}. For K "
            "outputs of one network type --task multilabel (0/1 columns) or --task regress (numbers)"
        )
    return columns


def _paths(table: Table) -> tuple[Path, ...]:
    """Paths as written; two spellings of one path are the same image."""
    root = table.file.parent
    first: dict[str, int] = {}
    missing: list[int] = []
    for row, text in enumerate(table.columns["path"]):
        if not text:
            raise table.error(row, "path is empty; expected the path of an image")
        normal = os.path.normpath(root / text)
        if normal in first:
            raise table.error(
                row, f"{quoted(text)} is on line {table.lines[first[normal]]} already; keep one of the two"
            )
        first[normal] = row
        if not is_file(root / text):
            missing.append(row)
    if missing:
        raise table.error(
            missing[0],
            f"no file {quoted(table.columns['path'][missing[0]])} in {root.resolve()} ({len(missing)} of "
            f"{len(first)} are missing). Paths are relative to the CSV's folder, or absolute",
        )
    return tuple(Path(text) for text in table.columns["path"])


def _splits(table: Table) -> NDArray[np.str_]:
    """(n,) splits as given; all train where there is no such column."""
    words = table.columns.get("split", ["train"] * len(table.lines))
    for row, word in enumerate(words):
        if word.lower() not in SPLIT_WORDS:
            got = "split is empty; fill every row of the column, or remove it." if not word else ""
            raise table.error(row, f"{got or f'no split named {quoted(word)}.'}{nearest(word, SPLIT_WORDS)}")
    split = np.array([SPLIT_WORDS[word.lower()] for word in words], dtype="<U5")
    if not (split == "train").any():
        raise DataError(f"{table.file} has no row with split train; expected some to train on")
    return split


def _targets(
    table: Table, task: TaskKind, columns: tuple[str, ...], split: NDArray[np.str_]
) -> tuple[NDArray[np.int64] | NDArray[np.float32], tuple[str, ...]]:
    """Targets and the names of the outputs: (n,) and the classes, or (n, K) and the columns."""
    if task == "classify":
        return _classes(table, columns[0], split)
    return _numbers(table, columns, task), columns


def _classes(table: Table, column: str, split: NDArray[np.str_]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    labels = table.columns[column]
    for row, label in enumerate(labels):
        if not label:
            raise table.error(
                row,
                f"{column} is empty; expected a class name in every row. Remove the rows without one; or, if "
                f"the column is 0/1 or yes/no, type: --task multilabel --labels {column}, where an empty "
                "cell is unlabelled",
            )
    known = sorted({label for label, part in zip(labels, split, strict=True) if part == "train"})
    if len(known) < 2:
        raise DataError(
            f"{table.file} has one class in train, {quoted(known[0])}; classification needs at least two "
            "classes. Add rows of another, or give numbers with --task regress"
        )
    index = {label: k for k, label in enumerate(known)}
    for row, label in enumerate(labels):
        if label not in index:
            raise table.error(
                row,
                f"class {quoted(label)} is in {split[row]} but never in train, so nothing can learn it."
                f"{nearest(label, known)}",
            )
    return np.array([index[label] for label in labels], dtype=np.int64), tuple(known)


def _numbers(table: Table, columns: Sequence[str], task: TaskKind) -> NDArray[np.float32]:
    """(n, K) float32, NaN where a cell is empty."""
    targets = np.full((len(table.lines), len(columns)), math.nan, dtype=np.float32)
    for k, column in enumerate(columns):
        for row, text in enumerate(table.columns[column]):
            if task == "multilabel" and text.lower() not in TRUTH:
                raise table.error(
                    row,
                    f"{column} is {quoted(text)}; expected 0/1, true/false, yes/no, or empty for unlabelled",
                )
            number = TRUTH[text.lower()] if task == "multilabel" else _finite(text)
            if number is None:
                comma = " with a point, not a comma" if "," in text else ""
                raise table.error(
                    row,
                    f"{column} is {quoted(text)}; expected a finite number{comma}, or empty for unlabelled",
                )
            targets[row, k] = number
    return targets


def _finite(text: str) -> float | None:
    """The number, NaN for an empty cell, None for anything else."""
    if not text:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


def _groups(table: Table, split: NDArray[np.str_]) -> NDArray[np.str_] | None:
    if "group" not in table.columns:
        return None
    first: dict[str, int] = {}
    for row, group in enumerate(table.columns["group"]):
        if not group:
            raise table.error(row, "group is empty; fill every row of the column, or remove it")
        other = first.setdefault(group, row)
        if split[other] != split[row]:
            raise table.error(
                row,
                f"group {quoted(group)} is in {split[row]} here and in {split[other]} on line "
                f"{table.lines[other]}; a group belongs to one split",
            )
    return np.array(table.columns["group"], dtype=np.str_)


def _folds(table: Table) -> NDArray[np.int64] | None:
    if "fold" not in table.columns:
        return None
    for row, fold in enumerate(table.columns["fold"]):
        if fold and not (fold.isascii() and fold.isdecimal() and len(fold) <= DIGITS):
            raise table.error(
                row,
                f"fold is {quoted(fold)}; expected a whole number from 0 to 999999, or empty for test rows",
            )
    # whether a row needs one is known once the splits are: `given_folds` looks
    return np.array([int(fold or -1) for fold in table.columns["fold"]], dtype=np.int64)


def _check_training(table: Table, dataset: Dataset) -> None:
    """Every output must have something to learn in train, after carving too."""
    if dataset.task == "classify":
        return  # the classes are those of train, and carving keeps each there
    train = dataset.targets[dataset.rows("train")]
    for name, values, every in zip(dataset.outputs, train.T, dataset.targets.T, strict=True):
        known = np.unique(values[~np.isnan(values)])
        if not len(known):
            raise DataError(f"{table.file}: column {name!r} has no value in train; leave it out of --labels")
        if dataset.task == "multilabel" and len(known) == 1:
            everywhere = len(np.unique(every[~np.isnan(every)])) == 1
            drawn = " as it was drawn; give a split column, or another seed, or" if dataset.carved else ";"
            where, advice = ("the file", ";") if everywhere else ("train", drawn)
            raise DataError(
                f"{table.file}: column {name!r} is {known[0]:.0f} in every labelled row of {where}{advice} "
                "leave it out of --labels"
            )
