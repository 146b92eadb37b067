"""`fit`: from images to a run folder. Data -> backbone -> features -> probes -> side -> scores.

    RUN/recipe.json        what was asked for, its hash, and fingerprints of data and backbone
    RUN/skipped.csv        images that could not be read, and why
    RUN/metrics.json       scores with intervals of every method, cost, environment
    RUN/findings.json      near-duplicates across splits, suspect labels, mistakes, with thumbnails
    RUN/history.jsonl      one line an epoch
    RUN/predictions.csv    validation and test samples, one line each
    RUN/side.safetensors, artifact.json    what `load` needs; artifact.json comes last
    RUN/report.html        all of it on one page

The same command on a finished run prints its result; on an interrupted one it resumes, from
RUN/checkpoint.safetensors if training had come that far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sidetune.artifact import Artifact, build_model, find_device
from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone
from sidetune.data import SPLITS, load_dataset
from sidetune.data.dataset import Dataset
from sidetune.data.folds import choose_folds
from sidetune.data.notes import first_frames, other_files
from sidetune.data.views import views
from sidetune.errors import DataError, RequestError
from sidetune.extract import extract, require_readable, sample_keys
from sidetune.files import locked, write_json
from sidetune.findings import collect
from sidetune.fleet_run import fleet_json, write_fleet
from sidetune.job import Job
from sidetune.leaks import Leaks, find_leaks
from sidetune.members import variations
from sidetune.memory import PeakMemory
from sidetune.methods import Row, fit_methods, score
from sidetune.model import SideModel
from sidetune.progress import say
from sidetune.recipe import BackboneRecipe, Recipe
from sidetune.report import write_report
from sidetune.runs import (
    Run,
    begin_run,
    default_store,
    environment,
    find_run,
    read_skipped,
    write_run,
    write_skipped,
)
from sidetune.sides import SOLVED
from sidetune.sources import LiveSource, Source, StoredSource
from sidetune.tasks import Task, build_task


def fit(  # noqa: PLR0913 - what, where, how; each has its option on the command line
    data: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    backbone: Backbone | None = None,
    store: str | Path | None = None,
    device: str = "auto",
    leak_check: bool = True,
    strict: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a side network on images and write a run folder.

    Args:
        data: a folder of classes, a VTAB folder, or a CSV; see `sidetune.data.load_dataset`.
        out: the run folder; made, resumed, or found finished.
        recipe: everything that decides the result; None: `Recipe()`, LoSA on the demo backbone.
        backbone: your own, in place of the one that the recipe names. `load` will ask for it again.
        store: where features are kept; None: ``$SIDETUNE_STORES`` or ./.sidetune/stores.
        device: ``auto`` is the GPU where there is one.
        leak_check: look for validation and test images with a near-duplicate in training, and name them.
        strict: an image that cannot be read is an error; RUN/skipped.csv is written first, the store is kept.
        quiet: no progress.

    Returns:
        The finished run.

    Raises:
        RequestError: data, recipe, backbone, device or folders are not what they should be; or `strict`, and
            images cannot be read.
        StoreError: the store belongs to another backbone, or the disk is full.
        ArtifactError: the run folder holds another run.
        DivergedError: training diverged.
    """
    recipe, out = Recipe() if recipe is None else recipe, Path(out)
    place = find_device(device)
    if store is not None:
        check_store(recipe, Path(store), out)
    dataset = load_dataset(Path(data), **recipe.data.arguments())
    if backbone is None:
        backbone = build_backbone(recipe.backbone.name, **recipe.backbone.arguments())
    elif recipe.backbone == BackboneRecipe():  # no choice was made: the default names what was not used
        named = BackboneRecipe(name=backbone.identity.architecture)
        recipe = recipe.model_copy(update={"backbone": named})
    backbone.to(place)
    _check_members(recipe, dataset, backbone)
    if store is None:
        store = default_store(backbone, recipe.features.dtype)
        check_apart(store, out)
    keys = sample_keys(dataset)
    fingerprint = dataset.fingerprint(keys)
    asked = (recipe, fingerprint, backbone.identity.digest)
    if (finished := find_run(out, *asked)) is not None and (out / "report.html").exists():
        _check_strict(out, strict)
        return finished
    with locked(out):
        found = begin_run(out, *asked)
        if found is None:
            with PeakMemory() as memory:
                job = open_job(recipe, dataset, backbone, keys, out=out, store=Path(store), quiet=quiet)
                _check_strict(out, strict)
                leaks = _look_for_leaks(job, keys) if leak_check else None
                rows = [score(job, fitted) for fitted in fit_methods(job)]
            _write(job, rows, leaks, fingerprint, memory.peak)
        else:  # another process finished it while this one waited, or it was killed at its very end
            _check_strict(out, strict)
            if not (out / "report.html").exists():
                _write_end(out)
    return Run.open(out)


def _check_members(recipe: Recipe, dataset: Dataset, backbone: Backbone) -> None:
    """A side, a member or folds that cannot be are refused before an image is read."""
    _reads(recipe, backbone, len(dataset.outputs))
    if recipe.fleet.folds is not None:
        rows = np.sort(np.concatenate([dataset.rows("train"), dataset.rows("val")]))
        choose_folds(dataset, rows, recipe.fleet.folds, seed=recipe.data.split_seed)


def _check_strict(out: Path, strict: bool) -> None:
    if strict:
        require_readable(read_skipped(out), f"{out / 'skipped.csv'}")


def _write_end(out: Path) -> None:
    """What comes after artifact.json."""
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    write_report(out)


def check_store(recipe: Recipe, store: Path, out: Path) -> None:
    """Refuse a store that is a file, lies in the run's folder, or is given to a run that stores nothing.

    Raises:
        RequestError: says which.
    """
    if recipe.features.mode == "live":
        raise RequestError(f"got --store {store} and --live, which stores nothing. Type one of the two")
    if store.exists() and not store.is_dir():
        raise RequestError(f"{store} is a file, expected a store's folder. Type: --store with a new folder")
    check_apart(store, out)


def check_apart(store: Path, out: Path) -> None:
    """Refuse a store inside the run's folder.

    Raises:
        RequestError: it is.
    """
    if store.resolve().is_relative_to(out.resolve()):
        raise RequestError(
            f"features would be kept in {store} and the run in {out}; expected a store outside the run's "
            "folder, because other runs read it, too. Type: --store or --out with another folder"
        )


def open_job(
    recipe: Recipe,
    dataset: Dataset,
    backbone: Backbone,
    keys: Sequence[str],
    *,
    out: Path,
    store: Path,
    quiet: bool,
) -> Job:
    """Stage one: features of every row, from a store or live; then splits, task and summary."""
    started = time.monotonic()
    source: Source
    chosen = views(recipe.features.views, flip=recipe.features.flip)
    if recipe.features.mode == "live":
        source = LiveSource(dataset, backbone, keys=keys, views=chosen, quiet=quiet)
    else:
        dtype = recipe.features.dtype
        say(f"features in {store} ({dtype})", quiet=quiet)
        reads = _reads(recipe, backbone, len(dataset.outputs))
        complete = extract(
            dataset, backbone, store, dtype=dtype, keys=keys, views=chosen, reads=reads, quiet=quiet
        )
        source = StoredSource(complete, keys, backbone.spec, chosen)
    write_skipped(out, dataset, source.skipped)
    if source.skipped:
        say(f"{len(source.skipped)} images could not be read: {out / 'skipped.csv'}", quiet=quiet)
    if source.animated:
        say(first_frames([dataset.paths[row] for row in source.animated]), quiet=quiet)
    if dataset.ignored:
        say(other_files(dataset.ignored), quiet=quiet)
    split = _readable(dataset, source, out)
    task = build_task(
        recipe.data.task,
        dataset,
        split["train"],
        class_weights=recipe.data.class_weights,
        label_smoothing=recipe.data.label_smoothing,
        focal_gamma=recipe.data.focal_gamma,
    )
    summary = source.summary()
    seconds = time.monotonic() - started
    return Job(recipe, dataset, backbone, out, quiet, source, summary, split, task, seconds)


def _reads(recipe: Recipe, backbone: Backbone, num_outputs: int) -> tuple[str, ...]:
    """Taps whose features any member reads. Solved sides read summaries alone."""
    with torch.device("meta"):
        built = [
            build_model(one.recipe, backbone.spec, num_outputs, backbone.norm) for one in variations(recipe)
        ]
    if recipe.side.name in SOLVED:
        return ()
    read = {name for model in built for name in model.side.spec.names}
    return tuple(name for name in backbone.spec.names if name in read)


def _readable(dataset: Dataset, source: Source, out: Path) -> dict[str, NDArray[np.int64]]:
    """The readable rows of each split.

    Raises:
        DataError: training, validation or a class have none.
    """
    split: dict[str, NDArray[np.int64]] = {}
    for name in SPLITS:
        rows = dataset.rows(name)
        split[name] = rows[source.valid[rows]]
    lacking = [f"no {name} image" for name in ("train", "val") if not len(split[name])]
    if dataset.task == "classify" and not lacking:
        named, left = (
            set(dataset.targets[rows].tolist()) for rows in (dataset.rows("train"), split["train"])
        )
        lacking = [f"no train image of class {dataset.outputs[k]!r}" for k in sorted(named - left)]
    if lacking:
        example = ", ".join(f"{dataset.paths[row]}: {why}" for row, why in sorted(source.skipped.items())[:1])
        raise DataError(
            f"{lacking[0]} can be read, expected at least one; of {len(dataset)} images "
            f"{len(source.skipped)} cannot{example and f' ({example})'}. Mend or remove those that "
            f"{out / 'skipped.csv'} lists"
        )
    return split


def _look_for_leaks(job: Job, keys: Sequence[str]) -> Leaks:
    """Near-duplicates across splits, said before anything is scored on them."""
    others = np.sort(np.concatenate([job.split["val"], job.split["test"]]))
    files = [job.dataset.file(row) for row in range(len(job.dataset))]
    leaks = find_leaks(files, keys, job.summary, job.split["train"], others)
    if leaks.pairs:
        first = leaks.pairs[0]
        names = [job.dataset.paths[row].as_posix() for row in (first.row, first.train_row)]
        job.say(
            f"{len(leaks.pairs)} of {leaks.num_others} validation and test images have a near-duplicate in "
            f"training ({names[0]} and {names[1]}): what they score is not what new images would. "
            "The report shows them; give copies one group in a CSV, fit into a new folder, and look again: "
            "other groups make other splits"
        )
    return leaks


def _write(job: Job, rows: Sequence[Row], leaks: Leaks | None, fingerprint: str, peak_memory: int) -> None:
    """Stage four: the run folder; artifact.json last but for the page that reads it."""
    own, started = rows[-1], time.monotonic()
    write_json(job.out / "findings.json", collect(job, rows, leaks))
    seconds = time.monotonic() - started
    predictions = {name: (job.split[name], values) for name, values in own.predictions.items()}
    metrics = _metrics(job, rows, peak_memory, seconds)
    write_run(job.out, metrics, own.fitted.history, job.dataset, job.task, predictions)
    artifact, scores = (
        artifact_of(job, fingerprint),
        {"val": own.val.scores, "test": own.test and own.test.scores},
    )
    if own.fitted.fleet is not None:
        write_fleet(job, own.fitted.fleet, artifact, scores)
    else:
        fitted = own.fitted
        artifact(fitted.model.cpu().eval(), fitted.recipe, job.task, own.temperature, scores).save(job.out)
    _write_end(job.out)


def artifact_of(job: Job, fingerprint: str) -> Callable[..., Artifact]:
    """Artifacts of a job, given what is a network's own."""

    def artifact(
        model: SideModel, recipe: Recipe, task: Task, temperature: float, scores: dict[str, Any]
    ) -> Artifact:
        return Artifact(
            model,
            recipe,
            task,
            model.side.spec,
            job.backbone.identity,
            job.backbone.variant,
            None if job.source.final_norm is None else job.source.final_norm.eps,
            job.backbone.check_values(),
            temperature,
            fingerprint,
            scores,
        )

    return artifact


def _metrics(job: Job, rows: Sequence[Row], peak_memory: int, findings: float) -> dict[str, Any]:
    """What metrics.json holds."""
    own, solved, device = rows[-1].fitted, job.recipe.side.name in SOLVED, job.backbone.device
    seconds = {row.fitted.name: row.fitted.seconds for row in rows}
    models = [own.model] if own.fleet is None else [voice.model for voice in own.fleet.voices]
    if not solved:
        seconds["train"] = seconds.pop(own.name)
    return {
        "side": own.name,
        "backbone": job.recipe.backbone.name,
        "task": job.task.kind,
        "outputs": list(job.task.outputs),
        "headline": job.task.headline,
        "data": {
            "name": job.dataset.name,
            **{f"num_{name}": len(rows) for name, rows in job.split.items()},
            "num_skipped": len(job.source.skipped),
            "num_animated": len(job.source.animated),
        },
        "rows": [row.to_json() for row in rows],
        **({} if own.fleet is None else {"fleet": fleet_json(job, own.fleet)}),
        "cost": {
            "parameters": own.parameters,
            "head_parameters": sum(
                parameter.numel() for model in models for parameter in model.head.parameters()
            ),
            "seconds": {
                "features": job.seconds,
                **seconds,
                "evaluate": sum(row.seconds for row in rows),
                "findings": findings,
            },
            "peak_memory_bytes": peak_memory,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "store_bytes": job.source.store.num_bytes if isinstance(job.source, StoredSource) else None,
        },
        "environment": environment(device),
    }
