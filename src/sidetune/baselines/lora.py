"""LoRA: low-rank updates of linear layers (Hu et al., ICLR 2022, arXiv 2106.09685), by the library peft.

    W x + (alpha / R) B A x,   A (R, D_in) drawn, B (D_out, R) zero at the start

On the fused query, key and value of attention as one layer, or on every linear layer; in all blocks, or in
the last k, whose input a store can hold.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sidetune.baselines.base import Baseline, BaselineRecipe, kaiming
from sidetune.errors import MissingExtraError, SideError

Layers = Literal["qkv", "linear"]


class LoraRecipe(BaselineRecipe):
    """LoRA's dials.

    Args:
        rank: R.
        alpha: updates are multiplied by alpha / R; peft's own default is 8.
        layers: ``qkv``, or ``linear``: all linear layers of a block.
        blocks: k, the last blocks that are adapted; None: all.
    """

    name: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    alpha: float = Field(8.0, gt=0)
    layers: Layers = "qkv"
    blocks: int | None = Field(None, ge=1)


class Lora(Baseline[LoraRecipe]):
    """LoRA in a backbone's blocks.

    Parameters: R (D_in + D_out) a layer; ViT-B, qkv, R = 8: 294,912. Args as in `Baseline`.

    Raises:
        MissingExtraError: peft is not installed.
        SideError: the blocks have no such layer.
    """

    @staticmethod
    def first_tap(num_blocks: int, recipe: LoraRecipe) -> str:
        """See `Baseline.first_tap`: the input of the last k blocks.

        Raises:
            SideError: there are not so many.
        """
        if recipe.blocks is None or recipe.blocks == num_blocks:
            return "embedding"
        if recipe.blocks > num_blocks:
            raise SideError(
                f"side.blocks is {recipe.blocks}, expected at most {num_blocks}. Type: --set side.blocks=3"
            )
        return f"block.{num_blocks - recipe.blocks}"

    def changed(self, module: nn.Module) -> nn.Module:
        """With peft's layers in the place of those that are adapted."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MissingExtraError("peft, which is LoRA,", "pip install 'sidetune[peft]'") from error
        config = LoraConfig(
            r=self.recipe.rank,
            lora_alpha=self.recipe.alpha,  # type: ignore[arg-type]  # peft divides by R, so any number will do
            target_modules=_linear_layers(module, self.recipe.layers),
        )
        for attention in module.modules():
            if "qkv_bias_separate" in attention.__dict__:  # Eva's, which else reads qkv's weight past peft's
                attention.__dict__["qkv_bias_separate"] = True
        return inject_adapter_in_model(config, module)

    def merged(self) -> nn.Sequential:
        """The adapted blocks with the updates added to their weights, and nothing of peft left in them.

        They cost what the backbone's own cost, and share nothing with it.
        """
        from peft.tuners.lora import LoraLayer

        with torch.no_grad():
            for stage in self.stages:
                self.give(stage)
        alone = copy.deepcopy(nn.Sequential(*(stage.module for stage in self.stages)))
        for name, layer in list(alone.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(alone.get_submodule(parent), child, layer.get_base_layer())
        return alone

    def drawn(self, key: str, shape: torch.Size, keyed: torch.Generator) -> Tensor:
        """A as a linear layer starts, B zero."""
        return torch.zeros(shape) if "/lora_B/" in key else kaiming(shape, keyed)


def _linear_layers(block: nn.Module, layers: Layers) -> list[str]:
    linear = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if layers == "linear":
        return list(linear)
    found = [name for name, module in linear.items() if name.rpartition(".")[2] == "qkv"]
    if not found:
        raise SideError(
            f"LoRA on qkv needs a fused linear layer of that name, got {', '.join(linear)}. "
            "Type: --set side.layers=linear"
        )
    return found
