"""``sidetune bench cost``: what training costs, each method in a process of its own.

Workers stay alive and take turns, A, B, C, A, B, C, ..: what else the machine does meets all of them alike,
and never do two of them run at once. Memory is measured before that, in further processes, one by one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sidetune.backbones.random_weights import differing, write_random_weights
from sidetune.bench.cost_cases import DEFAULT, FORWARD, CostCase, CostSetting
from sidetune.bench.cost_growth import growth_rows, known_axes
from sidetune.bench.cost_rows import Measured, cost_rows
from sidetune.bench.cost_worker import MARK
from sidetune.bench.peak import GLIBC
from sidetune.bench.rows import Bench, describe_machine, note_commit
from sidetune.bench.stores import temporary_folder
from sidetune.bench.timing import in_turn
from sidetune.errors import RequestError, SidetuneError
from sidetune.progress import Progress
from sidetune.store import DTYPES
from sidetune.threads import torch_threads

LAST_WORDS = 400  # characters of what a process said before it failed


def bench_cost(
    setting: CostSetting, cases: Sequence[str] = DEFAULT, *, growth: Sequence[str] = (), quiet: bool = False
) -> Bench:
    """Time, memory and size of training, by method.

    Args:
        setting: backbone, sizes and the whole job.
        cases: names, as `CostCase.parse` reads them; the backbone alone is added where it is missing.
        growth: of `sidetune.bench.cost_growth.AXES`, or ``all``: also how time and memory grow along these.
        quiet: no progress.

    Returns:
        Rows of each case; a metric has a row against ``lora`` and one against ``forward`` where these ran.

    Raises:
        RequestError: an unknown case or axis.
        SidetuneError: a case's process failed.
    """
    axes = known_axes(growth)
    names = list(dict.fromkeys((FORWARD, *cases)))
    parsed = {name: CostCase.parse(name) for name in names}
    rows = list(cost_rows(setting, parsed, measure(setting, parsed, quiet=quiet)))
    rows += growth_rows(setting, axes, partial(measure, quiet=quiet))
    with torch_threads(setting.threads):
        sizes = {**setting.to_json(), "cases": list(cases), "growth": list(axes)}
        about = describe_machine(torch.device(setting.device), sizes)
    return Bench(tuple(rows), about)


def measure(
    setting: CostSetting, cases: Mapping[str, CostCase], *, quiet: bool = True
) -> dict[str, Measured]:
    """Memory of every case, then the time of all in turn.

    Args:
        setting: sizes.
        cases: by name.
        quiet: no progress.

    Raises:
        SidetuneError: a case's process failed.
    """
    note_commit()
    streamed = any(case.streamed for case in cases.values())
    with temporary_folder() as folder, temporary_folder() as weights:
        if streamed and setting.weights is None:
            setting = drawn(setting, weights / "weights.safetensors")
        if any(case.stored for case in cases.values()):
            with _worker("the small store", "store", _json(setting), str(folder)) as worker:
                worker.end()
        peaks: dict[str, dict[str, int]] = {}
        with Progress("memory", len(cases), "cases", quiet=quiet) as progress:
            for name in cases:
                with _worker(name, "memory", name, _json(setting), _store(cases[name], folder)) as worker:
                    peaks[name] = worker.hear()
                progress.advance(1, name)
        with ExitStack() as stack:
            workers, facts = {}, {}
            for name, case in cases.items():
                started = _worker(name, "time", name, _json(setting), _store(case, folder))
                workers[name] = stack.enter_context(started)
                facts[name] = workers[name].hear()
            runs = {name: worker.run for name, worker in workers.items()}
            timings = in_turn(runs, setting.rounds, label="bench cost", quiet=quiet)
            steps = {name: worker.steps for name, worker in workers.items()}
    if not streamed:
        for found in peaks.values():
            del found["resident_bytes"]
    return {name: Measured(timings[name], steps[name], **peaks[name], **facts[name]) for name in cases}


def drawn(setting: CostSetting, file: Path) -> CostSetting:
    """The setting with a file of random weights, which all its cases read.

    Args:
        setting: of a model of timm.
        file: to write, unless it is there.

    Raises:
        RequestError: another backbone.
        SidetuneError: no room on the disk.
    """
    dtype = DTYPES[setting.precision]
    if not file.exists():
        write_random_weights(setting.model, file, dtype=dtype, depth=setting.depth)
    elif wrong := differing(setting.model, file, dtype, setting.depth):
        raise RequestError(
            f"{file} {wrong}, expected random weights of {setting.model} in {setting.precision}. "
            "Type: --weights with a new file"
        )
    return replace(setting, weights=str(file))


def _json(setting: CostSetting) -> str:
    return json.dumps(setting.to_json())


def _store(case: CostCase, folder: Path) -> str:
    return str(folder) if case.stored else ""


class _Worker:
    """A process of `sidetune.bench.cost_worker`, seen from here."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: Path) -> None:
        self.name, self.steps = name, 1
        self._process, self._errors = process, errors

    def run(self) -> None:
        """One round."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except OSError:  # it has ended: what it said is heard below
            pass
        self.steps = int(self.hear())

    def hear(self) -> Any:  # noqa: ANN401 - any JSON value
        """The next thing that it says.

        Raises:
            SidetuneError: it ended without.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.end()
        raise self._failed()

    def end(self) -> None:
        """Wait for its end.

        Raises:
            SidetuneError: it failed.
        """
        if self._process.wait():
            raise self._failed()

    def _failed(self) -> SidetuneError:
        lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1][-LAST_WORDS:] if lines else "it said nothing"
        last = last.removeprefix("sidetune.errors.")
        # what the library refuses says what to type; the rest is memory, or a compiler that is missing
        remedy = "" if "Type: " in last else ". Type: the same command with --cases and without it"
        return SidetuneError(
            f"the process of {self.name} ended with exit {self._process.wait()}: {last}{remedy}"
        )


@contextmanager
def _worker(name: str, *arguments: str) -> Iterator[_Worker]:
    """A process that ends with the block."""
    command = [sys.executable, "-P", "-m", "sidetune.bench.cost_worker", *arguments]
    fixed = GLIBC if arguments[0] == "memory" else {}  # time is measured as the allocator is by itself
    with tempfile.NamedTemporaryFile(prefix="sidetune-bench-") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | fixed,
        )
        try:
            yield _Worker(name, process, Path(errors.name))
        finally:
            process.kill()
            process.communicate()
