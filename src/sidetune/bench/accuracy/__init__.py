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

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.artifact import build_model, find_device
from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone
from sidetune.bench.accuracy.claims import Outcome
from sidetune.bench.accuracy.grid import Method, check_grid, check_settings
from sidetune.bench.accuracy.ledger import Entry, count_looks, freeze, look
from sidetune.bench.accuracy.protocol import METRIC, Choice, Ground, Images, choose, clock, cut, finals
from sidetune.bench.accuracy.table import Report
from sidetune.bench.accuracy.tasks import TaskFolder
from sidetune.bench.rows import describe_machine
from sidetune.data import load_dataset
from sidetune.data.dataset import Dataset
from sidetune.data.vtab import is_vtab
from sidetune.errors import DataError, RequestError
from sidetune.extract import sample_keys
from sidetune.files import locked, write_json
from sidetune.job import Job
from sidetune.opening import Part, open_jobs
from sidetune.recipe import Recipe
from sidetune.runs import default_store
from sidetune.sides.losa import LosaRecipe
from sidetune.sides.ridge import RidgeRecipe
from sidetune.sources import LiveSource
from sidetune.sweep.score import Choosing, On
from sidetune.tasks import Task

FOLDS = 5  # of train and validation, where the protocol is not VTAB's
LOOKS = Path("results/looks.jsonl")


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
        minutes: that one training may take in the second table; None: as long as the quickest takes.
        equal_time: whether there is a second table.
        against: names of the methods that all others are compared with.
        stores: a folder with a store a task; None: one store of all, where `fit` keeps it.
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
        ArtifactError: OUT has frozen other recipes, or a file of it is damaged.
        StoreError: a store belongs to another backbone, or the disk is full.
    """
    _check(request)
    if backbone is None:
        backbone = build_backbone(request.base.backbone.name, **request.base.backbone.arguments())
    backbone.to(find_device(request.device))
    recipes = {method: method.recipe(request.base, request.settings) for method in request.methods}
    check_settings(request.methods, list(recipes.values()), request.settings)
    pixels = _pixels(request, recipes, backbone)
    for method, recipe in recipes.items():
        own = pixels.get(method, backbone)
        build_model(recipe, own.spec, 2, own.norm, backbone=own)  # a wrong side is refused here
    with locked(request.out):
        tables: list[_Row] = []
        for folder in request.tasks:
            ground = _open(request, folder, recipes, backbone)
            live = {one: _live(ground, one) for one in set(pixels.values())}
            grounds = {method: live[pixels[method]] if method in pixels else ground for method in recipes}
            tables += _run_task(request, grounds, recipes)
        if request.reveal:
            tables = _revealed(request, tables)
        about = {
            "device": str(backbone.device),
            "backbone": backbone.identity.to_json(),
            "seeds": request.seeds,
            "grid_size": request.grid_size,
            "minutes": request.minutes,
        }
        report = Report(
            tuple(row.outcome for row in tables if not row.timed),
            tuple(row.outcome for row in tables if row.timed),
            request.against,
            describe_machine(backbone.device, about),
        )
        # what was chosen must not stand where scores were
        write_json(request.out / ("accuracy.json" if request.reveal else "chosen.json"), report.to_json())
    return report


@dataclass(frozen=True, eq=False)
class _Row:
    """An outcome, with what its scores will be computed from.

    Args:
        outcome: without test scores.
        timed: of the table at equal time.
        dataset: of the task.
        test: its test images.
        entries: of the networks that answered.
        frozen: digest of all that is frozen.
    """

    outcome: Outcome
    timed: bool
    dataset: Dataset
    test: Images
    entries: tuple[Entry, ...]
    frozen: str


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
    if request.base.train.select == "best":
        raise RequestError(
            "train.select is 'best', and the protocol takes the last epoch. Leave it at 'last'"
        )


def _pixels(request: Request, recipes: Mapping[Method, Recipe], backbone: Backbone) -> dict[Method, Backbone]:
    """The backbone once more, giving its input, for the methods that begin there."""
    num_blocks = len(backbone.spec.blocks)
    methods = [method for method, recipe in recipes.items() if method.reads_image(recipe, num_blocks)]
    if not methods:
        return {}
    part = request.base.backbone
    again = build_backbone(part.name, **{**part.arguments(), "taps": ("image",)}).to(backbone.device)
    return dict.fromkeys(methods, again)


def _run_task(
    request: Request, grounds: Mapping[Method, Ground], recipes: Mapping[Method, Recipe]
) -> list[_Row]:
    """Both tables of a task, without scores."""
    seeds = range(request.seeds)
    choices = {m: choose(grounds[m], m, recipe, request.grid_size) for m, recipe in recipes.items()}
    chosen = {m: choice.recipe for m, choice in choices.items() if choice.recipe is not None}
    frozen = freeze(request.out, _pairs(grounds, chosen, ""))
    answers = {m: finals(grounds[m], m, recipe, seeds) for m, recipe in chosen.items()}
    costs = {m: clock(grounds[m], m, recipe, seeds) for m, recipe in chosen.items()}
    rows = [
        _row(grounds[m], choices[m], chosen.get(m), answers.get(m, []), costs.get(m, {}), request, frozen)
        for m in recipes
    ]
    if not request.equal_time:
        return rows
    limited = _cut_all(chosen, costs, request.minutes)
    frozen = freeze(request.out, _pairs(grounds, limited, " at equal time"))
    for m in recipes:
        recipe = limited.get(m)
        entries = [] if recipe is None else finals(grounds[m], m, recipe, seeds)
        cost = dict(costs.get(m, {}))
        if recipe is not None and recipe.train.epochs is not None and not m.solved:
            cost["epochs"] = recipe.train.epochs
        row = _row(grounds[m], choices[m], recipe, entries, cost, request, frozen)
        rows.append(replace(row, timed=True))
    return rows


def _open(
    request: Request, folder: TaskFolder, recipes: Mapping[Method, Recipe], backbone: Backbone
) -> Ground:
    """Features, splits, and what is chosen on."""
    dataset = load_dataset(folder.path, **request.base.data.arguments())
    if dataset.task != "classify":
        raise DataError(f"{folder.path} has numbers or labels to learn, expected classes. Type: sidetune fit")
    if not len(dataset.rows("test")):
        raise DataError(f"{folder.path} has no test images, expected some: scores are of test alone")
    keys = sample_keys(dataset)
    store = default_store(backbone, request.base.features.dtype)
    if request.stores is not None:
        store = request.stores / folder.name
    trained = any(not method.solved for method in recipes)
    reads = request.base.model_copy(update={"side": LosaRecipe() if trained else RidgeRecipe()})
    part = Part("", reads, dataset, request.out / folder.name)
    (job,) = open_jobs([part], backbone, keys, out=part.out, store=store, quiet=request.quiet)
    job.say(f"task {folder.name}: {len(recipes)} methods")
    return _ground(folder.name, folder.group, job, keys)


def _ground(name: str, group: str, job: Job, keys: Sequence[str]) -> Ground:
    on: On = "val" if is_vtab(job.dataset.root) else "folds"
    choosing = Choosing.build(job, on, 1 if on == "val" else FOLDS, metric=METRIC)
    return Ground(name, group, job, keys, choosing, {"test": Images.of(job, keys, job.split["test"])})


def _live(ground: Ground, backbone: Backbone) -> Ground:
    """The same task, its images decoded for every batch: what begins at pixels has nothing to store."""
    job = ground.job
    source = LiveSource(job.dataset, backbone, keys=ground.keys, quiet=job.quiet)
    live = replace(job, backbone=backbone, source=source, summary=source.summary())
    return _ground(ground.name, ground.group, live, ground.keys)


def _pairs(
    grounds: Mapping[Method, Ground], chosen: Mapping[Method, Recipe], remark: str
) -> dict[str, dict[str, Any]]:
    """What is frozen of a task."""
    return {
        f"{grounds[method].name}/{method.name}{remark}": {
            "recipe": _resolved(recipe, len(grounds[method].rows)).hash,
            "data": grounds[method].data,
            "backbone": grounds[method].job.backbone.identity.digest,
        }
        for method, recipe in chosen.items()
    }


def _resolved(recipe: Recipe, num_images: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.resolved(num_images)})


def _cut_all(
    chosen: Mapping[Method, Recipe], costs: Mapping[Method, Mapping[str, float]], minutes: float | None
) -> dict[Method, Recipe]:
    """Each chosen recipe with the epochs that fit: into so many minutes, or into what the quickest takes."""
    trained = [method for method in chosen if not method.solved]
    whole = [costs[method]["epoch_seconds"] * costs[method]["epochs"] for method in trained]
    budget = min(whole, default=0.0) if minutes is None else 60 * minutes
    limited = dict(chosen)
    for method in trained:
        fitting = math.floor(budget / costs[method]["epoch_seconds"] + 1e-6)
        epochs = int(max(1, min(costs[method]["epochs"], fitting)))
        limited[method] = cut(chosen[method], epochs)
    return limited


def _row(
    ground: Ground,
    choice: Choice,
    recipe: Recipe | None,
    entries: Sequence[Entry],
    cost: Mapping[str, float],
    request: Request,
    frozen: str,
) -> _Row:
    method, task = choice.method, ground.job.task
    answered = [(seed, one) for seed, one in enumerate(entries) if not one.diverged]
    outcome = Outcome(
        ground.name,
        ground.group,
        method.name,
        "" if recipe is None else _resolved(recipe, len(ground.rows)).hash,
        {} if recipe is None else _point(method, recipe),
        choice.score,
        (None,) if method.solved else tuple(seed for seed, _ in answered),
        request.seeds,
        tuple(_hash(task, one.outputs["test"]) for _, one in answered),
        cost,
    )
    kept = tuple(one for _, one in answered)
    return _Row(outcome, False, ground.job.dataset, ground.tests["test"], kept, frozen)


def _point(method: Method, recipe: Recipe) -> dict[str, Any]:
    """What was chosen, for the table."""
    part = recipe.side.model_dump(mode="json") if method.solved else recipe.train.model_dump(mode="json")
    names = ("l2", "pool", "taps") if method.solved else ("lr", "weight_decay", "epochs")
    return {name: part[name] for name in names if name in part}


def _hash(task: Task, outputs: Tensor) -> str:
    """sha256 of test probabilities, float32."""
    predictions = np.ascontiguousarray(task.predictions(outputs).float().numpy())
    return hashlib.sha256(predictions.tobytes()).hexdigest()


def _revealed(request: Request, rows: Sequence[_Row]) -> list[_Row]:
    """With test scores. The look is written down first."""
    looks = {}
    for row in rows:
        if row.outcome.task in looks:
            continue
        mine = [one.outcome for one in rows if one.outcome.task == row.outcome.task]
        line = {
            "task": row.outcome.task,
            "test": row.test.digest,
            "methods": sorted({one.method for one in mine}),
            "frozen": row.frozen,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        look(request.looks, line)
        looks[row.outcome.task] = count_looks(request.looks, row.test.digest)
    return [
        replace(row, outcome=replace(row.outcome, right_SN=_right(row), looks=looks[row.outcome.task]))
        for row in rows
    ]


def _right(row: _Row) -> NDArray[np.bool_] | None:
    """(S, n): here, and nowhere else, are labels of test read."""
    if not row.entries:
        return None
    targets = torch.from_numpy(row.dataset.targets[row.test.rows])
    return torch.stack([one.outputs["test"].argmax(1) == targets for one in row.entries]).numpy()
