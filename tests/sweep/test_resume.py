"""A sweep that dies goes on, and ends as if it had not."""

import json
import os
import shutil
import signal
import time
from collections import Counter

import pytest
from optuna.storages.journal import JournalFileBackend

from killing import KILLED, Server
from sidetune.sweep import worker
from sweeps import result, small_sweep, sweep_words


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image_folder):
    """Where an uninterrupted sweep stands, its result, and how many lines its journal has."""
    folder = tmp_path_factory.mktemp("whole")
    run = small_sweep(image_folder, folder)
    return folder, result(run.folder), (run.folder / "journal.log").read_text().count("\n")


def events(journal):
    return [json.loads(line) for line in journal.read_text().splitlines()]


class Killed(BaseException):
    """In place of a kill: nothing catches it."""


def die_at(monkeypatch, count, before):
    """Die at the count-th line of the journal, before or after it is written."""
    append, lines = JournalFileBackend.append_logs, []

    def watched(backend, logs):
        lines.append(logs)
        if len(lines) == count and before:
            raise Killed
        append(backend, logs)
        if len(lines) == count:
            raise Killed

    monkeypatch.setattr(JournalFileBackend, "append_logs", watched)


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["every epoch saved", "nothing saved"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.75, 0.95])
def test_it_ends_the_same_wherever_it_died(whole, image_folder, tmp_path, monkeypatch, share, seconds):
    folder, expected, lines = whole
    shutil.copytree(folder / "store", tmp_path / "store")
    monkeypatch.setattr(worker, "CHECKPOINT_SECONDS", seconds)
    for before in (True, False):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, max(1, round(share * lines)) if before else 3, before)
            small_sweep(image_folder, tmp_path)
    run = small_sweep(image_folder, tmp_path)
    assert result(run.folder) == expected
    assert (run.folder / "journal.log").read_text().count("\n") == lines, "nothing was said twice"


def test_a_half_written_last_line_is_cut_off(whole, image_folder, tmp_path, monkeypatch):
    folder, expected, lines = whole
    shutil.copytree(folder / "store", tmp_path / "store")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, lines // 2, False)
        small_sweep(image_folder, tmp_path)
    journal = tmp_path / "sweep" / "journal.log"
    journal.write_bytes(journal.read_bytes()[:-7])
    assert result(small_sweep(image_folder, tmp_path).folder) == expected


@pytest.mark.parametrize("dies", ["sweep", "final"])
def test_it_ends_the_same_if_it_dies_at_the_end(whole, image_folder, tmp_path, monkeypatch, dies):
    folder, expected, _ = whole
    shutil.copytree(folder / "store", tmp_path / "store")
    module = __import__("sidetune.sweep.finish", fromlist=["finish"])
    name = {"sweep": "_train_finals", "final": "_write_run"}[dies]

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, die)
        small_sweep(image_folder, tmp_path)
    assert result(small_sweep(image_folder, tmp_path).folder) == expected


def test_a_finished_sweep_without_its_page_gets_it(whole, image_folder, tmp_path):
    folder, expected, _ = whole
    shutil.copytree(folder, tmp_path / "copy")
    page = tmp_path / "copy" / "sweep" / "report.html"
    page.unlink()
    assert result(small_sweep(image_folder, tmp_path / "copy").folder) == expected
    assert page.exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def moments(whole, server, image_folder, tmp_path_factory):
    """Steps and checkpoints of an uninterrupted command, which ends as the function does."""
    folder, expected, _ = whole
    at = tmp_path_factory.mktemp("moments")
    shutil.copytree(folder / "store", at / "store")
    command = server.start(*sweep_words(image_folder, at))
    assert command.wait() == 0
    assert result(at / "sweep") == expected
    return [one for one in command.trace() if "checkpoint.safetensors" in one[0] or "step" in one[0]]


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_killed_by_the_system_it_has_the_same_winner(whole, server, moments, image_folder, tmp_path, share):
    folder, expected, _ = whole
    shutil.copytree(folder / "store", tmp_path / "store")
    words = sweep_words(image_folder, tmp_path)
    die = moments[int(share * len(moments))]
    assert server.run(*words, die=die) == KILLED
    assert server.run(*words) == 0
    assert result(tmp_path / "sweep") == expected


def test_two_processes_share_a_sweep(whole, server, image_folder, tmp_path):
    folder, _, _ = whole
    shutil.copytree(folder / "store", tmp_path / "store")
    words = sweep_words(image_folder, tmp_path, trials=12)
    commands = [server.start(*words) for _ in range(2)]
    codes = [command.wait() for command in commands]
    assert codes == [0, 0]
    check_shared(tmp_path / "sweep", 12)


def test_a_process_takes_over_what_a_killed_one_left(whole, server, image_folder, tmp_path):
    folder, _, _ = whole
    shutil.copytree(folder / "store", tmp_path / "store")
    words = sweep_words(image_folder, tmp_path, trials=12)
    assert server.run(*words, die=("after checkpoint.safetensors", 2)) == KILLED
    journal = tmp_path / "sweep" / "journal.log"
    begun = sum(event["op_code"] == 4 for event in events(journal))
    assert 0 < begun < 12
    assert server.run(*words) == 0
    check_shared(tmp_path / "sweep", 12)


def check_shared(folder, trials):
    """Every trial was created once, reported once at each rung, and ended once."""
    lines = events(folder / "journal.log")
    created = [event["user_attrs"] for event in lines if event["op_code"] == 4]
    assert len(created) == len({(one["worker"], one["ask"]) for one in created}) == trials
    ended = Counter(event["trial_id"] for event in lines if event["op_code"] == 6)
    assert len(ended) == trials and set(ended.values()) == {1}
    reported = Counter((event["trial_id"], event["step"]) for event in lines if event["op_code"] == 7)
    assert set(reported.values()) == {1}
    found = json.loads((folder / "sweep.json").read_text())
    assert len(found["trials"]) == trials
    assert not (folder / "workers").exists()


def test_what_a_killed_process_was_training_is_trained_by_one_that_waits(
    whole, server, image_folder, tmp_path
):
    folder, _, _ = whole
    shutil.copytree(folder / "store", tmp_path / "store")
    words = sweep_words(image_folder, tmp_path, trials=12)
    first = server.start(*words, die=("after checkpoint.safetensors", 2), stop=True)
    wait_for(lambda: ("after checkpoint.safetensors", 2) in first.trace())
    second = server.start(*words)
    wait_for(lambda: "another process trains the last trials" in second.log.read_text())
    os.kill(first.pid, signal.SIGKILL)
    assert (first.wait(), second.wait()) == (KILLED, 0)
    lines = events(tmp_path / "sweep" / "journal.log")
    assert {event["user_attrs"]["worker"] for event in lines if event["op_code"] == 4} == {0, 1}
    check_shared(tmp_path / "sweep", 12)


def wait_for(happened):
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)
