"""A vision transformer whose blocks stay on disk, for models that no memory here can hold.

All images of a call go through one block before the next, which the system reads into its cache meanwhile:
the weights are read once a call, however many images it has. In memory are one block, on a GPU two, the
activations of one micro-batch, and the tokens (B, N, D) before and behind a block. No gradient enters a
backbone, so nothing is lost with a block that is gone. The arithmetic is that of the model in memory at the
same micro-batch, bit for bit, in float32 and under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, get_args

import timm
import torch
from huggingface_hub import snapshot_download
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from sidetune.backbones.base import MICRO_BATCH, Precision, Resize, Stages, tensors_digest
from sidetune.backbones.blocks import (
    Stream,
    StreamedBlock,
    a_call,
    blocks_of,
    numbered,
    run_in_parts,
)
from sidetune.backbones.checkpoint import load_weights, without
from sidetune.backbones.hooked import HookedBackbone, check_choice
from sidetune.backbones.timm import create, create_from, hub_config, known_architecture, no_hub
from sidetune.backbones.vit import ViT, classifiers, described, run_vit, set_size, write_over
from sidetune.backbones.weightfile import HUB_PATTERNS, Stored, stored_tensors
from sidetune.errors import BackboneError
from sidetune.store import DTYPES

BLOCKS = "blocks"  # where timm's models have them


class StreamedBackbone(HookedBackbone):
    """A vision transformer of timm that is never whole in memory.

    Its identity is that of the same model in memory, and so are its taps, but for those inside of blocks.

    Args:
        name: timm's name.
        weights: a ``.safetensors`` file under timm's names; a folder as on the hub, with one such file or
            several and an index, whose ``config.json`` is heeded; ``"hub"`` to download such a folder.
        size: side of the image in pixels, a multiple of the patch size; None is the model's own.
        taps: names of the taps to read.
        precision: ``fp32``, or ``bf16`` or ``fp16`` by autocast; matrices are held in it.
        resize: ``squash`` or ``crop``.
        micro_batch: images that go through a block at once; None: as `Stream` has it.
        depth: blocks that the weights have; None: as many as the model.

    Raises:
        BackboneError: as of `TimmBackbone`; blocks that differ from each other, or whose shapes go with the
            model's own size, or fewer or more of them.
    """

    def __init__(  # noqa: PLR0913 - as of TimmBackbone, and what benches cut
        self,
        name: str,
        *,
        weights: Path | str,
        size: int | None = None,
        taps: Sequence[str] | None = None,
        precision: Precision = "fp32",
        resize: Resize = "squash",
        micro_batch: int | None = None,
        depth: int | None = None,
    ) -> None:
        check_choice("precision", precision, get_args(Precision))
        weights = _downloaded(name) if weights == "hub" else Path(weights)
        model, arguments, tensors, whole = _outline(name, weights)
        digest = tensors_digest((name, stored.read().float()) for name, stored in sorted(tensors.items()))
        set_size(model, size)
        write_over(model)
        blocks = blocks_of(tensors, BLOCKS, model.blocks[0], weights)
        if len(blocks) != (depth or whole):
            raise BackboneError(
                f"weights {weights} have {len(blocks)} blocks, expected {depth or whole} of {name}. "
                "Type: --weights with those of the whole model"
            )
        self._stream = Stream(model.blocks[0], blocks, DTYPES[precision], micro_batch)
        run_in_parts(model.patch_embed.proj, micro_batch or MICRO_BATCH)
        streamed = [StreamedBlock(self._stream, number) for number in range(len(blocks))]
        # timm calls a sequence of blocks as one, or one by one with what they take beside tokens
        sequence = isinstance(model.blocks, nn.Sequential)
        model.blocks = nn.Sequential(*streamed) if sequence else nn.ModuleList(streamed)
        parts = described(model, arguments, digest, resize)
        super().__init__(replace(parts, runtime="streamed"), taps=taps, precision=precision)

    @property
    def call_size(self) -> int:
        """So many images that reading the weights is little beside them, and that their taps fit."""
        return a_call(self.spec.record_numel())

    def _forward(self, images: Tensor) -> object:
        return run_vit(self.module, images)

    def to(self, device: torch.device | str) -> Self:
        """Move what is in memory to a device, where blocks will be read to, too; returns itself."""
        super().to(device)
        self._stream.to(self.device)
        return self

    def stages(self) -> Stages:
        """See `Backbone.stages`.

        Raises:
            BackboneError: always: what trains inside of blocks needs them in memory.
        """
        raise BackboneError(
            f"{self.identity.architecture} is streamed: its blocks are not in memory to be trained in. "
            "Type: --set backbone.runtime=eager, or a side network, which needs no gradient there"
        )


def _outline(name: str, weights: Path) -> tuple[ViT, dict[str, Any], dict[str, Stored], int]:
    """The model with its first block alone, loaded; what its folder adds; its tensors; its depth."""
    architecture = known_architecture(name)
    config = hub_config(weights / "config.json") if weights.is_dir() else None

    def made(**arguments: int) -> ViT:
        if config is None:
            return create(name, **arguments)
        return create_from(weights, config, architecture, **arguments)

    with torch.random.fork_rng(devices=[]):  # timm draws a start from the global generator
        model = made(depth=1)
        with torch.device("meta"):
            depth = len(made().blocks)
    if not isinstance(model.patch_embed, PatchEmbed):
        raise BackboneError(
            f"{architecture} embeds images by a {type(model.patch_embed).__name__}, expected patches alone, "
            "to be streamed. Type: --set backbone.runtime=eager"
        )
    stored = without(stored_tensors(weights), classifiers(model))
    given = {key: tensor.read() for key, tensor in stored.items() if _number(key) in (None, 0)}
    load_weights(model, given, f"weights {weights}")
    return model, dict((config or {}).get("model_args") or {}), stored, depth


def _downloaded(name: str) -> Path:
    """The folder of a model's files in the hub's cache."""
    found = timm.get_pretrained_cfg(name)
    try:
        folder = snapshot_download(getattr(found, "hf_hub_id", None) or name, allow_patterns=[*HUB_PATTERNS])
    except (OSError, ValueError) as error:
        raise no_hub(name, error) from error
    return Path(folder)


def _number(key: str) -> int | None:
    """Of the block that a weight belongs to; None: it stands outside of all."""
    found = numbered(BLOCKS).fullmatch(key)
    return int(found[1]) if found else None
