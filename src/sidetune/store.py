"""Features on disk: written once by `extract`, read for ever.

    STORE/
      plan.json                 identity, variant, taps, dtype, and the shard list, fixed before decoding
      norm.safetensors          the backbone's final norm, where it has one
      shards/00000.safetensors  a tensor (n, N, D) a tap; ``valid`` (n,); ``summary.*``: pooled taps
      shards/00000.json         the shard's sha256 and bytes, labels, and why a slot is not valid
      manifest.json             written last: its presence means that every shard is complete

A shard is written under a temporary name, fsynced, renamed, then its checksum file. A sample is
known by its key (relative path @ sha256 of the file's bytes), so an edited image is another sample;
labels and splits are no part of a store. Shards are read by memory map: a batch touches only the
records it asks for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sidetune.backbones.base import Identity, Variant
from sidetune.errors import StoreError, first_complaint
from sidetune.features import Features, FinalNorm, Spec
from sidetune.files import sha256_file, write_json, write_tensors
from sidetune.shards import file_size, map_tensors, mend, read_json_object, read_shard_entry, shard_path
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
            plan = TypeAdapter(cls).validate_python({**fields, "spec": {"taps": fields.get("spec")}})
        except ValidationError as error:
            raise StoreError(
                f"{folder / 'plan.json'} is damaged: {first_complaint(error)}. {mend(folder / 'plan.json')}"
            ) from error
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
    _slots: dict[str, tuple[int, int]] = field(repr=False)
    _maps: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    animated: frozenset[str] = frozenset()

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
        animated: set[str] = set()
        for number, keys in enumerate(plan.shards):
            entry = read_shard_entry(folder, number)
            size = file_size(shard_path(folder, number))
            if entry is None or size != entry.bytes:
                raise StoreError(
                    f"shard {shard_path(folder, number)} has {size} bytes, expected "
                    f"{entry.bytes if entry else 'a checksum file beside it'}. "
                    "Type the same extract command again: it writes this shard anew"
                )
            odd = [slot for slot in (*entry.skipped, *entry.animated) if not 0 <= slot < len(keys)]
            if odd:
                path = shard_path(folder, number).with_suffix(".json")
                raise StoreError(f"{path} is damaged: it names slot {odd[0]} of {len(keys)}. {mend(path)}")
            skipped |= {keys[slot]: reason for slot, reason in entry.skipped.items()}
            animated |= {keys[slot] for slot in entry.animated}
        slots = {
            key: (number, slot) for number, keys in enumerate(plan.shards) for slot, key in enumerate(keys)
        }
        return cls(folder, plan, skipped, slots, animated=frozenset(animated))

    @property
    def num_records(self) -> int:
        """Samples in the store, quarantined ones included."""
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(file_size(shard_path(self.folder, number)) or 0 for number in range(len(self.plan.shards)))

    @property
    def final_norm(self) -> FinalNorm | None:
        """The backbone's final norm as stored."""
        return read_norm(self.folder, self.plan.norm_eps)

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
        """Read a batch of samples, converted once to float32.

        Args:
            keys: B sample keys.
            spec: the taps to read, a subset of the store's; None: all.

        Raises:
            StoreError: the store lacks a sample, or a shard is damaged.
        """
        spec = self.plan.spec if spec is None else spec
        slots = self._places(keys)
        for shard, _ in slots:
            self._shard(shard)  # it has the plan's shapes, or no memory is taken for them
        layers = []
        for tap in spec.taps:
            batch = torch.empty(len(keys), tap.num_tokens, tap.width)
            for row, (shard, slot) in enumerate(slots):
                batch[row].copy_(self._shard(shard)[tap.name][slot])
            layers.append(batch)
        return Features(tuple(layers), spec)

    def summary(self, keys: Sequence[str]) -> Summary:
        """Pooled taps of samples, as written beside the features.

        Raises:
            StoreError: the store lacks a sample, or a shard is damaged.
        """
        slots = self._places(keys)

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

    def _places(self, keys: Sequence[str]) -> list[tuple[int, int]]:
        self.require(keys)
        return [self._slots[key] for key in keys]

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._maps:
            path = shard_path(self.folder, number)
            tensors = map_tensors(path)
            self._check_shapes(path, tensors, len(self.plan.shards[number]))
            self._maps[number] = tensors
        return self._maps[number]

    def _check_shapes(self, path: Path, tensors: dict[str, Tensor], count: int) -> None:
        """A shard must hold what the plan says: another shape could be read as something else."""
        expected = {"valid": (count,), "summary.mean_square": (count, len(self.plan.spec))}
        for tap in self.plan.spec.taps:
            expected[tap.name] = (count, tap.num_tokens, tap.width)
            expected[f"summary.mean.{tap.name}"] = (count, tap.width)
            expected[f"summary.cls.{tap.name}"] = (count, 0 if tap.cls_index is None else tap.width)
        for name, shape in expected.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                got = f"shape {tuple(tensors[name].shape)}" if name in tensors else "no such tensor"
                raise StoreError(
                    f"shard {path} is damaged: {name!r} has {got}, expected shape {shape}. "
                    f"Type: sidetune store verify {self.folder}"
                )


def write_store_head(folder: Path, plan: Plan, norm: FinalNorm | None) -> None:
    """Write the plan and the final norm: the first files of a store."""
    if norm is not None:
        write_tensors(folder / "norm.safetensors", {"weight": norm.weight, "bias": norm.bias})
    write_json(folder / "plan.json", plan.to_json())


def read_norm(folder: Path, eps: float | None) -> FinalNorm | None:
    """The final norm beside a store; None where eps is None.

    Raises:
        StoreError: its file is missing or damaged.
    """
    if eps is None:
        return None
    try:
        tensors = load_file(folder / "norm.safetensors")
        return FinalNorm(tensors["weight"], tensors["bias"], eps)
    except (OSError, SafetensorError, KeyError) as error:
        raise StoreError(
            f"{folder / 'norm.safetensors'} is missing or damaged: {error}. "
            f"Type: rm {folder / 'manifest.json'}, then the same extract command"
        ) from error


def write_manifest(folder: Path, plan: Plan) -> None:
    """Declare a store complete whose shards are all written."""
    samples: list[dict[str, Any]] = []
    for number, keys in enumerate(plan.shards):
        entry = read_shard_entry(folder, number)
        for slot, key in enumerate(keys):
            label = None if entry is None else entry.labels.get(slot)
            samples.append({"key": key, "records": [len(samples)], "label": label})
    norm = folder / "norm.safetensors"
    write_json(
        folder / "manifest.json",
        {
            "format": FORMAT,
            "identity": plan.identity.digest,
            "norm": sha256_file(norm) if norm.exists() else None,
            "records": len(samples),
            "samples": samples,
        },
    )


def verify(folder: Path) -> list[str]:
    """Read every byte of a store: one line a defect, none when all is well."""
    plan = Plan.read(folder)
    again, manifest, norm = "the same extract command", folder / "manifest.json", folder / "norm.safetensors"
    defects = []
    if not manifest.exists():
        defects.append(f"manifest.json: missing, the store is not complete. Type {again} again: it resumes")
    elif (sha256_file(norm) if norm.exists() else None) != read_json_object(manifest, "a manifest").get(
        "norm"
    ):
        defects.append(f"norm.safetensors: not as written. Type: rm {manifest}, then {again}")
    for number in range(len(plan.shards)):
        path, entry = shard_path(folder, number), read_shard_entry(folder, number)
        if entry is None or not path.exists():
            what = "missing" if entry else "no checksum file"
            defects.append(f"{path.name}: {what}. Type {again} again: it resumes")
        elif (found := sha256_file(path)) != entry.sha256:
            defects.append(
                f"{path.name}: sha256 is {found[:12]}.., expected {entry.sha256[:12]}... "
                f"Type: rm {path}, then {again}"
            )
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
        "bytes": sum(file_size(shard_path(folder, number)) or 0 for number in range(len(plan.shards))),
        "state": "complete" if complete else "not complete: extract again",
    }
