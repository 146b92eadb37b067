"""Methods, and what each is tried with: a grid of the same size for every one that is trained.

solved     ridge-last, ridge, linear: closed form or convex, with a choice of their own
fleet      side networks: the points of the grid train in one pass, and so do the seeds
alone      baselines: one network after another
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidetune.baselines import BASELINES
from sidetune.errors import RecipeError, RequestError, nearest
from sidetune.recipe import Recipe
from sidetune.sides import SIDES, SOLVED

# Peak learning rates, the usual one first: of equal scores it wins. Each spans a factor of 30.
RATES = (1e-3, 3e-3, 3e-4, 1e-2)
RATES_OF: dict[str, tuple[float, ...]] = {
    "full": (1e-4, 3e-5, 3e-4, 1e-5),  # every weight moves: ten times lower
    "bitfit": (3e-3, 1e-3, 1e-2, 3e-2),  # few numbers move: higher
    "norms": (3e-3, 1e-3, 1e-2, 3e-2),
    "vpt": (3e-3, 1e-3, 1e-2, 3e-2),
}
DECAYS = (2.0, 6.0)  # over the whole training: the other dial
DECAYS_OF_FULL = (0.05, 1e-3)  # AdamW's own: the backbone's weights are to stay near what they are
CHOSEN = ("train.lr", "train.weight_decay", "train.total_decay")
MOST_POINTS = len(RATES) * len(DECAYS)
WITH_RIDGE = "+ridge"

# Names of methods that are a side or a baseline with other fields than its own defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "ridge-last": {"name": "ridge", "taps": "last"},
    "ridge-std": {"name": "ridge", "statistics": "cls+mean+std"},
    "ridge-quadrants": {"name": "ridge", "statistics": "cls+mean+quadrants"},
    "ridge-all": {"name": "ridge", "statistics": "cls+mean+std+quadrants"},
    "lora-linear": {"name": "lora", "layers": "linear"},
    **{f"lora-last{k}": {"name": "lora", "blocks": k} for k in (1, 2, 3, 6)},
}
WITH_NORM = ("full", "norms")  # these train the final norm, too
IN_BF16 = "-bf16"  # a baseline whose name ends so trains under autocast: the backbone's blocks take less time


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name: as it was typed.
        side: fields of `Recipe.side`.
        seeds: that it is trained with; None: as many as all others.
        with_ridge: whether ridge has a share in what it answers.
        in_bf16: whether it trains under bf16 autocast on a CPU, too.
    """

    name: str
    side: Mapping[str, Any] = field(hash=False)
    seeds: int | None = None
    with_ridge: bool = False
    in_bf16: bool = False

    @classmethod
    def parse(cls, text: str) -> Method:
        """``losa``, or ``lora:1`` for one seed alone.

        Raises:
            RequestError: the number of seeds is none.
        """
        name, colon, seeds = text.strip().partition(":")
        if colon and not (seeds.isdecimal() and int(seeds) > 0):
            raise RequestError(f"--methods has {text!r}, expected NAME or NAME:SEEDS. Type: --methods {name}")
        plain = name.removesuffix(WITH_RIDGE).removesuffix(IN_BF16)
        with_ridge, in_bf16 = name.endswith(WITH_RIDGE), name.removesuffix(WITH_RIDGE).endswith(IN_BF16)
        known = (*SIDES, *BASELINES, *VARIANTS)
        if plain not in known:
            raise RequestError(f"--methods has no method named {plain!r}.{nearest(plain, known)}")
        side = VARIANTS.get(plain, {"name": plain})
        if in_bf16 and side["name"] not in BASELINES:
            raise RequestError(
                f"--methods has {text!r}: bf16 is for baselines, which run the backbone's blocks. Type: "
                f"--methods {plain}"
            )
        if with_ridge and (side["name"] not in SIDES or side["name"] in SOLVED):
            raise RequestError(
                f"--methods has {text!r}: ridge has a share in what a trained side network answers. "
                "Type: --methods losa+ridge"
            )
        return cls(name, side, int(seeds) if colon else None, with_ridge, in_bf16)

    @property
    def solved(self) -> bool:
        """Whether it has a closed form or a convex one: no grid and no seeds."""
        return self.side["name"] in SOLVED

    @property
    def in_fleet(self) -> bool:
        """Whether its networks train side by side; the baselines' train one after another."""
        return self.side["name"] in SIDES

    def of(self, seeds: Sequence[int]) -> Sequence[int]:
        """Those of the seeds that it is trained with."""
        return seeds if self.seeds is None else seeds[: self.seeds]

    def reads_image(self, recipe: Recipe, num_blocks: int) -> bool:
        """Whether it begins at the pixels, before anything that a store holds.

        Args:
            recipe: its own.
            num_blocks: of the backbone.
        """
        baseline = BASELINES.get(recipe.side.name)
        return baseline is not None and baseline.first_tap(num_blocks, recipe.side) == "image"

    def recipe(self, base: Recipe, settings: Sequence[str] = ()) -> Recipe:
        """What it trains with before anything is chosen.

        Args:
            base: data, backbone, features, head and training, which all methods share.
            settings: ``part.field=value``; those of the side are taken by the methods that have the field.

        Raises:
            RecipeError: there is no such method, or a setting does not fit.
        """
        fields = base.model_dump(mode="json")
        fields["side"] = dict(self.side)
        if self.solved:
            fields["train"] = {}  # nothing of it has a part in a solution
        if self.side["name"] in WITH_NORM:
            fields["head"]["norm"] = "trained"
        if self.in_bf16:
            fields["train"]["precision"] = "bf16"
        try:
            own = Recipe.build(fields)
        except RecipeError as error:
            raise RecipeError(f"method {self.name!r}: {error}") from error
        known = type(own.side).model_fields
        mine = [one for one in settings if _side_field(one) is None or _side_field(one) in known]
        return Recipe.build(fields, mine)

    def points(self, size: int) -> Iterator[dict[str, float]]:
        """The grid: fields of `Recipe.train`, the usual point first. Ridge's share is chosen at each of them.

        Args:
            size: how many points.
        """
        rates = RATES_OF.get(str(self.side["name"]), RATES)
        pairs = (rates[:2], rates[2:])  # the usual rates at both decays, then the others
        every = [{"lr": rate, "total_decay": decay} for pair in pairs for decay in DECAYS for rate in pair]
        if self.side["name"] == "full":
            every = [{"lr": rate, "weight_decay": decay} for decay in DECAYS_OF_FULL for rate in rates]
        yield from every[:size]


def at(recipe: Recipe, point: Mapping[str, float]) -> Recipe:
    """A recipe at a point of its grid."""
    train = {name: value for name, value in point.items() if name != "ridge"}
    head = {name: value for name, value in point.items() if name == "ridge"}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"weight_decay": None, **train}),
            "head": recipe.head.model_copy(update=head),
        }
    )


def parse_methods(text: str) -> tuple[Method, ...]:
    """``losa,last,lora:1`` as methods.

    Raises:
        RequestError: a name stands there twice, or there is none.
    """
    methods = tuple(Method.parse(one) for one in text.split(",") if one.strip())
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not methods:
        found = f"{twice[0]!r} twice" if twice else "no method"
        raise RequestError(f"--methods has {found}. Type: --methods ridge,linear,losa,last")
    return methods


def check_grid(size: int) -> None:
    """Refuse a size that is not there.

    Raises:
        RequestError: it is.
    """
    if not 1 <= size <= MOST_POINTS:
        raise RequestError(f"--grid-size is {size}, expected 1 to {MOST_POINTS}. Type: --grid-size 4")


def check_settings(methods: Sequence[Method], recipes: Sequence[Recipe], settings: Sequence[str]) -> None:
    """Refuse a setting of the side that no method takes, and one that every grid chooses.

    Raises:
        RecipeError: names the nearest field, or what chooses it.
    """
    for one in filter(is_chosen, settings):
        path = one.partition("=")[0]
        raise RecipeError(f"{path} is given, and each method's grid chooses it. Leave it out")
    known = {name for recipe in recipes for name in type(recipe.side).model_fields}
    for one in settings:
        name = _side_field(one)
        if name is not None and name not in known:
            named = ", ".join(method.name for method in methods)
            raise RecipeError(f"no method of {named} has the setting side.{name}.{nearest(name, known)}")


def is_chosen(setting: str) -> bool:
    """Whether a ``part.field=value`` is of a field that every grid chooses."""
    return setting.partition("=")[0] in CHOSEN


def _side_field(setting: str) -> str | None:
    """The field in ``side.field=value``; None for a setting of another part."""
    path = setting.partition("=")[0]
    part, _, name = path.partition(".")
    return name if part == "side" else None
