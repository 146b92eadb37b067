"""Records of a store's shards as batches: gathered from memory maps, by one copy each, as they are stored.

A record, one sample's (N, D) of one tap, stands in one piece, so even a batch in random order reads runs of
50 kB to megabytes. What was read stays in the system's page cache for as long as memory lasts: after the
first epoch a store that fits is read at the speed of a copy. `Records.fetch` asks for shards front to
back, ahead of their use, where a store does not fit. Nothing is converted here: a side does that, a
piece at a time.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.errors import StoreError
from sidetune.features import Spec
from sidetune.shards import AGAIN, MappedShard, ShardEntry, map_shard, record_shapes, shard_path

ALIGNMENT = 64  # bytes, as torch aligns its own: products must not depend on where a batch stands
KEPT = 5  # buffers: the batch in use, the one before it, two read ahead, and one of another reading
SPARE = 32  # times what is asked for: the last batch of an epoch may be of one sample
Bytes = NDArray[np.uint8]


class Buffers:
    """Memory for batches, used again once nobody holds a tensor in it.

    Fresh memory costs more than the copy into it: the system clears every page at its first touch
    (measured: 2 GB/s against 20). A buffer is free again when no tensor, view or graph refers to it, so
    nobody need say so and nothing that is kept is written over. Five buffers at most are kept, and none that
    is far too large.
    """

    def __init__(self) -> None:
        self._kept: list[Bytes] = []
        self._lock = threading.Lock()

    def layers(self, count: int, spec: Spec, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Tensors (count, N, D), one a tap, of undefined content."""
        shapes = [(count, tap.num_tokens, tap.width) for tap in spec.taps]
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        whole = self._take(starts[-1])
        return tuple(
            whole[start : start + size].view(dtype).view(shape)
            for start, size, shape in zip(starts, sizes, shapes, strict=False)
        )

    def _take(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8 that begins at a multiple of `ALIGNMENT`."""
        with self._lock:
            free = [index for index, count in enumerate(_references(self._kept)) if count == UNUSED]
            needed = num_bytes + ALIGNMENT
            fitting = [index for index in free if needed <= len(self._kept[index]) <= SPARE * needed]
            if fitting:
                buffer = self._kept[fitting[0]]
            else:
                for index in reversed(free):  # batches have another size now
                    del self._kept[index]
                buffer = np.empty(needed, np.uint8)
                if len(self._kept) < KEPT:
                    self._kept.append(buffer)
            first = -buffer.ctypes.data % ALIGNMENT
            return torch.from_numpy(buffer)[first : first + num_bytes]  # it refers to the buffer


def _references(buffers: list[Bytes]) -> list[int]:
    """How many references there are to each, those of the list and of the question itself included."""
    return [sys.getrefcount(one) for one in buffers]


UNUSED = _references([np.empty(1, np.uint8)])[0]  # Python's versions count differently


@dataclass
class Records:
    """The shards of a store, open for reading.

    Args:
        folder: of the store.
        spec: the taps that it holds.
        dtype: of its features.
        counts: shard number -> samples in it.
        entries: shard number -> its checksum file.
    """

    folder: Path
    spec: Spec
    dtype: torch.dtype
    counts: dict[int, int]
    entries: dict[int, ShardEntry]
    _maps: dict[int, MappedShard] = field(default_factory=dict, repr=False)
    _checked: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)
    _rows: dict[tuple[int, str], Bytes] = field(default_factory=dict, repr=False)
    _buffers: Buffers = field(default_factory=Buffers, repr=False)

    def gather(self, places: Sequence[tuple[int, int]], spec: Spec) -> tuple[Tensor, ...]:
        """Records in the order asked for: a (B, N, D) a tap, in the stored dtype.

        Args:
            places: (shard, slot) of B samples.
            spec: the taps, of those that the store holds.

        Raises:
            StoreError: a shard is damaged.
        """
        shards = {shard for shard, _ in places}
        for shard in shards:
            self.map(shard)  # it has the plan's shapes, or no memory is taken for them
        layers = self._buffers.layers(len(places), spec, self.dtype)
        for layer, tap in zip(layers, spec.taps, strict=True):
            sources = {shard: self._bytes(shard, tap.name) for shard in shards}
            batch = _as_bytes(layer)
            for row, (shard, slot) in enumerate(places):
                batch[row] = sources[shard][slot]
        return layers

    def tensor(self, number: int, name: str) -> Tensor:
        """A tensor of a shard, hashed at the first touch.

        Raises:
            StoreError: it is damaged.
        """
        found = self._checked.get((number, name))
        if found is None:
            found = self._checked[number, name] = self.map(number).checked(name, self.entries[number])
        return found

    def map(self, number: int) -> MappedShard:
        """A shard, whose tensors have the shapes and features the dtype that the plan says.

        Raises:
            StoreError: they have not.
        """
        if number not in self._maps:
            shard = map_shard(shard_path(self.folder, number))
            shard.require(record_shapes(self.spec, self.counts[number]))
            for name in self.spec.names:
                if shard.tensors[name].dtype != self.dtype:
                    raise StoreError(
                        f"shard {shard.path} is damaged: {name!r} is {shard.tensors[name].dtype}, "
                        f"expected {self.dtype}. {AGAIN}"
                    )
            self._maps[number] = shard
        return self._maps[number]

    def shard_bytes(self, number: int, spec: Spec) -> int:
        """Bytes of these taps in a shard."""
        return self.counts[number] * spec.record_numel() * self.dtype.itemsize

    def fetch(self, numbers: Iterable[int], spec: Spec) -> None:
        """Ask the system to read these taps into its page cache, front to back, and do not wait for it.

        Does nothing where the system cannot be asked.
        """
        for number in numbers if hasattr(os, "posix_fadvise") else ():
            shard = self.map(number)
            with shard.path.open("rb") as stream:
                for name in spec.names:
                    tensor = shard.tensors[name]
                    first = int(tensor.storage_offset()) * tensor.itemsize  # the map begins with the file
                    os.posix_fadvise(stream.fileno(), first, tensor.nbytes, os.POSIX_FADV_WILLNEED)

    def _bytes(self, number: int, name: str) -> Bytes:
        """The records of a tap, (n, bytes): NumPy starts a copy in a fraction of torch's time."""
        found = self._rows.get((number, name))
        if found is None:
            found = self._rows[number, name] = _as_bytes(self.tensor(number, name))
        return found


def _as_bytes(records: Tensor) -> Bytes:
    """(n, ..) -> (n, bytes), of the same memory."""
    count = len(records)
    rows: Bytes = records.view(-1).view(torch.uint8).numpy().reshape(count, records.nbytes // max(count, 1))
    return rows
