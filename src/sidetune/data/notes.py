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


def other_files(number: int) -> str:
    """What is said of files beside the images that are not looked at."""
    what = (
        "1 other file beside the images has"
        if number == 1
        else f"{number} other files beside the images have"
    )
    left = "is" if number == 1 else "are"
    return f"{what} no image's ending and {left} left out; photographs in HEIC have to be made JPEG first"
