"""Run folders: beginning one, finding one finished, writing its plain files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.artifact import Artifact
from sidetune.backbones.base import Backbone
from sidetune.checkpoint import Epoch
from sidetune.data.dataset import Dataset
from sidetune.errors import ArtifactError
from sidetune.files import csv_text, write_json, write_text
from sidetune.recipe import Recipe
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
            ArtifactError: it is not finished.
        """
        if not (folder / "artifact.json").exists():
            raise ArtifactError(
                f"{folder} is not a finished run: it has no artifact.json. "
                f"Type: sidetune fit .. --out {folder}"
            )
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return cls(folder, metrics, json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["hash"])

    @property
    def row(self) -> dict[str, Any]:
        """The run's own line of the score table."""
        own: dict[str, Any] = self.metrics["rows"][-1]
        return own

    def artifact(self) -> Artifact:
        """The trained side, without its backbone."""
        return Artifact.read(self.folder)


def begin_run(folder: Path, recipe: Recipe, data: str, backbone: str) -> Run | None:
    """Claim a run folder for this recipe, data and backbone, or find the run finished there.

    Raises:
        ArtifactError: the folder holds another run; names what differs.
    """
    asked = {
        "recipe": recipe.model_dump(mode="json"),
        "hash": recipe.hash,
        "data": data,
        "backbone": backbone,
    }
    path = folder / "recipe.json"
    if not path.exists():
        write_json(path, asked)
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = [
        {"hash": "recipe"}.get(key, key)
        for key in ("hash", "data", "backbone")
        if found.get(key) != asked[key]
    ]
    if differing:
        raise ArtifactError(
            f"{folder} holds a run with another {' and another '.join(differing)}"
            f"{_difference(found.get('recipe', {}), recipe)}. Type: --out with a new folder"
        )
    return Run.open(folder) if (folder / "artifact.json").exists() else None


def _difference(found: Mapping[str, Any], recipe: Recipe) -> str:
    """The recipe fields that differ: `` (train.lr: 0.001 there, 0.003 asked)``."""
    lines = []
    for part, fields in recipe.model_dump(mode="json").items():
        there = found.get(part, {})
        names = sorted(fields.keys() | there.keys())
        lines += [
            f"{part}.{name}: {there.get(name)} there, {fields.get(name)} asked"
            for name in names
            if there.get(name) != fields.get(name)
        ]
    return f" ({'; '.join(lines)})" if lines else ""


def write_run(
    folder: Path,
    metrics: dict[str, Any],
    history: Sequence[Epoch],
    dataset: Dataset,
    task: Task,
    predictions: Mapping[str, tuple[NDArray[np.int64], Tensor]],
    skipped: Mapping[int, str],
) -> None:
    """Write metrics.json, history.jsonl, predictions.csv and skipped.csv.

    Args:
        folder: the run folder.
        metrics: the run's own summary.
        history: one `Epoch` an epoch, none for a solved side.
        dataset: names the samples.
        task: names the outputs.
        predictions: split -> (rows, predictions (n, K)).
        skipped: row -> reason.
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
    reasons = [[dataset.paths[row].as_posix(), reason] for row, reason in sorted(skipped.items())]
    write_text(folder / "skipped.csv", csv_text([["path", "reason"], *reasons]))


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


def _target_names(task: Task) -> list[str]:
    return ["label", "predicted"] if task.kind == "classify" else [f"label_{name}" for name in task.outputs]


def _targets(dataset: Dataset, task: Task, row: int, value: Sequence[float]) -> list[Any]:
    target = dataset.targets[row]
    if task.kind == "classify":
        return [task.outputs[int(target)], task.outputs[value.index(max(value))]]
    return ["" if np.isnan(number) else f"{number:.6g}" for number in target]
