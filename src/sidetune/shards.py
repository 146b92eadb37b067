"""One shard of a store: a safetensors file of fixed-shape records, and its checksum file.

Records of a shard are read by memory map, so a batch touches only what it asks for.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidetune.errors import StoreError
from sidetune.files import sha256_file, write_json, write_tensors


def write_shard(
    folder: Path,
    number: int,
    tensors: dict[str, Tensor],
    *,
    skipped: Mapping[int, str],
    labels: Mapping[int, str],
) -> None:
    """Write a shard, then its checksum file.

    Args:
        folder: the store.
        number: of the shard.
        tensors: name -> a tensor with one row a slot.
        skipped: slot -> why it is not valid.
        labels: slot -> label as first seen, for information only.
    """
    path = shard_path(folder, number)
    # Shards of one length differ in nothing but bytes: an old checksum file must not vouch for a new one.
    path.with_suffix(".json").unlink(missing_ok=True)
    write_tensors(path, tensors)
    entry = {
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "skipped": dict(skipped),
        "labels": dict(labels),
    }
    write_json(path.with_suffix(".json"), entry)


def is_written(folder: Path, number: int) -> bool:
    """Whether a shard stands there in full length with its checksum file."""
    entry = read_shard_entry(folder, number)
    return entry is not None and file_size(shard_path(folder, number)) == entry["bytes"]


def read_shard_entry(folder: Path, number: int) -> dict[str, Any] | None:
    """A shard's checksum file; None where the shard is not written yet."""
    path = shard_path(folder, number).with_suffix(".json")
    return read_json_object(path, "a shard's checksum file") if path.exists() else None


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped: nothing is read until it is touched.

    Raises:
        StoreError: the file's header does not describe its bytes.
    """
    try:
        with path.open("rb") as stream:  # a private map: the file stays as it is
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
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
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        folder = path.parent.parent
        raise StoreError(f"shard {path} is damaged: {error}. Type: sidetune store verify {folder}") from error
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


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard stands."""
    return folder / "shards" / f"{number:05d}.safetensors"


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.exists() else None
