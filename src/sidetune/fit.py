"""`fit`: from images to a run folder. Data -> backbone -> features -> probes -> side -> scores.

    RUN/recipe.json        what was asked for, its hash, and fingerprints of data and backbone
    RUN/skipped.csv        images that could not be read, and why
    RUN/metrics.json       scores with intervals of every method, cost, environment
    RUN/findings.json      near-duplicates across splits, suspect labels, mistakes, with thumbnails
    RUN/history.jsonl      one line an epoch
    RUN/predictions.csv    validation and test samples, one line each
    RUN/side.safetensors, artifact.json    what `load` needs; artifact.json comes last
    RUN/report.html        all of it on one page

The same command on a finished run prints its result; on an interrupted one it resumes, from
RUN/checkpoint.safetensors if training had come that far. Several class columns of a table are a run each,
see `sidetune.columns`, of one pass over the features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidetune.artifact import find_device
from sidetune.backbones.base import Backbone
from sidetune.columns import ColumnsRun, folder_names, write_columns, write_links
from sidetune.data import Dataset, load_datasets
from sidetune.data.folds import own_folds, shared_folds
from sidetune.errors import RequestError
from sidetune.extract import require_readable, sample_keys
from sidetune.files import locked
from sidetune.job import Job, Work
from sidetune.leaks import Leaks
from sidetune.memory import PeakMemory
from sidetune.methods import Row, fit_methods, score
from sidetune.opening import Part, look_for_leaks, open_jobs, reads, ready_backbone, refuse_baseline
from sidetune.outcome import write_job
from sidetune.recipe import Recipe
from sidetune.report import write_report
from sidetune.runs import Run, begin_run, default_store, is_finished, read_skipped, write_skipped


def fit(  # noqa: PLR0913 - what, where, how; each has its option on the command line
    data: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    backbone: Backbone | None = None,
    store: str | Path | None = None,
    device: str = "auto",
    leak_check: bool = True,
    strict: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a side network on images and write a run folder.

    Args:
        data: a folder of classes, a VTAB folder, or a CSV; see `sidetune.data.load_dataset`.
        out: the run folder; made, resumed, or found finished.
        recipe: everything that decides the result; None: `Recipe()`, LoSA on the demo backbone.
        backbone: your own, in place of the one that the recipe names. `load` will ask for it again.
        store: where features are kept; None: ``$SIDETUNE_STORES`` or ./.sidetune/stores.
        device: ``auto`` is the GPU where there is one.
        leak_check: look for validation and test images with a near-duplicate in training, and name them.
        strict: an image that cannot be read is an error; RUN/skipped.csv is written first, the store is kept.
        quiet: no progress.

    Returns:
        The finished run.

    Raises:
        RequestError: data, recipe, backbone, device or folders are not what they should be; or `strict`, and
            images cannot be read.
        StoreError: the store belongs to another backbone, or the disk is full.
        ArtifactError: the run folder holds another run.
        DivergedError: training diverged.
    """
    recipe = Recipe() if recipe is None else recipe
    if recipe.data.columns:
        raise RequestError(
            f"got {len(recipe.data.columns)} class columns, {', '.join(recipe.data.columns)}: a run each. "
            "Type, in Python: sidetune.fit_columns(..), with the same arguments"
        )
    how = _How(store, device, leak_check, strict, quiet)
    _fit(Path(data), Path(out), recipe, backbone, how)
    return Run.open(Path(out))


def fit_columns(  # noqa: PLR0913 - as fit
    data: str | Path,
    *,
    out: str | Path,
    recipe: Recipe,
    backbone: Backbone | None = None,
    store: str | Path | None = None,
    device: str = "auto",
    leak_check: bool = True,
    strict: bool = False,
    quiet: bool = False,
) -> ColumnsRun:
    """Train a network a class column of a table, all in one pass over the features.

    Each column has a run folder of its own in `out`, with its own classes and scores. An image without a
    class in a column takes no part in that column's run. Splits, folds, the scale of the taps and the order
    of the images are those of all columns.

    Args:
        data: a CSV.
        out: the folder of all runs; made, resumed, or found finished.
        recipe: of all; ``data.labels`` names the columns, two or more, of the task ``classify``.
        backbone: see `fit`.
        store: see `fit`.
        device: see `fit`.
        leak_check: see `fit`.
        strict: see `fit`.
        quiet: no progress.

    Returns:
        The finished runs.

    Raises:
        SidetuneError: as `fit`; errors that are about one column name it.
    """
    if not recipe.data.columns:
        raise RequestError(
            f"got the task {recipe.data.task} and the labels {recipe.data.labels}; expected classify with "
            "two columns or more. Type, in Python: sidetune.fit(..), with the same arguments"
        )
    how = _How(store, device, leak_check, strict, quiet)
    _fit(Path(data), Path(out), recipe, backbone, how)
    return ColumnsRun.open(Path(out))


@dataclass(frozen=True)
class _How:
    """What does not decide the result; see `fit`."""

    store: str | Path | None
    device: str
    leak_check: bool
    strict: bool
    quiet: bool


def _fit(data: Path, out: Path, recipe: Recipe, backbone: Backbone | None, how: _How) -> None:
    refuse_baseline(recipe)
    place = find_device(how.device)
    if how.store is not None:
        check_store(recipe, Path(how.store), out)
    recipe, datasets = _with_own_folds(recipe, data)
    recipe, backbone = ready_backbone(recipe, backbone, place)
    _check_members(recipe, datasets, backbone)
    store = default_store(backbone, recipe.features.dtype) if how.store is None else Path(how.store)
    check_apart(store, out)
    keys = sample_keys(datasets[0])
    request = _Request(out, recipe, _parts(recipe, datasets, out), keys, backbone)
    if is_finished(out, *request.asked) and (out / "report.html").exists():
        _check_strict(out, how.strict, recipe.sample)
        return
    with locked(out):
        if not begin_run(out, *request.asked):
            _work(request, store, how)
        else:  # another process finished it while this one waited, or it was killed at its very end
            _check_strict(out, how.strict, recipe.sample)
        if not (out / "report.html").exists():
            _write_end(request)


def _with_own_folds(recipe: Recipe, data: Path) -> tuple[Recipe, tuple[Dataset, ...]]:
    """The data; and where folds are asked for that they have of their own, a recipe of these.

    Such folds hold out every sample once. Who has drawn them has said what belongs together, and a test
    split that is drawn across them would tear it: there is none but what the data name.
    """
    asked = recipe.fleet.folds
    if asked is not None and data.is_file():  # a folder has none
        nothing = {"val_fraction": 0.0, "test_fraction": 0.0, "to_train": False}
        whole = load_datasets(data, **recipe.data_arguments() | nothing)
        own = own_folds(_by_column(recipe, whole), must=asked == "column")
        if own and asked in ("column", own):
            data_of, fleet = recipe.data, recipe.fleet.model_copy(update={"folds": "column"})
            if not (whole[0].split == "test").any():
                data_of = data_of.model_copy(update={"test_fraction": 0.0})
            recipe = recipe.model_copy(update={"data": data_of, "fleet": fleet})
    return recipe, load_datasets(data, **recipe.data_arguments())


@dataclass(frozen=True)
class _Request:
    """What was asked for, read and checked.

    Args:
        out: the folder of it all.
        recipe: of it all.
        parts: the runs.
        keys: of all images.
        backbone: on its device.
    """

    out: Path
    recipe: Recipe
    parts: tuple[Part, ...]
    keys: tuple[str, ...]
    backbone: Backbone

    @property
    def asked(self) -> tuple[Recipe, str, str]:
        """What the folder of it all is known by."""
        data = [self.fingerprint(part) for part in self.parts]
        whole = data[0] if len(data) == 1 else hashlib.sha256("\n".join(data).encode()).hexdigest()
        return self.recipe, whole, self.backbone.identity.digest

    def fingerprint(self, part: Part) -> str:
        """Of the data of a part."""
        return part.dataset.fingerprint(self.keys)


def _check_members(recipe: Recipe, datasets: Sequence[Dataset], backbone: Backbone) -> None:
    """A side, a member or folds that cannot be are refused before an image is read."""
    reads(recipe, backbone, max(len(dataset.outputs) for dataset in datasets))
    if recipe.fleet.folds is not None:
        every = np.ones(len(datasets[0]), dtype=np.bool_)
        of_columns = _by_column(recipe, datasets)
        shared_folds(of_columns, every, recipe.fleet.folds, seed=recipe.data.split_seed)


def _by_column(recipe: Recipe, datasets: Sequence[Dataset]) -> dict[str, Dataset]:
    """The label column of each; of one alone no name."""
    return dict(zip(recipe.data.columns or ("",), datasets, strict=True))


def _parts(recipe: Recipe, datasets: Sequence[Dataset], out: Path) -> tuple[Part, ...]:
    """The runs that a recipe asks for. The recipe of a column alone gives the rows and splits of this one."""
    columns = recipe.data.columns
    if not columns:
        return (Part("", recipe, datasets[0], out),)
    split_by = columns[0] if recipe.data.split_by is None else recipe.data.split_by
    drawn = bool(datasets[0].carved) or recipe.fleet.folds not in (None, "column")
    parts = []
    for column, folder, dataset in zip(columns, folder_names(columns), datasets, strict=True):
        own = {"labels": (column,), "split_by": split_by if drawn and column != split_by else None}
        one = recipe.model_copy(update={"data": recipe.data.model_copy(update=own)})
        parts.append(Part(column, one, dataset, out / folder))
    return tuple(parts)


def _work(request: _Request, store: Path, how: _How) -> None:
    """From features to run folders."""
    with PeakMemory() as memory:
        jobs = open_jobs(
            request.parts, request.backbone, request.keys, out=request.out, store=store, quiet=how.quiet
        )
        _check_strict(request.out, how.strict, request.recipe.sample)
        work = Work(jobs, request.recipe, request.out)
        leaks = look_for_leaks(work, request.keys) if how.leak_check else None
        rows: dict[Path, list[Row]] = {job.out: [] for job in jobs}
        for job, fitted in fit_methods(work):
            rows[job.out].append(score(job, fitted))
    for at, (job, part) in enumerate(zip(jobs, request.parts, strict=True)):
        found = None if leaks is None else leaks[at]
        _write(request, job, part, rows[job.out], found, memory.peak)
    if request.recipe.data.columns:
        write_columns(request.out, {part.column: part.out for part in request.parts})
    _write_end(request)


def _write(
    request: _Request, job: Job, part: Part, rows: Sequence[Row], leaks: Leaks | None, peak_memory: int
) -> None:
    """One run. That of a column may be finished already, where a process was killed among the columns."""
    fingerprint = request.fingerprint(part)
    if part.column:
        asked = (part.recipe, fingerprint, request.backbone.identity.digest)
        if begin_run(part.out, *asked) and (part.out / "report.html").exists():
            return
        write_skipped(part.out, part.dataset, job.skipped)
    write_job(job, rows, leaks, fingerprint, peak_memory)
    if part.column:
        write_report(part.out)


def _write_end(request: _Request) -> None:
    """What comes after the file that says that it is complete."""
    (request.out / "checkpoint.safetensors").unlink(missing_ok=True)
    if request.recipe.data.columns:
        write_links(request.out)
    else:
        write_report(request.out)


def _check_strict(out: Path, strict: bool, sample: str) -> None:
    if strict:
        require_readable(read_skipped(out), f"{out / 'skipped.csv'}", sample=sample)


def check_store(recipe: Recipe, store: Path, out: Path) -> None:
    """Refuse a store that is a file, lies in the run's folder, or is given to a run that stores nothing.

    Raises:
        RequestError: says which.
    """
    if recipe.features.mode == "live":
        raise RequestError(f"got --store {store} and --live, which stores nothing. Type one of the two")
    if store.exists() and not store.is_dir():
        raise RequestError(f"{store} is a file, expected a store's folder. Type: --store with a new folder")
    check_apart(store, out)


def check_apart(store: Path, out: Path) -> None:
    """Refuse a store inside the run's folder.

    Raises:
        RequestError: it is.
    """
    if store.resolve().is_relative_to(out.resolve()):
        raise RequestError(
            f"features would be kept in {store} and the run in {out}; expected a store outside the run's "
            "folder, because other runs read it, too. Type: --store or --out with another folder"
        )
