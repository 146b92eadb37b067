"""Near-duplicates across splits: a test image whose twin was trained on does not test.

Stored features name the candidates: the nearest training images by the pooled taps. A small picture of
each then decides, because features of two different cells or bottles may be as near as those of a copy:

    h = high-pass(32 x 32 grey picture),  centred, without what is common to many pictures
    near-duplicates: correlation of h at least 0.9, or the same bytes

Copies that were compressed, scaled or brightened are found; those that were turned grey are mostly,
crops by more than a few percent and mirror images are not. docs/log.md has what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sidetune.data.dataset import Dataset
from sidetune.data.pictures import DECODERS
from sidetune.errors import ImageError
from sidetune.keyed import generator
from sidetune.summary import Summary

TAPS = 4  # evenly spaced: early ones see pixels, late ones see what is shown
NEIGHBOURS = 3  # candidates an image
ALIKE = 0.3  # least similarity of a candidate's features: nearly all copies have more
SAME = 0.9  # least correlation of two pictures
SIDE = 64  # pixels
BLUR = 9  # pixels: what is broader is light and layout, not content
FITTED = 600  # training pictures that common ones are sought in
COMMON = 16  # principal pictures that are taken out: frames, bus bars, backgrounds
MAX_PAIRS = 2_000_000_000  # compared; a minute on two cores. Of more images a drawn share is checked

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """A validation or test image and its twin among the training images.

    Args:
        row: of the image.
        train_row: of its twin.
        similarity: correlation of the two pictures, 1 for the same bytes.
        identical: the same bytes.
    """

    row: int
    train_row: int
    similarity: float
    identical: bool


@dataclass(frozen=True)
class Leaks:
    """What `find_leaks` found.

    Args:
        pairs: one an image that has a twin, the most similar first.
        num_train: training images that were compared.
        num_others: validation and test images that were compared.
    """

    pairs: tuple[Pair, ...]
    num_train: int
    num_others: int

    def joined(self, more: Leaks) -> Leaks:
        """With the twins that some of the same images have among more training images.

        Args:
            more: of images that were compared here as well, with training images that were not.
        """
        best: dict[int, Pair] = {}
        for pair in (*self.pairs, *more.pairs):
            if pair.row not in best or pair.similarity > best[pair.row].similarity:
                best[pair.row] = pair
        return replace(self, pairs=_most_similar_first(best), num_train=self.num_train + more.num_train)


def find_leaks(
    dataset: Dataset,
    keys: Sequence[str],
    summary: Summary,
    train: NDArray[np.int64],
    others: NDArray[np.int64],
) -> Leaks:
    """Find validation and test images that have a near-duplicate in training.

    Args:
        dataset: whose pictures are compared; of a clip it is the one in its middle.
        keys: sample keys of every row: equal contents have equal sha256.
        summary: pooled taps of every row.
        train: rows that can be read.
        others: rows of validation and test that can be read.
    """
    found = {pair.row: pair for pair in _identical(keys, train, others)}
    num_identical = len(found)
    left = others[~np.isin(others, list(found))]
    most = max(1, MAX_PAIRS // max(len(train), 1))
    if len(left) > most:
        drawn = torch.randperm(len(left), generator=generator(0, "leaks"))[:most]
        left = np.sort(left[drawn.numpy()])
    candidates = _candidates(summary, train, left)
    found |= {pair.row: pair for pair in _same_pictures(dataset, candidates)}
    return Leaks(_most_similar_first(found), len(train), num_identical + len(left))


def _most_similar_first(found: Mapping[int, Pair]) -> tuple[Pair, ...]:
    return tuple(sorted(found.values(), key=lambda pair: (-pair.similarity, pair.row)))


def _identical(keys: Sequence[str], train: NDArray[np.int64], others: NDArray[np.int64]) -> list[Pair]:
    first: dict[str, int] = {}
    for row in train.tolist():
        first.setdefault(keys[row].rpartition("@")[2], row)
    pairs = []
    for row in others.tolist():
        twin = first.get(keys[row].rpartition("@")[2])
        if twin is not None:
            pairs.append(Pair(row, twin, 1.0, identical=True))
    return pairs


def _candidates(
    summary: Summary, train: NDArray[np.int64], others: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """(row, training row) of the nearest training images by features, where they are near at all."""
    if not len(train) or not len(others):
        return []
    features = _features(summary)
    trained, num = features[torch.from_numpy(train)], min(NEIGHBOURS, len(train))
    pairs = []
    block = max(1, 50_000_000 // len(train))  # 200 MB of similarities
    for first in range(0, len(others), block):
        rows = others[first : first + block]
        near = (features[torch.from_numpy(rows)] @ trained.T).topk(num, dim=1)
        for row, values, at in zip(rows.tolist(), near.values.tolist(), near.indices.tolist(), strict=True):
            pairs += [
                (row, int(train[column])) for value, column in zip(values, at, strict=True) if value >= ALIKE
            ]
    return pairs


def _features(summary: Summary) -> Tensor:
    """(n, F): means of a few taps, each centred and of unit length, so that no tap outweighs another."""
    taps = sorted({round(at) for at in np.linspace(1, len(summary.spec), TAPS + 1)[1:]})
    parts: list[Tensor] = []
    for tap in taps:
        mean = summary.mean[tap - 1].float()
        parts.append(functional.normalize(mean - mean.mean(0), dim=-1))
    return torch.cat(parts, -1) / math.sqrt(len(parts))


def _same_pictures(dataset: Dataset, candidates: Sequence[tuple[int, int]]) -> list[Pair]:
    """The best candidate of each row, where their pictures are the same."""
    if not candidates:
        return []
    rows = sorted({row for pair in candidates for row in pair})
    own = np.empty((len(rows), SIDE * SIDE), np.float32)
    with ThreadPoolExecutor(DECODERS) as pool:
        for place, picture in enumerate(pool.map(partial(_picture, dataset), rows)):
            own[place] = picture
    training = np.flatnonzero(np.isin(rows, [twin for _, twin in candidates]))
    _take_out_common(own, training)
    at = {row: i for i, row in enumerate(rows)}
    best: dict[int, Pair] = {}
    for row, twin in candidates:
        similarity = float(own[at[row]] @ own[at[twin]])
        if similarity >= SAME and (row not in best or similarity > best[row].similarity):
            best[row] = Pair(row, twin, min(similarity, 1.0), identical=False)
    return list(best.values())


def _picture(dataset: Dataset, row: int) -> Floats:
    """(SIDE * SIDE,) high-pass grey pixels of unit length; zeros where the file cannot be read."""
    try:
        image = dataset.picture(row, at_least=4 * SIDE)
    except ImageError:  # it could be read when features were extracted
        return np.zeros(SIDE * SIDE, np.float32)
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    sharp = grey - scipy.ndimage.uniform_filter(grey, BLUR, mode="nearest")
    picture: Floats = _unit((sharp - sharp.mean()).reshape(1, -1))[0]
    return picture


def _take_out_common(pictures: Floats, training: NDArray[np.int64]) -> None:
    """Take from each picture, in place, what many training pictures share: mean and first principal ones.

    A principal picture that a few alone are made of is no common one: it is what copies share.
    """
    fitted = pictures[training[:: math.ceil(len(training) / FITTED)]]
    mean = fitted.mean(0)
    members, _, axes = np.linalg.svd(fitted - mean, full_matrices=False)
    num = min(COMMON, len(fitted) // 10)
    spread = 1.0 / np.square(np.square(members[:, :num])).sum(0)  # how many pictures share each
    axes = axes[:num][spread >= len(fitted) / 10]
    for first in range(0, len(pictures), FITTED):  # a block at a time: all of them are gigabytes
        centred = pictures[first : first + FITTED] - mean
        pictures[first : first + FITTED] = _unit(centred - (centred @ axes.T) @ axes)


def _unit(rows: Floats) -> Floats:
    """Rows of unit length; a picture without content stays zero and resembles nothing."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = np.where(length > 1e-3, rows / np.maximum(length, 1e-3), 0).astype(np.float32)
    return unit
