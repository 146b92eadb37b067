"""The one preprocessing object: used by extract, train, test and predict, saved in the artifact.

Pillow decodes, torchvision's v2 transforms resize, crop and scale.
"""

from __future__ import annotations

import math
import struct
import threading
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from sidetune.errors import ImageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UINT16_MAX = 65535
# What Pillow's decoders raise on damaged files, besides OSError; warnings where they are made errors.
DECODER_ERRORS = (ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, Warning)
_OPENING = threading.Lock()  # the filters of `warnings` belong to all threads


class Preprocess(BaseModel):
    """How an image file becomes the tensor that a backbone reads.

    Args:
        size: side of the square that the backbone sees, in pixels.
        resize: ``crop`` brings the shorter side to floor(size / crop_fraction) and cuts the centre;
            ``squash`` resizes straight to size x size, so nothing is cut off.
        crop_fraction: share of the resized shorter side that the centre crop keeps.
        interpolation: of the resize, antialiased.
        mean: a channel, of pixel values in 0..1.
        std: a channel, of pixel values in 0..1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(224, gt=0)
    resize: Literal["squash", "crop"] = "squash"
    crop_fraction: float = Field(1.0, gt=0, le=1)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """One RGB image -> (3, size, size) float32."""
        pixels = transforms.pil_to_tensor(image)
        resized = transforms.resize(
            pixels,
            self._resized(),
            interpolation=InterpolationMode(self.interpolation),
            antialias=True,
        )
        if self.resize == "crop":
            resized = transforms.center_crop(resized, [self.size, self.size])
        scaled = transforms.to_dtype(resized, torch.float32, scale=True)
        normalised: Tensor = transforms.normalize(scaled, list(self.mean), list(self.std))
        return normalised

    def _resized(self) -> list[int]:
        """Both sides, or the shorter one alone: torchvision then keeps the aspect ratio."""
        if self.resize == "squash":
            return [self.size, self.size]
        return [math.floor(self.size / self.crop_fraction)]  # rounded down as in timm


def load_image(path: Path, preprocess: Preprocess) -> Tensor:
    """An image file as the backbone reads it: (3, size, size) float32.

    Raises:
        ImageError: as `open_image`.
    """
    return preprocess(open_image(path))


def open_image(path: Path, *, at_least: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, rotated as its EXIF tag says.

    Of an animation the first frame counts; transparent pixels are laid over white; 16-bit grey is
    scaled by 1/257.

    Args:
        path: of the file.
        at_least: pixels that the shorter side must keep where the format can be decoded at a fraction of its
            size (JPEG: a photograph in a tenth of the time); None: in full.

    Raises:
        ImageError: the file is missing, empty, cut short, not an image, or larger than Pillow's
            limit against decompression bombs (179 Mpx).
    """
    try:
        with _open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return _to_rgb(image)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(path, f"too large: more than {limit / 1e6:.0f} Mpx") from error
    except UnidentifiedImageError as error:
        empty = path.stat().st_size == 0
        raise ImageError(path, "the file is empty" if empty else "not an image that Pillow reads") from error
    except OSError as error:
        # Errors of the file system have a number, those of Pillow have none.
        damaged = error.errno is None
        raise ImageError(path, "damaged or cut short" if damaged else str(error.strerror)) from error
    except DECODER_ERRORS as error:
        raise ImageError(path, f"damaged, or of a kind that is not supported ({error})") from error


def _open(path: Path) -> Image.Image:
    """Open without Pillow's warning between one and two times its pixel limit; beyond, it raises."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16", its byte orders, and "I": Pillow itself would clip at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > UINT16_MAX:
            raise ValueError(f"32-bit pixels from {grey.min()} to {grey.max()}, expected 0 to {UINT16_MAX}")
        return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels, whose range is unknown")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def built_in_image(size: int) -> Image.Image:
    """A built-in image (size x size) with gradients, edges and texture.

    The same bytes on every machine: check values are measured on it at save and again at load.
    """
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    red = (255 * x) // max(size - 1, 1)
    green = (255 * y) // max(size - 1, 1)
    blue = ((x // 8 + y // 8) % 2) * 160 + (x * y) % 96
    pixels = torch.stack([red, green, blue], -1).to(torch.uint8)
    return Image.fromarray(pixels.numpy())
