"""ST-Adapter: a bottleneck that mixes frames, before each block (Pan et al., NeurIPS 2022, arXiv 2206.13559).

    x + Up(DWConv(Down(x))),   DWConv of each channel over three frames, zero at the start

It stands before the attention of each block and is of patch tokens alone: prefix tokens pass by it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sidetune.baselines.base import Baseline, BaselineRecipe, kaiming

REACH = 1  # frames before and behind that the convolution sees


class StAdapterRecipe(BaselineRecipe):
    """ST-Adapter's dials.

    Args:
        rank: width of the bottleneck; None: half of the backbone's, as the paper's.
    """

    name: Literal["stadapter"] = "stadapter"
    rank: int | None = Field(None, ge=1)


class StAdapter(Baseline[StAdapterRecipe]):
    """A bottleneck before each block.

    Parameters: L (2 D R + 5 R + D); ViT-B, R = 384: 7,110,144, the paper's 7.1 M. Of images, whose T is 1,
    the convolution is a factor a channel. Args as in `Baseline`.
    """

    def changed(self, module: nn.Module) -> nn.Module:
        """Behind a bottleneck."""
        rank = self.out.width // 2 if self.recipe.rank is None else self.recipe.rank
        return nn.Sequential(_Bottleneck(self.out.width, rank, self.frames, self.out.num_prefix), module)

    def drawn(self, key: str, shape: torch.Size, keyed: torch.Generator) -> Tensor:
        """Down and Up as linear layers start; the convolution and biases zero."""
        return kaiming(shape, keyed) if key.endswith(("down_RD", "up_DR")) else torch.zeros(shape)


class _Bottleneck(nn.Module):
    """Of frames (B * T, N, D), which follow one another."""

    def __init__(self, width: int, rank: int, frames: int, num_prefix: int) -> None:
        super().__init__()
        self.frames, self.num_prefix = frames, num_prefix
        self.down_RD, self.down_R = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(rank))
        self.conv_RK = nn.Parameter(torch.empty(rank, 2 * REACH + 1))
        self.conv_R = nn.Parameter(torch.empty(rank))
        self.up_DR, self.up_D = nn.Parameter(torch.empty(width, rank)), nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B * T, N, D) -> (B * T, N, D)."""
        patches = tokens[:, self.num_prefix :]
        codes_BTNR = F.linear(patches, self.down_RD, self.down_R).unflatten(0, (-1, self.frames))
        # zeros stand before the first frame and behind the last
        padded = F.pad(codes_BTNR, (0, 0, 0, 0, REACH, REACH))
        conv_KR, mixed = self.conv_RK.to(padded).T, self.conv_R.to(padded)
        for place in range(2 * REACH + 1):
            mixed = mixed + padded[:, place : place + self.frames] * conv_KR[place]
        added = F.linear(mixed.flatten(0, 1), self.up_DR, self.up_D)
        return tokens + F.pad(added, (0, 0, self.num_prefix, 0))
