"""Clips whose classes differ only in the order of three segments: whether a network sees time.

A scene is drawn once: three segments, in each another shape that drifts over the same background. The six
classes are the six orders of these segments, so that the six clips of a scene have the same frames, and no
mean over frames can tell one from another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from sidetune.errors import RequestError
from sidetune.files import read_json, write_json, written
from sidetune.keyed import generator

SHAPES = ("disc", "square", "triangle")
ORDERS = tuple(itertools.permutations(range(len(SHAPES))))
FRAMES = 2  # of a segment
CLIP = FRAMES * len(SHAPES)  # frames of a clip
PIXELS = 128
SIZES = (18, 34)  # of a shape, from its middle, pixels


def order_name(order: Sequence[int]) -> str:
    """``disc-triangle-square``: the name of a class."""
    return "-".join(SHAPES[segment] for segment in order)


def write_order_set(root: Path, scenes: dict[str, int], seed: int = 0) -> None:
    """Write ``root/SPLIT/CLASS/SCENE/0.png`` ..: folders of frames, six clips a scene.

    What is there already, of the same numbers and seed, is left as it is; what was cut off is begun again.

    Args:
        root: of the set.
        scenes: of each split; no scene is in two.
        seed: of all that is drawn.

    Raises:
        RequestError: another set stands there.
    """
    about = {"scenes": scenes, "seed": seed, "frames": CLIP, "pixels": PIXELS}
    mark, begun = root / "order.json", root / "begun.json"
    for file in (mark, begun):
        if file.exists() and read_json(file) != about:
            raise RequestError(f"{root} holds another set, expected {about}. Type: rm -r {root}")
    if mark.exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    write_json(begun, about)
    for split, count in scenes.items():
        for scene in range(count):
            segments = draw_scene(f"{seed}/{split}/{scene}")
            for order in ORDERS:
                _write_clip(root / split / order_name(order) / f"{scene:05d}", segments, order)
    begun.replace(mark)


def _write_clip(folder: Path, segments: Sequence[Sequence[Image.Image]], order: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frame for segment in order for frame in segments[segment]):
        with written(folder / f"{number}.png") as temporary:
            frame.save(temporary, "PNG")


def draw_scene(name: str) -> list[list[Image.Image]]:
    """The frames of each segment, a shape a segment in the order of `SHAPES`.

    Args:
        name: all is drawn from it.
    """
    keyed = generator(0, f"order/{name}")
    background = _background(keyed)
    return [_segment(shape, background, keyed) for shape in SHAPES]


def _background(keyed: torch.Generator) -> Image.Image:
    """Coarse colours, dark enough for any shape."""
    coarse = torch.rand(8, 8, 3, generator=keyed) * 110
    image = Image.fromarray(coarse.round().to(torch.uint8).numpy())
    return image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def _segment(shape: str, background: Image.Image, keyed: torch.Generator) -> list[Image.Image]:
    """A shape of one colour and size on its way."""
    draw = torch.rand(8, generator=keyed, dtype=torch.float64)
    size = SIZES[0] + (SIZES[1] - SIZES[0]) * draw[0].item()
    colour = tuple(int(130 + 125 * one) for one in draw[1:4].tolist())
    start, step = size + (PIXELS - 2 * size) * draw[4:6], 24 * (draw[6:8] - 0.5)
    frames = []
    for number in range(FRAMES):
        frame = background.copy()
        place = (start + number * step).clamp(size, PIXELS - size)
        _draw(ImageDraw.Draw(frame), shape, place, size, colour)
        frames.append(frame)
    return frames


def _draw(
    canvas: ImageDraw.ImageDraw, shape: str, place: Tensor, size: float, colour: tuple[int, ...]
) -> None:
    x, y = place.tolist()
    if shape == "disc":
        canvas.ellipse((x - size, y - size, x + size, y + size), fill=colour)
        return
    corners, turned = (4, math.pi / 4) if shape == "square" else (3, -math.pi / 2)
    angles = [turned + 2 * math.pi * corner / corners for corner in range(corners)]
    canvas.polygon([(x + size * math.cos(one), y + size * math.sin(one)) for one in angles], fill=colour)
