"""``sidetune bench read``: batches from a real store against a plain copy of the same bytes, warm.

The store is written by the library's own writer, with random features. A batch of it goes the way that
training takes, to `Features`. Two copies stand beside, both by `Tensor.copy_` from the mapped files, front
to back, on the same threads:

- ``copy`` goes into memory as large as a batch, used again and again. This is what reading must do, for a
  batch stands in memory as a whole before it is used: the goal is against it.
- ``copy-in-cache`` goes into a target of 4 MB, which stays in the cache. It says how fast the bytes could be
  looked at by who does not write them back to memory; nothing that makes batches gets there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sidetune.backbones.base import Identity, Variant
from sidetune.bench.rows import Bench, describe_machine
from sidetune.bench.setting import Setting, batches, noise
from sidetune.bench.stores import in_shards, require_room, temporary_folder, write_store
from sidetune.bench.timing import in_turn
from sidetune.features import Features
from sidetune.keyed import generator
from sidetune.shards import map_shard, shard_path
from sidetune.sources import StoredSource
from sidetune.store import Plan, Store
from sidetune.threads import torch_threads

GOAL = 0.70  # of the plain copy's rate
STORE_BYTES = 2**29  # far more than any cache, little enough to stay in memory
MOST_RECORDS = 2048  # of a store of tiny records, which are for trying out
CACHE_TARGET = 4 * 2**20  # bytes: in the last-level cache with what is read


def bench_read(setting: Setting, *, quiet: bool = False) -> Bench:
    """Rate of reading stored features, warm: in shuffled batches, in order, and a plain copy.

    Args:
        setting: sizes; ranks do not matter here.
        quiet: no progress.

    Returns:
        Rows of cases ``read-shuffled``, ``read-in-order``, ``copy`` and ``copy-in-cache``; GB of stored bytes
        a second.

    Raises:
        RequestError: the disk has no room for the store.
        StoreError: the store could not be read.
    """
    keys = [f"{number:05d}.png@bench" for number in range(num_records(setting))]
    num_bytes = len(keys) * setting.record_bytes()
    with torch_threads(setting.threads), temporary_folder() as folder:
        require_room(folder, num_bytes, "sidetune bench read")
        store = _write(folder, setting, keys, quiet=quiet)
        damaged = store.damaged(keys)  # hashes all, and warms it
        assert not damaged, damaged
        timings = in_turn(_cases(store, keys, setting.batch), setting.rounds, label="bench read", quiet=quiet)
        about = describe_machine(torch.device("cpu"), {**setting.to_json(), "store_bytes": num_bytes})
    rows = {name: t.rate(name, "gb_per_s", "GB/s", num_bytes / 1e9) for name, t in timings.items()}
    goal = GOAL if setting.is_the_goals else None
    read = (rows[name].to(rows["copy"], goal=goal) for name in ("read-shuffled", "read-in-order"))
    return Bench((*read, rows["copy"], rows["copy-in-cache"].to(rows["copy"])), about)


def num_records(setting: Setting) -> int:
    """Images of the store: whole batches, about half a GiB."""
    most = max(setting.batch, min(MOST_RECORDS, STORE_BYTES // setting.record_bytes()))
    return most // setting.batch * setting.batch


def _write(folder: Path, setting: Setting, keys: list[str], *, quiet: bool) -> Store:
    """A complete store of random features, in shards as extraction cuts them."""
    identity = Identity("0" * 64, "bench", {}, {})
    variant = Variant(setting.spec.names, "fp32", "eager", {})
    shards = in_shards(keys, setting.record_bytes())
    plan = Plan(identity, variant, setting.spec, setting.dtype, None, None, shards)
    drawn = noise([replace(setting, batch=max(map(len, shards)))])  # shards of equal numbers: nobody looks

    def taps(number: int) -> Features:
        return batches(replace(setting, batch=len(shards[number])), drawn)[0]

    return write_store(folder, plan, taps, quiet=quiet)


def _cases(store: Store, keys: list[str], batch: int) -> dict[str, Callable[[], object]]:
    source = StoredSource(store, keys)
    in_order = list(range(len(keys)))
    orders = (
        torch.randperm(len(keys), generator=generator(0, "bench/order", i)).tolist()
        for i in itertools.count()
    )
    mapped = [
        map_shard(shard_path(store.folder, number)).tensors[name]
        for number in store.plan.numbers
        for name in store.plan.spec.names
    ]
    batch_bytes = batch * store.plan.record_bytes
    plain, in_cache = _copies(mapped, batch_bytes), _copies(mapped, min(CACHE_TARGET, batch_bytes))

    def read(rows: list[int]) -> None:
        for first in range(0, len(rows), batch):
            source.features(rows[first : first + batch])

    return {
        "read-shuffled": lambda: read(next(orders)),
        "read-in-order": lambda: read(in_order),
        "copy": lambda: _copy(plain),
        "copy-in-cache": lambda: _copy(in_cache),
    }


def _copies(mapped: Sequence[Tensor], num_bytes: int) -> list[tuple[Tensor, Tensor]]:
    """(from, to) of every byte, to a target of so many bytes that is filled again and again."""
    target = torch.empty(num_bytes, dtype=torch.uint8)
    pairs, filled = [], 0
    for tensor in mapped:
        left = tensor.flatten().view(torch.uint8)
        while len(left):
            filled %= num_bytes
            part = left[: num_bytes - filled]
            pairs.append((part, target[filled : filled + len(part)]))
            left, filled = left[len(part) :], filled + len(part)
    return pairs


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for source, target in pairs:
        target.copy_(source)
