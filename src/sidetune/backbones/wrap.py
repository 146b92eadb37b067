"""Any network as a backbone: you name its submodules, hooks read them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from sidetune.backbones.base import Identity, Precision, weights_digest
from sidetune.backbones.hooked import HookedBackbone, Parts, Place, capture, final_norm, module_device
from sidetune.data.preprocess import Preprocess, built_in_image
from sidetune.errors import BackboneError, nearest
from sidetune.features import FinalNorm, Spec, Tap, TapKind

_TAP_NAME = re.compile(r"embedding|(?:block|attention|ffn)\.[1-9]\d*")


@dataclass(frozen=True)
class Wiring:
    """Where the taps of a foreign module are. Part of the backbone's identity.

    Args:
        taps: tap name -> path of the submodule whose output is read, ``{"block.1": "layers.0"}``.
            Names are ``embedding``, ``block.l``, ``attention.l``, ``ffn.l``.
        embedding: path of the submodule whose *input* is the tap ``embedding``, z_0.
        norm: path of the module's final LayerNorm.
        num_prefix: class and register tokens in front of the patch tokens (B, N, D).
        cls_index: position of the class token among them.
        grid: (T, H, W) of the patch tokens; None where they form a square of one T.
    """

    taps: Mapping[str, str]
    embedding: str | None = None
    norm: str | None = None
    num_prefix: int = 0
    cls_index: int | None = None
    grid: tuple[int, int, int] | None = None


class WrappedBackbone(HookedBackbone):
    """A copy of any module that maps images (B, 3, size, size), read by hooks.

    A tap's output may be (B, N, D), a tuple that starts with one, or (B, D, H, W), which becomes
    (B, H*W, D). Widths and grids are found by one run on the built-in image, which also gives the
    order of the taps. The caller's module is copied, so it keeps its weights, mode and gradients.

    Args:
        module: any module; it is copied.
        wiring: where its taps are.
        preprocess: how images reach it.
        taps: names of the taps to read; None reads the embedding and every block.
        precision: ``fp32`` or ``bf16``, see `HookedBackbone`.
        name: of the architecture, for the identity.

    Raises:
        BackboneError: an unknown tap or submodule, a submodule that does not run exactly once, or
            an output that is not of these shapes.
    """

    def __init__(
        self,
        module: nn.Module,
        wiring: Wiring,
        *,
        preprocess: Preprocess,
        taps: Sequence[str] | None = None,
        precision: Precision = "fp32",
        name: str = "wrapped",
    ) -> None:
        frozen = copy.deepcopy(module).eval().requires_grad_(False)
        spec, places = _measure(frozen, wiring, preprocess)
        identity = Identity(
            weights=weights_digest(frozen),
            architecture=f"{name}:{type(module).__name__}",
            arguments={**asdict(wiring), "grid": wiring.grid and list(wiring.grid)},
            preprocess=preprocess.model_dump(mode="json"),
        )
        norm = None if wiring.norm is None else _norm(frozen, wiring.norm)
        parts = Parts(frozen, spec, places, preprocess, identity, norm, {})
        super().__init__(parts, taps=taps, precision=precision)

    def _forward(self, images: Tensor) -> object:
        return self.module(images)


def wrap(  # noqa: PLR0913 - the fields of Wiring, spelled out for one call
    module: nn.Module,
    taps: Mapping[str, str],
    *,
    preprocess: Preprocess,
    embedding: str | None = None,
    norm: str | None = None,
    num_prefix: int = 0,
    cls_index: int | None = None,
    grid: tuple[int, int, int] | None = None,
    precision: Precision = "fp32",
) -> WrappedBackbone:
    """`WrappedBackbone` in one call: ``wrap(net, {"block.1": "layers.0"}, preprocess=...)``.

    Args:
        module: any module; it is copied.
        taps: tap name -> path of the submodule whose output is read.
        preprocess: how images reach the module.
        embedding: path of the submodule whose input is the tap ``embedding``.
        norm: path of the module's final LayerNorm.
        num_prefix: class and register tokens in front of the patch tokens.
        cls_index: position of the class token among them.
        grid: (T, H, W) of the patch tokens.
        precision: ``fp32`` or ``bf16``.

    Raises:
        BackboneError: as in `WrappedBackbone`.
    """
    wiring = Wiring(dict(taps), embedding, norm, num_prefix, cls_index, grid)
    return WrappedBackbone(module, wiring, preprocess=preprocess, precision=precision)


def _measure(module: nn.Module, wiring: Wiring, preprocess: Preprocess) -> tuple[Spec, tuple[Place, ...]]:
    """One run on the built-in image: the taps in running order, and where each is read."""
    places = _places(module, wiring)
    image = preprocess(built_in_image(preprocess.size))[None].to(module_device(module))
    with torch.no_grad():
        read = capture(list(places.values()), lambda: module(image), to_the_end=True)
    return (
        Spec(tuple(_tap(name, tensor, wiring) for name, tensor in read.items())),
        tuple(places[name] for name in read),
    )


def _places(module: nn.Module, wiring: Wiring) -> dict[str, Place]:
    places = {}
    for name, path in wiring.taps.items():
        if not _TAP_NAME.fullmatch(name):
            raise BackboneError(
                f"got a tap named {name!r}, expected embedding, block.1, attention.1 or ffn.1"
            )
        # A foreign module may overwrite what was read, in place, later in the same pass.
        places[name] = Place(name, _submodule(module, path), copy=True)
    if wiring.embedding is not None:
        if "embedding" in places:
            raise BackboneError("the embedding is given twice; drop it from taps, or drop embedding=")
        places["embedding"] = Place("embedding", _submodule(module, wiring.embedding), "input", copy=True)
    if not places:
        raise BackboneError("no taps to read. Type: taps={'block.1': 'path.of.a.submodule'}")
    return places


def _submodule(module: nn.Module, path: str) -> nn.Module:
    known: dict[str, nn.Module] = dict(module.named_modules(remove_duplicate=False))
    if path not in known:
        raise BackboneError(f"{type(module).__name__} has no submodule {path!r}.{nearest(path, known)}")
    return known[path]


def _tap(name: str, read: Tensor, wiring: Wiring) -> Tap:
    """The tap that gave this tensor: (1, N, D) or (1, D, H, W)."""
    kind = next(kind for kind in get_args(TapKind) if name.startswith(kind))
    if read.ndim == 4:
        _, width, height, breadth = read.shape
        return Tap(name, kind, width, (1, height, breadth))
    _, num_tokens, width = read.shape
    num_patches = num_tokens - wiring.num_prefix
    side = math.isqrt(max(num_patches, 0))
    grid = wiring.grid or (1, side, side)
    if num_patches < 1 or math.prod(grid) != num_patches:
        raise BackboneError(
            f"tap {name!r} has {num_tokens} tokens: {wiring.num_prefix} prefix tokens and a grid "
            f"{'that is a square' if wiring.grid is None else grid} do not make {num_tokens}. "
            "Type: num_prefix=..., grid=(T, H, W)"
        )
    return Tap(name, kind, width, grid, num_prefix=wiring.num_prefix, cls_index=wiring.cls_index)


def _norm(module: nn.Module, path: str) -> FinalNorm:
    submodule = _submodule(module, path)
    norm = final_norm(submodule)
    if norm is None:
        raise BackboneError(f"norm {path!r} is a {type(submodule).__name__}, expected a LayerNorm")
    return norm
