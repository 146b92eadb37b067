"""What a fleet leaves in a run folder beside what every run does.

    RUN/members/<hash>/     a network: side.safetensors, artifact.json and history.jsonl, a whole artifact
                            that `load` takes; not of those that diverged
    RUN/members.csv         a line a network, those that answer first
    RUN/artifact.json       of the one network that answers, with its side.safetensors; where several do, it
                            names them, their weights and the sha256 of each one's artifact.json

members.csv: ``member`` (its name), a column a setting that varies, ``fold`` that it did not train on,
``epochs``, ``loss`` of its last epoch or ``diverged``, two scores of its variation on what was held out,
``temperature``, ``weight`` in the answer, ``folder``. Networks of one variation share scores and temperature.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidetune.artifact import Artifact
from sidetune.ensemble import Ensemble, Seat
from sidetune.files import csv_text, write_text
from sidetune.fleet_fit import Candidate, Entry, FleetResult
from sidetune.job import Job
from sidetune.report_members import SECOND

ArtifactOf = Callable[..., Artifact]


def write_fleet(job: Job, fleet: FleetResult, artifact: ArtifactOf, scores: dict[str, Any]) -> None:
    """Write members, their table, and who answers, artifact.json last.

    Args:
        job: whose run it is.
        fleet: trained.
        artifact: (model, recipe, task, temperature, scores) -> an artifact of the run.
        scores: of the run, by split.
    """
    seats: list[Seat] = []
    _remove_others(job, fleet)
    for one in fleet.ranked:
        for entry in one.entries:
            own = artifact(
                entry.trained.model,
                entry.member.recipe,
                entry.member.task,
                one.temperature,
                {"val": one.scores, "test": None},
            )
            folder = Path("members") / member_hash(job, entry)
            (job.out / folder).mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(epoch.to_json()) for epoch in entry.trained.history]
            write_text(job.out / folder / "history.jsonl", "".join(f"{line}\n" for line in lines))
            own.save(job.out / folder)
            if one.weight:
                seats.append(Seat(folder.as_posix(), own, one.weight / len(one.entries)))
    write_text(job.out / "members.csv", csv_text(_table(job, fleet)))
    if len(seats) > 1:
        Ensemble(tuple(seats), scores).save(job.out)
    else:
        own = seats[0].artifact
        artifact(own.model, own.recipe, own.task, own.temperature, scores).save(job.out)


def _remove_others(job: Job, fleet: FleetResult) -> None:
    """A run that was killed here while it wrote, and whose folder was free again, may have left members."""
    own = {member_hash(job, entry) for entry in fleet.entries}
    for folder in (job.out / "members").glob("*"):
        if folder.name not in own:
            shutil.rmtree(folder)


def fleet_json(job: Job, fleet: FleetResult) -> dict[str, Any]:
    """What metrics.json holds of a fleet: a line a variation, those that answer first, and their answer.

    Args:
        job: whose run it is.
        fleet: trained.
    """
    ranked = {one.variation.label: one for one in fleet.ranked}
    entries: dict[str, list[Entry]] = {label: [] for label in ranked}
    for entry in fleet.entries:
        entries.setdefault(entry.variation.label, []).append(entry)
    return {
        "networks": len(fleet.entries),
        "answering": len(fleet.voices),
        "folds": None if fleet.entries[0].fold is None else len(next(iter(entries.values()))),
        "ensemble": job.recipe.fleet.ensemble,
        "held_out": fleet.held_out.to_json(),
        "members": [
            {
                "member": label,
                "networks": len(own),
                "diverged": sum(entry.trained.model is None for entry in own),
                "scores": None if label not in ranked else ranked[label].scores,
                "weight": 0.0 if label not in ranked else ranked[label].weight,
            }
            for label, own in entries.items()
        ],
    }


def member_hash(job: Job, entry: Entry) -> str:
    """What a network of a run is known by: its recipe, and its fold."""
    folds = "" if entry.fold is None else f"/{job.recipe.fleet.folds}/{entry.fold}"
    return hashlib.sha256(f"{entry.variation.recipe.hash}{folds}".encode()).hexdigest()[:16]


def _table(job: Job, fleet: FleetResult) -> list[list[Any]]:
    """Header and a line a network: those of the best candidate first, those that diverged last."""
    settings = list(dict.fromkeys(key for entry in fleet.entries for key in entry.variation.choices))
    metrics = [job.task.headline, SECOND[job.task.kind]]
    header = ["member", *settings, "fold", "epochs", "loss", *metrics, "temperature", "weight", "folder"]
    rows: list[list[Any]] = [header]
    done = set()
    for one in fleet.ranked:
        for entry in one.entries:
            done.add(entry.name)
            rows.append(_line(job, entry, one, settings, metrics))
    rows += [_line(job, entry, None, settings, metrics) for entry in fleet.entries if entry.name not in done]
    return rows


def _line(job: Job, entry: Entry, of: Candidate | None, settings: list[str], metrics: list[str]) -> list[Any]:
    history = entry.trained.history
    about = [
        entry.name,
        *(entry.variation.choices.get(key, "") for key in settings),
        "" if entry.fold is None else entry.fold,
        len(history),
    ]
    if entry.trained.model is None:
        return [*about, "diverged", *[""] * len(metrics), "", 0, ""]
    loss = f"{history[-1].loss:.6g}"
    if of is None:  # another fold of it has diverged
        return [*about, loss, *[""] * len(metrics), "", 0, ""]
    scored = ["" if of.scores.get(name) is None else f"{of.scores[name]:.6g}" for name in metrics]
    weight = of.weight / len(of.entries)
    folder = f"members/{member_hash(job, entry)}"
    return [*about, loss, *scored, f"{of.temperature:.6g}", f"{weight:.6g}", folder]
