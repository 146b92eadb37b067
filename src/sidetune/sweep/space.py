"""The search space: which fields of the recipe a sweep draws, and from what.

train.lr: {log: [1e-4, 1e-2]}         a number, evenly on a log scale
side.drop_path: {linear: [0, 0.3]}    a number, evenly
side.rank: [4, 8, 16]                 one of a list
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from sidetune.blend import AUTO
from sidetune.errors import RecipeError, RequestError, nearest
from sidetune.recipe import Recipe
from sidetune.sides import SOLVED

Value: TypeAlias = bool | int | float | str | None
EXAMPLE = "train.lr: {log: [1e-4, 1e-2]}"
# Fields that all members of a sweep share: one pass over one store, in batches that they have in common,
# and every trial runs for the same epochs, or halving would compare what cannot be compared.
SHARED = {
    "side": ("name", "form"),
    "train": ("epochs", "batch_size", "select", "precision", "order_seed", "shuffle_window"),
}
SEARCHED = {
    "data": ("label_smoothing", "class_weights", "focal_gamma")
}  # the others decide what the data are


@dataclass(frozen=True)
class Choice:
    """One of a list.

    Args:
        values: at least one, each once.
    """

    values: tuple[Value, ...]

    @property
    def tried(self) -> tuple[Value, ...]:
        """Values that a recipe must take for the whole domain to be good."""
        return self.values

    def contains(self, value: Value) -> bool:
        """Whether it can be drawn."""
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values)

    def to_json(self) -> Any:  # noqa: ANN401 - as the YAML spells it
        """As the YAML spells it."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A number between two.

    Args:
        low: drawn, too.
        high: drawn, too.
        log: evenly on a log scale.
        whole: integers alone.
    """

    low: float
    high: float
    log: bool
    whole: bool = False

    @property
    def tried(self) -> tuple[Value, ...]:
        """Values that a recipe must take for the whole domain to be good."""
        return tuple(range(int(self.low), int(self.high) + 1)) if self.whole else (self.low, self.high)

    def contains(self, value: Value) -> bool:
        """Whether it can be drawn."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def to_json(self) -> Any:  # noqa: ANN401 - as the YAML spells it
        """As the YAML spells it."""
        return {"log" if self.log else "linear": [self.low, self.high]}


Domain: TypeAlias = Choice | Range
Space: TypeAlias = dict[str, Domain]


def default_space(recipe: Recipe) -> Space:
    """What is drawn unless a file says otherwise: rank, rate, decay if none is given, drop-path, smoothing.

    The rate's decades are those that the side networks' papers search (1e-4 .. 1e-2). Drop-path reaches past
    their values (0 .. 0.2), and decay from next to none to where networks no longer fit their images.
    Pooling is left out: another than the mean helped no side (docs/log.md), and trials that differ in it
    cannot share their products.

    Args:
        recipe: its side says which fields there are.
    """
    space: Space = {
        "side.rank": Choice((4, 8, 16)),
        "train.lr": Range(1e-4, 1e-2, log=True),
        "side.drop_path": Range(0.0, 0.3, log=False),
    }
    if recipe.train.weight_decay is None:
        space["train.total_decay"] = Range(0.1, 10.0, log=True)
    if recipe.data.task != "regress":
        space["data.label_smoothing"] = Range(0.0, 0.2, log=False)
    fields = type(recipe.side).model_fields
    return {
        name: domain
        for name, domain in space.items()
        if not name.startswith("side.") or name.partition(".")[2] in fields
    }


def read_space(path: Path, recipe: Recipe) -> Space:
    """The search space of a YAML file.

    Raises:
        RequestError: there is no such file, or it is no YAML mapping.
        RecipeError: a field is unknown or shared by all trials, or a value does not fit it.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"--search {path} cannot be read: {reason}. Write lines such as {EXAMPLE}"
        ) from error
    if not isinstance(found, Mapping) or not found:
        raise RequestError(
            f"--search {path} holds {type(found).__name__}, expected a line a field. Write lines such as "
            f"{EXAMPLE}"
        )
    return {str(name): _domain(str(name), asked, recipe) for name, asked in found.items()}


def check_space(space: Space, recipe: Recipe) -> None:
    """Every value that a space can draw must make a recipe.

    Raises:
        RecipeError: the side is solved, ridge's share is chosen after training, or a value does not fit.
    """
    if recipe.head.ridge == AUTO:
        raise RecipeError(
            "head.ridge is 'auto', which is chosen when training is done, and a sweep compares trials while "
            "they train. Leave it out, and search it: head.ridge: [0, 0.3, 0.6]"
        )
    if recipe.side.name in SOLVED:
        raise RecipeError(
            f"side {recipe.side.name!r} is solved, not trained: it has no learning rate to search, and "
            "chooses its own regularisation in `sidetune fit`. Type: --side losa"
        )
    for name, domain in space.items():
        for value in domain.tried:
            apply(recipe, {name: value})


def apply(recipe: Recipe, values: Mapping[str, Value]) -> Recipe:
    """The recipe with these fields set.

    Raises:
        RecipeError: a field is unknown, or a value does not fit it.
    """
    fields = recipe.model_dump()
    for name, value in values.items():
        part, _, field = name.partition(".")
        fields[part][field] = value
    return Recipe.build(fields)


def current(recipe: Recipe, space: Space) -> dict[str, Value]:
    """The recipe's own value of every field of a space."""
    fields = recipe.model_dump()
    return {name: fields[part][field] for name in space for part, _, field in [name.partition(".")]}


def _domain(name: str, asked: object, recipe: Recipe) -> Domain:
    kind = _kind(name, recipe)
    if isinstance(asked, list) and asked:
        values = tuple(_value(name, one, kind) for one in asked)
        if len(set(map(repr, values))) < len(values):
            raise RecipeError(f"--search: {name} lists a value twice: {asked}. Give each once")
        return Choice(values)
    if isinstance(asked, Mapping) and len(asked) == 1:
        (scale, bounds), *_ = asked.items()
        if scale in ("log", "linear") and isinstance(bounds, list) and len(bounds) == 2:
            low, high = (_number(name, bound) for bound in bounds)
            whole = kind is int
            fits = low < high and (low > 0 or scale == "linear")
            if fits and not (whole and (low % 1 or high % 1)):
                return Range(int(low) if whole else low, int(high) if whole else high, scale == "log", whole)
    raise RecipeError(
        f"--search: {name} is {str(asked)[:200]!r}, expected a list of values, {{log: [low, high]}} with 0 < "
        f"low < high, or {{linear: [low, high]}}, whole where the setting is. Write lines such as {EXAMPLE}"
    )


def _kind(name: str, recipe: Recipe) -> Any:  # noqa: ANN401 - a field's annotation
    """The annotation of a field that can be searched.

    Raises:
        RecipeError: it is unknown, or all trials share it.
    """
    known = {
        f"{part}.{field}": info.annotation
        for part in ("side", "head", "train", "data")
        for field, info in type(getattr(recipe, part)).model_fields.items()
        if field not in SHARED.get(part, ()) and field in SEARCHED.get(part, (field,))
    }
    if name in known:
        return known[name]
    part, _, field = name.partition(".")
    if field in recipe.model_dump().get(part, {}):
        raise RecipeError(
            f"--search: {name} is shared by all trials: they read one store in the same batches for the same "
            f"epochs. Type: --set {name}=.. for all of them, and search one of {', '.join(sorted(known))}"
        )
    raise RecipeError(f"--search: no setting {name!r}.{nearest(name, known)}")


def _value(name: str, value: object, kind: object) -> Value:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise RecipeError(
            f"--search: {name} lists {str(value)[:200]!r}, expected numbers or words. Write: {name}: [a, b]"
        )
    number = isinstance(value, str) and "float" in str(kind)  # YAML reads 1e-4 as a word
    return _number(name, value) if number else value


def _number(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    raise RecipeError(
        f"--search: {name} has the bound {str(value)[:200]!r}, expected a finite number. Write lines such as "
        f"{EXAMPLE}"
    )
