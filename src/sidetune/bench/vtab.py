"""VTAB-1K (Zhai et al., 2019, arXiv 1910.04867): its 19 tasks, what of them is here, and what is in print.

A folder counts as one of the 19 where it has that task's classes and its number of test images. Any other
folder in VTAB's layout is taken along, with means apart from theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sidetune.backbones.base import Identity
from sidetune.bench.accuracy.claims import LEAST_SEEDS, Outcome
from sidetune.bench.accuracy.table import Report, means
from sidetune.bench.accuracy.tasks import TaskFolder, find_tasks
from sidetune.data.vtab import LISTS, UNION, is_vtab, read_list
from sidetune.errors import DataError

SUITE, OTHERS = "VTAB-1K", "others"


@dataclass(frozen=True)
class VtabTask:
    """One of the 19.

    Args:
        name: of its folder, as published.
        group: that it is averaged in.
        classes: K.
        test: images of the full test split.
        source: the data set that it is made of.
    """

    name: str
    group: str
    classes: int
    test: int
    source: str


TASKS = (
    VtabTask("cifar", "Natural", 100, 10_000, "CIFAR-100"),
    VtabTask("caltech101", "Natural", 102, 6_084, "Caltech-101"),
    VtabTask("dtd", "Natural", 47, 1_880, "Describable Textures (DTD)"),
    VtabTask("oxford_flowers102", "Natural", 102, 6_149, "Oxford Flowers-102"),
    VtabTask("oxford_iiit_pet", "Natural", 37, 3_669, "Oxford-IIIT Pets"),
    VtabTask("svhn", "Natural", 10, 26_032, "Street View House Numbers, cropped"),
    VtabTask("sun397", "Natural", 397, 21_750, "SUN397"),
    VtabTask("patch_camelyon", "Specialized", 2, 32_768, "PatchCamelyon"),
    VtabTask("eurosat", "Specialized", 10, 5_400, "EuroSAT, RGB"),
    VtabTask("resisc45", "Specialized", 45, 6_300, "NWPU-RESISC45"),
    VtabTask("diabetic_retinopathy", "Specialized", 5, 42_670, "Kaggle Diabetic Retinopathy Detection"),
    VtabTask("clevr_count", "Structured", 8, 15_000, "CLEVR, number of objects"),
    VtabTask("clevr_dist", "Structured", 6, 15_000, "CLEVR, distance of the closest object"),
    VtabTask("dmlab", "Structured", 6, 22_735, "DeepMind Lab frames"),
    VtabTask("kitti", "Structured", 4, 711, "KITTI, distance of the closest vehicle"),
    VtabTask("dsprites_loc", "Structured", 16, 73_728, "dSprites, horizontal position"),
    VtabTask("dsprites_ori", "Structured", 16, 73_728, "dSprites, orientation"),
    VtabTask("smallnorb_azi", "Structured", 18, 12_150, "small NORB, azimuth"),
    VtabTask("smallnorb_ele", "Structured", 9, 12_150, "small NORB, elevation"),
)


@dataclass(frozen=True)
class Published:
    """A row in print, ViT-B/16 of ImageNet-21k.

    Args:
        method: as its paper calls it.
        groups: mean over the three groups, percent.
        tasks: mean over the 19 tasks, percent; None where it is not in print.
        how: whose numbers they are.
    """

    method: str
    groups: float
    tasks: float | None
    how: str = "its own paper's protocol"


TUNED = "tuned on val, last epoch, one seed, by one team"
PUBLISHED = (
    Published("LoSA", 78.4, None),
    Published("HST", 78.1, 76.0),
    Published("GPS", 77.5, 75.2),
    Published("DTL", 76.8, 74.6),
    Published("Hydra", 76.5, 74.2),
    Published("LAST", 76.4, 74.15),
    Published("RepAdapter", 76.1, 73.8),
    Published("SSF", 75.7, 73.1),
    Published("FacT-TK", 75.6, 73.2),
    Published("AdaptFormer", 74.8, 72.3),
    Published("LoRA", 74.6, 72.3),
    Published("LST", 74.3, 71.7),
    Published("VPT-deep", 72.0, 69.4),
    Published("full", 69.0, 65.6),
    Published("BitFit", 65.2, 62.1),
    Published("linear", 57.6, 52.9),
    Published("Convpass", 76.4, 74.2, TUNED),
    Published("AdaptFormer", 76.0, 73.7, TUNED),
    Published("LoRA", 75.2, 72.9, TUNED),
    Published("BitFit", 74.5, 72.2, TUNED),
    Published("VPT-deep", 73.4, 71.3, TUNED),
    Published("linear", 60.5, 55.9, TUNED),
)


@dataclass(frozen=True)
class Survey:
    """What is in a folder.

    Args:
        tasks: to be run: those of the 19, then others.
        missing: of the 19.
        unlike: folder's name -> how it differs from the task of that name.
    """

    tasks: tuple[TaskFolder, ...]
    missing: tuple[VtabTask, ...]
    unlike: dict[str, str]

    def lines(self) -> Iterator[str]:
        """What is here, what is missing and where it comes from."""
        here = sum(task.suite == SUITE for task in self.tasks)
        yield f"{here} of the 19 tasks of VTAB-1K are here, and {len(self.tasks) - here} others"
        if self.unlike:
            yield "these have the name of a published task and are another:"
        yield from (f"  {name}: {how}" for name, how in self.unlike.items())
        if self.missing:
            yield "missing:"
            yield f"  {'folder':<21}{'group':<13}{'classes':>7}{'test':>8}  made of"
            for task in self.missing:
                shown = f"  {task.name:<21}{task.group:<13}{task.classes:>7}{task.test:>8,}  {task.source}"
                yield shown if len(shown) <= 80 else shown[:78] + ".."
            yield f"Each folder has {', '.join((UNION, *LISTS.values()))}"
        yield ""


def survey(data: Path, names: Sequence[str] | None = None) -> Survey:
    """Which of the 19 tasks a folder holds, and which other tasks.

    Args:
        data: a folder of task folders.
        names: of those to be run; None: all.

    Raises:
        DataError: there is no task, or a list of one cannot be read.
        RequestError: a task that is asked for is not there.
    """
    found = find_tasks(data, names)
    if not all(is_vtab(task.path) for task in found):
        known = ", ".join(task.name for task in TASKS)
        raise DataError(
            f"{data} has no folder with {UNION}; expected some of {known}. Type: sidetune bench accuracy "
            f"{data}, which takes any data set"
        )
    published = {task.name: task for task in TASKS}
    tasks, unlike = [], {}
    for folder in found:
        known_task = published.get(folder.name)
        how = None if known_task is None else _difference(folder.path, known_task)
        if known_task is not None and how is None:
            tasks.append(replace(folder, group=known_task.group, suite=SUITE))
            continue
        if how is not None:
            unlike[folder.name] = how
        tasks.append(replace(folder, suite=OTHERS))
    ours = {task.name for task in tasks if task.suite == SUITE}
    order = [task.name for task in TASKS]
    tasks.sort(key=lambda task: (task.suite != SUITE, order.index(task.name) if task.name in ours else 0))
    missing = tuple(task for task in TASKS if task.name not in ours)
    return Survey(tuple(tasks), missing, unlike)


def _difference(path: Path, task: VtabTask) -> str | None:
    """How a folder differs from the published task; None where it does not."""
    lists = {split: read_list(path, name) for split, name in LISTS.items()}
    classes = 1 + max(line.label for lines in lists.values() for line in lines)
    parts = [
        f"{found:,} {what} and not {expected:,}"
        for what, found, expected in (
            ("classes", classes, task.classes),
            ("test images", len(lists["test"]), task.test),
        )
        if found != expected
    ]
    return ", ".join(parts) or None


def checkpoint(identity: Identity) -> str:
    """What a row must say: which checkpoint, and which normalisation.

    Two checkpoints are in print as "ViT-B/16 IN-21k", the original and AugReg's; both were trained with
    mean = std = 0.5.

    Args:
        identity: of the backbone.
    """
    name = identity.architecture
    known = {"augreg_in21k": "ViT-B/16 IN-21k AugReg", "orig_in21k": "ViT-B/16 IN-21k original"}
    tag = name.rpartition(".")[2]
    called = known.get(tag, name) if "vit_base_patch16" in name else name
    mean, std = (identity.preprocess.get(part) for part in ("mean", "std"))
    return f"{called}, {_same('mean', mean)}, {_same('std', std)}"


def _same(name: str, values: Any) -> str:  # noqa: ANN401 - of a fingerprint
    numbers = [f"{value:g}" for value in values or ()]
    return f"{name} {numbers[0] if len(set(numbers)) == 1 else '/'.join(numbers)}"


def published_lines(report: Report) -> Iterator[str]:
    """Rows in print beside ours, which stand there only where all 19 tasks were scored.

    Args:
        report: of a run.
    """
    backbone = report.environment["setting"]["backbone"]
    yield f"{'VTAB-1K, mean over':<20}{'groups':>8}{'tasks':>8}"
    ours = own_rows(report.outcomes)
    for method, (groups, tasks, seeds) in ours.items():
        few = "" if seeds >= LEAST_SEEDS else f", {seeds} seed(s), the protocol asks for {LEAST_SEEDS}"
        yield f"{method[:19]:<20}{100 * groups:>8.1f}{100 * tasks:>8.1f}  here{few}"
    if not ours:
        yield "here: no row, for that takes test scores of all 19 tasks"
    yield f"here: {checkpoint(Identity.from_json(backbone))}"
    yield "in print, ViT-B/16 IN-21k (two checkpoints, mean 0.5, std 0.5):"
    for row in PUBLISHED:
        shown = "?" if row.tasks is None else f"{row.tasks:.1f}"
        yield f"{row.method:<20}{row.groups:>8.1f}{shown:>8}  {row.how}"
    yield ""


def to_json(found: Survey) -> dict[str, Any]:
    """What is missing and what is in print, as plain JSON values."""
    return {
        "missing": [asdict(task) for task in found.missing],
        "unlike": found.unlike,
        "published": [asdict(row) for row in PUBLISHED],
    }


def own_rows(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, float, int]]:
    """Method -> both means and the fewest seeds, of those that have test scores of all 19 tasks."""
    rows = {}
    for method in dict.fromkeys(one.method for one in outcomes):
        mine = [one for one in outcomes if one.method == method and one.suite == SUITE and one.scores]
        if {one.task for one in mine} == {task.name for task in TASKS}:
            groups, tasks = means(mine, method)
            assert groups is not None and tasks is not None
            seeds = min(one.wanted if one.solved else len(one.seeds) for one in mine)
            rows[method] = (groups, tasks, seeds)
    return rows
