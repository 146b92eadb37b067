"""Clips: pictures at instants of a video file, an animation, or a folder of frames.

    frames_at(file, instants)     the picture that is shown at each instant
    Frame(3, 16)                  the fourth of sixteen that are evenly spaced over a clip's time

An instant is a share of the clip's length, so clips of any frame rate and duration are sampled alike, and
so is one whose frames stand unevenly in time: what counts is what is shown. A clip of one frame shows it
at every instant.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from sidetune.data.decoders import ANIMATIONS, PICTURES, animation, folder_of_frames, frame_files, video
from sidetune.errors import ImageError

VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts"}
) | {".wmv", ".flv", ".ogv"}
CLIP_SUFFIXES = VIDEOS | ANIMATIONS
Square = Literal["first", "middle", "last"]
SQUARES: tuple[Square, ...] = ("middle", "first", "last")


@dataclass(frozen=True)
class Frame:
    """One of some frames that are evenly spaced over a clip's time: the one shown in the middle of its part.

    Args:
        number: from 0.
        count: of all.
        square: which square of the picture, along its longer side, from left or top; None: the whole.
    """

    number: int
    count: int
    square: Square | None = None

    @property
    def name(self) -> str:
        """``frame03of16``, ``frame03of16+last``: names sort as the frames do."""
        of_which = f"+{self.square}" if self.square else ""
        return f"frame{self.number:0{len(str(self.count - 1))}}of{self.count}{of_which}"

    @property
    def instant(self) -> float:
        """Where in the clip: 0 is its begin, 1 its end."""
        return (self.number + 0.5) / self.count

    @classmethod
    def parse(cls, name: str) -> Frame | None:
        """The frame of a name; None where it is none."""
        plain, _, of_which = name.partition("+")
        found = re.fullmatch(r"frame(\d{1,6})of([1-9]\d{0,5})", plain)
        square = next((one for one in SQUARES if one == of_which), None)
        frame = None if found is None else cls(int(found[1]), int(found[2]), square)
        known = frame is not None and frame.name == name and frame.number < frame.count
        return frame if known else None

    def key(self, sample_key: str) -> str:
        """The key of this frame of a sample: ``path@sha256#name``."""
        return f"{sample_key}#{self.name}"

    def __call__(self, image: Image.Image) -> Image.Image:
        """What is read of the picture that is shown."""
        if self.square is None:
            return image
        side = min(image.size)
        share = {"first": 0.0, "middle": 0.5, "last": 1.0}[self.square]
        left, top = (round(share * (length - side)) for length in image.size)
        return image.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class Span:
    """All frames of one evenly spaced sampling, for a backbone that reads them at once.

    Args:
        number: from 0: each sampling is a little later in its parts of the clip's time.
        count: of samplings.
        frames: T.
    """

    number: int
    count: int
    frames: int

    @property
    def name(self) -> str:
        """``span0of1x16``."""
        return f"span{self.number}of{self.count}x{self.frames}"

    @property
    def instants(self) -> tuple[float, ...]:
        """Where in the clip, one in each of T equal parts."""
        place = (self.number + 0.5) / self.count
        return tuple((part + place) / self.frames for part in range(self.frames))

    @classmethod
    def parse(cls, name: str) -> Span | None:
        """The span of a name; None where it is none."""
        found = re.fullmatch(r"span(\d{1,6})of([1-9]\d{0,5})x([1-9]\d{0,5})", name)
        span = None if found is None else cls(int(found[1]), int(found[2]), int(found[3]))
        return span if span is not None and span.name == name and span.number < span.count else None

    def key(self, sample_key: str) -> str:
        """The key of this span of a sample: ``path@sha256#name``."""
        return f"{sample_key}#{self.name}"


def is_clip(file: Path) -> bool:
    """Whether a path is a clip's by its ending, or a folder of frames.

    A folder with a video or an animation beside its pictures, or a video below, is none: they are covers. Nor
    is one whose only picture stands above others.
    """
    if file.is_dir():
        frames = frame_files(file)
        beside = set(file.glob("[!.]*")).difference(frames) if frames else set()
        below = (one for folder in beside if folder.is_dir() for one in folder.rglob("[!.]*"))
        lower = CLIP_SUFFIXES | PICTURES if len(frames) == 1 else VIDEOS
        return bool(frames) and not (
            any(one.suffix.lower() in CLIP_SUFFIXES for one in beside)
            or any(one.suffix.lower() in lower for one in below)
        )
    return file.suffix.lower() in CLIP_SUFFIXES


def frames_at(file: Path, instants: Sequence[float]) -> Iterator[Image.Image]:
    """The pictures shown at some instants, 8-bit RGB, upright, each as soon as it is decoded.

    Args:
        file: a video, an animation, or a folder of frames, which are taken in the order of `frame_files`.
        instants: ascending, each from 0 to less than 1.

    Raises:
        ImageError: the file is missing, empty, cut short, holds no pictures, or is none that is read.
        SidetuneError: it is a video, and there is no library that decodes it.
    """
    assert list(instants) == sorted(instants) and all(0 <= one < 1 for one in instants), instants
    if file.is_dir():
        return folder_of_frames(file, instants)
    if not file.exists():
        raise ImageError(file, "there is no such file")
    if not file.stat().st_size:
        raise ImageError(file, "the file is empty")
    return (animation if file.suffix.lower() in ANIMATIONS else video)(file, instants)


def middle_frame(file: Path) -> Image.Image:
    """The picture shown in the middle of a clip: what people see of it.

    Raises:
        ImageError: as `frames_at`.
    """
    return next(iter(frames_at(file, [Frame(0, 1).instant])))


def folder_digest(folder: Path) -> str:
    """sha256 over names and bytes of a folder's frames: another frame makes another clip.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    for file in frame_files(folder):
        with file.open("rb") as stream:
            digest.update(f"{file.name}|{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
