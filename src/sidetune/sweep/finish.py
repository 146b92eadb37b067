"""The end of a sweep: the winner is trained on train and validation, scored once on test, and written.

Beside it, in the same fleet, trains the recipe as it was given, so that what the sweep brought is measured on
images that it never chose by. The temperature comes from the outputs that it chose by.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sidetune.bucket import Member
from sidetune.calibration import fit_temperature
from sidetune.checkpoint import Epoch
from sidetune.errors import DivergedError
from sidetune.evaluate import Evaluation, evaluate
from sidetune.files import csv_text, write_json, write_text
from sidetune.job import union
from sidetune.model import SideModel
from sidetune.outcome import about, artifact_of, store_bytes
from sidetune.paired import paired_difference
from sidetune.recipe import Recipe
from sidetune.runs import environment, write_run
from sidetune.side_fit import model_outputs, new_member, open_fleet, solo_epoch_seconds
from sidetune.sweep.halving import share_trained
from sidetune.sweep.journal import Trial
from sidetune.sweep.page import write_page
from sidetune.sweep.score import Rows, best, measured_task
from sidetune.sweep.worker import CHECKPOINT, Plan, last, worked_seconds
from sidetune.tasks import Task
from sidetune.train import train

DEFAULT, WINNER = "default", "winner"  # the rows of the score table
SOLO_EPOCHS = 3  # timed of one network alone, after one that warms up; the quickest counts


@dataclass(frozen=True, eq=False)
class Final:
    """A recipe that was trained on train and validation.

    Args:
        name: of its row.
        trial: whose recipe it is.
        recipe: resolved.
        task: measured on train and validation.
        model: in eval mode, on the CPU.
        history: of its training.
        temperature: fitted on what it was chosen by.
        chosen_by: predictions (n, K) of the held rows.
        test: predictions (n, K) of the test rows.
        val: scores of the held rows.
        tested: scores of the test rows; None where there are none.
    """

    name: str
    trial: Trial
    recipe: Recipe
    task: Task
    model: SideModel
    history: list[Epoch]
    temperature: float
    chosen_by: Tensor
    test: Tensor
    val: Evaluation
    tested: Evaluation | None

    def to_json(self) -> dict[str, Any]:
        """Its row of metrics.json."""
        detail: dict[str, Any] = {"trial": self.trial.number}
        if self.recipe.data.task != "regress":
            detail["temperature"] = self.temperature
        return {
            "method": self.name,
            "parameters": self.model.num_parameters(),
            "seconds": sum(epoch.seconds for epoch in self.history),
            "detail": detail,
            "val": self.val.to_json(),
            "test": None if self.tested is None else self.tested.to_json(),
        }


def finish(plan: Plan, fingerprint: str, peak_memory: int) -> None:
    """Train, score and write the winner; artifact.json comes last but for the page.

    Args:
        plan: of the sweep, whose trials have all ended.
        fingerprint: of the data.
        peak_memory: bytes of this process.

    Raises:
        DivergedError: no trial was finished.
    """
    trials = plan.journal.trials()
    finished = [(trial.number, trial.scores[plan.epochs]) for trial in trials if trial.state == "finished"]
    if not finished:
        raise DivergedError(
            f"all {len(trials)} trials diverged. Type: sidetune sweep with a new --out and a --search file "
            "with train.lr: {log: [1e-5, 1e-3]}"
        )
    winner = best(finished)
    named = {WINNER: trials[winner]}
    if any(number == 0 for number, _ in finished):
        named = {DEFAULT: trials[0], **named}
    started = time.monotonic()
    finals = _train_finals(plan, named)
    seconds = {
        "features": plan.choosing.job.seconds,
        "sweep": worked_seconds(plan.out),
        "final": time.monotonic() - started,
        "solo": _solo_seconds(plan),
    }
    _write_tables(plan, trials, finals, seconds)
    _write_run(plan, finals, fingerprint, seconds, peak_memory)
    clear_up(plan.out)


def clear_up(out: Path) -> None:
    """What comes after artifact.json."""
    (out / CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(out / "workers", ignore_errors=True)
    write_page(out)


def _train_finals(plan: Plan, named: dict[str, Trial]) -> list[Final]:
    """All of them in one fleet. A winner that is the default itself is trained once."""
    job = plan.choosing.job
    rows = union([job.split["train"], job.split["val"]])
    members = []
    for trial in {trial.number: trial for trial in named.values()}.values():
        recipe = plan.recipe_of(trial)
        task = measured_task(job, recipe, rows)
        members.append(new_member(job, recipe, name=str(trial.number), rows=rows, task=task))
    fleet = open_fleet(job, [member.recipe for member in members], rows)
    trained = train(  # without scores: what is not test is trained on, and test is looked at once, at the end
        fleet,
        members,
        checkpoint=plan.out / CHECKPOINT,
        run_hash=plan.run_hash,
        quiet=job.quiet,
    )
    by_name = {member.name: member for member in members}
    finals = []
    for name, trial in named.items():
        model, history = trained[str(trial.number)].model, trained[str(trial.number)].history
        if model is not None:
            finals.append(_final(plan, name, trial, by_name[str(trial.number)], model, history))
    if not finals or finals[-1].name != WINNER:
        raise DivergedError(
            "the winner diverged when it was trained on train and validation. Type: sidetune sweep with a "
            "new --out and a --search file with a lower train.lr"
        )
    return finals


def _final(
    plan: Plan,
    name: str,
    trial: Trial,
    member: Member,
    model: SideModel,
    history: list[Epoch],
) -> Final:
    """Its temperature and scores."""
    choosing, job = plan.choosing, plan.choosing.job
    outputs = load_file(plan.outputs_file(trial.number))["outputs"]
    temperature = fit_temperature(job.task, outputs, job.targets[torch.from_numpy(choosing.held)])
    chosen_by = job.task.predictions(outputs / temperature)
    test = member.task.predictions(model_outputs(job, model, "test") / temperature)
    model.cpu()
    targets = job.dataset.targets
    val = evaluate(job.task, chosen_by.double().numpy(), targets[choosing.held])
    tested = None
    if len(test):
        tested = evaluate(member.task, test.double().numpy(), targets[job.split["test"]])
    return Final(
        name, trial, member.recipe, member.task, model, history, temperature, chosen_by, test, val, tested
    )


def _solo_seconds(plan: Plan) -> float:
    """Seconds of an epoch of one network that trains alone, as every trial would without a fleet."""
    choosing = plan.choosing
    return solo_epoch_seconds(choosing.job, choosing.members(0, plan.recipe)[0], SOLO_EPOCHS)


def _write_tables(plan: Plan, trials: list[Trial], finals: list[Final], seconds: dict[str, float]) -> None:
    """trials.csv and sweep.json."""
    epochs = {trial.number: plan.trained(trial) for trial in trials}
    names = list(plan.space)
    table: list[list[Any]] = [["trial", "state", "epochs", plan.headline, "loss", *names]]
    for trial in trials:
        score = last(trial)
        values = [trial.params[name] for name in names]
        scored = ["", ""] if score is None else [_text(score.headline), f"{score.loss:.6g}"]
        table.append([trial.number, trial.state, epochs[trial.number], *scored, *values])
    write_text(plan.out / "trials.csv", csv_text(table))
    write_json(
        plan.out / "sweep.json",
        {
            "headline": plan.headline,
            "on": plan.choosing.on,
            "members": len(plan.choosing.folds),
            "held": len(plan.choosing.held),
            "epochs": plan.epochs,
            "rungs": list(plan.rungs),
            "eta": plan.eta,
            "places": plan.places,
            "space": {name: domain.to_json() for name, domain in plan.space.items()},
            "winner": finals[-1].trial.number,
            "difference": _difference(plan, finals),
            "importance": plan.journal.importances(),
            "trials": [_trial_json(trial, epochs[trial.number]) for trial in trials],
            "cost": _cost(plan, list(epochs.values()), seconds),
        },
    )


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _trial_json(trial: Trial, epochs: int) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "epochs": epochs,
        "params": trial.params,
        "scores": {str(epoch): score.to_json() for epoch, score in trial.scores.items()},
    }


def _cost(plan: Plan, epochs: list[int], seconds: dict[str, float]) -> dict[str, Any]:
    """What the sweep took, beside what as many networks one by one would have: that is computed."""
    alone = seconds["solo"] * plan.epochs * len(plan.choosing.folds)
    return {
        "sweep_seconds": seconds["sweep"],
        "solo_epoch_seconds": seconds["solo"],
        "solo_seconds_computed": alone * len(epochs),
        "epochs_share": share_trained(epochs, plan.epochs),
    }


def _difference(plan: Plan, finals: list[Final]) -> dict[str, Any] | None:
    """The winner's headline score minus the default's, on test where there is one."""
    if len(finals) < 2:  # the default diverged
        return None
    job = plan.choosing.job
    default, winner = finals
    tested = winner.tested is not None
    ours, theirs = (one.test if tested else one.chosen_by for one in (winner, default))
    rows = job.split["test"] if tested else plan.choosing.held
    found = paired_difference(
        winner.task, ours.double().numpy(), theirs.double().numpy(), job.dataset.targets[rows]
    )
    return {"split": "test" if tested else "val", **found.to_json()}


def _write_run(
    plan: Plan, finals: list[Final], fingerprint: str, seconds: dict[str, float], peak_memory: int
) -> None:
    """The files of a run folder, for `Run.open` and `sidetune predict`."""
    job, own = plan.choosing.job, finals[-1]
    metrics = _metrics(plan, finals, seconds, peak_memory)
    predictions: dict[str, tuple[Rows, Tensor]] = {plan.choosing.on: (plan.choosing.held, own.chosen_by)}
    if own.tested is not None:
        predictions["test"] = (job.split["test"], own.test)
    write_run(plan.out, metrics, own.history, job.dataset, own.task, predictions)
    scores = {"val": own.val.scores, "test": None if own.tested is None else own.tested.scores}
    artifact = artifact_of(job, fingerprint)(own.model, own.recipe, own.task, own.temperature, scores)
    artifact.save(plan.out)


def _metrics(plan: Plan, finals: list[Final], seconds: dict[str, float], peak_memory: int) -> dict[str, Any]:
    """What metrics.json holds."""
    job, own = plan.choosing.job, finals[-1]
    return {
        "side": WINNER,
        **about(job),
        "rows": [{**final.to_json(), "peak_memory_bytes": peak_memory} for final in finals],
        "cost": {
            "parameters": own.model.num_parameters(),
            "head_parameters": sum(parameter.numel() for parameter in own.model.head.parameters()),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory,
            "store_bytes": store_bytes(job),
        },
        "environment": environment(job.backbone.device),
    }
