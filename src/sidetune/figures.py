"""Figures of the report: how a number is printed, and where it stands on an axis.

A figure is coordinates and text; the page's template draws it as SVG in the page's own colours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]

# What a score is called, its unit, and whether higher is better. A share is shown in percent.
LABELS: dict[str, tuple[str, str, bool]] = {
    "accuracy": ("Accuracy", "%", True),
    "balanced_accuracy": ("Balanced accuracy", "%", True),
    "macro_f1": ("Macro F1", "%", True),
    "auroc": ("AUROC", "%", True),
    "mean_average_precision": ("Mean average precision", "%", True),
    "log_loss": ("Log loss", "", False),
    "calibration_error": ("Calibration error", "%", False),
    "r2": ("R²", "", True),
    "mae": ("Mean absolute error", "", False),
    "precision": ("Precision", "%", True),
    "recall": ("Recall", "%", True),
    "f1": ("F1", "%", True),
    "average_precision": ("Average precision", "%", True),
}


def label(name: str) -> tuple[str, str]:
    """A score's name for people, and its unit."""
    known = LABELS.get(name, (name.replace("_", " ").capitalize(), "", True))
    return known[0], known[1]


def phrase(name: str) -> str:
    """A score's name within a sentence: ``balanced accuracy``, but ``AUROC`` and ``R²``."""
    known = label(name)[0]
    return known[0].lower() + known[1:] if known[1].islower() else known


def number(name: str, value: float | None) -> str:
    """A score as it is printed: shares in percent with one decimal, the rest with three digits or more."""
    if value is None:
        return "–"
    if label(name)[1] == "%":
        return f"{100 * value:.1f}"
    return (f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}").replace("-", "−")


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float | None) -> str:
    """Bytes in the unit of 1024 that gives a short number; a dash where there is none."""
    if num_bytes is None:
        return "–"
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(int(math.log(max(num_bytes, 1), 1024)), len(units) - 1)
    return f"{num_bytes / 1024**power:.{1 if power else 0}f} {units[power]}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as (dotted key, text), in their order."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", text(value)


def text(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """A JSON value as a recipe would spell it; text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """A chosen value in at most three digits: what was chosen, not the recipe's own spelling."""
    return f"{value:.3g}" if isinstance(value, float) else text(value)


def forest(metrics: Json, split: str) -> Json | None:
    """The headline score of each method as a dot on its interval; x in percent of the axis."""
    name = metrics["headline"]
    rows = [
        (row["method"], row[split]["scores"][name], row[split]["intervals"].get(name))
        for row in metrics["rows"]
        if row[split] and row[split]["scores"][name] is not None
    ]
    if len(rows) < 2:
        return None
    values = [v for _, value, pair in rows for v in (value, *(pair or ()))]
    ticks = _ticks(min(values), max(values), 5)
    low, high = min(ticks[0], *values), max(ticks[-1], *values)

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}"

    return {
        "ticks": [(place(tick), _tick_text(name, tick, ticks)) for tick in ticks],
        "rows": [
            {
                "method": method,
                "own": method == metrics["side"],
                "value": number(name, value),
                "x": place(value),
                "pair": [place(pair[0]), place(pair[1])] if pair else None,
            }
            for method, value, pair in rows
        ],
    }


# The drawing area of a curve, in the units of its 360 x 204 view box.
LEFT, RIGHT, TOP, BOTTOM = 46.0, 348.0, 20.0, 168.0


def curve(title: str, name: str, points: Sequence[tuple[int, float | None]]) -> Json | None:
    """A line over epochs in the units of the view box; None where no value is finite.

    Args:
        title: over the curve.
        name: the score, for its unit and digits.
        points: (epoch, value); a value that is None or not finite is left out.
    """
    drawn = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not drawn:
        return None
    first, last = drawn[0][0], max(drawn[-1][0], drawn[0][0] + 1)
    ys = [y for _, y in drawn]
    ticks = _ticks(min(ys), max(ys), 4)
    low, high = min(ticks[0], *ys), max(ticks[-1], *ys)

    def across(x: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * (x - first) / (last - first):.1f}"

    def down(y: float) -> str:
        return f"{BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low):.1f}"

    epochs = [round(tick) for tick in _ticks(first, last, 5) if abs(tick - round(tick)) < 1e-9]
    return {
        "title": title,
        "line": " ".join(f"{across(x)},{down(y)}" for x, y in drawn),
        "end": (across(drawn[-1][0]), down(drawn[-1][1])),
        "value": number(name, drawn[-1][1]),
        # The number stands on the side that the line does not come from.
        "value_dy": 17 if ys[-1] < ys[0] and float(down(ys[-1])) < BOTTOM - 12 else -10,
        "ticks": [(down(tick), _tick_text(name, tick, ticks)) for tick in ticks],
        "epochs": [(across(epoch), epoch) for epoch in epochs if first <= epoch <= drawn[-1][0]],
    }


def scatter(title: str, name: str, points: Sequence[tuple[Any, float, bool]], domain: Any) -> Json | None:  # noqa: ANN401 - as JSON holds it
    """Scores against a parameter, in the units of a curve's view box; None where there is no point.

    Args:
        title: over the figure.
        name: the score, for its unit and digits.
        points: (value of the parameter, score, whether the point stands out).
        domain: of the parameter: a list of choices, or ``{"log" | "linear": [low, high]}``. A value outside
            it is left out.
    """
    choices = domain if isinstance(domain, list) else None
    low, high = (0, 1) if choices is not None else next(iter(domain.values()))
    log = choices is None and "log" in domain

    def across(value: Any) -> float:  # noqa: ANN401 - a JSON value
        if choices is not None:
            share = (choices.index(value) + 0.5) / len(choices)
        elif log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * share

    drawn = [(x, y, strong) for x, y, strong in points if (x in choices if choices else low <= x <= high)]
    if not drawn:
        return None
    ys = [y for _, y, _ in drawn]
    ticks = _ticks(min(ys), max(ys), 4)
    bottom, top = min(ticks[0], *ys), max(ticks[-1], *ys)

    def down(y: float) -> str:
        return f"{BOTTOM - (BOTTOM - TOP) * (y - bottom) / (top - bottom):.1f}"

    marks = choices if choices is not None else _decades(low, high) if log else _ticks(low, high, 4)
    return {
        "title": title,
        "points": [(f"{across(x):.1f}", down(y), strong) for x, y, strong in drawn],
        "ticks": [(down(tick), _tick_text(name, tick, ticks)) for tick in ticks],
        "marks": [
            (f"{across(mark):.1f}", text(mark) if choices is not None else f"{mark:g}")
            for mark in marks
            if choices is not None or low <= mark <= high
        ],
    }


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers; their own where there are fewer than two."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**power for power in powers] if len(powers) > 1 else [low, high]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at or below low to at or above high, in steps of 1, 2 or 5 times 10^k."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(start, max(end, start + 1) + 1)]


def _tick_text(name: str, tick: float, ticks: Sequence[float]) -> str:
    scale = 100.0 if label(name)[1] == "%" else 1.0
    step = scale * (ticks[1] - ticks[0])
    return f"{scale * tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "−")


# The reliability diagram: plot from TOP to DEEP, below it a strip of counts that ends at FLOOR; 360 x 300.
DEEP, FLOOR, STRIP = 200.0, 264.0, 30.0


def reliability(bins: Sequence[Json]) -> Json:
    """Accuracy against confidence by bin, and how many answers stand in each, in the view box's units.

    Args:
        bins: ``low, high, count, confidence, accuracy``, all shares but the count.
    """
    most = max(row["count"] for row in bins)

    def across(share: float) -> float:
        return LEFT + (RIGHT - LEFT) * share

    def down(share: float) -> float:
        return DEEP - (DEEP - TOP) * share

    return {
        "ticks": [(f"{across(k / 5):.1f}", f"{down(k / 5):.1f}", 20 * k) for k in range(6)],
        "bins": [
            {
                "x": f"{across(row['confidence']):.1f}",
                "y": f"{down(row['accuracy']):.1f}",
                "ideal": f"{down(row['confidence']):.1f}",
                "left": f"{across(row['low']) + 1:.1f}",
                "middle": f"{across((row['low'] + row['high']) / 2):.1f}",
                "width": f"{across(row['high']) - across(row['low']) - 2:.1f}",
                "top": f"{FLOOR - max(STRIP * row['count'] / most, 1):.1f}",
                "height": f"{max(STRIP * row['count'] / most, 1):.1f}",
                "count": _brief(row["count"]),
                "row": (
                    f"{100 * row['low']:.0f} – {100 * row['high']:.0f}",
                    f"{row['count']:,}",
                    f"{100 * row['confidence']:.1f}",
                    f"{100 * row['accuracy']:.1f}",
                ),
            }
            for row in bins
        ],
    }


def _brief(count: int) -> str:
    """A count in three characters: a bin is 20 units wide."""
    return str(count) if count < 1000 else f"{count / 1000:.0f}k"
