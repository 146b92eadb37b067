"""What is said of files that are used in part, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def first_frames(paths: Sequence[Path]) -> str:
    """What is said of images of which only the first frame or page is used."""
    names = ", ".join(path.as_posix() for path in paths[:3]) + (" .." if len(paths) > 3 else "")
    if len(paths) == 1:
        return f"1 image is an animation or has several pages; its first is used: {names}"
    return f"{len(paths)} images are animations or have several pages; the first of each is used: {names}"


def other_files(number: int, sample: str = "image") -> str:
    """What is said of files beside the samples that are not looked at.

    Args:
        number: of them.
        sample: what a sample is called.
    """
    what, left = (f"{number} other files", "are") if number > 1 else ("1 other file", "is")
    have = "have" if number > 1 else "has"
    said = f"{what} beside the {sample}s {have} no {sample}'s ending and {left} left out"
    return said + ("; photographs in HEIC have to be made JPEG first" if sample == "image" else "")
