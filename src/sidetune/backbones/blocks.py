"""Blocks of a model that stay on disk: one after another they are read into the modules of one of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidetune.backbones.base import MICRO_BATCH
from sidetune.backbones.weightfile import Stored
from sidetune.errors import BackboneError

CALL_BYTES = 2**30  # of what one call holds, in float32
CALL_IMAGES = 64  # at most
PART_BYTES = 32 * 2**20  # of the widest layer's output, of what goes through a block at once
COPIES = 2  # of a block's tensors at a time
Block = Mapping[str, Stored]  # a parameter's name inside the block -> where it stands
Loaded = dict[str, Tensor]


class BlockReader(ABC):
    """Blocks of a model one after another, read where the last one stood.

    Args:
        blocks: of the model.
        types: a parameter's name inside a block -> the type it is used in.
        device: to read to.
    """

    def __init__(
        self, blocks: Sequence[Block], types: Mapping[str, torch.dtype], device: torch.device
    ) -> None:
        self.blocks, self.types, self.device = blocks, types, device

    @abstractmethod
    def take(self, number: int) -> Loaded:
        """A block's parameters, to be used until the next block is asked for."""

    def _room(self) -> Loaded:
        return {
            name: torch.empty(stored.shape, dtype=self.types[name], device=self.device)
            for name, stored in self.blocks[0].items()
        }


class CachedReader(BlockReader):
    """On a CPU: the system reads the next block into its cache while one is used.

    From there a block comes in a fraction of the time that its products take, and memory holds one block.
    """

    def __init__(
        self, blocks: Sequence[Block], types: Mapping[str, torch.dtype], device: torch.device
    ) -> None:
        super().__init__(blocks, types, device)
        self._loaded = self._room()
        self._copies = ThreadPoolExecutor(COPIES, "blocks")
        self._expecting = ThreadPoolExecutor(1, "blocks-ahead")

    def take(self, number: int) -> Loaded:
        """See `BlockReader.take`."""
        largest_first = sorted(self.blocks[number].items(), key=lambda item: -item[1].nbytes)
        copies = [self._copies.submit(stored.read_into, self._loaded[name]) for name, stored in largest_first]
        try:
            for copy in copies:
                copy.result()
        finally:
            wait(copies)  # whatever went wrong, nobody writes any more where the next call reads to
        self._expecting.submit(self._expect, (number + 1) % len(self.blocks))
        return self._loaded

    def _expect(self, number: int) -> None:
        for stored in self.blocks[number].values():
            stored.expect()


class AheadReader(BlockReader):
    """On a GPU: a thread reads the next block into a second place there while one is used."""

    def __init__(
        self, blocks: Sequence[Block], types: Mapping[str, torch.dtype], device: torch.device
    ) -> None:
        super().__init__(blocks, types, device)
        self._slots = [self._room(), self._room()]
        self._thread = ThreadPoolExecutor(1, "blocks")
        self._ahead: tuple[int, Future[None]] | None = None
        self._used = 0  # the slot that was given last
        largest = max(stored.nbytes for block in blocks for stored in block.values())
        self._staging = torch.empty(largest, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def take(self, number: int) -> Loaded:
        """See `BlockReader.take`."""
        if self._ahead is None or self._ahead[0] != number:
            self._begin(number)
        assert self._ahead is not None
        ahead, self._ahead = self._ahead[1], None  # what failed is asked for again by the next call
        ahead.result()
        self._used = 1 - self._used
        loaded = self._slots[self._used]
        self._begin((number + 1) % len(self.blocks))
        return loaded

    def _begin(self, number: int) -> None:
        """Read a block into the slot that is not in use, once the device has done with it."""
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
        self._ahead = number, self._thread.submit(self._read, number, 1 - self._used, done)

    def _read(self, number: int, slot: int, done: torch.cuda.Event | None) -> None:
        if done is not None:
            done.synchronize()
        for name, stored in self.blocks[number].items():
            staged = self._staging[: stored.nbytes].view(stored.dtype).view(stored.shape)
            stored.read_into(staged)
            self._slots[slot][name].copy_(staged)
        if done is not None:
            torch.cuda.current_stream(self.device).synchronize()


def reader_of(blocks: Sequence[Block], types: Mapping[str, torch.dtype], device: torch.device) -> BlockReader:
    """The reader for a device. Args as for `BlockReader`."""
    kind = CachedReader if device.type == "cpu" else AheadReader
    return kind(blocks, types, device)


class Stream:
    """One block's modules, into which the parameters of each are put in turn.

    Args:
        template: a block; its parameters are given up.
        blocks: where those of each block stand.
        lower: the type that autocast multiplies in.
        micro_batch: images at once; None: on a CPU as many as `PART_BYTES` allow, `MICRO_BATCH` at most.
    """

    def __init__(
        self, template: nn.Module, blocks: Sequence[Block], lower: torch.dtype, micro_batch: int | None = None
    ) -> None:
        types, widest = dict.fromkeys(blocks[0], torch.float32), 1
        for name, module in template.named_modules():
            if isinstance(module, nn.Linear):  # what autocast rounds at every call is rounded once
                types[f"{name}.weight"] = lower
                widest = max(widest, module.out_features)
        self._token_bytes = widest * lower.itemsize
        self.template, self.gives_tuple = template.eval(), False
        self.micro_batch = micro_batch
        self._places = {}
        for name in blocks[0]:
            where, _, attribute = name.rpartition(".")
            module = template.get_submodule(where)
            delattr(module, attribute)
            self._places[name] = module, attribute
        self._reader = reader_of(blocks, types, torch.device("cpu"))

    def run(self, number: int, tokens: Tensor, *arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401 - the model's
        """Block `number` over all tokens, (B, N, D) -> (B, N, D), a micro-batch at a time."""
        for name, tensor in self._reader.take(number).items():
            module, attribute = self._places[name]
            module.__dict__[attribute] = tensor

        def block(part: Tensor) -> Tensor:
            given: Any = self.template(part, *arguments, **named)
            self.gives_tuple = isinstance(given, tuple)
            out: Tensor = given[0] if self.gives_tuple else given
            return out

        return in_parts(block, tokens, self.micro_batch or self._fitting(tokens))

    def _fitting(self, tokens: Tensor) -> int:
        """Samples whose widest activation is small beside a block."""
        if tokens.device.type != "cpu":
            return MICRO_BATCH
        return max(1, min(MICRO_BATCH, PART_BYTES // (tokens.shape[1] * self._token_bytes)))

    def to(self, device: torch.device) -> None:
        """Read to a device from now on."""
        self.template.to(device)  # buffers
        self._reader = reader_of(self._reader.blocks, self._reader.types, device)


class StreamedBlock(nn.Module):
    """Stands where a block stood."""

    def __init__(self, stream: Stream, number: int) -> None:
        super().__init__()
        self._stream, self._number = stream, number

    def forward(self, tokens: Tensor, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - the model's own
        """See `Stream.run`; where blocks of the model give a tuple, a tuple of it alone."""
        out = self._stream.run(self._number, tokens, *arguments, **named)
        return (out,) if self._stream.gives_tuple else out


def a_call(numel: int) -> int:
    """Images or clips of so many numbers each that a call has. Reading is little beside them, they fit."""
    return max(1, min(CALL_IMAGES, CALL_BYTES // (numel * torch.float32.itemsize)))


def run_in_parts(module: nn.Module, size: int) -> None:
    """Let a module see `size` samples at a time: its products do not depend on how many there are."""
    whole: Callable[[Tensor], Tensor] = module.forward
    module.forward = lambda images: in_parts(whole, images, size)


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


def numbered(path: str) -> re.Pattern[str]:
    """What matches the names of parameters in blocks: the number, and the name inside the block."""
    return re.compile(rf"{re.escape(path)}\.(\d+)\.(.+)")


def blocks_of(tensors: Mapping[str, Stored], path: str, template: nn.Module, weights: Path) -> list[Block]:
    """Where each block's parameters stand.

    Args:
        tensors: of a model, by name.
        path: of the blocks in the model, behind which their numbers stand.
        template: a block, as all must be.
        weights: what is said to hold others.

    Raises:
        BackboneError: they are not, or one is missing.
    """
    blocks: dict[int, dict[str, Stored]] = {}
    pattern = numbered(path)
    for key, stored in tensors.items():
        if found := pattern.fullmatch(key):
            blocks.setdefault(int(found[1]), {})[found[2]] = stored
    expected = {name: tuple(tensor.shape) for name, tensor in template.state_dict().items()}
    for number in range(max(blocks) + 1):
        shapes = {name: stored.shape for name, stored in blocks.get(number, {}).items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if name not in shapes:
                raise BackboneError(
                    f"weights {weights} lack {path}.{number}.{name}, expected {expected[name]}. "
                    "Type: --weights with those of the whole model"
                )
            if expected.get(name) != shapes[name]:
                raise BackboneError(
                    f"weights {weights}: {path}.{number}.{name} has shape {shapes[name]}, expected "
                    f"{expected.get(name)}; blocks are streamed where all are alike, at the model's own size "
                    "where their shapes go with it. Type: --set backbone.runtime=eager"
                )
    return [blocks[number] for number in range(len(blocks))]
