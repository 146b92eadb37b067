"""Looking after stores: list them, read every byte against its checksum, remove what is not needed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidetune.data import load_dataset
from sidetune.data.dataset import TaskKind
from sidetune.data.views import split_key
from sidetune.errors import DataError, RequestError, StoreError
from sidetune.extract import sample_keys
from sidetune.files import leftovers, locked, write_json
from sidetune.shards import file_size, is_written, read_json_object, shard_defect
from sidetune.store import HASHERS, Plan, manifest_fields, read_norm, shard_bytes, stores_root


def list_stores(root: Path | None = None) -> list[Path]:
    """Every store under a folder; None: ``$SIDETUNE_STORES``, else ./.sidetune/stores."""
    root = stores_root() if root is None else root
    return sorted(path.parent for path in root.glob("*/plan.json"))


def describe(folder: Path) -> dict[str, Any]:
    """One line about a store, complete or not; of a damaged one, ``store`` and ``state`` alone."""
    try:
        plan = Plan.read(folder)
    except StoreError as error:
        return {"store": str(folder), "state": f"damaged: {error}"}
    written = [number for number in plan.numbers if is_written(folder, number, plan.claim(number))]
    state = "not complete: extract again"
    if (folder / "manifest.json").exists():
        lacking = len(plan.numbers) - len(written)
        state = f"damaged: {lacking} of {len(plan.numbers)} shards. Type: sidetune store verify {folder}"
        state = state if lacking else "complete"
    return {
        "store": str(folder),
        "architecture": plan.identity.architecture,
        "identity": plan.identity.digest,
        "samples": len({split_key(key)[0] for number in written for key in plan.shards[number]}),
        "planned": len({split_key(key)[0] for keys in plan.shards for key in keys}),
        "taps": len(plan.spec),
        "dtype": plan.dtype,
        "bytes": shard_bytes(folder, plan.numbers),
        "state": state,
    }


def verify(folder: Path) -> list[str]:
    """Read every byte of a store: one line a defect, none when all is well."""
    plan, manifest = Plan.read(folder), folder / "manifest.json"
    defects = []
    try:
        read_norm(folder, plan)
    except StoreError as error:
        defects.append(str(error))
    with ThreadPoolExecutor(HASHERS) as pool:
        found = pool.map(lambda number: shard_defect(folder, number, plan.claim(number)), plan.numbers)
        defects += [defect for defect in found if defect is not None]
    if not manifest.exists():
        again = "Type the same extract command again: it resumes"
        defects.append(f"{manifest} is missing: the store is not complete. {again}")
    elif not defects:
        again = f"Type: rm {manifest}, then the same extract command: it writes it anew"
        try:
            if read_json_object(manifest, "a manifest", again) != manifest_fields(folder, plan):
                defects.append(f"{manifest} is not as written. {again}")
        except StoreError as error:
            defects.append(str(error))
    return defects


@dataclass(frozen=True)
class Garbage:
    """What of a store is not needed.

    Args:
        folder: the store.
        files: that go, or have gone.
        bytes: of these files.
        samples: that go with them.
        kept: samples that nobody wants and that stay, because they share a shard with others.
        plan: what the store holds afterwards; None: it goes as a whole.
    """

    folder: Path
    files: tuple[Path, ...]
    bytes: int
    samples: int
    kept: int
    plan: Plan | None

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "store": str(self.folder),
            "files": [str(path.relative_to(self.folder)) for path in self.files],
            "bytes": self.bytes,
            "samples": self.samples,
            "kept_unwanted": self.kept,
            "whole": self.plan is None,
        }


def collect_garbage(
    folder: Path, *, wanted: Collection[str] | None = None, unfinished: bool = False, remove: bool = False
) -> Garbage:
    """Find what a store does not need; remove it if asked to.

    Not needed are temporary files of killed writes and shards that the plan does not name; with `wanted`,
    shards none of whose samples is wanted (a shard with one wanted sample stays whole); with `unfinished`,
    a whole store that is not complete. Nothing goes but files that a store writes. At any moment the store
    is complete, and a kill leaves only what the same call removes.

    Args:
        folder: the store.
        wanted: sample keys; views of a wanted sample (``key#view``) are wanted, too. None: all.
        unfinished: the store goes if it is not complete.
        remove: or only find. Holds the store's lock.

    Raises:
        StoreError: not a store, or a shard that stays is damaged.
        RequestError: none of the store's samples is wanted.
    """
    garbage = _find_garbage(folder, wanted, unfinished)
    if not remove:
        return garbage
    with locked(folder, sweep=False):
        garbage = _find_garbage(folder, wanted, unfinished)
        if garbage.plan is not None:
            _write_plan(folder, garbage.plan)
        for path in garbage.files:
            remove_file(path)
        if garbage.plan is None:
            for path in (folder / "shards", folder / ".lock", folder):
                with suppress(OSError):  # somebody else's file is in there
                    path.rmdir() if path.is_dir() else path.unlink()
    return garbage


def wanted_keys(data: Sequence[Path], task: TaskKind, labels: Sequence[str] | None) -> set[str]:
    """The sample keys of datasets, as `load_dataset` reads them as images or as clips: every file is hashed.

    Raises:
        DataError: one is neither.
    """
    whole: dict[str, Any] = {"task": task, "labels": labels, "val_fraction": 0.0, "test_fraction": 0.0}
    keys: set[str] = set()
    for path in data:
        refused: list[DataError] = []
        for clips in (False, True):  # frames in folders are either; what any reading needs is kept
            try:
                keys.update(sample_keys(load_dataset(path, clips=clips, **whole)))
            except DataError as error:
                refused.append(error)
        if len(refused) == 2:
            raise refused[0]
    return keys


def remove_file(path: Path) -> None:
    """Remove one file of a store; it may have gone."""
    path.unlink(missing_ok=True)


def _find_garbage(folder: Path, wanted: Collection[str] | None, unfinished: bool) -> Garbage:
    plan = Plan.read(folder)
    if unfinished and not (folder / "manifest.json").exists():
        head = [folder / "norm.safetensors", folder / "plan.json"]  # the plan last: until then it is a store
        files = [*_shard_files(folder), *leftovers(folder), *(path for path in head if path.exists())]
        return _garbage(folder, files, sum(map(len, plan.shards)), 0, None)
    keep, kept = set(plan.numbers), 0
    if wanted is not None:
        wanted = set(wanted)
        counts = {n: sum(split_key(key)[0] in wanted for key in plan.shards[n]) for n in plan.numbers}
        keep = {number for number, count in counts.items() if count}
        kept = sum(len(plan.shards[number]) - counts[number] for number in keep)
        if not keep:
            raise RequestError(
                f"none of the {sum(map(len, plan.shards)):,} samples of {folder} is in the data, expected at "
                f"least one. If all shall go, type: rm -r {folder}"
            )
    rest = tuple(keys if number in keep else () for number, keys in enumerate(plan.shards))
    files = [path for path in _shard_files(folder) if _number(path) not in keep] + leftovers(folder)
    samples = sum(map(len, plan.shards)) - sum(map(len, rest))
    return _garbage(folder, files, samples, kept, replace(plan, shards=rest))


def _garbage(folder: Path, files: list[Path], samples: int, kept: int, plan: Plan | None) -> Garbage:
    sizes = [file_size(path) or 0 for path in files]  # a temporary file may be renamed meanwhile
    return Garbage(folder, tuple(files), sum(sizes), samples, kept, plan)


def _write_plan(folder: Path, plan: Plan) -> None:
    """Plan and manifest, where they are not so already. The files of dropped shards are still there."""
    manifest = folder / "manifest.json"
    fields = manifest_fields(folder, plan) if manifest.exists() else None
    if plan != Plan.read(folder):
        write_json(folder / "plan.json", plan.to_json())
    if fields is not None and fields != read_json_object(manifest, "a manifest", f"Type: rm {manifest}"):
        write_json(manifest, fields)


def _shard_files(folder: Path) -> Iterator[Path]:
    """Files under the names that shards, checksum files and their temporaries have."""
    yield from (path for path in sorted((folder / "shards").glob("*")) if _number(path) is not None)
    yield from leftovers(folder / "shards")


def _number(path: Path) -> int | None:
    found = re.fullmatch(r"(\d{5,})\.(json|safetensors)", path.name)
    return int(found[1]) if found else None
