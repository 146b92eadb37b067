"""``sidetune bench side --members M``: M side networks in one model against M models of one.

A step is that of `sidetune.bench.side`, of LoSA's fast form. Both cases train M networks on the same batch:
``losa-fast-mM`` in one model, which reads each tap once; ``losa-fast-solo-mM`` in M steps of a model of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from sidetune.bench.cases import SECOND, Case
from sidetune.bench.peak import peak_bytes
from sidetune.bench.rows import Bench, Row, describe_machine
from sidetune.bench.setting import Setting, batches, noise
from sidetune.bench.side import growth_batch
from sidetune.bench.timing import in_turn
from sidetune.errors import RequestError
from sidetune.threads import torch_threads

SIDE = "losa-fast"
TIME_GOAL, GOAL_MEMBERS = 0.40, 16  # of M solo steps
GROWTH = (1, 4, 16, 64)  # members
PEAK_GOAL, PEAK_MEMBERS, PEAK_BATCH = 4 * 2**30, 64, 32  # bytes above model and taps


def bench_members(
    setting: Setting, members: int, *, growth: bool = False, peak: bool = True, quiet: bool = False
) -> Bench:
    """Time of a step of M members in one model, against M steps of one; memory of 64.

    Args:
        setting: sizes.
        members: M.
        growth: also how the time grows with M, on smaller batches.
        peak: also the peak memory of 64 members, in a process of its own.
        quiet: no progress.

    Returns:
        Rows of cases ``losa-fast-m16``, ``losa-fast-solo-m16``, ``losa-fast-m64``, ``growth/M=4/losa-fast``.

    Raises:
        RequestError: fewer than two members.
        SidetuneError: the process that measures peak memory failed.
    """
    if members < 2:
        raise RequestError(f"members is {members}, expected 2 or more. Type: --members {GOAL_MEMBERS}")
    with torch_threads(setting.threads):
        rows = list(_times(setting, members, quiet=quiet))
        if growth:
            rows += _growth(setting, quiet=quiet)
        sizes = {**setting.to_json(), "members": members, "growth_batch": growth_batch(setting)}
        about = describe_machine(torch.device(setting.device), sizes)
    if peak:
        large = replace(setting, batch=min(setting.batch, PEAK_BATCH))
        name = f"{SIDE}-m{PEAK_MEMBERS}"
        goal = PEAK_GOAL if setting.is_the_goals else None
        rows.append(Row(name, "peak_bytes", peak_bytes(name, large), "B", goal=goal))
    return Bench(tuple(rows), about)


def _times(setting: Setting, members: int, *, quiet: bool) -> Iterator[Row]:
    pool = batches(setting, noise([setting]))
    together, solo = f"{SIDE}-m{members}", f"{SIDE}-solo-m{members}"
    fleet, one = Case(together, setting, pool), Case(SIDE, setting, pool)

    def one_by_one() -> None:
        for _ in range(members):
            one.step()

    steps: dict[str, Callable[[], None]] = {together: fleet.step, solo: one_by_one}
    device = torch.device(setting.device)
    timings = in_turn(steps, setting.rounds, label="members", device=device, quiet=quiet)
    a_step = SECOND / setting.batch
    times = {name: timings[name].row(name, "ms_per_image", "ms", a_step) for name in steps}
    goal = TIME_GOAL if setting.is_the_goals and members == GOAL_MEMBERS else None
    yield times[together].to(times[solo], goal=goal)
    yield times[solo]


def _growth(setting: Setting, *, quiet: bool) -> Iterator[Row]:
    """Milliseconds an image of all members, on smaller batches; the ratio is to one member."""
    point = replace(setting, batch=growth_batch(setting))
    pool = batches(point, noise([point]))
    steps = {count: Case(f"{SIDE}-m{count}", point, pool).step for count in GROWTH}
    device = torch.device(setting.device)
    timings = in_turn(steps, setting.rounds, label="growth", device=device, quiet=quiet)
    rows = [
        timings[count].row(f"growth/M={count}/{SIDE}", "ms_per_image", "ms", SECOND / point.batch)
        for count in GROWTH
    ]
    return (row.to(rows[0]) for row in rows)
