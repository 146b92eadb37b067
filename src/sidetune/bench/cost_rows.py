"""What was measured of every case, as rows: ratios to LoRA and to the backbone alone, goals, whole jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sidetune.bench.cost_cases import FORWARD, CostCase, CostSetting
from sidetune.bench.rows import Row
from sidetune.bench.timing import Timing

LORA = "lora"
SIDES = ("losa", "last")  # that the goals are about
STEP_FLOOR, STEP_LORA = 1.10, 0.51  # a live step: of the backbone alone, of LoRA's
PEAK_FLOOR, PEAK_LORA = 1.5, 0.15  # memory likewise; to the first a batch's taps are added
JOB_LORA = 0.036  # the whole job with a store, extraction included
JOB_CASE = "losa-stored"
COMPUTED = "s, computed"


@dataclass(frozen=True)
class Measured:
    """What one case's processes said.

    Args:
        timing: of a round.
        steps: of a round.
        peak_bytes: of two rounds, above backbone and model.
        parameters: trained, a member, without the head; None where nothing trains, as below.
        artifact_bytes: of the file that a run would keep.
        tap_bytes: of a batch's features.
        resident_bytes: the most that the process of `peak_bytes` ever held; where anything is streamed.
        held_bytes: of two rounds, backbone and model among them.
        doubled_bytes: what a baseline has twice, and counts once in that.
    """

    timing: Timing
    steps: int
    peak_bytes: int
    parameters: int | None = None
    artifact_bytes: int | None = None
    tap_bytes: int | None = None
    resident_bytes: int | None = None
    held_bytes: int | None = None
    doubled_bytes: int = 0

    @property
    def step_s(self) -> float:
        """Seconds a step."""
        return self.timing.median / self.steps


def cost_rows(
    setting: CostSetting, cases: Mapping[str, CostCase], measured: Mapping[str, Measured]
) -> Iterator[Row]:
    """The rows of a run, a metric after the other.

    Args:
        setting: sizes, and the job.
        cases: by name, `forward` among them.
        measured: of each.
    """
    for metric, (row_of, others) in _metrics(setting, cases, measured).items():
        rows = {name: row for name in cases if (row := row_of(name)) is not None}
        for name, row in rows.items():
            found = [rows[other] for other in others if other in rows and other != name and rows[other].value]
            if not found:
                yield row
            for other in found:
                goal = _goal(metric, name, other.case, measured) if setting.is_the_goals else None
                yield row.to(other, goal=goal)


def job_seconds(
    setting: CostSetting, case: CostCase, measured: Mapping[str, Measured], epochs: int | None = None
) -> float:
    """The whole job, computed: steps times a step's seconds, and the extraction where there is a store.

    What else a fit does is in no case: decoding, validation, the tests at its end.

    Args:
        setting: images, batch and epochs of the job.
        case: which.
        measured: of it and of `forward`.
        epochs: None: the setting's.
    """
    steps = setting.epoch_steps * (setting.epochs if epochs is None else epochs)
    extraction = setting.images / setting.batch * measured[FORWARD].step_s if case.stored else 0.0
    return steps * measured[case.name].step_s + extraction


def _metrics(
    setting: CostSetting, cases: Mapping[str, CostCase], measured: Mapping[str, Measured]
) -> dict[str, tuple[Callable[[str], Row | None], tuple[str, ...]]]:
    """Metric -> the row of a case, and the cases that its ratios are to."""

    def number(metric: str, unit: str) -> Callable[[str], Row | None]:
        def row(name: str) -> Row | None:
            value = getattr(measured[name], metric)
            return None if value is None else Row(name, metric, value, unit)

        return row

    def step(name: str) -> Row:
        return measured[name].timing.row(name, "step_s", "s", 1 / measured[name].steps)

    def images(name: str) -> Row:
        amount = setting.pictures * measured[name].steps * cases[name].members
        return measured[name].timing.rate(name, "images_per_s", "images/s", amount)

    def job(name: str) -> Row | None:
        if cases[name].recipe is None:
            return None
        return Row(name, "job_s", job_seconds(setting, cases[name], measured), COMPUTED)

    both = (LORA, FORWARD)
    return {
        "step_s": (step, both),
        "images_per_s": (images, both),
        "peak_bytes": (number("peak_bytes", "B"), both),
        "resident_bytes": (number("resident_bytes", "B"), ()),
        "tap_bytes": (number("tap_bytes", "B"), ()),
        "parameters": (number("parameters", ""), (LORA,)),
        "artifact_bytes": (number("artifact_bytes", "B"), (LORA,)),
        "job_s": (job, (LORA,)),
    }


def _goal(metric: str, name: str, against: str, measured: Mapping[str, Measured]) -> float | None:
    """The ratio that is aimed at."""
    if name in SIDES and metric == "step_s":
        return {FORWARD: STEP_FLOOR, LORA: STEP_LORA}.get(against)
    if name in SIDES and metric == "peak_bytes":
        if against == LORA:
            return PEAK_LORA
        return PEAK_FLOOR + (measured[name].tap_bytes or 0) / measured[FORWARD].peak_bytes
    if (name, metric, against) == (JOB_CASE, "job_s", LORA):
        return JOB_LORA
    return None
