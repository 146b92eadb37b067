"""Every error that a user can cause or meet, in one small tree.

    SidetuneError               something failed while running           exit 1
    ├── RequestError            the request was wrong                    exit 2
    │   ├── RecipeError         an unknown key, or a value out of range
    │   ├── DataError           images, labels, splits, CSV
    │   ├── BackboneError       an unknown or unsupported backbone, weights that do not fit
    │   ├── SideError           a side network that cannot read these taps
    │   └── MissingExtraError   an optional dependency is not installed
    ├── ImageError              an image file that is missing, damaged or too large
    ├── StoreError              a store that is damaged, or belongs to another backbone
    ├── ArtifactError           a run folder that is damaged, or does not fit what is at hand
    └── DivergedError           no member of the run has finite weights

A message says what was got, what was expected, and what to type next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationError

LONG_NAME = 200  # characters
LISTED = 30  # names that a message lists at most, of 10,000 classes for one


class SidetuneError(ValueError):
    """Something failed while running. The root of the tree above."""

    exit_code: ClassVar[int] = 1


class RequestError(SidetuneError):
    """The request was wrong: nothing was computed and nothing was written."""

    exit_code: ClassVar[int] = 2


class RecipeError(RequestError):
    """A recipe has an unknown key or a value out of range."""


class DataError(RequestError):
    """Images, labels, splits or a CSV are not what the task needs."""


class BackboneError(RequestError):
    """A backbone is unknown or unsupported, or its weights do not fit."""


class SideError(RequestError):
    """A side network cannot read the taps it was given."""


class MissingExtraError(RequestError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, command: str) -> None:
        super().__init__(f"{what} is not installed. Type: {command}")


class ImageError(SidetuneError):
    """An image file is missing, empty, damaged, not an image, or too large.

    Args:
        path: of the file, as the caller knows it.
        reason: what is wrong with it, without the path: it stands alone in a list of skipped files.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[Path, str]]:
        # A decoding worker sends it to the parent process; the default would lose an argument.
        return type(self), (self.path, self.reason)


class StoreError(SidetuneError):
    """A feature store is damaged, or belongs to another backbone."""


class ArtifactError(SidetuneError):
    """A run folder is damaged, or does not fit the backbone or the data at hand."""


class DivergedError(SidetuneError):
    """No member of the run has finite weights any more."""


@contextmanager
def naming(column: str) -> Iterator[None]:
    """Say which label column an error of the data is about, where there are several."""
    try:
        yield
    except DataError as error:
        if not column:
            raise
        raise DataError(f"column {column!r}: {error}") from error


def first_complaint(error: ValidationError) -> str:
    """Where in a JSON file something does not fit, what was got, and what was expected."""
    complaint = error.errors()[0]
    where = ".".join(str(step)[:LONG_NAME] for step in complaint["loc"]) or "it"
    if complaint["type"] == "missing":
        return f"{where!r} is missing"
    got = repr(complaint["input"])
    return f"{where} is {got[:LONG_NAME]}{' ..' if len(got) > LONG_NAME else ''}: {complaint['msg']}"


def without_remedy(defect: object) -> str:
    """What is wrong, for a place where the remedy is under way or another."""
    return str(defect).partition(". Type")[0]


def nearest_path(path: Path) -> str:
    """The words that follow "nothing there": the nearest name in the same folder, if there is one."""
    if not path.parent.is_dir():
        return ""
    names = [one.name for one in path.parent.iterdir() if len(one.name) <= LONG_NAME]
    close = difflib.get_close_matches(path.name[:LONG_NAME], names, n=1)
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The words that end an "unknown name" message: the nearest choice, then all or the first of them."""
    known = sorted(choices)
    short = [
        choice for choice in known if len(choice) <= LONG_NAME
    ]  # comparing takes the square of the length
    close = difflib.get_close_matches(name, short, n=1) if len(name) <= LONG_NAME else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(choice[:LONG_NAME] for choice in known[:LISTED])
    more = f" .. ({len(known)} in all)" if len(known) > LISTED else ""
    return f"{hint} Known: {listed}{more}."
