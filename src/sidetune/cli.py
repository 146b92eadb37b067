"""The ``sidetune`` command: parse, call one function, print. No logic.

Exit 0 done, 1 failed while running, 2 the request was wrong. Progress and logs go to stderr. ``--json``
prints one JSON object on the last line of stdout, an error too.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sidetune.errors import SidetuneError

app = typer.Typer(
    help="Adapt a frozen vision foundation model in minutes, on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look at feature stores.", no_args_is_help=True)
app.add_typer(store_app, name="store")

Data = Annotated[Path, typer.Argument(help="A folder of class folders, a VTAB folder, or a CSV file.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `fit` finished.")]
Out = Annotated[Path, typer.Option(help="Where the result goes.")]
BackboneName = Annotated[str, typer.Option("--backbone", help="demo, toy, or timm:MODEL.")]
Weights = Annotated[str | None, typer.Option(help="The backbone's weights: a file, a folder, or hub.")]
Size = Annotated[int | None, typer.Option(help="Image side in pixels; default: the backbone's own.")]
Task = Annotated[str, typer.Option(help="classify, multilabel or regress.")]
Labels = Annotated[str | None, typer.Option(help="The CSV's label columns, as a,b,c.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PART.FIELD=VALUE", help="Any field of the recipe.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    try:
        app(standalone_mode=True)
    except SidetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"error": str(error), "exit": error.exit_code}))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(130)


@app.command()
def fit(
    data: Data,
    out: Out,
    backbone: BackboneName = "demo",
    side: Annotated[str, typer.Option(help="See `sidetune sides`.")] = "losa",
    size: Size = None,
    task: Task = "classify",
    labels: Labels = None,
    weights: Weights = None,
    live: Annotated[
        bool, typer.Option("--live", help="Run the backbone at every epoch; store nothing.")
    ] = False,
    store: Annotated[Path | None, typer.Option(help="Where features are kept.")] = None,
    settings: Settings = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a side network: features, ridge and linear probe, the side, scores, RUN/."""
    import sidetune

    recipe = _recipe(backbone, size, weights, settings, task=task, labels=labels, side=side, live=live)
    if not quiet:
        train = recipe.train
        epochs = "derived" if train.epochs is None else train.epochs
        _log(
            f"backbone {recipe.backbone.name} · side {recipe.side.name} · features {recipe.features.mode} · "
            f"lr {train.lr:g} · batch {train.batch_size} · epochs {epochs} · seed {train.seed}"
        )
    run = sidetune.fit(data, out=out, recipe=recipe, store=store, device=device, quiet=quiet)
    if as_json:
        _print_json({"run": str(run.folder), "recipe_hash": run.recipe_hash, **run.metrics})
        return
    _print_scores(run.metrics)
    print(f"\n{run.folder / 'report.html'}")


@app.command()
def extract(
    data: Data,
    out: Out,
    backbone: BackboneName = "demo",
    size: Size = None,
    task: Task = "classify",
    labels: Labels = None,
    weights: Weights = None,
    settings: Settings = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the backbone over images into a feature store. Resumable."""
    import sidetune
    from sidetune.artifact import find_device

    recipe = _recipe(backbone, size, weights, settings, task=task, labels=labels)
    dataset = sidetune.load_dataset(data, task=recipe.data.task, labels=recipe.data.labels)
    frozen = sidetune.build_backbone(recipe.backbone.name, **recipe.backbone.arguments())
    frozen.to(find_device(device))
    store = sidetune.extract(dataset, frozen, out, dtype=recipe.features.dtype, quiet=quiet)
    _print_store(store, as_json)


@app.command("eval")
def evaluate(
    run: RunFolder,
    data: Data,
    split: Annotated[str, typer.Option(help="auto, all, train, val or test.")] = "auto",
    labels: Labels = None,
    weights: Weights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a run on labelled images. auto: the data's test split if it has one, else all images."""
    from sidetune.predict import evaluate_run

    found = evaluate_run(run, data, split=split, labels=_columns(labels), weights=weights, device=device)
    if as_json:
        _print_json(
            {"run": str(run), "split": found.split, "skipped": found.skipped, **found.evaluation.to_json()}
        )
        return
    table = Table(
        "score", "value", "95 % interval", title=f"{found.split}: {found.evaluation.num_samples} images"
    )
    for name, value in found.evaluation.scores.items():
        table.add_row(name.replace("_", " "), _number(value), _interval(found.evaluation.intervals.get(name)))
    Console().print(table)
    if found.skipped:
        _log(f"{len(found.skipped)} images could not be read")


@app.command()
def predict(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    weights: Weights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what a run sees in images."""
    import sidetune

    predictions = sidetune.load(run, weights=weights, device=device).predict(images)
    if as_json:
        _print_json({"run": str(run), "predictions": [asdict(item) for item in predictions]})
        return
    for item in predictions:
        likeliest = sorted(item.values.items(), key=lambda pair: -pair[1])[:3]
        values = "  ".join(f"{name} {value:.3f}" for name, value in likeliest)
        print(f"{item.path}\t{item.error or item.label or ''}\t{values}")


@app.command()
def backbones(as_json: Json = False) -> None:
    """List the backbones."""
    from sidetune.backbones import BACKBONES

    lines = {name: _first_line(builder) for name, builder in BACKBONES.items()}
    _print_names(lines, as_json)


@app.command()
def sides(as_json: Json = False) -> None:
    """List the side networks."""
    from sidetune.sides import SIDES

    _print_names({name: _first_line(inspect.getmodule(side)) for name, side in SIDES.items()}, as_json)


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


@store_app.command("ls")
def store_ls(
    stores: Annotated[list[Path] | None, typer.Argument(metavar="[STORE]...", help="Default: all.")] = None,
    as_json: Json = False,
) -> None:
    """List stores: samples, taps, precision, bytes."""
    from sidetune.store import describe, list_stores

    rows = [describe(folder) for folder in stores or list_stores()]
    if as_json:
        _print_json({"stores": rows})
        return
    table = Table("store", "samples", "taps", "dtype", "GiB", "state")
    for row in rows:
        table.add_row(
            row["store"],
            f"{row['samples']:,}",
            str(row["taps"]),
            row["dtype"],
            f"{row['bytes'] / 2**30:.2f}",
            row["state"],
        )
    Console().print(table)


@store_app.command("verify")
def store_verify(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store's folder.")], as_json: Json = False
) -> None:
    """Read every byte of a store against its checksums. Exit 1 if one is off."""
    from sidetune.store import verify

    defects = verify(store)
    if as_json:
        _print_json({"store": str(store), "defects": defects})
    else:
        print("\n".join(defects) or f"{store}: every byte is as written")
    if defects:
        raise typer.Exit(1)


def _recipe(
    backbone: str,
    size: int | None,
    weights: str | None,
    settings: list[str] | None,
    *,
    task: str,
    labels: str | None,
    side: str = "losa",
    live: bool = False,
) -> Any:  # noqa: ANN401 - Recipe, imported late so that --help is quick
    from sidetune.recipe import Recipe

    fields = {
        "data": {"task": task, "labels": _columns(labels)},
        "backbone": {"name": backbone, "size": size, "weights": weights},
        "features": {"mode": "live" if live else "stored"},
        "side": {"name": side},
    }
    return Recipe.build(fields, settings or ())


def _columns(labels: str | None) -> list[str] | None:
    return None if labels is None else [name.strip() for name in labels.split(",")]


def _print_scores(metrics: dict[str, Any]) -> None:
    headline = metrics["headline"]
    table = Table(
        "method", "parameters", f"val {_words(headline)}", f"test {_words(headline)}", "95 %", "seconds"
    )
    for row in metrics["rows"]:
        test = row["test"] or {"scores": {}, "intervals": {}}
        table.add_row(
            row["method"],
            f"{row['parameters']:,}",
            _number(row["val"]["scores"][headline]),
            _number(test["scores"].get(headline)),
            _interval(test["intervals"].get(headline)),
            f"{row['seconds']:.1f}",
        )
    Console().print(table)


def _print_store(store: Any, as_json: bool) -> None:  # noqa: ANN401 - Store, imported late
    if as_json:
        fields = {"store": str(store.folder), "samples": store.num_records, "bytes": store.num_bytes}
        _print_json({**fields, "skipped": store.skipped})
        return
    print(
        f"{store.folder}: {store.num_records:,} samples, {store.num_bytes / 2**30:.2f} GiB, "
        f"{len(store.skipped)} skipped"
    )


def _print_names(lines: dict[str, str], as_json: bool) -> None:
    if as_json:
        _print_json(lines)
        return
    table = Table("name", "what it is")
    for name, line in lines.items():
        table.add_row(name, line)
    Console().print(table)


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").split("\n")[0]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(pair: Any) -> str:  # noqa: ANN401 - a list or tuple of two, or None
    return "-" if not pair else f"{pair[0]:.3f} .. {pair[1]:.3f}"


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, default=str))


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
