"""``sidetune sweep``: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sidetune.progress import say
from sidetune.usage import (
    RECIPE,
    BackboneName,
    Data,
    Device,
    Frames,
    FramesStored,
    Json,
    Labels,
    MoreViews,
    Out,
    Quiet,
    Settings,
    Side,
    Size,
    Store,
    Task,
    Weights,
    build_recipe,
    number_or_word,
    print_json,
)

SEARCH = "Search"


def sweep(
    data: Data,
    out: Out,
    trials: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=SEARCH, help="Recipes to try, the given one first.")
    ] = 64,
    search: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=SEARCH,
            help="YAML of what is searched, as train.lr: {log: [1e-4, 1e-2]}; default: rank, rate, decay, ..",
        ),
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option(
            metavar="K",
            rich_help_panel=SEARCH,
            help="Cross-validate in K folds, or column: the CSV's own; default: 5.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=SEARCH,
            help="Score trials on folds or on val; default: folds, for a VTAB folder val.",
        ),
    ] = None,
    places: Annotated[
        int,
        typer.Option(
            metavar="N", rich_help_panel=SEARCH, help="Trials that one process trains side by side."
        ),
    ] = 16,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="E", rich_help_panel=RECIPE, help="Of a trial that is not stopped; default: as fit."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", rich_help_panel=SEARCH, help="Of the draws.")] = 0,
    backbone: BackboneName = "demo",
    side: Side = "losa",
    size: Size = None,
    task: Task = "classify",
    labels: Labels = None,
    weights: Weights = None,
    frames: Frames = None,
    frames_stored: FramesStored = None,
    more_views: MoreViews = 0,
    store: Store = None,
    settings: Settings = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for the best recipe: many trials in one pass, the weak ones stopped early."""
    import sidetune
    from sidetune.tables import choices, print_scores

    chosen = [*(settings or ()), *([] if epochs is None else [f"train.epochs={epochs}"])]
    recipe = build_recipe(
        backbone,
        size,
        weights,
        chosen,
        task=task,
        labels=labels,
        side=side,
        features={"views": more_views},
        clips=(frames, frames_stored),
    )
    if not quiet:
        say(choices(recipe, device))
    run = sidetune.sweep(
        data,
        out=out,
        recipe=recipe,
        trials=trials,
        search=search,
        folds=number_or_word(folds),
        on=on,
        places=places,
        seed=seed,
        store=store,
        device=device,
        quiet=quiet,
    )
    if as_json:
        print_json(run.to_json())
        return
    print_scores(run.metrics, sample=recipe.sample)
    print(f"\n{run.folder / 'report.html'}")
