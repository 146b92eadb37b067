"""Runs that were fitted together, one a label column.

RUN/columns.json     column -> folder; written last, so its presence means complete
RUN/<column>/        a run like any other, which answers alone as well
RUN/report.html      links to their reports
RUN/skipped.csv, recipe.json    of all
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError

from sidetune.artifact import AGAIN, COLUMNS, COPY, not_a_run
from sidetune.errors import ArtifactError, first_complaint
from sidetune.figures import label, number
from sidetune.files import write_json, write_text
from sidetune.runs import Run, read_object

FORMAT = 1
LONGEST = 80  # bytes of a folder's name; file systems take 255
# what stands beside the columns' folders or in a run's, and what other folders are known by
TAKEN = (
    *("columns.json", "recipe.json", "report.html", "skipped.csv", "checkpoint.safetensors", "members"),
    *("artifact.json", "journal.log"),
)
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 48rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem 1.2rem .3rem 0; text-align: right; border-bottom: 1px solid color-mix(in srgb,
  currentColor 25%, transparent) }}
th:first-child, td:first-child {{ text-align: left }}
</style>
<h1>{title}</h1>
<p>A network a label column, trained in one pass. Each column has a report of its own.</p>
<table>
<tr><th>column</th><th>score</th><th>validation</th><th>test</th></tr>
{rows}
</table>
</html>
"""


@dataclass(frozen=True)
class ColumnsRun:
    """Finished runs that were fitted together, one a label column.

    Args:
        folder: of all.
        runs: column -> its run, in the order in which they were asked for.
    """

    folder: Path
    runs: dict[str, Run]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a folder of finished runs.

        Raises:
            ArtifactError: it is not finished, or damaged.
        """
        return cls(folder, {name: Run.open(own) for name, own in column_folders(folder).items()})

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {"run": str(self.folder), "columns": {name: run.to_json() for name, run in self.runs.items()}}


def holds_columns(folder: Path) -> bool:
    """Whether there are finished runs of several label columns in a folder."""
    return (folder / COLUMNS).exists()


def column_folders(folder: Path) -> dict[str, Path]:
    """Column -> the folder of its run, of a finished folder.

    Raises:
        ArtifactError: it is not finished, or damaged.
    """
    path = folder / COLUMNS
    if not path.exists():
        raise ArtifactError(not_a_run(folder))
    try:
        named = _Index.model_validate(read_object(path)).columns
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged: {first_complaint(error)}. {AGAIN}") from error
    for one in named:
        own = folder / one.folder
        if own.resolve().parent != folder.resolve():
            raise ArtifactError(f"{path} is damaged: its column {one.name!r} is elsewhere. {COPY}")
        if not (own / "artifact.json").exists():
            raise ArtifactError(f"{own / 'artifact.json'} is missing, and {path} needs it. {COPY}")
    found = {one.name: folder / one.folder for one in named}
    if len(found) != len(named):
        raise ArtifactError(f"{path} is damaged: a column stands there twice. {COPY}")
    return found


class _Column(BaseModel):
    """A column as columns.json names it."""

    name: str
    folder: str = Field(min_length=1)


class _Index(BaseModel):
    """What columns.json holds."""

    format: Literal[1]
    columns: list[_Column] = Field(min_length=1)


def write_columns(folder: Path, folders: dict[str, Path]) -> None:
    """Write columns.json: everything that it names is there already."""
    columns = [{"name": name, "folder": own.name} for name, own in folders.items()]
    write_json(folder / COLUMNS, {"format": FORMAT, "sidetune": version("sidetune"), "columns": columns})


def folder_names(columns: Sequence[str]) -> list[str]:
    """A folder's name a column, safe on every file system: letters, digits and ``-_.``; no two are alike."""
    taken, found = {name.casefold() for name in TAKEN}, []
    for column in columns:
        plain = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", column)).strip(".") or "column"
        plain = plain.encode()[:LONGEST].decode(errors="ignore")
        name, count = plain, 1
        while name.casefold() in taken:
            count += 1
            name = f"{plain}-{count}"
        taken.add(name.casefold())
        found.append(name)
    return found


def write_links(folder: Path) -> None:
    """Write RUN/report.html, which leads to the columns' own."""
    rows = []
    for name, run in ColumnsRun.open(folder).runs.items():
        headline, own = run.metrics["headline"], run.row
        words, unit = label(headline)
        test = None if own["test"] is None else own["test"]["scores"][headline]
        cells = [f"{words}, {unit}" if unit else words]
        cells += [number(headline, own["val"]["scores"][headline]), number(headline, test)]
        link = f'<a href="{quote(run.folder.name)}/report.html">{html.escape(name)}</a>'
        rows.append(f"<tr><td>{link}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    title = html.escape(f"sidetune: {len(rows)} columns of one table")
    write_text(folder / "report.html", PAGE.format(title=title, rows="\n".join(rows)))
