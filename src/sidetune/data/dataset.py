"""`Dataset`: a table of samples, whatever the files on disk looked like.

Folders, VTAB lists and CSV files all end as one `Dataset`: paths, targets, splits, groups. Labels
and splits are never part of a feature store: relabelling a dataset does not re-extract it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sidetune.data.clips import folder_digest, middle_frame
from sidetune.data.preprocess import is_regular, open_image

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
# The words that folders and CSV files may use for them.
SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
TaskKind = Literal["classify", "multilabel", "regress"]


@dataclass(frozen=True)
class Dataset:
    """Samples with targets and splits, in a fixed order.

    Args:
        root: the folder that relative paths are relative to.
        paths: as read from the folder or list: relative to root, or absolute.
        task: what the targets are.
        targets: classify: (n,) int64 class indices, -1 where unlabelled. multilabel: (n, K) float32 of 0
            and 1, NaN where unlabelled. regress: (n, K) float32, NaN where unlabelled.
        outputs: K names: class names, or the label columns.
        split: (n,) of "train", "val" and "test".
        group: (n,) group names; a group never straddles splits. None where there are none.
        fold: (n,) fold numbers as the CSV gives them, -1 where a cell is empty. None where there are none.
        carved: the splits that the data did not have and that were drawn from its training samples.
        ignored: visible files beside the images that were left out because they are no images.
        clips: the samples are clips: videos, animations, or folders of frames. Else images.
        name: what people call it: the folder's name, or the table's without its ending; of one of several
            label columns ``table/column``.
        labelled: (n,) classify: which samples have a class in this label column. None: all.
        strata: (n,) what splits and folds are stratified by where that is not the targets: another column's
            classes, or these and, as one more, what is unlabelled. None: the targets.
    """

    root: Path
    paths: tuple[Path, ...]
    task: TaskKind
    targets: NDArray[np.int64] | NDArray[np.float32]
    outputs: tuple[str, ...]
    split: NDArray[np.str_]
    group: NDArray[np.str_] | None = None
    fold: NDArray[np.int64] | None = None
    carved: tuple[Split, ...] = ()
    ignored: int = 0
    clips: bool = False
    name: str = ""
    labelled: NDArray[np.bool_] | None = None
    strata: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The full path of a sample."""
        return self.root / self.paths[index]

    def picture(self, index: int, *, at_least: int | None = None) -> Image.Image:
        """A sample as people see it: the image, or the picture in the middle of a clip.

        Args:
            index: of the sample.
            at_least: pixels of an image's shorter side; see `open_image`.

        Raises:
            ImageError: it cannot be read.
        """
        file = self.file(index)
        return middle_frame(file) if self.clips else open_image(file, at_least=at_least)

    def rows(self, split: Split | Literal["all"]) -> NDArray[np.int64]:
        """Indices of a split's samples, or of all, ascending; without those that are not `labelled`."""
        inside = np.ones(len(self), dtype=np.bool_) if split == "all" else self.split == split
        if self.labelled is not None:
            inside = inside & self.labelled
        return np.flatnonzero(inside).astype(np.int64)

    def fingerprint(self, keys: tuple[str, ...]) -> str:
        """sha256 over sample keys, targets, output names and splits: what a run was fitted on."""
        digest = hashlib.sha256(repr((self.task, self.outputs)).encode())
        for key, target, split in zip(keys, self.targets, self.split, strict=True):
            digest.update(f"{key}|{target.tolist()}|{split}\n".encode())
        return digest.hexdigest()


def sample_key(path: Path, file: Path) -> str:
    """``relative/path.jpg@<sha256 of the file's bytes>``: an edited image has another key.

    A folder of frames has the sha256 over names and bytes of them all.

    Raises:
        OSError: the file cannot be read.
    """
    if file.is_dir():
        return f"{path.as_posix()}@{folder_digest(file)}"
    if not is_regular(file):
        raise OSError(f"{file} is a pipe, a socket or a device, not a file")
    with file.open("rb") as stream:
        return f"{path.as_posix()}@{hashlib.file_digest(stream, 'sha256').hexdigest()}"
