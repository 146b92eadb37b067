"""kill -9 at any moment, the same command again: the same bytes as if nothing had happened.

A command is killed from within, at the n-th event of a kind, so that every moment is exact, and it writes
down what it reaches, so that the moment is proven. `make kill` is the same in large.
"""

import os
import signal
import time

import numpy as np
import pytest

from images import make_folder
from killing import (
    KILLED,
    STEPS,
    Job,
    Server,
    digests,
    everything,
    finished_shards,
    fleet_words,
    kill_job,
    kind_of,
    make_jobs,
)
from sidetune.errors import ArtifactError, StoreError
from sidetune.runs import Run
from sidetune.store import Store
from sidetune.upkeep import verify


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("log"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def command(server):
    return server.run


@pytest.fixture(scope="module")
def jobs(server, tmp_path_factory):
    """extract, fit and gc, each run once uninterrupted."""
    return make_jobs(server, tmp_path_factory.mktemp("jobs"))


# every kind of moment, one after another in one folder


def chain(server, job, folder, moments):
    """Kill a job at each moment in turn, then let it end. Returns the kinds that were hit, and all traces."""
    job.prepare(folder)
    words, kinds, traces, written = job.words(folder), [], [], finished_shards(folder / "s")
    for die in moments:
        started = server.start(*words, die=die)
        assert started.wait() == KILLED, die
        traces.append(started.trace())
        assert traces[-1][-1] == die
        if words[0] != "store" and not any(("after artifact.json", 1) in trace for trace in traces):
            with pytest.raises(
                (StoreError, ArtifactError), match=r"is not (complete|a finished run)|plan\.json"
            ):
                _ = Run.open(folder / "r") if words[0] == "fit" else Store.open(folder / "s")
        kinds.append(kind_of(die[0], words[0]))
        now = finished_shards(folder / "s")
        assert {name: now.get(name) for name in written if f"s/shards/{name}" in job.made} == {
            name: when for name, when in written.items() if f"s/shards/{name}" in job.made
        }, "no finished shard is lost or written again"
        written = now
    assert server.run(*words) == 0
    assert everything(folder) == job.made, "the same bytes, and no file is left over"
    assert verify(folder / "s") == []
    return kinds, traces


def test_extract_is_killed_at_every_kind_of_moment(server, jobs, tmp_path):
    rng = np.random.default_rng(5)
    kinds, _ = chain(
        server,
        jobs["extract"],
        tmp_path / "f",
        [
            ("after plan.json", 1),
            ("before decode", int(rng.integers(1, 20))),
            ("after decode", 20 + int(rng.integers(1, 20))),
            ("after backbone", int(rng.integers(1, 5))),
            ("half 00001.safetensors", 1),
            ("after 00001.safetensors", 1),
            ("half 00001.json", 1),
            ("before 00002.json", 1),
            ("half manifest.json", 1),
            ("before manifest.json", 1),
        ],
    )
    assert set(kinds) == {
        "plan",
        "decoding",
        "middle of a shard",
        "writing a shard",
        "between shard and checksum file",
        "manifest",
    }


def test_a_fit_is_killed_at_every_kind_of_moment(server, jobs, tmp_path):
    kinds, traces = chain(
        server,
        jobs["fit"],
        tmp_path / "f",
        [
            ("half checkpoint.safetensors", 6),  # the temporary file is half written; 5 steps are kept
            ("before checkpoint.safetensors", 4),  # whole, not yet renamed: 5 + 3
            ("after checkpoint.safetensors", 2),  # 8 + 2
            ("before step", STEPS - 10),  # the last one: 17 are kept
            ("after side.safetensors", 1),
            ("half artifact.json", 1),
            ("after artifact.json", 1),  # a finished run, with its checkpoint and without its report
            ("half report.html", 1),
        ],
    )
    assert set(kinds) == {
        "writing a checkpoint",
        "after a checkpoint",
        "training step",
        "writing the artifact",
        "writing the report",
    }
    steps = [sum(event == "before step" for event, _ in trace) for trace in traces]
    assert steps == [6, 4, 2, 8, 1, 0, 0, 0], "no step is taken twice but the one in flight"


def test_a_fit_of_many_members_is_killed_at_every_kind_of_moment(server, jobs, tmp_path):
    photos = jobs["fit"].words(tmp_path)[1]
    job = Job(lambda at: fleet_words(photos, at / "r", at / "s"))
    job.run_whole(server, tmp_path / "whole")
    steps = sum(event == "before step" for event, _ in job.moments["training step"])
    kinds, _ = chain(
        server,
        job,
        tmp_path / "f",
        [
            ("before step", steps // 2),
            ("after side.safetensors", 4),  # of a member; the others are there
            ("half artifact.json", 7),  # of the run
        ],
    )
    assert kinds.count("writing the artifact") == 2
    table = (tmp_path / "f" / "r" / "members.csv").read_text()
    assert table.count("diverged") == 6


def test_gc_is_killed_at_every_kind_of_moment(server, jobs, tmp_path):
    moments = [
        ("half plan.json", 1),
        ("after plan.json", 1),
        ("before manifest.json", 1),
        ("before remove", 2),
        ("after remove", 3),
    ]
    for number in (1, 2, 5):
        folder = tmp_path / str(number)
        kinds, _ = chain(server, jobs["gc"], folder, moments[:number])
        assert set(kinds) == {"store gc"}


@pytest.mark.parametrize(("name", "seed"), [("extract", 0), ("fit", 1), ("gc", 2)])
def test_moments_drawn_at_random_and_by_the_clock(server, jobs, tmp_path, name, seed):
    killed = kill_job(server, jobs[name], tmp_path / "f", np.random.default_rng(seed), 3)
    assert (killed.differing, killed.lost) == ([], [])
    assert killed.kinds, "it was killed at least once"


def test_the_one_that_waits_goes_on_when_the_holder_is_killed(server, jobs, tmp_path):
    job, folder = jobs["extract"], tmp_path / "f"
    job.prepare(folder)
    holder = server.start(*job.words(folder), die=("after 00000.safetensors", 1), stop=True)
    until(lambda: ("after 00000.safetensors", 1) in holder.trace())
    waiter = server.start(*job.words(folder))
    said = f"another process works in {folder / 's'}; waiting for it"
    until(lambda: said in waiter.log.read_text())
    os.kill(holder.pid, signal.SIGKILL)
    assert (holder.wait(), waiter.wait()) == (KILLED, 0)
    assert everything(folder) == job.made
    assert waiter.trace()[0] == ("half norm.safetensors", 1), "it began where the holder had to leave off"


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# extract: 200 images in 10 shards of 5 micro-batches each


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos"), 3, 200, seed=3)


@pytest.fixture(scope="module")
def uninterrupted(command, photos, tmp_path_factory):
    """Digests of a store that was extracted in one go."""
    folder = tmp_path_factory.mktemp("whole") / "s"
    assert command("extract", photos, "--backbone", "toy", "--out", folder) == 0
    assert Store.open(folder).num_records == 200
    return digests(folder)


def moments(seed):
    """Three moments of one extraction, and how many shards stand after each."""
    rng = np.random.default_rng(seed)
    done = int(rng.integers(1, 4))
    yield ["after backbone", 5 * done + int(rng.integers(1, 5))], done  # one to four of five micro-batches
    done += int(rng.integers(1, 3))
    yield [f"{rng.choice(['before', 'after'])} {done:05d}.safetensors", 1], done
    done += int(rng.integers(1, 3))
    when = rng.choice(["before", "after"])
    yield [f"{when} {done:05d}.json", 1], done + int(when == "after")


@pytest.mark.parametrize("seed", range(2))
def test_a_store_killed_three_times_has_the_bytes_of_one_that_was_not(
    command, photos, uninterrupted, tmp_path, seed
):
    words = ("extract", photos, "--backbone", "toy", "--out", tmp_path / "s")
    shards, written = tmp_path / "s/shards", {}
    for die, done in moments(seed):
        assert command(*words, die=die) == KILLED
        with pytest.raises(StoreError, match="is not complete"):
            Store.open(tmp_path / "s")
        found = {
            path: path.stat().st_mtime_ns
            for entry in shards.glob("[0-9]*.json")
            for path in (entry, entry.with_suffix(".safetensors"))
        }
        assert len(found) == 2 * done, "a kill loses the shard in flight and no other"
        assert {path: found[path] for path in written} == written, "finished shards are not written again"
        written = found
    assert command(*words) == 0
    assert digests(tmp_path / "s") == uninterrupted
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert verify(tmp_path / "s") == []


def test_a_store_killed_at_its_very_beginning_and_end(command, photos, uninterrupted, tmp_path):
    words = ("extract", photos, "--backbone", "toy", "--out", tmp_path / "s")
    for moment in (
        "before norm.safetensors",
        "after norm.safetensors",
        "before plan.json",
        "after plan.json",
    ):
        assert command(*words, die=[moment, 1]) == KILLED
    assert command(*words, die=["before manifest.json", 1]) == KILLED
    with pytest.raises(StoreError, match="is not complete"):
        Store.open(tmp_path / "s")
    assert command(*words, die=["before backbone", 1]) == 0, "nothing is extracted again"
    assert digests(tmp_path / "s") == uninterrupted


# a finished run


def test_a_finished_fit_is_not_fitted_again(command, jobs):
    folder = jobs["fit"].at
    before = digests(folder)
    assert command(*jobs["fit"].words(folder), die=("before step", 1)) == 0
    assert digests(folder) == before
