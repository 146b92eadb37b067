"""The ``sidetune`` command: parse, call one function, print. No logic.

Exit 0 done, 1 failed while running, 2 the request was wrong. Progress and logs go to stderr. ``--json``
prints one JSON object on the last line of stdout, an error too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sidetune.cli_answer import evaluate, predict
from sidetune.cli_bench import bench_app
from sidetune.cli_store import store_app
from sidetune.cli_sweep import sweep
from sidetune.errors import RequestError, SidetuneError
from sidetune.progress import say
from sidetune.usage import (
    BACKBONE,
    IMAGES,
    QUICK_START,
    BackboneName,
    Data,
    Device,
    EnsembleOption,
    Folds,
    Frames,
    FramesStored,
    Json,
    Labels,
    Live,
    Members,
    MoreViews,
    Out,
    OwnOrder,
    Quiet,
    Settings,
    Side,
    Size,
    Store,
    Strict,
    Task,
    Weights,
    build_recipe,
    example,
    first_line,
    log_skipped,
    number_or_word,
    print_names,
)
from sidetune.usage import print_json as _print_json

app = typer.Typer(
    help=f"Adapt a frozen vision foundation model in minutes, on the machine you have.\n\n{QUICK_START}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    try:
        app(standalone_mode=True)
    except SidetuneError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:  # no permission, no space left
        _fail(f"{error.filename or 'sidetune'}: {error.strerror or error}", SidetuneError.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted. The same command resumes", INTERRUPTED)
    except SystemExit as end:  # typer has parsed the command line, or met Ctrl-C, and exits
        if end.code == INTERRUPTED:
            _fail("interrupted. The same command resumes", INTERRUPTED)
        if end.code == RequestError.exit_code:
            if (line := example(sys.argv[1:])) is not None:
                say(f"Example: {line}")
            if "--json" in sys.argv:
                _print_json({"error": "the command line is wrong: stderr says where", "exit": end.code})
        raise


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {message}")
    if "--json" in sys.argv:
        _print_json({"error": message, "exit": code})
    sys.exit(code)


@app.command()
def fit(
    data: Data,
    out: Out,
    backbone: BackboneName = "demo",
    side: Side = "losa",
    size: Size = None,
    task: Task = "classify",
    labels: Labels = None,
    weights: Weights = None,
    live: Live = False,
    frames: Frames = None,
    frames_stored: FramesStored = None,
    more_views: MoreViews = 0,
    average_views: Annotated[
        bool,
        typer.Option(
            "--average-views",
            metavar="",
            rich_help_panel=BACKBONE,
            help="Average validation, test and predict over the views.",
        ),
    ] = False,
    no_leak_check: Annotated[
        bool,
        typer.Option(
            "--no-leak-check",
            metavar="",
            rich_help_panel=IMAGES,
            help="Do not look for test images with a twin in training.",
        ),
    ] = False,
    store: Store = None,
    members: Members = None,
    folds: Folds = None,
    ensemble: EnsembleOption = False,
    own_order: OwnOrder = False,
    settings: Settings = None,
    device: Device = "auto",
    strict: Strict = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a side network: features, ridge and linear probe, the side, scores."""
    import sidetune
    from sidetune.tables import choices, print_scores

    features = {
        "mode": "live" if live else "stored",
        "views": more_views,
        "average_views": average_views,
    }
    fleet = {"members": members, "folds": number_or_word(folds), "ensemble": ensemble, "own_order": own_order}
    asked: dict[str, Any] = {"features": features, "clips": (frames, frames_stored), "fleet": fleet}
    recipe = build_recipe(backbone, size, weights, settings, task=task, labels=labels, side=side, **asked)
    if not quiet:
        say(choices(recipe, device))
    found = (sidetune.fit_columns if recipe.data.columns else sidetune.fit)(
        data,
        out=out,
        recipe=recipe,
        store=store,
        device=device,
        leak_check=not no_leak_check,
        strict=strict,
        quiet=quiet,
    )
    if as_json:
        _print_json(found.to_json())
        return
    runs = {"": found} if isinstance(found, sidetune.Run) else found.runs
    for column, run in runs.items():
        print_scores(run.metrics, column, recipe.sample)
        data_of_run = run.metrics["data"]
        total = sum(data_of_run[f"num_{name}"] for name in ("train", "val", "test", "skipped"))
        log_skipped(data_of_run["num_skipped"], total, f": {run.folder / 'skipped.csv'}")
    print(f"\n{found.folder / 'report.html'}")


app.command()(sweep)


@app.command()
def extract(
    data: Data,
    out: Out,
    backbone: BackboneName = "demo",
    size: Size = None,
    task: Task = "classify",
    labels: Labels = None,
    weights: Weights = None,
    frames: Frames = None,
    frames_stored: FramesStored = None,
    more_views: MoreViews = 0,
    settings: Settings = None,
    device: Device = "auto",
    strict: Strict = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the backbone over images into a feature store. Resumable."""
    import sidetune
    from sidetune.artifact import find_device
    from sidetune.data import load_datasets
    from sidetune.extract import sample_keys, skipped_samples

    features, clips = {"views": more_views}, (frames, frames_stored)
    recipe = build_recipe(
        backbone, size, weights, settings, task=task, labels=labels, features=features, clips=clips
    )
    whole = {"val_fraction": 0.0, "test_fraction": 0.0}  # nothing is drawn: splits are no part of a store
    dataset, *_ = load_datasets(data, **recipe.data_arguments() | whole)
    frozen = sidetune.build_backbone(recipe.backbone.name, **recipe.backbone.arguments())
    frozen.to(find_device(device))
    keys, chosen = sample_keys(dataset), recipe.reading(frozen.frames).stored
    dtype = recipe.features.dtype
    store = sidetune.extract(
        dataset, frozen, out, dtype=dtype, keys=keys, views=chosen, strict=strict, quiet=quiet
    )
    _print_store(store, keys, skipped_samples(store, keys, chosen), as_json)


app.command("eval")(evaluate)
app.command()(predict)


@app.command()
def backbones(as_json: Json = False) -> None:
    """List the backbones."""
    from sidetune.backbones import BACKBONES

    lines = {name: first_line(builder) for name, builder in BACKBONES.items()}
    print_names(lines, as_json)


@app.command()
def sides(as_json: Json = False) -> None:
    """List the side networks."""
    from sidetune.sides import SIDES

    print_names({name: first_line(inspect.getmodule(side)) for name, side in SIDES.items()}, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed and what is missing, and try a tiny fit. Exit 1 if it fails."""
    from sidetune.doctor import examine, works

    checks = examine()
    if as_json:
        _print_json({"works": works(checks), "checks": [asdict(check) for check in checks]})
    else:
        from sidetune.tables import doctor_lines

        print("\n".join(doctor_lines(checks)))
    if not works(checks):
        raise typer.Exit(SidetuneError.exit_code)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """DINOv2-S on real solar-cell photographs: ridge, linear probe, LoSA and LAST on one store."""
    from sidetune.demo import run_demo

    summary = run_demo(out)
    if as_json:
        _print_json(summary)


def _print_store(
    store: Any,  # noqa: ANN401 - Store
    keys: Sequence[str],
    skipped: Mapping[str, str],
    as_json: bool,
) -> None:
    """What the store holds of one dataset: views of a sample, and other datasets, do not count here."""
    animated = [key.rpartition("@")[0] for key in keys if key in store.animated]
    if as_json:
        fields = {"store": str(store.folder), "samples": len(keys), "bytes": store.num_bytes}
        _print_json({**fields, "skipped": skipped, "animated": animated})
        return
    from sidetune.data.notes import first_frames
    from sidetune.figures import size

    print(f"{store.folder}: {len(keys):,} samples, {size(store.num_bytes)}")
    for path, reason in skipped.items():
        say(f"{path}: {reason}")
    log_skipped(len(skipped), len(keys))
    if animated:
        say(first_frames([Path(path) for path in animated]))
