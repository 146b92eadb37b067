"""The one preprocessing object: used by extract, train, test and predict, saved in the artifact.

Pillow decodes, torchvision's v2 transforms resize, crop and scale.
"""

from __future__ import annotations

import math
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sidetune.errors import ImageError, SidetuneError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UINT16_MAX = 65535
# What is decoded, by its bytes and whatever its name. Pillow knows more, and some of it is no picture but a
# program: it hands EPS to Ghostscript, which runs it.
FORMATS = ("JPEG", "MPO", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "AVIF", "JPEG2000")
PICTURES_IN_ONE = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")  # not MPO: a phone's preview or depth is no frame
# What Pillow's decoders raise on damaged files, besides OSError; warnings where they are made errors.
DECODER_ERRORS = (
    *(ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError),
    *(ArithmeticError, struct.error, Warning),
)
LARGE = 40_000_000  # pixels: images above it are decoded one at a time, or four of them would fill the memory
LONGEST = (
    40_000_000  # pixels after resizing: a line of 60,000 pixels would be made 224 pixels wide and as long
)
BAND = 2**20  # pixels of 16-bit grey that are scaled at once
_OPENING = threading.Lock()  # the filters of `warnings` belong to all threads
_LARGE = threading.Lock()


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
        check_torchvision()
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as transforms

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

    def num_resized(self, width: int, height: int) -> int:
        """Pixels that an image has after the resize, before the crop."""
        if self.resize == "squash":
            return self.size**2
        short = self._resized()[0]
        return short * max(short, short * max(width, height) // min(width, height))

    def _resized(self) -> list[int]:
        """Both sides, or the shorter one alone: torchvision then keeps the aspect ratio."""
        if self.resize == "squash":
            return [self.size, self.size]
        return [math.floor(self.size / self.crop_fraction)]  # rounded down as in timm


@dataclass(frozen=True)
class Loaded:
    """An image file as the backbone reads it.

    Args:
        pixels: (3, size, size) float32.
        animated: whether the file holds more frames or pages than the first, which is the one that counts.
    """

    pixels: Tensor
    animated: bool


def check_torchvision() -> None:
    """Import torchvision, late: `sidetune doctor` must run where it cannot be imported.

    Raises:
        SidetuneError: it is of another build than torch, or not installed.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise SidetuneError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({error}); the two must come "
            "from the same index. Type: sidetune doctor"
        ) from error


def is_regular(file: Path) -> bool:
    """Whether a file can be read to its end; a folder can be opened at least, and then says what it is.

    Raises:
        OSError: there is nothing there.
    """
    mode = file.stat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def load_image(path: Path, preprocess: Preprocess) -> Tensor:
    """An image file as the backbone reads it: (3, size, size) float32.

    Raises:
        ImageError: as `open_image`.
    """
    return load_noted(path, preprocess).pixels


def load_noted(path: Path, preprocess: Preprocess) -> Loaded:
    """As `load_image`, and whether frames or pages were left out.

    Raises:
        ImageError: as `open_image`.
    """
    return load_views(path, preprocess, [lambda image: image])[0]


def load_views(
    path: Path, preprocess: Preprocess, views: Sequence[Callable[[Image.Image], Image.Image]]
) -> list[Loaded]:
    """An image file, decoded once, in several views.

    Args:
        path: of the file.
        preprocess: what the backbone reads.
        views: each makes a picture of the decoded one, before it is resized, and leaves that as it is.

    Raises:
        ImageError: as `open_image`.
    """
    with ExitStack() as held:
        whole, animated = _decode(path, held)
        return [Loaded(_prepared(path, view(whole), preprocess), animated) for view in views]


def _prepared(path: Path, image: Image.Image, preprocess: Preprocess) -> Tensor:
    if preprocess.num_resized(image.width, image.height) > LONGEST:
        raise ImageError(
            path,
            f"{image.width} x {image.height} pixels: too long and narrow to crop its middle. "
            "Remove it, or type: --set backbone.resize=squash",
        )
    return preprocess(image)


def open_image(path: Path, *, at_least: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, rotated as its EXIF tag says.

    Of an animation the first frame counts, of a file with several pages the first page; transparent
    pixels are laid over white; 16-bit grey is scaled by 1/257. `FORMATS` are read, whatever the file's
    name says.

    Args:
        path: of the file.
        at_least: pixels that the shorter side must keep where the format can be decoded at a fraction of its
            size (JPEG: a photograph in a tenth of the time); None: in full.

    Raises:
        ImageError: the file is missing, empty, cut short, not an image, or larger than Pillow's
            limit against decompression bombs (179 Mpx).
    """
    with ExitStack() as held:
        return _decode(path, held, at_least)[0]


def _decode(path: Path, held: ExitStack, at_least: int | None = None) -> tuple[Image.Image, bool]:
    """The image, and whether the file holds more than it. Only one large image is `held` at a time."""
    try:
        if not is_regular(path):  # to open a pipe would wait for somebody who writes into it
            raise ImageError(path, "a pipe, a socket or a device, not a file")
        # A stream, not a path: Pillow would map some files into memory, and it scrambles a grey TIFF so whose
        # orientation tag swaps its sides.
        with path.open("rb") as stream, _open(stream) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            if image.width * image.height > LARGE:
                held.enter_context(_LARGE)
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return to_rgb(image), _is_animated(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(path, f"too large: more than {limit / 1e6:.0f} Mpx") from error
    except UnidentifiedImageError as error:
        raise ImageError(path, _unknown(path)) from error
    except OSError as error:
        # Errors of the file system have a number, those of Pillow have none.
        damaged = error.errno is None
        raise ImageError(path, "damaged or cut short" if damaged else str(error.strerror)) from error
    except MemoryError as error:
        raise ImageError(path, "needs more memory than there is") from error
    except DECODER_ERRORS as error:
        what = str(error) or type(error).__name__
        raise ImageError(path, f"damaged, or of a kind that is not supported ({what})") from error


def _open(stream: BinaryIO) -> Image.Image:
    """Open without Pillow's warning between one and two times its pixel limit; beyond, it raises."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.init()  # a Pillow that was built without one of them has the others
        return Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])


def _unknown(path: Path) -> str:
    """Why a file that is none of `FORMATS` is not read."""
    with path.open("rb") as stream:
        head = stream.read(12)
    if not head:
        return "the file is empty"
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"):
        return "HEIC, which is not read: convert it to JPEG"
    iso = head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis")
    if iso or head.startswith(b"\x1aE\xdf\xa3") or head[8:12] == b"AVI ":
        return "a video, not an image: for clips type --frames 8"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "PostScript, which is a program and is not run: convert it to PNG"
    return "not an image that Pillow reads"


def _is_animated(image: Image.Image) -> bool:
    """Whether a decoded file holds frames or pages after the first."""
    try:
        return image.format in PICTURES_IN_ONE and bool(getattr(image, "is_animated", False))
    except (OSError, *DECODER_ERRORS):
        return True  # a GIF is asked for its second frame: there is one, and it is damaged


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a decoded picture: transparent pixels over white, 16-bit grey scaled."""
    if image.mode.startswith("I"):  # "I;16", its byte orders, and "I": Pillow itself would clip at 255
        return Image.fromarray(_scaled_grey(image)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels, whose range is unknown")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> NDArray[np.uint8]:
    """(height, width) of 16-bit values / 257, rounded; the one transparent value of a PNG is white."""
    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > UINT16_MAX:
        raise ValueError(f"32-bit pixels from {low} to {high}, expected 0 to {UINT16_MAX}")
    scaled = np.empty(grey.shape, dtype=np.uint8)
    rows = max(1, BAND // image.width)
    for first in range(0, image.height, rows):
        band = grey[first : first + rows].astype(np.int32)
        scaled[first : first + rows] = (band + 128) // 257  # 257 is odd: no value lies halfway
        if isinstance(clear := image.info.get("transparency"), int):
            scaled[first : first + rows][band == clear] = 255
    return scaled


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
