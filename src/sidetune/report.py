"""``report.html``: one self-contained page a run folder. No script, no network, no library needed to read it.

It reads the folder's JSON files as they are and imports nothing that computes. Figures are SVG written
by the template, so that they follow the page's colours, light and dark.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from sidetune.errors import ArtifactError
from sidetune.figures import LABELS, curve, duration, flat, forest, label, number, short, size, text
from sidetune.files import write_text

Json = dict[str, Any]

SPLITS = {"test": "Test", "val": "Validation"}
MANY_CLASSES = 20  # more are folded away, and get no confusion matrix


def write_report(run: Path) -> Path:
    """Draw a finished run as one HTML page.

    Args:
        run: a run folder with metrics.json, recipe.json and artifact.json. history.jsonl may be absent
            or empty: a closed-form side has no epochs.

    Returns:
        The page, RUN/report.html.

    Raises:
        ArtifactError: a file is missing or is not JSON, or lacks a field.
    """
    metrics, recipe, artifact = (
        _read(run / name) for name in ("metrics.json", "recipe.json", "artifact.json")
    )
    history = _read_history(run / "history.jsonl")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("sidetune").joinpath("report.html.jinja").read_text(encoding="utf-8")
    try:
        page = environment.from_string(source).render(_view(run, metrics, recipe, artifact, history))
    except (KeyError, jinja2.UndefinedError) as error:
        raise ArtifactError(
            f"{run} lacks {error} in its JSON files: it was written by another version. "
            "Fit it again with: sidetune fit"
        ) from error
    path = run / "report.html"
    write_text(path, page)
    return path


def _view(run: Path, metrics: Json, recipe: Json, artifact: Json, history: Sequence[Json]) -> Json:
    """Everything the template shows, as text and coordinates."""
    own = {row["method"]: row for row in metrics["rows"]}[metrics["side"]]
    split = "test" if own["test"] else "val"
    headline = metrics["headline"]
    names = [headline, *(name for name in own["val"]["scores"] if name != headline)]
    return {
        "run": run.resolve().name,
        "side": metrics["side"],
        "backbone": metrics["backbone"],
        "task": metrics["task"],
        "outputs": metrics["outputs"],
        "data": metrics["data"],
        "headline": label(headline),
        "facts": _facts(metrics, own, split),
        "verdict": _verdict(metrics, split),
        "forest": forest(metrics, split),
        "columns": [label(name) for name in names],
        "tables": [_score_table(metrics, key, names) for key in ("test", "val") if own[key] or key == "val"],
        "curves": _curves(history, headline),
        "confusion": _confusion(own[split], metrics["outputs"]),
        "split": SPLITS[split].lower(),
        "per_class": _per_class(own[split]),
        "folded": len(metrics["outputs"]) > MANY_CLASSES,
        "costs": _costs(metrics),
        "methods": [
            (row["method"], f"{row['parameters']:,}", duration(row["seconds"])) for row in metrics["rows"]
        ],
        "recipe": list(flat(recipe["recipe"])),
        "hashes": [(name, recipe[name]) for name in ("hash", "data", "backbone")],
        "environment": [
            *flat(metrics["environment"]),
            *((key, text(value)) for key, value in artifact.items() if isinstance(value, str | int | float)),
        ],
    }


def _facts(metrics: Json, own: Json, split: str) -> list[tuple[str, str, str, str]]:
    """The numbers at the top: (value, unit, what it is, a remark)."""
    headline, cost = metrics["headline"], metrics["cost"]
    name, unit = label(headline)
    interval = _interval(headline, own[split])
    what = f"{name}, {SPLITS[split].lower()}"
    return [
        (
            number(headline, own[split]["scores"][headline]),
            unit,
            what,
            f"95 %: {interval}" if interval else "",
        ),
        (f"{cost['parameters'] + cost['head_parameters']:,}", "", "trained parameters, head included", ""),
        (duration(sum(cost["seconds"].values())), "", "this run, all methods", ""),
        (size(cost["peak_memory_bytes"]), "", "peak memory", ""),
    ]


def _verdict(metrics: Json, split: str) -> str:
    """One sentence: the run's side against the best other method of the table."""
    headline = metrics["headline"]
    scored = {
        row["method"]: row[split]
        for row in metrics["rows"]
        if row[split] and row[split]["scores"][headline] is not None
    }
    own = scored.pop(metrics["side"], None)
    if own is None or not scored:
        return ""
    best = max(scored, key=lambda method: scored[method]["scores"][headline])
    name, unit = label(headline)
    mine, theirs = own["scores"][headline], scored[best]["scores"][headline]
    name = name[0].lower() + name[1:] if name[1].islower() else name  # but not AUROC or R²
    gap = number(headline, abs(mine - theirs))
    scale = " points" if unit == "%" else ""
    order = f"{gap}{scale} {'above' if mine > theirs else 'below'}" if mine != theirs else "level with"
    sentence = f"{metrics['side']} is {order} {best}, the best of the other methods, in {name}"
    ranges = own["intervals"].get(headline), scored[best]["intervals"].get(headline)
    if not all(ranges):
        return f"{sentence}."
    apart = max(ranges[0][0], ranges[1][0]) > min(ranges[0][1], ranges[1][1])
    return f"{sentence}; their 95 % intervals {'do not overlap' if apart else 'overlap'}."


def _interval(name: str, evaluation: Json) -> str:
    pair = evaluation["intervals"].get(name)
    if not pair:
        return ""
    return f"{number(name, pair[0])}{' to ' if pair[0] < 0 else ' – '}{number(name, pair[1])}"


def _score_table(metrics: Json, split: str, names: Sequence[str]) -> Json:
    """One row a method: its scores with intervals, the best of each column marked."""
    rows = [row for row in metrics["rows"] if row[split]]
    best = {}
    for name in names:
        values = [v for row in rows if (v := row[split]["scores"].get(name)) is not None]
        if values:
            best[name] = max(values) if LABELS.get(name, ("", "", True))[2] else min(values)
    table = []
    for row in rows:
        scores = row[split]["scores"]
        cells = [
            (
                number(name, scores.get(name)),
                _interval(name, row[split]),
                len(rows) > 1 and name in best and scores.get(name) == best[name],
            )
            for name in names
        ]
        detail = ", ".join(f"{key.replace('_', ' ')} {short(value)}" for key, value in row["detail"].items())
        table.append((row["method"], detail, row["method"] == metrics["side"], cells))
    return {"title": SPLITS[split], "num": metrics["data"][f"num_{split}"], "rows": table}


def _curves(history: Sequence[Json], headline: str) -> list[Json]:
    """Training loss and the validation headline by epoch, counted from 1."""
    losses = [(row["epoch"] + 1, row["loss"]) for row in history]
    scores = [(row["epoch"] + 1, row["val"].get(headline)) for row in history if row["val"]]
    name, unit = label(headline)
    unit = f", {unit}" if unit else ""
    curves = [curve("Training loss", "loss", losses), curve(f"{name} on validation{unit}", headline, scores)]
    return [curve for curve in curves if curve is not None]


def _confusion(evaluation: Json, outputs: Sequence[str]) -> list[Json] | None:
    """Rows of the matrix: name, and (count, share of the row, right or wrong) a column."""
    if evaluation["confusion"] is None or len(outputs) > MANY_CLASSES:
        return None
    counts = [[0] * len(outputs) for _ in outputs]
    for truth, guess, count in evaluation["confusion"]:
        counts[truth][guess] = count
    return [
        {
            "name": name,
            "cells": [(count, f"{count / max(sum(row), 1):.3f}", i == j) for j, count in enumerate(row)],
        }
        for i, (name, row) in enumerate(zip(outputs, counts, strict=True))
    ]


def _per_class(evaluation: Json) -> Json:
    """Headings (with units) and rows of text, one a class, label or output."""
    rows = evaluation["per_class"]
    names = [name for name in rows[0] if name not in ("name", "support")]
    return {
        "columns": [label(name) for name in names],
        "rows": [
            (row["name"], f"{row['support']:,}", [number(name, row[name]) for name in names]) for row in rows
        ],
    }


def _costs(metrics: Json) -> list[tuple[str, str]]:
    cost = metrics["cost"]
    stages = [(f"Time: {stage}", duration(seconds)) for stage, seconds in cost["seconds"].items()]
    return [
        ("Parameters of the side", f"{cost['parameters']:,}"),
        ("Parameters of the head", f"{cost['head_parameters']:,}"),
        *stages,
        ("Peak memory", size(cost["peak_memory_bytes"])),
        (
            "Feature store on disk",
            size(cost["store_bytes"]) if cost["store_bytes"] else "none: features were live",
        ),
    ]


def _read(path: Path) -> Json:
    try:
        values: Json = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} does not exist: {path.parent} is no finished run. "
            f"Type: sidetune fit DATA --out {path.parent}"
        ) from error
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is not JSON: {error}. Fit the run again with: sidetune fit") from error
    return values


def _read_history(path: Path) -> list[Json]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"{path} is not JSON lines: {error}. Fit the run again with: sidetune fit"
        ) from error
