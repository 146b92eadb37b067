"""Scores against what they cost: three small panels; and, where there are few shots, scores against shots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sidetune.baselines import BASELINES
from sidetune.bench.accuracy.claims import Outcome
from sidetune.bench.accuracy.grid import IN_BF16, VARIANTS
from sidetune.bench.accuracy.table import Report, names_of, value
from sidetune.bench.picture import LINE, MUTED, PIXELS_AN_INCH, TEXT, check_picture
from sidetune.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"losa": "#1d5fd1", "last": "#c94a22"}  # as in all pictures
SIDE, BASELINE, PROBE = "#1a7f5a", "#3b424b", "#8d97a3"
PROBES = ("attentive", "fusion", "linear", "ridge")
COSTS = {
    "parameters": "parameters without the head",
    "training": "seconds of one training, from the store",
    "bytes": "memory of training, MiB",
}
FRONT = "#c3c9d1"
MOST_TICKS = 6
PUSHES = 60
NEAR = 0.3  # names whose dots are closer than this share of the panel's width may touch
LEAST_GAP = 0.06  # between two labels, as a share of the panel's height
Point = tuple[str, float, float]


def draw(report: Report, path: Path) -> None:
    """Mean accuracy of each method against its parameters, its time and its memory; curves over shots.

    Args:
        report: of a run; before test is revealed the scores are of validation.
        path: .svg or .png.

    Raises:
        RequestError: the picture cannot be written there, or there is nothing to draw.
    """
    curves: dict[str, list[Outcome]] = {}
    for one in report.shots:
        if any(other.scores for other in report.shots if other.task == one.task):
            curves.setdefault(one.task, []).append(one)
    what = "Test accuracy" if report.revealed else "Accuracy on what was chosen by"
    tasks = {one.task for one in report.outcomes if not one.elsewhere}
    below = f"mean of {len(tasks)} tasks, {report.environment['setting']['seeds']} seeds"
    draw_points({cost: points(report.outcomes, cost) for cost in COSTS}, path, (what, below), curves)


def draw_points(
    panels: Mapping[str, Sequence[Point]],
    path: Path,
    words: tuple[str, str],
    curves: Mapping[str, Sequence[Outcome]] | None = None,
) -> None:
    """A panel a cost, then a panel a task with curves over shots.

    Args:
        panels: by a key of `COSTS`.
        path: .svg or .png.
        words: what the scores are, and whose.
        curves: by task.

    Raises:
        RequestError: the picture cannot be written there, or there is nothing to draw.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_picture(path)
    if not any(panels.values()):
        raise RequestError("there are no scores to draw. Type: the same command with --reveal")
    curves = curves or {}
    rows = 1 + -(-len(curves) // 3)
    style: Any = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "sidetune"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(10.0, 1.1 + 3.2 * rows), facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, 3, squeeze=False, gridspec_kw={"wspace": 0.3, "hspace": 0.45})
        figure.subplots_adjust(
            left=0.055, right=0.95, top=1 - 0.9 / (1.1 + 3.2 * rows), bottom=0.5 / (1.1 + 3.2 * rows)
        )
        for panel, (cost, found) in zip(grid[0], panels.items(), strict=True):
            _scatter(panel, COSTS[cost], found)
        for panel, (task, outcomes) in zip(grid[1:].flat, curves.items(), strict=False):
            _curves(panel, task, outcomes)
        for panel in list(grid[1:].flat)[len(curves) :]:
            panel.axis("off")
        _title(figure, words, 1.1 + 3.2 * rows)
        figure.savefig(path, dpi=PIXELS_AN_INCH, metadata={"Date": None} if path.suffix == ".svg" else None)


def points(outcomes: Sequence[Outcome], cost: str) -> list[Point]:
    """(method, cost, accuracy in percent) of each method that has all tasks, means over the tasks alone.

    Args:
        outcomes: of one table; those of other data sets are left out.
        cost: a key of `COSTS`; what is solved has no parameters and keeps no memory, and stands at 0.
    """
    outcomes = [one for one in outcomes if not one.elsewhere]
    tasks = {one.task for one in outcomes}
    found = []
    for name in names_of(outcomes):
        mine = [one for one in outcomes if one.method == name and one.cost]
        scores = [score for one in mine if (score := value(one)) is not None]
        if len(scores) < len(tasks):
            continue
        found.append(
            (name, float(np.mean([shown_cost(one.cost, cost) for one in mine])), 100 * float(np.mean(scores)))
        )
    return found


def pareto(found: Sequence[Point]) -> list[Point]:
    """The points that no other beats at no more cost, by rising cost."""
    front: list[Point] = []
    for point in sorted(found, key=lambda one: (one[1], -one[2])):
        if not front or point[2] > front[-1][2]:
            front.append(point)
    return front


def shown_cost(facts: Mapping[str, float], cost: str) -> float:
    """What a panel shows of the costs of one network.

    Args:
        facts: seconds of an epoch, epochs, bytes, parameters.
        cost: a key of `COSTS`.
    """
    if cost == "training":
        return facts["epoch_seconds"] * facts["epochs"]
    return facts[cost] / 2**20 if cost == "bytes" else facts[cost]


def _scatter(panel: Axes, title: str, found: Sequence[Point]) -> None:
    powers = [math.log10(cost) for _, cost, _ in found if cost > 0] or [0.0]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    decades = [10.0**power for power in range(low, high + 1, 1 + (high - low) // MOST_TICKS)]
    if any(cost <= 0 for _, cost, _ in found):
        panel.set_xscale("symlog", linthresh=decades[0], linscale=0.7)
        ticks, left = [0.0, *decades], -decades[0] / 4
    else:
        panel.set_xscale("log")
        ticks, left = decades, decades[0] / 1.5
    right = 6 * decades[-1]  # names stand to the right of the dots
    panel.set_xlim(left, right)
    panel.set_xticks(ticks, [_short(tick) for tick in ticks])
    panel.minorticks_off()
    front = pareto(found)
    xs = [*(cost for _, cost, _ in front), right]
    panel.step(
        xs,
        [*(score for _, _, score in front), front[-1][2]],
        where="post",
        color=FRONT,
        linewidth=2,
        zorder=1,
    )
    for name, cost, score in found:
        panel.plot(cost, score, marker="o", markersize=5, color=_colour(name), linestyle="", zorder=3)
    _frame(panel, title)
    _names(panel, found)


def _short(value: float) -> str:
    """``0.1``, ``10 k``, ``1 M``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _names(panel: Axes, found: Sequence[Point]) -> None:
    """A name beside each dot."""
    from matplotlib.patheffects import withStroke

    low, high = panel.get_ylim()
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    panel.set_ylim(low, high)
    points_high = 72 * panel.bbox.height / panel.figure.dpi
    places = [(cost, score) for _, cost, score in found]
    dots = panel.transAxes.inverted().transform(panel.transData.transform(places))
    for (name, _, _), place, (_, dot), height in zip(found, places, dots, apart(dots), strict=True):
        panel.annotate(
            name,
            place,
            xytext=(6, (height - dot) * points_high),
            textcoords="offset points",
            fontsize=7.5,
            va="center",
            color=_colour(name),
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def apart(dots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Heights (n,) of names beside dots (n, 2), in shares of the panel: neighbours push one another away."""
    heights = dots[:, 1].copy()
    order = np.argsort(heights, kind="stable")
    for _ in range(PUSHES):
        for i, lower in enumerate(order):
            for upper in order[i + 1 :]:
                overlap = LEAST_GAP - (heights[upper] - heights[lower])
                if overlap > 0 and abs(dots[upper, 0] - dots[lower, 0]) < NEAR:
                    heights[upper] += overlap / 2
                    heights[lower] -= overlap / 2
        heights += np.minimum(0.0, 1.0 - heights) + np.maximum(0.0, -heights)
    return heights


def _curves(panel: Axes, task: str, outcomes: Sequence[Outcome]) -> None:
    counts = sorted({one.shots or 0 for one in outcomes})
    panel.set_xscale("log", base=2)
    ends = []
    for name in names_of(outcomes):
        line = sorted((one.shots or 0, 100 * (one.score or 0.0)) for one in outcomes if one.method == name)
        xs, ys = zip(*line, strict=True)
        panel.plot(xs, ys, color=_colour(name), marker="o", markersize=3.5, linewidth=1.6)
        ends.append((name, float(xs[-1]), ys[-1]))
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.set_xlim(counts[0] / 1.2, counts[-1] * 2.2)
    panel.minorticks_off()
    _frame(panel, f"{task}: images a class")
    _names(panel, ends)


def _frame(panel: Axes, title: str) -> None:
    panel.set_title(title, loc="left", fontsize=9, color=TEXT, pad=7)
    panel.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    panel.grid(axis="y", color=LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    for name, spine in panel.spines.items():
        spine.set(visible=name == "bottom", color=LINE)


def _colour(name: str) -> str:
    """One for probes, one for baselines, one for side networks that have none of their own."""
    plain = name.removesuffix("*").removesuffix(IN_BF16)
    kind = VARIANTS.get(plain, {"name": plain})["name"]
    other = PROBE if kind in PROBES else BASELINE if kind in BASELINES else SIDE
    return COLOURS.get(plain, other)


def _title(figure: Any, words: tuple[str, str], inches: float) -> None:  # noqa: ANN401 - matplotlib's Figure
    what, whose = words
    title = f"{what}, %, against what one network costs"
    figure.text(0.02, 1 - 0.3 / inches, title, fontsize=12.5, color=TEXT, weight="bold")
    below = f"{whose}; the line is what no method beats at no more cost"
    figure.text(0.02, 1 - 0.52 / inches, below, fontsize=8.5, color=MUTED)
