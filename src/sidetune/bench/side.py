"""``sidetune bench side``: the textbook forms, the fast forms and the floor, side by side in one run.

A step is what training does: taps -> side -> norm -> head -> cross-entropy over 10 classes, backward,
clipping, AdamW. Taps are random normal numbers in the stored dtype, the same for all cases, and come
from memory, not from a cache. Up-projections are drawn, so that nothing is zero that would not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from sidetune.bench.cases import CASES, GEMM, SECOND, Case, floor_rows, machine_cases
from sidetune.bench.peak import peak_bytes
from sidetune.bench.rows import Bench, Row, describe_machine
from sidetune.bench.setting import Setting, batches, noise
from sidetune.bench.timing import in_turn
from sidetune.features import Features
from sidetune.kept import kept_bytes
from sidetune.progress import Progress
from sidetune.threads import torch_threads

TIME_GOALS = {"losa": 0.30, "last": 0.45}  # of the textbook form's time
KEPT_GOALS = {"losa": 0.12, "last": 0.40}  # of the bytes of the stored taps
FLOORS = {"losa": "floor", "last": "floor-last"}
FACTORS = (0.25, 0.5, 1.0, 2.0)  # of the setting's own sizes, at which the growth is measured
GROWTH_BATCH = 0.25  # of the setting's: sixteen points would take long


def bench_side(setting: Setting, *, growth: bool = False, peak: bool = True, quiet: bool = False) -> Bench:
    """Time and memory of a training step: fast forms against textbook forms and the floor.

    Args:
        setting: sizes.
        growth: also how the time grows with N, D, L, R and B; sixteen further points.
        peak: also the peak memory, one process a case.
        quiet: no progress.

    Returns:
        Rows of cases ``losa-fast``, ``last-fast``, ``losa-textbook``, ``last-textbook``, ``floor``,
        ``floor-last``, ``taps`` and, of the machine, ``read``, ``copy`` and ``gemm``.

    Raises:
        SidetuneError: a process that measures peak memory failed.
    """
    with torch_threads(setting.threads):
        pool = batches(setting, noise([setting]))
        cases = {name: Case(name, setting, pool) for name in CASES}
        rows = [*_times(setting, cases, pool, quiet=quiet), *_kept(setting, cases)]
        sizes = {**setting.to_json(), "growth_batch": growth_batch(setting)}
        about = describe_machine(torch.device(setting.device), sizes)
    del pool, cases  # memory is measured, and the growth has taps of its own
    if peak:
        rows += _peaks(setting, quiet=quiet)
    if growth:
        with torch_threads(setting.threads):
            rows += _growth(setting, quiet=quiet)
    return Bench(tuple(rows), about)


def _times(
    setting: Setting, cases: dict[str, Case], pool: Sequence[Features], *, quiet: bool
) -> Iterator[Row]:
    steps = {name: case.step for name, case in cases.items()}
    machine = machine_cases(setting, pool)
    timings = in_turn(
        steps | machine,
        setting.rounds,
        label="bench side",
        device=torch.device(setting.device),
        quiet=quiet,
    )
    a_step = SECOND / setting.batch
    times = {name: timings[name].row(name, "ms_per_image", "ms", a_step) for name in steps}
    floors = {row.case: row for row in floor_rows(setting, timings)}
    for name, (side, form) in CASES.items():
        goal = TIME_GOALS[side] if setting.is_the_goals else None
        yield times[name].to(times[f"{side}-textbook"], goal=goal) if form == "fast" else times[name]
    for side, name in FLOORS.items():
        yield floors[name].to(times[f"{side}-textbook"])
    for side, name in FLOORS.items():
        ratio = times[f"{side}-fast"].value / floors[name].value
        yield Row(f"{side}-fast", "times_floor", ratio, "x", against=name, ratio=ratio)
    taps = setting.batch * setting.record_bytes() / 1e9
    yield timings["read"].rate("read", "gb_per_s", "GB/s", taps)
    yield timings["copy"].rate("copy", "gb_per_s", "GB/s", taps)
    yield timings["gemm"].rate("gemm", "gflop_per_s", "GFLOP/s", 2 * GEMM**3 / 1e9)


def _kept(setting: Setting, cases: dict[str, Case]) -> Iterator[Row]:
    for name, case in cases.items():
        goal = KEPT_GOALS[case.side] if case.form == "fast" and setting.is_the_goals else None
        features = case.taps[0]
        apart = [*features.layers, *case.model.parameters(), *case.model.buffers()]
        kept = kept_bytes(lambda case=case, features=features: case.loss(features), apart)  # type: ignore[misc]
        taps = Row("taps", f"{case.side}_bytes", case.tap_bytes, "B")
        yield Row(name, "kept_bytes", kept, "B").to(taps, goal=goal)
    for side in FLOORS:
        yield Row("taps", f"{side}_bytes", cases[f"{side}-fast"].tap_bytes, "B")


def _peaks(setting: Setting, *, quiet: bool) -> Iterator[Row]:
    rows = {}
    with Progress("memory", len(CASES), "cases", quiet=quiet) as progress:
        for name in CASES:
            rows[name] = Row(name, "peak_bytes", peak_bytes(name, setting), "B")
            progress.advance(1, name)
    for name, (side, form) in CASES.items():
        textbook = rows[f"{side}-textbook"]
        has_ratio = form == "fast" and textbook.value > 0
        yield rows[name].to(textbook) if has_ratio else rows[name]


def _growth(setting: Setting, *, quiet: bool) -> Iterator[Row]:
    """Points that differ from a smaller batch of the setting in one size, all in turn in every round."""
    points = dict(growth_points(replace(setting, batch=growth_batch(setting))))
    drawn = noise(list(points.values()))
    steps: dict[tuple[Setting, str], Callable[[], None]] = {}
    found: dict[tuple[str, str], Row] = {}
    for point in dict.fromkeys(points.values()):  # the setting itself is on every axis, and measured once
        pool = batches(point, drawn)
        steps |= {(point, name): Case(name, point, pool).step for name in CASES}
    timings = in_turn(steps, setting.rounds, label="growth", device=torch.device(setting.device), quiet=quiet)
    for label, point in points.items():
        for name in CASES:
            case, a_step = f"growth/{label}/{name}", SECOND / point.batch
            found[label, name] = timings[point, name].row(case, "ms_per_image", "ms", a_step)
        for name, (side, form) in CASES.items():
            row = found[label, name]
            yield row.to(found[label, f"{side}-textbook"]) if form == "fast" else row


def growth_batch(setting: Setting) -> int:
    """B of the points of the growth, where B itself does not vary."""
    return max(1, round(setting.batch * GROWTH_BATCH))


def growth_points(start: Setting) -> Iterator[tuple[str, Setting]]:
    """``N=257`` and its setting: each size in turn at a quarter, a half, once and twice its own.

    Where no rank was chosen, LoSA's and LAST's differ, and the larger one is R's own.
    """
    rank = max(start.ranks().values())
    sizes = {"N": start.tokens - 1, "D": start.width, "L": start.layers, "R": rank, "B": start.batch}
    fields = {"N": "tokens", "D": "width", "L": "layers", "R": "rank", "B": "batch"}
    for axis, size in sizes.items():
        values = dict.fromkeys(max(1, round(size * factor)) for factor in FACTORS)
        for value in values:
            number = value + 1 if axis == "N" else value  # the class token stays
            yield f"{axis}={number}", replace(start, **{fields[axis]: number})  # type: ignore[arg-type]
