"""The journal of a sweep: Optuna's, one line an event, shared by every process that works on it.

A trial is born in one line, with its parameters, the worker that asked and the number of that ask. So after
a kill a worker asks again by number and finds what it was told. Parameters are drawn by a TPE sampler that
is made anew for every ask, from the journal as it stands and a seed of (sweep, worker, ask): nothing hangs
on a sampler's state.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from sidetune.errors import ArtifactError
from sidetune.sweep.score import Score
from sidetune.sweep.space import Choice, Domain, Space, Value

STUDY = "sweep"
State = Literal["running", "stopped", "diverged", "finished"]


@dataclass(frozen=True)
class Trial:
    """A trial as the journal knows it.

    Args:
        number: from 0, in the order of asking; 0 is the recipe as it was given.
        worker: the number of the worker that asked.
        ask: the number of that ask, from 0, of this worker.
        params: the value of each field of the search space.
        state: stopped by halving, diverged, finished, or running.
        scores: epoch of a rung -> score there.
        went_on: epochs of the rungs after which it was told to go on.
    """

    number: int
    worker: int
    ask: int
    params: dict[str, Value]
    state: State
    scores: dict[int, Score]
    went_on: tuple[int, ...]

    def decided(self, epoch: int) -> bool | None:
        """What was decided at a rung; None where nothing was yet."""
        if epoch in self.went_on:
            return True
        return None if self.state == "running" else False


class Journal:
    """A sweep's trials, read from and written to RUN/journal.log.

    Args:
        path: of the file; made if it is not there.
        space: that trials are drawn from.
        defaults: the recipe's own value of each of its fields, which the first trial has.
        seed: of the draws.
        most: trials in all.

    Raises:
        ArtifactError: it is no journal.
    """

    def __init__(
        self, path: Path, space: Space, *, defaults: Mapping[str, Value], seed: int, most: int
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.path, self.space, self.defaults, self.seed, self.most = path, space, defaults, seed, most
        lock = path.with_name(f".{path.name}.lock")
        _mend(path, lock)
        with self._refused():
            self._storage = JournalStorage(JournalFileBackend(str(path), lock_obj=_FileLock(lock)))
            with _held(path.with_name(f".{path.name}.begin")):
                studies = {study.study_name: study._study_id for study in self._storage.get_all_studies()}
                if STUDY not in studies:
                    studies[STUDY] = self._storage.create_new_study([StudyDirection.MAXIMIZE], STUDY)
        self._study = studies[STUDY]
        self.trials()

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """What does not fit inside is damage."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise ArtifactError(
                f"{self.path} is damaged: {str(error) or type(error).__name__}. Type: the sweep command "
                "with a new --out"
            ) from error

    def trials(self) -> list[Trial]:
        """Every trial so far, by number.

        Raises:
            ArtifactError: the journal is damaged.
        """
        with self._refused():
            return [_trial(one) for one in self._frozen()]

    def ask(self, worker: int, ask: int) -> Trial | None:
        """The trial of a worker's k-th ask: what it was told before, or a new one; None if there are enough.

        Args:
            worker: its number.
            ask: k, from 0.
        """
        with _held(self.path.with_name(f".{self.path.name}.ask")):
            frozen = self._frozen()
            for one in frozen:
                if (one.user_attrs["worker"], one.user_attrs["ask"]) == (worker, ask):
                    return _trial(one)
            if len(frozen) >= self.most:
                return None
            values = dict(self.defaults)
            if frozen:
                values = _draw(frozen, self.space, f"{self.seed}/{worker}/{ask}")
            attributes = {"worker": worker, "ask": ask, "values": values}
            born = create_trial(state=TrialState.RUNNING, **_known(values, self.space), user_attrs=attributes)
            self._storage.create_new_trial(self._study, born)
            return _trial(self._frozen()[-1])

    def report(self, number: int, epoch: int, score: Score) -> None:
        """Note a score at a rung, unless it is there."""
        one = self._frozen()[number]
        if epoch in one.intermediate_values:
            return
        if f"epoch {epoch}" not in one.user_attrs:
            self._storage.set_trial_user_attr(one._trial_id, f"epoch {epoch}", score.to_json())
        self._storage.set_trial_intermediate_value(one._trial_id, epoch, score.value)

    def go_on(self, number: int, epoch: int) -> None:
        """Note that a trial trains on after a rung."""
        one = self._frozen()[number]
        self._storage.set_trial_user_attr(one._trial_id, f"went on {epoch}", True)

    def stop(self, number: int) -> None:
        """End a trial by halving."""
        self._end(number, TrialState.PRUNED)

    def finish(self, number: int, score: Score) -> None:
        """End a trial that was trained to its last epoch."""
        self._end(number, TrialState.COMPLETE, [score.value])

    def diverge(self, number: int) -> None:
        """End a trial whose loss is not finite any more."""
        one = self._frozen()[number]
        if not one.state.is_finished():
            if "diverged" not in one.user_attrs:
                self._storage.set_trial_user_attr(one._trial_id, "diverged", True)
            self._end(number, TrialState.PRUNED)

    def importances(self) -> dict[str, float]:
        """Share of each field in how the scores at the first rung differ, by fANOVA; empty where few.

        All trials have a score there, after the same epochs. Their last scores say above all who was trained
        for longer. Source: Hutter et al., ICML 2014.
        """
        whole = [
            one
            for one in self._frozen()
            if one.params.keys() == self.space.keys() and one.intermediate_values
        ]
        varying = [name for name in self.space if len({repr(one.params[name]) for one in whole}) > 1]
        if len(whole) < 4 or not varying:
            return {}
        study = _in_memory([_as_complete(one) for one in whole])
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varying)
        return {name: float(share) for name, share in found.items()}

    def _frozen(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study, deepcopy=False)

    def _end(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        one = self._frozen()[number]
        if not one.state.is_finished():
            self._storage.set_trial_state_values(one._trial_id, state, values)


def _trial(one: FrozenTrial) -> Trial:
    attributes = one.user_attrs
    states: dict[TrialState, State] = {TrialState.COMPLETE: "finished", TrialState.RUNNING: "running"}
    ended: State = "diverged" if "diverged" in attributes else "stopped"
    rungs = sorted(one.intermediate_values)
    return Trial(
        one.number,
        attributes["worker"],
        attributes["ask"],
        dict(attributes["values"]),
        states.get(one.state, ended),
        {epoch: Score.from_json(attributes[f"epoch {epoch}"]) for epoch in rungs},
        tuple(epoch for epoch in rungs if f"went on {epoch}" in attributes),
    )


def _draw(frozen: list[FrozenTrial], space: Space, key: str) -> dict[str, Value]:
    """Values that a TPE sampler proposes after these trials.

    Those that run count as poor, so that it looks elsewhere (the constant liar). Trials without a value for
    every field (the first, where the recipe's own value is outside the space) are left out: the sampler
    models what all its trials have in common.
    """
    whole = [one for one in frozen if one.params.keys() == space.keys()]
    digest = hashlib.sha256(key.encode()).digest()
    sampler = TPESampler(
        multivariate=True, constant_liar=True, seed=int.from_bytes(digest[:4], "little"), n_startup_trials=10
    )
    asked = _in_memory(whole, sampler).ask(_distributions(space))
    return {name: asked.params[name] for name in space}


def _in_memory(trials: list[FrozenTrial], sampler: TPESampler | None = None) -> optuna.Study:
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(trials)
    return study


def _as_complete(one: FrozenTrial) -> FrozenTrial:
    first = one.intermediate_values[min(one.intermediate_values)]
    return create_trial(value=first, params=one.params, distributions=one.distributions)


def _known(values: Mapping[str, Value], space: Space) -> dict[str, Any]:
    """Parameters and their distributions, of the values that are inside the space."""
    inside = {name: value for name, value in values.items() if space[name].contains(value)}
    return {
        "params": inside,
        "distributions": {name: one for name, one in _distributions(space).items() if name in inside},
    }


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return {name: _distribution(domain) for name, domain in space.items()}


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.values)
    if domain.whole:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


class _FileLock(JournalFileOpenLock):
    """The operating system's lock on a file: it goes with the process, so a kill leaves none behind."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=None)
        self._path = path

    def acquire(self) -> bool:
        self._lock = _held(self._path)
        self._lock.__enter__()
        return True

    def release(self) -> None:
        self._lock.__exit__(None, None, None)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _mend(path: Path, lock: Path) -> None:
    """Cut off a last line that a power cut left half written: Optuna would refuse all that follows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(lock):
        if not path.exists():
            return
        with path.open("rb+") as stream:
            text = stream.read()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                stream.truncate(whole)
