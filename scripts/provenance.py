"""What every result line says of where it comes from."""

from __future__ import annotations

import os
import platform
import subprocess

HARDWARE = f"{os.cpu_count()} cores {platform.machine()}, no GPU"


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *words], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
