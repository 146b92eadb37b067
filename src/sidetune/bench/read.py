"""``sidetune bench read``: batches from a real store against a plain copy of the same bytes, warm.

The store is written by the library's own writer, with random features. The copy is `Tensor.copy_` from
the mapped file to a buffer of the same dtype, on the same threads: what a reader cannot beat. A batch of
the store goes the way that training takes, to `Features`.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sidetune.backbones.base import Identity, Variant
from sidetune.bench.rows import Bench, describe_machine
from sidetune.bench.setting import Setting, batches, noise
from sidetune.bench.timing import in_turn, threads
from sidetune.errors import RequestError
from sidetune.extract import SHARD_BYTES, SHARD_RECORDS
from sidetune.figures import size
from sidetune.keyed import generator
from sidetune.progress import Progress
from sidetune.shards import ShardNotes, map_shard, shard_path, write_shard
from sidetune.sources import StoredSource
from sidetune.store import Plan, Store, write_manifest, write_store_head
from sidetune.summary import summarise

GOAL = 0.70  # of the plain copy's rate
STORE_BYTES = 2**29  # far more than any cache, little enough to stay in memory
MOST_RECORDS = 2048  # of a store of tiny records, which are for trying out


def bench_read(setting: Setting, *, quiet: bool = False) -> Bench:
    """Rate of reading stored features, warm: in shuffled batches, in order, and a plain copy.

    Args:
        setting: sizes; ranks do not matter here.
        quiet: no progress.

    Returns:
        Rows of cases ``read-shuffled``, ``read-in-order`` and ``copy``; GB of stored bytes a second.

    Raises:
        RequestError: the disk has no room for the store.
        StoreError: the store could not be read.
    """
    keys = [f"{number:05d}.png@bench" for number in range(num_records(setting))]
    num_bytes = len(keys) * setting.record_bytes()
    with threads(setting.threads), tempfile.TemporaryDirectory(prefix="sidetune-bench-") as folder:
        _require_room(Path(folder), num_bytes)
        store = _write(Path(folder), setting, keys, quiet=quiet)
        assert not store.damaged(keys), (
            "the store that was just written is whole"
        )  # now it is hashed, and warm
        timings = in_turn(_cases(store, keys, setting.batch), setting.rounds, label="bench read", quiet=quiet)
        about = describe_machine(torch.device("cpu"), {**setting.to_json(), "store_bytes": num_bytes})
    rows = {name: t.rate(name, "gb_per_s", "GB/s", num_bytes / 1e9) for name, t in timings.items()}
    goal = GOAL if setting.is_the_goals else None
    read = (rows[name].to(rows["copy"], goal=goal) for name in ("read-shuffled", "read-in-order"))
    return Bench((*read, rows["copy"]), about)


def num_records(setting: Setting) -> int:
    """Images of the store: whole batches, about half a GiB."""
    most = max(setting.batch, min(MOST_RECORDS, STORE_BYTES // setting.record_bytes()))
    return most // setting.batch * setting.batch


def _require_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 2 * num_bytes:  # a shard is written beside its old self
        raise RequestError(
            f"{folder.parent} has {size(free)} free, expected {size(2 * num_bytes)}. "
            "Type: TMPDIR=/another/disk sidetune bench read"
        )


def _write(folder: Path, setting: Setting, keys: list[str], *, quiet: bool) -> Store:
    """A complete store of random features, in shards as extraction cuts them."""
    records = max(1, min(SHARD_RECORDS, SHARD_BYTES // setting.record_bytes()))
    shards = tuple(tuple(keys[first : first + records]) for first in range(0, len(keys), records))
    identity = Identity("0" * 64, "bench", {}, {})
    variant = Variant(setting.spec.names, "fp32", "eager", {})
    plan = Plan(identity, variant, setting.spec, setting.dtype, None, None, shards)
    folder.joinpath("shards").mkdir()
    write_store_head(folder, plan, None)
    drawn = noise([replace(setting, batch=records)])  # shards of equal numbers: nobody looks at them
    with Progress("write", len(keys), "records", quiet=quiet) as progress:
        for number, shard in enumerate(shards):
            taps = batches(replace(setting, batch=len(shard)), drawn)[0]
            summary = summarise(taps)
            tensors: dict[str, Tensor] = dict(zip(taps.spec.names, taps.layers, strict=True))
            tensors["valid"] = torch.ones(len(shard), dtype=torch.uint8)
            tensors["summary.mean_square"] = summary.mean_square
            for name, mean, cls in zip(taps.spec.names, summary.mean, summary.cls, strict=True):
                tensors |= {f"summary.mean.{name}": mean, f"summary.cls.{name}": cls}
            notes = ShardNotes(skipped={}, labels={})
            write_shard(folder, number, tensors, claim=plan.claim(number), notes=notes)
            progress.advance(len(shard))
    write_manifest(folder, plan)
    return Store.open(folder)


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
    buffers = {tensor.shape: torch.empty_like(tensor) for tensor in mapped}

    def read(rows: list[int]) -> None:
        for first in range(0, len(rows), batch):
            source.features(rows[first : first + batch])

    def copy() -> None:
        for tensor in mapped:
            buffers[tensor.shape].copy_(tensor)

    return {
        "read-shuffled": lambda: read(next(orders)),
        "read-in-order": lambda: read(in_order),
        "copy": copy,
    }
