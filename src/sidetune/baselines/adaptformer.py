"""AdaptFormer: a bottleneck beside each feed-forward branch (Chen et al., NeurIPS 2022, arXiv 2205.13535).

    x + MLP(LN x) + s * Up(ReLU(Down(LN x))),   Up zero at the start

LN is the branch's own, frozen. Where the branch has a LayerScale, the bottleneck stands beside both.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sidetune.baselines.base import Baseline, BaselineRecipe, kaiming
from sidetune.errors import SideError


class AdaptFormerRecipe(BaselineRecipe):
    """AdaptFormer's dials.

    Args:
        rank: width of the bottleneck; the paper's VTAB rows have 8.
        scale: s; the paper's is 0.1.
    """

    name: Literal["adaptformer"] = "adaptformer"
    rank: int = Field(8, ge=1)
    scale: float = 0.1


class AdaptFormer(Baseline[AdaptFormerRecipe]):
    """A bottleneck beside each feed-forward branch.

    Parameters: L (2 D R + R + D); ViT-B, R = 8: 156,768. Args as in `Baseline`.

    Raises:
        SideError: the blocks have no branch called mlp behind a norm, as timm's usual blocks have.
    """

    def changed(self, module: nn.Module) -> nn.Module:
        """With the bottleneck beside its feed-forward branch."""
        branch, scale = getattr(module, "mlp", None), getattr(module, "ls2", None)
        if not isinstance(branch, nn.Module) or not isinstance(scale, nn.Module):
            raise SideError(
                "AdaptFormer needs a feed-forward branch behind its norm, called mlp and scaled by ls2, and "
                f"{type(module).__name__} has none. Type: --backbone timm:vit_base_patch16_224"
            )
        scaled = nn.Sequential(branch, scale)
        module.ls2, module.mlp = nn.Identity(), _Beside(scaled, self.out.width, self.recipe)
        return module

    def drawn(self, key: str, shape: torch.Size, keyed: torch.Generator) -> Tensor:
        """Down as a linear layer starts; biases and Up zero."""
        return kaiming(shape, keyed) if key.endswith("down_RD") else torch.zeros(shape)


class _Beside(nn.Module):
    """A branch and a bottleneck that read the same."""

    def __init__(self, branch: nn.Module, width: int, recipe: AdaptFormerRecipe) -> None:
        super().__init__()
        self.branch, self.scale, rank = branch, recipe.scale, recipe.rank
        self.down_RD, self.down_R = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(rank))
        self.up_DR, self.up_D = nn.Parameter(torch.empty(width, rank)), nn.Parameter(torch.empty(width))

    def forward(self, normed: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        codes = F.relu(F.linear(normed, self.down_RD, self.down_R))
        out: Tensor = self.branch(normed) + self.scale * F.linear(codes, self.up_DR, self.up_D)
        return out
