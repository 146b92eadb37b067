"""`fit`: from images to a run folder. Data -> backbone -> features -> probes -> side -> scores.

    RUN/recipe.json        what was asked for, its hash, and fingerprints of data and backbone
    RUN/metrics.json       scores with intervals of every method, cost, environment
    RUN/history.jsonl      one line an epoch
    RUN/side.safetensors, artifact.json    what `load` needs; artifact.json comes last
    RUN/predictions.csv    validation and test samples, one line each
    RUN/skipped.csv        images that could not be read, and why
    RUN/report.html        all of it on one page

The same command on a finished run prints its result; on an interrupted one it resumes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidetune.artifact import Artifact, build_model, find_device
from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone
from sidetune.data import load_dataset
from sidetune.data.dataset import Dataset
from sidetune.errors import DataError
from sidetune.evaluate import Evaluation, evaluate, scores
from sidetune.extract import extract, sample_keys
from sidetune.files import locked
from sidetune.memory import PeakMemory
from sidetune.model import SideModel
from sidetune.probes import Pooled, Probe, fit_linear, fit_ridge
from sidetune.recipe import Recipe
from sidetune.report import write_report
from sidetune.runs import Run, begin_run, default_store, environment, write_run
from sidetune.sides import SOLVED
from sidetune.sides.linear import LinearRecipe
from sidetune.sides.ridge import RidgeRecipe
from sidetune.sources import LiveSource, Source, StoredSource
from sidetune.tasks import Task, build_task
from sidetune.train import Trained, TrainingSet, train


def fit(
    data: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    backbone: Backbone | None = None,
    store: str | Path | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Run:
    """Train a side network on images and write a run folder.

    Args:
        data: a folder of classes, a VTAB folder, or a CSV; see `sidetune.data.load_dataset`.
        out: the run folder; made, resumed, or found finished.
        recipe: everything that decides the result; None: `Recipe()`, LoSA on the demo backbone.
        backbone: your own, in place of the one that the recipe names.
        store: where features are kept; None: ``$SIDETUNE_STORES`` or ./.sidetune/stores.
        device: ``auto`` is the GPU where there is one.
        quiet: no progress.

    Returns:
        The finished run.

    Raises:
        RequestError: data, recipe or backbone are not what they should be.
        StoreError: the store belongs to another backbone, or the disk is full.
        ArtifactError: the run folder holds another run.
        DivergedError: training diverged.
    """
    recipe = Recipe() if recipe is None else recipe
    out = Path(out)
    dataset = load_dataset(
        Path(data),
        task=recipe.data.task,
        labels=recipe.data.labels,
        split_seed=recipe.data.split_seed,
        val_fraction=recipe.data.val_fraction,
        test_fraction=recipe.data.test_fraction,
    )
    if backbone is None:
        backbone = build_backbone(recipe.backbone.name, **recipe.backbone.arguments())
    backbone.to(find_device(device))
    keys = sample_keys(dataset)
    with locked(out):
        finished = begin_run(out, recipe, dataset.fingerprint(keys), backbone.identity.digest)
        if finished is not None:
            return finished
        with PeakMemory() as memory:
            job = _Job(recipe, dataset, backbone, out, quiet)
            job.open_source(keys, None if store is None else Path(store))
            job.answer_with_probes()
            job.fit_side()
        job.finish(memory.peak)
    return Run.open(out)


@dataclass
class _Row:
    """One line of the score table, with the validation and test predictions behind it."""

    method: str
    parameters: int
    seconds: float
    detail: dict[str, Any]
    val: Evaluation
    test: Evaluation | None
    predictions: dict[str, Tensor]

    def to_json(self) -> dict[str, Any]:
        test = None if self.test is None else self.test.to_json()
        return {
            "method": self.method,
            "parameters": self.parameters,
            "seconds": self.seconds,
            "detail": self.detail,
            "val": self.val.to_json(),
            "test": test,
        }


@dataclass
class _Job:
    """One run's stages, in order; each adds to `seconds` and `rows`."""

    recipe: Recipe
    dataset: Dataset
    backbone: Backbone
    out: Path
    quiet: bool
    seconds: dict[str, float] = field(default_factory=dict)
    rows: list[_Row] = field(default_factory=list)
    trained: Trained | None = None

    def open_source(self, keys: Sequence[str], folder: Path | None) -> None:
        """Stage one: features of every row, from a store or live; then splits, task and summary."""
        started = time.monotonic()
        self.store_bytes: int | None = None
        self.source: Source
        if self.recipe.features.mode == "live":
            self.source = LiveSource(self.dataset, self.backbone, quiet=self.quiet)
        else:
            folder = default_store(self.backbone, self.recipe.features.dtype) if folder is None else folder
            self._say(f"features in {folder} ({self.recipe.features.dtype})")
            dtype = self.recipe.features.dtype
            store = extract(self.dataset, self.backbone, folder, dtype=dtype, quiet=self.quiet)
            self.source = StoredSource(store, keys, self.backbone.spec)
            self.store_bytes = store.num_bytes
        valid = self.source.valid
        self.split = {
            name: rows[valid[rows]] for name in ("train", "val", "test") for rows in [self.dataset.rows(name)]
        }
        if not len(self.split["train"]) or not len(self.split["val"]):
            counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.split.items())
            raise DataError(
                f"got {counts} readable images, expected some in train and val. See {self.out}/skipped.csv"
            )
        self.task: Task = build_task(
            self.recipe.data.task,
            self.dataset,
            self.split["train"],
            class_weights=self.recipe.data.class_weights,
            label_smoothing=self.recipe.data.label_smoothing,
        )
        self.targets = torch.from_numpy(self.dataset.targets)
        self.summary = self.source.summary()
        self.seconds["features"] = time.monotonic() - started

    def answer_with_probes(self) -> None:
        """Stage two: ridge on all taps and on the last, and the linear probe; the opponents."""
        pooled = Pooled(
            self.summary, self.targets, self.split["train"], self.split["val"], self.dataset.group
        )
        asked = self.recipe.side
        probes: dict[str, RidgeRecipe | LinearRecipe] = {
            "ridge-last": RidgeRecipe(taps="last"),
            "ridge": RidgeRecipe(),
            "linear": LinearRecipe(),
        }
        if isinstance(asked, RidgeRecipe | LinearRecipe):
            probes.pop(asked.name)
            probes[asked.name] = asked  # the run's own row comes last
        for name, probe_recipe in probes.items():
            started = time.monotonic()
            if isinstance(probe_recipe, RidgeRecipe):
                probe = fit_ridge(probe_recipe, pooled, self.task)
            else:
                probe = fit_linear(
                    probe_recipe,
                    pooled,
                    self.task,
                    norm=self.recipe.head.norm,
                    final_norm=self.source.final_norm,
                )
            self._add_probe(name, probe, time.monotonic() - started)

    def fit_side(self) -> None:
        """Stage three: the side itself, unless it was solved among the probes."""
        if self.recipe.side.name in SOLVED:
            return
        started = time.monotonic()
        recipe = self.recipe.train.resolved(len(self.split["train"]))
        self.resolved = self.recipe.model_copy(update={"train": recipe})
        model = build_model(self.recipe, self.source.spec, self.task.num_outputs, self.source.final_norm)
        if self.recipe.features.tap_scale == "rms":
            model.side.tap_scale.copy_(self.summary.rows(torch.from_numpy(self.split["train"])).tap_scale())
        model.start([recipe.seed])
        self.model = model.to(self.backbone.device)
        self.trained = train(
            self.model,
            TrainingSet(self.source.features, self.targets, self.split["train"]),
            self.task,
            recipe,
            seeds=[recipe.seed],
            validate=self._validate,
            checkpoint=self.out / "checkpoint.safetensors",
            run_hash=self.recipe.hash,
            quiet=self.quiet,
        )
        self.seconds["train"] = time.monotonic() - started
        started = time.monotonic()
        self.model.eval()
        outputs = {name: self._outputs(self.model, name)[0] for name in ("val", "test")}
        parameters = model.side.num_parameters() + sum(p.numel() for p in model.norm.parameters())
        detail = {"epochs": recipe.epochs, "lr": recipe.lr}
        self._add_row(self.recipe.side.name, parameters, self.seconds["train"], detail, outputs)
        self.seconds["evaluate"] = time.monotonic() - started

    def finish(self, peak_memory: int) -> None:
        """Stage four: write the run folder; artifact.json last but for the page that reads it."""
        own = self.rows[-1]
        model = self.model.cpu().eval()
        head = sum(parameter.numel() for parameter in model.head.parameters())
        metrics = {
            "side": self.recipe.side.name,
            "backbone": self.recipe.backbone.name,
            "task": self.task.kind,
            "outputs": list(self.task.outputs),
            "headline": self.task.headline,
            "data": {
                "name": self.dataset.root.name,
                **{f"num_{name}": len(rows) for name, rows in self.split.items()},
                "num_skipped": len(self.source.skipped),
            },
            "rows": [row.to_json() for row in self.rows],
            "cost": {
                "parameters": own.parameters,
                "head_parameters": head,
                "seconds": self.seconds,
                "peak_memory_bytes": peak_memory,
                "store_bytes": self.store_bytes,
            },
            "environment": environment(self.backbone.device),
        }
        write_run(
            self.out,
            metrics,
            [] if self.trained is None else self.trained.history,
            self.dataset,
            self.task,
            {name: (self.split[name], own.predictions[name]) for name in ("val", "test")},
            self.source.skipped,
        )
        split_scores = {"val": own.val.scores, "test": None if own.test is None else own.test.scores}
        artifact = Artifact(
            model,
            self.resolved,
            self.task,
            self.source.spec,
            self.backbone.identity,
            self.backbone.variant,
            None if self.source.final_norm is None else self.source.final_norm.eps,
            self.backbone.check_values(),
            self.dataset.fingerprint(sample_keys(self.dataset)),
            split_scores,
        )
        artifact.save(self.out)
        (self.out / "checkpoint.safetensors").unlink(missing_ok=True)
        write_report(self.out)

    def _add_probe(self, name: str, probe: Probe, seconds: float) -> None:
        outputs = {split: probe.outputs(self.summary, self.split[split]) for split in ("val", "test")}
        self.seconds[name] = seconds
        self._add_row(name, 0, seconds, probe.detail, outputs)
        if name == self.recipe.side.name:
            self.model = probe.model
            self.resolved = self.recipe.model_copy(update={"side": probe.recipe})

    def _add_row(
        self, method: str, parameters: int, seconds: float, detail: dict[str, Any], outputs: dict[str, Tensor]
    ) -> None:
        predictions = {name: self.task.predictions(output) for name, output in outputs.items()}
        evaluations = {
            name: evaluate(self.task, values.double().numpy(), self.dataset.targets[self.split[name]])
            if len(values)
            else None
            for name, values in predictions.items()
        }
        val, test = evaluations["val"], evaluations["test"]
        assert val is not None, "there is always a validation split"
        self.rows.append(_Row(method, parameters, seconds, detail, val, test, predictions))
        shown = " · ".join(
            f"{name} {evaluation.scores[self.task.headline]:.3f}"
            for name, evaluation in (("val", val), ("test", test))
            if evaluation is not None and evaluation.scores[self.task.headline] is not None
        )
        self._say(f"{method}: {self.task.headline.replace('_', ' ')} {shown} ({seconds:.1f} s)")

    def _validate(self, model: torch.nn.Module) -> list[dict[str, float | None]]:
        assert isinstance(model, SideModel)
        targets = self.dataset.targets[self.split["val"]]
        members = self.task.predictions(self._outputs(model, "val")).double().numpy()
        return [scores(self.task, predictions, targets) for predictions in members]

    def _outputs(self, model: SideModel, split: str) -> Tensor:
        """Outputs of a split: (M, n, K), on the CPU."""
        device = self.backbone.device
        parts = [torch.zeros(model.side.members, 0, self.task.num_outputs)]
        with torch.no_grad():
            parts += [
                model(batch.to(device)).float().cpu() for batch in self.source.batches(self.split[split])
            ]
        return torch.cat(parts, 1)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)  # noqa: T201
