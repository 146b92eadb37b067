"""`sidetune bench accuracy`: methods on tasks, chosen alike, compared by bounds.

    OUT/TASK/METHOD/     fits, as `ledger` keeps them
    OUT/frozen.json      recipe hashes
    OUT/chosen.json      the last report without test scores
    OUT/accuracy.json    the last one with them

Tasks run one after another. Every method is chosen on training images from a grid of one size (`protocol`);
then its recipe's hash is frozen; then it is trained on train and validation with every seed. Test scores are
computed and shown only when they are asked for, and each time is counted (`ledger`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sidetune.artifact import build_model, find_device
from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone
from sidetune.bench import LOOKS
from sidetune.bench.accuracy.budget import budgets, fill, find_budget, freeze_budget
from sidetune.bench.accuracy.grid import Method, check_grid, check_settings
from sidetune.bench.accuracy.ground import Ground, Opening, add_test, live_ground, open_ground
from sidetune.bench.accuracy.ledger import freeze
from sidetune.bench.accuracy.protocol import Choice, choose, clock, few_shots, finals, shot_fits
from sidetune.bench.accuracy.scoring import Answered, Answers, Table, answered, revealed
from sidetune.bench.accuracy.table import Report
from sidetune.bench.accuracy.tasks import TaskFolder
from sidetune.bench.accuracy.voices import answers
from sidetune.bench.rows import describe_machine
from sidetune.bench.setting import require_images
from sidetune.blend import AUTO
from sidetune.errors import RequestError
from sidetune.files import locked, write_json
from sidetune.recipe import Recipe
from sidetune.sides.losa import LosaRecipe
from sidetune.sides.ridge import RidgeRecipe, beyond_summary


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        tasks: folders, each with its group.
        methods: rows of the table.
        out: where fits, frozen hashes and the report are kept.
        base: data, backbone, features, head and training that all methods share.
        settings: ``part.field=value``, of all methods that have the field.
        seeds: networks a method.
        grid_size: points that every trained method is chosen from.
        minutes: that one training may take in the second table; None: as long as the quickest takes. The
            first command in OUT decides.
        equal_time: whether there is a second table.
        against: names of the methods that all others are compared with.
        stores: a folder with a store a task; None: one store of all, where `fit` keeps it.
        shots: numbers of images a class that methods are trained with, beside all of them.
        also: data sets of the same classes that are answered for as well; with one task alone.
        reveal: show test scores, which is a look.
        looks: file that looks are counted in.
        device: ``auto`` is the GPU where there is one.
        quiet: no progress.
    """

    tasks: tuple[TaskFolder, ...]
    methods: tuple[Method, ...]
    out: Path
    base: Recipe
    settings: tuple[str, ...] = ()
    seeds: int = 3
    grid_size: int = 4
    minutes: float | None = None
    equal_time: bool = True
    against: tuple[str, ...] = ()
    stores: Path | None = None
    shots: tuple[int, ...] = ()
    also: tuple[Path, ...] = ()
    reveal: bool = False
    looks: Path = LOOKS
    device: str = "auto"
    quiet: bool = False


def bench_accuracy(request: Request, backbone: Backbone | None = None) -> Report:
    """Choose, freeze, train, and where it is asked for score.

    Args:
        request: see there.
        backbone: your own, in place of the one that the recipe names.

    Raises:
        RequestError: methods, tasks, options or data are not what they should be.
        BackboneError: a method begins at the pixels, and your backbone does not give them.
        ArtifactError: OUT has frozen other recipes or another time, or a file of it is damaged.
        StoreError: a store belongs to another backbone, or the disk is full.
    """
    _check(request)
    if backbone is None:
        backbone = build_backbone(request.base.backbone.name, **request.base.backbone.arguments())
    require_images(backbone)
    backbone.to(find_device(request.device))
    recipes = {method: method.recipe(request.base, request.settings) for method in request.methods}
    check_settings(request.methods, list(recipes.values()), request.settings)
    pixels = _pixels(recipes, backbone)
    for method, recipe in recipes.items():
        own = pixels.get(method, backbone)
        build_model(recipe, own.spec, 2, own.norm, backbone=own)  # a wrong side is refused here
    pooled = all(m.solved and not beyond_summary(recipe.side) for m, recipe in recipes.items())
    reads = request.base.model_copy(update={"side": RidgeRecipe() if pooled else LosaRecipe()})
    how = Opening(reads, request.out, request.stores, request.quiet)
    with locked(request.out):
        for folder in request.tasks if request.equal_time else ():
            # another time is refused before anything trains
            find_budget(request.out, folder.name, request.minutes)
        rows: list[Answered] = []
        for folder in request.tasks:
            ground = open_ground(folder, backbone, how)
            for path in request.also:
                ground = add_test(ground, path, how)
            live = {one: live_ground(ground, one) for one in set(pixels.values())}
            grounds = {method: live[pixels[method]] if method in pixels else ground for method in recipes}
            rows += _run_task(request, grounds, recipes)
        if request.reveal:
            rows = revealed(rows, request.looks)
        report = Report(
            {table: tuple(row.outcome for row in rows if row.table == table) for table in get_args(Table)},
            request.against,
            describe_machine(backbone.device, _setting(request, backbone)),
        )
        # what was chosen must not stand where scores were
        write_json(request.out / ("accuracy.json" if request.reveal else "chosen.json"), report.to_json())
    return report


def _setting(request: Request, backbone: Backbone) -> dict[str, Any]:
    names = [folder.name for folder in request.tasks]
    return {
        "device": str(backbone.device),
        "backbone": backbone.identity.to_json(),
        "seeds": request.seeds,
        "grid_size": request.grid_size,
        "minutes": request.minutes,
        "looks": str(request.looks),
        "equal_time": budgets(request.out, names) if request.equal_time else {},
    }


def _check(request: Request) -> None:
    check_grid(request.grid_size)
    if request.seeds < 1:
        raise RequestError(f"--seeds is {request.seeds}, expected 1 or more. Type: --seeds 3")
    if request.minutes is not None and not request.minutes > 0:
        raise RequestError(f"--minutes is {request.minutes:g}, expected more than 0. Type: --minutes 5")
    named = [method.name for method in request.methods]
    for name in request.against:
        if name not in named:
            raise RequestError(
                f"--against has {name!r}, which is none of the methods: {', '.join(named)}. "
                f"Type: --against {named[0]}"
            )
    if any(shots < 1 for shots in request.shots):
        raise RequestError(f"--shots has {min(request.shots)}, expected 1 or more. Type: --shots 1,2,4,8,16")
    if request.also and len(request.tasks) > 1:
        raise RequestError(
            f"--also-test is for one task, got {len(request.tasks)}. Type: --tasks {request.tasks[0].name}"
        )
    if request.base.train.select == "best":
        raise RequestError(
            "train.select is 'best', and the protocol takes the last epoch. Leave it at 'last'"
        )
    if request.base.head.ridge == AUTO:
        raise RequestError(
            "head.ridge is 'auto', which is no point of a grid. Leave it out. Type: --methods losa,losa+ridge"
        )


def _pixels(recipes: Mapping[Method, Recipe], backbone: Backbone) -> dict[Method, Backbone]:
    """The same backbone, giving its input, for the methods that begin there."""
    num_blocks = len(backbone.spec.blocks)
    methods = [method for method, recipe in recipes.items() if method.reads_image(recipe, num_blocks)]
    if not methods:
        return {}
    return dict.fromkeys(methods, backbone.reading(("image",)))


def _run_task(
    request: Request, grounds: Mapping[Method, Ground], recipes: Mapping[Method, Recipe]
) -> list[Answered]:
    """All tables of a task, without scores."""
    seeds = range(request.seeds)
    choices = {m: choose(grounds[m], m, recipe, request.grid_size) for m, recipe in recipes.items()}
    chosen = {
        m: _resolved(choice.recipe, grounds[m]) for m, choice in choices.items() if choice.recipe is not None
    }
    frozen = freeze(request.out, _pairs(grounds, chosen, ""))
    entries = {m: finals(grounds[m], m, recipe, seeds) for m, recipe in chosen.items()}
    costs = {m: clock(grounds[m], m, recipe, seeds) for m, recipe in chosen.items()}
    rows: list[Answered] = []
    for m, choice in choices.items():
        found = Answers(m, chosen.get(m), entries.get(m, ()), choice.score, costs.get(m))
        rows += answered(grounds[m], found, "grid", wanted=request.seeds, frozen=frozen)
    if request.equal_time:
        rows += _at_equal_time(request, grounds, choices, chosen, costs)
    for shots in request.shots:
        rows += _with_shots(request, grounds, recipes, shots)
    return rows


def _at_equal_time(
    request: Request,
    grounds: Mapping[Method, Ground],
    choices: Mapping[Method, Choice],
    chosen: Mapping[Method, Recipe],
    costs: Mapping[Method, Mapping[str, float]],
) -> Iterator[Answered]:
    """The second table: each chosen recipe with the epochs that fit."""
    task = next(iter(grounds.values())).name
    trained = {m: costs[m] for m in chosen if not m.solved}
    budget = freeze_budget(request.out, task, request.minutes, trained)
    limited = dict(chosen) if budget is None else fill(chosen, trained, budget)
    frozen = freeze(request.out, _pairs(grounds, limited, " at equal time"))
    for m, choice in choices.items():
        recipe, entries, cost = limited.get(m), [], dict(costs.get(m, {}))
        over = budget is not None and m in trained and not budget.epochs(trained[m])
        if recipe is not None:
            entries = finals(grounds[m], m, recipe, range(request.seeds))
            if not m.solved:
                cost["epochs"] = recipe.train.epochs or 0
        found = Answers(m, recipe, entries, choice.score, cost, over=over)
        yield from answered(grounds[m], found, "time", wanted=request.seeds, frozen=frozen)


def _with_shots(
    request: Request, grounds: Mapping[Method, Ground], recipes: Mapping[Method, Recipe], shots: int
) -> Iterator[Answered]:
    """The table of k images a class."""
    usual = {m: few_shots(grounds[m], m, recipe, shots) for m, recipe in recipes.items()}
    frozen = freeze(request.out, _pairs(grounds, usual, f", {shots} shots"))
    for m, recipe in usual.items():
        fits = shot_fits(grounds[m], m, recipe, range(request.seeds), shots)
        entries = answers(grounds[m], m, fits)
        found = Answers(m, recipe, entries, shots=shots)
        yield from answered(grounds[m], found, "shots", wanted=request.seeds, frozen=frozen)


def _pairs(
    grounds: Mapping[Method, Ground], chosen: Mapping[Method, Recipe], remark: str
) -> dict[str, dict[str, Any]]:
    """What is frozen of a task."""
    return {
        f"{grounds[method].name}/{method.name}{remark}": {
            "recipe": recipe.hash,
            "data": grounds[method].data,
            "backbone": grounds[method].job.backbone.identity.digest,
        }
        for method, recipe in chosen.items()
    }


def _resolved(recipe: Recipe, ground: Ground) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.resolved(len(ground.rows))})
