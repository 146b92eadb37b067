"""Where tasks are found: a folder of VTAB folders, or one data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidetune.data.vtab import is_vtab
from sidetune.errors import DataError, RequestError, nearest, nearest_path
from sidetune.files import read_json


@dataclass(frozen=True)
class TaskFolder:
    """A task on disk.

    Args:
        path: of its folder or table.
        group: that it is averaged in; nothing: in none.
        suite: whose groups are averaged together; means of two suites stand apart.
    """

    path: Path
    group: str = ""
    suite: str = ""

    @property
    def name(self) -> str:
        """The folder's name, or the table's without its ending."""
        return self.path.resolve().stem if self.path.suffix == ".csv" else self.path.resolve().name


def find_tasks(data: Path, names: Sequence[str] | None = None) -> tuple[TaskFolder, ...]:
    """The tasks of a folder, by name; a data set itself is one task.

    Args:
        data: a folder of VTAB folders, or a data set as `fit` takes it.
        names: of those that are asked for; None: all.

    Raises:
        DataError: there is nothing there.
        RequestError: a task that is asked for is not there.
    """
    if not data.exists():
        raise DataError(f"{data}: nothing there.{nearest_path(data)} Type: sidetune bench accuracy FOLDER")
    inside = sorted(path for path in data.iterdir() if is_vtab(path)) if data.is_dir() else []
    if is_vtab(data) or not inside:
        inside = [data]
    found = {task.name: task for task in (TaskFolder(path, group_of(path)) for path in inside)}
    if names is None:
        return tuple(found.values())
    for name in names:
        if name not in found:
            raise RequestError(f"--tasks: {data} has no task {name!r}.{nearest(name, found)}")
    return tuple(found[name] for name in dict.fromkeys(names))


def group_of(path: Path) -> str:
    """``group`` in a task's ``info.json``; nothing where there is none."""
    try:
        info = read_json(path / "info.json") if (path / "info.json").is_file() else {}
    except (OSError, ValueError):
        return ""  # reading the data set says what is wrong with it
    group = info.get("group", "") if isinstance(info, dict) else ""
    return group if isinstance(group, str) else ""
