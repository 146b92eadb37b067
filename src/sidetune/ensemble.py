"""Several trained sides that answer as one, in one pass.

Their probabilities are averaged by their logarithms (log-linear pool: Heskes, NIPS 1997), which is the
softmax of the weighted mean of their outputs, each over its own temperature. Numbers are averaged as such.

    RUN/artifact.json           names the members, their weights and the sha256 of each artifact.json
    RUN/members/<hash>/         each a whole artifact, which answers alone as well

Sides of one architecture are stacked into one model with a member axis, so a tap is read once for all of
them, as in training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, FiniteFloat
from torch import Tensor

from sidetune.artifact import COPY, ENSEMBLE_FORMAT, Artifact, read_fields, refused
from sidetune.errors import ArtifactError
from sidetune.features import Features
from sidetune.files import sha256_file, write_json
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.selection import EPSILON
from sidetune.tasks import Task

SLACK = 1e-6  # of the weights' sum: rounding


@dataclass(frozen=True, eq=False)
class Voice:
    """One of the sides that answer.

    Args:
        model: of one member, in eval mode.
        recipe: that describes it.
        task: what its outputs mean.
        temperature: that they are divided by.
        weight: in the answer; those of all voices sum to 1.
    """

    model: SideModel
    recipe: Recipe
    task: Task
    temperature: float = 1.0
    weight: float = 1.0

    @classmethod
    def of(cls, artifact: Artifact, weight: float = 1.0) -> Voice:
        """The voice of an artifact."""
        return cls(artifact.model, artifact.recipe, artifact.task, artifact.temperature, weight)

    def predictions(self, output: Tensor) -> Tensor:
        """What its outputs (n, K) say."""
        return self.task.predictions(output / self.temperature)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Voices of one kind can be one model."""
        side = self.recipe.side.model_dump(mode="json", exclude={"drop_path"})
        shapes = tuple((name, one.shape) for name, one in self.model.named_parameters())
        frozen = tuple((name, one.tolist()) for name, one in self.model.named_buffers())
        return (repr(side), repr(self.recipe.head), self.model.side.spec.names, shapes, repr(frozen))


class Committee:
    """Voices that answer together.

    Args:
        voices: one or more, of tasks with the same outputs.
        device: where they answer.
    """

    def __init__(self, voices: Sequence[Voice], device: torch.device) -> None:
        assert voices
        self.voices = tuple(voices)
        kinds: dict[Any, list[int]] = {}
        for number, voice in enumerate(voices):
            kinds.setdefault(voice.kind, []).append(number)
        self._stacks = [
            (numbers, stacked([voices[number].model for number in numbers]).to(device).eval())
            for numbers in kinds.values()
        ]

    @property
    def taps(self) -> frozenset[str]:
        """Names of the taps that any voice reads."""
        return frozenset(name for _, model in self._stacks for name in model.side.spec.names)

    def outputs(self, features: Features) -> Tensor:
        """Outputs of every voice: (voices, B, K), on the CPU. Call it without gradients."""
        found: list[Tensor] = [torch.empty(0)] * len(self.voices)
        for numbers, model in self._stacks:
            output_MBK = model(features.select(model.side.spec.names)).float().cpu()
            for number, output_BK in zip(numbers, output_MBK, strict=True):
                found[number] = output_BK
        return torch.stack(found)

    def predictions(self, outputs: Tensor) -> Tensor:
        """What they answer: (voices, n, K) -> (n, K)."""
        found = [voice.predictions(output) for voice, output in zip(self.voices, outputs, strict=True)]
        return pooled(self.voices[0].task, found, [voice.weight for voice in self.voices])


def pooled(task: Task, predictions: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Several predictions as one: (n, K).

    Args:
        task: what they mean.
        predictions: (n, K) each, as `Task.predictions` gives them.
        weights: one each, of sum 1.
    """
    if len(predictions) == 1:  # to the bit what the one says
        return predictions[0]

    def mean(of_each: Sequence[Tensor]) -> Tensor:
        return torch.stack([weight * one for weight, one in zip(weights, of_each, strict=True)]).sum(0)

    if task.kind == "regress":
        return mean(predictions)
    sure = [one.double().clamp(EPSILON, 1 - EPSILON) for one in predictions]
    if task.kind == "multilabel":
        return mean([one.logit() for one in sure]).sigmoid().to(predictions[0])
    return mean([one.log() for one in sure]).softmax(-1).to(predictions[0])


def stacked(models: Sequence[SideModel]) -> SideModel:
    """Models of one member each, of one architecture, as one model: (M, B, K) in their order."""
    if len(models) == 1:
        return models[0]
    whole = copy.deepcopy(models[0])
    whole.side.members = len(models)
    parts = [dict(model.named_parameters()) for model in models]
    for name, parameter in whole.named_parameters():
        parameter.data = torch.cat([one[name].detach() for one in parts])
    return whole


@dataclass(frozen=True)
class Seat:
    """A member of an ensemble.

    Args:
        folder: of its artifact, relative to the run's.
        artifact: itself.
        weight: of its predictions.
    """

    folder: str
    artifact: Artifact
    weight: float


@dataclass(frozen=True)
class Ensemble:
    """Artifacts that answer together.

    Args:
        seats: one or more; weights sum to 1.
        scores: of the run, by split.
    """

    seats: tuple[Seat, ...]
    scores: dict[str, Any]

    @property
    def artifact(self) -> Artifact:
        """The first: recipe, outputs, backbone and check values are those of all."""
        return self.seats[0].artifact

    def committee(self, device: torch.device) -> Committee:
        """Ready to answer."""
        return Committee([Voice.of(seat.artifact, seat.weight) for seat in self.seats], device)

    def save(self, folder: Path) -> None:
        """Write artifact.json, which names the members that are there already."""
        write_json(
            folder / "artifact.json",
            {
                "format": ENSEMBLE_FORMAT,
                "sidetune": version("sidetune"),
                "members": [
                    {
                        "folder": seat.folder,
                        "weight": seat.weight,
                        "artifact": sha256_file(folder / seat.folder / "artifact.json"),
                    }
                    for seat in self.seats
                ],
                "scores": self.scores,
            },
        )

    @classmethod
    def read(cls, folder: Path) -> Ensemble:
        """Read what answers for a run: its ensemble, or its one side as an ensemble of one.

        Raises:
            ArtifactError: there is none, it is damaged, or it has another format version.
        """
        fields = read_fields(folder)
        if fields["format"] != ENSEMBLE_FORMAT:
            artifact = Artifact.read(folder)
            return cls((Seat(".", artifact, 1.0),), artifact.scores)
        path = folder / "artifact.json"
        with refused(path):
            named = _Members.model_validate(fields)
            if abs(total := sum(one.weight for one in named.members) - 1) > SLACK:
                raise ValueError(f"weights sum to {total + 1:g}, expected 1")
        seats = []
        for one in named.members:
            own = folder / one.folder / "artifact.json"
            if not own.resolve().is_relative_to(folder.resolve()):
                raise ArtifactError(f"{path} is damaged: its member {one.folder!r} is elsewhere. {COPY}")
            if not own.exists() or sha256_file(own) != one.artifact:
                what = "was exchanged" if own.exists() else "is missing"
                raise ArtifactError(f"{own} {what}, and {path} needs it. {COPY}")
            seats.append(Seat(one.folder, Artifact.read(own.parent), one.weight))
        _check_alike(path, [seat.artifact for seat in seats])
        return cls(tuple(seats), named.scores)


class _Member(BaseModel):
    """A member as artifact.json names it."""

    folder: str
    weight: FiniteFloat = Field(gt=0)
    artifact: str


class _Members(BaseModel):
    """What an ensemble's artifact.json holds."""

    members: list[_Member] = Field(min_length=1)
    scores: dict[str, Any]


def _check_alike(path: Path, artifacts: Sequence[Artifact]) -> None:
    """Members answer the same question about the same backbone."""
    first = artifacts[0]
    for one in artifacts[1:]:
        if one.identity != first.identity or (one.task.kind, one.task.outputs) != (
            first.task.kind,
            first.task.outputs,
        ):
            raise ArtifactError(
                f"{path} is damaged: its members have different backbones, tasks or outputs. {COPY}"
            )
