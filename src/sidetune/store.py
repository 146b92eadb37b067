"""Features on disk: written once by `extract`, read for ever.

    STORE/
      plan.json                 identity, variant, taps, dtype, and the shard list, fixed before decoding
      norm.safetensors          the backbone's final norm, where it has one
      shards/00000.safetensors  a tensor (n, N, D) a tap; ``valid`` (n,); ``summary.*``: pooled taps
      shards/00000.json         the shard's sha256 and bytes, and why a slot is not valid
      manifest.json             written last: its presence means that every shard is complete

A shard is written under a temporary name, fsynced, renamed, then its checksum file. A sample is
known by its key (relative path @ sha256 of the file's bytes), so an edited image is another sample;
labels and splits are no part of a store. Shards are read by memory map: a batch touches only the
records it asks for.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from sidetune.backbones.base import Identity, Variant
from sidetune.errors import StoreError
from sidetune.features import Features, FinalNorm, Spec
from sidetune.files import sha256_file, write_json, write_tensors
from sidetune.summary import Summary

FORMAT = 1
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
        shards: sample keys, a tuple a shard, in slot order.
    """

    identity: Identity
    variant: Variant
    spec: Spec
    dtype: DTypeName
    norm_eps: float | None
    shards: tuple[tuple[str, ...], ...] = ()

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
            "shards": [list(keys) for keys in self.shards],
        }

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read plan.json.

        Raises:
            StoreError: there is none, it is damaged, or it has another format version.
        """
        fields = read_json_object(folder / "plan.json", "a store's plan")
        if fields.get("format") != FORMAT:
            raise StoreError(
                f"{folder} has store format {fields.get('format')!r}, expected {FORMAT}. "
                "Type: sidetune extract .. with a new --out"
            )
        try:
            return cls(
                Identity.from_json(fields["identity"]),
                Variant.from_json(fields["variant"]),
                Spec.from_json(fields["spec"]),
                fields["dtype"],
                fields["norm_eps"],
                tuple(tuple(keys) for keys in fields["shards"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{folder / 'plan.json'} is damaged: {error!r}. Type: rm -r {folder} and extract again"
            ) from error


@dataclass
class Store:
    """A complete store, open for reading.

    Args:
        folder: where it stands.
        plan: what it holds.
        skipped: sample key -> why its slot is not valid.
    """

    folder: Path
    plan: Plan
    skipped: dict[str, str]
    _slots: dict[str, tuple[int, int]] = field(repr=False)
    _maps: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a complete store; every shard must have its checksum file and its length.

        Raises:
            StoreError: not a store, not complete, or a shard is missing or cut short.
        """
        plan = Plan.read(folder)
        if not (folder / "manifest.json").exists():
            raise StoreError(
                f"the store {folder} is not complete. Type the same extract command again: it resumes"
            )
        skipped: dict[str, str] = {}
        for number, keys in enumerate(plan.shards):
            entry = read_shard_entry(folder, number)
            size = _size(shard_path(folder, number))
            if entry is None or size != entry["bytes"]:
                raise StoreError(
                    f"shard {shard_path(folder, number)} has {size} bytes, expected "
                    f"{entry['bytes'] if entry else 'a checksum file beside it'}. "
                    f"Type: sidetune store verify {folder}"
                )
            skipped |= {keys[int(slot)]: reason for slot, reason in entry["skipped"].items()}
        slots = {
            key: (number, slot) for number, keys in enumerate(plan.shards) for slot, key in enumerate(keys)
        }
        return cls(folder, plan, skipped, slots)

    @property
    def num_records(self) -> int:
        """Samples in the store, quarantined ones included."""
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(_size(shard_path(self.folder, number)) or 0 for number in range(len(self.plan.shards)))

    @property
    def final_norm(self) -> FinalNorm | None:
        """The backbone's final norm as stored."""
        return read_norm(self.folder, self.plan.norm_eps)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Keys that the store does not hold."""
        return [key for key in keys if key not in self._slots]

    def features(self, keys: Sequence[str], spec: Spec | None = None) -> Features:
        """Read a batch of samples, converted once to float32.

        Args:
            keys: B sample keys.
            spec: the taps to read, a subset of the store's; None: all.
        """
        spec = self.plan.spec if spec is None else spec
        slots = [self._slots[key] for key in keys]
        layers = []
        for tap in spec.taps:
            batch = torch.empty(len(keys), tap.num_tokens, tap.width)
            for row, (shard, slot) in enumerate(slots):
                batch[row].copy_(self._shard(shard)[tap.name][slot])
            layers.append(batch)
        return Features(tuple(layers), spec)

    def summary(self, keys: Sequence[str]) -> Summary:
        """Pooled taps of samples, as written beside the features."""
        slots = [self._slots[key] for key in keys]

        def column(name: str) -> Tensor:
            return torch.stack([self._shard(shard)[name][slot] for shard, slot in slots])

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

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._maps:
            self._maps[number] = map_tensors(shard_path(self.folder, number))
        return self._maps[number]


def write_store_head(folder: Path, plan: Plan, norm: FinalNorm | None) -> None:
    """Write the plan and the final norm: the first files of a store."""
    if norm is not None:
        write_tensors(folder / "norm.safetensors", {"weight": norm.weight, "bias": norm.bias})
    write_json(folder / "plan.json", plan.to_json())


def read_norm(folder: Path, eps: float | None) -> FinalNorm | None:
    """The final norm beside a store or an artifact; None where eps is None."""
    if eps is None:
        return None
    tensors = load_file(folder / "norm.safetensors")
    return FinalNorm(tensors["weight"], tensors["bias"], eps)


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor], skipped: Mapping[int, str]) -> None:
    """Write a shard, then its checksum file."""
    path = shard_path(folder, number)
    write_tensors(path, tensors)
    entry = {"sha256": sha256_file(path), "bytes": path.stat().st_size, "skipped": dict(skipped)}
    write_json(path.with_suffix(".json"), entry)


def read_shard_entry(folder: Path, number: int) -> dict[str, Any] | None:
    """A shard's checksum file; None where the shard is not written yet."""
    path = shard_path(folder, number).with_suffix(".json")
    return read_json_object(path, "a shard's checksum file") if path.exists() else None


def write_manifest(folder: Path, plan: Plan, labels: Mapping[str, str]) -> None:
    """Declare the store complete.

    Args:
        folder: the store.
        plan: whose shards are all written.
        labels: sample key -> label as first seen, for information only.
    """
    write_json(
        folder / "manifest.json",
        {
            "format": FORMAT,
            "identity": plan.identity.digest,
            "records": sum(len(keys) for keys in plan.shards),
            "samples": [
                {"key": key, "records": [record], "label": labels.get(key)}
                for record, key in enumerate(key for keys in plan.shards for key in keys)
            ],
        },
    )


def verify(folder: Path) -> list[str]:
    """Read every byte of a store: one line a defect, none when all is well."""
    plan = Plan.read(folder)
    defects = [] if (folder / "manifest.json").exists() else ["manifest.json is missing: not complete"]
    for number in range(len(plan.shards)):
        path, entry = shard_path(folder, number), read_shard_entry(folder, number)
        if entry is None:
            defects.append(f"{path.name}: no checksum file")
        elif not path.exists():
            defects.append(f"{path.name}: missing")
        elif (found := sha256_file(path)) != entry["sha256"]:
            defects.append(f"{path.name}: sha256 is {found[:12]}.., expected {entry['sha256'][:12]}..")
    return defects


def list_stores(root: Path | None = None) -> list[Path]:
    """Every store under a folder; None: ``$SIDETUNE_STORES``, else ./.sidetune/stores."""
    root = stores_root() if root is None else root
    return sorted(path.parent for path in root.glob("*/plan.json"))


def stores_root() -> Path:
    """Where stores live: ``$SIDETUNE_STORES``, else ./.sidetune/stores."""
    return Path(os.environ.get("SIDETUNE_STORES", ".sidetune/stores"))


def describe(folder: Path) -> dict[str, Any]:
    """One line about a store, complete or not."""
    plan = Plan.read(folder)
    written = [keys for number, keys in enumerate(plan.shards) if read_shard_entry(folder, number)]
    complete = (folder / "manifest.json").exists()
    return {
        "store": str(folder),
        "architecture": plan.identity.architecture,
        "identity": plan.identity.digest,
        "samples": sum(map(len, written)),
        "planned": sum(map(len, plan.shards)),
        "taps": len(plan.spec),
        "dtype": plan.dtype,
        "bytes": sum(_size(shard_path(folder, number)) or 0 for number in range(len(plan.shards))),
        "state": "complete" if complete else "not complete: extract again",
    }


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard stands."""
    return folder / "shards" / f"{number:05d}.safetensors"


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped: nothing is read until it is touched.

    Raises:
        StoreError: the file's header does not describe its bytes.
    """
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # private: the file stays as it is
    try:
        (header_bytes,) = struct.unpack("<Q", mapped[:8])
        header = json.loads(mapped[8 : 8 + header_bytes])
        header.pop("__metadata__", None)
        kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}
        tensors = {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            dtype = kinds[entry["dtype"]]
            if first == end:
                tensors[name] = torch.empty(entry["shape"], dtype=dtype)
                continue
            count = (end - first) // dtype.itemsize
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=8 + header_bytes + first)
            tensors[name] = flat.view(entry["shape"])
    except (ValueError, KeyError, RuntimeError, struct.error) as error:
        raise StoreError(f"shard {path} is damaged: {error}. Type: sidetune store verify") from error
    return tensors


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        StoreError: it is missing, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: expected {what}. Type: sidetune store ls") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged: expected {what}, got {error}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged: expected {what}, got a {type(value).__name__}")
    return value


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
