"""Finished runs, scored on labelled images: one, or those of several label columns in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from sidetune.artifact import Artifact
from sidetune.backbones.base import Backbone
from sidetune.column_predict import load_columns_run
from sidetune.data import SPLITS, Dataset, Split, load_dataset
from sidetune.errors import DataError, nearest
from sidetune.evaluate import Evaluation
from sidetune.extract import sample_keys
from sidetune.predict import Predictor, answer_together, load


def evaluate_run(  # noqa: PLR0913 - what is scored, and with what
    run: str | Path,
    data: str | Path,
    *,
    split: str = "auto",
    labels: Sequence[str] | None = None,
    num_views: int | None = None,
    backbone: Backbone | None = None,
    weights: str | Path | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> RunEvaluation:
    """Score a finished run on labelled images.

    Args:
        run: a run folder that `fit` finished.
        data: as `fit` takes it.
        split: ``auto`` is the test split where the data name one or are the run's own, else all rows.
        labels: the CSV's label columns; None: the run's own.
        num_views: see `Predictor`.
        backbone: as `load` takes it.
        weights: where the backbone's weights are now, if not where they were.
        precision: as `load` takes it.
        device: ``auto`` is the GPU where there is one.

    Raises:
        DataError: the data are not what the run knows, or the split is empty.
        ArtifactError: see `load`.
    """
    _check_split(split)
    predictor = load(
        run,
        num_views=num_views,
        backbone=backbone,
        weights=weights,
        precision=precision,
        device=device,
    )
    dataset, split, rows = rows_to_score(predictor.artifact, Path(data), split, labels)
    evaluation, skipped = predictor.evaluate(dataset, rows)
    return RunEvaluation.of(evaluation, split, dataset, skipped, predictor.artifact.recipe.sample)


def evaluate_columns(  # noqa: PLR0913 - as evaluate_run
    run: str | Path,
    data: str | Path,
    *,
    split: str = "auto",
    labels: Sequence[str] | None = None,
    num_views: int | None = None,
    backbone: Backbone | None = None,
    weights: str | Path | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> dict[str, RunEvaluation]:
    """Score the runs of several label columns, in one pass over the images.

    Args:
        run: a folder that `fit_columns` finished.
        data: a CSV with these columns.
        split: as `evaluate_run` takes it.
        labels: the columns to score; None: all of the run.
        num_views: see `Predictor`.
        backbone: as `load` takes it.
        weights: likewise.
        precision: likewise.
        device: likewise.

    Returns:
        Column -> its scores, each of the images that have a class in it.

    Raises:
        DataError: the run has no such column; else as `evaluate_run`.
        ArtifactError: see `load`.
    """
    _check_split(split)
    together = load_columns_run(
        run, num_views=num_views, backbone=backbone, weights=weights, precision=precision, device=device
    )
    asked = list(together.predictors) if labels is None else [name.strip() for name in labels]
    for name in asked:
        if name not in together.predictors:
            raise DataError(f"the run has no column {name!r}.{nearest(name, together.predictors)}")
    keys = _same_images()
    chosen = {
        name: rows_to_score(together.predictors[name].artifact, Path(data), split, None, keys)
        for name in asked
    }
    return _evaluate([together.predictors[name] for name in asked], chosen)


def _check_split(split: str) -> None:
    if split not in ("auto", "all", *SPLITS):
        raise DataError(f"no split named {split!r}.{nearest(split, ('auto', 'all', *SPLITS))}")


def _same_images() -> Callable[[Dataset], tuple[str, ...]]:
    """Sample keys of datasets of one table: its files are read once."""
    found: list[tuple[str, ...]] = []

    def keys(dataset: Dataset) -> tuple[str, ...]:
        if not found:
            found.append(sample_keys(dataset))
        return found[0]

    return keys


def _evaluate(
    predictors: Sequence[Predictor], chosen: Mapping[str, tuple[Dataset, str, NDArray[np.int64]]]
) -> dict[str, RunEvaluation]:
    for predictor, (dataset, _, _) in zip(predictors, chosen.values(), strict=True):
        predictor.targets(dataset)  # what does not fit is said before any image is read
    every = np.unique(np.concatenate([rows for _, _, rows in chosen.values()]))
    first = next(iter(chosen.values()))[0]
    values, bad = answer_together(predictors, [first.file(row) for row in every.tolist()])
    found = {}
    for predictor, own, (name, (dataset, split, rows)) in zip(
        predictors, values, chosen.items(), strict=True
    ):
        at = np.searchsorted(every, rows)
        skipped = {number: bad[place] for number, place in enumerate(at.tolist()) if place in bad}
        evaluation, lacking = predictor.scored(dataset, rows, own[torch.from_numpy(at)], skipped)
        found[name] = RunEvaluation.of(evaluation, split, dataset, lacking, predictor.artifact.recipe.sample)
    return found


def rows_to_score(
    artifact: Artifact,
    data: Path,
    split: str,
    labels: Sequence[str] | None,
    keys: Callable[[Dataset], tuple[str, ...]] = sample_keys,
) -> tuple[Dataset, str, NDArray[np.int64]]:
    """The data that an artifact is scored on, their split and its rows.

    Args:
        artifact: says how the data are read.
        data: as `fit` takes it.
        split: as `evaluate_run` takes it.
        labels: likewise.
        keys: of the images; they tell the run's own data from others.

    Raises:
        DataError: the data are not what the run knows, or the split is empty.
    """
    dataset, chosen = _choose_split(artifact, data, split, labels, keys)
    rows = dataset.rows(chosen)
    if not len(rows):
        others = " or ".join(name for name in SPLITS if len(dataset.rows(name)))
        raise DataError(f"the split {chosen!r} of {data} is empty. Type: --split {others}, or --split all")
    return dataset, chosen, rows


def _choose_split(
    artifact: Artifact,
    data: Path,
    split: str,
    labels: Sequence[str] | None,
    keys: Callable[[Dataset], tuple[str, ...]],
) -> tuple[Dataset, Split | Literal["all"]]:
    """The data with the splits they name, or with the run's own drawing where those are asked for."""
    recipe = artifact.recipe.data
    labels = recipe.labels if labels is None else labels
    clips = artifact.recipe.clips.frames is not None
    read = partial(load_dataset, data, task=recipe.task, labels=labels, to_train=False, clips=clips)
    whole = read(val_fraction=0.0, test_fraction=0.0)
    if split == "all" or (split == "auto" and len(whole.rows("test"))):
        return whole, "all" if split == "all" else "test"
    try:
        drawn = read(
            split_by=recipe.split_by,
            split_seed=recipe.split_seed,
            val_fraction=recipe.val_fraction,
            test_fraction=recipe.test_fraction,
        )
    except DataError:
        if split != "auto":
            raise
        return whole, "all"  # too few images to draw splits from, so not what the run was fitted on
    if split != "auto":
        return drawn, cast(Split, split)
    own = drawn.fingerprint(keys(drawn)) == artifact.data
    if own and not recipe.test_fraction:
        folds = artifact.recipe.fleet.folds is not None
        held = "scores what each network held out" if folds else "scores its validation samples"
        raise DataError(
            f"{data} is what the run was fitted on, and no split of it is test: the run's report {held}. "
            f"Give other samples, or type: --split {'all' if folds else 'val'}"
        )
    return (drawn, "test") if own else (whole, "all")


@dataclass(frozen=True)
class RunEvaluation:
    """What `evaluate_run` found.

    Args:
        evaluation: the scores.
        split: the split that was scored.
        skipped: path -> why it could not be read.
        sample: what a sample is called.
    """

    evaluation: Evaluation
    split: str
    skipped: dict[str, str]
    sample: str = "image"

    @classmethod
    def of(
        cls, evaluation: Evaluation, split: str, dataset: Dataset, skipped: Mapping[int, str], sample: str
    ) -> RunEvaluation:
        """With the paths of the rows that were skipped."""
        named = {dataset.paths[row].as_posix(): reason for row, reason in skipped.items()}
        return cls(evaluation, split, named, sample)

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {"split": self.split, "skipped": self.skipped, **self.evaluation.to_json()}
