"""``sidetune bench accuracy`` and ``bench vtab``: parse, call one function, print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidetune.bench import LOOKS
from sidetune.progress import say
from sidetune.usage import (
    RECIPE,
    BackboneName,
    Device,
    Frames,
    FramesStored,
    Json,
    Out,
    Quiet,
    Settings,
    Size,
    Weights,
    build_recipe,
    columns,
    print_json,
)

if TYPE_CHECKING:
    from sidetune.bench.accuracy import Request
    from sidetune.bench.accuracy.tasks import TaskFolder

PROTOCOL = "Protocol"
Tasks = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder of VTAB folders, or one data set as `fit` takes it.")
]
Methods = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        rich_help_panel=PROTOCOL,
        help="Rows: ridge-last, ridge, linear, side networks, baselines; lora:1 has one seed, lora-bf16 "
        "trains under autocast, losa+ridge gives ridge a share in the answer.",
    ),
]
Named = Annotated[
    str | None,
    typer.Option("--tasks", metavar="A,B", rich_help_panel=PROTOCOL, help="Tasks of DIR; default: all."),
]
Seeds = Annotated[
    int, typer.Option(metavar="N", rich_help_panel=PROTOCOL, help="Networks a method, each a seed.")
]
GridSize = Annotated[
    int,
    typer.Option(
        metavar="N", rich_help_panel=PROTOCOL, help="Points that every trained method is chosen from."
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(metavar="E", rich_help_panel=RECIPE, help="Of every training; default: as fit."),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        metavar="M",
        rich_help_panel=PROTOCOL,
        help="Time of one training in the second table; default: what the quickest method takes.",
    ),
]
NoEqualTime = Annotated[
    bool,
    typer.Option("--no-equal-time", metavar="", rich_help_panel=PROTOCOL, help="Leave the second table out."),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        rich_help_panel=PROTOCOL,
        help="Compare all methods with these; default: lora and ridge, where they are there.",
    ),
]
Stores = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        file_okay=False,
        rich_help_panel=PROTOCOL,
        help="A store a task, FOLDER/TASK; default: one for all, where fit keeps it.",
    ),
]
Reveal = Annotated[
    bool,
    typer.Option("--reveal", metavar="", rich_help_panel=PROTOCOL, help="Show test scores. It is counted."),
]
Looks = Annotated[
    Path,
    typer.Option(metavar="FILE", dir_okay=False, rich_help_panel=PROTOCOL, help="Where looks are counted."),
]


Shots = Annotated[
    str | None,
    typer.Option(
        metavar="K,K",
        rich_help_panel=PROTOCOL,
        help="Also train on so many images a class, as 1,2,4,8,16.",
    ),
]
AlsoTest = Annotated[
    str | None,
    typer.Option(
        metavar="DIR,DIR",
        rich_help_panel=PROTOCOL,
        help="Also answer for data sets of the same classes: how it does elsewhere.",
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", dir_okay=False, help="Draw scores against cost, or against shots, as .svg or .png."
    ),
]
METHODS = "ridge-last,ridge,linear,losa,last"


def bench_accuracy(
    data: Tasks,
    out: Out,
    methods: Methods = METHODS,
    tasks: Named = None,
    seeds: Seeds = 3,
    grid_size: GridSize = 4,
    epochs: Epochs = None,
    minutes: Minutes = None,
    no_equal_time: NoEqualTime = False,
    against: Against = None,
    shots: Shots = None,
    also_test: AlsoTest = None,
    backbone: BackboneName = "demo",
    size: Size = None,
    weights: Weights = None,
    frames: Frames = None,
    frames_stored: FramesStored = None,
    stores: Stores = None,
    reveal: Reveal = False,
    looks: Looks = LOOKS,
    picture: Picture = None,
    settings: Settings = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods on tasks: chosen alike on training images, frozen, then scored on test."""
    from sidetune.bench.accuracy import bench_accuracy as run
    from sidetune.bench.accuracy.tasks import find_tasks
    from sidetune.bench.picture import check_picture

    if picture is not None:
        check_picture(picture)
    options = _Options(out, methods, against, seeds, grid_size, epochs, settings, minutes)
    request = replace(
        options.request(
            find_tasks(data, columns(tasks)), _build(backbone, size, weights, (frames, frames_stored))
        ),
        equal_time=not no_equal_time,
        shots=_counts(shots),
        also=tuple(Path(one) for one in columns(also_test) or ()),
        stores=stores,
        reveal=reveal,
        looks=looks,
        device=device,
        quiet=quiet,
    )
    report = run(request)
    if picture is not None:
        from sidetune.bench.accuracy.picture import draw

        draw(report, picture)
    if as_json:
        print_json(report.to_json())
        return
    print("\n".join(report.lines()))


def bench_vtab(
    data: Tasks,
    out: Out,
    methods: Methods = METHODS,
    tasks: Named = None,
    seeds: Seeds = 3,
    grid_size: GridSize = 4,
    epochs: Epochs = None,
    against: Against = None,
    backbone: BackboneName = "demo",
    size: Size = None,
    weights: Weights = None,
    stores: Stores = None,
    reveal: Reveal = False,
    looks: Looks = LOOKS,
    settings: Settings = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """VTAB-1K as published: what is missing, both means, and the rows in print beside ours."""
    from sidetune.bench.accuracy import bench_accuracy as run
    from sidetune.bench.vtab import published_lines, survey, to_json

    found = survey(data, columns(tasks))
    if not quiet:
        say("\n".join(found.lines()))
    options = _Options(out, methods, against, seeds, grid_size, epochs, settings)
    request = replace(
        options.request(found.tasks, _build(backbone, size, weights)),
        equal_time=False,
        stores=stores,
        reveal=reveal,
        looks=looks,
        device=device,
        quiet=quiet,
    )
    report = run(request)
    if as_json:
        print_json({**report.to_json(), **to_json(found)})
        return
    print("\n".join([*report.lines(), "", *published_lines(report)]))


@dataclass(frozen=True)
class _Options:
    """Options that both commands share."""

    out: Path
    methods: str
    against: str | None
    seeds: int
    grid_size: int
    epochs: int | None
    settings: list[str] | None
    minutes: float | None = None

    def request(self, tasks: tuple[TaskFolder, ...], build: Callable[[list[str]], Any]) -> Request:
        """What is asked for; settings of sides are left to the methods that have them."""
        from sidetune.bench.accuracy import Request
        from sidetune.bench.accuracy.grid import IN_BF16, is_chosen, parse_methods

        chosen = self.settings or []
        shared = [one for one in chosen if not one.startswith("side.")]
        if self.epochs is not None:
            shared.append(f"train.epochs={self.epochs}")
        rows = parse_methods(self.methods)
        named = [row.name for row in rows]
        usual = [name for name in named if name.removesuffix(IN_BF16) in ("lora", "ridge")] or named[:1]
        return Request(
            tasks,
            rows,
            self.out,
            build(shared),
            settings=tuple(one for one in chosen if one.startswith("side.") or is_chosen(one)),
            seeds=self.seeds,
            grid_size=self.grid_size,
            minutes=self.minutes,
            against=tuple(usual if self.against is None else columns(self.against) or ()),
        )


def _build(
    backbone: str,
    size: int | None,
    weights: str | None,
    clips: tuple[int | None, int | None] = (None, None),
) -> Callable[[list[str]], Any]:
    """Settings -> the recipe that all methods share; of clips the frames that are read, and stored."""
    return partial(build_recipe, backbone, size, weights, task="classify", labels=None, clips=clips)


def _counts(text: str | None) -> tuple[int, ...]:
    """``1,2,4`` as numbers.

    Raises:
        RequestError: one is no number.
    """
    from sidetune.errors import RequestError

    words = columns(text) or []
    for word in words:
        if not word.isdecimal():
            raise RequestError(f"--shots has {word!r}, expected numbers. Type: --shots 1,2,4,8,16")
    return tuple(sorted({int(word) for word in words}))
