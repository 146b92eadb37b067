"""The blocks of a page, and a folder in which they run as a reader would run them.

What is changed on the way is written in CONTRIBUTING.md, under "Blocks of the documents run".
"""

import contextlib
import csv
import io
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from clips import make_clips
from images import make_folder
from sidetune import cli
from tiny_vits import hub_folder
from vtab_tasks import make_suite

NETWORK = ("pip", "git", "make")  # their lines need a network, or are a whole day's work
COMMANDS = ("sidetune", "export", *NETWORK)  # what an indented block of commands begins with
TOY_SIZE = "32"


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Args:
        line: where it starts.
        language: ``sh`` or ``python``.
        text: without its indentation.
        not_run: why it does not run; empty where it does.
    """

    line: int
    language: str
    text: str
    not_run: str = ""


def blocks(page: str) -> Iterator[Block]:
    """Every block that is to be run, fenced or indented. Fences of other languages are no commands."""
    fence = re.compile(
        r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$"
        r"|(?:(?<=\n\n)|\A)(?P<plain>(?: {4}[^\n]*\S[^\n]*\n)+)",
        re.M | re.S,
    )
    for found in fence.finditer(page):
        line = page[: found.start()].count("\n") + 1
        if found["plain"]:
            if found["plain"].split()[0] in COMMANDS:
                yield Block(line, "sh", textwrap.dedent(found["plain"]))
        elif found["language"] in ("sh", "python"):
            yield Block(line, found["language"], textwrap.dedent(found["text"]), found["why"] or "")
        else:
            assert found["language"] == "text", f"line {line}: say sh, python or text behind the fence"


def needs(page: str) -> list[str]:
    """The fixtures that the page names in its first line."""
    found = re.match(r"<!-- needs: ([\w, ]+) -->\n", page)
    return found[1].split(", ") if found else []


def lines(text: str) -> Iterator[str]:
    """Command lines: joined where they end in a backslash, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def with_toy(arguments: list[str]) -> list[str]:
    """The command on the toy backbone at its own size, unless it names local weights; two epochs."""
    if arguments[0] not in ("fit", "extract", "sweep"):
        return arguments
    if arguments[0] == "sweep" and "--epochs" not in arguments:
        arguments += ["--epochs", "2"]
    if arguments[0] == "fit" and not any(word.startswith("train.epochs=") for word in arguments):
        arguments += ["--set", "train.epochs=2"]
    if "--weights" in arguments:
        return arguments
    for name, value in (("--backbone", "toy"), ("--size", TOY_SIZE)):
        if name in arguments:
            arguments[arguments.index(name) + 1] = value
        elif name == "--backbone":
            arguments += [name, value]
    return arguments


class Page:
    """A page's blocks in the current folder, in order, sharing files and Python names.

    Args:
        monkeypatch: sets what `export` sets.
        toy: run on the toy backbone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, toy: bool = True) -> None:
        self.monkeypatch, self.toy, self.names = monkeypatch, toy, {"__name__": "page"}
        self.said: list[str] = []

    def run(self, text: str, name: str) -> int:
        """Run every block of a page; how many ran."""
        ran = [block for block in blocks(text) if not block.not_run]
        for block in ran:
            try:
                self._block(block)
            except (Exception, SystemExit) as error:
                pytest.fail(f"{name}, line {block.line}: {type(error).__name__}: {error}\n{block.text}")
        return len(ran)

    def _block(self, block: Block) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            if block.language == "python":
                exec(compile(block.text, f"line {block.line}", "exec"), self.names)
            else:
                for line in lines(block.text):
                    self._line(line)
        self.said.append(said.getvalue())

    def _line(self, line: str) -> None:
        program, *arguments = shlex.split(line, comments=True)
        if program in NETWORK:
            return
        if program == "export":
            name, _, value = arguments[0].partition("=")
            self.monkeypatch.setenv(name, value)
        elif program == "sidetune":
            self._sidetune(arguments)
        else:
            subprocess.run(["bash", "-ec", line], check=True)

    def _sidetune(self, arguments: list[str]) -> None:
        arguments = [
            one
            for word in arguments
            for one in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
        ]
        self.monkeypatch.setattr(sys, "argv", ["sidetune", *(with_toy(arguments) if self.toy else arguments)])
        with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, f"exit {end.value.code}: {said.getvalue()}"


def photos(folder: Path, images: Path) -> None:
    """60 images of 3 classes in photos/ and more_photos/, 18 others in other_photos/, and new.jpg."""
    shutil.copytree(images, folder / "photos")
    shutil.copytree(images, folder / "more_photos")
    make_folder(folder / "other_photos", 3, 18, seed=1)
    Image.open(images / "class0" / "0000.png").save(folder / "new.jpg")


def clips(folder: Path, images: Path) -> None:
    """24 clips of 2 classes in clips/, clips.csv with their folds, and new.mp4."""
    make_clips(folder / "clips")
    files = sorted((folder / "clips").glob("*/*"))
    lines = [f"{file.relative_to(folder)},{file.parent.name},{n % 3}" for n, file in enumerate(files)]
    (folder / "clips.csv").write_text("\n".join(["path,label,fold", *lines]) + "\n")
    shutil.copy(folder / "clips/left/02.mp4", folder / "new.mp4")


def leaves(folder: Path, images: Path) -> None:
    """leaves/CLASS/DAY_PLANT_NUMBER.jpg, 57 images of 19 plants, and 3 more in new/."""
    (folder / "new").mkdir()
    for kind, name in enumerate(("healthy", "mildew", "rust")):
        (folder / "leaves" / name).mkdir(parents=True)
        *shown, last = sorted((images / f"class{kind}").iterdir())
        for number, file in enumerate(shown):
            plant = f"2026-05-03_plant{kind}{number // 3}_{number:04d}.jpg"
            Image.open(file).save(folder / "leaves" / name / plant)
        Image.open(last).save(folder / "new" / f"{kind}.jpg")


def eight(folder: Path, images: Path) -> None:
    """parts.csv: 48 images, eight yes-or-no columns with gaps, two of numbers, two of classes."""
    names = ["scratch", "dent", "rust", "crack", "stain", "bubble", "chip", "burn"]
    files = sorted(images.rglob("*.png"))[:48]
    (folder / "parts").mkdir()
    with (folder / "parts.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path", *names, "length", "width", "kind", "finish"])
        for number, file in enumerate(files):
            path = f"parts/{number:04d}.jpg"
            Image.open(file).save(folder / path)
            cells: list[object] = [int((number * (k + 2) + k) % 11 < 4) for k in range(len(names))]
            cells[number % len(names)] = ""
            finish = ["matt", "gloss", ""][number // 2 % 3]
            table.writerow([path, *cells, number / 7, number % 5, ["gear", "bolt"][number % 2], finish])


def scans(folder: Path, images: Path) -> None:
    """scans.csv: 59 images of 3 classes with their folds, and new.jpg."""
    (folder / "scans").mkdir()
    with (folder / "scans.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path", "label", "fold"])
        *shown, last = sorted(images.rglob("*.png"))
        for number, file in enumerate(shown):
            path = f"scans/{number:04d}.jpg"
            Image.open(file).save(folder / path)
            table.writerow([path, file.parent.name, number % 5])
    Image.open(last).save(folder / "new.jpg")


def weights(folder: Path, images: Path) -> None:
    """weights/: a cut-down ViT-S/16 of 32 px in the hub's layout, with random weights."""
    hub_folder(folder / "weights", "vit_small_patch16_224")


def tasks(folder: Path, images: Path) -> None:
    """tasks/: two small tasks in VTAB's layout."""
    make_suite(folder / "tasks")


FIXTURES: dict[str, Callable[[Path, Path], None]] = {
    "photos": photos,
    "clips": clips,
    "leaves": leaves,
    "eight": eight,
    "scans": scans,
    "weights": weights,
    "tasks": tasks,
}


def real_leaves(folder: Path, elpv: Path) -> None:
    """2,024 photographs of solar cells as the tutorial's leaves; a plant is 64 neighbouring cells."""
    for name in ("leaves/healthy", "leaves/rust", "new"):
        (folder / name).mkdir(parents=True)
    count = 0
    for split in ("train800val200", "test"):
        for line in (elpv / f"{split}.txt").read_text().splitlines():
            path, label = line.split()
            name = "healthy" if label == "0" else "rust"
            number = int(Path(path).stem)
            photo = f"2026-05-03_{split}{number // 64}_{number:04d}.jpg"
            (folder / "leaves" / name / photo).symlink_to(elpv / path)
            count += 1
            if count % 500 == 0:
                (folder / "new" / photo).symlink_to(elpv / path)
