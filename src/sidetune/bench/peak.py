"""Peak memory of one step of one case, in a process of its own: ``python -m sidetune.bench.peak``.

The kept bytes are counted on the autograd graph; what the process really takes is measured here, as a
check. Temporary tensors count, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from sidetune.bench.cases import Case
from sidetune.bench.setting import Setting, batches, noise
from sidetune.errors import SidetuneError
from sidetune.memory import PeakMemory, anonymous_bytes
from sidetune.threads import torch_threads

MARK = "peak_bytes "  # begins the line that the parent reads
# glibc keeps freed blocks below a size that grows as the process runs, up to 32 MB: measured, 0.5 GB of
# living tensors took 1.1 to 1.8 GB. With a fixed size every large block goes back, and what counts is alive.
GLIBC = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


def peak_bytes(name: str, setting: Setting) -> int:
    """Run a step of a case in a process of its own: bytes above its model and taps.

    Args:
        name: of `sidetune.bench.cases.CASES`.
        setting: sizes.

    Raises:
        SidetuneError: the process failed.
    """
    command = [sys.executable, "-P", "-m", "sidetune.bench.peak", name, json.dumps(setting.to_json())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | GLIBC)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SidetuneError(
            f"measuring the memory of {name} ended with exit {done.returncode}: {last}. "
            f"Type: sidetune bench side --batch {max(1, setting.batch // 2)}"
        )
    return int(found[-1].removeprefix(MARK))


def measure(name: str, setting: Setting) -> int:
    """Forward and backward of a case, once: bytes above the model and the taps."""
    case = Case(name, setting, batches(setting, noise([setting]))[:1])
    features = case.taps[0]
    case.loss(features.rows(slice(0, 1))).sum().backward()  # what libraries take once
    case.model.zero_grad()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.loss(features).sum().backward()
        return torch.cuda.max_memory_allocated() - before
    before = anonymous_bytes()
    with PeakMemory() as memory:
        case.loss(features).sum().backward()
    return max(0, memory.peak - before)


def main() -> None:
    """Measure the case and setting of the command line."""
    setting = Setting(**json.loads(sys.argv[2]))
    with torch_threads(setting.threads):
        print(f"{MARK}{measure(sys.argv[1], setting)}")  # noqa: T201 - read by `peak_bytes`


if __name__ == "__main__":
    main()
