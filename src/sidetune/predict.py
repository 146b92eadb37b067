"""An artifact on its backbone: load and predict. `sidetune.rescore` scores it on labelled images.

Loading builds the backbone that the recipe names, refuses another identity with the difference, and
measures the check values again: a backbone that computes something else is refused too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.artifact import Artifact, find_device
from sidetune.backbones import BACKBONES, build_backbone
from sidetune.backbones.base import Backbone
from sidetune.data import Dataset
from sidetune.data.pictures import DECODERS, Picture, decoded, pictures
from sidetune.data.reading import Reading
from sidetune.data.views import View, views
from sidetune.ensemble import Ensemble, Seat
from sidetune.errors import ArtifactError, BackboneError, DataError, RequestError, without_remedy
from sidetune.evaluate import Evaluation, evaluate
from sidetune.extract import key_of
from sidetune.recipe import BackboneRecipe, Recipe

# largest difference of a tap's mean and std on the built-in image, in units of its std
SAME_PRECISION_LIMIT = 2e-3
OTHER_PRECISION_LIMIT = 3e-2


def load(
    run: str | Path,
    *,
    num_views: int | None = None,
    backbone: Backbone | None = None,
    weights: str | Path | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> Predictor:
    """Load a run folder, ready to predict.

    Args:
        run: a run folder that `fit` finished.
        num_views: see `Predictor`.
        backbone: the backbone itself; needed for one that was given to `fit` as an object.
        weights: where the backbone's weights are now, if not where they were.
        precision: the backbone is run in; None: as it was trained. Check values say whether it will do.
        device: ``auto`` is the GPU where there is one.

    Raises:
        ArtifactError: not a finished run, damaged, or another backbone.
        RequestError: no such device, or weights that do not fit.
    """
    place = find_device(device)
    ensemble = Ensemble.read(Path(run))
    if backbone is None:
        backbone = _build(ensemble.artifact.recipe.backbone, weights, precision)
    return Predictor(ensemble, backbone.to(place), num_views=num_views)


def _build(recipe: BackboneRecipe, weights: str | Path | None, precision: str | None) -> Backbone:
    """The backbone that a run's recipe names."""
    if re.split("[:/]", recipe.name)[0] not in BACKBONES:
        raise ArtifactError(
            f"the run was trained on {recipe.name!r}, a backbone that was given as an object: no name builds "
            "it. Type, in Python: sidetune.load(RUN, backbone=...)"
        )
    if precision is not None:
        recipe = recipe.model_copy(update={"precision": precision})
    if weights is not None:
        recipe = recipe.model_copy(update={"weights": str(weights)})
    elif recipe.weights not in (None, "hub", "random") and not Path(str(recipe.weights)).exists():
        raise ArtifactError(
            f"the run was trained with the weights {recipe.weights}, and they are not there (any more, or "
            "seen from this folder). Type: --weights with their path"
        )
    try:
        return build_backbone(recipe.name, **recipe.arguments())
    except BackboneError as error:
        if weights is None:
            raise
        raise ArtifactError(
            f"{without_remedy(error)}; the run was trained on {recipe.name}. Type: --weights with the "
            "weights that it was trained on"
        ) from error


@dataclass(frozen=True)
class Prediction:
    """What a run says about one image.

    Args:
        path: as it was given.
        label: classify: the likeliest class; None where the answer is withheld. Else None.
        values: a number an output: probabilities, or values in the targets' units.
        error: why the image could not be read; then label is None and values is empty.
        withheld: outputs whose answer is withheld: the likeliest class, or labels, whose probability
            is below what was asked for.
    """

    path: str
    label: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    withheld: tuple[str, ...] = ()


class Predictor:
    """Trained sides on their backbone: one, or an ensemble that answers in one pass.

    Args:
        trained: an artifact, or an ensemble of them.
        backbone: must have the artifact's identity and give its taps.
        num_views: more views of each image, whose outputs are averaged with its own; None: as the run
            was scored. See `sidetune.data.views`. Clips are answered for as the run was scored.

    Raises:
        ArtifactError: another identity, missing taps, or other check values.
        RequestError: fewer than no views, or views of a clip.
    """

    def __init__(
        self, trained: Artifact | Ensemble, backbone: Backbone, *, num_views: int | None = None
    ) -> None:
        if isinstance(trained, Artifact):
            trained = Ensemble((Seat(".", trained, 1.0),), trained.scores)
        self.ensemble = trained
        self.artifact, self.backbone = self.ensemble.artifact, backbone
        self._check()
        self.reading = _scored(self.artifact.recipe, num_views, backbone.frames)
        self.committee = self.ensemble.committee(backbone.device)

    @property
    def clips(self) -> bool:
        """Whether it answers for clips."""
        return self.artifact.recipe.clips.frames is not None

    def predict(self, paths: Sequence[str | Path], *, abstain_below: float | None = None) -> list[Prediction]:
        """One `Prediction` an image file, in order; unreadable files have an error instead.

        Args:
            paths: of image files.
            abstain_below: withhold an answer whose probability is below this; None: answer always.

        Raises:
            RequestError: a single path, not a list; a threshold outside 0..1, or one for a regression.
        """
        self.check_request(paths, abstain_below)
        (values,), bad = answer_together([self], [Path(path) for path in paths])
        return self.in_words(paths, values, bad, abstain_below)

    def in_words(
        self,
        paths: Sequence[str | Path],
        values: Tensor,
        bad: Mapping[int, str],
        abstain_below: float | None = None,
    ) -> list[Prediction]:
        """Predictions (n, K), and number of a file -> why it could not be read, as `predict` gives them."""
        threshold = abstain_below or 0.0
        return [
            Prediction(str(path), error=bad[at]) if at in bad else self._prediction(str(path), row, threshold)
            for at, (path, row) in enumerate(zip(paths, values.tolist(), strict=True))
        ]

    def check_request(self, paths: Sequence[str | Path], abstain_below: float | None) -> None:
        """Refuse what `predict` cannot answer, before any image is read.

        Raises:
            RequestError: as there.
        """
        if isinstance(paths, str | Path):
            raise RequestError(
                f"got the path {str(paths)!r}, expected a list. Type: predict([{str(paths)!r}])"
            )
        if abstain_below is None:
            return
        if self.artifact.task.kind == "regress":
            raise RequestError(
                "--abstain-below needs probabilities, and the run is a regression. Leave it out"
            )
        if not 0 <= abstain_below <= 1:
            raise RequestError(
                f"got --abstain-below {abstain_below:g}, expected a probability from 0 to 1. "
                "Type: --abstain-below 0.9"
            )

    def _prediction(self, path: str, row: list[float], threshold: float) -> Prediction:
        outputs = self.artifact.task.outputs
        values = dict(zip(outputs, row, strict=True))
        if self.artifact.task.kind != "classify":
            unsure = [name for name, value in values.items() if max(value, 1 - value) < threshold]
            return Prediction(path, None, values, withheld=tuple(unsure))
        label = outputs[row.index(max(row))]
        if values[label] < threshold:
            return Prediction(path, None, values, withheld=(label,))
        return Prediction(path, label, values)

    def evaluate(self, dataset: Dataset, rows: NDArray[np.int64]) -> tuple[Evaluation, dict[int, str]]:
        """Scores on labelled images, with intervals.

        Args:
            dataset: its classes must be known to the run, in any order.
            rows: the rows to score.

        Returns:
            The evaluation, and row -> reason for images that could not be read.

        Raises:
            DataError: another task, a class the run does not know, or no readable image.
        """
        self.targets(dataset)  # what does not fit is said before any image is read
        (values,), skipped = answer_together([self], [dataset.file(row) for row in rows.tolist()])
        return self.scored(dataset, rows, values, skipped)

    def scored(
        self, dataset: Dataset, rows: NDArray[np.int64], values: Tensor, skipped: Mapping[int, str]
    ) -> tuple[Evaluation, dict[int, str]]:
        """`evaluate`, of predictions (n, K) that are there already; number of a row -> why it is not."""
        targets = self.targets(dataset)[rows]
        readable = [at for at in range(len(rows)) if at not in skipped]
        if not readable:
            raise DataError(
                f"none of {len(rows)} images of {dataset.root} can be read, expected at least one"
            )
        predictions = values.double().numpy()[readable]
        found = evaluate(self.artifact.task, predictions, targets[readable])
        return found, {int(rows[at]): reason for at, reason in skipped.items()}

    def targets(self, dataset: Dataset) -> NDArray[np.int64] | NDArray[np.float32]:
        """The dataset's targets in the run's order of classes or columns; -1 where there is no class.

        Raises:
            DataError: another task, or a class that the run does not know.
        """
        task = self.artifact.task
        known_at = {name: at for at, name in enumerate(task.outputs)}
        unknown = [name for name in dataset.outputs if name not in known_at]
        if dataset.task != task.kind or unknown:
            got = ", ".join((unknown or list(dataset.outputs))[:5])
            known = ", ".join(task.outputs[:5]) + (" .." if task.num_outputs > 5 else "")
            raise DataError(
                f"the data are for {dataset.task} with {got}; the run knows {task.kind} with {known}. "
                "Rename the folders or columns to the run's"
            )
        position = np.array([known_at[name] for name in dataset.outputs])
        if task.kind == "classify":
            known_targets = position[dataset.targets.astype(np.int64)]
            return np.where(dataset.targets < 0, -1, known_targets)
        columns = np.full((len(dataset), task.num_outputs), np.nan, dtype=np.float32)
        columns[:, position] = dataset.targets
        return columns

    def _check(self) -> None:
        difference = self.backbone.identity.difference(self.artifact.identity)
        if difference:
            raise ArtifactError(
                "the backbone here is not the one that the run was trained on, there: "
                + "; ".join(difference)
                + ". Type: --weights with the path of the weights that it was trained on, or, in Python, "
                "sidetune.load(RUN, backbone=...)"
            )
        read = dict.fromkeys(name for seat in self.ensemble.seats for name in seat.artifact.spec.names)
        lacking = [name for name in read if name not in self.backbone.spec.names]
        if lacking:
            raise ArtifactError(
                f"the backbone reads the taps {', '.join(self.backbone.spec.names)} and lacks "
                f"{', '.join(lacking)}, which the run reads. Build it with taps=None"
            )
        same = self.backbone.variant.precision == self.artifact.variant.precision
        limit = SAME_PRECISION_LIMIT if same else OTHER_PRECISION_LIMIT
        found = self.backbone.check_values()
        for name, (mean, std) in self.artifact.check_values.items():
            if name not in found:
                continue  # a tap that neither the run nor this backbone reads
            off = max(abs(found[name][0] - mean), abs(found[name][1] - std)) / max(std, 1e-12)
            if not off <= limit:
                raise ArtifactError(
                    f"tap {name!r} has mean {found[name][0]:.4g} and std {found[name][1]:.4g} on the "
                    f"built-in image, expected {mean:.4g} and {std:.4g} within {limit:g} std: the backbone "
                    "has the right weights and computes something else. Type: the fit command on this "
                    "machine, with a new --out"
                )


def _scored(recipe: Recipe, num_views: int | None, frames: int | None) -> Reading:
    """What is read of every sample and averaged, and no more."""
    if num_views is None:
        reading = recipe.reading(frames)
        return replace(reading, views=reading.views[: reading.scored])
    if recipe.clips.frames is not None:
        raise RequestError(
            f"got --views {num_views}, and the run is of clips: views are of images. Leave it out"
        )
    if num_views < 0:
        raise RequestError(f"got --views {num_views}, expected 0 or more. Type: --views 4")
    features = recipe.features  # the tiles that a run was scored on stay, unless the image alone is asked for
    tiles = features.tiles if num_views and features.average_views else 0
    shown = views(num_views, flip=features.flip, tiles=tiles)
    return Reading.of_images(shown, averaged=True)


def answer_together(
    predictors: Sequence[Predictor], files: Sequence[Path]
) -> tuple[list[Tensor], dict[int, str]]:
    """What predictors on one backbone say about images, in one pass over these.

    Args:
        predictors: with the same backbone and reading. None of them sees that there are others.
        files: n images.

    Returns:
        Of each predictor its predictions (n, K) on the CPU; and number of a file -> why it could not be read.
    """
    backbone, reading = predictors[0].backbone, predictors[0].reading
    shown = _pictures(files, reading)
    of_file = len(reading.views) * reading.together
    outputs = [
        [torch.zeros(len(one.committee.voices), 0, one.artifact.task.num_outputs)] for one in predictors
    ]
    unreadable: dict[int, str] = {}
    batches = partial(decoded, call_size=backbone.call_size, together=reading.together)
    with ThreadPoolExecutor(DECODERS) as pool, torch.inference_mode():
        for first, images, bad in batches(shown, backbone.preprocess, pool):
            features = reading.joined(backbone(images)).to(backbone.device, torch.float32)
            for own, one in zip(outputs, predictors, strict=True):
                own.append(one.committee.outputs(features))
            del features  # before the next are computed
            unreadable |= {(first + slot) // of_file: reason for slot, reason in bad.items()}
    averaged = [torch.cat(own, 1).unflatten(1, (len(files), len(reading.views))).mean(2) for own in outputs]
    return [one.committee.predictions(own) for one, own in zip(predictors, averaged, strict=True)], unreadable


def _pictures(files: Sequence[Path], reading: Reading) -> list[Picture]:
    """Of every file in turn what is read of it; crops alone are drawn from its bytes."""
    shown = [reading.stored[number] for view in reading.views for number in view]
    drawn = any(isinstance(view, View) and view.crop for view in shown)
    keys = [key_of(file, file) if drawn else "" for file in files]
    return pictures(files, keys, shown)
