"""One shard of a store: a safetensors file of fixed-shape records, and its checksum file.

Records of a shard are read by memory map, so a batch touches only what it asks for.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sidetune.errors import StoreError, first_complaint
from sidetune.files import parse_json, read_json, sha256_file, write_json, write_tensors

KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}


class ShardEntry(BaseModel):
    """A shard's checksum file.

    Args:
        sha256: of the shard.
        bytes: of the shard.
        skipped: slot -> why it is not valid.
        labels: slot -> label as first seen.
        animated: slots of which the first frame or page is stored.
    """

    model_config = ConfigDict(frozen=True)

    sha256: str
    bytes: int
    skipped: dict[int, str]
    labels: dict[int, str]
    animated: tuple[int, ...] = ()


def write_shard(
    folder: Path,
    number: int,
    tensors: dict[str, Tensor],
    *,
    skipped: Mapping[int, str],
    labels: Mapping[int, str],
    animated: Sequence[int] = (),
) -> None:
    """Write a shard, then its checksum file.

    Args:
        folder: the store.
        number: of the shard.
        tensors: name -> a tensor with one row a slot.
        skipped: slot -> why it is not valid.
        labels: slot -> label as first seen, for information only.
        animated: slots whose files hold more frames or pages than the first, which is the one stored.
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
        "animated": list(animated),
    }
    write_json(path.with_suffix(".json"), entry)


def is_written(folder: Path, number: int) -> bool:
    """Whether a shard stands there in full length with its checksum file."""
    entry = read_shard_entry(folder, number)
    return entry is not None and file_size(shard_path(folder, number)) == entry.bytes


def read_shard_entry(folder: Path, number: int) -> ShardEntry | None:
    """A shard's checksum file; None where the shard is not written yet.

    Raises:
        StoreError: it is damaged.
    """
    path = shard_path(folder, number).with_suffix(".json")
    if not path.exists():
        return None
    try:
        return ShardEntry.model_validate(read_json_object(path, "a shard's checksum file"))
    except ValidationError as error:
        raise StoreError(f"{path} is damaged: {first_complaint(error)}. {mend(path)}") from error


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped: nothing is read until it is touched.

    Raises:
        StoreError: the file's header does not describe its bytes.
    """
    try:
        with path.open("rb") as stream:  # a private map: the file stays as it is
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        (header_bytes,) = struct.unpack("<Q", mapped[:8])
        header = parse_json(mapped[8 : 8 + header_bytes].decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, expected an object")
        header.pop("__metadata__", None)
        tensors = {
            name: _mapped_tensor(mapped, 8 + header_bytes, _Described.model_validate(entry))
            for name, entry in header.items()
        }
    except (OSError, ValueError, RuntimeError, OverflowError, struct.error) as error:
        reason = first_complaint(error) if isinstance(error, ValidationError) else error
        folder = path.parent.parent
        raise StoreError(
            f"shard {path} is damaged: {reason}. Type: sidetune store verify {folder}"
        ) from error
    return tensors


class _Described(BaseModel):
    """A tensor in a safetensors header."""

    dtype: Literal["F16", "BF16", "F32", "U8"]
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


def _mapped_tensor(mapped: mmap.mmap, start: int, described: _Described) -> Tensor:
    """A tensor of a mapped file whose data begin at `start`."""
    dtype, (first, end) = KINDS[described.dtype], described.data_offsets
    count = math.prod(described.shape)
    if end - first != count * dtype.itemsize:
        raise ValueError(f"a tensor of shape {described.shape} has {end - first} bytes")
    if not count:
        return torch.empty(described.shape, dtype=dtype)
    flat: Tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + first)
    return flat.view(described.shape)


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        StoreError: it is missing, or not a JSON object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: expected {what}. Type: sidetune store ls") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged: expected {what}, got {error}. {mend(path)}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged: expected {what}, got a {type(value).__name__}. {mend(path)}")
    return value


def mend(path: Path) -> str:
    """What to type about a damaged JSON file of a store."""
    what = f"rm -r {path.parent}" if path.name == "plan.json" else f"rm {path}"
    return f"Type: {what}, then the same extract command"


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard stands."""
    return folder / "shards" / f"{number:05d}.safetensors"


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.exists() else None
