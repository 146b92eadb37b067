"""What the commands share: where they print, `--json`, the quick start, and an example of each."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from sidetune.progress import printable

# Groups of options in --help; an option without one is about the result.
IMAGES, BACKBONE, RECIPE = "Images and labels", "Backbone and features", "Side network and recipe"
Json = Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on the last line of stdout.")]

Task = Annotated[
    str, typer.Option(metavar="TASK", rich_help_panel=IMAGES, help="classify, multilabel or regress.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", rich_help_panel=IMAGES, help="The CSV's label columns, as a,b,c; default: label."
    ),
]

QUICK_START = """\
sidetune doctor                          what is here, what is missing
sidetune fit photos/ --out runs/first    a folder a class, or a CSV
sidetune predict runs/first new.jpg      what the run sees in an image"""

# A command line that would have worked, for each command that needs arguments.
EXAMPLES = {
    "fit": "sidetune fit photos/ --out runs/first",
    "extract": "sidetune extract photos/ --out features/photos",
    "eval": "sidetune eval runs/first photos/",
    "predict": "sidetune predict runs/first new.jpg",
    "store": "sidetune store ls",
    "store gc": "sidetune store gc features/photos",
    "store verify": "sidetune store verify features/photos",
}


def example(arguments: Sequence[str]) -> str | None:
    """A command line that works, for the command that these arguments name; None where none is known.

    Args:
        arguments: of the command line, without the program's name.
    """
    words = [word for word in arguments if not word.startswith("-")]
    return EXAMPLES.get(" ".join(words[:2])) or EXAMPLES.get(words[0] if words else "")


def columns(labels: str | None) -> list[str] | None:
    """The names in ``a,b,c``; None for none."""
    return None if labels is None else [name.strip() for name in labels.split(",")]


def print_json(value: dict[str, Any]) -> None:
    """One object on one line of stdout."""
    print(json.dumps(value, default=str))  # noqa: T201


def log(text: str) -> None:
    """A line on stderr, at once."""
    print(printable(text), file=sys.stderr, flush=True)  # noqa: T201
