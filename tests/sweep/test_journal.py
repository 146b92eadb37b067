import json
import re

import pytest

from sidetune.errors import ArtifactError
from sidetune.sweep.journal import Journal
from sidetune.sweep.score import Score
from sidetune.sweep.space import Choice, Range

SPACE = {
    "train.lr": Range(1e-4, 1e-2, log=True),
    "side.rank": Choice((4, 8, 16)),
    "side.every": Range(1, 4, log=False, whole=True),
    "train.clip_norm": Choice((None, 1.0)),
}
DEFAULTS = {"train.lr": 1e-3, "side.rank": 8, "side.every": 1, "train.clip_norm": 1.0}


def open_journal(folder, seed=0, most=40, defaults=DEFAULTS):
    return Journal(folder / "journal.log", SPACE, defaults=defaults, seed=seed, most=most)


def ask_all(journal, count, worker=0):
    """Ask, report and finish one after the other: a higher rate is better."""
    for ask in range(count):
        trial = journal.ask(worker, ask)
        score = Score(trial.params["train.lr"], 1.0)
        journal.report(trial.number, 4, score)
        journal.finish(trial.number, score)
    return journal.trials()


def test_the_first_trial_has_the_recipes_own_values_and_all_are_in_the_space(tmp_path):
    trials = ask_all(open_journal(tmp_path), 20)
    assert trials[0].params == DEFAULTS
    for trial in trials:
        assert all(SPACE[name].contains(value) for name, value in trial.params.items())
        assert isinstance(trial.params["side.every"], int)
    assert len({trial.params["train.lr"] for trial in trials}) == 20


def test_the_later_trials_are_where_good_ones_were(tmp_path):
    trials = ask_all(open_journal(tmp_path), 40)
    rates = [trial.params["train.lr"] for trial in trials]
    assert sum(rates[25:]) / 15 > 1.5 * sum(rates[1:10]) / 9


def test_draws_hang_on_seed_and_journal_alone(tmp_path):
    params = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        params.append([trial.params for trial in ask_all(open_journal(tmp_path / name, seed), 15)])
    assert params[0] == params[1] != params[2]


def test_an_ask_that_was_answered_gets_the_same_answer(tmp_path):
    told = [open_journal(tmp_path).ask(0, ask) for ask in range(3)]
    again = [open_journal(tmp_path).ask(0, ask) for ask in range(3)]
    assert told == again and [trial.number for trial in told] == [0, 1, 2]


def test_trials_are_counted_over_all_workers(tmp_path):
    journal = open_journal(tmp_path, most=3)
    assert [journal.ask(worker, 0).number for worker in range(3)] == [0, 1, 2]
    assert journal.ask(0, 1) is None and journal.ask(3, 0) is None
    assert journal.ask(1, 0).number == 1


def test_a_first_trial_outside_the_space_keeps_its_values(tmp_path):
    trials = ask_all(open_journal(tmp_path, defaults=DEFAULTS | {"train.lr": 0.5}), 14)
    assert trials[0].params["train.lr"] == 0.5
    assert all(SPACE["train.lr"].contains(trial.params["train.lr"]) for trial in trials[1:])


def test_what_happened_to_a_trial_is_read_back(tmp_path):
    journal = open_journal(tmp_path)
    for ask in range(4):
        journal.ask(2, ask)
    for number in range(3):
        journal.report(number, 4, Score(0.5, 1.0 + number))
    journal.report(0, 4, Score(0.9, 9.0))
    journal.go_on(0, 4)
    journal.stop(1)
    journal.diverge(3)
    trials = open_journal(tmp_path).trials()
    assert [trial.state for trial in trials] == ["running", "stopped", "running", "diverged"]
    assert trials[0].scores == {4: Score(0.5, 1.0)}, "what was reported first stays"
    assert [trial.decided(4) for trial in trials] == [True, False, None, False]
    journal.stop(3)
    assert journal.trials()[3].state == "diverged", "what has ended stays as it ended"


def test_the_better_headline_wins_and_loss_decides_between_equals():
    assert Score(0.5, 0.1).value > Score(0.5, 0.2).value > Score(0.5, 1e9).value > Score(0.4999, 0.0).value
    assert Score(None, 0.1).value > Score(None, 0.2).value


def test_importances_name_what_decides(tmp_path):
    journal = open_journal(tmp_path)
    ask_all(journal, 30)
    found = journal.importances()
    assert max(found, key=found.get) == "train.lr" and found["train.lr"] > 0.5
    (tmp_path / "few").mkdir()
    few = open_journal(tmp_path / "few")
    ask_all(few, 3)
    assert few.importances() == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:2], "not json", *lines[3:]],
        lambda lines: [lines[0], re.sub(r'"worker":\d', '"worer":0', lines[1]), *lines[2:]],
        lambda lines: [lines[0], json.dumps({**json.loads(lines[1]), "op_code": 77}), *lines[2:]],
        lambda lines: [lines[0], "[]", *lines[1:]],
        lambda lines: ["{}", *lines],
    ],
    ids=["words", "attribute", "operation", "list", "object"],
)
def test_a_damaged_journal_is_refused(tmp_path, damage):
    ask_all(open_journal(tmp_path), 3)
    path = tmp_path / "journal.log"
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    with pytest.raises(ArtifactError, match=r"journal.log is damaged: .* with a new --out"):
        open_journal(tmp_path)
