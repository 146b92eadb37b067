"""``sidetune store``: look at feature stores, check and clear them. Parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sidetune.errors import RequestError
from sidetune.progress import say
from sidetune.usage import IMAGES, Json, Labels, Task, columns, print_json

if TYPE_CHECKING:
    from sidetune.data.dataset import TaskKind

store_app = typer.Typer(help="Look at feature stores, check and clear them.", no_args_is_help=True)


@store_app.command("ls")
def store_ls(
    stores: Annotated[
        list[Path] | None,
        typer.Argument(metavar="STORE", help="Default: all under $SIDETUNE_STORES, or .sidetune/stores."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List stores: samples, taps, precision, bytes."""
    from sidetune.store import stores_root
    from sidetune.tables import store_lines
    from sidetune.upkeep import describe, list_stores

    rows = [describe(folder) for folder in stores or list_stores()]
    if as_json:
        print_json({"stores": rows})
        return
    for line in store_lines(rows):
        print(line)
    if not rows:
        say(f"no store in {stores_root()}. Type: sidetune extract DATA --out FOLDER")


@store_app.command("verify")
def store_verify(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder.")], as_json: Json = False
) -> None:
    """Read every byte of a store against its checksums. Exit 1 if one is off."""
    from sidetune.upkeep import verify

    defects = verify(store)
    if as_json:
        print_json({"store": str(store), "defects": defects})
    else:
        print("\n".join(defects) or f"{store}: every byte is as written")
    if defects:
        raise typer.Exit(1)


@store_app.command("gc")
def store_gc(
    stores: Annotated[
        list[Path] | None,
        typer.Argument(metavar="STORE", help="Default: all under $SIDETUNE_STORES, or .sidetune/stores."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DATA", rich_help_panel=IMAGES, help="Keep only what these images need; may be repeated."
        ),
    ] = None,
    task: Task = "classify",
    labels: Labels = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", metavar="", help="Stores not complete go, too.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", metavar="", help="Remove; without it, only say what would go.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove what stores do not need: leftovers of killed commands; with --data, samples of other data."""
    from sidetune.tables import garbage_lines
    from sidetune.upkeep import collect_garbage, list_stores, wanted_keys

    if data and not stores:
        raise RequestError("got --data and no store, expected one. Type: sidetune store gc STORE --data DATA")
    kind = cast("TaskKind", task)  # reading the data says whether it is one
    wanted = wanted_keys(data, kind, columns(labels)) if data else None
    found = [
        collect_garbage(folder, wanted=wanted, unfinished=unfinished, remove=yes)
        for folder in stores or list_stores()
    ]
    if as_json:
        print_json({"removed": yes, "stores": [one.to_json() for one in found]})
        return
    for line in garbage_lines(found, removed=yes):
        print(line)
