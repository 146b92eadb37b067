"""Stage four: what a fit has found out, written into run folders.

artifact_of(job, fingerprint)    artifacts of a job, given what is a network's own
write_job(job, rows, ..)         one run folder; artifact.json last but for the page that reads it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sidetune.artifact import Artifact
from sidetune.files import write_json
from sidetune.findings import collect
from sidetune.fleet_run import fleet_json, write_fleet
from sidetune.job import Job
from sidetune.leaks import Leaks
from sidetune.methods import Row
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.runs import environment, write_run
from sidetune.sides import SOLVED
from sidetune.sources import StoredSource
from sidetune.tasks import Task


def write_job(job: Job, rows: Sequence[Row], leaks: Leaks | None, fingerprint: str, peak_memory: int) -> None:
    """Write the run folder of a job, but for recipe.json, skipped.csv and the page.

    Args:
        job: that has ended.
        rows: its score table, the run's own side last.
        leaks: as `find_leaks` found them; None where nobody looked.
        fingerprint: of its dataset.
        peak_memory: bytes of this process while it was worked on.
    """
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


def artifact_of(job: Job, fingerprint: str) -> Callable[..., Artifact]:
    """Artifacts of a job, given what is a network's own."""
    check_values = job.backbone.check_values()  # of all networks, measured once

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
            check_values,
            temperature,
            fingerprint,
            scores,
        )

    return artifact


def about(job: Job) -> dict[str, Any]:
    """What metrics.json says of the job itself."""
    return {
        "backbone": job.recipe.backbone.name,
        "task": job.task.kind,
        "outputs": list(job.task.outputs),
        "headline": job.task.headline,
        "data": {
            "name": job.dataset.name,
            **{f"num_{name}": len(rows) for name, rows in job.split.items()},
            "num_skipped": len(job.skipped),
            "num_animated": len(job.source.animated),
        },
    }


def store_bytes(job: Job) -> int | None:
    """Bytes of the store that the job reads; None where it reads the backbone."""
    return job.source.store.num_bytes if isinstance(job.source, StoredSource) else None


def _metrics(job: Job, rows: Sequence[Row], peak_memory: int, findings: float) -> dict[str, Any]:
    """What metrics.json holds."""
    own, solved, device = rows[-1].fitted, job.recipe.side.name in SOLVED, job.backbone.device
    seconds = {row.fitted.name: row.fitted.seconds for row in rows}
    models = [own.model] if own.fleet is None else [voice.model for voice in own.fleet.voices]
    if not solved:
        seconds["train"] = seconds.pop(own.name)
    return {
        "side": own.name,
        **about(job),
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
            "store_bytes": store_bytes(job),
        },
        "environment": environment(device),
    }
