"""Progress on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_EVERY = 10.0  # seconds between plain lines


def say(text: str, *, quiet: bool = False) -> None:
    """One line on stderr, unless quiet."""
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def printable(text: str) -> str:
    """Text as a terminal may show it: a file's name can hold commands for it, or bytes that are no text."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


class Progress:
    """Counts work done and says rate and time left.

    Args:
        label: what is being done, as ``extract`` or ``train losa``.
        total: units in all.
        unit: plural, as ``images``.
        done: units that an earlier run has already done.
        quiet: print nothing.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.done, self._first = done, done
        self._started = self._printed = time.monotonic()
        self._bar: Bar | None = None
        if not quiet and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=8),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and not self.quiet and self._printed != self._started:
            self._print(f"done in {time.monotonic() - self._started:.0f} s")

    def advance(self, units: int, note: str = "") -> None:
        """Units more are done. The note follows the rate: a loss, a score."""
        self.done += units
        rate = (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)
        tail = f" · {note}" if note else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=f"{rate:.3g} {self.unit}/s{tail}")
        elif not self.quiet and time.monotonic() - self._printed >= PLAIN_EVERY:
            counted = f"{self.done}/{self.total} {self.unit} · {rate:.1f} {self.unit}/s"
            self._print(f"{counted}{tail} · {(self.total - self.done) / max(rate, 1e-9):.0f} s left")

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        say(f"{self.label}: {text}")
