"""Writing files so that a reader never sees half of one, whenever the process dies."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sidetune.errors import SidetuneError


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, fsync, rename: the file is old or new, never half."""
    temporary = _temporary(path)
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    _commit(temporary, path)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Readable JSON, written as `write_text` does. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV, quoted where needed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written as `write_text` does."""
    temporary = _temporary(path)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    except SafetensorError as error:  # no space left, above all
        temporary.unlink(missing_ok=True)
        raise SidetuneError(
            f"{path} cannot be written: {error}. Free the disk, then type the same command again: it resumes"
        ) from error
    temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read its files
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    _commit(temporary, path)


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; a second one says that it waits, then waits.

    The lock is the operating system's: it goes with the process, so a killed one leaves none behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process works in {folder}; waiting for it", file=sys.stderr)  # noqa: T201
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.tmp")


def _commit(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
