"""A real store for a bench, by the library's own writer, in a temporary folder that is removed at the end."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sidetune.errors import RequestError
from sidetune.extract import SHARD_BYTES, SHARD_RECORDS
from sidetune.features import Features, FinalNorm
from sidetune.figures import size
from sidetune.progress import Progress
from sidetune.shards import ShardNotes, write_shard
from sidetune.store import Plan, Store, write_manifest, write_store_head
from sidetune.summary import summarise


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, also where the process is told to end."""
    with _ends_by_raising(), tempfile.TemporaryDirectory(prefix="sidetune-bench-") as folder:
        yield Path(folder)


@contextmanager
def _ends_by_raising() -> Iterator[None]:
    """SIGTERM raises inside, as Ctrl-C does: a store in the temporary folder is removed on the way out."""
    if threading.current_thread() is not threading.main_thread():  # only there are signals met
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # what a shell says of it

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def require_room(folder: Path, num_bytes: int, command: str) -> None:
    """Whether a store fits on the disk.

    Args:
        folder: that it is written into.
        num_bytes: of its features.
        command: that asks, for the error.

    Raises:
        RequestError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * num_bytes:  # a shard is written beside its old self
        raise RequestError(
            f"{folder.parent} has {size(free)} free, expected {size(2 * num_bytes)}. "
            f"Type: TMPDIR=/another/disk {command}"
        )


def in_shards(keys: list[str], record_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Keys as extraction cuts them, in the order given."""
    records = max(1, min(SHARD_RECORDS, SHARD_BYTES // record_bytes))
    return tuple(tuple(keys[first : first + records]) for first in range(0, len(keys), records))


def write_store(
    folder: Path,
    plan: Plan,
    taps: Callable[[int], Features],
    *,
    norm: FinalNorm | None = None,
    quiet: bool = True,
) -> Store:
    """A complete store.

    Args:
        folder: that is there and empty.
        plan: with its shards.
        taps: number of a shard -> its samples' features, in the stored dtype.
        norm: the backbone's.
        quiet: no progress.
    """
    folder.joinpath("shards").mkdir()
    write_store_head(folder, plan, norm)
    with Progress("write", sum(map(len, plan.shards)), "records", quiet=quiet) as progress:
        for number, shard in enumerate(plan.shards):
            features = taps(number)
            summary = summarise(features)
            tensors: dict[str, Tensor] = dict(zip(features.spec.names, features.layers, strict=True))
            tensors["valid"] = torch.ones(len(shard), dtype=torch.uint8)
            tensors["summary.mean_square"] = summary.mean_square
            for name, mean, cls in zip(features.spec.names, summary.mean, summary.cls, strict=True):
                tensors |= {f"summary.mean.{name}": mean, f"summary.cls.{name}": cls}
            notes = ShardNotes(skipped={}, labels={})
            write_shard(folder, number, tensors, claim=plan.claim(number), notes=notes)
            progress.advance(len(shard))
    write_manifest(folder, plan)
    return Store.open(folder)
