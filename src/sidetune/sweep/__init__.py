"""`sweep`: many recipes in one pass, the weak ones stopped early, the best one served.

    RUN/recipe.json        what was asked for: recipe, search, hash, fingerprints of data and backbone
    RUN/journal.log        every trial: its parameters, its scores, what was decided; any number of processes
    RUN/workers/           a folder a process, with its checkpoint; gone when the sweep has ended
    RUN/skipped.csv        images that could not be read, and why
    RUN/trials.csv         one line a trial
    RUN/sweep.json         trials, importances, the winner's gain over the default, cost
    RUN/metrics.json       scores with intervals of the default and of the winner
    RUN/history.jsonl      one line an epoch of the winner's last training
    RUN/predictions.csv    the winner's, on the rows that it was chosen by and on test
    RUN/side.safetensors, artifact.json    the winner, as `load` needs it; artifact.json comes last
    RUN/report.html        all of it on one page

The same command on a finished sweep prints its result; on an interrupted one it goes on; in another
terminal, or on another machine with the same disk, it helps.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidetune.artifact import build_model, find_device
from sidetune.backbones.base import Backbone, canonical_json
from sidetune.data import load_dataset
from sidetune.data.vtab import is_vtab
from sidetune.errors import ArtifactError, MissingExtraError, RequestError, nearest
from sidetune.extract import sample_keys
from sidetune.figures import size
from sidetune.files import locked, write_json
from sidetune.fit import check_apart, check_store
from sidetune.job import Job
from sidetune.memory import PeakMemory
from sidetune.opening import Part, open_jobs, ready_backbone, refuse_baseline
from sidetune.recipe import FleetRecipe, Recipe
from sidetune.runs import Run, check_free, default_store, differences, is_begun, read_object
from sidetune.side_fit import open_fleet
from sidetune.sweep.space import Space, apply, check_space, current, default_space, read_space
from sidetune.waves import SHARE, device_memory, member_bytes

if TYPE_CHECKING:
    from sidetune.sweep.worker import Plan

ETA = 3  # one trial of three goes on after a rung: about 30 % of the epochs of training all to the end
POLL_SECONDS = 0.5  # between looks at the journal while other processes train the last trials


def sweep(  # noqa: PLR0913 - what, where, how; each has its option on the command line
    data: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    trials: int = 64,
    on: str | None = None,
    folds: int | str | None = None,
    places: int = 16,
    search: str | Path | None = None,
    seed: int = 0,
    backbone: Backbone | None = None,
    store: str | Path | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Run:
    """Search for a recipe: trials train side by side in one fleet, successive halving stops most.

    The first trial is the recipe as given and is trained to its end, so on the rows that the sweep
    chooses by it never ends below it. The winner is trained again on train and validation and scored on
    test once, beside the recipe as given.

    Args:
        data: a folder of classes, a VTAB folder, or a CSV; see `sidetune.data.load_dataset`.
        out: the sweep's folder; made, gone on with, helped with, or found finished.
        recipe: what is not searched, and the first trial; None: `Recipe()`.
        trials: in all, of every process together.
        on: what trials are scored on: ``folds`` of train and validation, each held out once, or the ``val``
            split. None: ``val`` for a VTAB folder, whose protocol that is, else ``folds``.
        folds: how many, or ``column`` for those of the CSV; None: 5. Nothing with ``val``.
        places: trials that train at the same time in one process.
        search: a YAML file with lines as ``train.lr: {log: [1e-4, 1e-2]}`` or ``side.rank: [4, 8, 16]``;
            None: rank, learning rate, weight decay, drop-path and label smoothing.
        seed: of the draws of trials. The seed of every training is the recipe's.
        backbone: your own, in place of the one that the recipe names.
        store: where features are kept; None: ``$SIDETUNE_STORES`` or ./.sidetune/stores.
        device: ``auto`` is the GPU where there is one.
        quiet: no progress.

    Returns:
        The finished run, which `load` and `sidetune predict` serve.

    Raises:
        RequestError: data, recipe, search, backbone, device or folders are not what they should be, or
            optuna is not installed.
        StoreError: the store belongs to another backbone, or the disk is full.
        ArtifactError: the folder holds another run or sweep.
        DivergedError: every trial diverged.
    """
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("optuna", "pip install 'sidetune[sweep]'")
    recipe, out = Recipe() if recipe is None else recipe, Path(out)
    asked = {"trials": trials, "places": places, "seed": seed, **_chosen(Path(data), on, folds)}
    _check_request(asked, recipe)
    place = find_device(device)
    if store is not None:
        check_store(recipe, Path(store), out)
    dataset = load_dataset(Path(data), **recipe.data_arguments())
    recipe, backbone = ready_backbone(recipe, backbone, place)
    space = _space(recipe, backbone, None if search is None else Path(search))
    build_model(recipe, backbone.spec, len(dataset.outputs), backbone.norm)  # a wrong side is refused here
    if store is None:
        store = default_store(backbone, recipe.features.dtype)
        check_apart(store, out)
    keys = sample_keys(dataset)
    claim = _claim_of(recipe, asked, space, dataset.fingerprint(keys), backbone.identity.digest)
    if not _is_finished(out, claim):
        with locked(out):
            job = None
            if not _is_finished(out, claim):  # another process may have ended it while this one waited
                write_json(out / "recipe.json", claim)
                part = Part("", recipe, dataset, out)
                (job,) = open_jobs([part], backbone, keys, out=out, store=Path(store), quiet=quiet)
        if job is not None:
            _run(_plan(job, asked, space, claim["hash"]), claim["data"])
    return Run.open(out)


def _chosen(data: Path, on: str | None, folds: int | str | None) -> dict[str, Any]:
    """What trials are scored on, with the default filled in."""
    if on is not None and on not in ("val", "folds"):
        raise RequestError(f"--on is {on!r}.{nearest(on, ('val', 'folds'))}")
    if on == "val" and folds is not None:
        raise RequestError(
            f"got --on val and --folds {folds}: trials are scored on the one or on the other. "
            "Type one of the two"
        )
    if on is None:
        on = "val" if folds is None and data.is_dir() and is_vtab(data) else "folds"
    return {"on": on, "folds": 1 if on == "val" else 5 if folds is None else folds}


def _check_request(asked: dict[str, Any], recipe: Recipe) -> None:
    refuse_baseline(recipe)
    folds = asked["folds"]
    if isinstance(folds, str) and folds != "column":
        raise RequestError(f"--folds is {folds!r}, expected 2 or more, or column. Type: --folds 5")
    least = {"trials": 2, "places": 1} | ({} if asked["on"] == "val" or folds == "column" else {"folds": 2})
    for name, smallest in least.items():
        if asked[name] < smallest:
            raise RequestError(
                f"--{name} is {asked[name]}, expected {smallest} or more. Type: --{name} {smallest}"
            )
    if recipe.fleet != FleetRecipe():
        raise RequestError(
            "the recipe has members, folds or an ensemble of its own, and a trial of a sweep is one network "
            "a fold. Leave fleet.* out; what should vary belongs into --search, folds into --folds"
        )
    if recipe.train.select == "best":
        raise RequestError(
            "train.select is 'best', and a sweep compares trials after the same epochs. Leave it at 'last'"
        )


def _space(recipe: Recipe, backbone: Backbone, search: Path | None) -> Space:
    space = default_space(recipe) if search is None else read_space(search, recipe)
    check_space(space, recipe)
    for name, domain in space.items():
        if name == "side.pool":  # only now is it known what the backbone gives
            for value in domain.tried:
                build_model(apply(recipe, {name: value}), backbone.spec, 1, backbone.norm)
    return space


def _claim_of(
    recipe: Recipe, asked: dict[str, Any], space: Space, data: str, backbone: str
) -> dict[str, Any]:
    """What recipe.json holds of a sweep. Its hash is not that of a run of the same recipe."""
    request = asked | {"space": {name: domain.to_json() for name, domain in space.items()}}
    digest = hashlib.sha256(canonical_json({"recipe": recipe.hash, "sweep": request}).encode()).hexdigest()
    fields = recipe.model_dump(mode="json")
    return {"recipe": fields, "hash": digest, "data": data, "backbone": backbone, "sweep": request}


def _is_finished(out: Path, claim: dict[str, Any]) -> bool:
    """Whether the folder holds this sweep at its end. Writes nothing.

    Raises:
        RequestError: it is a file, or a folder that holds something else.
        ArtifactError: it holds a run, or another sweep; names what differs.
    """
    if not (out / "recipe.json").exists():
        check_free(out)
        return False
    found = read_object(out / "recipe.json")
    if is_begun(out) and (differing := list(_differences(found, claim))):
        raise ArtifactError(
            f"{out} holds another sweep or a run: {'; '.join(differing)}. Type: --out with a new folder"
        )
    return (out / "artifact.json").exists() and (out / "report.html").exists()


def _differences(found: dict[str, Any], claim: dict[str, Any]) -> Iterator[str]:
    if "sweep" not in found:
        yield "it is a run of `sidetune fit`"
        return
    for name, here in claim["sweep"].items():
        if (there := found["sweep"].get(name)) != here:
            yield f"{name} is {json.dumps(there)} there and {json.dumps(here)} here"
    recipe = Recipe.model_validate(claim["recipe"])
    yield from differences(found, recipe, claim["data"], claim["backbone"])


def _plan(job: Job, asked: dict[str, Any], space: Space, run_hash: str) -> Plan:
    """What the workers need, with the journal opened."""
    from sidetune.sweep.journal import Journal
    from sidetune.sweep.score import Choosing
    from sidetune.sweep.worker import Plan

    train = job.recipe.train.resolved(len(job.split["train"]))
    if train.order_seed is None:  # where the seed itself is searched, all trials still read the same batches
        train = train.model_copy(update={"order_seed": train.seed})
    return Plan(
        recipe=job.recipe.model_copy(update={"train": train}),
        space=space,
        choosing=Choosing.build(job, asked["on"], asked["folds"]),
        journal=Journal(
            job.out / "journal.log",
            space,
            defaults=current(job.recipe, space),
            seed=asked["seed"],
            most=asked["trials"],
        ),
        out=job.out,
        trials=asked["trials"],
        places=asked["places"],
        eta=ETA,
        run_hash=run_hash,
    )


def _run(plan: Plan, fingerprint: str) -> None:
    """Train every trial, here and in other processes; whoever sees the last one ended finishes."""
    from sidetune.sweep.finish import clear_up, finish

    job = plan.choosing.job
    job.say(
        f"{plan.trials} trials of {len(plan.choosing.folds)} networks, {plan.epochs} epochs, compared after "
        f"{', '.join(map(str, plan.rungs))}"
    )
    _say_memory(plan)
    with PeakMemory() as memory:
        _train(plan)
    with locked(plan.out):
        if not (plan.out / "artifact.json").exists():
            finish(plan, fingerprint, memory.peak)
        elif not (plan.out / "report.html").exists():
            clear_up(plan.out)


def _say_memory(plan: Plan) -> None:
    """What the places take, where that is more than a quarter of the memory; results hang on their number."""
    job, members = plan.choosing.job, plan.choosing.members(0, plan.recipe)
    fleet = open_fleet(job, [plan.recipe], plan.choosing.trained)
    wanted = plan.places * len(members) * member_bytes(fleet, members[0])
    limit = device_memory(job.backbone.device) // SHARE
    if wanted > limit:
        fitting = max(1, plan.places * limit // wanted)
        job.say(
            f"{plan.places} places take about {size(wanted)} beside the features, and a quarter of the "
            f"memory is {size(limit)}. Should it not be enough, type: --places {fitting} with a new --out"
        )


def _train(plan: Plan) -> None:
    """Work as the first worker that nobody is; then as those that were left with trials under way."""
    from sidetune.sweep.worker import Worker, free_worker

    with free_worker(plan.out, plan.journal, orphaned=False) as (number, folder):
        assert folder is not None, "there is always another number"
        Worker.begin(plan, number, folder).work(folder)
    said = False
    while any(trial.state == "running" for trial in plan.journal.trials()):
        with free_worker(plan.out, plan.journal, orphaned=True) as (number, folder):
            if folder is not None:
                Worker.begin(plan, number, folder).work(folder)
                continue
        if not said:
            plan.choosing.job.say("another process trains the last trials; waiting for it")
            said = True
        time.sleep(POLL_SECONDS)
