"""What the command line prints for people: results as text that reads well at 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sidetune.data.dataset import TaskKind
from sidetune.doctor import Check, works
from sidetune.evaluate import Evaluation
from sidetune.figures import duration, label, number, size
from sidetune.members import variations
from sidetune.predict import Prediction
from sidetune.progress import printable
from sidetune.recipe import Recipe
from sidetune.report_members import SECOND, held_out, who_answers
from sidetune.sides import SOLVED
from sidetune.upkeep import Garbage

LIKELIEST = 3  # classes that are shown of an image
MEMBERS = 10  # of a fleet that are shown
WIDTH = 80
MARKS = {"ok": "ok", "note": "--", "bad": "!!"}  # that read without colour


def choices(recipe: Recipe, device: str) -> str:
    """Every choice that a result hangs on, defaults too."""
    train, features = recipe.train, recipe.features
    size = "the backbone's own" if recipe.backbone.size is None else f"{recipe.backbone.size} px"
    kept = "live" if features.mode == "live" else f"stored, {features.dtype}"
    epochs = f"10 to 100, by the number of {recipe.sample}s" if train.epochs is None else train.epochs
    lines = [
        f"backbone {recipe.backbone.name} · size {size} · side {recipe.side.name} · task {recipe.data.task}",
        f"features {kept}{_shown(recipe)} · device {device}",
        f"epochs {epochs} · lr {train.lr:g} · batch {train.batch_size} · seed {train.seed}",
        *_fleet(recipe),
    ]
    return "\n".join(lines[:2] if recipe.side.name in SOLVED else lines)


def _shown(recipe: Recipe) -> str:
    """What of a sample is stored, drawn and averaged, where that is not one picture."""
    clips, features = recipe.clips, recipe.features
    if clips.frames is not None:
        squares = f", {clips.crops} squares of each, averaged" if clips.crops > 1 else ""
        several = f", {clips.scored} samplings averaged" if clips.scored > 1 else ""
        of_stored = "" if recipe.backbone.reads_clips else f" of {clips.stored}"
        return f", {clips.frames}{of_stored} frames of each clip{squares}{several}"
    parts = [f"{features.tiles**2} tiles"] * bool(features.tiles)
    parts += [f"{features.views} more views"] * bool(features.views)
    return f", {' and '.join(parts)}{', averaged' if features.average_views else ''}" if parts else ""


def _fleet(recipe: Recipe) -> Iterator[str]:
    """A line about members, folds and ensemble, where there are any."""
    fleet, parts = recipe.fleet, []
    if fleet.members is not None:
        count = len(variations(recipe))
        axes = "; ".join(filter(None, (part.strip() for part in fleet.members.split(";"))))
        parts.append(f"{count} {'member' if count == 1 else 'members'}: {axes}")
    if fleet.folds is not None:
        parts.append("folds of the column" if fleet.folds == "column" else f"{fleet.folds} folds")
    parts += ["ensemble"] * fleet.ensemble + ["orders of their own"] * fleet.own_order
    if parts:
        yield " · ".join(parts)


def print_scores(metrics: Mapping[str, Any], column: str = "", sample: str = "image") -> None:
    """A run's metrics: one line a method with its headline score, the run's own side last.

    Args:
        metrics: of the run.
        column: the label column that heads the table, where there are several.
        sample: what a sample is called.
    """
    headline, data = metrics["headline"], metrics["data"]
    split = "test" if metrics["rows"][-1]["test"] else "val"
    counts = ", ".join(f"{data[f'num_{name}']:,} {name}" for name in ("train", "val", "test"))
    table = _table(
        "method",
        "val",
        "test",
        f"95 % of {split}",
        "parameters",
        "time",
        title=_heading(column) + _title(headline, counts),
    )
    for row in metrics["rows"]:
        test = row["test"] or {"scores": {}}
        table.add_row(
            row["method"],
            number(headline, row["val"]["scores"][headline]),
            number(headline, test["scores"].get(headline)),
            _interval(headline, row[split]["intervals"].get(headline)),
            f"{row['parameters']:,}",
            duration(row["seconds"]),
        )
    Console().print(table)
    if "fleet" in metrics:
        _print_members(metrics, sample)


def _print_members(metrics: Mapping[str, Any], sample: str) -> None:
    """The first members with their scores on what was held out, and who answers."""
    fleet, names = metrics["fleet"], [metrics["headline"], SECOND[metrics["task"]]]
    if len(fleet["members"]) > 1:
        table = _table("member", *(_title(name) for name in names), "weight", title=held_out(fleet, sample))
        table.columns[0].no_wrap = False  # long ones take two lines; numbers stay whole
        table.columns[0].overflow = "fold"
        for one in fleet["members"][:MEMBERS]:
            scores = one["scores"] or {}
            shown = [number(name, scores.get(name)) for name in names]
            if one["diverged"]:
                shown[0] = "diverged"
            weight = f"{one['weight']:.2f}" if one["weight"] else ""
            table.add_row(Text(printable(one["member"])), *shown, weight)
        Console().print(table)
        if len(fleet["members"]) > MEMBERS:
            Console().print(f"and {len(fleet['members']) - MEMBERS} more in members.csv", highlight=False)
    Console().print(
        f"\n{printable(who_answers(metrics, sample))}", markup=False, highlight=False, soft_wrap=True
    )


def print_evaluation(evaluation: Evaluation, split: str, column: str = "", sample: str = "image") -> None:
    """Every score of a split with its interval, headed by its label column where there are several."""
    samples = f"{evaluation.num_samples:,} {sample}s"
    title = _heading(column) + (f"{samples} of {split}" if split != "all" else samples)
    table = _table("score", "value", "95 %", title=title)
    for name, value in evaluation.scores.items():
        interval = _interval(name, evaluation.intervals.get(name))
        table.add_row(_title(name), number(name, value), interval)
    Console().print(table)
    labels = [row for row in evaluation.per_class if "average_precision" in row]
    without = [str(row["name"]) for row in labels if row["auroc"] is None]
    if without:  # means over labels are over fewer than the run has
        counted = f"{len(labels) - len(without)} of {len(labels)}"
        said = f"AUROC is over {counted} labels; these have not both yes and no here: {', '.join(without)}"
        Console().print(printable(said), markup=False, highlight=False, soft_wrap=True)


def column_lines(found: Mapping[str, Sequence[Prediction]]) -> Iterator[str]:
    """One line an image that could be read: path, then the likeliest class of each label column."""
    for items in zip(*found.values(), strict=True):
        if items[0].error is not None:
            continue
        cells = [_shown_path(items[0].path)]
        for column, item in zip(found, items, strict=True):
            said = "withheld" if item.label is None else f"{item.label} {item.values[item.label]:.3f}"
            cells.append(f"{column} {said}")
        yield printable("\t".join(cells))


def prediction_lines(predictions: Sequence[Prediction], task: TaskKind) -> Iterator[str]:
    """One line an image that could be read: path, the likeliest class or what is withheld, values."""
    for item in predictions:
        if item.error is not None:
            continue
        values = list(item.values.items())
        cells = [] if item.label is None else [item.label]
        if task == "classify":
            values = sorted(values, key=lambda pair: -pair[1])[:LIKELIEST]
            cells = ["withheld"] if item.withheld else cells
        elif item.withheld:
            cells = [f"withheld: {', '.join(item.withheld)}"]
        cells.append("  ".join(f"{name} {value:.3f}" for name, value in values))
        yield printable("\t".join([_shown_path(item.path), *cells]))


def _shown_path(path: str) -> str:
    """On one line."""
    return repr(path)[1:-1] if "\n" in path else path


def store_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Two lines a store: its path alone, so that it can be copied, and what it holds."""
    for row in rows:
        yield row["store"]
        if "samples" not in row:  # damaged: nothing is known of it
            yield f"    {row['state']}"
            continue
        yield (
            f"    {row['architecture']} · {row['samples']:,} samples · {row['taps']} taps · {row['dtype']} · "
            f"{size(row['bytes'])} · {row['state']}"
        )


def garbage_lines(found: Sequence[Garbage], removed: bool) -> Iterator[str]:
    """Two lines a store: its path, and what goes or has gone; then what to type."""
    for one in found:
        yield str(one.folder)
        if not one.files:
            yield "    nothing to remove"
            continue
        what = "the whole store, which is not complete: " if one.plan is None else ""
        samples = f"{one.samples:,} samples, " if one.samples else ""
        files = "1 file" if len(one.files) == 1 else f"{len(one.files):,} files"
        yield f"    {what}{samples}{files}, {size(one.bytes)} {'removed' if removed else 'would go'}"
        if one.kept:
            yield f"    {one.kept:,} samples that the data do not name stay: they share shards with others"
    if not removed and any(one.files for one in found):
        yield "Nothing was removed. Type: the same command with --yes"


def doctor_lines(checks: Sequence[Check]) -> Iterator[str]:
    """A line or two a check, and below it, uncut so that it can be copied, what to type."""
    part = ""
    for check in checks:
        if check.part != part:
            part = check.part
            yield part.capitalize()
        head = f"  {MARKS[check.state]} {check.name:<13} "
        wrap = textwrap.TextWrapper(WIDTH, head, " " * len(head), break_long_words=False)
        wrap.break_on_hyphens = False
        yield from wrap.wrap(check.found)
        if check.fix is not None:
            yield f"     Type: {check.fix}"
    yield ""
    yield "ok: as it should be   --: works without   !!: mend this"
    yield "A fit works here." if works(checks) else "A fit does not work here."


def print_names(lines: Mapping[str, str]) -> None:
    """Names and what they stand for."""
    table = Table("name", "what it is", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, line in lines.items():
        table.add_row(name, line)
    Console().print(table)


def _table(*columns: str, title: str) -> Table:
    """A table whose first column is a name and whose others are numbers, one line a row."""
    print()  # noqa: T201 - apart from the progress above it
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False)
    for number_of, column in enumerate(columns):
        table.add_column(column, justify="right" if number_of else "left", no_wrap=True)
    return table


def _title(name: str, remark: str = "") -> str:
    words, unit = label(name)
    return f"{words}{unit and f', {unit}'}{remark and f' ({remark})'}"


def _heading(column: str) -> str:
    """What begins the title of a table of a label column."""
    return escape(printable(f"{column}: ")) if column else ""


def _interval(name: str, pair: Sequence[float] | None) -> str:
    return f"{number(name, pair[0])} .. {number(name, pair[1])}" if pair else "–"
