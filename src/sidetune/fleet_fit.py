"""A run of several side networks: variations times folds, trained in one pass; then who answers.

    Entry       one network: a variation, and the fold that it does not see
    Candidate   the entries of one variation. With folds, each sample is predicted by the entry that did
                not train on it (out of fold), and a new image by the mean of all its entries
    chosen      the best candidate on held-out samples, or those that `select_greedily` picks, with weights

What is held out is the validation split, or with folds every sample of training and validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.blend import AUTO, Blend, give_best_share, ridge_alone
from sidetune.bucket import Member
from sidetune.calibration import fit_temperature
from sidetune.checkpoint import Scores
from sidetune.data.folds import shared_folds
from sidetune.ensemble import Committee, Voice, pooled
from sidetune.errors import DivergedError
from sidetune.evaluate import Evaluation, evaluate, scores
from sidetune.features import Features
from sidetune.figures import label, number
from sidetune.job import Fitted, Job, Work, union
from sidetune.members import Variation, variations
from sidetune.memory import PeakMemory
from sidetune.selection import select_greedily
from sidetune.side_fit import model_outputs, new_member, open_work, train_members
from sidetune.tasks import build_task
from sidetune.train import Trained

SHOWN = 5  # candidates that are said when all have ended


@dataclass(frozen=True, eq=False)
class Entry:
    """One network of a run's fleet.

    Args:
        member: as it trains.
        variation: what it is one of.
        fold: that it does not train on; None: there are none.
        trained: what became of it.
    """

    member: Member
    variation: Variation
    fold: int | None
    trained: Trained

    @property
    def name(self) -> str:
        """What it is called within its job."""
        return network_name(self.variation, self.fold)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A variation, trained: what can be chosen.

    Args:
        variation: whose recipe it is.
        entries: one, or one a fold.
        predictions: (n, K) for the samples that are held out.
        temperature: fitted on these samples.
        scores: of these predictions.
        weight: in the answer of the run; 0: it has no part in it.
    """

    variation: Variation
    entries: tuple[Entry, ...]
    predictions: Tensor
    temperature: float
    scores: Scores
    weight: float = 0.0


@dataclass(frozen=True, eq=False)
class FleetResult:
    """What a run's fleet leaves behind.

    Args:
        entries: every network, those that diverged too.
        ranked: candidates, those that answer first, then by their scores.
        voices: the networks that answer.
        held_out: what they answer for samples that they were not trained on.
        predictions: split -> (n, K), where several answer; None: the one does.
    """

    entries: tuple[Entry, ...]
    ranked: tuple[Candidate, ...]
    voices: tuple[Voice, ...]
    held_out: Evaluation
    predictions: Callable[[str], Tensor] | None


def fit_fleets(work: Work) -> list[Fitted]:
    """Train every variation and fold of every job in one fleet, and choose who answers for each job."""
    fold_N = _folds(work)
    planned = [_plan(job, fold_N) for job in work.jobs]
    members = [member for plan in planned for member, _, _ in plan.networks]
    owners = {member.name: plan.job for plan in planned for member, _, _ in plan.networks}
    fleet = open_work(work, [member.recipe for member in members], union([plan.rows for plan in planned]))
    with PeakMemory() as memory:
        trained = train_members(work, fleet, members, owners if fold_N is None else None)
    return [_answer(plan, trained, fleet.window, memory.peak) for plan in planned]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a job trains.

    Args:
        job: whose it is.
        rows: (n,) that any of its networks trains on.
        folds: (n,) of these rows; None: there are none.
        networks: each with its variation and the fold that it does not see.
    """

    job: Job
    rows: NDArray[np.int64]
    folds: NDArray[np.int64] | None
    networks: list[tuple[Member, Variation, int | None]]


def _folds(work: Work) -> NDArray[np.int64] | None:
    """(N,) the fold of every row that may be held out, -1 elsewhere; the same for all jobs."""
    asked, common = work.recipe.fleet.folds, work.common
    if asked is None:
        return None
    if asked == "column":
        every = f", and hold out every {work.recipe.sample}; no test split is drawn"
        common.say(f"folds are the data's own{'' if len(common.split['test']) else every}")
    elif common.dataset.fold is not None:
        common.say(f"{asked} folds are drawn; the data's own column is used with: --folds column")
    datasets = {job.column: job.dataset for job in work.jobs}
    return shared_folds(datasets, common.source.valid, asked, seed=work.recipe.data.split_seed)


def _plan(job: Job, fold_N: NDArray[np.int64] | None) -> _Plan:
    rows = job.split["train"] if fold_N is None else union([job.split["train"], job.split["val"]])
    folds = None if fold_N is None else fold_N[rows]
    networks = [
        (_member(job, one, rows, folds, fold), one, fold)
        for one in variations(job.recipe)
        for fold in ([None] if folds is None else np.unique(folds).tolist())
    ]
    return _Plan(job, rows, folds, networks)


def _member(
    job: Job,
    variation: Variation,
    rows: NDArray[np.int64],
    folds: NDArray[np.int64] | None,
    fold: int | None,
) -> Member:
    own = rows if folds is None else rows[folds != fold]
    data = variation.recipe.data
    task = build_task(data.task, job.dataset, own, **data.task_options())
    name = job.named(network_name(variation, fold))
    return new_member(job, variation.recipe, name=name, rows=own, task=task)


def network_name(variation: Variation, fold: int | None) -> str:
    """What a network is called within its job."""
    return variation.label if fold is None else f"{variation.label} fold={fold}"


def _answer(plan: _Plan, trained: Mapping[str, Trained], window: int | None, peak_memory: int) -> Fitted:
    job = plan.job
    entries = [
        Entry(_as_shuffled(member, window), one, fold, trained[member.name])
        for member, one, fold in plan.networks
    ]
    held = job.split["val"] if plan.folds is None else plan.rows
    candidates = _candidates(job, entries, held, plan.folds)
    return _fitted(job, entries, _choose(job, candidates, held), held, peak_memory)


def _as_shuffled(member: Member, window: int | None) -> Member:
    """With the window that was chosen in its recipe, as a run of one has it."""
    train = member.recipe.train.model_copy(update={"shuffle_window": window})
    return replace(member, recipe=member.recipe.model_copy(update={"train": train}))


def _candidates(
    job: Job, entries: Sequence[Entry], held: NDArray[np.int64], folds: NDArray[np.int64] | None
) -> list[Candidate]:
    """Each variation with what it predicts for the samples that are held out.

    Raises:
        DivergedError: no variation is whole.
    """
    whole = [entry for entry in entries if entry.trained.model is not None]
    every = dict(zip(map(id, whole), side_outputs(job, whole, held), strict=True))
    with ridge_alone(_blends(whole)):
        asked = [entry for entry in whole if entry.member.recipe.head.ridge == AUTO]
        ridges = dict(zip(map(id, asked), side_outputs(job, asked, held), strict=True))
    targets = torch.from_numpy(job.dataset.targets[held])
    # the last update of all may have ruined weights whose loss was finite before it
    outputs = {key: output for key, output in every.items() if output.isfinite().all()}
    by_variation: dict[str, list[Entry]] = {}
    for entry in entries:
        by_variation.setdefault(entry.variation.label, []).append(entry)
    found = []
    for name, own in by_variation.items():
        if any(id(entry) not in outputs for entry in own):
            job.say(f"{name} has diverged and cannot be chosen")
            continue
        output_nK = _out_of_fold(own, outputs, folds)
        if blends := _blends(own):
            ridge_nK = _out_of_fold(own, ridges, folds)
            output_nK = give_best_share(blends, job.task, output_nK, ridge_nK, targets)
            job.say(f"  {name}: ridge's share in the answer {blends[0].share:g}")
        found.append(_candidate(job, own, output_nK, held, folds))
    if not found:
        column = f"column {job.column!r}: " if job.column else ""
        raise DivergedError(
            f"{column}every variation has a network that diverged. Type: --set train.lr=3e-4, or lower rates "
            "in --members"
        )
    return found


def _held_out(entry: Entry, folds: NDArray[np.int64] | None) -> slice | Tensor:
    """Which of the samples that are held out it has not seen."""
    return slice(None) if folds is None else torch.from_numpy(folds == entry.fold)


def _out_of_fold(
    entries: Sequence[Entry], outputs: Mapping[int, Tensor], folds: NDArray[np.int64] | None
) -> Tensor:
    """What the networks of a variation give for the samples that each has not seen: (n, K)."""
    output_nK = torch.empty_like(outputs[id(entries[0])])
    for entry in entries:
        rows = _held_out(entry, folds)
        output_nK[rows] = outputs[id(entry)][rows]
    return output_nK


def _blends(entries: Sequence[Entry]) -> list[Blend]:
    """Of those where ridge's share is still to be chosen."""
    models = [entry.trained.model for entry in entries if entry.member.recipe.head.ridge == AUTO]
    return [model.blend for model in models if model is not None and model.blend is not None]


def _candidate(
    job: Job,
    entries: Sequence[Entry],
    output_nK: Tensor,
    held: NDArray[np.int64],
    folds: NDArray[np.int64] | None,
) -> Candidate:
    targets = job.dataset.targets[held]
    temperature = fit_temperature(job.task, output_nK, torch.from_numpy(targets))
    predictions = torch.empty_like(output_nK)
    for entry in entries:
        entry_rows = _held_out(entry, folds)
        predictions[entry_rows] = entry.member.task.predictions(output_nK[entry_rows] / temperature)
    scored = scores(job.task, predictions.double().numpy(), targets)
    return Candidate(entries[0].variation, tuple(entries), predictions, temperature, scored)


def _choose(job: Job, candidates: Sequence[Candidate], held: NDArray[np.int64]) -> list[Candidate]:
    """All candidates, the best first, each with its weight in the answer."""
    headline, targets = job.task.headline, job.dataset.targets[held]
    found = torch.stack([one.predictions for one in candidates]).double().numpy()
    if job.recipe.fleet.ensemble:
        counts = select_greedily(found, targets, job.task)
        weights = counts / counts.sum()
    else:
        weights = np.zeros(len(candidates))
        weights[np.argmax([_or_least(one.scores[headline]) for one in candidates])] = 1.0
    weighted = [replace(one, weight=float(weight)) for one, weight in zip(candidates, weights, strict=True)]
    order = sorted(weighted, key=lambda one: (one.weight, _or_least(one.scores[headline])), reverse=True)
    if len(order) > 1:
        words, unit = label(headline)
        for one in order[:SHOWN]:
            part = f", weight {one.weight:.2f}" if one.weight else ""
            job.say(f"  {one.variation.label}: {words} {number(headline, one.scores[headline])} {unit}{part}")
        if len(order) > SHOWN:
            job.say(f"  and {len(order) - SHOWN} more: {job.out / 'members.csv'}")
    return order


def _or_least(score: float | None) -> float:
    return -np.inf if score is None else score


def _fitted(
    job: Job,
    entries: Sequence[Entry],
    ranked: Sequence[Candidate],
    held: NDArray[np.int64],
    peak_memory: int,
) -> Fitted:
    chosen = [one for one in ranked if one.weight]
    voices = [
        replace(_voice(entry), temperature=one.temperature, weight=one.weight / len(one.entries))
        for one in chosen
        for entry in one.entries
    ]
    mean_nK = pooled(job.task, [one.predictions for one in chosen], [one.weight for one in chosen])
    held_out = evaluate(job.task, mean_nK.double().numpy(), job.dataset.targets[held])
    first = chosen[0].entries[0]
    assert first.trained.model is not None
    recipe = first.member.recipe
    answers = partial(_predictions, job, voices, mean_nK, held) if len(voices) > 1 else None
    return Fitted(
        _name(chosen),
        first.trained.model,
        recipe,
        sum(voice.model.num_parameters() for voice in voices),
        seconds=sum(_seconds(entries)),
        peak_memory=peak_memory,
        detail=_detail(entries, chosen),
        outputs=partial(model_outputs, job, first.trained.model),
        history=first.trained.history,
        fleet=FleetResult(tuple(entries), tuple(ranked), tuple(voices), held_out, answers),
    )


def _name(chosen: Sequence[Candidate]) -> str:
    """Of the row in the score table."""
    first, voices = chosen[0], sum(len(one.entries) for one in chosen)
    if voices == 1:
        return first.variation.recipe.side.name
    alone = len(chosen) == 1
    return f"{voices}-fold {first.variation.recipe.side.name}" if alone else f"ensemble of {voices}"


def _detail(entries: Sequence[Entry], chosen: Sequence[Candidate]) -> dict[str, Any]:
    """What was chosen, for the tables."""
    trained: dict[str, Any] = {"networks_trained": len(entries)}
    if len(chosen) > 1:
        return trained
    recipe = chosen[0].entries[0].member.recipe
    if blends := _blends(chosen[0].entries):
        trained["ridge"] = blends[0].share
    member = {"member": chosen[0].variation.label} if chosen[0].variation.choices else {}
    return {**member, "epochs": recipe.train.epochs, "lr": recipe.train.lr, **trained}


def _seconds(entries: Sequence[Entry]) -> list[float]:
    """That each epoch took for all members: of each wave, what its longest member saw."""
    longest: dict[int, list[float]] = {}
    for entry in entries:
        seconds = [epoch.seconds for epoch in entry.trained.history]
        wave = entry.trained.wave
        if len(seconds) > len(longest.get(wave, [])):
            longest[wave] = seconds
    return [one for seconds in longest.values() for one in seconds]


def _voice(entry: Entry) -> Voice:
    assert entry.trained.model is not None
    return Voice(entry.trained.model, entry.member.recipe, entry.member.task)


def side_outputs(job: Job, entries: Sequence[Entry], rows: NDArray[np.int64]) -> Tensor:
    """Outputs of networks for some rows, averaged over the views that are scored: (entries, n, K)."""
    return _outputs(job, [_voice(entry) for entry in entries], rows)


def _outputs(job: Job, voices: Sequence[Voice], rows: NDArray[np.int64]) -> Tensor:
    """Outputs of every voice for some rows, averaged over the views that are scored: (voices, n, K)."""
    if not voices or not len(rows):
        return torch.zeros(len(voices), len(rows), job.task.num_outputs)
    committee, of_views = Committee(voices, job.backbone.device), []

    def outputs(batch: Features) -> Tensor:
        return committee.outputs(batch.to(job.backbone.device))

    spec = job.source.spec.select([name for name in job.source.spec.names if name in committee.taps])
    with torch.no_grad():
        for view in job.scored_views:
            batches = job.source.batches(rows, spec, view)
            of_views.append(torch.cat(list(map(outputs, batches)), 1))  # `map` lets go of what it gave
    return torch.stack(of_views).mean(0)


def _predictions(
    job: Job, voices: Sequence[Voice], mean_nK: Tensor, held: NDArray[np.int64], split: str
) -> Tensor:
    """What the voices answer for a split; for samples that some were trained on, what the others said."""
    if split == "val":
        return mean_nK[torch.from_numpy(np.searchsorted(held, job.split["val"]))]
    committee = Committee(voices, job.backbone.device)
    return committee.predictions(_outputs(job, voices, job.split[split]))
