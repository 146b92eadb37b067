"""Baselines that train some of the backbone's own parameters: all of them, biases, or norms.

    full     everything, the embedding too; reads the image
    bitfit   the biases of all blocks (Ben Zaken et al., ACL 2022, arXiv 2106.10199)
    norms    weights and biases of the blocks' layer norms (as Basu et al., AAAI 2024, and others)

At step 0 each is the backbone itself. The final norm stands in `sidetune.model`: ``head.norm=trained`` trains
it, and full fine-tuning and norm tuning are meant with it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from sidetune.baselines.base import Baseline, BaselineRecipe


class FullRecipe(BaselineRecipe):
    """Full fine-tuning has no dials of its own."""

    usual_decay: ClassVar[float | None] = 0.05  # its matrices are the backbone's own and are to stay near

    name: Literal["full"] = "full"


class BitFitRecipe(BaselineRecipe):
    """BitFit has no dials of its own."""

    name: Literal["bitfit"] = "bitfit"


class NormsRecipe(BaselineRecipe):
    """Norm tuning has no dials of its own."""

    name: Literal["norms"] = "norms"


class Full(Baseline[FullRecipe]):
    """Everything is trained. Args as in `Baseline`."""

    @staticmethod
    def first_tap(num_blocks: int, recipe: FullRecipe) -> str:
        """See `Baseline.first_tap`."""
        return "image"

    def is_trained(self, module: nn.Module, name: str) -> bool:
        """All are."""
        return True


class BitFit(Baseline[BitFitRecipe]):
    """Biases are trained. Args as in `Baseline`.

    Parameters: 11 D a block; 101,376 in ViT-B. The patch embedding's bias is not among them: the blocks
    read a tap behind it.
    """

    def is_trained(self, module: nn.Module, name: str) -> bool:
        """Those that are called bias, or q_bias and v_bias."""
        return name.endswith("bias")


class Norms(Baseline[NormsRecipe]):
    """Layer norms are trained. Args as in `Baseline`.

    Parameters: 4 D a block; 36,864 in ViT-B, 38,400 with the final norm.
    """

    def is_trained(self, module: nn.Module, name: str) -> bool:
        """Those of layer norms."""
        return isinstance(module.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
