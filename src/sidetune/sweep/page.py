"""A sweep's ``report.html``: what won and by how much, the trials, what mattered, what it cost.

It reads the folder's JSON files, as `sidetune.report` does, and shares its look.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from sidetune.errors import ArtifactError
from sidetune.figures import curve, duration, flat, forest, label, number, phrase, scatter, short, text
from sidetune.files import write_text
from sidetune.report import environment_lines, interval_text, sample_word, score_table, templates
from sidetune.runs import read_object

Json = dict[str, Any]

FOLDED = 20  # trials; of more, the best stand open and the others are folded away
FIGURES = 6  # parameters that are drawn, the most important first
HELD = {"folds": "Held-out folds", "val": "Validation"}
STATES = ("finished", "stopped", "diverged")


def write_page(out: Path) -> Path:
    """Draw a finished sweep as one HTML page.

    Args:
        out: its folder, with sweep.json, metrics.json, recipe.json and artifact.json.

    Returns:
        The page, RUN/report.html.

    Raises:
        ArtifactError: a file is missing, is not JSON, or lacks a field.
    """
    files = [
        read_object(out / name) for name in ("sweep.json", "metrics.json", "recipe.json", "artifact.json")
    ]
    try:
        page = templates().get_template("sweep.html.jinja").render(_view(out, *files))
    except (KeyError, TypeError, ValueError, LookupError, AttributeError, jinja2.UndefinedError) as error:
        raise ArtifactError(
            f"the JSON files of {out} are damaged, or of another version: {error}. Type: the sweep command "
            "with a new --out"
        ) from error
    write_text(out / "report.html", page)
    return out / "report.html"


def _view(out: Path, sweep: Json, metrics: Json, recipe: Json, artifact: Json) -> Json:
    """Everything the template shows, as text and coordinates."""
    own = metrics["rows"][-1]
    split = "test" if own["test"] else "val"
    headline = metrics["headline"]
    names = [headline, *(name for name in own["val"]["scores"] if name != headline)]
    tables = [score_table(metrics, key, names) for key in ("test", "val") if own[key] or key == "val"]
    tables[-1] |= {"title": HELD[sweep["on"]], "num": sweep["held"]}
    return {
        "run": shlex.quote(out.resolve().name),
        "side": artifact["recipe"]["side"]["name"],
        "backbone": metrics["backbone"],
        "task": metrics["task"],
        "outputs": metrics["outputs"],
        "data": metrics["data"],
        "sample": sample_word(recipe),
        "headline": label(headline),
        "phrase": phrase(headline),
        "held": HELD[sweep["on"]].lower(),
        "sweep": sweep,
        "facts": _facts(sweep, metrics, own, split),
        "verdict": _verdict(sweep),
        "forest": forest(metrics, split),
        "columns": [label(name) for name in names],
        "tables": tables,
        "split": split if split == "test" else HELD[sweep["on"]].lower(),
        "changed": _changed(sweep),
        "best": _best_so_far(sweep),
        "scatters": _scatters(sweep),
        "importance": _importance(sweep),
        "trials": _trials(sweep),
        "folded": FOLDED,
        "costs": _costs(sweep, metrics),
        "recipe": list(flat(artifact["recipe"])),
        "hashes": [(name, recipe[name]) for name in ("hash", "data", "backbone")],
        "environment": environment_lines(metrics["environment"], artifact),
    }


def _facts(sweep: Json, metrics: Json, own: Json, split: str) -> list[tuple[str, str, str, str]]:
    """The numbers at the top: (value, unit, what it is, a remark)."""
    headline = metrics["headline"]
    name, unit = label(headline)
    interval = interval_text(headline, own[split])
    interval = interval and f"95 %: {interval}"
    ended = [trial["state"] for trial in sweep["trials"]]
    counts = [f"{ended.count(state)} {state}" for state in STATES if state in ended]
    cost = sweep["cost"]
    where = "test" if split == "test" else HELD[sweep["on"]].lower()
    return [
        (number(headline, own[split]["scores"][headline]), unit, f"{name}, {where}", interval),
        (f"{len(ended)}", "trials", ", ".join(counts), ""),
        (duration(cost["sweep_seconds"]), "", "search, all processes", ""),
        (f"{100 * cost['epochs_share']:.0f}", "%", "of the epochs of training every trial to its end", ""),
    ]


def _verdict(sweep: Json) -> str:
    """One sentence: the winner against the recipe as it was given."""
    found, headline = sweep["difference"], sweep["headline"]
    if sweep["winner"] == 0:
        return "No trial beat the recipe as it was given: it is what is served here."
    if found is None or found["value"] is None:
        return f"Trial {sweep['winner']} won."
    value, pair = found["value"], found["interval"]
    points = " points" if label(headline)[1] == "%" else ""
    where = "test" if found["split"] == "test" else HELD[sweep["on"]].lower()
    level = "level with" if value == 0 else ("above" if value > 0 else "below")
    gap = "" if value == 0 else f"{number(headline, abs(value))}{points} "
    sentence = (
        f"The winner, trial {sweep['winner']}, is {gap}{level} the recipe as it was given in "
        f"{phrase(headline)} on {where}"
    )
    if not pair:
        return f"{sentence}."
    sure = "which leaves no doubt" if pair[0] > 0 or pair[1] < 0 else "so it may be chance"
    ends = " to ".join(number(headline, end) for end in pair)
    return f"{sentence} (95 % of the difference: {ends}), {sure}."


def _changed(sweep: Json) -> list[tuple[str, str, str]]:
    """Each searched field: its value as given, and the winner's."""
    given, won = sweep["trials"][0]["params"], sweep["trials"][sweep["winner"]]["params"]
    return [(name, short(given[name]), short(won[name])) for name in sweep["space"]]


def _last(trial: Json) -> tuple[float | None, float] | None:
    """Headline score and loss at the last rung that a trial reached."""
    scores = trial["scores"]
    if not scores:
        return None
    headline, loss = scores[max(scores, key=int)]
    return headline, loss


def _best_so_far(sweep: Json) -> Json | None:
    """The best score of the trials up to each that was trained to its end."""
    points: list[tuple[int, float | None]] = []
    best: float | None = None
    for trial in sweep["trials"]:
        found = _last(trial)
        if trial["state"] == "finished" and found is not None and found[0] is not None:
            best = found[0] if best is None else max(best, found[0])
        points.append((trial["number"], best))
    unit = label(sweep["headline"])[1]
    return curve(f"Best {phrase(sweep['headline'])} so far{unit and f', {unit}'}", sweep["headline"], points)


def _scatters(sweep: Json) -> list[Json]:
    """The last score of every trial against its value of a parameter, the most important parameters first."""
    order = sorted(sweep["space"], key=lambda name: -sweep["importance"].get(name, 0.0))
    figures = []
    for name in order[:FIGURES]:
        points = [
            (trial["params"][name], found[0], trial["state"] == "finished")
            for trial in sweep["trials"]
            if (found := _last(trial)) is not None and found[0] is not None
        ]
        figures.append(scatter(name, sweep["headline"], points, sweep["space"][name]))
    return [figure for figure in figures if figure is not None]


def _importance(sweep: Json) -> list[tuple[str, str, str]]:
    """(field, percent of the largest, percent), the largest first."""
    found = sorted(sweep["importance"].items(), key=lambda pair: -pair[1])
    largest = max((share for _, share in found), default=0.0) or 1.0
    return [(name, f"{100 * share / largest:.1f}", f"{100 * share:.0f} %") for name, share in found]


def _trials(sweep: Json) -> Sequence[Json]:
    """One row a trial: the longest trained first, then by score."""
    rows = []
    for trial in sweep["trials"]:
        found = _last(trial)
        headline, loss = (None, None) if found is None else found
        rows.append(
            {
                "number": trial["number"],
                "won": trial["number"] == sweep["winner"],
                "state": trial["state"],
                "epochs": trial["epochs"],
                "order": (-trial["epochs"], -(headline or 0.0), loss or 0.0),
                "score": number(sweep["headline"], headline),
                "loss": number("log_loss", loss),
                "values": [short(trial["params"][name]) for name in sweep["space"]],
            }
        )
    return sorted(rows, key=lambda row: (not row["won"], row["order"]))


def _costs(sweep: Json, metrics: Json) -> list[tuple[str, str]]:
    """What was measured, and what it is beside as many networks alone, which is computed."""
    cost, seconds = sweep["cost"], metrics["cost"]["seconds"]
    alone, count = cost["solo_seconds_computed"], len(sweep["trials"])
    networks = f"{count} x {sweep['members']}" if sweep["members"] > 1 else f"{count}"
    networks += f" networks, {sweep['epochs']} epochs each"
    return [
        ("Features", f"{duration(seconds['features'])}, measured"),
        (
            "Search",
            f"{duration(cost['sweep_seconds'])}, measured: training and scores, all processes",
        ),
        ("Winner, default", f"{duration(seconds['final'])}, measured: on train and validation"),
        ("One network alone", f"{duration(cost['solo_epoch_seconds'])} an epoch, measured"),
        (
            "One by one",
            f"{duration(alone)}, computed from that epoch: {networks}",
        ),
        ("The search took", f"{100 * cost['sweep_seconds'] / max(alone, 1e-9):.0f} % of that"),
        ("Epochs trained", f"{100 * cost['epochs_share']:.0f} % of training every trial to its end"),
        ("Searched", text(sweep["space"])),
    ]
