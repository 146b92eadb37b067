"""What the commands share: their options, where they print, the quick start, and an example of each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sidetune.progress import say

# Groups of options in --help; an option without one is about the result.
IMAGES, BACKBONE, RECIPE = "Images and labels", "Backbone and features", "Side network and recipe"
FLEET = "Several networks in one pass"
Json = Annotated[bool, typer.Option("--json", metavar="", help="One JSON object on the last line of stdout.")]

Task = Annotated[
    str, typer.Option(metavar="TASK", rich_help_panel=IMAGES, help="classify, multilabel or regress.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        rich_help_panel=IMAGES,
        help="The CSV's label columns, as a,b,c; default: label. classify: a network a column.",
    ),
]
EvalLabels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        rich_help_panel=IMAGES,
        help="The CSV's label columns, as a,b,c; default: those of the run.",
    ),
]

Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="A folder of class folders, a VTAB folder, or a CSV file.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `fit` finished.")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", file_okay=False, help="Where the result goes.")]
BackboneName = Annotated[
    str,
    typer.Option("--backbone", metavar="NAME", rich_help_panel=BACKBONE, help="demo, toy, or timm:MODEL."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", rich_help_panel=BACKBONE, help="The backbone's weights: a file, a folder, or hub."
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        metavar="PX", rich_help_panel=BACKBONE, help="Image side in pixels; default: the backbone's own."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PART.FIELD=VALUE",
        rich_help_panel=RECIPE,
        help="Any field of the recipe, as side.rank=16; may be repeated.",
    ),
]
Members = Annotated[
    str | None,
    typer.Option(
        metavar="A=X,Y;B=U,V",
        rich_help_panel=FLEET,
        help="Train every combination, as 'lr=1e-3,3e-3;seed=0,1'.",
    ),
]
Folds = Annotated[
    str | None,
    typer.Option(
        metavar="K",
        rich_help_panel=FLEET,
        help="Cross-validation in K folds, or column: the CSV's own.",
    ),
]
EnsembleOption = Annotated[
    bool,
    typer.Option(
        "--ensemble", metavar="", rich_help_panel=FLEET, help="Keep the members that answer best together."
    ),
]
OwnOrder = Annotated[
    bool,
    typer.Option(
        "--own-order", metavar="", rich_help_panel=FLEET, help="Each seed reads batches in its own order."
    ),
]
Side = Annotated[str, typer.Option(metavar="NAME", rich_help_panel=RECIPE, help="See `sidetune sides`.")]
Live = Annotated[
    bool,
    typer.Option(
        "--live", metavar="", rich_help_panel=BACKBONE, help="Run the backbone at every epoch; store nothing."
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        file_okay=False,
        rich_help_panel=BACKBONE,
        help="Where features are kept; default: under $SIDETUNE_STORES, or .sidetune/stores.",
    ),
]
ServePrecision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        rich_help_panel=BACKBONE,
        help="Of the backbone: fp32, bf16 or fp16; default: as it was trained.",
    ),
]
MoreViews = Annotated[
    int,
    typer.Option(
        "--views",
        metavar="K",
        rich_help_panel=BACKBONE,
        help="More views of each image in the store: mirrored, then seeded crops.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames",
        metavar="N",
        rich_help_panel=IMAGES,
        help="The samples are clips, and a network reads N frames of each at once.",
    ),
]
FramesStored = Annotated[
    int | None,
    typer.Option(
        "--frames-stored",
        metavar="N",
        rich_help_panel=BACKBONE,
        help="Frames of a clip in the store, evenly spaced; default: 16.",
    ),
]
Views = Annotated[
    int | None,
    typer.Option(
        "--views",
        metavar="K",
        rich_help_panel=BACKBONE,
        help="Average over K more views of each image; default: as the run was scored.",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", rich_help_panel=BACKBONE, help="auto, cpu or cuda.")]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", metavar="", rich_help_panel=IMAGES, help="An image that cannot be read is an error."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", metavar="", help="No progress.")]

QUICK_START = """\
sidetune doctor                          what is here, what is missing
sidetune fit photos/ --out runs/first    a folder a class, or a CSV
sidetune predict runs/first new.jpg      what the run sees in an image"""

# A command line that would have worked, for each command that needs arguments.
EXAMPLES = {
    "fit": "sidetune fit photos/ --out runs/first",
    "sweep": "sidetune sweep photos/ --trials 64 --out runs/sweep",
    "extract": "sidetune extract photos/ --out features/photos",
    "eval": "sidetune eval runs/first photos/",
    "predict": "sidetune predict runs/first new.jpg",
    "bench": "sidetune bench side",
    "bench cost": "sidetune bench cost --cases losa,lora",
    "bench accuracy": "sidetune bench accuracy tasks/ --out runs/accuracy",
    "bench order": "sidetune bench order --out runs/order",
    "bench stream": "sidetune bench stream --model vit_large_patch14_dinov2 --frames 8 --batch 8",
    "bench vtab": "sidetune bench vtab vtab-1k/ --out runs/vtab",
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


def number_or_word(text: str | None) -> int | str | None:
    """``5`` as a number, ``column`` as it is."""
    return int(text) if text is not None and text.strip().isdecimal() else text


def columns(labels: str | None) -> list[str] | None:
    """The names in ``a,b,c``; None for none."""
    return None if labels is None else [name.strip() for name in labels.split(",")]


def build_recipe(  # noqa: PLR0913 - one a option that every command with a recipe has
    backbone: str,
    size: int | None,
    weights: str | None,
    settings: list[str] | None,
    *,
    task: str,
    labels: str | None,
    side: str = "losa",
    features: dict[str, Any] | None = None,
    clips: tuple[int | None, int | None] = (None, None),
    fleet: dict[str, Any] | None = None,
) -> Any:  # noqa: ANN401 - Recipe, imported late so that --help is quick
    """The recipe that options ask for; of clips the frames that are read, and that are stored.

    Raises:
        RecipeError: an unknown setting, or a value that does not fit.
    """
    from sidetune.recipe import Recipe

    fields = {
        "data": {"task": task, "labels": columns(labels)},
        "backbone": {"name": backbone, "size": size, "weights": weights},
        "features": features or {},
        "clips": {
            name: given for name, given in zip(("frames", "stored"), clips, strict=True) if given is not None
        },
        "side": {"name": side},
        "fleet": fleet or {},
    }
    return Recipe.build(fields, settings or ())


def first_line(documented: object) -> str:
    """Of its docstring."""
    return (inspect.getdoc(documented) or "").split("\n")[0]


def print_names(lines: dict[str, str], as_json: bool) -> None:
    """Names and what they stand for."""
    if as_json:
        print_json(lines)
        return
    from sidetune.tables import print_names as print_table

    print_table(lines)


def print_json(value: dict[str, Any]) -> None:
    """One object on one line of stdout."""
    print(json.dumps(value, default=str))  # noqa: T201


def log_skipped(count: int, total: int, remark: str = "") -> None:
    """One line on stderr where images could not be read."""
    if count:
        say(f"{count} of {total} images could not be read{remark}")
