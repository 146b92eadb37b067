"""Where a side looks: what each patch adds to the answer, exactly.

Pooling and head are linear, and the norm between them is linear once its spread is known, so a
difference of two outputs is a sum over tokens:

    o_a - o_b = sum_n  ((s_n - mean(s_n)) / spread * w) (h_a - h_b)  +  what the image does not decide

s_n is what token n adds to the pooled vector (`Side.shares`). Nothing is approximated. A token of a
side has read other tokens before: the map says where the evidence stands, not where it came from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidetune.features import Features
from sidetune.model import SideModel


def patch_evidence(model: SideModel, features: Features, answer: Tensor, against: Tensor) -> Tensor | None:
    """What each patch adds to the answer's output beyond another's.

    Args:
        model: of one member.
        features: of B images.
        answer: (B,) the output that is explained.
        against: (B,) the output it is compared with; equal to `answer`: with nothing.

    Returns:
        (B, T * H * W); None where patches do not reach the head by a sum: pool ``cls``, ridge.
    """
    if model.blend is not None or model.side.pool not in ("mean", "cls+mean", "all"):
        return None
    with torch.no_grad():
        shares = model.side.shares(features)
        if shares is None:
            return None
        linear = _through_norm(model, shares[0])  # (B, N, width)
        weight = model.head.weight_MDK[0].T  # (K, width)
        direction = weight[answer] - weight[against] * (answer != against)[:, None]
        evidence = torch.einsum("bnd,bd->bn", linear, direction.to(linear.dtype))
        patches: Tensor = model.side.spec.last.patch_tokens(evidence[..., None])[..., 0]
        return patches


def _through_norm(model: SideModel, shares_BNW: Tensor) -> Tensor:
    """The part of the normed vector that is linear in each token's share; the norm's bias is left out."""
    norm = model.norm
    if norm.kind == "none":
        return shares_BNW
    halves = shares_BNW.unflatten(-1, (norm.halves, norm.width))  # (B, N, halves, D)
    pooled = halves.sum(1, keepdim=True)
    spread = (pooled.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    normed = (halves - halves.mean(-1, keepdim=True)) / spread
    if norm.weight is not None:
        normed = normed * norm.weight.view(-1, norm.width)[0].to(normed.dtype)
    linear: Tensor = normed.flatten(-2)
    return linear
