"""Writing files so that a reader never sees half of one, whenever the process dies."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sidetune.errors import SidetuneError

HALF = re.compile(r"\\u[dD][89a-fA-F]")
DEEPEST = 50  # objects and lists in one another
TOO_DEEP = f"objects and lists are nested more than {DEEPEST} deep"
TEMPORARY = ".sidetune-tmp"  # ends the name of a file that is being written


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, fsync, rename: the file is old or new, never half.

    Raises:
        SidetuneError: the disk is full, or the folder cannot be written.
    """
    with written(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Readable JSON, written as `write_text` does. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """A JSON file, as `parse_json` takes it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON in UTF-8.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str, *, nan: bool = False) -> Any:  # noqa: ANN401 - any JSON value
    """JSON as `write_json` writes it: no NaN, no key twice, not nested deeper than any file of ours.

    Args:
        text: of the file.
        nan: take NaN and Infinity, which no JSON has.

    Raises:
        ValueError: it is not; the message says where or what.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=float if nan else _no_constant)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            below
            for one in level
            for below in (one.values() if isinstance(one, dict) else one)
            if isinstance(below, dict | list)
        ]
    if level:
        raise ValueError(TOO_DEEP)
    if HALF.search(text):  # an escape of half a character, or of both halves of one
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text holds half a character, which no file can hold") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:60]!r} stands there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"got {name}, which is not JSON")


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV, quoted where needed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written as `write_text` does, with the same errors."""
    with written(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read its files


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, *, sweep: bool = True) -> Iterator[None]:
    """Hold a folder for one process; a second one says that it waits, then waits.

    The lock is the operating system's: it goes with the process, so a killed one leaves none behind.

    Args:
        folder: made if it is not there.
        sweep: remove what a killed process was writing there.

    Raises:
        SidetuneError: the folder cannot be written.
    """
    with _acquired(folder):
        for path in leftovers(folder) if sweep else ():
            path.unlink()
        yield


def leftovers(folder: Path) -> list[Path]:
    """Temporary files in a folder: of writes that were killed, if nobody works there."""
    return sorted(folder.glob(f".*{TEMPORARY}"))


def _acquired(folder: Path) -> TextIO:
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = path.open("w")
        except OSError as error:
            raise _cannot_write(folder, error) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process works in {folder}; waiting for it", file=sys.stderr)  # noqa: T201
            fcntl.flock(stream, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            return stream
        stream.close()  # whoever held the folder has removed it: the lock is on a file that is gone


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """The temporary name to write under. What was written is synced and renamed, or gone."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        _commit(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # a folder that has become read-only keeps it; there is an error already
            temporary.unlink(missing_ok=True)


def _commit(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _cannot_write(path: Path, error: OSError | SafetensorError) -> SidetuneError:
    number = error.errno if isinstance(error, OSError) else None
    why = os.strerror(number) if number else str(error)
    if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        todo = "Type: the same command with a folder that can be written, or mend this one's permissions"
    else:
        todo = "Free the disk, then type the same command again: it resumes"
    return SidetuneError(f"{path} cannot be written: {why}. {todo}")
