"""``sidetune bench accuracy``: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sidetune.usage import (
    RECIPE,
    BackboneName,
    Device,
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

PROTOCOL = "Protocol"
Tasks = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder of VTAB folders, or one data set as `fit` takes it.")
]
Methods = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        rich_help_panel=PROTOCOL,
        help="Rows: ridge-last, ridge, linear, side networks, baselines; lora:1 has one seed.",
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


def bench_accuracy(
    data: Tasks,
    out: Out,
    methods: Methods = "ridge-last,ridge,linear,losa,last",
    tasks: Named = None,
    seeds: Seeds = 3,
    grid_size: GridSize = 4,
    epochs: Epochs = None,
    minutes: Minutes = None,
    no_equal_time: NoEqualTime = False,
    against: Against = None,
    backbone: BackboneName = "demo",
    size: Size = None,
    weights: Weights = None,
    stores: Stores = None,
    reveal: Reveal = False,
    looks: Looks = Path("results/looks.jsonl"),
    settings: Settings = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods on tasks: chosen alike on training images, frozen, then scored on test."""
    from sidetune.bench.accuracy import Request
    from sidetune.bench.accuracy import bench_accuracy as run
    from sidetune.bench.accuracy.grid import parse_methods
    from sidetune.bench.accuracy.tasks import find_tasks

    chosen = tuple(settings or ())
    shared = [one for one in chosen if not one.startswith("side.")]
    if epochs is not None:
        shared.append(f"train.epochs={epochs}")
    rows = parse_methods(methods)
    named = [row.name for row in rows]
    usual = [name for name in named if name in ("lora", "ridge")] or named[:1]
    request = Request(
        tasks=find_tasks(data, columns(tasks)),
        methods=rows,
        out=out,
        base=build_recipe(backbone, size, weights, shared, task="classify", labels=None),
        settings=tuple(one for one in chosen if one.startswith("side.")),
        seeds=seeds,
        grid_size=grid_size,
        minutes=minutes,
        equal_time=not no_equal_time,
        against=tuple(usual if against is None else columns(against) or ()),
        stores=stores,
        reveal=reveal,
        looks=looks,
        device=device,
        quiet=quiet,
    )
    report = run(request)
    if as_json:
        print_json(report.to_json())
        return
    print("\n".join(report.lines()))
