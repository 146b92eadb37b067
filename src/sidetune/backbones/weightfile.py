"""Tensors of safetensors files, read one at a time into memory that the caller owns.

Nothing is mapped: pages of a map count as the process's own as long as the system leaves them, and a model is
streamed because it should not be in memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from sidetune.backbones.checkpoint import HUB_FILES
from sidetune.errors import BackboneError
from sidetune.files import read_json, written

INDEX = "model.safetensors.index.json"  # of a folder that holds a model in several files
WHOLE = HUB_FILES[0]
HUB_PATTERNS = ("config.json", "model*.safetensors", "model*.json")  # of such a folder, what is downloaded
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
PIECE = 2**20  # numbers that are read at a time where their type changes
ADVICE = 2**17  # bytes that every disk reads ahead for one piece of advice; of more some read a part
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands.

    Args:
        file: that holds it.
        dtype: as stored.
        shape: of it.
        start: its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, as it is stored, in memory of its own."""
        into = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(into)
        return into

    def read_into(self, into: Tensor) -> None:
        """The same into a contiguous tensor of this shape on the CPU, of this type or another.

        Raises:
            BackboneError: the file ends before the tensor does, or is gone.
        """
        numbers = into.view(-1)
        same = numbers.dtype == self.dtype
        piece = numbers if same else torch.empty(min(PIECE, len(numbers)), dtype=self.dtype)
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.start)
                for first in range(0, len(numbers), max(1, len(piece))):
                    part = numbers[first : first + len(piece)]
                    self._fill(stream, piece[: len(part)])
                    if not same:
                        part.copy_(piece[: len(part)])
        except OSError as error:
            raise BackboneError(f"weights {self.file} cannot be read: {error.strerror}") from error

    def _fill(self, stream: FileIO, piece: Tensor) -> None:
        place = piece.view(torch.uint8).numpy().data
        while place:
            count = stream.readinto(place)
            if not count:
                raise BackboneError(f"weights {self.file} end in the middle of a tensor")
            place = place[count:]

    def expect(self) -> None:
        """Have the system read it into its cache, where it can be asked to."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError), self.file.open("rb", buffering=0) as stream:
            for first in range(self.start, self.start + self.nbytes, ADVICE):
                os.posix_fadvise(stream.fileno(), first, ADVICE, os.POSIX_FADV_WILLNEED)


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file, or of a folder as on the hub: ``model.safetensors`` or several with an index.

    Raises:
        BackboneError: there is no such file, it is damaged, or holds a type that no weight has.
    """
    if path.is_dir():
        files = _files_of(path)
    elif path.suffix == ".safetensors":
        files = [path]
    else:
        raise BackboneError(
            f"weights {path}: expected a .safetensors file or a folder with {WHOLE}, of which a block can be "
            "read alone. Save the model's state_dict with safetensors.torch.save_file"
        )
    return {name: tensor for file in files for name, tensor in _tensors_of(file).items()}


def _files_of(folder: Path) -> list[Path]:
    if (folder / WHOLE).is_file():  # as timm and transformers choose where both are there
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        try:
            index = read_json(folder / INDEX)["weight_map"]
            return [folder / name for name in sorted(set(index.values()))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BackboneError(f"{folder / INDEX} is damaged: {error!r}") from error
    raise BackboneError(f"weights {folder}: expected {WHOLE} or {INDEX} in it")


def _tensors_of(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        raise BackboneError(f"weights {file}: there is no such file")
    try:
        with safetensors.safe_open(file, "np"):  # refuses a header that does not fit its file
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (safetensors.SafetensorError, OSError, struct.error, ValueError) as error:
        raise BackboneError(f"weights {file} cannot be read: {str(error).partition(chr(10))[0]}") from error
    header.pop("__metadata__", None)
    found = {}
    for name, fields in header.items():
        if fields["dtype"] not in TYPES:
            raise BackboneError(
                f"weights {file}: {name} is of type {fields['dtype']}, expected {', '.join(TYPES)}"
            )
        start = 8 + length + fields["data_offsets"][0]
        found[name] = Stored(file, TYPES[fields["dtype"]], tuple(fields["shape"]), start)
    return found


def write_in_turn(
    path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """A safetensors file whose tensors come one at a time: never are two of them in memory.

    Args:
        path: of the file.
        shapes: of the tensors, in order.
        dtype: of all.
        tensors: in the same order, of any type.

    Raises:
        SidetuneError: the disk is full, or the folder cannot be written.
    """
    header, first = {}, 0
    for name, shape in shapes.items():
        after = first + shape.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [first, after]}
        first = after
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written(path) as temporary, temporary.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == shape, f"{name}: {tuple(tensor.shape)}, expected {tuple(shape)}"
            stream.write(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
