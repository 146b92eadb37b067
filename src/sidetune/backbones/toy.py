"""A tiny vision transformer with random weights, for tests and first steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidetune import keyed
from sidetune.backbones.base import Identity, Precision, Resize, Stages, shared_copy, weights_digest
from sidetune.backbones.hooked import HookedBackbone, Parts, Place, check_choice, check_size, final_norm
from sidetune.data.preprocess import Preprocess
from sidetune.features import Spec, Tap

PATCH, WIDTH, DEPTH, HEADS = 8, 32, 4, 2


class ToyBackbone(HookedBackbone):
    """A ViT of patch 8, width 32, 4 blocks, 2 heads, a class token and a final LayerNorm.

    Its weights are uniform draws, which are the same bits on every machine. Taps: ``image``, ``embedding``,
    and ``attention.l``, ``ffn.l``, ``block.l`` for l = 1..4; embedding and blocks by default.

    Args:
        size: side of the image in pixels, a multiple of 8.
        seed: of the weights.
        taps: names of the taps to read.
        precision: ``fp32`` or ``bf16``.
        resize: ``squash`` or ``crop``, see `Preprocess`.

    Raises:
        BackboneError: a size that is no multiple of 8, an unknown tap or precision.
    """

    def __init__(
        self,
        size: int = 32,
        *,
        seed: int = 0,
        taps: Sequence[str] | None = None,
        precision: Precision = "fp32",
        resize: Resize = "squash",
    ) -> None:
        check_size(size, PATCH)
        check_choice("resize", resize, get_args(Resize))
        super().__init__(_parts(size, seed, resize), taps=taps, precision=precision)

    def _forward(self, images: Tensor) -> object:
        return self.module(images)

    def stages(self) -> Stages:
        """See `Backbone.stages`."""
        embed = shared_copy(self.module)
        assert isinstance(self.module, ToyViT) and isinstance(embed, ToyViT)
        embed.blocks = nn.Sequential()
        embed.add_module("norm", nn.Identity())
        return Stages(embed, tuple(self.module.blocks), self.available.blocks[-1])


def _parts(size: int, seed: int, resize: Resize) -> Parts:
    # The layers' own start draws from the global generator: leave that as it was.
    with torch.random.fork_rng(devices=[]):
        module = ToyViT((size // PATCH) ** 2)
    _draw(module, keyed.generator(seed, "backbones/toy"))
    preprocess = Preprocess(size=size, resize=resize)
    side = size // PATCH
    tap = partial(Tap, width=WIDTH, grid=(1, side, side), num_prefix=1, cls_index=0)
    taps = [Tap("image", "image", width=3, grid=(1, size, size)), tap("embedding", "embedding")]
    places = [Place("image", module.patches, "input"), Place("embedding", module.blocks[0], "input")]
    for number, block in enumerate(module.blocks, start=1):
        assert isinstance(block, _Block)
        taps += [
            tap(f"attention.{number}", "attention"),
            tap(f"ffn.{number}", "ffn"),
            tap(f"block.{number}", "block"),
        ]
        places += [
            Place(f"attention.{number}", block.attention),
            Place(f"ffn.{number}", block.ffn),
            Place(f"block.{number}", block),
        ]
    identity = Identity(
        weights=weights_digest(module),
        architecture="toy",
        arguments={"size": size, "patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS},
        preprocess=preprocess.model_dump(mode="json"),
    )
    norm = final_norm(module.norm)
    return Parts(module, Spec(tuple(taps)), tuple(places), preprocess, identity, norm, {})


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """Matrices, tokens and positions uniform with variance 1 / fan-in; biases zero, norms as they are."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()  # torch's own start draws it from the global generator
            elif parameter.ndim > 1:
                # rand - 1/2 is exact and one product follows, so there is nothing to round differently.
                uniform = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.copy_(uniform * math.sqrt(12 / parameter[0].numel()))


class ToyViT(nn.Module):
    """The network: images (B, 3, size, size) -> normalised tokens (B, 1 + patches, 32)."""

    def __init__(self, num_patches: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.cls = nn.Parameter(torch.zeros(1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1 + num_patches, WIDTH))
        self.blocks = nn.Sequential(*(_Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Patches, class token, positions, blocks, final norm."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(images), 1, WIDTH), patches], 1) + self.positions
        normalised: Tensor = self.norm(self.blocks(tokens))
        return normalised


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()
        self.ffn = nn.Sequential(
            nn.LayerNorm(WIDTH, eps=1e-6),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        out: Tensor = tokens + self.ffn(tokens)
        return out


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(tokens)).unflatten(-1, (3, HEADS, -1))  # (B, N, 3, heads, D/heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out
