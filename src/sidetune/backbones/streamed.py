"""A vision transformer whose blocks stay on disk, for models that no memory here can hold.

All images of a call go through one block before the next, which is read meanwhile: the weights are read
once a call, however many images it has. In memory are two blocks, the activations of one micro-batch, and the
tokens (B, N, D) before and behind a block. No gradient enters a backbone, so nothing is lost with a block
that is gone. The arithmetic is that of the model in memory at the same micro-batch, bit for bit, in float32
and under autocast.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, get_args

import timm
import torch
from huggingface_hub import snapshot_download
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from sidetune.backbones.base import MICRO_BATCH, Precision, Resize, Stages, tensors_digest
from sidetune.backbones.checkpoint import load_weights, without
from sidetune.backbones.hooked import HookedBackbone, check_choice
from sidetune.backbones.timm import create, create_from, hub_config, known_architecture, no_hub
from sidetune.backbones.vit import ViT, classifiers, described, run_vit, set_size, write_over
from sidetune.backbones.weightfile import HUB_PATTERNS, Stored, stored_tensors
from sidetune.errors import BackboneError
from sidetune.store import DTYPES

CALL_BYTES = 2**30  # of the taps of one call, in float32
CALL_IMAGES = 64  # at most
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
Block = Mapping[str, Stored]  # a parameter's name inside the block -> where it stands
Loaded = dict[str, Tensor]


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
        micro_batch: images that go through a block at once.

    Raises:
        BackboneError: as of `TimmBackbone`; blocks that differ from each other, or whose shapes go with the
            model's own size.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: Path | str,
        size: int | None = None,
        taps: Sequence[str] | None = None,
        precision: Precision = "fp32",
        resize: Resize = "squash",
        micro_batch: int = MICRO_BATCH,
    ) -> None:
        check_choice("precision", precision, get_args(Precision))
        weights = _downloaded(name) if weights == "hub" else Path(weights)
        model, arguments, tensors = _outline(name, weights)
        digest = tensors_digest((name, stored.read().float()) for name, stored in sorted(tensors.items()))
        set_size(model, size)
        write_over(model)
        blocks = _blocks(tensors, model.blocks[0], weights)
        self._stream = _Stream(model.blocks[0], blocks, DTYPES[precision], micro_batch)
        model.patch_embed.proj = _InParts(model.patch_embed.proj, micro_batch)
        streamed = [_Streamed(self._stream, number) for number in range(len(blocks))]
        # timm calls a sequence of blocks as one, or one by one with what they take beside tokens
        sequence = isinstance(model.blocks, nn.Sequential)
        model.blocks = nn.Sequential(*streamed) if sequence else nn.ModuleList(streamed)
        parts = described(model, arguments, digest, resize)
        super().__init__(replace(parts, runtime="streamed"), taps=taps, precision=precision)

    @property
    def fewest(self) -> int:
        """So many images that reading the weights is little beside them, and that their taps fit."""
        return max(1, min(CALL_IMAGES, CALL_BYTES // (self.spec.record_numel() * torch.float32.itemsize)))

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


@dataclass
class BlockReader:
    """Blocks one after another, the next one read on a thread while one is used.

    Args:
        blocks: of the model.
        types: a parameter's name inside a block -> the type it is used in.
        device: to read to.
    """

    blocks: Sequence[Block]
    types: Mapping[str, torch.dtype]
    device: torch.device

    def __post_init__(self) -> None:
        self._slots = [self._empty(), self._empty()]
        self._thread = ThreadPoolExecutor(1, "blocks")
        self._ahead: tuple[int, Future[None]] | None = None
        self._used = 0  # the slot that was given last
        largest = max(stored.nbytes for stored in self.blocks[0].values())
        self._staging = torch.empty(largest, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def take(self, number: int) -> Loaded:
        """A block's parameters, to be used until the next block is asked for."""
        if self._ahead is None or self._ahead[0] != number:
            self._begin(number)
        assert self._ahead is not None
        self._ahead[1].result()
        self._used = 1 - self._used
        loaded = self._slots[self._used]
        self._begin((number + 1) % len(self.blocks))
        return loaded

    def _begin(self, number: int) -> None:
        """Read a block into the slot that is not in use, once the device has done with it."""
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        self._ahead = number, self._thread.submit(self._read, number, 1 - self._used, done)

    def _read(self, number: int, slot: int, done: torch.cuda.Event | None) -> None:
        if done is not None:
            done.synchronize()
        for name, stored in self.blocks[number].items():
            into = self._slots[slot][name]
            if into.dtype == stored.dtype and into.device.type == "cpu":
                stored.read_into(into)
                continue
            staged = self._staging[: stored.nbytes].view(stored.dtype).view(stored.shape)
            stored.read_into(staged)
            into.copy_(staged)
        if done is not None:
            torch.cuda.current_stream(self.device).synchronize()

    def _empty(self) -> Loaded:
        return {
            name: torch.empty(stored.shape, dtype=self.types[name], device=self.device)
            for name, stored in self.blocks[0].items()
        }


class _Stream:
    """One block's modules, into which the parameters of each are put in turn.

    Args:
        template: a block; its parameters are given up.
        blocks: where those of each block stand.
        lower: the type that autocast multiplies in.
        micro_batch: images at once.
    """

    def __init__(
        self, template: nn.Module, blocks: Sequence[Block], lower: torch.dtype, micro_batch: int
    ) -> None:
        types = dict.fromkeys(blocks[0], torch.float32)
        for name, module in template.named_modules():
            if isinstance(module, nn.Linear):  # what autocast rounds at every call is rounded once
                types[f"{name}.weight"] = lower
        self.template = template.eval()
        self.micro_batch = micro_batch
        self._places = {}
        for name in blocks[0]:
            where, _, attribute = name.rpartition(".")
            module = template.get_submodule(where)
            delattr(module, attribute)
            self._places[name] = module, attribute
        self._reader = BlockReader(blocks, types, torch.device("cpu"))

    def run(self, number: int, tokens: Tensor, *arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401 - timm's
        """Block `number` over all tokens, (B, N, D) -> (B, N, D), a micro-batch at a time."""
        for name, tensor in self._reader.take(number).items():
            module, attribute = self._places[name]
            module.__dict__[attribute] = tensor
        return in_parts(lambda part: self.template(part, *arguments, **named), tokens, self.micro_batch)

    def to(self, device: torch.device) -> None:
        """Read to a device from now on."""
        self.template.to(device)  # buffers
        self._reader = BlockReader(self._reader.blocks, self._reader.types, device)


class _Streamed(nn.Module):
    """Stands where a block stood."""

    def __init__(self, stream: _Stream, number: int) -> None:
        super().__init__()
        self._stream, self._number = stream, number

    def forward(self, tokens: Tensor, *arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401 - timm's own
        return self._stream.run(self._number, tokens, *arguments, **named)


class _InParts(nn.Module):
    """A module that sees a micro-batch at a time: its products do not depend on how many there are."""

    def __init__(self, module: nn.Module, micro_batch: int) -> None:
        super().__init__()
        self.module, self.micro_batch = module, micro_batch

    def forward(self, images: Tensor) -> Tensor:
        return in_parts(self.module, images, self.micro_batch)


def in_parts(run: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """What `run` gives for all inputs, asked for `size` of them at a time: (B, ..) -> (B, ..)."""
    if len(inputs) <= size:
        return run(inputs)
    first = run(inputs[:size])
    whole = first.new_empty(len(inputs), *first.shape[1:])
    whole[:size] = first
    del first
    for start in range(size, len(inputs), size):
        whole[start : start + size] = run(inputs[start : start + size])
    return whole


def _outline(name: str, weights: Path) -> tuple[ViT, dict[str, Any], dict[str, Stored]]:
    """The model with its first block alone, loaded; what its folder adds; and where all of it stands."""
    architecture = known_architecture(name)
    config = hub_config(weights / "config.json") if weights.is_dir() else None
    with torch.random.fork_rng(devices=[]):  # timm draws a start from the global generator
        if config is None:
            model = create(name, depth=1)
        else:
            model = create_from(weights, config, architecture, depth=1)
    if not isinstance(model.patch_embed, PatchEmbed):
        raise BackboneError(
            f"{architecture} embeds images by a {type(model.patch_embed).__name__}, expected patches alone, "
            "to be streamed. Type: --set backbone.runtime=eager"
        )
    stored = without(stored_tensors(weights), classifiers(model))
    given = {key: tensor.read() for key, tensor in stored.items() if _number(key) in (None, 0)}
    load_weights(model, given, f"weights {weights}")
    return model, dict((config or {}).get("model_args") or {}), stored


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
    found = BLOCK.fullmatch(key)
    return int(found[1]) if found else None


def _blocks(tensors: Mapping[str, Stored], template: nn.Module, weights: Path) -> list[Block]:
    """Where each block's parameters stand. All must be as the template."""
    blocks: dict[int, dict[str, Stored]] = {}
    for key, stored in tensors.items():
        if found := BLOCK.fullmatch(key):
            blocks.setdefault(int(found[1]), {})[found[2]] = stored
    expected = {name: tuple(tensor.shape) for name, tensor in template.state_dict().items()}
    for number in range(max(blocks) + 1):
        shapes = {name: stored.shape for name, stored in blocks.get(number, {}).items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name):
                raise BackboneError(
                    f"weights {weights}: blocks.{number}.{name} has shape {shapes.get(name)}, expected "
                    f"{expected.get(name)}; blocks are streamed where all are alike, at the model's own size "
                    "where their shapes go with it. Type: --set backbone.runtime=eager"
                )
    return [blocks[number] for number in range(len(blocks))]
