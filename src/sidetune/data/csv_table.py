"""A CSV file as a dataset: ``path``, label columns, and optionally ``split``, ``group``, ``fold``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidetune.data.clips import CLIP_SUFFIXES, is_clip
from sidetune.data.csv_file import Table, is_file, quoted, read_table
from sidetune.data.dataset import SPLIT_WORDS, Dataset, Split, TaskKind
from sidetune.data.splits import Carving, carve
from sidetune.errors import DataError, nearest

RESERVED = ("path", "split", "group", "fold")
DIGITS = 6  # of a fold's number
OR_NUMBERS = "give numbers with --task regress"
TRUTH = {"1": 1.0, "true": 1.0, "yes": 1.0, "0": 0.0, "false": 0.0, "no": 0.0, "": math.nan}


def read_csv_table(
    file: Path,
    *,
    task: TaskKind,
    labels: Sequence[str] | None = None,
    split_by: str | None = None,
    carving: Carving,
    to_train: bool = True,
    clips: bool = False,
) -> Dataset:
    """Read a CSV file, as `read_table` takes it.

    Columns: ``path``, relative to the CSV's folder or absolute; ``label``, or the columns named by
    `labels`; optionally ``split`` (train, val, test), ``group`` (never straddles splits) and ``fold``
    (integers, or empty where a row has none). Spaces around a cell do not count. classify takes the text of
    one column, and declares the classes of the training rows, sorted by name; multilabel takes 0/1,
    true/false, yes/no; regress takes numbers. An empty cell is unlabelled. `load_dataset` says which splits
    are carved, and what `split_by`, `to_train` and `clips` are.

    Raises:
        DataError: with the line number where there is one.
    """
    columns = _label_columns(task, labels)
    if task == "classify":
        how: dict[str, Any] = {"split_by": split_by, "carving": carving, "to_train": to_train, "clips": clips}
        return read_csv_columns(file, labels=columns, **how)[0]
    table = read_table(file, required=_needed(columns, split_by), optional=RESERVED)
    bare = _bare(table, task, clips)
    targets = _numbers(table, columns, task)
    if split_by is None:
        dataset = replace(bare, targets=targets, outputs=columns)
        dataset = carve(dataset, missing=_missing(dataset), carving=carving)
    else:
        drawn, strata = _carved_by(table, bare, split_by.strip(), carving)
        dataset = replace(drawn, task=task, targets=targets, outputs=columns, strata=strata)
    if to_train:
        _check_training(table, dataset)
    return dataset


def read_csv_columns(
    file: Path,
    *,
    labels: Sequence[str],
    split_by: str | None = None,
    carving: Carving,
    to_train: bool = True,
    clips: bool = False,
) -> tuple[Dataset, ...]:
    """Read class columns of a CSV file: a `Dataset` a column, of the same rows and splits.

    As `read_csv_table` for classify. Splits that are missing are carved once, stratified by the column
    `split_by`, the first where that is None; rows without a class in it are a stratum of their own.

    Raises:
        DataError: with the line number where there is one, and the column.
    """
    columns = _distinct(labels)
    split_by = columns[0] if split_by is None else split_by.strip()
    table = read_table(file, required=_needed(columns, split_by), optional=RESERVED)
    bare = _bare(table, "classify", clips)
    drawn, strata = _carved_by(table, bare, split_by, carving)
    datasets = []
    for column in columns:
        targets, outputs = _classes(table, column, bare.split)
        own = np.array_equal(strata, targets)  # nothing to remember: strata are the classes
        datasets.append(
            replace(
                drawn,
                targets=targets,
                outputs=outputs,
                labelled=None if (targets >= 0).all() else targets >= 0,
                strata=None if own else strata,
            )
        )
        if to_train:
            _check_column(table, column, datasets[-1])
    return tuple(datasets)


def _needed(columns: Sequence[str], split_by: str | None) -> list[str]:
    """Columns that must be there, each once."""
    return list(dict.fromkeys(["path", *columns, *([] if split_by is None else [split_by.strip()])]))


def _carved_by(
    table: Table, bare: Dataset, column: str, carving: Carving
) -> tuple[Dataset, NDArray[np.int64]]:
    """With the splits that were missing, and the strata that a class column makes: (n,)."""
    targets, outputs = _classes(table, column, bare.split)
    strata = np.where(targets < 0, len(outputs), targets)
    by_class = replace(bare, task="classify", targets=strata, outputs=outputs)
    return carve(by_class, missing=_missing(bare), carving=carving), strata


def _bare(table: Table, task: TaskKind, clips: bool) -> Dataset:
    """Everything but targets."""
    paths, split = _paths(table, clips), _splits(table)
    return Dataset(
        root=table.file.parent,
        paths=paths,
        task=task,
        targets=np.zeros(0, dtype=np.int64),
        outputs=(),
        split=split,
        group=_groups(table, split),
        fold=_folds(table),
        clips=clips,
    )


def _missing(dataset: Dataset) -> list[Split]:
    """The splits to carve. Whoever names val and not test has chosen to have no test split."""
    given = set(dataset.split.tolist())
    return [] if "val" in given else ["val"] if "test" in given else ["val", "test"]


def _label_columns(task: TaskKind, labels: Sequence[str] | None) -> tuple[str, ...]:
    columns = _distinct(("label",) if labels is None else labels)
    if task == "classify" and len(columns) > 1:
        raise DataError(
            f"a dataset has one class column, got {len(columns)}: {', '.join(columns)}. Type: sidetune fit, "
            "which trains a network a column, or, in Python, sidetune.fit_columns(..); for K outputs of one "
            "network --task multilabel (0/1 columns) or --task regress (numbers)"
        )
    return columns


def _distinct(labels: Sequence[str]) -> tuple[str, ...]:
    columns = tuple(label.strip() for label in labels)
    if not columns or len(set(columns)) != len(columns) or set(columns) & set(RESERVED):
        raise DataError(
            f"--labels is {','.join(columns)!r}; expected different columns, none of them "
            f"{', '.join(RESERVED)}. Type: --labels a,b"
        )
    return columns


def _paths(table: Table, clips: bool) -> tuple[Path, ...]:
    """Paths as written; two spellings of one path are the same sample. A clip may be a folder of frames."""
    root = table.file.parent
    first: dict[str, int] = {}
    missing: list[int] = []
    for row, text in enumerate(table.columns["path"]):
        if not text:
            raise table.error(row, f"path is empty; expected the path of {'a clip' if clips else 'an image'}")
        normal = os.path.normpath(root / text)
        if normal in first:
            raise table.error(
                row, f"{quoted(text)} is on line {table.lines[first[normal]]} already; keep one of the two"
            )
        first[normal] = row
        if not is_file(root / text, or_folder=clips):
            missing.append(row)
        elif clips and not is_clip(root / text):
            raise table.error(
                row,
                f"{quoted(text)} is no clip, expected a folder of frames alone or a file "
                f"({' '.join(sorted(CLIP_SUFFIXES))}). For images leave --frames out",
            )
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


def _classes(table: Table, column: str, split: NDArray[np.str_]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """(n,) class indices, -1 for an empty cell, and the classes of train."""
    labels = table.columns[column]
    known = sorted({label for label, part in zip(labels, split, strict=True) if part == "train" and label})
    if len(known) < 2:
        found = f"one class in train, {quoted(known[0])}" if known else "no class in train"
        raise DataError(
            f"{table.file}: column {column!r} has {found}; classification needs at least two classes. Add "
            f"rows of another, leave the column out, or {OR_NUMBERS}"
        )
    index = {label: k for k, label in enumerate(known)} | {"": -1}
    for row, label in enumerate(labels):
        if label not in index:
            raise table.error(
                row,
                f"class {quoted(label)} of column {column!r} is in {split[row]} but never in train, so "
                f"nothing can learn it.{nearest(label, known)}",
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


def _check_column(table: Table, column: str, dataset: Dataset) -> None:
    """Every class of a column is in train, and the column in val: carving looked at the first alone."""
    drawn = " as it was drawn; give a split column, or another data.split_seed" if dataset.carved else ""
    missing = set(range(len(dataset.outputs))) - set(dataset.targets[dataset.rows("train")].tolist())
    if missing:
        name = dataset.outputs[min(missing)]
        raise DataError(
            f"{table.file}: class {quoted(name)} of column {column!r} is not in train{drawn}. Add images of "
            "it, or leave it out"
        )
    if (dataset.split == "val").any() and not len(dataset.rows("val")):
        raise DataError(
            f"{table.file}: column {column!r} has no class in val{drawn}. Add some, or leave the column out"
        )
