"""VTAB-1K's layout on disk: four lists of ``images/<split>/000000.jpg <label>``.

As published with the benchmark (Zhai et al., 2019, arXiv 1910.04867).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidetune.data.csv_file import is_file, quoted
from sidetune.data.dataset import Dataset, Split
from sidetune.errors import DataError
from sidetune.files import read_json

DIGITS = 5  # of a label: each class between the largest and 0 has its output
UNION = "train800val200.txt"
LISTS: dict[Split, str] = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


@dataclass(frozen=True)
class VtabLine:
    """One line of a list: the image's path as written, its label, and where it stands."""

    path: Path
    label: int
    where: str

    @property
    def shown(self) -> str:
        """The path as an error repeats it."""
        return quoted(self.path.as_posix())[1:-1]


def is_vtab(root: Path) -> bool:
    """Whether a folder has VTAB's layout."""
    return (root / UNION).is_file()


def read_vtab(root: Path) -> Dataset:
    """Read a task: train800 as train, val200 as val, test as test, with paths as the lists write them.

    Class names come from ``classes`` in ``info.json`` where there is one, else they are the numbers
    0..K-1, K the largest label of any list + 1. A class may be missing from train: with 1000 images
    of 397 classes that happens in the published benchmark too.

    Raises:
        DataError: a list or an image is missing, a line is malformed or leaves the folder, an image is
            listed twice, the lists disagree, or ``info.json`` names too few classes.
    """
    lists: dict[Split, list[VtabLine]] = {split: read_list(root, name) for split, name in LISTS.items()}
    _check_union(read_list(root, UNION), lists["train"] + lists["val"])
    lines = [line for each in lists.values() for line in each]
    _check_files(root, lines)
    return Dataset(
        root=root,
        paths=tuple(line.path for line in lines),
        task="classify",
        targets=np.array([line.label for line in lines], dtype=np.int64),
        outputs=_class_names(root, 1 + max(line.label for line in lines)),
        split=np.array([split for split, each in lists.items() for _ in each], dtype="<U5"),
    )


def read_list(root: Path, name: str) -> list[VtabLine]:
    """The lines of a list, in its order; images are not looked for.

    Args:
        root: of the task.
        name: of the list, as ``test.txt``.

    Raises:
        DataError: it is missing or empty, or a line is malformed.
    """
    file = root / name
    if not file.is_file():
        raise DataError(f"{root} has no {name}; expected {', '.join((UNION, *LISTS.values()))}")
    lines = [
        _parse(line, f"{name}, line {number}")
        for number, line in enumerate(_text(file).splitlines(), start=1)
        if line.strip()
    ]
    if not lines:
        raise DataError(f"{file} is empty; expected lines 'images/<split>/000000.jpg <label>'")
    return lines


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise DataError(
            f"{file.name}, line {line}: is not UTF-8 text: got byte 0x{error.object[error.start]:02x}. "
            "Write it again as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Mend that, or its rights") from error


def _parse(line: str, where: str) -> VtabLine:
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2 or not (parts[1].isascii() and parts[1].isdecimal() and len(parts[1]) <= DIGITS):
        raise DataError(
            f"{where}: got {quoted(line)}, expected 'images/<split>/000000.jpg <label>' with a label 0, 1, "
            f"2, .. of at most {DIGITS} digits"
        )
    path = Path(parts[0].strip())
    if path.is_absolute() or Path(os.path.normpath(path)).parts[:1] == (os.pardir,):
        raise DataError(f"{where}: {quoted(parts[0])} leaves the task's folder; expected a path inside it")
    return VtabLine(path, int(parts[1]), where)


def _check_union(union: list[VtabLine], parts: list[VtabLine]) -> None:
    """The 1000 images are the 800 and the 200: by path, or by label where each list has its own folder."""
    whole = {(line.path, line.label) for line in union}
    both = {(line.path, line.label) for line in parts}
    if {path for path, _ in whole} & {path for path, _ in both}:
        same, odd = whole == both, sorted(whole ^ both)
        example = f": {odd[0][0].as_posix()} {odd[0][1]} is on one side only" if odd else ""
    else:
        same, example = Counter(line.label for line in union) == Counter(line.label for line in parts), ""
    if not same:
        raise DataError(
            f"{UNION} does not hold the images and labels of {LISTS['train']} and {LISTS['val']} "
            f"together{example}. Write it again as these two lists joined"
        )


def _check_files(root: Path, lines: list[VtabLine]) -> None:
    first: dict[Path, str] = {}
    for line in lines:
        if line.path in first:
            raise DataError(f"{line.shown} is listed twice: {first[line.path]} and {line.where}")
        first[line.path] = line.where
    missing = [line for line in lines if not is_file(root / line.path)]
    if missing:
        raise DataError(
            f"{missing[0].where}: {missing[0].shown} is not in {root} ({len(missing)} of "
            f"{len(lines)} images are missing)"
        )


def _class_names(root: Path, count: int) -> tuple[str, ...]:
    file = root / "info.json"
    try:
        info = read_json(file) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {error.lineno}: not JSON: {error.msg}. Mend it, or remove it"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not JSON: {error}. Mend it, or remove it") from error
    names = info.get("classes") if isinstance(info, dict) else None
    if names is None:
        return tuple(str(label) for label in range(count))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: 'classes' is no list of names; expected {count} texts, or no 'classes'")
    if len(names) < count or len(set(names)) != len(names):
        raise DataError(
            f"{file} names {len(set(names))} different classes, but the lists have labels up to {count - 1}; "
            f"expected {count} different names, or no 'classes'"
        )
    return tuple(names)
