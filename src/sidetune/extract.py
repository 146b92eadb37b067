"""Run a backbone over a dataset into a store. The unit of work is a shard.

The shard list is fixed before anything is decoded and micro-batches never cross shards, so the
bytes do not depend on where a run was interrupted. A killed run loses the shard in flight.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sidetune.backbones.base import Backbone
from sidetune.data.dataset import Dataset, sample_key
from sidetune.data.preprocess import Preprocess
from sidetune.data.views import PLAIN, Picture, View
from sidetune.errors import DataError, ImageError, StoreError
from sidetune.features import Features
from sidetune.files import locked
from sidetune.progress import Progress, say
from sidetune.shards import is_written, shard_path, write_shard
from sidetune.store import (
    DTYPES,
    DTypeName,
    Plan,
    Store,
    write_manifest,
    write_store_head,
)
from sidetune.summary import summarise

SHARD_BYTES = 256 * 2**20
SHARD_RECORDS = 1024  # small features: a shard is still lost in seconds, not minutes
MICRO_BATCH = 32
DISK_LIMIT = 0.90  # of the disk, after the store is written
DECODERS = 4
ANOTHER = "Type: fit --store OTHER, or extract --out OTHER"


def extract(  # noqa: PLR0913 - what, where, how; each has its option on the command line
    dataset: Dataset,
    backbone: Backbone,
    folder: Path,
    *,
    dtype: DTypeName = "fp16",
    keys: Sequence[str] | None = None,
    views: Sequence[View] = (PLAIN,),
    strict: bool = False,
    quiet: bool = False,
) -> Store:
    """Bring a store up to date with a dataset: extract what it does not hold yet.

    Args:
        dataset: every split is extracted; labels are kept for information only.
        backbone: its taps are what is stored.
        folder: the store; made, resumed, extended, or found complete.
        dtype: of the stored features.
        keys: the dataset's sample keys, if they are known already; every image is hashed for them.
        views: of every image, the image itself first; see `sidetune.data.views`.
        strict: an image that cannot be read is an error, raised once the store is complete.
        quiet: no progress.

    Returns:
        The complete store.

    Raises:
        DataError: `strict`, and images cannot be read.
        StoreError: the folder holds another backbone's features, another dtype or fewer taps, the disk
            would fill past 90 %, or the features overflow the dtype.
    """
    keys = sample_keys(dataset) if keys is None else keys
    pictures = {
        view.key(key): Picture(dataset.file(row), view, key) for row, key in enumerate(keys) for view in views
    }
    with locked(folder):
        plan = _plan(folder, backbone, dtype, tuple(pictures))
        todo = [number for number in range(len(plan.shards)) if not is_written(folder, number)]
        if todo or not (folder / "manifest.json").exists():
            _check_alike(folder, plan, backbone, todo)
            _check_disk(folder, plan, todo, quiet)
            (folder / "manifest.json").unlink(missing_ok=True)
            write_store_head(folder, plan, backbone.norm)
            labels = {view.key(key): _label(dataset, row) for row, key in enumerate(keys) for view in views}
            _write_shards(folder, plan, backbone, pictures, labels, todo, quiet=quiet)
            write_manifest(folder, plan)
        store = Store.open(folder)
    if strict:
        require_readable(
            [
                f"{dataset.paths[row]}: {store.skipped[key]}"
                for row, key in enumerate(keys)
                if key in store.skipped
            ]
        )
    return store


def require_readable(skipped: Sequence[str], where: str = "") -> None:
    """What --strict asks for.

    Args:
        skipped: ``path: reason`` of each image that could not be read.
        where: all of them are listed.

    Raises:
        DataError: there are some; names the first.
    """
    if skipped:
        listed = f" ({where} lists all)" if where else ""
        raise DataError(
            f"{len(skipped)} images cannot be read, the first {skipped[0]}{listed}; --strict expects none. "
            "Mend or remove them, or type the same command without --strict, which leaves them out"
        )


def first_frames(paths: Sequence[Path]) -> str:
    """What is said of images of which only the first frame or page is used."""
    names = ", ".join(path.as_posix() for path in paths[:3]) + (" .." if len(paths) > 3 else "")
    return f"{len(paths)} images are animations or have several pages; the first of each is used: {names}"


def sample_keys(dataset: Dataset) -> tuple[str, ...]:
    """The key of every sample. A file that cannot be read has ``unreadable`` for its sha256."""
    keys = []
    for row, path in enumerate(dataset.paths):
        try:
            keys.append(sample_key(path, dataset.file(row)))
        except OSError:
            keys.append(f"{path.as_posix()}@unreadable")
    return tuple(keys)


def _plan(folder: Path, backbone: Backbone, dtype: DTypeName, keys: Sequence[str]) -> Plan:
    """The folder's plan, checked against the backbone and extended by the keys it lacks."""
    plan = Plan(
        backbone.identity,
        backbone.variant,
        backbone.spec,
        dtype,
        None if backbone.norm is None else backbone.norm.eps,
    )
    if (folder / "plan.json").exists():
        plan = Plan.read(folder)
        check_backbone(folder, plan, backbone)
        if plan.dtype != dtype:
            raise StoreError(
                f"{folder} holds {plan.dtype}, asked for {dtype}. Type: --set features.dtype={plan.dtype}"
            )
        plan = replace(plan, shards=_possible_shards(folder, plan, set(keys)))
    held = {key for shard in plan.shards for key in shard}
    missing = [key for key in dict.fromkeys(keys) if key not in held]
    size = max(1, min(SHARD_RECORDS, SHARD_BYTES // plan.record_bytes))
    new = tuple(tuple(missing[first : first + size]) for first in range(0, len(missing), size))
    return replace(plan, shards=plan.shards + new)


def check_backbone(folder: Path, plan: Plan, backbone: Backbone) -> None:
    """Refuse another backbone's store, one of another precision, or one with fewer taps.

    Raises:
        StoreError: names each field that differs.
    """
    difference = backbone.identity.difference(plan.identity)
    if difference:
        raise StoreError(
            f"{folder} holds features of another backbone; " + "; ".join(difference) + f". {ANOTHER}"
        )
    held, asked = plan.variant.precision, backbone.variant.precision
    if held != asked:
        raise StoreError(
            f"{folder} holds features computed in {held}, asked for {asked}. "
            f"Type: --set backbone.precision={held}, or fit --store OTHER, or extract --out OTHER"
        )
    lacking = [name for name in backbone.spec.names if name not in plan.spec.names]
    if lacking:
        raise StoreError(f"{folder} lacks the taps {', '.join(lacking)}. {ANOTHER}")


def _possible_shards(folder: Path, plan: Plan, keys: set[str]) -> tuple[tuple[str, ...], ...]:
    """Cut the plan at the first unwritten shard that asks for samples this dataset does not have.

    Raises:
        StoreError: that shard is not at the end: it was written once and has been damaged.
    """
    unwritten = [number for number in range(len(plan.shards)) if not is_written(folder, number)]
    impossible = [number for number in unwritten if not keys.issuperset(plan.shards[number])]
    if not impossible:
        return plan.shards
    first = impossible[0]
    if len(plan.shards) - first > sum(number >= first for number in unwritten):
        raise StoreError(
            f"shard {shard_path(folder, first)} is damaged, and only the data that it was extracted from can "
            f"mend it. Type: extract that data again, or {ANOTHER.removeprefix('Type: ')}"
        )
    return plan.shards[:first]


def _check_alike(folder: Path, plan: Plan, backbone: Backbone, todo: Sequence[int]) -> None:
    """All shards of a store have the same taps."""
    if todo and backbone.spec != plan.spec:
        raise StoreError(
            f"{folder} lacks {sum(len(plan.shards[number]) for number in todo)} of these samples and cannot "
            f"be extended: it holds {len(plan.spec)} taps, the backbone reads {len(backbone.spec)}. {ANOTHER}"
        )


def _check_disk(folder: Path, plan: Plan, todo: Sequence[int], quiet: bool) -> None:
    """Say how many bytes will be written, and refuse where they would fill the disk."""
    needed = sum(len(plan.shards[number]) for number in todo) * plan.record_bytes
    disk = shutil.disk_usage(folder)
    if todo and disk.used + needed > DISK_LIMIT * (disk.used + disk.free):
        raise StoreError(
            f"the store needs {needed / 2**20:,.1f} MiB more and {folder} has {disk.free / 2**20:,.1f} MiB "
            "free; sidetune does not fill a disk past 90 %. "
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
    total = sum(len(keys) for keys in plan.shards)
    done = total - sum(len(plan.shards[number]) for number in todo)
    with (
        Progress("extract", total, "images", done=done, quiet=quiet) as progress,
        ThreadPoolExecutor(DECODERS) as pool,
    ):
        for number in todo:
            shard_pictures = [pictures[key] for key in plan.shards[number]]
            parts: list[dict[str, Tensor]] = []
            reasons: dict[int, str] = {}
            animated: list[Path] = []
            for first, images, bad in decoded(shard_pictures, backbone.preprocess, pool, animated):
                reasons |= {first + slot: reason for slot, reason in bad.items()}
                parts.append(_stored(images, backbone, plan))
                progress.advance(len(images))
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            tensors["valid"] = torch.ones(len(shard_pictures), dtype=torch.uint8)
            tensors["valid"][list(reasons)] = 0
            slots = {slot: labels[key] for slot, key in enumerate(plan.shards[number])}
            frames = sorted(
                slot for slot, picture in enumerate(shard_pictures) if picture.file in set(animated)
            )
            write_shard(folder, number, tensors, skipped=reasons, labels=slots, animated=frames)


def decoded(
    pictures: Sequence[Picture],
    preprocess: Preprocess,
    pool: ThreadPoolExecutor,
    animated: list[Path] | None = None,
) -> Iterator[tuple[int, Tensor, dict[int, str]]]:
    """Micro-batches of preprocessed images, the next one decoded while this one is used.

    Args:
        pictures: to decode.
        preprocess: what the backbone reads.
        pool: decodes.
        animated: the files of which only the first frame or page is used are added to it, in any order.

    Yields:
        The first picture's index, images (b, 3, size, size), and slot -> reason for each image that could
        not be decoded (its pixels are zero).
    """

    def one(picture: Picture) -> Tensor | str:
        try:
            loaded = picture.load(preprocess)
        except ImageError as error:
            return error.reason
        if loaded.animated and animated is not None:
            animated.append(picture.file)
        return loaded.pixels

    batches = [pictures[first : first + MICRO_BATCH] for first in range(0, len(pictures), MICRO_BATCH)]
    ahead = [pool.submit(one, picture) for picture in batches[0]] if batches else []
    for index in range(len(batches)):
        current = [future.result() for future in ahead]
        if index + 1 < len(batches):
            ahead = [pool.submit(one, picture) for picture in batches[index + 1]]
        bad = {slot: item for slot, item in enumerate(current) if isinstance(item, str)}
        blank = torch.zeros(3, preprocess.size, preprocess.size)
        images = torch.stack([blank if isinstance(item, str) else item for item in current])
        yield index * MICRO_BATCH, images, bad


def _stored(images: Tensor, backbone: Backbone, plan: Plan) -> dict[str, Tensor]:
    """A micro-batch's tensors as a shard holds them. The summary is of the rounded features."""
    with torch.inference_mode():
        features = backbone(images)
        layers = tuple(layer.to("cpu", DTYPES[plan.dtype]) for layer in features.layers)
    for layer, read, tap in zip(layers, features.layers, plan.spec.taps, strict=True):
        if not torch.isfinite(read).all():
            raise StoreError(
                f"tap {tap.name!r} holds NaN or infinity as the backbone gives it in "
                f"{backbone.variant.precision}. Type: --set backbone.precision=fp32, or other --weights"
            )
        if not torch.isfinite(layer).all():
            raise StoreError(
                f"tap {tap.name!r} reaches {read.abs().max():.4g}, more than {plan.dtype} can hold. "
                f"Type: --set features.dtype=bf16, and a new folder where --store or --out names one"
            )
    summary = summarise(Features(layers, plan.spec))
    tensors = dict(zip(plan.spec.names, layers, strict=True))
    tensors |= {
        f"summary.mean.{name}": mean for name, mean in zip(plan.spec.names, summary.mean, strict=True)
    }
    tensors |= {f"summary.cls.{name}": cls for name, cls in zip(plan.spec.names, summary.cls, strict=True)}
    return tensors | {"summary.mean_square": summary.mean_square}


def _label(dataset: Dataset, row: int) -> str:
    target = dataset.targets[row]
    return dataset.outputs[int(target)] if dataset.task == "classify" else str(target.tolist())
