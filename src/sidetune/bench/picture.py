"""How the time of a step grows with each size: five small panels, drawn from the rows of a bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidetune.bench.rows import Bench
from sidetune.errors import RequestError, nearest_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
AXES = {
    "N": "N, tokens an image",
    "D": "D, channels a token",
    "L": "L, layers",
    "R": "R, rank",
    "B": "B, images a batch",
}
TEXT, MUTED, LINE = "#16191d", "#59626e", "#e0e4ea"  # as on the report's page
COLOURS = {"losa": "#1d5fd1", "last": "#c94a22"}
NAMES = {"losa": "LoSA", "last": "LAST"}
STYLES: dict[str, dict[str, Any]] = {
    "textbook": {"linestyle": (0, (4, 2)), "markerfacecolor": "white", "linewidth": 1.2},
    "fast": {"linestyle": "-", "linewidth": 2.0},
}
INCHES = (8.0, 5.2)
PIXELS_AN_INCH = 160
LEAST_GAP = 0.1  # between two labels, as a share of the panel's height


def check_picture(path: Path) -> None:
    """Whether a picture can be written there, asked before minutes of measuring.

    Raises:
        RequestError: another ending than .svg or .png, or no such folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(
            f"--picture is {str(path)!r}, expected a name that ends in .svg or .png. "
            f"Type: --picture {path.with_suffix('.svg')}"
        )
    if not path.parent.is_dir():
        raise RequestError(
            f"--picture: there is no folder {path.parent}.{nearest_path(path.parent)} "
            f"Type: mkdir -p {path.parent}"
        )


def draw_growth(bench: Bench, path: Path) -> None:
    """Draw the growth rows: time an image against N, D, L, R and B, both axes logarithmic.

    Args:
        bench: of `sidetune.bench.side.bench_side`, with growth.
        path: .svg or .png.

    Raises:
        RequestError: the picture cannot be written there, or the bench has no growth rows.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_picture(path)
    lines = growth_lines(bench)
    if not lines:
        raise RequestError("this bench has no growth rows, expected some. Type: sidetune bench side --growth")
    style: Any = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "sidetune"}
    with mpl.rc_context(style):
        figure = Figure(figsize=INCHES, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, 3, gridspec_kw={"hspace": 0.52, "wspace": 0.58})
        figure.subplots_adjust(left=0.055, right=0.885, top=0.81, bottom=0.075)
        times = [time for _, _, points in lines for _, time in points]
        for number, (panel, axis) in enumerate(zip(grid.flat, AXES, strict=False)):
            _panel(panel, axis, [line for line in lines if line[0] == axis], (min(times), max(times)))
            panel.tick_params(labelleft=number % grid.shape[1] == 0)  # all panels have one scale
        _caption(grid.flat[-1], bench)
        _title(figure)
        figure.savefig(path, dpi=PIXELS_AN_INCH, metadata={"Date": None} if path.suffix == ".svg" else None)


def growth_lines(bench: Bench) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """(axis, case, [(size, ms an image), ..]) of every line, sizes rising."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in bench.rows:
        if row.case.startswith("growth/"):
            _, point, case = row.case.split("/")
            axis, _, size = point.partition("=")
            found.setdefault((axis, case), []).append((float(size), row.value))
    return [(axis, case, sorted(points)) for (axis, case), points in found.items()]


def _panel(
    panel: Axes,
    axis: str,
    lines: Sequence[tuple[str, str, list[tuple[float, float]]]],
    times: Sequence[float],
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set(xscale="log", yscale="log", ylim=(times[0] / 1.5, times[1] * 1.5))
    for _, case, points in lines:
        side, _, form = case.partition("-")
        xs, ys = zip(*points, strict=True)
        panel.plot(xs, ys, color=COLOURS[side], marker="o", markersize=3.5, clip_on=False, **STYLES[form])
    sizes = sorted({size for _, _, points in lines for size, _ in points})
    panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_title(AXES[axis], loc="left", fontsize=9.5, color=TEXT, pad=7)
    panel.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    panel.grid(axis="y", color=LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    for name, spine in panel.spines.items():
        spine.set(visible=name == "bottom", color=LINE)
    _labels(panel, lines)


def _labels(panel: Axes, lines: Sequence[tuple[str, str, list[tuple[float, float]]]]) -> None:
    """Each line's name at its right end, moved apart where two would touch."""
    import math

    low, high = (math.log(value) for value in panel.get_ylim())
    ends = sorted(
        ((math.log(points[-1][1]) - low) / (high - low), case, points[-1][0]) for _, case, points in lines
    )
    heights = [height for height, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LEAST_GAP)
    excess = max(0.0, heights[-1] - 1.0)  # a stack that is too high goes down as one
    for height, (_, case, _) in zip(heights, ends, strict=True):
        side, _, form = case.partition("-")
        panel.annotate(
            f"{NAMES[side]} {form}",
            (1.03, height - excess),
            xycoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=COLOURS[side],
            fontweight="bold" if form == "fast" else "normal",
        )


def _caption(panel: Axes, bench: Bench) -> None:
    """In the sixth place: what stays fixed, and the machine."""
    about = bench.environment
    size = about["setting"]
    ranks = f"{size['rank']}" if size["rank"] else "8 LoSA, 16 LAST"
    text = [
        "The sizes that do not vary:",
        f"N {size['tokens']},  D {size['width']},  L {size['layers']}",
        f"R {ranks}",
        f"B {size['growth_batch']},  taps {size['dtype']}",
        "",
        f"{about['cpu']}",
        f"{about['threads']} threads,  torch {about['torch']}",
    ]
    panel.axis("off")
    panel.text(
        0.0,
        1.0,
        "\n".join(text),
        transform=panel.transAxes,
        va="top",
        fontsize=8,
        color=MUTED,
        linespacing=1.5,
    )


def _title(figure: Any) -> None:  # noqa: ANN401 - matplotlib's Figure, imported late
    figure.text(0.028, 0.955, "How the time of a training step grows", fontsize=13, color=TEXT, weight="bold")
    figure.text(
        0.028,
        0.912,
        "ms an image: forward, backward, update. Both axes logarithmic.",
        fontsize=9,
        color=MUTED,
    )
