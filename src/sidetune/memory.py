"""Peak memory of this process while something runs."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL = 0.02  # seconds between samples


class PeakMemory:
    """Samples the process's own memory (bytes) in the background; `peak` is the largest seen.

    On Linux: anonymous resident memory. Pages of memory-mapped shards are left out: the kernel gives
    them back when anyone needs them. Elsewhere: the operating system's peak resident size.

    Args:
        interval: seconds between samples.
    """

    peak: int = 0

    def __init__(self, interval: float = INTERVAL) -> None:
        self.interval = interval

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            if self._stop.wait(self.interval):
                return


def anonymous_bytes() -> int:
    """Resident bytes that belong to this process alone, not to mapped files."""
    return _status("RssAnon") or _peak_of_system()


def resident_bytes() -> int:
    """The most that this process ever held in memory, libraries and pages of mapped files among it."""
    return _status("VmHWM") or _peak_of_system()  # the system's own peak begins with that of the parent


def _status(name: str) -> int | None:
    """Bytes of a line of Linux's /proc/self/status; None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _peak_of_system() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
