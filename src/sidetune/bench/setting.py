"""The sizes of a bench, and random taps of those sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from sidetune.errors import RequestError, nearest
from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.store import DTYPES, DTypeName

if TYPE_CHECKING:
    from sidetune.backbones.base import Backbone

LOSA_RANK, LAST_RANK = 8, 16  # the sides' own defaults
LEFT_OPEN = {
    "rank": LOSA_RANK,
    "threads": 2,
    "frames": 8,
}  # what an error tells to type where the default is None
UNKNOWN_CACHE = 64 * 2**20  # bytes, where the system does not say
TIMES_CACHE = 4  # the batches of a case are so many times the last-level cache
MOST_BATCHES = 64  # tiny sizes are for trying out: they stay in the cache


@dataclass(frozen=True)
class Setting:
    """Sizes of a bench. The defaults are a ViT-S of patch 14 at 224 px, as its store holds it.

    Args:
        layers: L, block taps; one embedding tap comes on top.
        tokens: N, one of them a class token.
        width: D.
        rank: R of both sides; None: 8 for LoSA, 16 for LAST.
        batch: B, images a step.
        dtype: of the stored taps.
        threads: of torch; None: as they are.
        rounds: in which every case is timed once.
        device: ``cpu`` or ``cuda``.

    Raises:
        RequestError: a size that cannot be.
    """

    layers: int = 12
    tokens: int = 257
    width: int = 384
    rank: int | None = None
    batch: int = 50
    dtype: DTypeName = "fp16"
    threads: int | None = None
    rounds: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"layers": 1, "tokens": 2, "width": 1, "rank": 1, "batch": 1, "threads": 1, "rounds": 1}
        for name, smallest in least.items():
            require_least(name, getattr(self, name), smallest, LEFT_OPEN.get(name) or getattr(Setting, name))
        if self.dtype not in get_args(DTypeName):
            raise RequestError(
                f"dtype is {self.dtype!r}.{nearest(self.dtype, get_args(DTypeName))} Type: --dtype fp16"
            )
        require_device(self.device)

    @property
    def spec(self) -> Spec:
        """One embedding tap and the block taps."""
        grid = (1, 1, self.tokens - 1)
        names = ["embedding", *(f"block.{layer}" for layer in range(1, self.layers + 1))]
        return Spec(
            tuple(
                Tap(name, "embedding" if i == 0 else "block", self.width, grid, num_prefix=1, cls_index=0)
                for i, name in enumerate(names)
            )
        )

    @property
    def is_the_goals(self) -> bool:
        """Whether the goals are about these sizes: they were set on a CPU, for the defaults."""
        mine, theirs = self.to_json(), Setting().to_json()
        return all(mine[name] == theirs[name] for name in mine.keys() - {"rounds", "threads"})

    def ranks(self) -> dict[str, int]:
        """R of each side."""
        return {"losa": self.rank or LOSA_RANK, "last": self.rank or LAST_RANK}

    def record_bytes(self) -> int:
        """Bytes of one image's stored taps."""
        return self.spec.record_numel() * DTYPES[self.dtype].itemsize

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)


def require_least(name: str, value: int | None, least: int, usual: int) -> None:
    """A size must not be too small.

    Raises:
        RequestError: it is.
    """
    if value is not None and value < least:
        raise RequestError(f"{name} is {value}, expected {least} or more. Type: --{name} {usual}")


def require_images(backbone: Backbone) -> None:
    """Whether a backbone reads images, as this bench has them.

    Raises:
        RequestError: it reads clips at once.
    """
    if backbone.frames is not None:
        raise RequestError(
            f"{backbone.identity.architecture} reads {backbone.frames} frames of a clip at once, and this "
            "bench is for backbones of images. Type: --backbone timm:vit_small_patch14_dinov2"
        )


def require_device(device: str) -> None:
    """A bench's device must be there.

    Raises:
        RequestError: it is not.
    """
    if device not in ("cpu", "cuda"):
        raise RequestError(f"device is {device!r}.{nearest(device, ('cpu', 'cuda'))} Type: --device cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("device is 'cuda' and torch finds no GPU here. Type: --device cpu")


def noise(settings: Sequence[Setting]) -> Tensor:
    """Random normal numbers in the stored dtype, as many as leave the last-level cache behind: (n,).

    Args:
        settings: of one dtype and device; two batches of each fit.
    """
    dtype, device = DTYPES[settings[0].dtype], torch.device(settings[0].device)
    least = TIMES_CACHE * cache_bytes(device) // dtype.itemsize
    largest = max(setting.batch * setting.spec.record_numel() for setting in settings)
    return torch.randn(max(least, 2 * largest), generator=generator(0, "bench/taps")).to(device, dtype)


def batches(setting: Setting, drawn: Tensor) -> list[Features]:
    """As many batches of taps as `drawn` has numbers for, views of it.

    In training every step's taps come from memory; batches that are read in turn do, too.
    """
    shape = (setting.batch, setting.tokens, setting.width)
    numel, taps = math.prod(shape), len(setting.spec)
    count = min(MOST_BATCHES, len(drawn) // (numel * taps))
    parts = drawn[: count * taps * numel].view(count, taps, *shape)
    return [Features(tuple(part), setting.spec) for part in parts]


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache; a guess where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        if text.endswith("K") and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * 2**10)
    return max(sizes, default=UNKNOWN_CACHE)
