"""Views of a sample: of an image itself, its tiles, its mirror image and seeded crops; of a clip its frames.

They are stored like images.

A view is a pure function of the file's bytes and the view's name, so a store can hold it for ever and
every run that asks for it gets the same one.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from sidetune.data.clips import Frame, Span
from sidetune.keyed import generator

# Of a crop: share of the image's area, and width over height. Another crop needs another name in
# `View.name`: stores hold crops by name.
AREA = (0.4, 1.0)
ASPECT = (3 / 4, 4 / 3)
MOST_TILES = 8  # of an axis: 64 views


@dataclass(frozen=True)
class View:
    """One view of an image.

    Args:
        crop: number of a seeded crop, from 1; 0: the whole image.
        mirror: left and right exchanged.
        tile: number of a tile, from 1, row by row; 0: the whole image.
        tiles: of an axis, where this view is a tile.
    """

    crop: int = 0
    mirror: bool = False
    tile: int = 0
    tiles: int = 0

    @property
    def name(self) -> str:
        """``mirror``, ``crop1``, ``crop2+mirror``, ``tile3of4``; empty for the image itself."""
        parts = [f"crop{self.crop}"] * bool(self.crop) + ["mirror"] * self.mirror
        parts += [f"tile{self.tile}of{self.tiles**2}"] * bool(self.tile)
        return "+".join(parts)

    @classmethod
    def parse(cls, name: str) -> View | None:
        """The view of a name; None where it is none that this version knows."""
        found = re.fullmatch(
            r"(?:crop([1-9]\d{0,5}))?(?:\+?(mirror))?|tile([1-9]\d{0,5})of([1-9]\d{0,5})", name
        )
        if found is None:
            return None
        number, tiles = int(found[3] or 0), math.isqrt(int(found[4] or 0))
        view = cls(int(found[1] or 0), bool(found[2]), number, tiles)
        return view if view.name == name and number <= tiles**2 else None

    def key(self, sample_key: str) -> str:
        """The key of this view of a sample: ``path@sha256``, and ``#name`` behind it."""
        return f"{sample_key}#{self.name}" if self.name else sample_key

    def __call__(self, image: Image.Image, content: str) -> Image.Image:
        """This view of an image; `content` (the sha256 of its file) seeds the crop."""
        if self.crop:
            image = image.crop(_box(image.width, image.height, f"{content}/crop{self.crop}"))
        if self.tile:
            image = image.crop(_tile(image.width, image.height, self.tile - 1, self.tiles))
        return ImageOps.mirror(image) if self.mirror else image


PLAIN = View()
AnyView = View | Frame | Span


def parse_view(name: str) -> AnyView | None:
    """The view of a name, of an image or of a clip; None where it is none that this version knows."""
    return View.parse(name) or Frame.parse(name) or Span.parse(name)


def split_key(key: str) -> tuple[str, str]:
    """The key of the sample, and the name of its view: ``#`` after the last ``@`` begins it."""
    path, at, rest = key.rpartition("@")
    content, _, name = rest.partition("#")
    return path + at + content, name


def place_by_hash(key: str) -> tuple[str, str, str]:
    """Where a key stands among others: samples by their path's hash, a sample's views side by side.

    Files often lie sorted by class. Any few shards must hold about what all hold, for training may
    shuffle no more of them at once than memory takes.
    """
    sample, view = split_key(key)
    return hashlib.sha256(sample.rpartition("@")[0].encode()).hexdigest(), sample, view


def views(num_more: int, *, flip: bool = True, tiles: int = 0) -> tuple[View, ...]:
    """The image itself, its tiles, and `num_more` other views.

    With `flip` the first of these is the mirror image and every second crop is mirrored; without, all are
    crops.

    Args:
        num_more: mirror image and crops.
        flip: whether views may be mirrored.
        tiles: of an axis: n² views that cut the image into equal parts; 0: none.
    """
    crops = num_more - flip if num_more else 0
    more = [View(0, mirror=True)] * (flip and num_more > 0)
    cut = (View(tile=number, tiles=tiles) for number in range(1, tiles**2 + 1))
    return (PLAIN, *cut, *more, *(View(k, flip and k % 2 == 0) for k in range(1, crops + 1)))


def _box(width: int, height: int, seed: str) -> tuple[int, int, int, int]:
    """A box of random area and aspect inside the image: left, top, right, bottom, at least a pixel wide."""
    draw = torch.rand(4, generator=generator(0, f"view/{seed}"), dtype=torch.float64).tolist()
    area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * draw[0])
    low, high = (math.log(value) for value in ASPECT)
    aspect = math.exp(low + (high - low) * draw[1])
    across = min(width, max(1, round(math.sqrt(area * aspect))))
    down = min(height, max(1, round(math.sqrt(area / aspect))))
    left, top = round(draw[2] * (width - across)), round(draw[3] * (height - down))
    return left, top, left + across, top + down


def _tile(width: int, height: int, number: int, tiles: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a tile, at least a pixel wide; together the tiles cover the image."""
    row, column = divmod(number, tiles)
    (left, right), (top, bottom) = (_part(width, column, tiles), _part(height, row, tiles))
    return left, top, right, bottom


def _part(length: int, number: int, of: int) -> tuple[int, int]:
    first = min(number * length // of, length - 1)
    return first, max(first + 1, (number + 1) * length // of)
