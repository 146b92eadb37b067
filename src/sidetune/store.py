"""Features on disk: written once by `extract`, read for ever.

    STORE/
      plan.json                 identity, variant, taps, dtype, and the shard list, fixed before decoding
      norm.safetensors          the backbone's final norm, where it has one
      shards/00000.safetensors  a tensor (n, N, D) a tap; ``valid`` (n,); ``summary.*``: pooled taps
      shards/00000.json         sha256 of each tensor, labels, why a slot is not valid, and the seal, which
                                says that all this is of these samples of this store
      manifest.json             written last: its presence means that every shard is complete

A shard is written under a temporary name, fsynced, renamed, then its checksum file. A sample is
known by its key (relative path @ sha256 of the file's bytes), so an edited image is another sample;
labels and splits are no part of a store. Shards are read by memory map (`sidetune.records`): a batch touches
only the records it asks for, and what was read stays in the system's page cache. The first touch of a
tensor hashes it, front to back, so nothing is computed from other bytes than those that were written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sidetune.backbones.base import Identity, Variant, canonical_json
from sidetune.data.views import place_by_hash
from sidetune.errors import StoreError, first_complaint
from sidetune.features import Features, FinalNorm, Spec
from sidetune.files import write_json, write_tensors
from sidetune.progress import Progress
from sidetune.reader import Layout
from sidetune.records import Records
from sidetune.shards import (
    AGAIN,
    entry_path,
    file_size,
    read_json_object,
    read_shard_entry,
    shard_path,
)
from sidetune.summary import Summary

FORMAT = 2
HASHERS = 4  # threads
SHOW_BYTES = 2**30  # from so many on, a check shows how far it is
DTypeName = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[DTypeName, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Plan:
    """What a store is for and which samples stand in which shard.

    Args:
        identity: of the backbone.
        variant: how it was run.
        spec: the taps stored.
        dtype: of the stored features.
        norm_eps: epsilon of the final norm; None where the backbone has none.
        norm: sha256 of that norm, as `norm_digest` gives it; None likewise.
        shards: sample keys, a tuple a shard, in slot order. A shard that was dropped has none, and no file.
    """

    identity: Identity
    variant: Variant
    spec: Spec
    dtype: DTypeName
    norm_eps: float | None
    norm: str | None
    shards: tuple[tuple[str, ...], ...] = ()

    @property
    def numbers(self) -> list[int]:
        """Of the shards that hold samples."""
        return [number for number, keys in enumerate(self.shards) if keys]

    @property
    def record_bytes(self) -> int:
        """Bytes of one sample's features."""
        return self.spec.record_numel() * DTYPES[self.dtype].itemsize

    def to_json(self) -> dict[str, Any]:
        """As plan.json holds it."""
        return {
            "format": FORMAT,
            "identity": self.identity.to_json(),
            "variant": self.variant.to_json(),
            "spec": self.spec.to_json(),
            "dtype": self.dtype,
            "norm_eps": self.norm_eps,
            "norm": self.norm,
            "shards": [list(keys) for keys in self.shards],
        }

    def claim(self, number: int) -> str:
        """Of what store and samples a shard is: sha256 over all of the plan but the other shards."""
        return hashlib.sha256(canonical_json([self._head, self.shards[number]]).encode()).hexdigest()

    @cached_property
    def _head(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_json().items() if name != "shards"}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read plan.json.

        Raises:
            StoreError: there is none, it is damaged, or it has another format version.
        """
        path = folder / "plan.json"
        if not path.exists():
            raise StoreError(f"{path} is missing: expected a store's plan. Type: sidetune store ls")
        again = f"Type: rm -r {folder} and extract again"
        fields = read_json_object(path, "a store's plan", again)
        if fields.get("format") != FORMAT:
            raise StoreError(
                f"{folder} has store format {fields.get('format')!r}, expected {FORMAT}. "
                f"Type: rm -r {folder}, or name a new folder; then extract again"
            )
        try:
            plan = TypeAdapter(cls).validate_python({**fields, "spec": {"taps": fields.get("spec")}})
        except ValidationError as error:
            raise StoreError(f"{path} is damaged: {first_complaint(error)}. {again}") from error
        return plan


@dataclass
class Store:
    """A complete store, open for reading.

    Args:
        folder: where it stands.
        plan: what it holds.
        skipped: sample key -> why its slot is not valid.
        animated: keys of samples of which the first frame or page is stored, and there are more.
    """

    folder: Path
    plan: Plan
    skipped: dict[str, str]
    animated: frozenset[str]
    _slots: dict[str, tuple[int, int]] = field(repr=False)
    _records: Records = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a complete store; every shard must have its own checksum file and its length.

        Raises:
            StoreError: not a store, not complete, or a shard is missing, cut short or another's.
        """
        plan = Plan.read(folder)
        if not (folder / "manifest.json").exists():
            raise StoreError(
                f"the store {folder} is not complete. Type the same extract command again: it resumes"
            )
        skipped: dict[str, str] = {}
        animated: set[str] = set()
        slots: dict[str, tuple[int, int]] = {}
        entries = {}
        for number in plan.numbers:
            keys, entry = plan.shards[number], read_shard_entry(folder, number, plan.claim(number))
            odd = [slot for slot in (*entry.skipped, *entry.animated) if not 0 <= slot < len(keys)]
            if odd:
                raise StoreError(
                    f"{entry_path(folder, number)} is damaged: it names slot {odd[0]} of {len(keys)}. {AGAIN}"
                )
            skipped |= {keys[slot]: reason for slot, reason in entry.skipped.items()}
            animated |= {keys[slot] for slot in entry.animated}
            slots |= {key: (number, slot) for slot, key in enumerate(keys)}
            entries[number] = entry.model_copy(update={"labels": {}})  # a million labels need not stay
        counts = {number: len(plan.shards[number]) for number in entries}
        records = Records(folder, plan.spec, DTYPES[plan.dtype], counts, entries)
        return cls(folder, plan, skipped, frozenset(animated), slots, records)

    def skipped_rows(self, keys: Sequence[Sequence[str]]) -> dict[int, str]:
        """Row -> why a record of it is not valid, as its first view that is not has it.

        Args:
            keys: of each view, those of all rows.
        """
        return {
            row: self.skipped[key]
            for of_view in reversed(keys)
            for row, key in enumerate(of_view)
            if key in self.skipped
        }

    @property
    def num_records(self) -> int:
        """Samples in the store, quarantined ones included."""
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return shard_bytes(self.folder, self.plan.numbers)

    @property
    def final_norm(self) -> FinalNorm | None:
        """The backbone's final norm as stored.

        Raises:
            StoreError: its file is missing or damaged.
        """
        return read_norm(self.folder, self.plan)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Keys that the store does not hold."""
        return [key for key in keys if key not in self._slots]

    def require(self, keys: Sequence[str]) -> None:
        """Every key must be in the store.

        Raises:
            StoreError: some are not; names the first.
        """
        missing = self.missing(keys)
        if missing:
            raise StoreError(
                f"{self.folder} lacks {len(missing)} of {len(keys)} samples, the first {missing[0]!r} "
                f"(new, edited, or moved). Type: sidetune extract DATA --out {self.folder}"
            )

    def features(self, keys: Sequence[str], spec: Spec | None = None) -> Features:
        """Read a batch of samples, in the stored dtype: the side converts it.

        The memory of a batch that nobody refers to any more is used for the next ones.

        Args:
            keys: B sample keys.
            spec: the taps to read, a subset of the store's; None: all.

        Raises:
            StoreError: the store lacks a sample, or a shard is damaged.
        """
        spec = self.plan.spec if spec is None else spec
        return Features(self._records.gather(self._places(keys), spec), spec)

    def layout(self, keys: Sequence[str], spec: Spec | None = None) -> Layout:
        """Where samples stand, and how to have shards read ahead.

        Args:
            keys: n sample keys.
            spec: the taps that will be read; None: all.

        Raises:
            StoreError: the store lacks a sample.
        """
        spec = self.plan.spec if spec is None else spec
        shards = np.array([shard for shard, _ in self._places(keys)], dtype=np.int64)
        num_bytes = {number: self._records.shard_bytes(number, spec) for number in np.unique(shards).tolist()}
        held = [self.plan.shards[number] for number in num_bytes]
        by_hash = all(list(names) == sorted(names, key=place_by_hash) for names in held)
        return Layout(shards, num_bytes, partial(self._records.fetch, spec=spec), by_hash)

    def summary(self, keys: Sequence[str]) -> Summary:
        """Pooled taps of samples, as written beside the features.

        Raises:
            StoreError: the store lacks a sample, or a shard is damaged.
        """
        slots = self._places(keys)

        def column(name: str) -> Tensor:
            return torch.stack([self._records.tensor(shard, name)[slot] for shard, slot in slots])

        names = self.plan.spec.names
        return Summary(
            self.plan.spec,
            tuple(column(f"summary.mean.{name}") for name in names),
            tuple(column(f"summary.cls.{name}") for name in names),
            column("summary.mean_square"),
        )

    def valid(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Which samples were decoded: (n,) bool."""
        return np.array([key not in self.skipped for key in keys], dtype=bool)

    def damaged(
        self, keys: Sequence[str], taps: Iterable[str] | None = None, *, quiet: bool = True
    ) -> dict[int, str]:
        """Hash all that a reading of these samples would touch, once: shard number -> what is wrong.

        Args:
            keys: samples of the store.
            taps: whose features will be read, none for summaries alone; None: all.
            quiet: no progress.
        """
        numbers = sorted({shard for shard, _ in self._places(keys)})
        unread = set() if taps is None else set(self.plan.spec.names) - set(taps)

        def check(number: int) -> str | None:
            try:
                for name in self._records.entries[number].tensors:
                    if name not in unread:
                        self._records.tensor(number, name)
            except StoreError as error:
                return str(error)
            return None

        found = {}
        quiet = quiet or shard_bytes(self.folder, numbers) < SHOW_BYTES
        with (
            Progress("check", len(numbers), "shards", quiet=quiet) as progress,
            ThreadPoolExecutor(HASHERS) as pool,
        ):
            for number, defect in zip(numbers, pool.map(check, numbers), strict=True):
                if defect is not None:
                    found[number] = defect
                progress.advance(1)
        return found

    def _places(self, keys: Sequence[str]) -> list[tuple[int, int]]:
        self.require(keys)
        return [self._slots[key] for key in keys]


def write_store_head(folder: Path, plan: Plan, norm: FinalNorm | None) -> None:
    """Write the plan and the final norm: the first files of a store."""
    if norm is not None:
        write_tensors(folder / "norm.safetensors", {"weight": norm.weight, "bias": norm.bias})
    write_json(folder / "plan.json", plan.to_json())


def norm_digest(norm: FinalNorm) -> str:
    """sha256 over weight and bias, as float32."""
    pair = torch.stack([norm.weight, norm.bias]).detach().to("cpu", torch.float32)
    return hashlib.sha256(pair.numpy().tobytes()).hexdigest()


def read_norm(folder: Path, plan: Plan) -> FinalNorm | None:
    """The final norm beside a store; None where the plan has none.

    Raises:
        StoreError: its file is missing or damaged.
    """
    if plan.norm_eps is None:
        return None
    path, again = folder / "norm.safetensors", "Type the same extract or fit command again: it writes it anew"
    try:
        tensors = load_file(path)
        norm = FinalNorm(tensors["weight"], tensors["bias"], plan.norm_eps)
        found = norm_digest(norm)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise StoreError(f"{path} is missing or damaged: {error}. {again}") from error
    if found != plan.norm:
        raise StoreError(
            f"{path} is damaged or another: its sha256 starts with {found[:12]}, expected "
            f"{str(plan.norm)[:12]}. {again}"
        )
    return norm


def write_manifest(folder: Path, plan: Plan) -> None:
    """Declare a store complete whose shards are all written."""
    write_json(folder / "manifest.json", manifest_fields(folder, plan))


def manifest_fields(folder: Path, plan: Plan) -> dict[str, Any]:
    """What manifest.json holds.

    Raises:
        StoreError: a shard is not written.
    """
    samples: list[dict[str, Any]] = []
    for number in plan.numbers:
        labels = read_shard_entry(folder, number, plan.claim(number)).labels
        for slot, key in enumerate(plan.shards[number]):
            samples.append({"key": key, "records": [len(samples)], "label": labels.get(slot)})
    return {
        "format": FORMAT,
        "identity": plan.identity.digest,
        "norm": plan.norm,
        "records": len(samples),
        "samples": samples,
    }


def stores_root() -> Path:
    """Where stores live: ``$SIDETUNE_STORES``, else ./.sidetune/stores."""
    return Path(os.environ.get("SIDETUNE_STORES", ".sidetune/stores"))


def shard_bytes(folder: Path, numbers: Iterable[int]) -> int:
    """Bytes of shards on disk."""
    return sum(file_size(shard_path(folder, number)) or 0 for number in numbers)
