"""Commands that are killed at exact events or by a clock, and what must hold of what they leave.

Run as a program, this is the server: it imports once and forks a process a command, because to import
torch anew takes seconds each time.
"""

import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from images import make_folder
from sidetune.files import sha256_file
from sidetune.upkeep import verify

KILLED = -signal.SIGKILL
SHARD, BATCH = 20, 4  # images

# the server


def watch(owner, name, reach, event):
    """Reach ``before EVENT`` and ``after EVENT`` around a function."""
    original = getattr(owner, name)

    def watched(*args, **kwargs):
        reach(f"before {event}")
        result = original(*args, **kwargs)
        reach(f"after {event}")
        return result

    setattr(owner, name, watched)


def watch_everything(reach):
    """Reach an event wherever a command might die."""
    from optuna.storages.journal import JournalFileBackend
    from PIL.PngImagePlugin import PngImageFile

    import sidetune.files
    import sidetune.optimizer
    import sidetune.upkeep
    from sidetune.backbones.hooked import HookedBackbone

    watch(PngImageFile, "load_read", reach, "decode")  # Pillow's decoder asks for the next bytes
    watch(HookedBackbone, "__call__", reach, "backbone")
    watch(sidetune.optimizer.MemberAdamW, "step", reach, "step")
    watch(sidetune.upkeep, "remove_file", reach, "remove")
    watch(JournalFileBackend, "append_logs", reach, "journal")
    commit = sidetune.files._commit

    def watched(temporary, path):
        """A file is written under a temporary name, then renamed. Half of it: as if killed while writing."""
        reach(f"half {path.name}", lambda: os.truncate(temporary, temporary.stat().st_size // 2))
        reach(f"before {path.name}")
        commit(temporary, path)
        reach(f"after {path.name}")

    sidetune.files._commit = watched


def run_job(job):
    """In the child: one command, its events written down, killed or stopped at one of them."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    events = os.open(job["events"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    counts, lock = {}, threading.Lock()  # images are decoded in several threads

    def reach(moment, prepare=lambda: None):
        with lock:
            counts[moment] = count = counts.get(moment, 0) + 1
            os.write(events, f"{moment} {count}\n".encode())
            if job["die"] != [moment, count]:
                return
            prepare()
            os.kill(os.getpid(), signal.SIGSTOP if job["stop"] else signal.SIGKILL)

    watch_everything(reach)
    sys.argv = ["sidetune", *job["command"]]
    try:
        runpy.run_module("sidetune", run_name="__main__")
    except SystemExit as done:
        os._exit(done.code or 0)  # to take torch down takes seconds, too
    except Exception:
        traceback.print_exc()
    os._exit(1)


def wait(pid, seconds):
    """A child's exit code; it is killed if it takes longer than so many seconds."""
    if seconds is not None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve():
    """Jobs are lines of JSON: start a command (answers its pid), or wait for one (answers its code)."""
    import matplotlib.pyplot  # noqa: F401 - what is imported here, the children need not import
    import scipy.optimize  # noqa: F401
    import torch

    import sidetune.cli
    import sidetune.report  # noqa: F401
    from sidetune.data import pictures

    extract = importlib.import_module("sidetune.extract")  # the package's attribute is the function
    extract.SHARD_RECORDS, pictures.MICRO_BATCH = SHARD, BATCH
    for module in ("sidetune.train", "sidetune.sweep.worker"):
        importlib.import_module(module).CHECKPOINT_SECONDS = 0.0
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        if "pid" in job:
            answer(wait(job["pid"], job["seconds"]))
            continue
        child = os.fork()
        if child == 0:
            run_job(job)
        answer(child)
    os._exit(0)


def answer(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


# its client


@dataclass
class Command:
    """A command under way."""

    server: "Server"
    pid: int
    log: Path
    events: Path

    def wait(self, seconds=None):
        """Its exit code: 0, or that of a kill."""
        code = self.server.ask({"pid": self.pid, "seconds": seconds})
        assert code in (0, KILLED), self.log.read_text()
        return code

    def trace(self) -> list[tuple[str, int]]:
        """Its events so far: what happened and for which time."""
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        return [(line.rpartition(" ")[0], int(line.rpartition(" ")[2])) for line in lines]


class Server:
    """Starts `python -m sidetune ...` in processes of their own, and may kill them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        paths = [
            str(Path(__file__).parent),
            *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        ]
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
        )

    def ask(self, job) -> int:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *words, die=None, stop=False) -> Command:
        """Start a command that dies, or stops, at an event: ``("after step", 8)``."""
        self.started += 1
        log, events = self.folder / f"{self.started}.log", self.folder / f"{self.started}.events"
        log.touch()
        job = {"command": [str(word) for word in words], "die": die, "stop": stop}
        return Command(self, self.ask({**job, "log": str(log), "events": str(events)}), log, events)

    def run(self, *words, die=None, seconds=None) -> int:
        """Run a command to its end, which may be a kill that its last event proves."""
        command = self.start(*words, die=die)
        code = command.wait(seconds)
        if die is not None and code == KILLED:
            assert command.trace()[-1] == tuple(die)
        return code

    def close(self):
        with self.process:
            self.process.stdin.close()


# what a killed command was doing

KINDS = {
    "begin": "before the first event",
    r"(before|after) decode": "decoding",
    r"(before|after) backbone": "middle of a shard",
    r"(half|before) \d+\.safetensors": "writing a shard",
    r"after \d+\.safetensors|(half|before) \d+\.json": "between shard and checksum file",
    r"after \d+\.json": "between shards",
    r"(before|after) journal": "a line of a sweep's journal",
    r".* manifest\.json": "manifest",
    r".* (plan\.json|norm\.safetensors)": "plan",
    r"(before|after) step": "training step",
    r"(half|before) checkpoint\.safetensors": "writing a checkpoint",
    r"after checkpoint\.safetensors": "after a checkpoint",
    r".* side\.safetensors|(half|before) artifact\.json": "writing the artifact",
    r"after artifact\.json|.* report\.html": "writing the report",
    r".*": "other files of a run",
}


def kind_of(event: str, command: str) -> str:
    """What a command is doing between this event and the next one."""
    if command == "store" and event != "begin":
        return "store gc"
    return next(kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, event))


# what must hold


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file by name, but of locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def finished_shards(store: Path) -> dict[str, int]:
    """Shards with their checksum files: name -> time of the last change."""
    entries = list((store / "shards").glob("[0-9]*.json"))
    files = [path for entry in entries for path in (entry, entry.with_suffix(".safetensors"))]
    return {path.name: path.stat().st_mtime_ns for path in files if path.exists()}


TIMES = {"seconds", "peak_memory_bytes", "peak_gpu_bytes"}
VARYING = {"report.html", "history.jsonl", "metrics.json"}  # they hold times


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def run_bytes(folder: Path) -> dict[str, object]:
    """What a run folder holds: digests, and history and metrics without times."""
    found: dict[str, object] = {
        name: None if Path(name).name in VARYING else digest for name, digest in digests(folder).items()
    }
    for history in folder.rglob("history.jsonl"):  # of the run and of its members
        lines = history.read_text().splitlines()
        found[str(history.relative_to(folder))] = [without_times(json.loads(line)) for line in lines]
    found["metrics.json"] = without_times(json.loads((folder / "metrics.json").read_text()))
    return found


def everything(folder: Path) -> dict[str, object]:
    """What a job has made: a store ``s``, a run ``r``, or both."""
    found: dict[str, object] = {f"s/{name}": digest for name, digest in digests(folder / "s").items()}
    if (folder / "r").exists():
        found |= {f"r/{name}": value for name, value in run_bytes(folder / "r").items()}
    return found


# jobs that can be killed at any moment


@dataclass
class Job:
    """A command, run once uninterrupted.

    Args:
        words: folder -> the command that works in it.
        prepare: makes a folder ready for it.
    """

    words: Callable[[Path], list[object]]
    prepare: Callable[[Path], object] = Path.mkdir
    made: dict[str, object] = field(default_factory=dict)
    moments: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    seconds: float = 0.0
    at: Path = Path()

    def run_whole(self, server: Server, folder: Path) -> None:
        """Note what an uninterrupted run makes, its events by kind, and how long it takes."""
        self.at = folder
        self.prepare(folder)
        started = time.monotonic()
        command = server.start(*self.words(folder))
        assert command.wait() == 0
        self.seconds, self.made = time.monotonic() - started, everything(folder)
        for event in command.trace():
            self.moments.setdefault(kind_of(event[0], str(self.words(folder)[0])), []).append(event)
        assert verify(folder / "s") == []


@dataclass
class Killed:
    """What came of a job that was killed: the kind of each kill, and what differs or was lost."""

    kinds: list[str]
    clocked: int
    runs: int
    differing: list[str]
    lost: list[str]


def kill_job(server: Server, job: Job, folder: Path, rng: np.random.Generator, kills: int) -> Killed:
    """Kill a job up to so many times, at drawn events or by the clock, then let it end."""
    job.prepare(folder)
    words, result = job.words(folder), Killed([], 0, 0, [], [])
    shards = finished_shards(folder / "s")
    while True:
        die, seconds = None, None
        if len(result.kinds) < kills:
            die, seconds = draw_moment(job, rng)
        command = server.start(*words, die=die)
        code = command.wait(seconds)
        result.runs += 1
        now = finished_shards(folder / "s")
        kept = {name: when for name, when in shards.items() if f"s/shards/{name}" in job.made}
        result.lost += [name for name, when in kept.items() if now.get(name) != when]
        shards = now
        if code == 0:
            break
        event = command.trace()[-1] if command.trace() else ("begin", 1)
        assert die is None or event == tuple(die), "it died where it was told to"
        result.clocked += die is None
        result.kinds.append(kind_of(event[0], str(words[0])))
    made = everything(folder)
    result.differing = sorted(
        name for name in made.keys() | job.made.keys() if made.get(name) != job.made.get(name)
    )
    return result


def draw_moment(job: Job, rng: np.random.Generator) -> tuple[tuple[str, int] | None, float | None]:
    """An event (three times of four, each kind as likely as another), or seconds."""
    if rng.random() < 0.25:
        return None, float(rng.uniform(0, job.seconds))
    kinds = sorted(job.moments)
    moments = job.moments[kinds[int(rng.integers(len(kinds)))]]
    return moments[int(rng.integers(len(moments)))], None


EPOCHS, STEPS = 6, 18  # 36 images to train on in 3 steps an epoch, a checkpoint after every step
SETTINGS = ("side.drop_path=0.2", "train.select=best", f"train.epochs={EPOCHS}", "train.batch_size=14")


def fit_words(data: Path, run: Path, store: Path, settings: Sequence[str] = SETTINGS) -> list[object]:
    """A fit of a few seconds."""
    words = [word for setting in settings for word in ("--set", setting)]
    return ["fit", data, "--backbone", "toy", "--store", store, "--out", run, *words]


def fleet_words(data: Path, run: Path, store: Path) -> list[object]:
    """A fit of twelve networks in two streams, of which one diverges at its first step."""
    words = fit_words(data, run, store, ("side.drop_path=0.2", "train.epochs=2"))
    return [*words, "--folds", "3", "--ensemble", "--members", "lr=0.01,1e30;batch_size=16,24"]


def make_jobs(server: Server, folder: Path) -> dict[str, Job]:
    """extract, fit and gc, each run once as a whole."""
    photos = make_folder(folder / "photos", 3, 60, seed=3)
    more = make_folder(folder / "more", 3, 100, seed=4)
    both = folder / "both"
    for data in (more, photos):
        assert server.run("extract", data, "--backbone", "toy", "--out", both) == 0
    jobs = {
        "extract": Job(lambda at: ["extract", photos, "--backbone", "toy", "--out", at / "s"]),
        "fit": Job(lambda at: fit_words(photos, at / "r", at / "s")),
        "gc": Job(
            lambda at: ["store", "gc", at / "s", "--data", photos, "--yes"],
            lambda at: shutil.copytree(both, at / "s"),
        ),
    }
    for name, job in jobs.items():
        job.run_whole(server, folder / f"whole-{name}")
    return jobs


if __name__ == "__main__":
    serve()
