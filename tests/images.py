"""Small learnable images for tests: a class has its own colour and shape on a noisy ground."""

import colorsys
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def make_folder(root: Path, classes: int, images: int, *, seed: int = 0, size: int = 48) -> Path:
    """Class folders ``class0`` .. with `images` PNG files in all, dealt out in turn."""
    rng = np.random.default_rng(seed)
    for i in range(images):
        folder = root / f"class{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        draw_shape(i % classes, classes, rng, size=size).save(folder / f"{i:04d}.png")
    return root


def make_csv(root: Path, task: str, images: int, *, classes: int = 3, seed: int = 0, size: int = 48) -> Path:
    """``root/table.csv`` beside ``root/images``.

    classify: ``label``. multilabel: ``coloured`` and ``right``. regress: ``x`` and ``y``, the shape's
    centre in 0..1.
    """
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(images):
        x, y = (round(float(v), 3) for v in rng.uniform(0.25, 0.75, 2))
        name, kind = f"images/{i:04d}.png", i % classes
        draw_shape(kind, classes, rng, size=size, centre=(x, y)).save(root / name)
        columns = {
            "classify": {"label": f"class{kind}"},
            "multilabel": {"coloured": int(kind == 0), "right": int(x > 0.5)},
            "regress": {"x": x, "y": y},
        }
        rows.append({"path": name, **columns[task]})
    with (root / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root / "table.csv"


def draw_shape(
    kind: int,
    kinds: int,
    rng: np.random.Generator,
    *,
    size: int = 48,
    centre: tuple[float, float] | None = None,
) -> Image.Image:
    """A disc, square or triangle of the class's hue, at `centre` in 0..1 or anywhere."""
    image = Image.fromarray(rng.integers(90, 160, (size, size, 3), dtype=np.uint8))
    x, y = centre if centre is not None else rng.uniform(0.3, 0.7, 2)
    x, y, r = x * size, y * size, size / 5
    colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(kind / kinds, 0.9, 0.9))
    draw = ImageDraw.Draw(image)
    if kind % 3 == 0:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif kind % 3 == 1:
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    return image
