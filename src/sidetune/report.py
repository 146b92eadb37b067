"""``report.html``: one self-contained page a run folder. No script, no network, no library needed to read it.

It reads the folder's JSON files as they are and imports nothing that computes. Figures are SVG written
by the template, so that they follow the page's colours, light and dark.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from sidetune.errors import ArtifactError
from sidetune.figures import (
    LABELS,
    curve,
    duration,
    flat,
    forest,
    label,
    number,
    phrase,
    reliability,
    short,
    size,
)
from sidetune.files import parse_json, read_json, write_text
from sidetune.gallery import gallery
from sidetune.report_members import members_view

Json = dict[str, Any]

SPLITS = {"test": "Test", "val": "Validation"}
MANY_CLASSES = 20  # more are folded away, and get no confusion matrix
MOST_CLASSES = 200  # of more, the weakest are listed: the page stays light
SHORT_NAME = 8  # characters; classes with longer names are numbered over the confusion matrix
HIDDEN = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EACH = {"classify": "Per class", "multilabel": "Per label", "regress": "Per output"}
STAGES = {
    "features": "Features",
    "evaluate": "Scores",
    "findings": "Findings",
}


def write_report(run: Path) -> Path:
    """Draw a finished run as one HTML page.

    Args:
        run: a run folder with metrics.json, recipe.json and artifact.json. history.jsonl may be absent
            or empty: a closed-form side has no epochs. findings.json may be absent: older versions wrote
            none, and the page leaves its sections out.

    Returns:
        The page, RUN/report.html.

    Raises:
        ArtifactError: a file is missing or is not JSON, or lacks a field.
    """
    metrics, recipe, artifact = (
        _read(run / name) for name in ("metrics.json", "recipe.json", "artifact.json")
    )
    history = _read_history(run / "history.jsonl")
    findings = _read(run / "findings.json") if (run / "findings.json").exists() else None
    try:
        view = _view(run, metrics, recipe, artifact, history)
        view["found"] = gallery(findings, metrics, _own(metrics)) if findings else None
        view["contents"] = _contents(view)
        page = templates().get_template("report.html.jinja").render(view)
    except (KeyError, jinja2.UndefinedError) as error:
        raise ArtifactError(
            f"{run} lacks {error} in its JSON files: it was written by another version. "
            "Fit it again with: sidetune fit"
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(
            f"the JSON files of {run} are damaged: {error}. Fit it again with: sidetune fit"
        ) from error
    path = run / "report.html"
    write_text(path, page)
    return path


def templates() -> jinja2.Environment:
    """The page's templates; what they show is escaped, and a name that is not there is an error."""
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_template),
        finalize=_visible,
    )


def _template(name: str) -> str:
    return resources.files("sidetune").joinpath("page", name).read_text(encoding="utf-8")


def _visible(value: object) -> object:
    """What a name hides is spelled out: control characters, turned writing, bytes that are no text."""
    if type(value) is not str:  # a number, or markup of the page's own
        return value
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", value)


def sample_word(recipe: Json) -> str:
    """What a sample is called, by recipe.json; runs from before there were clips do not say."""
    return "clip" if recipe["recipe"].get("clips", {}).get("frames") else "image"


def _own(metrics: Json) -> Json:
    """The run's own row of the score table."""
    own: Json = {row["method"]: row for row in metrics["rows"]}[metrics["side"]]
    return own


def _view(run: Path, metrics: Json, recipe: Json, artifact: Json, history: Sequence[Json]) -> Json:
    """Everything the template shows, as text and coordinates."""
    own = _own(metrics)
    split = "test" if own["test"] else "val"
    headline = metrics["headline"]
    names = [headline, *(name for name in own["val"]["scores"] if name != headline)]
    return {
        "run": shlex.quote(run.resolve().name),
        "side": metrics["side"],
        "backbone": metrics["backbone"],
        "task": metrics["task"],
        "outputs": metrics["outputs"],
        "data": metrics["data"],
        "sample": sample_word(recipe),
        "headline": label(headline),
        "facts": _facts(metrics, own, split),
        "verdict": _verdict(metrics, split),
        "forest": forest(metrics, split),
        "columns": [label(name) for name in names],
        "tables": [score_table(metrics, key, names) for key in ("test", "val") if own[key] or key == "val"],
        "members": members_view(metrics, sample_word(recipe)),
        "curves": _curves(history, headline),
        "confusion": _confusion(own[split], metrics["outputs"]),
        "split": SPLITS[split].lower(),
        "each": EACH[metrics["task"]],
        "per_class": _per_class(own[split], metrics["task"]),
        "folded": len(metrics["outputs"]) > MANY_CLASSES,
        "calibration": _calibration(own, split),
        "costs": _costs(metrics),
        "stages": _stages(metrics),
        "methods": [
            (row["method"], f"{row['parameters']:,}", duration(row["seconds"])) for row in metrics["rows"]
        ],
        "recipe": list(flat(recipe["recipe"])),
        "hashes": [(name, recipe[name]) for name in ("hash", "data", "backbone")],
        "environment": environment_lines(metrics["environment"], artifact),
    }


def _contents(view: Json) -> list[tuple[str, str]]:
    """The page's sections that are there: (anchor, title)."""
    found = view["found"]
    sections = [
        ("scores", "Scores", True),
        ("members", "Members", bool(view["members"])),
        ("curves", "Learning curve", bool(view["curves"])),
        ("confusion", "Confusion", bool(view["confusion"])),
        ("mistakes", "Largest errors" if view["task"] == "regress" else "Mistakes", bool(found)),
        ("labels", "Suspect labels", bool(found and found["suspects"])),
        ("duplicates", "Near-duplicates", bool(found)),
        ("classes", view["each"], True),
        ("calibration", "Calibration", bool(view["calibration"])),
        ("cost", "Cost", True),
        ("recipe", "Recipe", True),
        ("environment", "Environment", True),
        ("use", "Use it", True),
    ]
    return [(name, title) for name, title, there in sections if there]


def _facts(metrics: Json, own: Json, split: str) -> list[tuple[str, str, str, str]]:
    """The numbers at the top: (value, unit, what it is, a remark)."""
    headline, cost = metrics["headline"], metrics["cost"]
    name, unit = label(headline)
    interval = interval_text(headline, own[split])
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
    unit = label(headline)[1]
    mine, theirs = own["scores"][headline], scored[best]["scores"][headline]
    gap = number(headline, abs(mine - theirs))
    scale = " points" if unit == "%" else ""
    order = f"{gap}{scale} {'above' if mine > theirs else 'below'}" if mine != theirs else "level with"
    sentence = f"{metrics['side']} is {order} {best}, the best of the other methods, in {phrase(headline)}"
    ranges = own["intervals"].get(headline), scored[best]["intervals"].get(headline)
    if not all(ranges):
        return f"{sentence}."
    apart = max(ranges[0][0], ranges[1][0]) > min(ranges[0][1], ranges[1][1])
    return f"{sentence}; their 95 % intervals {'do not overlap' if apart else 'overlap'}."


def interval_text(name: str, evaluation: Json) -> str:
    """The 95 % interval of a score; empty where it has none."""
    pair = evaluation["intervals"].get(name)
    if not pair:
        return ""
    return f"{number(name, pair[0])}{' to ' if pair[0] < 0 else ' – '}{number(name, pair[1])}"


def score_table(metrics: Json, split: str, names: Sequence[str]) -> Json:
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
                interval_text(name, row[split]),
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


def _confusion(evaluation: Json, outputs: Sequence[str]) -> Json | None:
    """Rows of the matrix: name, and (count, strength of its colour, right or wrong) a column."""
    if evaluation["confusion"] is None or len(outputs) > MANY_CLASSES:
        return None
    counts = [[0] * len(outputs) for _ in outputs]
    for truth, guess, count in evaluation["confusion"]:
        counts[truth][guess] = count
    rows = []
    for i, (name, row) in enumerate(zip(outputs, counts, strict=True)):
        total = max(sum(row), 1)
        # From a tint to 0.7 of the full colour: seen on any ground, and the count stays readable on it.
        cells = [(count, f"{0.06 + 0.64 * count / total:.3f}", i == j) for j, count in enumerate(row)]
        rows.append({"name": name, "cells": cells})
    return {"rows": rows, "numbered": any(len(name) > SHORT_NAME for name in outputs) or len(outputs) > 10}


def _per_class(evaluation: Json, task: str) -> Json:
    """Headings (with units) and rows of text, one a class, label or output; of very many, the weakest."""
    rows = evaluation["per_class"]
    names = [name for name in rows[0] if name not in ("name", "support")]
    by = {"classify": "recall", "multilabel": "average_precision", "regress": "r2"}[task]
    if len(rows) > MOST_CLASSES:
        scored = [row for row in rows if row[by] is not None]
        rows = sorted(scored, key=lambda row: row[by])[:MOST_CLASSES]
    return {
        "columns": [label(name) for name in names],
        "by": phrase(by) if len(rows) < len(evaluation["per_class"]) else "",
        "rows": [
            (row["name"], f"{row['support']:,}", [number(name, row[name]) for name in names]) for row in rows
        ],
    }


def _calibration(own: Json, split: str) -> Json | None:
    """The reliability diagram, and what withholding unsure answers costs and gains."""
    evaluation = own[split]
    if not evaluation.get("calibration"):
        return None
    answered = [
        (f"{row['threshold']:g}", number("accuracy", row["share"]), number("accuracy", row["accuracy"]))
        for row in evaluation.get("answered") or ()
    ]
    temperature = own["detail"].get("temperature")
    return {
        **reliability(evaluation["calibration"]),
        "error": number("calibration_error", evaluation["scores"].get("calibration_error")),
        "temperature": None if temperature is None else f"{temperature:.2f}",
        "softened": temperature is not None and temperature > 1,
        "answered": answered,
    }


def _costs(metrics: Json) -> list[tuple[str, str]]:
    cost = metrics["cost"]
    gpu = cost.get("peak_gpu_bytes")
    stored = size(cost["store_bytes"]) if cost["store_bytes"] else "none: features were live"
    return [
        ("Parameters of the side", f"{cost['parameters']:,}"),
        ("Parameters of the head", f"{cost['head_parameters']:,}"),
        ("Peak memory", size(cost["peak_memory_bytes"])),
        *([("Peak memory of the GPU", size(gpu))] if gpu else []),
        ("Feature store on disk", stored),
    ]


def _stages(metrics: Json) -> list[tuple[str, str, str]]:
    """Where the time went, in running order: (stage, percent of the longest, duration)."""
    seconds = metrics["cost"]["seconds"]
    longest = max(*seconds.values(), 1e-9)
    names = {**STAGES, "train": f"Training {metrics['side']}"}
    return [
        (names.get(stage, stage), f"{100 * value / longest:.1f}", duration(value))
        for stage, value in seconds.items()
    ]


def environment_lines(environment: Json, artifact: Json) -> list[tuple[str, str]]:
    """Versions and hardware, and what else artifact.json says in a word; the fingerprints stand elsewhere."""
    rest = {
        key: value
        for key, value in artifact.items()
        if isinstance(value, str | int | float) and key not in {*environment, "data"}
    }
    return list(flat(environment | rest))


def _read(path: Path) -> Json:
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} does not exist: {path.parent} is no finished run. "
            f"Type: sidetune fit DATA --out {path.parent}"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}. Fit the run again with: sidetune fit") from error
    if not isinstance(values, dict):
        raise ArtifactError(
            f"{path} holds a {type(values).__name__}, expected an object. "
            "Fit the run again with: sidetune fit"
        )
    return values


def _read_history(path: Path) -> list[Json]:
    if not path.exists():
        return []
    try:
        return [
            parse_json(line, nan=True)
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not JSON lines: {error}. Fit the run again with: sidetune fit"
        ) from error
