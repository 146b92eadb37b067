"""Run folders: beginning one, finding one finished, writing its plain files."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from torch import Tensor

from sidetune.artifact import AGAIN, COLUMNS, Artifact, not_a_run
from sidetune.backbones.base import Backbone
from sidetune.checkpoint import Epoch
from sidetune.data.dataset import Dataset
from sidetune.errors import ArtifactError, RequestError, first_complaint
from sidetune.files import csv_text, read_json, write_json, write_text
from sidetune.recipe import UNHASHED, Recipe
from sidetune.store import DTypeName, stores_root
from sidetune.tasks import Task


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it stands.
        metrics: as metrics.json holds it: scores of every method, cost, environment.
        recipe_hash: what it is known by.
    """

    folder: Path
    metrics: dict[str, Any]
    recipe_hash: str

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a finished run.

        Raises:
            ArtifactError: it is not finished, or damaged.
        """
        if not (folder / "artifact.json").exists():
            raise ArtifactError(not_a_run(folder))
        metrics, asked = read_object(folder / "metrics.json"), read_object(folder / "recipe.json")
        try:
            _Metrics.model_validate(metrics)
            lacking = {
                row["method"] for row in metrics["rows"] if metrics["headline"] not in row["val"]["scores"]
            }
        except ValidationError as error:
            raise ArtifactError(
                f"{folder / 'metrics.json'} is damaged: {first_complaint(error)}. {AGAIN}"
            ) from error
        if lacking:
            raise ArtifactError(
                f"{folder / 'metrics.json'} is damaged: {metrics['headline'][:99]!r} is no score of "
                f"{', '.join(sorted(lacking))[:99]}. {AGAIN}"
            )
        return cls(folder, metrics, str(asked.get("hash")))

    @property
    def row(self) -> dict[str, Any]:
        """The run's own line of the score table."""
        own: dict[str, Any] = self.metrics["rows"][-1]
        return own

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {"run": str(self.folder), "recipe_hash": self.recipe_hash, **self.metrics}

    def artifact(self) -> Artifact:
        """The trained side, without its backbone."""
        return Artifact.read(self.folder)


class _Scored(BaseModel):
    """A split's part of a row of metrics.json."""

    scores: dict[str, FiniteFloat | None]
    intervals: dict[str, tuple[FiniteFloat, FiniteFloat] | None]


class _Method(BaseModel):
    """A row of metrics.json."""

    method: str
    parameters: int
    seconds: FiniteFloat
    val: _Scored
    test: _Scored | None


class _Counts(BaseModel):
    """How many images each split of metrics.json has."""

    num_train: int
    num_val: int
    num_test: int
    num_skipped: int


class _Metrics(BaseModel):
    """What everybody reads of metrics.json; there is more in it."""

    headline: str
    data: _Counts
    rows: list[_Method] = Field(min_length=1)


def find_run(folder: Path, recipe: Recipe, data: str, backbone: str) -> Run | None:
    """The finished run of this recipe, data and backbone, None where there is none yet. Writes nothing.

    A run that was interrupted before its first checkpoint has nothing to lose: its folder is free.

    Args:
        folder: the run folder.
        recipe: as asked for.
        data: the dataset's fingerprint.
        backbone: the digest of its identity.

    Raises:
        RequestError: it is a file, or a folder that holds something else than a run.
        ArtifactError: it holds another run; names what differs.
    """
    return Run.open(folder) if is_finished(folder, recipe, data, backbone) else None


def is_finished(folder: Path, recipe: Recipe, data: str, backbone: str) -> bool:
    """Whether what is asked for is finished in a folder: a run, or a run a label column. As `find_run`."""
    if not (folder / "recipe.json").exists():
        check_free(folder)
        return False
    found = read_object(folder / "recipe.json")
    differing = list(differences(found, recipe, data, backbone))
    if "sweep" in found:
        differing.insert(0, "it is a sweep")
    finished = any((folder / name).exists() for name in ("artifact.json", COLUMNS))
    if differing and is_begun(folder):
        raise ArtifactError(
            f"{folder} holds another run: {'; '.join(differing)}. Type: --out with a new folder"
        )
    return finished


def is_begun(folder: Path) -> bool:
    """Whether a folder holds work that would be lost: of a run, of runs of label columns, or of a sweep."""
    names = ("artifact.json", COLUMNS, "checkpoint.safetensors", "journal.log")
    return any((folder / name).exists() for name in names) or any(folder.glob("*/artifact.json"))


def begin_run(folder: Path, recipe: Recipe, data: str, backbone: str) -> bool:
    """Claim a run folder by writing recipe.json; or say that it is finished there. As `is_finished`."""
    finished = is_finished(folder, recipe, data, backbone)
    if not finished:
        fields = recipe.model_dump(mode="json")
        write_json(
            folder / "recipe.json",
            {"recipe": fields, "hash": recipe.hash, "data": data, "backbone": backbone},
        )
    return finished


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something else than a run.

    Raises:
        RequestError: it does, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file, expected a run folder. Type: --out with a new folder")
    others = sorted(path.name for path in folder.glob("[!.]*"))
    if others:
        raise RequestError(
            f"{folder} holds no run but {', '.join(others[:3])}{' ..' if len(others) > 3 else ''}; expected "
            "an empty or a new folder. Type: --out with a new folder"
        )


def differences(found: Mapping[str, Any], recipe: Recipe, data: str, backbone: str) -> Iterator[str]:
    """What a folder's recipe.json and what is asked for do not share, a phrase each."""
    if found.get("hash") != recipe.hash:
        yield from _field_differences(found.get("recipe", {}), recipe)
    if found.get("data") != data:
        yield "its data are others (images, labels or splits)"
    if found.get("backbone") != backbone:
        yield "its backbone is another (weights, architecture or preprocessing)"


def _field_differences(found: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    for part, fields in recipe.model_dump(mode="json").items():
        there = found.get(part, {})
        names = sorted(fields.keys() | there.keys())
        if fields.get("name") != there.get("name"):
            names = ["name"]  # of two sides no other field can be compared
        for name in names:
            if fields.get(name) != there.get(name) and name not in UNHASHED.get(part, ()):
                theirs, ours = (json.dumps(value.get(name)) for value in (there, fields))
                yield f"{part}.{name} is {theirs} there and {ours} here"


def write_run(
    folder: Path,
    metrics: dict[str, Any],
    history: Sequence[Epoch],
    dataset: Dataset,
    task: Task,
    predictions: Mapping[str, tuple[NDArray[np.int64], Tensor]],
) -> None:
    """Write metrics.json, history.jsonl and predictions.csv.

    Args:
        folder: the run folder.
        metrics: the run's own summary.
        history: one `Epoch` an epoch, none for a solved side.
        dataset: names the samples.
        task: names the outputs.
        predictions: split -> (rows, predictions (n, K)).
    """
    write_json(folder / "metrics.json", metrics)
    lines = [json.dumps(epoch.to_json()) for epoch in history]
    write_text(folder / "history.jsonl", "".join(f"{line}\n" for line in lines))
    table: list[list[Any]] = [
        ["path", "split", *_target_names(task), *(f"p_{name}" for name in task.outputs)]
    ]
    for split, (rows, values) in predictions.items():
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            target = _targets(dataset, task, row, value)
            table.append(
                [dataset.paths[row].as_posix(), split, *target, *(f"{number:.6g}" for number in value)]
            )
    write_text(folder / "predictions.csv", csv_text(table))


def write_skipped(folder: Path, dataset: Dataset, skipped: Mapping[int, str]) -> None:
    """Write skipped.csv: the path of each image that could not be read, and why (row -> reason)."""
    reasons = [[dataset.paths[row].as_posix(), reason] for row, reason in sorted(skipped.items())]
    write_text(folder / "skipped.csv", csv_text([["path", "reason"], *reasons]))


def read_skipped(folder: Path) -> list[str]:
    """``path: reason`` of each line of a run's skipped.csv.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    path = folder / "skipped.csv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        if header != ["path", "reason"]:
            raise ValueError(f"got the columns {', '.join(header)}, expected path, reason")
        return [f"{name}: {reason}" for name, reason in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise ArtifactError(f"{path} is damaged: {error}. {AGAIN}") from error


def default_store(backbone: Backbone, dtype: DTypeName) -> Path:
    """Where a backbone's features go unless told otherwise: one folder an identity and precision."""
    return stores_root() / f"{backbone.identity.digest[:16]}-{backbone.variant.precision}-{dtype}"


def environment(device: torch.device) -> dict[str, Any]:
    """What a result was computed on."""
    return {
        "sidetune": version("sidetune"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
    }


def read_object(path: Path) -> dict[str, Any]:
    """The object in a run's JSON file.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}. {AGAIN}") from error
    if not isinstance(value, dict):
        raise ArtifactError(
            f"{path} is damaged: got a {type(value).__name__}, expected an object. "
            "Type: the fit command with a new --out"
        )
    return value


def _target_names(task: Task) -> list[str]:
    return ["label", "predicted"] if task.kind == "classify" else [f"label_{name}" for name in task.outputs]


def _targets(dataset: Dataset, task: Task, row: int, value: Sequence[float]) -> list[Any]:
    target = dataset.targets[row]
    if task.kind == "classify":
        return [task.outputs[int(target)], task.outputs[value.index(max(value))]]
    return ["" if np.isnan(number) else f"{number:.6g}" for number in target]
