"""The text of a CSV file: encoding, separator, header, rows of cells, and the line that each stands on."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidetune.errors import DataError, nearest

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# What people call the two columns that are needed.
PATH_WORDS = (
    *(
        "file",
        "filename",
        "filepath",
        "file_name",
        "file_path",
        "image",
        "imagename",
        "imagepath",
        "image_name",
    ),
    *(
        "image_path",
        "image_file",
        "image_id",
        "img",
        "img_path",
        "photo",
        "picture",
        "paths",
        "images",
        "files",
    ),
)
LABEL_WORDS = (
    "class",
    "classes",
    "category",
    "target",
    "y",
    "labels",
    "tag",
    "species",
    "diagnosis",
    "class_name",
)
SHOWN = 60  # characters of a cell that an error repeats
ALSO = 20  # columns that an error lists


@dataclass(frozen=True)
class Table:
    """The rows of a CSV as stripped text by column, and each row's line number for errors."""

    file: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def error(self, row: int, message: str) -> DataError:
        """The error of a row, told by its line."""
        return DataError(f"{self.file}, line {self.lines[row]}: {message}")


def quoted(text: str) -> str:
    """A cell as an error repeats it: in quotes, on one line, cut short."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r} .. ({len(text):,} characters)"


def is_file(path: Path, *, or_folder: bool = False) -> bool:
    """Whether there is a file, or a folder where that will do; no name is too odd to ask."""
    try:
        return path.is_file() or (or_folder and path.is_dir())
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def read_table(file: Path, *, required: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read a CSV file with a header line: UTF-8, or UTF-16 with a byte-order mark.

    Cells are separated by commas, or by semicolons or tabs where these give the header the columns
    that are required and commas do not. Spaces around a cell do not count, nor does the case of the
    names of columns that are asked for. Blank lines, and empty cells after the last named column, are
    no rows and no cells.

    Args:
        file: of the table.
        required: names of columns that must be there.
        optional: names of columns that are found in any case, too.

    Raises:
        DataError: with the line number where there is one.
    """
    text = _text(file)
    rows: list[list[str]] = []
    for separator in SEPARATORS:
        header = _first_row(text, separator)
        if set(required) <= set(_named(header, required)):
            rows, lines = _rows(file, text, separator)
            break
    else:
        rows, lines = _rows(file, text, ",")
    if len(rows) < 2:
        found = "a header and no rows" if rows else "nothing"
        raise DataError(f"{file} is empty: got {found}, expected a header 'path,label' and a line an image")
    header = _named(rows.pop(0), [*required, *optional])
    _check_header(file, header, required)
    table = Table(file, {name: [] for name in header if name}, lines[1:])
    for number, row in enumerate(rows):
        _check_row(table, number, row, header)
        for name, cell in zip(header, row, strict=False):
            if name:
                table.columns[name].append(cell)
    return table


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Give the path of a .csv file") from error
    encoding = "utf-16" if content.startswith(UTF16) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        if encoding == "utf-16":
            raise DataError(
                f"{file}, line {line}: is not UTF-16 text, as it begins. Save it as 'CSV UTF-8'"
            ) from error
        byte = content[error.start : error.start + 1].hex()
        raise DataError(
            f"{file}, line {line}: is not UTF-8 text: got byte 0x{byte}. Save it as 'CSV UTF-8', or type: "
            f"iconv -f cp1252 -t utf-8 {file} > utf8.csv"
        ) from error


def _first_row(text: str, separator: str) -> list[str]:
    """The header as a separator gives it; nothing where it is no CSV."""
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        return [cell.strip() for cell in next((cells for cells in rows if cells), [])]
    except csv.Error:
        return []


def _rows(file: Path, text: str, separator: str) -> tuple[list[list[str]], list[int]]:
    """Stripped cells, and the number of the line that each row begins on."""
    rows: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):  # a blank line is no row
                rows.append([cell.strip() for cell in cells])
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        advice = (
            'a quote is opened here and not closed; close it, or write "" for a quote inside a cell'
            if "unexpected end" in str(error) or "field larger" in str(error)
            else 'expected CSV: a cell with a comma or a quote in it stands in quotes, as "a, ""b"""'
        )
        raise DataError(f"{file}, line {line}: {error}; {advice}") from error
    return rows, lines


def _named(header: Sequence[str], asked: Sequence[str]) -> list[str]:
    """The header with the names that are asked for, where it writes one of them in another case."""
    names = [name for name in asked if name not in header]
    folded = {name.casefold(): name for name in names}
    return [folded.get(name.casefold(), name) for name in header]


def _check_header(file: Path, header: Sequence[str], required: Sequence[str]) -> None:
    for name in required:
        if name not in header:
            raise DataError(f"{file}, line 1: has no column {name!r}.{_advice(name, header)}")
    named = [name for name in header if name]
    if len(set(named)) != len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise DataError(f"{file}, line 1: column {quoted(twice)} stands there twice; rename one")


def _advice(name: str, header: Sequence[str]) -> str:
    """What to do about a column that is not there."""
    known = [column for column in header if column]
    words = PATH_WORDS if name == "path" else LABEL_WORDS if name == "label" else ()
    likely = next((column for column in known if column.casefold().replace(" ", "_") in words), None)
    columns = ", ".join(quoted(column) for column in known[:ALSO]) + (" .." if len(known) > ALSO else "")
    if likely is not None:
        likely = quoted(likely)
        what = f"Rename {likely} to 'path' in line 1" if name == "path" else f"Type: --labels {likely}"
        return f" Got the columns {columns}. {what}"
    hint = "" if name == "path" else " Name the label columns with --labels."
    return f"{nearest(name, known)}{hint}" if known else f" Got {columns}"


def _check_row(table: Table, number: int, row: list[str], header: Sequence[str]) -> None:
    """A row has a cell a column; it may have empty ones after them."""
    if len(row) < len(header) - sum(not name for name in header) or any(row[len(header) :]):
        columns = ",".join(name for name in header[:ALSO])
        raise table.error(number, f"got {len(row)} cells, expected {len(header)}: {columns}")
    for position, name in enumerate(header[: len(row)]):
        if not name and row[position]:
            raise table.error(
                number,
                f"got {quoted(row[position])} in column {position + 1}, which has no name in line 1. Name it",
            )
