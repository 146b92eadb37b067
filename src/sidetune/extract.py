"""Run a backbone over a dataset into a store. The unit of work is a shard.

The shard list is fixed before anything is decoded and micro-batches never cross shards, so the
bytes do not depend on where a run was interrupted. A killed run loses the shard in flight. New samples
go into shards by hash, not in the order of paths: files often lie sorted by class.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sidetune.backbones.base import MICRO_BATCH, Backbone
from sidetune.data.clips import Frame
from sidetune.data.dataset import Dataset, sample_key
from sidetune.data.pictures import DECODERS, Picture, decoded
from sidetune.data.views import PLAIN, AnyView, place_by_hash
from sidetune.errors import DataError, StoreError, without_remedy
from sidetune.features import Features
from sidetune.files import leftovers, locked
from sidetune.progress import Progress, say
from sidetune.shards import ShardNotes, is_written, write_shard
from sidetune.store import (
    DTYPES,
    DTypeName,
    Plan,
    Store,
    norm_digest,
    read_norm,
    write_manifest,
    write_store_head,
)
from sidetune.store_checks import (
    ANOTHER,
    check_alike,
    check_free,
    check_plan,
    give_up,
    norm_is_off,
    other_views,
    possible_shards,
)
from sidetune.summary import summarise

SHARD_BYTES = 256 * 2**20
SHARD_RECORDS = 1024  # small features: a shard is still lost in seconds, not minutes
DISK_LIMIT = 0.90  # of the disk, after the store is written
DISK_SHARE = 0.10  # of what is free on a disk fuller than that: a small store fills no disk
UNREADABLE = "unreadable"  # stands for the sha256 of a file that cannot be read


def extract(  # noqa: PLR0913 - what, where, how; each has its option on the command line
    dataset: Dataset,
    backbone: Backbone,
    folder: Path,
    *,
    dtype: DTypeName = "fp16",
    keys: Sequence[str] | None = None,
    views: Sequence[AnyView] = (PLAIN,),
    reads: Sequence[str] | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> Store:
    """Bring a store up to date with a dataset: extract what it does not hold yet, and what is damaged.

    What the dataset will read is hashed, so a damaged shard is found and extracted again here. A store
    that lacks nothing is not written to: its folder may be read-only.

    Args:
        dataset: every split is extracted; labels are kept for information only.
        backbone: its taps are what is stored.
        folder: the store; made, resumed, extended, or found complete.
        dtype: of the stored features.
        keys: the dataset's sample keys, if they are known already; every image is hashed for them.
        views: of every image, the image itself first; see `sidetune.data.views`.
        reads: taps whose features will be read, none for summaries alone; None: all. Only they are hashed.
        strict: an image that cannot be read is an error, raised once the store is complete.
        quiet: no progress.

    Returns:
        The complete store.

    Raises:
        DataError: `strict`, and images cannot be read.
        RequestError: the folder holds something that is no store.
        StoreError: the folder holds another backbone's features, another dtype or fewer taps, the disk
            would fill (`disk_room`), the features overflow the dtype, or a damaged shard cannot be mended.
    """
    keys = sample_keys(dataset) if keys is None else keys
    pictures = {
        view.key(key): Picture(dataset.file(row), view, key) for row, key in enumerate(keys) for view in views
    }
    store = _served(folder, backbone, dtype, tuple(pictures), reads, quiet)
    if store is None:
        labels = {key: _label(dataset, row) for row, key in enumerate(keys)}
        store = _mended(folder, backbone, dtype, pictures, labels, reads, quiet=quiet)
    if strict:
        bad = skipped_samples(store, keys, views)
        sample = "clip" if dataset.clips else "image"
        require_readable([f"{path}: {reason}" for path, reason in bad.items()], sample=sample)
    return store


def skipped_samples(store: Store, keys: Sequence[str], views: Sequence[AnyView]) -> dict[str, str]:
    """Path of each sample that could not be read -> why, as its first such view has it.

    Args:
        store: complete.
        keys: of the samples.
        views: of every sample.
    """
    rows = store.skipped_rows([[view.key(key) for key in keys] for view in views])
    return {keys[row].rpartition("@")[0]: reason for row, reason in sorted(rows.items())}


def require_readable(skipped: Sequence[str], where: str = "", *, sample: str = "image") -> None:
    """What --strict asks for.

    Args:
        skipped: ``path: reason`` of each sample that could not be read.
        where: all of them are listed.
        sample: what a sample is called.

    Raises:
        DataError: there are some; names the first.
    """
    if skipped:
        listed = f" ({where} lists all)" if where else ""
        many = f"{len(skipped)} {sample}" + "s" * (len(skipped) > 1)
        raise DataError(
            f"{many} cannot be read, the first {skipped[0]}{listed}; --strict expects none. "
            "Mend or remove them, or type the same command without --strict, which leaves them out"
        )


def _mended(
    folder: Path,
    backbone: Backbone,
    dtype: DTypeName,
    pictures: Mapping[str, Picture],
    labels: Mapping[str, str],
    reads: Sequence[str] | None,
    *,
    quiet: bool,
) -> Store:
    """The store with every shard that was missing or damaged written anew."""
    keys = tuple(pictures)
    with locked(folder):
        pictures = {**pictures, **other_views(folder, pictures)}
        for path in leftovers(folder / "shards"):
            path.unlink()
        while True:  # twice at most, unless other shards go bad meanwhile
            store, new = _complete(folder, backbone, dtype, pictures, labels, quiet=quiet)
            damaged = store.damaged(keys, reads, quiet=quiet)
            if not damaged:
                return store
            give_up(store, damaged, new, backbone, set(pictures))


def _served(
    folder: Path,
    backbone: Backbone,
    dtype: DTypeName,
    keys: Sequence[str],
    reads: Sequence[str] | None,
    quiet: bool,
) -> Store | None:
    """The store if nothing need be written; else what is damaged has been said."""
    try:
        store = Store.open(folder)
        read_norm(folder, store.plan)
    except StoreError as error:
        if (folder / "manifest.json").exists():
            say(f"{without_remedy(error)}; it is written anew", quiet=quiet)
        return None
    check_plan(folder, store.plan, backbone, dtype)
    if store.missing(keys):
        return None
    damaged = store.damaged(keys, reads, quiet=quiet)
    for defect in damaged.values():
        say(f"{without_remedy(defect)}; it is written anew", quiet=quiet)
    if damaged and not os.access(folder, os.W_OK):
        defect = without_remedy(next(iter(damaged.values())))
        raise StoreError(f"{defect}; and {folder} cannot be written. {ANOTHER}")
    return None if damaged else store


def _complete(
    folder: Path,
    backbone: Backbone,
    dtype: DTypeName,
    pictures: Mapping[str, Picture],
    labels: Mapping[str, str],
    *,
    quiet: bool,
) -> tuple[Store, list[int]]:
    """Write every shard that is not written yet. Returns the store and the numbers of those shards."""
    plan = _plan(folder, backbone, dtype, pictures)
    todo = [number for number in plan.numbers if not is_written(folder, number, plan.claim(number))]
    if todo or not (folder / "manifest.json").exists() or norm_is_off(folder, plan):
        check_alike(folder, plan, backbone, todo)
        _check_disk(folder, plan, todo, quiet)
        (folder / "manifest.json").unlink(missing_ok=True)
        write_store_head(folder, plan, backbone.norm)
        _write_shards(folder, plan, backbone, pictures, labels, todo, quiet=quiet)
        write_manifest(folder, plan)
    return Store.open(folder), todo


def sample_keys(dataset: Dataset) -> tuple[str, ...]:
    """The key of every sample. A file that cannot be read has ``unreadable`` for its sha256."""
    return tuple(key_of(path, dataset.file(row)) for row, path in enumerate(dataset.paths))


def key_of(path: Path, file: Path) -> str:
    """As `sample_key`, with ``unreadable`` for the sha256 of a file that cannot be read."""
    try:
        return sample_key(path, file)
    except OSError:
        return f"{path.as_posix()}@{UNREADABLE}"


def _plan(folder: Path, backbone: Backbone, dtype: DTypeName, pictures: Mapping[str, Picture]) -> Plan:
    """The folder's plan, checked against the backbone and extended by the keys it lacks."""
    keys = tuple(pictures)
    plan = Plan(
        backbone.identity,
        backbone.variant,
        backbone.spec,
        dtype,
        None if backbone.norm is None else backbone.norm.eps,
        None if backbone.norm is None else norm_digest(backbone.norm),
    )
    if (folder / "plan.json").exists():
        plan = Plan.read(folder)
        check_plan(folder, plan, backbone, dtype)
        plan = replace(plan, shards=possible_shards(folder, plan, set(keys)))
    else:
        check_free(folder)
    held = {key for shard in plan.shards for key in shard}
    missing = sorted({key for key in keys if key not in held}, key=place_by_hash)
    size = max(backbone.call_size or 1, min(SHARD_RECORDS, SHARD_BYTES // plan.record_bytes))
    view = pictures[missing[0]].view if missing else PLAIN
    together = view.count if isinstance(view, Frame) else 1
    whole = size - size % together  # a clip that lies in two shards is decoded twice,
    size = whole or (together if backbone.call_size is None else size)  # but a call has its size
    new = tuple(tuple(missing[first : first + size]) for first in range(0, len(missing), size))
    return replace(plan, shards=plan.shards + new)


def disk_room(folder: Path) -> int:
    """Bytes that features may take: up to 90 % of a folder's disk, or a tenth of what is free, if more."""
    disk = shutil.disk_usage(folder)
    return max(int(DISK_LIMIT * (disk.used + disk.free)) - disk.used, int(DISK_SHARE * disk.free))


def _check_disk(folder: Path, plan: Plan, todo: Sequence[int], quiet: bool) -> None:
    """Say how many bytes will be written, and refuse where they would fill the disk."""
    needed = sum(len(plan.shards[number]) for number in todo) * plan.record_bytes
    room = disk_room(folder)
    if todo and needed > room:
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"the store needs {needed / 2**20:,.1f} MiB more; of {free / 2**20:,.1f} MiB free at {folder} "
            f"it may take {room / 2**20:,.1f} (up to 90 % of the disk, or a tenth of what is free). "
            "Type: --live, or --set features.dtype=fp16, or a smaller --size"
        )
    if todo:
        say(f"extract: {needed / 2**20:,.1f} MiB of features to write", quiet=quiet)


def _write_shards(
    folder: Path,
    plan: Plan,
    backbone: Backbone,
    pictures: Mapping[str, Picture],
    labels: Mapping[str, str],
    todo: Sequence[int],
    *,
    quiet: bool,
) -> None:
    total = sum(map(len, plan.shards))
    done = total - sum(len(plan.shards[number]) for number in todo)
    with (
        Progress("extract", total, "images", done=done, quiet=quiet) as progress,
        ThreadPoolExecutor(DECODERS) as pool,
    ):
        for number in todo:
            shown = [pictures[key] for key in plan.shards[number]]
            animated: list[Path] = []
            parts: list[dict[str, Tensor]] = []
            reasons: dict[int, str] = {}
            batches = decoded(shown, backbone.preprocess, pool, animated, call_size=backbone.call_size)
            for first, images, bad in batches:
                reasons |= {first + slot: reason for slot, reason in bad.items()}
                most = backbone.call_size or 2 * MICRO_BATCH  # a clip that is long is one batch
                parts += [_stored(part, backbone, plan) for part in images.split(most)]
                progress.advance(len(images))
            _check_unchanged(folder, shown, pool)
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            tensors["valid"] = torch.ones(len(shown), dtype=torch.uint8)
            tensors["valid"][list(reasons)] = 0
            frames = set(animated)
            notes = ShardNotes(
                skipped=reasons,
                labels={slot: labels[picture.key] for slot, picture in enumerate(shown)},
                animated=tuple(slot for slot, picture in enumerate(shown) if picture.file in frames),
            )
            write_shard(folder, number, tensors, claim=plan.claim(number), notes=notes)


def _check_unchanged(folder: Path, shown: Sequence[Picture], pool: ThreadPoolExecutor) -> None:
    """What was decoded must be what the keys say: an image may be edited while a long extraction runs.

    Raises:
        StoreError: names the first that is not.
    """
    files = {picture.file: picture.key for picture in shown}
    for key, found in zip(files.values(), pool.map(_digest, files), strict=True):
        path, _, digest = key.rpartition("@")
        if digest != found:
            raise StoreError(
                f"{path} was changed while {folder} was extracted: its sha256 starts with {found[:12]}, "
                f"expected {digest[:12]}. Type the same command again: it resumes"
            )


def _digest(file: Path) -> str:
    return key_of(file, file).rpartition("@")[2]


def _stored(images: Tensor, backbone: Backbone, plan: Plan) -> dict[str, Tensor]:
    """A micro-batch's tensors as a shard holds them. The summary is of the rounded features."""
    with torch.inference_mode():
        features = run_rounded(images, backbone, plan.dtype).to("cpu")
    summary = summarise(features)
    tensors = dict(zip(plan.spec.names, features.layers, strict=True))
    tensors |= {
        f"summary.mean.{name}": mean for name, mean in zip(plan.spec.names, summary.mean, strict=True)
    }
    tensors |= {f"summary.cls.{name}": cls for name, cls in zip(plan.spec.names, summary.cls, strict=True)}
    return tensors | {"summary.mean_square": summary.mean_square}


def run_rounded(images: Tensor, backbone: Backbone, dtype: DTypeName) -> Features:
    """Features of images in a store's type, rounded as soon as each is there: memory is theirs.

    Args:
        images: of a call.
        backbone: that reads them.
        dtype: to round to.

    Raises:
        StoreError: a feature is more than the type can hold, or not finite.
    """
    precision = backbone.variant.precision
    try:
        return rounded(backbone.giving(DTYPES[dtype])(images), dtype, precision)
    except StoreError:  # what was rounded does not say which of the two it was
        return rounded(backbone(images), dtype, precision)


def rounded(features: Features, dtype: DTypeName, precision: str) -> Features:
    """Features in a store's type.

    Args:
        features: as the backbone gives them.
        dtype: to round to.
        precision: of the backbone, for the message.

    Raises:
        StoreError: a feature is more than the type can hold, or not finite.
    """
    found = features.to(features.layers[0].device, DTYPES[dtype])
    for layer, read, tap in zip(found.layers, features.layers, features.spec.taps, strict=True):
        if not torch.isfinite(read).all():
            raise StoreError(
                f"tap {tap.name!r} holds NaN or infinity as the backbone gives it in "
                f"{precision}. Type: --set backbone.precision=fp32, or other --weights"
            )
        if not torch.isfinite(layer).all():
            raise StoreError(
                f"tap {tap.name!r} reaches {read.abs().max():.4g}, more than {dtype} can hold. "
                f"Type: --set features.dtype=bf16, and a new folder where --store or --out names one"
            )
    return found


def _label(dataset: Dataset, row: int) -> str:
    target = dataset.targets[row]
    if dataset.task != "classify":
        return str(target.tolist())
    return dataset.outputs[int(target)] if target >= 0 else ""
