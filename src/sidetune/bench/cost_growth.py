"""How the cost of training grows with one size at a time: rows ``growth/batch=8/losa``.

batch     images a step
size      pixels, and with their square the tokens
model     vision transformers from Ti to g, on a batch of two
epochs    of the whole job, computed; with a store the backbone runs once for all of them
members   networks that train in one model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from sidetune.bench.cost_cases import FORWARD, METHODS, CostCase, CostSetting
from sidetune.bench.cost_rows import COMPUTED, LORA, Measured, job_seconds
from sidetune.bench.rows import Row
from sidetune.errors import RequestError, nearest

AXES = ("batch", "size", "model", "epochs", "members")
CASES = tuple(name for name in (FORWARD, "losa", "last", LORA) if name in (FORWARD, *METHODS))
STORED = tuple(name for name in ("losa-stored", "last-stored", LORA) if name.split("-")[0] in METHODS)
BATCHES, SIZES = (0.25, 0.5, 1, 2), (0.5, 1, 2)  # of the setting's
EPOCHS = (1, 3, 10, 30, 100)
MEMBERS = (1, 4, 16)
MODELS = {
    "ViT-Ti": "timm:vit_tiny_patch16_224",
    "ViT-S": "timm:vit_small_patch14_dinov2",
    "ViT-B": "timm:vit_base_patch14_dinov2",
    "ViT-L": "timm:vit_large_patch14_dinov2",
    "ViT-g": "timm:vit_giant_patch14_dinov2",
}
MODEL_BATCH = 2  # a step of the largest takes minutes on two cores, and gradients through it tens of GB

Measure = Callable[[CostSetting, Mapping[str, CostCase]], dict[str, Measured]]


def known_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """The axes themselves; ``all`` stands for every one.

    Raises:
        RequestError: there is no such axis.
    """
    for axis in axes:
        if axis not in (*AXES, "all"):
            raise RequestError(f"--growth names {axis!r}.{nearest(axis, (*AXES, 'all'))}")
    return AXES if "all" in axes else tuple(axes)


def growth_points(setting: CostSetting, axis: str) -> dict[str, CostSetting]:
    """Label -> setting, of an axis along which the setting changes."""
    if axis == "batch":
        values = dict.fromkeys(max(1, round(setting.batch * factor)) for factor in BATCHES)
        return {f"batch={value}": replace(setting, batch=value) for value in values}
    if axis == "size":
        values = dict.fromkeys(round(setting.size * factor) for factor in SIZES)
        return {f"size={value}": replace(setting, size=value) for value in values}
    assert axis == "model", axis
    return {
        f"model={label}": replace(setting, backbone=name, batch=min(setting.batch, MODEL_BATCH))
        for label, name in MODELS.items()
    }


def growth_rows(setting: CostSetting, axes: Sequence[str], measure: Measure) -> Iterator[Row]:
    """Rows of all axes asked for.

    Args:
        setting: where each axis starts from.
        axes: of `AXES`.
        measure: a setting and cases -> what was measured.
    """
    for axis in axes:
        if axis == "epochs":
            yield from _epochs(setting, measure)
        elif axis == "members":
            yield from _members(setting, measure)
        else:
            cases = {name: CostCase.parse(name) for name in CASES}
            for label, point in growth_points(setting, axis).items():
                yield from _point(label, measure(point, cases))


def _point(label: str, measured: Mapping[str, Measured]) -> Iterator[Row]:
    """Time and memory of a point; ratios are to LoRA, or to the backbone alone, at the same point."""
    for metric in ("step_s", "peak_bytes"):
        rows = {name: _row(f"growth/{label}/{name}", metric, one) for name, one in measured.items()}
        other = rows.get(LORA, rows[FORWARD])
        yield from (row if row is other or not other.value else row.to(other) for row in rows.values())


def _row(case: str, metric: str, one: Measured) -> Row:
    if metric == "step_s":
        return one.timing.row(case, metric, "s", 1 / one.steps)
    return Row(case, metric, one.peak_bytes, "B")


def _members(setting: CostSetting, measure: Measure) -> Iterator[Row]:
    """Ratios are to one member."""
    names = {(side, count): f"{side}-m{count}" for side in ("losa", "last") for count in MEMBERS}
    measured = measure(setting, {name: CostCase.parse(name) for name in names.values()})
    for metric in ("step_s", "peak_bytes"):
        for (side, count), name in names.items():
            row = _row(f"growth/members={count}/{side}", metric, measured[name])
            one = _row(f"growth/members=1/{side}", metric, measured[names[side, 1]])
            yield row if count == 1 or not one.value else row.to(one)


def _epochs(setting: CostSetting, measure: Measure) -> Iterator[Row]:
    """The whole job, computed; ratios are to LoRA after as many epochs."""
    cases = {name: CostCase.parse(name) for name in (FORWARD, *STORED)}
    measured = measure(setting, cases)
    for epochs in EPOCHS:
        rows = {}
        for name in STORED:
            seconds = job_seconds(setting, cases[name], measured, epochs)
            rows[name] = Row(f"growth/epochs={epochs}/{name}", "job_s", seconds, COMPUTED)
        other = rows.get(LORA)
        yield from (row if other is None or row is other else row.to(other) for row in rows.values())
