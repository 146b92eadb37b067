"""Folds: every sample is held out once, by the member that does not train on its fold.

    drawn    stratified as `sidetune.data.splits` stratifies, groups whole, sizes as equal as can be
    given    the ``fold`` column of a CSV

Folds are of the rows of train and val together; a test row is in no fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sidetune.data.dataset import Dataset
from sidetune.data.dealing import deal_groups, deal_rows
from sidetune.data.splits import stratify, torn_groups
from sidetune.errors import DataError, naming


def draw_folds(
    targets: NDArray[np.int64] | NDArray[np.float32],
    *,
    num_folds: int,
    seed: int,
    groups: NDArray[np.str_] | None = None,
    names: Sequence[str] = (),
) -> NDArray[np.int64]:
    """Draw folds, stratified by target.

    Strata: classes; for 0/1 columns a sample's rarest positive label; for numbers the deciles of the
    first column.

    Without groups the samples, a stratum after the other, are dealt out in turn. So the sizes of two folds
    differ by one sample at most, of any stratum too; a stratum of two samples or more is in two folds.
    The order of the samples counts (`dataset_folds` sorts them by path).

    With groups the largest come first, and each goes where its strata and its samples are missed most,

        sum over strata s of (n_sf - n_s / F)^2 / n_s  +  S (n_f - n / F)^2 / n,   S strata, F folds,

    then groups move one by one while that makes it less. A class that lies in one fold alone counts
    before all that. The order of the samples does not count.

    Args:
        targets: (n,) class indices, or (n, K) with NaN where unlabelled.
        num_folds: F, 2 or more.
        seed: of the draw.
        groups: (n,) group names; a group is whole in one fold.
        names: of the classes, for messages.

    Returns:
        (n,) fold of each sample, 0 .. F - 1. No fold is empty.

    Raises:
        DataError: there are fewer samples or groups than folds, or a class would lie in one fold alone:
            while that is held out nothing could learn it.
    """
    classes = targets.astype(np.int64) if targets.ndim == 1 else None
    if classes is not None and num_folds >= 2:
        _check_classes(classes, groups, names)
    fold = _deal(stratify(targets), groups, num_folds, seed)
    if classes is not None:
        check_spread(classes, fold, names)
    return fold


def _deal(
    stratum: NDArray[np.int64], groups: NDArray[np.str_] | None, num_folds: int, seed: int
) -> NDArray[np.int64]:
    if num_folds < 2:
        raise DataError(f"got {num_folds} folds; expected 2 or more. Type: --folds 5")
    held = len(stratum) if groups is None else len(np.unique(groups))
    if held < num_folds:
        what = "samples of train and val" if groups is None else "groups in train and val"
        advice = f" Type: --folds {held}" if held > 1 else ""
        raise DataError(f"got {held} {what} for {num_folds} folds; expected one a fold at least.{advice}")
    rng = np.random.default_rng([seed, num_folds])
    if groups is None:
        return deal_rows(stratum, num_folds, rng)
    return deal_groups(stratum, groups, num_folds, rng)


def choose_folds(
    dataset: Dataset, rows: NDArray[np.int64], asked: int | Literal["column"], *, seed: int
) -> NDArray[np.int64]:
    """The folds that a recipe asks for: `dataset_folds` or `given_folds`.

    Args:
        dataset: as for these.
        rows: (n,) of train and val.
        asked: how many folds, or ``column``.
        seed: of the draw.

    Returns:
        (n,) fold of each of these rows.

    Raises:
        DataError: as these.
    """
    if asked == "column":
        return given_folds(dataset, rows)
    return dataset_folds(dataset, rows, num_folds=asked, seed=seed)


def dataset_folds(
    dataset: Dataset, rows: NDArray[np.int64], *, num_folds: int, seed: int
) -> NDArray[np.int64]:
    """`draw_folds` for rows of a dataset, drawn in order of their paths: how a table is sorted is no matter.

    Where the dataset has `strata`, folds are stratified by these, and rows without a class have a fold, too:
    so an image is in the same fold for every label column.

    Args:
        dataset: its targets, groups and names.
        rows: (n,) of train and val.
        num_folds: 2 or more.
        seed: of the draw.

    Returns:
        (n,) fold of each of these rows.

    Raises:
        DataError: as `draw_folds`.
    """
    by_path = np.argsort([dataset.paths[row].as_posix() for row in rows], kind="stable")
    ordered = rows[by_path]
    groups = None if dataset.group is None else dataset.group[ordered]
    fold = np.empty(len(rows), dtype=np.int64)
    if dataset.strata is None:
        targets = dataset.targets[ordered]
        fold[by_path] = draw_folds(
            targets, num_folds=num_folds, seed=seed, groups=groups, names=dataset.outputs
        )
        return fold
    fold[by_path] = _deal(stratify(dataset.strata[ordered]), groups, num_folds, seed)
    if dataset.task == "classify":
        named = dataset.targets[rows] >= 0
        classes = dataset.targets[rows][named].astype(np.int64)
        _check_classes(
            classes, None if dataset.group is None else dataset.group[rows][named], dataset.outputs
        )
        check_spread(classes, fold[named], dataset.outputs)
    return fold


def given_folds(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The folds that the ``fold`` column of a CSV gives.

    Args:
        dataset: with its column as read; -1 where a cell is empty.
        rows: (n,) of train and val. What the column says of test rows does not count.

    Returns:
        (n,) fold of each of these rows, numbered as in the CSV.

    Raises:
        DataError: there is no such column, a cell of these rows is empty, there is one fold alone, a group
            is in two folds, or a class in one alone.
    """
    if dataset.fold is None:
        raise DataError(
            f"{dataset.name or dataset.root} has no column 'fold'. Add one with a whole number in every row "
            "of train and val, or draw folds. Type: --folds 5"
        )
    fold = dataset.fold[rows]
    empty = rows[fold < 0]
    if len(empty):
        raise DataError(
            f"fold is empty for {len(empty)} of {len(rows)} rows of train and val (the first: "
            f"{dataset.paths[empty[0]]}); fill them, or draw folds. Type: --folds 5"
        )
    found = np.unique(fold)
    if len(found) < 2:
        raise DataError(
            f"column 'fold' has {', '.join(map(str, found)) or 'no number'} alone in train and val; expected "
            "2 folds or more. Number the rows, or draw folds. Type: --folds 5"
        )
    if dataset.group is not None:
        _check_groups(dataset.group[rows], fold)
    if dataset.task == "classify":
        check_spread(dataset.targets[rows].astype(np.int64), fold, dataset.outputs)
    return fold


def shared_folds(
    datasets: Mapping[str, Dataset], valid: NDArray[np.bool_], folds: int | Literal["column"], *, seed: int
) -> NDArray[np.int64]:
    """Folds of several label columns: an image is in the same one for each of them.

    Args:
        datasets: label column -> its dataset, all of the same N rows. Where there is one, its name is empty.
        valid: (N,) rows that can be read.
        folds: as `choose_folds` takes them.
        seed: likewise.

    Returns:
        (N,) the fold of each row, -1 where it is never held out.

    Raises:
        DataError: as `choose_folds`, with the column.
    """
    fold_N = np.full(len(valid), -1)
    for column, dataset in datasets.items():
        may = (dataset.split != "test") & valid
        if folds == "column" and dataset.labelled is not None:
            may &= dataset.labelled  # drawn ones are for all: they do not hang on who else is asked for
        rows = np.flatnonzero(may)
        with naming(column):
            fold_N[rows] = choose_folds(dataset, rows, folds, seed=seed)
    return fold_N


def own_folds(datasets: Mapping[str, Dataset], *, must: bool = False) -> int:
    """How many folds the ``fold`` column of a CSV gives its rows outside test; 0 where it cannot be used.

    Args:
        datasets: as for `shared_folds`.
        must: that it cannot be used is an error.

    Raises:
        DataError: `must`, and as `shared_folds`.
    """
    every = np.ones(len(next(iter(datasets.values()))), dtype=np.bool_)
    try:
        fold_N = shared_folds(datasets, every, "column", seed=0)
    except DataError:
        if must:
            raise
        return 0
    return len(np.unique(fold_N[fold_N >= 0]))


def check_spread(targets: NDArray[np.int64], fold: NDArray[np.int64], names: Sequence[str]) -> None:
    """Every class must be in two folds or more.

    Args:
        targets: (n,) class indices.
        fold: (n,) folds.
        names: of the classes; () where they have none.

    Raises:
        DataError: a class is in one fold alone.
    """
    pairs = np.unique(np.stack([targets, fold]), axis=1)
    classes, folds = np.unique(pairs[0], return_counts=True)
    alone = classes[folds == 1]
    if len(alone):
        where = int(pairs[1][pairs[0] == alone[0]][0])
        more = _more(len(alone), "are in one fold")
        raise DataError(
            f"class {_name(alone[0], names)} is in fold {where} alone{more}: while it is held out nothing "
            "can learn the class. Give images of it in other groups or folds, or leave the class out"
        )


def _check_classes(targets: NDArray[np.int64], groups: NDArray[np.str_] | None, names: Sequence[str]) -> None:
    """A class of one image, or of one group, cannot be in two folds whatever is drawn."""
    classes, counts = np.unique(targets, return_counts=True)
    single = classes[counts == 1]
    if len(single):
        raise DataError(
            f"class {_name(single[0], names)} has 1 image in train and val; folds need at least 2 of each "
            f"class{_more(len(single), 'have 1')}. Add images, or leave the class out and type again"
        )
    if groups is None:
        return
    pairs = np.unique(np.stack([targets, np.unique(groups, return_inverse=True)[1]]), axis=1)
    classes, counts = np.unique(pairs[0], return_counts=True)
    single = classes[counts == 1]
    if len(single):
        group, more = str(groups[targets == single[0]][0]), _more(len(single), "are in one group")
        raise DataError(
            f"class {_name(single[0], names)} is in one group, {group!r}; a group is whole in one fold, so "
            f"each class needs at least 2 groups{more}. Give images of it in another group, or leave the "
            "class out"
        )


def _check_groups(groups: NDArray[np.str_], fold: NDArray[np.int64]) -> None:
    torn = torn_groups(groups, fold)
    if len(torn):
        folds = np.unique(fold[groups == torn[0]])
        raise DataError(
            f"group {str(torn[0])!r} is in folds {folds[0]} and {folds[1]}"
            f"{_more(len(torn), 'are in several', 'groups')}; a group belongs to one fold. Renumber its "
            "rows, or draw folds, which keeps groups whole. Type: --folds 5"
        )


def _name(code: int, names: Sequence[str]) -> str:
    return repr(names[code]) if len(names) else str(code)


def _more(count: int, verb: str, what: str = "classes") -> str:
    return f" ({count - 1} more {what} {verb})" if count > 1 else ""
