"""VPT-deep: learned tokens before every block (Jia et al., ECCV 2022, arXiv 2203.12119).

    [_, X_l] = Block_l([P_l, X_{l-1}]),   P_l (p, D) of its own for each block, dropped after it

Unlike the others it is not the backbone at step 0: drawn prompts are attended to from the start.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sidetune.baselines.base import Baseline, BaselineRecipe

PATCH = 16  # of the formula below; of another patch the range differs by a few percent


class VptRecipe(BaselineRecipe):
    """VPT-deep's dial.

    Args:
        prompts: p, learned tokens a block.
    """

    name: Literal["vpt"] = "vpt"
    prompts: int = Field(10, ge=1)


class Vpt(Baseline[VptRecipe]):
    """Learned tokens before every block.

    Parameters: L p D; ViT-B, p = 10: 92,160. Args as in `Baseline`.
    """

    def changed(self, module: nn.Module) -> nn.Module:
        """With prompts before it."""
        return _Prompted(module, self.recipe.prompts, self.out.width)

    def drawn(self, key: str, shape: torch.Size, keyed: torch.Generator) -> Tensor:
        """Uniform within sqrt(6 / (3 * patch^2 + D)), as in the authors' code."""
        bound = math.sqrt(6 / (3 * PATCH**2 + self.out.width))
        return (2 * torch.rand(shape, generator=keyed) - 1) * bound


class _Prompted(nn.Module):
    """A block behind prompts."""

    def __init__(self, block: nn.Module, prompts: int, width: int) -> None:
        super().__init__()
        self.block, self.prompts_PD = block, nn.Parameter(torch.empty(prompts, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        prompts = self.prompts_PD.expand(len(tokens), *self.prompts_PD.shape).to(tokens.dtype)
        out: Tensor = self.block(torch.cat([prompts, tokens], 1))[:, len(self.prompts_PD) :]
        return out
