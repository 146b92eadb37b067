"""Side -> norm -> head: what the loop trains and the artifact keeps.

``logits = Head(Norm(Pool(tokens)))``, with the member axis all the way: (M, B, K).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetune.blend import Blend
from sidetune.errors import RecipeError, nearest
from sidetune.features import Features, FinalNorm
from sidetune.keyed import Draws, generator
from sidetune.sides.base import Side

NormKind = Literal["backbone", "trained", "none"]
LAYER_NORM_EPS = 1e-6  # where the backbone has no final norm of its own
HEAD_START_STD = 0.01


class SideModel(nn.Module):
    """A side network with its norm and head.

    Args:
        side: reads features, returns pooled tokens (M, B, width).
        num_outputs: K.
        norm: ``backbone`` copies the backbone's own final norm, frozen; ``trained`` starts there;
            ``none``. A backbone without one: layer norm without affine.
        final_norm: the backbone's, None where it has none.
        ridge: whether it has a share in what is answered outside training; see `sidetune.blend`.
    """

    def __init__(
        self,
        side: Side,
        num_outputs: int,
        *,
        norm: NormKind = "backbone",
        final_norm: FinalNorm | None = None,
        ridge: bool = False,
    ) -> None:
        super().__init__()
        self.side = side
        self.norm = Norm(side, norm, final_norm)
        self.head = Head(side.members, side.width, num_outputs)
        self.blend = Blend(side.spec, side.members, num_outputs) if ridge else None

    def forward(self, features: Features, draws: Draws | None = None) -> Tensor:
        """Features -> outputs (M, B, K): in training the network's alone."""
        own = self.outputs(self.side(features, draws))
        return own if self.blend is None or self.training else self.blend(own, features)

    def outputs(self, pooled: Tensor) -> Tensor:
        """Pooled tokens (M, B, width) -> outputs (M, B, K)."""
        result: Tensor = self.head(self.norm(pooled))
        return result

    def num_parameters(self) -> int:
        """Trained numbers a member, without the head."""
        return self.side.num_parameters() + sum(p[0].numel() for p in self.norm.parameters())

    def start(self, seeds: Sequence[int | None], num_outputs: Sequence[int] | None = None) -> None:
        """Draw every member's starting parameters from its own seed, head included.

        Args:
            seeds: one a member; None leaves it as it is.
            num_outputs: K of each member; None: the head's. What a narrower one lacks stays zero.
        """
        self.side.start(seeds)
        widest = self.head.bias_MK.shape[1]
        for member, seed in enumerate(seeds):
            if seed is not None:
                own = widest if num_outputs is None else num_outputs[member]
                self.head.start_member(member, generator(seed, "start/head"), own)


class Norm(nn.Module):
    """Layer norm over D with the backbone's affine; each half on its own where two are concatenated."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, side: Side, kind: NormKind, final_norm: FinalNorm | None) -> None:
        super().__init__()
        if kind not in get_args(NormKind):
            raise RecipeError(
                f"norm is {kind!r}.{nearest(kind, get_args(NormKind))} Type: --set head.norm=backbone"
            )
        self.kind, self.halves = kind, side.halves
        self.width = side.width // side.halves
        self.eps = LAYER_NORM_EPS if final_norm is None else final_norm.eps
        weight = bias = None
        if final_norm is not None and kind != "none":
            weight, bias = final_norm.weight.detach().clone(), final_norm.bias.detach().clone()
        if kind == "trained":
            weight = torch.ones(self.width) if weight is None else weight
            bias = torch.zeros(self.width) if bias is None else bias
            self.weight = nn.Parameter(weight.repeat(side.members, 1))
            self.bias = nn.Parameter(bias.repeat(side.members, 1))
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(M, B, width) -> (M, B, width)."""
        if self.kind == "none":
            return pooled
        halves = pooled.unflatten(-1, (self.halves, self.width))  # (M, B, halves, D)
        normed = F.layer_norm(halves, (self.width,), eps=self.eps)
        if self.weight is not None and self.bias is not None:
            weight, bias = (affine.view(-1, 1, 1, self.width) for affine in (self.weight, self.bias))
            normed = normed * weight.to(normed.dtype) + bias.to(normed.dtype)
        return normed.flatten(-2)


class Head(nn.Module):
    """Linear (M, width, K), one a member."""

    def __init__(self, members: int, width: int, num_outputs: int) -> None:
        super().__init__()
        self.weight_MDK = nn.Parameter(torch.zeros(members, width, num_outputs))
        self.bias_MK = nn.Parameter(torch.zeros(members, num_outputs))

    def start_member(self, member: int, keyed: torch.Generator, num_outputs: int) -> None:
        """Weights normal with std 0.01: not zero, so that the side has a gradient at step one."""
        with torch.no_grad():
            draw = torch.randn(self.weight_MDK.shape[1], num_outputs, generator=keyed)
            self.weight_MDK[member, :, :num_outputs] = draw * HEAD_START_STD

    def forward(self, pooled: Tensor) -> Tensor:
        """(M, B, width) -> (M, B, K)."""
        return torch.baddbmm(self.bias_MK[:, None], pooled, self.weight_MDK)
