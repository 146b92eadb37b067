"""Class folders: ``DATA/<class>/**/*.jpg``, or ``DATA/{train,val,test}/<class>/**/*.jpg``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidetune.data.clips import CLIP_SUFFIXES, is_clip
from sidetune.data.dataset import SPLIT_WORDS, Dataset, Split
from sidetune.data.splits import Carving, carve
from sidetune.errors import DataError, nearest

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
)
LAYOUT = "expected DATA/<class>/image.jpg, or DATA/{train,val,test}/<class>/image.jpg"


@dataclass(frozen=True)
class _Listing:
    """What one class folder holds: images as paths relative to DATA, and other visible files."""

    split: Split
    label: str
    images: list[Path]
    ignored: int


def read_folders(root: Path, *, carving: Carving, clips: bool = False) -> Dataset:
    """Read class folders. Classes are sorted by name, files by POSIX path.

    With `clips` a sample is a video, an animation, or a folder below its class's that holds frames itself.

    Hidden files and folders are passed over; other files that are not images are counted in
    `Dataset.ignored`. Linked files and folders are followed, each folder once a class.

    Raises:
        DataError: no class folders, fewer than two classes, an empty class, a class of val or test that
            train does not have, or folders that are partly splits and partly not.
    """
    splits = _split_folders(root)
    given = splits or {"train": root}
    listings = [
        _list_class(root, split, one, clips) for split, folder in given.items() for one in _folders(folder)
    ]
    outputs = _classes(root, listings)
    index = {name: k for k, name in enumerate(outputs)}
    samples = sorted(
        ((path, index[one.label], one.split) for one in listings for path in one.images),
        key=lambda sample: sample[0].as_posix(),
    )
    dataset = Dataset(
        root=root,
        paths=tuple(path for path, _, _ in samples),
        task="classify",
        targets=np.array([target for _, target, _ in samples], dtype=np.int64),
        outputs=outputs,
        split=np.array([split for _, _, split in samples], dtype="<U5"),
        ignored=sum(one.ignored for one in listings),
        clips=clips,
    )
    missing: list[Split] = [name for name in ("val", "test") if name not in given]
    return carve(dataset, missing=missing, carving=carving)


def _split_folders(root: Path) -> dict[Split, Path]:
    """The folders of the splits, or nothing where the folders are classes."""
    folders = _folders(root)
    splits: dict[Split, Path] = {}
    for folder in folders:
        split = SPLIT_WORDS.get(folder.name)
        if split in splits:
            raise DataError(f"{root} has both {splits[split].name!r} and {folder.name!r}; keep one of them")
        if split is not None:
            splits[split] = folder
    others = [folder.name for folder in folders if folder.name not in SPLIT_WORDS]
    if others and len(splits) < 2:
        return {}  # "train" beside "car" and "bicycle" is a class
    if others:
        raise DataError(
            f"{root} has folders of splits ({', '.join(sorted(splits))}) beside {others[0]!r}; {LAYOUT}. "
            f"Move {others[0]!r} away"
        )
    if splits and "train" not in splits:
        raise DataError(f"{root} has {', '.join(sorted(splits))} but no train folder; {LAYOUT}")
    return splits


def _folders(folder: Path) -> list[Path]:
    visible = [one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")]
    return sorted(visible, key=lambda one: one.name)


def _list_class(root: Path, split: Split, folder: Path, clips: bool) -> _Listing:
    suffixes = CLIP_SUFFIXES if clips else IMAGE_SUFFIXES
    images: list[Path] = []
    ignored = 0
    seen = {os.path.realpath(folder)}
    for parent, below, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        _check_names(parent, [*below, *names])
        below[:] = [
            name for name in sorted(below) if not name.startswith(".") and _is_new(Path(parent, name), seen)
        ]
        visible = [Path(parent, name) for name in names if not name.startswith(".")]
        if clips and Path(parent) != folder and is_clip(Path(parent)):
            images.append(Path(parent).relative_to(root))  # a folder of frames
            below.clear()
            continue
        found = [file.relative_to(root) for file in visible if file.suffix.lower() in suffixes]
        images += found
        ignored += len(visible) - len(found)
    if not images:
        raise _is_empty(folder, clips)
    return _Listing(split, folder.name, images, ignored)


def _is_empty(folder: Path, clips: bool) -> DataError:
    """What is said of a class without a sample; the other kind may be what lies there."""
    kinds = {True: CLIP_SUFFIXES, False: IMAGE_SUFFIXES}
    others = sum(file.suffix.lower() in kinds[not clips] - kinds[clips] for file in folder.rglob("[!.]*"))
    wanted = "clip" if clips else "image"
    endings = f"({' '.join(sorted(kinds[clips]))})"
    if others:
        there, remedy = ("images", "leave --frames out") if clips else ("clips", "type: --frames 8")
        return DataError(
            f"class {folder.name!r} is empty: no {wanted} in {folder} {endings}, and {others} {there}. For "
            f"{there} {remedy}"
        )
    return DataError(
        f"class {folder.name!r} is empty: no {wanted} in {folder}. Add {wanted}s {endings}, or remove the "
        "folder"
    )


def _check_names(parent: str, names: list[str]) -> None:
    """A name is written into the store and the run's files, which are UTF-8."""
    for name in (Path(parent).name, *names):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{os.fsencode(parent)!r} holds {os.fsencode(name)!r}, whose name is not UTF-8 text. "
                "Rename it"
            ) from None


def list_images(paths: Sequence[Path], *, clips: bool = False) -> list[Path]:
    """Files as they are, and of each folder its images, those of folders below too, by name.

    Args:
        paths: files and folders.
        clips: a folder of frames is a clip, and of another folder its clips are listed.

    Raises:
        DataError: a folder holds none.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("[!.]*")) if path.is_dir() else []
        if clips and path.is_dir():
            found = [path] if is_clip(path) else _clips(inside)
            if not found:
                raise DataError(
                    f"{path} is a folder without a clip ({' '.join(sorted(CLIP_SUFFIXES))}, or a folder of "
                    "pictures). Type: sidetune predict RUN CLIP, or RUN and a folder of clips"
                )
            files += found
            continue
        images = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES]
        if path.is_dir() and not images:
            raise DataError(
                f"{path} is a folder without an image ({' '.join(sorted(IMAGE_SUFFIXES))}). "
                "Type: sidetune predict RUN IMAGE, or RUN and a folder of images"
            )
        files += images or [path]
    return files


def _clips(paths: Sequence[Path]) -> list[Path]:
    """Those that are clips; what lies in a folder of frames is none of its own."""
    of_frames = {path for path in paths if path.is_dir() and is_clip(path)}
    outside = [path for path in paths if of_frames.isdisjoint(path.parents)]
    return [path for path in outside if path in of_frames or (not path.is_dir() and is_clip(path))]


def _is_new(folder: Path, seen: set[str]) -> bool:
    """Whether a folder is met for the first time: a link to one already met would loop."""
    real = os.path.realpath(folder)
    if real in seen:
        return False
    seen.add(real)
    return True


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _classes(root: Path, listings: list[_Listing]) -> tuple[str, ...]:
    classes = sorted({one.label for one in listings if one.split == "train"})
    if len(classes) < 2:
        found = f"one class, {classes[0]!r}" if classes else "no class folder"
        raise DataError(f"{root} has {found}; classification needs at least two classes: {LAYOUT}")
    for one in listings:
        if one.label not in classes:
            raise DataError(
                f"class {one.label!r} is in {one.split} but not in train, so nothing can learn it."
                f"{nearest(one.label, classes)} Rename it, add images of it to train, or remove it from "
                f"{one.split}"
            )
    return tuple(classes)
