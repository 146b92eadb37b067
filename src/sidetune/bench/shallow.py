"""A vision transformer of few blocks with random weights, for what each block costs."""

from __future__ import annotations

import torch

from sidetune.backbones.base import Precision, Stages
from sidetune.backbones.hooked import HookedBackbone
from sidetune.backbones.timm import TimmBackbone, create, known_architecture
from sidetune.backbones.vit import vit_parts, vit_stages
from sidetune.features import Tap


class ShallowBackbone(TimmBackbone):
    """A model of timm as it is, but for the number of its blocks.

    Args:
        name: timm's name.
        depth: blocks.
        size: side of the image in pixels.
        precision: as of `TimmBackbone`.

    Raises:
        BackboneError: an unknown or unsupported model, or a size that is no multiple of the patch.
    """

    def __init__(self, name: str, depth: int, *, size: int, precision: Precision) -> None:
        known_architecture(name)
        with torch.random.fork_rng(devices=[]):  # timm draws from the global generator
            model = create(name, depth=depth)
        parts = vit_parts(model, {"depth": depth}, size=size, resize="squash")
        HookedBackbone.__init__(self, parts, taps=None, precision=precision)


def outline_stages(name: str) -> Stages:
    """A model with one block, taken apart: what its blocks are made of. On the meta device it has no numbers.

    Args:
        name: timm's name.

    Raises:
        BackboneError: an unknown or unsupported model.
    """
    known_architecture(name)
    model = create(name, depth=1)
    height, width = model.patch_embed.grid_size
    tap = Tap("block.1", "block", model.embed_dim, (1, height, width), model.num_prefix_tokens)
    return vit_stages(model, tap)
