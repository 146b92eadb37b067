"""A worker: one fleet with places for trials; it asks, trains, compares at rungs, and asks again.

    RUN/workers/<k>/checkpoint.safetensors      the fleet, and how often this worker has asked

A checkpoint is written between epochs. After a kill the epochs since are trained again: asks are answered
by the journal, reports that are in it are not made again, and decisions that are in it are followed. So
one process ends with the same trials, whenever it was killed.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sidetune.checkpoint import Saved, load_checkpoint, save_checkpoint
from sidetune.files import read_json, write_json, write_tensors
from sidetune.fleet import Fleet
from sidetune.progress import Progress
from sidetune.recipe import Recipe
from sidetune.side_fit import open_fleet
from sidetune.sweep.halving import expected_epochs, goes_on, rungs
from sidetune.sweep.journal import Journal, Trial
from sidetune.sweep.score import Choosing, Score
from sidetune.sweep.space import Space, apply

GIVEN = 0  # the trial of the recipe as it was given; the sweep shall not end below it
CHECKPOINT_SECONDS = 20.0  # at most this much training is lost to a kill
MOST_WORKERS = 10_000
CHECKPOINT, SECONDS = "checkpoint.safetensors", "seconds.json"


@dataclass(frozen=True, eq=False)
class Plan:
    """What every worker of a sweep works by.

    Args:
        recipe: as given, its epochs filled in: the first trial, and what the others differ from.
        space: that trials are drawn from.
        choosing: what they are scored on.
        journal: where they are kept.
        out: the sweep's folder.
        trials: in all.
        places: trials that train at the same time in one process.
        eta: one of so many goes on after a rung.
        run_hash: what the checkpoints belong to.
    """

    recipe: Recipe
    space: Space
    choosing: Choosing
    journal: Journal
    out: Path
    trials: int
    places: int
    eta: int
    run_hash: str

    @property
    def epochs(self) -> int:
        """Of a trial that is trained to its end."""
        assert self.recipe.train.epochs is not None, "resolve the recipe first"
        return self.recipe.train.epochs

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which trials are compared."""
        return rungs(self.epochs, self.eta)

    @property
    def headline(self) -> str:
        """The score that the choice follows."""
        return self.choosing.job.task.headline

    def trained(self, trial: Trial) -> int:
        """Epochs that a trial was trained for; one that diverged counts to the rung before."""
        return max(trial.scores, default=0)

    def architectures(self) -> list[Recipe]:
        """A recipe for each value that a field of the side can have: together they read every tap needed."""
        return [
            self.recipe,
            *(
                apply(self.recipe, {name: value})
                for name, domain in self.space.items()
                if name.startswith("side.")
                for value in domain.tried
            ),
        ]

    def recipe_of(self, trial: Trial) -> Recipe:
        """The recipe with a trial's values."""
        return apply(self.recipe, trial.params)

    def outputs_file(self, number: int) -> Path:
        """Where the outputs of a finished trial are kept."""
        return self.out / "workers" / "outputs" / f"{number}.safetensors"


@dataclass
class Worker:
    """One worker's state.

    Args:
        plan: of the sweep.
        number: of the worker.
        fleet: of its trials.
        asks: how often it has asked.
        seconds: that it has trained and scored.
        running: recipes of the trials in the fleet, by number.
    """

    plan: Plan
    number: int
    fleet: Fleet
    asks: int = 0
    seconds: float = 0.0
    running: dict[int, Recipe] = field(default_factory=dict)

    @classmethod
    def begin(cls, plan: Plan, number: int, folder: Path) -> Worker:
        """From its checkpoint where there is one.

        Raises:
            ArtifactError: the checkpoint is damaged.
        """
        fleet = open_fleet(plan.choosing.job, plan.architectures(), plan.choosing.trained)
        if not (folder / CHECKPOINT).exists():
            return cls(plan, number, fleet)
        recipes = {
            trial.number: plan.recipe_of(trial) for trial in plan.journal.trials() if trial.worker == number
        }
        members = {
            member.name: member
            for trial, recipe in recipes.items()
            for member in plan.choosing.members(trial, recipe)
        }
        kept = load_checkpoint(folder / CHECKPOINT, plan.run_hash, fleet, members).extra
        running = sorted({trial_of(name) for name in fleet.names})
        return cls(
            plan, number, fleet, kept["asks"], kept["seconds"], {trial: recipes[trial] for trial in running}
        )

    def work(self, folder: Path) -> None:
        """Train until there is nothing left to ask for, and nothing running."""
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        plan = self.plan
        expected = expected_epochs(plan.trials, plan.epochs, plan.eta)
        done, _ = self._stand(expected)
        with Progress("sweep", expected, "epochs", done=done, quiet=plan.choosing.job.quiet) as progress:
            while True:
                self._fill()
                if not self.running:
                    break
                self._end_epoch(self.fleet.train_epoch())
                self.seconds = time.monotonic() - started
                done, note = self._stand(expected)
                progress.advance(done - progress.done, note)
                if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    self._save(folder)
                    saved = time.monotonic()
        self._save(folder)
        write_json(folder / SECONDS, self.seconds)

    def _save(self, folder: Path) -> None:
        extra = {"asks": self.asks, "seconds": self.seconds}
        save_checkpoint(folder / CHECKPOINT, self.plan.run_hash, self.fleet, Saved(extra=extra))

    def _fill(self) -> None:
        """Ask for a trial for each free place."""
        plan, members = self.plan, []
        while len(self.running) < plan.places:
            trial = plan.journal.ask(self.number, self.asks)
            if trial is None:
                break
            self.asks += 1
            self.running[trial.number] = plan.recipe_of(trial)
            members += plan.choosing.members(trial.number, self.running[trial.number])
        if members:
            self.fleet.add(members)

    def _end_epoch(self, losses: Mapping[str, float]) -> None:
        """Let go of what diverged; report, then decide on, what has reached a rung."""
        plan = self.plan
        for number in sorted({trial_of(name) for name, loss in losses.items() if math.isnan(loss)}):
            self._diverged(number)
        due = {}
        for number, recipe in self.running.items():
            if (epoch := self.fleet.epochs_done(plan.choosing.names(number)[0])) in plan.rungs:
                due[number] = (epoch, recipe)
        if not due:
            return
        outputs = plan.choosing.outputs(self.fleet, {number: recipe for number, (_, recipe) in due.items()})
        scores = {number: plan.choosing.score(outputs[number]) for number in due}
        for number, score in scores.items():
            if score is None:
                self._diverged(number)
            else:
                plan.journal.report(number, due[number][0], score)
        trials = plan.journal.trials()
        for number, score in scores.items():
            if score is not None:
                self._decide(trials[number], due[number][0], trials, outputs[number])

    def _decide(self, trial: Trial, epoch: int, trials: list[Trial], outputs: Tensor) -> None:
        """Finish a trial at the last rung; at another one let it go on or stop it, as was decided before."""
        plan, number = self.plan, trial.number
        if epoch == plan.epochs:
            if trial.state == "running":
                write_tensors(plan.outputs_file(number), {"outputs": outputs})
                plan.journal.finish(number, trial.scores[epoch])
            self._leave(number)
            return
        on = trial.decided(epoch)
        if on is None:
            reached = {one.number: one.scores[epoch].value for one in trials if epoch in one.scores}
            reached.pop(GIVEN, None)  # it takes nobody's place: it is trained to its end in any case
            on = number == GIVEN or goes_on(number, reached, plan.eta)
            if on:
                plan.journal.go_on(number, epoch)
            else:
                plan.journal.stop(number)
        if not on:
            self._leave(number)

    def _diverged(self, number: int) -> None:
        self.plan.journal.diverge(number)
        self._leave(number)

    def _leave(self, number: int) -> None:
        """Give a trial's places back."""
        self.fleet.remove(self.plan.choosing.names(number))
        del self.running[number]

    def _stand(self, most: int) -> tuple[int, str]:
        """Epochs that all trials have been trained for, at most so many, and a word on how they do."""
        plan, trials = self.plan, self.plan.journal.trials()
        epochs = {trial.number: plan.trained(trial) for trial in trials}
        for number in self.running:
            name = plan.choosing.names(number)[0]
            epochs[number] = self.fleet.epochs_done(name) if name in self.fleet.names else 0
        ended = sum(trial.state != "running" for trial in trials)
        scores = [
            headline
            for trial in trials
            if trial.state == "finished" and (headline := trial.scores[plan.epochs].headline) is not None
        ]
        best = f", best {max(scores):.3f}" if scores else ""
        return min(sum(epochs.values()), most), f"{ended} of {plan.trials} trials ended{best}"


def trial_of(name: str) -> int:
    """The number of the trial that a member belongs to."""
    return int(name.partition(".")[0])


def last(trial: Trial) -> Score | None:
    """A trial's score at the last rung that it reached; None where it reached none."""
    return trial.scores[max(trial.scores)] if trial.scores else None


@contextmanager
def free_worker(out: Path, journal: Journal, *, orphaned: bool) -> Iterator[tuple[int, Path | None]]:
    """Hold the first worker's folder that no process holds: (number, folder); None where there is none.

    The lock is the operating system's: a killed process leaves its folder, and its trials, to the next.

    Args:
        out: the sweep's folder.
        journal: its trials.
        orphaned: take only a folder whose trials are not at their end.
    """
    running = {trial.worker for trial in journal.trials() if trial.state == "running"}
    for number in sorted(running) if orphaned else range(MOST_WORKERS):
        folder = out / "workers" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield number, folder
            return
    yield -1, None


def worked_seconds(out: Path) -> float:
    """Seconds that all workers have trained and scored; waits for one that is about to end."""
    total = 0.0
    for folder in sorted((out / "workers").glob("[0-9]*")):
        with (folder / ".lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            total += read_json(folder / SECONDS) if (folder / SECONDS).exists() else 0.0
    return total
