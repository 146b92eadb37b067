"""``sidetune eval`` and ``sidetune predict``: what finished runs answer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sidetune.errors import SidetuneError
from sidetune.progress import say
from sidetune.usage import (
    IMAGES,
    Data,
    Device,
    EvalLabels,
    Json,
    RunFolder,
    ServePrecision,
    Views,
    Weights,
    columns,
    log_skipped,
    print_json,
)


def evaluate(
    run: RunFolder,
    data: Data,
    split: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=IMAGES, help="auto, all, train, val or test.")
    ] = "auto",
    labels: EvalLabels = None,
    views: Views = None,
    weights: Weights = None,
    precision: ServePrecision = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a run on labelled images. auto: the data's test split if it has one, else all images."""
    from sidetune.columns import holds_columns
    from sidetune.rescore import evaluate_columns, evaluate_run
    from sidetune.tables import print_evaluation

    how: dict[str, Any] = {"num_views": views, "weights": weights, "precision": precision, "device": device}
    if holds_columns(run):
        found = evaluate_columns(run, data, split=split, labels=columns(labels), **how)
    else:
        found = {"": evaluate_run(run, data, split=split, labels=columns(labels), **how)}
    if as_json:
        scored = {name: one.to_json() for name, one in found.items()}
        print_json({"run": str(run), **scored.get("", {"columns": scored})})
        return
    for name, one in found.items():
        print_evaluation(one.evaluation, one.split, name, one.sample)
        for path, reason in one.skipped.items():
            say(f"{path}: {reason}")
        log_skipped(len(one.skipped), one.evaluation.num_samples + len(one.skipped))


def predict(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")],
    abstain_below: Annotated[
        float | None,
        typer.Option("--abstain-below", metavar="P", help="Withhold answers of a probability below P."),
    ] = None,
    views: Views = None,
    weights: Weights = None,
    precision: ServePrecision = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what a run sees in images. Exit 1 if one of them cannot be read."""
    import sidetune
    from sidetune.columns import holds_columns
    from sidetune.data import list_images
    from sidetune.tables import column_lines, prediction_lines

    how: dict[str, Any] = {"num_views": views, "weights": weights, "precision": precision, "device": device}
    if holds_columns(run):
        together = sidetune.load_columns_run(run, **how)
        files = list_images(images, clips=together.clips)
        found = together.predict(files, abstain_below=abstain_below)
        lines, predictions = column_lines(found), next(iter(found.values()))
        said: dict[str, Any] = {
            "columns": {name: [asdict(item) for item in own] for name, own in found.items()}
        }
    else:
        predictor = sidetune.load(run, **how)
        files = list_images(images, clips=predictor.clips)
        predictions = predictor.predict(files, abstain_below=abstain_below)
        lines = prediction_lines(predictions, predictor.artifact.task.kind)
        said = {"predictions": [asdict(item) for item in predictions]}
    if as_json:
        print_json({"run": str(run), **said})
    else:
        for line in lines:
            print(line)
    unreadable = [item for item in predictions if item.error is not None]
    for item in unreadable:
        say(f"error: {item.path}: {item.error}")
    if unreadable:
        log_skipped(len(unreadable), len(predictions))
        raise typer.Exit(SidetuneError.exit_code)
