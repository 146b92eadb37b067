"""Seeded stratified splits: which samples leave the training split for validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sidetune.data.dataset import Dataset, Split
from sidetune.errors import DataError

REGRESSION_BINS = 10  # deciles of the first target
SAMPLES_A_BIN = 5  # fewer bins where they would hold less


@dataclass(frozen=True)
class Carving:
    """How missing splits are carved out of the training samples.

    Args:
        val: share of the training samples, before anything is carved, that becomes val.
        test: the same for test.
        seed: of the draw.

    Raises:
        DataError: a share is below 0, or nothing would be left to train on.
    """

    val: float = 0.2
    test: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test < 1):
            raise DataError(
                f"val_fraction is {self.val} and test_fraction {self.test}; expected 0 or more each, and "
                "less than 1 together"
            )


def carve(dataset: Dataset, *, missing: Sequence[Split], carving: Carving) -> Dataset:
    """Move training samples into the splits that are missing, test first.

    Groups stay whole. Without a test split the folds do that the data have of their own: there each sample is
    tested by its fold. Samples are drawn in order of their paths, so the order of a CSV's rows does not
    matter.

    Raises:
        DataError: a class, or the set of groups, is too small for that many splits.
    """
    shares: dict[Split, float] = {"test": carving.test, "val": carving.val}
    wanted = [name for name, share in shares.items() if name in missing and share > 0]
    rows = dataset.rows("train")
    rows = rows[np.argsort([dataset.paths[row].as_posix() for row in rows], kind="stable")]
    _check_sizes(dataset, rows, wanted)
    no_test = not carving.test and not len(dataset.rows("test"))
    whole = _by_fold(dataset) if no_test else dataset.group
    split = dataset.split.astype("<U5")
    left = 1.0
    for name in wanted:
        groups = None if whole is None else whole[rows]
        fraction = shares[name] / left
        drawn = stratified_split(dataset.targets[rows], fraction=fraction, seed=carving.seed, groups=groups)
        split[rows[drawn]] = name
        rows = rows[~drawn]
        left -= shares[name]
    return replace(dataset, split=split, carved=tuple(sorted(wanted)))


def _by_fold(dataset: Dataset) -> NDArray[np.str_] | None:
    """Folds as groups, a sample without one alone; the groups where there are no folds or they tear one."""
    if dataset.fold is None:
        return dataset.group
    fold = np.where(dataset.fold < 0, -1 - np.arange(len(dataset.fold)), dataset.fold)
    if len(np.unique(fold)) < 2:
        return dataset.group
    if dataset.group is not None and len(torn_groups(dataset.group, fold)):
        return dataset.group
    return fold.astype(np.str_)


def torn_groups(groups: NDArray[np.str_], fold: NDArray[np.int64]) -> NDArray[np.str_]:
    """Names of the groups that are in several folds."""
    names, group = np.unique(groups, return_inverse=True)
    pairs = np.unique(np.stack([group, fold]), axis=1)
    return names[np.bincount(pairs[0]) > 1]


def _check_sizes(dataset: Dataset, rows: NDArray[np.int64], wanted: Sequence[Split]) -> None:
    needed = 1 + len(wanted)
    sides = ", ".join(["train", *sorted(wanted, reverse=True)])
    if dataset.group is not None and wanted:
        found = len(np.unique(dataset.group[rows]))
        if found < needed:
            raise DataError(f"got {found} groups; expected at least {needed}, one each for {sides}")
    elif dataset.task == "classify" and wanted:
        num_classes = len(dataset.outputs)  # a target past them stands for no class
        counts = np.bincount(dataset.targets[rows].astype(np.int64), minlength=num_classes)[:num_classes]
        few = np.flatnonzero(counts < needed)
        if len(few):
            count = int(counts[few[0]])
            more = f" ({len(few) - 1} more classes have too few)" if len(few) > 1 else ""
            raise DataError(
                f"class {dataset.outputs[few[0]]!r} has {count} image{'s' * (count != 1)}; each class needs "
                f"at least {needed} ({sides}){more}. Add images, or give the splits yourself"
            )
    elif len(rows) < needed:
        raise DataError(f"got {len(rows)} training samples; expected at least {needed} ({sides})")


def stratified_split(
    targets: NDArray[np.int64] | NDArray[np.float32],
    *,
    fraction: float,
    seed: int,
    groups: NDArray[np.str_] | None = None,
) -> NDArray[np.bool_]:
    """Draw a share of the samples, stratified by target.

    Strata: classes; for 0/1 columns a sample's rarest positive label; for numbers the deciles of the
    first column. Without groups each stratum gives its share, rounded by largest remainder, and one of
    two samples or more is on both sides; a stratum of one sample stays. With groups, whole groups are
    taken in a seeded order while that brings strata and total nearer to their shares (the smallest
    misfit is taken where none does); every class stays on the side that is not drawn. With groups the
    result does not depend on the order of the samples; without, it does (`carve` sorts them by path).

    Args:
        targets: (n,) class indices, or (n, K) with NaN where unlabelled.
        fraction: share to draw, between 0 and 1.
        seed: of the draw.
        groups: (n,) group names; a group is drawn whole or not at all.

    Returns:
        (n,) bool, True where drawn.

    Raises:
        DataError: the fraction is out of range, or nothing can be drawn.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the fraction to split off is {fraction}; expected more than 0 and less than 1")
    strata = stratify(targets)
    rng = np.random.default_rng(seed)
    if groups is None:
        drawn = _draw_rows(strata, fraction, rng)
    else:
        drawn = _draw_groups(strata, groups, fraction, rng, keep_strata=targets.ndim == 1)
    if not drawn.any():
        held = f"{len(targets)} samples" if groups is None else f"{len(np.unique(groups))} groups"
        raise DataError(
            f"no split of {held} leaves every class in train. Give more samples of each class"
            + (", in more groups" if groups is not None else "")
        )
    return drawn


def stratify(targets: NDArray[np.int64] | NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) stratum of each sample, numbered from 0 without gaps."""
    if targets.ndim == 1:
        raw = targets
    elif np.isin(targets[~np.isnan(targets)], (0, 1)).all():
        positive = targets == 1
        rarest_first = np.argsort(positive.sum(0), kind="stable")
        raw = np.where(positive.any(1), positive[:, rarest_first].argmax(1), targets.shape[1])
    else:
        first = targets[:, 0]
        known = first[~np.isnan(first)]
        bins = max(1, min(REGRESSION_BINS, len(known) // SAMPLES_A_BIN))
        edges = np.quantile(known, np.arange(1, bins) / bins) if len(known) else known
        raw = np.where(np.isnan(first), bins, np.searchsorted(edges, first, side="right"))
    return np.unique(raw, return_inverse=True)[1].astype(np.int64)


def _draw_rows(strata: NDArray[np.int64], fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    counts = np.bincount(strata)
    exact = fraction * counts
    take = np.floor(exact).astype(np.int64)
    short = round(float(exact.sum())) - int(take.sum())
    shuffled = rng.permutation(len(counts))  # breaks ties between equal remainders
    largest = shuffled[np.argsort(-(exact - take)[shuffled], kind="stable")]
    take[largest[: max(0, short)]] += 1
    take = np.clip(take, np.minimum(1, counts - 1), counts - 1)
    order = rng.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(counts) - counts, counts)
    drawn = np.zeros(len(strata), dtype=np.bool_)
    drawn[order[rank < np.repeat(take, counts)]] = True
    return drawn


def _draw_groups(
    strata: NDArray[np.int64],
    groups: NDArray[np.str_],
    fraction: float,
    rng: np.random.Generator,
    *,
    keep_strata: bool,
) -> NDArray[np.bool_]:
    """Greedy over groups: squared distance to the shares, each stratum over its size, and the total."""
    _, group = np.unique(groups, return_inverse=True)
    rows = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    sizes = np.append(np.bincount(strata), len(strata))  # one column a stratum, the total last
    wanted, left = fraction * sizes, sizes.copy()
    drawn = np.zeros(len(strata), dtype=np.bool_)
    spare: tuple[float, int] | None = None
    for one in rng.permutation(len(rows)):
        codes, counts = np.unique(strata[rows[one]], return_counts=True)
        codes, counts = np.append(codes, len(sizes) - 1), np.append(counts, len(rows[one]))
        kept = slice(None) if keep_strata else slice(-1, None)
        if (left[codes] <= counts)[kept].any():
            continue
        gain = float(((2 * wanted[codes] - counts) * counts / sizes[codes]).sum())
        if gain > 0 and 2 * wanted[-1] > counts[-1]:  # the total must come nearer by itself, too
            wanted[codes] -= counts
            left[codes] -= counts
            drawn[rows[one]] = True
        elif spare is None or gain > spare[0]:
            spare = (gain, int(one))
    if not drawn.any() and spare is not None:
        drawn[rows[spare[1]]] = True  # every group is more than twice the share: the least bad one
    return drawn
