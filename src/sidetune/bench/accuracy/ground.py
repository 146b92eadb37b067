"""A task ready for all methods: its features, its splits, and the images that are answered for at the end.

open_ground(folder, ..)    features from a store
live_ground(ground, ..)    the same task for methods that begin at the pixels
add_test(ground, ..)       another data set of the same classes, to answer for as well
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sidetune.backbones.base import Backbone
from sidetune.bench.accuracy.grid import Method
from sidetune.bench.accuracy.ledger import Ledger, digest
from sidetune.bench.accuracy.tasks import TaskFolder
from sidetune.data import load_dataset
from sidetune.data.dataset import Dataset
from sidetune.data.vtab import is_vtab
from sidetune.errors import DataError, RequestError
from sidetune.extract import sample_keys
from sidetune.job import Job, union
from sidetune.keyed import generator
from sidetune.opening import Part, open_jobs
from sidetune.recipe import Recipe
from sidetune.runs import default_store
from sidetune.sources import LiveSource
from sidetune.sweep.score import Choosing, On, Rows

FOLDS = 5  # of train and validation, where the protocol is not VTAB's
METRIC = "accuracy"  # top-1, what the benchmark is reported in, is what choices follow
NAMED = 5  # classes that a message lists


@dataclass(frozen=True, eq=False)
class Images:
    """Images that methods answer for.

    Args:
        job: whose features they have.
        rows: (n,) of its data.
        digest: of their keys, without labels.
        classes: (K,) the number of each of the job's classes for those who answer; None: the same.
    """

    job: Job
    rows: Rows
    digest: str
    classes: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, job: Job, keys: Sequence[str], rows: Rows) -> Images:
        """Some rows of a job whose sample keys are known."""
        return cls(job, rows, digest([keys[row] for row in rows]))

    def labels(self) -> Callable[[], NDArray[np.int64]]:
        """What gives their classes (n,), and holds no features; of test images it is called at the end."""
        dataset, rows, classes = self.job.dataset, self.rows, self.classes

        def read() -> NDArray[np.int64]:
            targets = dataset.targets[rows].astype(np.int64)
            return targets if classes is None else classes[targets]

        return read


@dataclass(frozen=True, eq=False)
class Ground:
    """A task, ready for all methods.

    Args:
        folder: where it is, and what it is averaged in.
        job: features, splits, task; its folder is OUT/TASK.
        keys: of all samples.
        choosing: what methods are chosen on.
        tests: name -> images that are answered for at the end: ``test``, and other data sets.
    """

    folder: TaskFolder
    job: Job
    keys: Sequence[str]
    choosing: Choosing
    tests: Mapping[str, Images]

    @property
    def name(self) -> str:
        """Of the task."""
        return self.folder.name

    @property
    def rows(self) -> Rows:
        """Of train and validation."""
        return union([self.job.split["train"], self.job.split["val"]])

    def shots(self, shots: int, seed: int) -> Rows:
        """The first k images of every class in an order that the seed draws: fewer shots are among more.

        Args:
            shots: k; of a class that has fewer, all.
            seed: of the order.
        """
        rows = self.rows
        order = torch.randperm(len(rows), generator=generator(seed, "shots")).numpy()
        drawn = rows[order]
        targets = self.job.dataset.targets[drawn]
        parts = [drawn[targets == label][:shots] for label in np.unique(targets)]
        return np.sort(np.concatenate(parts))

    def ledger(self, method: Method) -> Ledger:
        """Where a method's fits are kept."""
        return Ledger(self.job.out / method.name)

    def labelled(self, rows: Rows) -> str:
        """Digest of samples and their labels; never asked for rows of test."""
        targets = self.job.dataset.targets
        return digest([[self.keys[row], int(targets[row])] for row in rows])

    @property
    def data(self) -> str:
        """Digest of all that a method may learn from, and of the test images without their labels."""
        parts = {split: self.labelled(self.job.split[split]) for split in ("train", "val")}
        return digest({**parts, "test": self.tests["test"].digest})


@dataclass(frozen=True)
class Opening:
    """How features are opened.

    Args:
        recipe: of data, backbone and features; its side reads all taps that any method reads.
        out: OUT.
        stores: a folder with a store a task; None: one store of all.
        quiet: no progress.
    """

    recipe: Recipe
    out: Path
    stores: Path | None
    quiet: bool


def open_ground(folder: TaskFolder, backbone: Backbone, how: Opening) -> Ground:
    """Features, splits, and what is chosen on.

    Args:
        folder: of the task.
        backbone: on its device.
        how: see there.

    Raises:
        DataError: there are no classes, or no test images, or they would be drawn across folds.
        StoreError: the store belongs to another backbone, or the disk is full.
    """
    dataset = _classes_of(folder.path, how.recipe)
    if not len(dataset.rows("test")):
        raise DataError(f"{folder.path} has no test images, expected some: scores are of test alone")
    if dataset.fold is not None and dataset.group is None and "test" in dataset.carved:
        raise DataError(
            f"{folder.path} has a column 'fold' and none that names test images: drawn ones would lie on "
            "both sides of its folds. Name it 'group', which keeps them whole, or add a column 'split'"
        )
    keys = sample_keys(dataset)
    return _ground(folder, _job(dataset, keys, backbone, how, folder.name), keys)


def live_ground(ground: Ground, backbone: Backbone) -> Ground:
    """The same task, its images decoded for every batch: what begins at pixels has nothing to store.

    Args:
        ground: the task.
        backbone: that gives its input as a tap.
    """
    job = _live(ground.job, ground.keys, backbone)
    made = _ground(ground.folder, job, ground.keys)
    others = {
        name: replace(images, job=_live(images.job, sample_keys(images.job.dataset), backbone))
        for name, images in ground.tests.items()
        if name != "test"
    }
    return replace(made, tests={**made.tests, **others})


def add_test(ground: Ground, path: Path, how: Opening) -> Ground:
    """Another data set to answer for: its test images, or all of it where it has no test split of its own.

    What has the bytes of an image that methods learn from here is left out.

    Args:
        ground: the task that is trained on.
        path: of a data set of the same classes.
        how: as for the task.

    Raises:
        RequestError: another data set of that name is answered for already.
        DataError: its classes are others; names the difference. Or all its images are learned from.
    """
    name = TaskFolder(path).name
    if name in ground.tests:
        what = "the task's own test images" if name == "test" else "another data set"
        raise RequestError(
            f"--also-test {path}: {name!r} is the name of {what}. Give the folder another name"
        )
    dataset, ours = _classes_of(path, how.recipe), ground.job.task.outputs
    lacking = [name for name in ours if name not in dataset.outputs]
    more = [name for name in dataset.outputs if name not in ours]
    if lacking or more:
        difference = _listed("; it lacks", lacking) + _listed("; only it has", more)
        raise DataError(
            f"--also-test {path}: expected the {len(ours)} classes of {ground.name}, got "
            f"{len(dataset.outputs)}{difference}. Give folders of the same classes the same names"
        )
    keys = sample_keys(dataset)
    job = _job(dataset, keys, ground.job.backbone, how, f"{ground.name}-{name}")
    own = len(job.split["test"]) and "test" not in dataset.carved
    rows = job.split["test"] if own else union(list(job.split.values()))
    rows = _unlearned(ground, path, keys, rows)
    numbers = np.array([ours.index(one) for one in dataset.outputs], np.int64)
    images = replace(Images.of(job, keys, rows), classes=numbers)
    return replace(ground, tests={**ground.tests, name: images})


def _unlearned(ground: Ground, path: Path, keys: Sequence[str], rows: Rows) -> Rows:
    """Those whose bytes nobody learns from; a copy has another path."""
    learned = {ground.keys[row].rpartition("@")[2] for row in ground.rows}
    kept = np.array([row for row in rows if keys[row].rpartition("@")[2] not in learned], np.int64)
    dropped = len(rows) - len(kept)
    if not len(kept):
        raise DataError(
            f"--also-test {path}: all of its {dropped:,} images are learned from in {ground.name}, expected "
            "others. Give a data set of other images"
        )
    if dropped:
        ground.job.say(f"{path}: {dropped:,} images are learned from in {ground.name} and left out")
    return kept


def _classes_of(path: Path, recipe: Recipe) -> Dataset:
    dataset = load_dataset(path, **recipe.data_arguments())
    if dataset.task != "classify":
        raise DataError(f"{path} has numbers or labels to learn, expected classes. Type: sidetune fit")
    return dataset


def _job(dataset: Dataset, keys: Sequence[str], backbone: Backbone, how: Opening, name: str) -> Job:
    store = default_store(backbone, how.recipe.features.dtype)
    if how.stores is not None:
        store = how.stores / dataset.name
    part = Part("", how.recipe, dataset, how.out / name)
    (job,) = open_jobs([part], backbone, keys, out=part.out, store=store, quiet=how.quiet)
    return job


def _ground(folder: TaskFolder, job: Job, keys: Sequence[str]) -> Ground:
    on: On = "val" if folder.path.is_dir() and is_vtab(folder.path) else "folds"
    folds = FOLDS
    if job.dataset.group is not None:
        rows = union([job.split["train"], job.split["val"]])
        folds = max(2, min(FOLDS, len(np.unique(job.dataset.group[rows]))))
    choosing = Choosing.build(job, on, 1 if on == "val" else folds, metric=METRIC)
    return Ground(folder, job, keys, choosing, {"test": Images.of(job, keys, job.split["test"])})


def _live(job: Job, keys: Sequence[str], backbone: Backbone) -> Job:
    reading = job.recipe.reading(backbone.frames)
    source = LiveSource(job.dataset, backbone, keys=keys, reading=reading, quiet=job.quiet)
    return replace(job, backbone=backbone, source=source, summary=source.summary())


def _listed(words: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{words} {', '.join(map(repr, names[:NAMED]))}{more}"
