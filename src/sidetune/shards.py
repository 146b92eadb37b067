"""One shard of a store: a safetensors file of fixed-shape records, and its checksum file.

Records of a shard are read by memory map, so a batch touches only what it asks for. The checksum file
has the sha256 of the header and of every tensor, so that what is read can be checked and nothing else
need be, and a seal: the sha256 of all else in it and of the *claim*, which says of what store and
samples the shard is. A shard at a place that is not its own is seen at once.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sidetune.backbones.base import canonical_json
from sidetune.errors import StoreError, first_complaint
from sidetune.features import Spec
from sidetune.files import parse_json, read_json, write_json, write_tensors

KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}
AGAIN = "Type the same extract or fit command again: it writes this shard anew"


class ShardNotes(BaseModel):
    """What a shard's checksum file says of its samples.

    Args:
        skipped: slot -> why it is not valid.
        labels: slot -> label as first seen, for information only.
        animated: slots whose files hold more frames or pages than the first, which is the one stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    skipped: dict[int, str]
    labels: dict[int, str]
    animated: tuple[int, ...] = ()


class ShardEntry(ShardNotes):
    """A shard's checksum file.

    Args:
        bytes: of the shard.
        header: sha256 of all that stands before its tensors.
        tensors: name -> sha256 of its bytes.
        seal: sha256 over all this and over what store and samples the shard is of.
    """

    bytes: int
    header: str
    tensors: dict[str, str]
    seal: str


@dataclass(frozen=True)
class MappedShard:
    """The tensors of a shard, memory-mapped: nothing is read until it is touched.

    Args:
        path: of the file.
        header: sha256 of all that stands before the tensors.
        tensors: by name.
    """

    path: Path
    header: str
    tensors: dict[str, Tensor]

    def digest(self, name: str) -> str:
        """sha256 of a tensor's bytes: reads them all."""
        return hashlib.sha256(self.tensors[name].flatten().view(torch.uint8).numpy().data).hexdigest()

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tensors must have these shapes: another could be read as something else.

        Raises:
            StoreError: one is missing, or has another.
        """
        for name, shape in shapes.items():
            found = self.tensors.get(name)
            if found is None or tuple(found.shape) != shape:
                got = "no such tensor" if found is None else f"shape {tuple(found.shape)}"
                raise StoreError(
                    f"shard {self.path} is damaged: {name!r} has {got}, expected shape {shape}. {AGAIN}"
                )

    def checked(self, name: str, entry: ShardEntry) -> Tensor:
        """A tensor whose bytes are those that were written.

        Args:
            name: of the tensor.
            entry: the shard's checksum file.

        Raises:
            StoreError: they are not.
        """
        if name not in self.tensors:
            raise StoreError(f"shard {self.path} has no tensor {name!r}, expected one. {AGAIN}")
        for what, found, expected in (
            ("header", self.header, entry.header),
            (repr(name), self.digest(name), entry.tensors.get(name, "")),
        ):
            if found != expected:
                raise StoreError(
                    f"shard {self.path} is damaged or another: the sha256 of its {what} starts with "
                    f"{found[:12]}, expected {expected[:12]}. {AGAIN}"
                )
        return self.tensors[name]


def record_shapes(spec: Spec, count: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a shard of so many samples."""
    shapes: dict[str, tuple[int, ...]] = {"valid": (count,), "summary.mean_square": (count, len(spec))}
    for tap in spec.taps:
        shapes[tap.name] = (count, tap.num_tokens, tap.width)
        shapes[f"summary.mean.{tap.name}"] = (count, tap.width)
        shapes[f"summary.cls.{tap.name}"] = (count, 0 if tap.cls_index is None else tap.width)
    return shapes


def write_shard(
    folder: Path,
    number: int,
    tensors: dict[str, Tensor],
    *,
    claim: str,
    notes: ShardNotes,
) -> None:
    """Write a shard, then its checksum file.

    Args:
        folder: the store.
        number: of the shard.
        tensors: name -> a tensor with one row a slot.
        claim: says of what store and samples it is.
        notes: what else is known of its samples.
    """
    path = shard_path(folder, number)
    # Shards of one length differ in nothing but bytes: an old checksum file must not vouch for a new one.
    entry_path(folder, number).unlink(missing_ok=True)
    write_tensors(path, tensors)
    shard = map_shard(path)
    entry = {
        "bytes": path.stat().st_size,
        "header": shard.header,
        "tensors": {name: shard.digest(name) for name in shard.tensors},
        **notes.model_dump(mode="json"),
    }
    write_json(entry_path(folder, number), {**entry, "seal": _seal(entry, claim)})


def read_shard_entry(folder: Path, number: int, claim: str) -> ShardEntry:
    """A shard's checksum file, where it is whole and its shard stands there in full length.

    Raises:
        StoreError: the shard is not written, cut short, or of another store or place.
    """
    path = shard_path(folder, number)
    size, written = file_size(path), entry_path(folder, number).exists()
    entry = read_json_object(entry_path(folder, number), "a checksum file", AGAIN) if written else {}
    if size is None or not written:
        what = f"has {size} bytes" if size is not None else "is missing"
        expected = f"{entry['bytes']} bytes" if "bytes" in entry else "its checksum file beside it"
        raise StoreError(f"shard {path} {what}, expected {expected}. {AGAIN}")
    seal = _seal({name: value for name, value in entry.items() if name != "seal"}, claim)
    if entry.get("seal") != seal:
        raise StoreError(
            f"{entry_path(folder, number)} is damaged, or of another store or shard: its seal starts with "
            f"{str(entry.get('seal'))[:12]}, expected {seal[:12]}. {AGAIN}"
        )
    try:
        checked = ShardEntry.model_validate(entry)
    except ValidationError as error:
        raise StoreError(
            f"{entry_path(folder, number)} is damaged: {first_complaint(error)}. {AGAIN}"
        ) from error
    if size != checked.bytes:
        raise StoreError(f"shard {path} has {size} bytes, expected {checked.bytes} bytes. {AGAIN}")
    return checked


def is_written(folder: Path, number: int, claim: str) -> bool:
    """Whether a shard stands there in full length with its own checksum file."""
    try:
        read_shard_entry(folder, number, claim)
    except StoreError:
        return False
    return True


def shard_defect(folder: Path, number: int, claim: str) -> str | None:
    """Read every byte of a shard: what is wrong with it."""
    try:
        entry = read_shard_entry(folder, number, claim)
        shard = map_shard(shard_path(folder, number))
        for name in entry.tensors:
            shard.checked(name, entry)
    except StoreError as error:
        return str(error)
    return None


def map_shard(path: Path) -> MappedShard:
    """Map a safetensors file. The map holds no file descriptor: a store may have thousands of shards.

    Raises:
        StoreError: the file's header does not describe its bytes.
        OSError: the file cannot be opened, which says nothing of its bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
    try:
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > size - 8:
            raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
        # a private map: the file stays as it is
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        text = mapped[: 8 + header_bytes].numpy().tobytes()
        header = parse_json(text[8:].decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, expected an object")
        header.pop("__metadata__", None)
        tensors = {
            name: _mapped_tensor(mapped, len(text), _Described.model_validate(entry))
            for name, entry in header.items()
        }
    except (ValueError, RuntimeError, OverflowError, struct.error) as error:
        reason = first_complaint(error) if isinstance(error, ValidationError) else str(error)
        raise StoreError(f"shard {path} is damaged: {reason}. {AGAIN}") from error
    return MappedShard(path, hashlib.sha256(text).hexdigest(), tensors)


class _Described(BaseModel):
    """A tensor in a safetensors header."""

    dtype: Literal["F16", "BF16", "F32", "U8"]
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


def _mapped_tensor(mapped: Tensor, start: int, described: _Described) -> Tensor:
    """A tensor of a mapped file whose data begin at `start`."""
    dtype, (first, end) = KINDS[described.dtype], described.data_offsets
    count = math.prod(described.shape)
    if end - first != count * dtype.itemsize:
        raise ValueError(f"a tensor of shape {described.shape} has {end - first} bytes")
    if not count:
        return torch.empty(described.shape, dtype=dtype)
    if start + end > len(mapped):
        raise ValueError(f"a tensor that ends at byte {start + end} of {len(mapped)}")
    return mapped[start + first : start + end].view(dtype).view(described.shape)


def read_json_object(path: Path, what: str, todo: str) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        what: it is expected to be.
        todo: ends the message where it is not.

    Raises:
        StoreError: it cannot be read, or is not a JSON object.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged: expected {what}, got {error}. {todo}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged: expected {what}, got a {type(value).__name__}. {todo}")
    return value


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard stands."""
    return folder / "shards" / f"{number:05d}.safetensors"


def entry_path(folder: Path, number: int) -> Path:
    """Where a shard's checksum file stands."""
    return folder / "shards" / f"{number:05d}.json"


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.exists() else None


def _seal(entry: Mapping[str, Any], claim: str) -> str:
    return hashlib.sha256(canonical_json({"claim": claim, **entry}).encode()).hexdigest()
