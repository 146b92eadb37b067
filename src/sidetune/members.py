"""``--members 'lr=1e-3,3e-3;seed=0,1'``: what members of a fleet differ in, every combination of it.

A name is a setting as ``--set`` takes it, or its last part where that is plain: ``rank`` is ``side.rank``,
``side`` is ``side.name``. Data, backbone and features are what all members share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sidetune.baselines import BASELINES
from sidetune.errors import RecipeError, nearest
from sidetune.recipe import Recipe
from sidetune.recipe_checks import BEST_OF_FOLDS, check_fleet
from sidetune.settings import NoAliases
from sidetune.sides import SIDES, SOLVED

OWN: dict[str, tuple[str, ...]] = {  # what a member may have of its own; None of data, backbone and features
    "data": ("class_weights", "label_smoothing", "focal_gamma"),
    "head": ("norm", "ridge"),
    "train": (
        *("epochs", "batch_size", "lr", "weight_decay", "total_decay", "precision"),
        *("warmup", "clip_norm", "select", "seed", "order_seed"),
    ),
}
EXAMPLE = "Type: --members 'lr=1e-3,3e-3;seed=0,1'"


@dataclass(frozen=True)
class Variation:
    """One of the recipes of a fleet.

    Args:
        label: what sets it apart, as it was typed: ``lr=1e-3 seed=0``; the side's name where nothing does.
        recipe: whole, for one member.
        choices: setting -> value, of those that vary.
    """

    label: str
    recipe: Recipe
    choices: dict[str, Any]


def variations(recipe: Recipe) -> list[Variation]:
    """The recipes that a run's fleet trains: one where ``fleet.members`` says nothing.

    Raises:
        RecipeError: a setting is unknown, shared by all members, or does not fit; or two members are equal.
    """
    check_fleet(recipe)
    alone = Recipe.build({**recipe.model_dump(mode="json"), "fleet": {}})
    if recipe.fleet.members is None:
        return [Variation(recipe.side.name, alone, {})]
    axes = _axes(recipe.fleet.members)
    found: dict[str, Variation] = {}
    for values in itertools.product(*axes.values()):
        choices = dict(zip(axes, values, strict=True))
        label = " ".join(f"{_short(key)}={_text(value)}" for key, value in choices.items())
        try:
            one = _varied(alone, choices, recipe)
        except RecipeError as error:
            raise RecipeError(f"--members, {label}: {error}") from error
        if one.hash in found:
            raise RecipeError(
                f"--members: {found[one.hash].label} and {label} are one recipe. Leave one of the two out"
            )
        found[one.hash] = Variation(label, one, choices)
    return list(found.values())


def _axes(text: str) -> dict[str, list[Any]]:
    """Setting -> its values."""
    axes: dict[str, list[Any]] = {}
    for part in filter(None, (one.strip() for one in text.split(";"))):
        name, separator, values = part.partition("=")
        if not separator or not values.strip():
            raise RecipeError(f"--members got {part!r}, expected setting=value,value. {EXAMPLE}")
        key = _setting(name.strip())
        if key in axes:
            raise RecipeError(f"--members names {key} twice. Join their values with commas")
        try:
            axes[key] = yaml.load(f"[{values}]", Loader=NoAliases)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"--members: {part!r} cannot be read. {EXAMPLE}") from error
    if not axes:
        raise RecipeError(f"--members is empty. {EXAMPLE}")
    return axes


def _setting(name: str) -> str:
    """The whole name of a setting that members may have of their own."""
    sides = sorted({field for side in SIDES if side not in SOLVED for field in _side_fields(side)})
    own = [f"{part}.{field}" for part, fields in OWN.items() for field in fields]
    own += [f"side.{field}" for field in sides]
    short = {key.rpartition(".")[2]: key for key in own} | {"side": "side.name"}
    short.pop("name", None)
    if name in own:
        return name
    if name in short:
        return short[name]
    shared = [
        f"{part}.{field}"
        for part, fields in Recipe().model_dump().items()
        for field in fields
        if part not in ("side", "fleet")
    ]
    if whole := [key for key in shared if name in (key, key.partition(".")[2]) and name != "name"]:
        raise RecipeError(
            f"--members got {name!r}, which all members of a run share. Type: --set {whole[0]}=.., or fit "
            "twice"
        )
    raise RecipeError(f"--members: no setting {name!r}.{nearest(name, sorted(short))} {EXAMPLE}")


def _side_fields(name: str) -> Sequence[str]:
    """The settings of a side, by its name."""
    return tuple(Recipe.build({"side": {"name": name}}).side.model_dump())


def _varied(recipe: Recipe, choices: dict[str, Any], asked: Recipe) -> Recipe:
    """A recipe for one member, with choices of its own.

    Args:
        recipe: of a member without them.
        choices: setting -> value.
        asked: the run's.
    """
    fields = recipe.model_dump(mode="json")
    side = choices.get("side.name", fields["side"]["name"])
    if side != fields["side"]["name"]:
        fields["side"] = {"name": side}  # another side has other settings
    for key, value in choices.items():
        part, _, field = key.partition(".")
        fields[part][field] = value
    train = fields["train"]
    if not asked.fleet.own_order and train["order_seed"] is None and train["seed"] != recipe.train.seed:
        train["order_seed"] = recipe.train.seed  # one order for all: a batch is read once
    varied = Recipe.build(fields)
    if varied.side.name in SOLVED:
        raise RecipeError(
            f"side={varied.side.name} is solved, not trained, and every run scores it. "
            "Type: --members 'side=losa,last'"
        )
    if varied.side.name in BASELINES:
        raise RecipeError(
            f"side={varied.side.name} is a baseline, which is measured and not kept. "
            f"Type: sidetune bench accuracy --methods losa,{varied.side.name}"
        )
    if asked.fleet.folds is not None and varied.train.select == "best":
        raise RecipeError(f"{BEST_OF_FOLDS}. Type: select=last, or leave --folds out")
    return varied


def _short(key: str) -> str:
    return "side" if key == "side.name" else key.rpartition(".")[2]


def _text(value: Any) -> str:  # noqa: ANN401 - any YAML value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
