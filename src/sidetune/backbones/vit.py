"""What every plain vision transformer of timm gives: taps, preprocessing, identity, final norm."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, cast, get_args

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from timm.layers.mlp import Mlp
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sidetune.backbones.base import Identity, Resize, Stages, shared_copy, weights_digest
from sidetune.backbones.hooked import Parts, Place, check_choice, check_size, final_norm
from sidetune.data.preprocess import Preprocess
from sidetune.errors import BackboneError
from sidetune.features import FinalNorm, Spec, Tap

ViT = VisionTransformer | Eva | Beit


def run_vit(module: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, size, size) -> tokens (B, N, D) behind the model's ``norm``."""
    assert isinstance(module, ViT)
    tokens: Tensor = module.forward_features(images)
    return tokens


def vit_parts(model: ViT, arguments: Mapping[str, Any], *, size: int | None, resize: Resize) -> Parts:
    """Taps, preprocessing, identity and final norm of a model that is ours to resize.

    Args:
        model: at its own size.
        arguments: that it was built with, beside size and patch, for the identity.
        size: side of the image in pixels; None is the model's own.
        resize: ``squash`` or ``crop``.

    Raises:
        BackboneError: a size that is no multiple of the patch size, or pixels we cannot prepare.
    """
    digest = weights_digest(model)  # before the position table is resampled
    set_size(model, size)
    write_over(model)
    return described(model, arguments, digest, resize)


def described(model: ViT, arguments: Mapping[str, Any], digest: str, resize: Resize) -> Parts:
    """What `vit_parts` gives, of a model that has its size.

    Args:
        model: as it will run.
        arguments: that it was built with, beside size and patch.
        digest: of its weights as loaded.
        resize: ``squash`` or ``crop``.

    Raises:
        BackboneError: pixels we cannot prepare.
    """
    patch = model.patch_embed.img_size[0] // model.patch_embed.grid_size[0]
    preprocess = _preprocess(model, resize)
    identity = Identity(
        weights=digest,
        architecture=pretrained_config(model)["architecture"],
        arguments={**arguments, "size": preprocess.size, "patch": patch},
        preprocess=preprocess.model_dump(mode="json"),
    )
    spec, places = _taps(model)
    versions = {"timm": timm.__version__}
    return Parts(model, spec, places, preprocess, identity, _norm(model), versions)


def vit_stages(model: nn.Module, tap: Tap) -> Stages:
    """A model taken apart: embedding and blocks.

    Args:
        model: whose blocks take tokens and nothing else.
        tap: of the last block.

    Raises:
        BackboneError: its blocks take more than tokens, as those with rotary positions do.
    """
    if not isinstance(model, VisionTransformer | Eva) or getattr(model, "rope", None) is not None:
        raise BackboneError(
            f"the blocks of this {type(model).__name__} take more than tokens, expected a plain "
            "VisionTransformer of timm, or an Eva without rotary positions. "
            "Type: --backbone timm:vit_base_patch16_224"
        )
    embed = shared_copy(model)
    assert isinstance(embed, VisionTransformer | Eva)
    embed.blocks, embed.norm = nn.Sequential(), nn.Identity()
    return Stages(_Embed(embed), tuple(model.blocks), tap)


class _Embed(nn.Module):
    """Images -> the tokens that enter block 1."""

    def __init__(self, model: VisionTransformer | Eva) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return run_vit(self.model, images)


def write_over(model: ViT) -> None:
    """Give each feed-forward branch an activation that writes over its input: the same numbers."""
    for block in model.blocks:
        mlp = getattr(block, "mlp", None)
        if type(mlp) is Mlp and type(mlp.act) is nn.GELU and mlp.act.approximate == "none":
            mlp.act = _OverGelu()


class _OverGelu(nn.Module):
    """GELU in place of its input, where no gradient needs that.

    The hidden layer of a feed-forward branch is the widest tensor of a block, four times a tap, and nobody
    else reads it: written over, it stands once. It was a third of the peak of a ViT-S's forward pass.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            return F.gelu(hidden)
        return torch.ops.aten.gelu_(hidden)  # type: ignore[no-any-return]


def set_size(model: ViT, size: int | None) -> None:
    """Bring a model to size x size pixels.

    Raises:
        BackboneError: a size that is no multiple of the patch size.
    """
    height, width = model.patch_embed.img_size
    patch = height // model.patch_embed.grid_size[0]
    if size is None and height != width:
        raise BackboneError(
            f"the model reads {height} x {width} pixels, expected a square. Type: --size {min(height, width)}"
        )
    if size is not None and (size, size) != (height, width):
        check_size(size, patch)
        with warnings.catch_warnings():
            # BEiT's bias tables: timm indexes in a way that torch deprecates; the result is right.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
            model.set_input_size((size, size))


def _preprocess(model: ViT, resize: Resize) -> Preprocess:
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    check_choice("resize", resize, get_args(Resize))
    if config["input_size"][0] != 3 or config["interpolation"] not in ("bicubic", "bilinear"):
        raise BackboneError(
            f"the model reads {config['input_size'][0]} channels resized by {config['interpolation']}, "
            "expected 3 channels and bicubic or bilinear"
        )
    return Preprocess(
        size=model.patch_embed.img_size[0],  # timm's data config does not follow the size
        resize=resize,
        crop_fraction=config["crop_pct"] if resize == "crop" else 1.0,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def _taps(model: ViT) -> tuple[Spec, tuple[Place, ...]]:
    height, width = model.patch_embed.grid_size
    tap = partial(
        Tap,
        width=model.embed_dim,
        grid=(1, height, width),
        num_prefix=model.num_prefix_tokens,
        cls_index=None if model.cls_token is None else 0,
    )
    pixels = Tap("image", "image", width=3, grid=(1, *model.patch_embed.img_size))
    taps = [pixels, tap("embedding", "embedding")]
    places = [Place("image", model.patch_embed, "input"), Place("embedding", model.blocks[0], "input")]
    for number, block in enumerate(model.blocks, start=1):
        if hasattr(block, "drop_path1") and hasattr(block, "drop_path2"):
            # Drop path is the last thing before the sum, and the identity in eval mode.
            taps += [tap(f"attention.{number}", "attention"), tap(f"ffn.{number}", "ffn")]
            places.append(Place(f"attention.{number}", block.get_submodule("drop_path1")))
            places.append(Place(f"ffn.{number}", block.get_submodule("drop_path2")))
        taps.append(tap(f"block.{number}", "block"))
        places.append(Place(f"block.{number}", block))
    return Spec(tuple(taps)), tuple(places)


def _norm(model: ViT) -> FinalNorm | None:
    return final_norm(model.norm) or final_norm(getattr(model, "fc_norm", None))


def pretrained_config(model: ViT) -> dict[str, Any]:
    """What timm knows about the weights that a name stands for."""
    return cast("dict[str, Any]", model.pretrained_cfg)


def classifiers(model: ViT) -> tuple[str, ...]:
    """Names of the submodules that a published file has behind the last tap."""
    names = pretrained_config(model).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
