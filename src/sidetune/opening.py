"""Stage one: features of every row, from a store or live; then splits and task of each job.

ready_backbone(recipe, ..)              the backbone, on its device
open_jobs(parts, backbone, keys, ..)    what every method works from
look_for_leaks(work, keys)              near-duplicates across splits, said before anything is scored on them
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sidetune.artifact import build_model
from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone
from sidetune.baselines import BASELINES
from sidetune.data import SPLITS
from sidetune.data.dataset import Dataset
from sidetune.data.notes import first_frames, other_files
from sidetune.errors import DataError, RequestError, naming
from sidetune.extract import extract
from sidetune.job import Job, Work, union
from sidetune.leaks import Leaks, find_leaks
from sidetune.members import variations
from sidetune.progress import say
from sidetune.recipe import BackboneRecipe, Recipe
from sidetune.runs import write_skipped
from sidetune.sides import SOLVED
from sidetune.sides.ridge import beyond_summary
from sidetune.sources import LiveSource, Source, StoredSource
from sidetune.tasks import build_task


@dataclass(frozen=True)
class Part:
    """One of the runs that are asked for together.

    Args:
        column: the label column that it learns, where it is one of several; else nothing.
        recipe: of this run.
        dataset: likewise; all have the same images and splits.
        out: its folder.
    """

    column: str
    recipe: Recipe
    dataset: Dataset
    out: Path


def refuse_baseline(recipe: Recipe) -> None:
    """A baseline has no artifact: what it trains is of no use without the backbone's own blocks.

    Raises:
        RequestError: the recipe asks for one.
    """
    if recipe.side.name in BASELINES:
        raise RequestError(
            f"{recipe.side.name} is a baseline, which is measured and not kept. Type: --side losa, or "
            f"sidetune bench accuracy --methods losa,{recipe.side.name}"
        )


def ready_backbone(
    recipe: Recipe, backbone: Backbone | None, device: torch.device
) -> tuple[Recipe, Backbone]:
    """The backbone that a recipe names, or the one that was given, on its device; and a recipe that names it.

    Args:
        recipe: as asked for.
        backbone: an object in place of the one that the recipe names.
        device: to be on.

    Raises:
        RequestError: the recipe would pool the tokens of an object.
    """
    if backbone is not None and recipe.backbone.pooled is not None:
        raise RequestError(
            f"backbone.pooled is {recipe.backbone.pooled} and the backbone is an object. Give "
            f"sidetune.backbones.pooled.PooledBackbone(backbone, {recipe.backbone.pooled})"
        )
    if backbone is None:
        backbone = build_backbone(recipe.backbone.name, **recipe.backbone.arguments())
    elif recipe.backbone == BackboneRecipe():  # no choice was made: the default names what was not used
        named = BackboneRecipe(name=backbone.identity.architecture)
        recipe = recipe.model_copy(update={"backbone": named})
    return recipe, backbone.to(device)


def open_jobs(
    parts: Sequence[Part],
    backbone: Backbone,
    keys: Sequence[str],
    *,
    out: Path,
    store: Path,
    quiet: bool,
) -> tuple[Job, ...]:
    """A job a part, all on one source.

    Args:
        parts: one or more.
        backbone: on its device.
        keys: of all images.
        out: the folder of all, for skipped.csv.
        store: where features are kept, unless the recipe says live.
        quiet: no progress.

    Raises:
        DataError: training, validation or a class have no image that can be read.
        StoreError: the store belongs to another backbone, or the disk is full.
    """
    started = time.monotonic()
    dataset = parts[0].dataset
    source = _open_source(parts, backbone, keys, store, quiet)
    write_skipped(out, dataset, source.skipped)
    if source.skipped:
        sample = parts[0].recipe.sample
        say(f"{len(source.skipped)} {sample}s could not be read: {out / 'skipped.csv'}", quiet=quiet)
    if source.animated:
        say(first_frames([dataset.paths[row] for row in source.animated]), quiet=quiet)
    if dataset.ignored:
        say(other_files(dataset.ignored, parts[0].recipe.sample), quiet=quiet)
    summary = source.summary()
    seconds = time.monotonic() - started
    jobs = []
    for part in parts:
        with naming(part.column):
            split = _readable(part.dataset, source, out, part.recipe.sample)
        data = part.recipe.data
        task = build_task(data.task, part.dataset, split["train"], **data.task_options())
        job = Job(part.recipe, part.dataset, backbone, part.out, quiet, source, summary, split, task, seconds)
        jobs.append(replace(job, column=part.column))
        if part.dataset.labelled is not None:
            unlabelled = len(part.dataset) - len(part.dataset.rows("all"))
            jobs[-1].say(f"{unlabelled:,} of {len(part.dataset):,} rows have no class and are left out")
    return tuple(jobs)


def _open_source(
    parts: Sequence[Part], backbone: Backbone, keys: Sequence[str], store: Path, quiet: bool
) -> Source:
    recipe, dataset = parts[0].recipe, parts[0].dataset
    reading = recipe.reading(backbone.frames)
    if recipe.features.mode == "live":
        return LiveSource(
            dataset, backbone, dtype=recipe.features.dtype, keys=keys, reading=reading, quiet=quiet
        )
    dtype = recipe.features.dtype
    say(f"features in {store} ({dtype})", quiet=quiet)
    read = reads(recipe, backbone, max(len(part.dataset.outputs) for part in parts))
    complete = extract(
        dataset, backbone, store, dtype=dtype, keys=keys, views=reading.stored, reads=read, quiet=quiet
    )
    return StoredSource(complete, keys, backbone.spec, reading)


def reads(recipe: Recipe, backbone: Backbone, num_outputs: int) -> tuple[str, ...]:
    """Taps whose features any member reads. Solved sides read summaries, unless these lack something."""
    spec = recipe.reading(backbone.frames).spec(backbone.spec)
    with torch.device("meta"):
        built = [
            build_model(one.recipe, spec, num_outputs, backbone.norm, backbone=backbone)
            for one in variations(recipe)
        ]
    if recipe.side.name in SOLVED:
        return backbone.spec.names if beyond_summary(recipe.side) else ()
    read = {name for model in built for name in model.side.spec.names}
    return tuple(name for name in backbone.spec.names if name in read)


def _readable(dataset: Dataset, source: Source, out: Path, sample: str) -> dict[str, NDArray[np.int64]]:
    """The readable rows of each split.

    Raises:
        DataError: training, validation or a class have none.
    """
    split: dict[str, NDArray[np.int64]] = {}
    for name in SPLITS:
        rows = dataset.rows(name)
        split[name] = rows[source.valid[rows]]
    lacking = [f"no {name} {sample}" for name in ("train", "val") if not len(split[name])]
    if dataset.task == "classify" and not lacking:
        named, left = (
            set(dataset.targets[rows].tolist()) for rows in (dataset.rows("train"), split["train"])
        )
        lacking = [f"no train {sample} of class {dataset.outputs[k]!r}" for k in sorted(named - left)]
    if lacking:
        example = ", ".join(f"{dataset.paths[row]}: {why}" for row, why in sorted(source.skipped.items())[:1])
        raise DataError(
            f"{lacking[0]} can be read, expected at least one; of {len(dataset)} {sample}s "
            f"{len(source.skipped)} cannot{example and f' ({example})'}. Mend or remove those that "
            f"{out / 'skipped.csv'} lists"
        )
    return split


def look_for_leaks(work: Work, keys: Sequence[str]) -> list[Leaks]:
    """Near-duplicates across splits, for each job; jobs of the same rows are looked at once.

    Args:
        work: whose splits are compared.
        keys: of all images.
    """
    known: dict[tuple[bytes, ...], Leaks] = {}
    found = []
    for job in work.jobs:
        rows = tuple(job.split[name].tobytes() for name in SPLITS)
        if rows not in known:
            known[rows] = _find_leaks(job, keys)
        found.append(known[rows])
    return found


def _find_leaks(job: Job, keys: Sequence[str]) -> Leaks:
    others = union([job.split["val"], job.split["test"]])
    leaks = find_leaks(job.dataset, keys, job.summary, job.split["train"], others)
    if job.recipe.fleet.folds is not None:  # its networks train on validation, too
        seen = find_leaks(job.dataset, keys, job.summary, job.split["val"], job.split["test"])
        leaks = leaks.joined(seen)
    if leaks.pairs:
        first = leaks.pairs[0]
        names = [job.dataset.paths[row].as_posix() for row in (first.row, first.train_row)]
        sample = job.recipe.sample
        job.say(
            f"{len(leaks.pairs)} of {leaks.num_others} validation and test {sample}s have a near-duplicate "
            f"in training ({names[0]} and {names[1]}): what they score is not what new ones would. "
            "The report shows them; give copies one group in a CSV, fit into a new folder, and look again: "
            "other groups make other splits"
        )
    return leaks
