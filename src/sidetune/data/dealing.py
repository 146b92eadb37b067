"""Samples, or whole groups of them, into folds: strata as even as can be. See `sidetune.data.folds`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TRIES = 20  # orders of the groups, until one leaves every class in two folds
PASSES = 20  # over the groups: each moves to a better fold while there is one


def deal_rows(stratum: NDArray[np.int64], num_folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """In turn through shuffled strata of shuffled samples: neighbours in a stratum are in different folds."""
    order = rng.permutation(len(stratum))
    shuffled = rng.permutation(int(stratum.max()) + 1)
    order = order[np.argsort(shuffled[stratum[order]], kind="stable")]
    fold = np.empty(len(stratum), dtype=np.int64)
    fold[order] = rng.permutation(num_folds)[np.arange(len(stratum)) % num_folds]
    return fold


def deal_groups(
    stratum: NDArray[np.int64], groups: NDArray[np.str_], num_folds: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Greedy over groups, again in other orders while a stratum that could be in two folds is in one."""
    _, group = np.unique(groups, return_inverse=True)
    dealing = _Dealing(stratum, group, num_folds)
    sizes = np.bincount(group)
    best: tuple[int, NDArray[np.int64]] | None = None
    for attempt in range(TRIES):
        order = rng.permutation(len(sizes))
        if attempt == 0:
            order = order[np.argsort(-sizes[order], kind="stable")]
        alone, fold_of = dealing.deal(order)
        if best is None or alone < best[0]:
            best = alone, fold_of
        if not alone:
            break
    assert best is not None
    return rng.permutation(num_folds)[best[1]][group].astype(np.int64)


class _Dealing:
    """Groups going into folds; what the folds hold of each stratum so far.

    Args:
        stratum: (n,) of each sample.
        group: (n,) of each sample, numbered from 0 without gaps.
        num_folds: F.
    """

    def __init__(self, stratum: NDArray[np.int64], group: NDArray[np.int64], num_folds: int) -> None:
        rows = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
        # of each group: its strata, and how many samples it has of each
        self.parts = [np.unique(stratum[samples], return_counts=True) for samples in rows]
        self.sizes = np.array([len(samples) for samples in rows])
        self.num_folds = num_folds
        self.weight = 1.0 / np.bincount(stratum)
        self.total_weight = len(self.weight) / len(stratum)
        groups_of = np.bincount(np.concatenate([codes for codes, _ in self.parts]))
        self.can_spread = groups_of > 1

    def deal(self, order: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
        """How many strata are in one fold that need not be, and the fold of each group."""
        self.samples = np.zeros((len(self.weight), self.num_folds))
        self.groups = np.zeros((len(self.weight), self.num_folds), dtype=np.int64)
        self.total = np.zeros(self.num_folds)
        self.members = np.zeros(self.num_folds, dtype=np.int64)
        fold_of = np.full(len(order), -1, dtype=np.int64)
        for left, one in zip(range(len(order), 0, -1), order, strict=True):
            empty = self.members == 0
            allowed = empty if left == empty.sum() else np.ones(self.num_folds, dtype=np.bool_)
            fold_of[one] = self._best(one, allowed)
            self._put(one, fold_of[one], 1)
        for _ in range(PASSES):
            if not sum(self._move(one, fold_of) for one in order):
                break
        return int((((self.groups > 0).sum(1) == 1) & self.can_spread).sum()), fold_of

    def _put(self, one: int, fold: int, sign: int) -> None:
        codes, counts = self.parts[one]
        self.samples[codes, fold] += sign * counts
        self.groups[codes, fold] += sign
        self.total[fold] += sign * self.sizes[one]
        self.members[fold] += sign

    def _costs(self, one: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """For each fold: strata that would be in it alone, and the part of the misfit that depends on it."""
        codes, counts = self.parts[one]
        inside = self.groups[codes] > 0
        alone = (inside & (inside.sum(1) == 1)[:, None]).sum(0)
        misfit = (self.weight[codes] * counts) @ self.samples[codes]
        return alone, misfit + self.total_weight * self.sizes[one] * self.total

    def _best(self, one: int, allowed: NDArray[np.bool_]) -> int:
        alone, misfit = self._costs(one)
        return int(np.lexsort((misfit, alone, ~allowed))[0])

    def _move(self, one: int, fold_of: NDArray[np.int64]) -> bool:
        """Whether a group went to a better fold."""
        old = int(fold_of[one])
        if self.members[old] == 1:
            return False  # a fold must not run empty
        self._put(one, old, -1)
        alone, misfit = self._costs(one)
        new = int(np.lexsort((misfit, alone))[0])
        better = (alone[new], misfit[new]) < (alone[old], misfit[old] - 1e-9)  # equal but for rounding
        fold_of[one] = new if better else old
        self._put(one, int(fold_of[one]), 1)
        return bool(better)
