"""kill -9 at any moment, the same command again: the same bytes as if nothing had happened.

A command is killed from within, at the n-th event of a kind, so that every moment is exact.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from images import make_folder
from sidetune.errors import ArtifactError, StoreError
from sidetune.files import sha256_file
from sidetune.runs import Run
from sidetune.store import Store, verify

# Imports once, then forks a process for each command: to import torch anew takes seconds each time.
SERVER = """
import importlib, json, os, runpy, signal, sys, traceback

import matplotlib.pyplot, scipy.optimize, torch
import sidetune.cli, sidetune.files, sidetune.report
from sidetune.backbones.hooked import HookedBackbone

extract = importlib.import_module("sidetune.extract")  # the package's attribute is the function
extract.SHARD_RECORDS, extract.MICRO_BATCH = 20, 4
importlib.import_module("sidetune.train").CHECKPOINT_SECONDS = 0.0
torch.set_num_threads(1)


def watch(owner, name, event, die):
    original, counts = getattr(owner, name), {}

    def reach(moment):
        counts[moment] = counts.get(moment, 0) + 1
        if die == [moment, counts[moment]]:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(*args, **kwargs):
        reach("before " + event(*args))
        result = original(*args, **kwargs)
        reach("after " + event(*args))
        return result

    setattr(owner, name, watched)


for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        # A file is written under a temporary name, then `_commit` renames it.
        watch(sidetune.files, "_commit", lambda temporary, path: path.name, job["die"])
        watch(HookedBackbone, "__call__", lambda *_: "backbone", job["die"])
        watch(torch.optim.AdamW, "step", lambda *_: "step", job["die"])
        sys.argv = ["sidetune", *job["command"]]
        try:
            runpy.run_module("sidetune", run_name="__main__")
        except SystemExit as done:
            os._exit(done.code or 0)  # to take torch down takes seconds, too
        except Exception:
            traceback.print_exc()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs `python -m sidetune ...` in a process of its own; may kill it; returns its exit code."""
    log = tmp_path_factory.mktemp("log") / "log"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes, env=one_thread, text=True) as server:

        def run(*words, die=None):
            job = {"command": [str(word) for word in words], "die": die, "log": str(log)}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            assert code in (0, KILLED), log.read_text()
            return code

        yield run
        server.stdin.close()


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


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


# fit: 36 images to train on in 3 steps an epoch, a checkpoint after every step

EPOCHS, STEPS = 6, 18
SETTINGS = ("side.drop_path=0.2", "train.select=best", f"train.epochs={EPOCHS}", "train.batch_size=14")
COMPARED = ("side.safetensors", "predictions.csv", "skipped.csv", "recipe.json")


@pytest.fixture(scope="module")
def fit(command, image_folder, tmp_path_factory):
    """Runs `fit` into a folder; all runs share one store."""
    store = tmp_path_factory.mktemp("fit") / "s"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]

    def run(out, die):
        words = ("fit", image_folder, "--backbone", "toy", "--store", store, *settings)
        return command(*words, "--out", out, die=die)

    return run


@pytest.fixture(scope="module")
def finished(fit, tmp_path_factory):
    """A run that was not interrupted. One step more than it takes would have killed it."""
    out = tmp_path_factory.mktemp("finished") / "r"
    assert fit(out, ["before step", STEPS + 1]) == 0
    return out


def assert_equal_runs(run, other):
    assert {name: digests(run)[name] for name in COMPARED} == {
        name: digests(other)[name] for name in COMPARED
    }
    assert history(run) == history(other)
    assert digests(run).keys() == digests(other).keys(), "no checkpoint, no temporary file is left"


def history(run):
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_fit_killed_in_training_ends_with_the_weights_of_one_that_was_not(fit, finished, tmp_path):
    out = tmp_path / "r"
    for die in (
        ["after step", 8],  # mid-epoch: the checkpoint holds 7 steps
        ["before checkpoint.safetensors", 5],  # the fifth has not taken the fourth's place: 7 + 4 steps
        ["after checkpoint.safetensors", 3],  # the third has: 11 + 3 steps
    ):
        assert fit(out, die) == KILLED
        with pytest.raises(ArtifactError, match="is not a finished run"):
            Run.open(out)
    assert fit(out, ["before step", STEPS - 14 + 1]) == 0, "no step is taken twice"
    assert_equal_runs(out, finished)


def test_a_fit_killed_at_its_end_does_not_train_again(fit, finished, tmp_path):
    out = tmp_path / "r"
    assert fit(out, ["before step", STEPS]) == KILLED
    assert fit(out, ["before side.safetensors", 1]) == KILLED  # all is written but artifact and weights
    assert fit(out, ["before step", 1]) == 0
    assert_equal_runs(out, finished)


def test_a_finished_fit_is_not_fitted_again(fit, finished):
    before = digests(finished)
    assert fit(finished, ["before step", 1]) == 0
    assert digests(finished) == before
