"""Files of every kind that sidetune reads, mutated, and read in a process that may be killed.

A mutated file is read in a child of this process with a bound on its memory and an alarm, so that a hang, a
memory bomb or a crash of the interpreter is seen and counted, not suffered. What a file can do is: be read,
or be refused with a sidetune error. All else is a defect.
"""

import io
import json
import os
import resource
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fleets
from extracting import seal_again
from images import make_folder
from sidetune import Recipe, build_backbone, fit
from sidetune.artifact import Artifact
from sidetune.checkpoint import Epoch, Saved, Track, load_checkpoint, save_checkpoint
from sidetune.data import load_dataset
from sidetune.data.preprocess import Preprocess, load_image
from sidetune.errors import SidetuneError
from sidetune.files import read_json, sha256_file
from sidetune.fleet import Fleet
from sidetune.predict import Predictor
from sidetune.report import write_report
from sidetune.runs import Run, read_skipped
from sidetune.store import Store
from sidetune.tables import print_scores, store_lines
from sidetune.upkeep import describe, verify

SECONDS = 10  # to read one file; more is a hang
GROWTH = 3 * 2**30  # bytes of resident memory that reading one file may take: 179 Mpx with alpha, and copies
ROOM = 8 * 2**30  # bytes of address space beyond what this process has
VALID, REFUSED, CRASHED = 0, 3, 4


@dataclass(frozen=True)
class Target:
    """A file to mutate, and what reads it.

    Args:
        kind: what the count is kept by.
        file: the one that is mutated, below the root.
        read: reads it, and whatever belongs to it, below the root.
        repair: makes the files beside it agree with the mutated one, as who means harm would.
        writes: names of files that reading may write.
    """

    kind: str
    file: str
    read: Callable[[Path], object]
    repair: Callable[[Path], None] | None = None
    writes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of one mutated file: how it ended, what it took, and what is wrong with that."""

    end: str  # valid, refused, crashed, hung, memory
    seconds: float
    growth: int
    detail: str = ""
    written: list[str] = field(default_factory=list)


# the originals


def build(root: Path) -> list[Target]:
    """Write one of each file below a folder; returns what can be mutated."""
    torch.set_num_threads(1)
    photos = make_folder(root / "photos", 3, 18, size=24)
    targets = [*_images(root / "image"), *_tables(root, photos), *_lists(root / "vtab", photos)]
    targets += [*_recipes(root / "recipe"), *_store_and_run(root, photos), _checkpoint(root / "checkpoint")]
    return [
        Target(one.kind, str((root / one.file).relative_to(root)), one.read, one.repair, one.writes)
        for one in targets
    ]


def _images(folder: Path) -> list[Target]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (21, 34, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    more = {"save_all": True, "append_images": [colour.rotate(180)]}
    options: dict[str, tuple[Image.Image, dict]] = {
        "plain.jpg": (colour, {"exif": turned}),
        "progressive.jpg": (colour, {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "plain.png": (colour, {"exif": turned}),
        "deep.png": (Image.fromarray(rng.integers(0, 65536, (21, 34), dtype=np.uint16)), {}),
        "palette.png": (colour.quantize(16), {"transparency": 3}),
        "moving.png": (colour, more),
        "moving.gif": (colour, more),
        "plain.webp": (colour, {"exif": turned}),
        "moving.webp": (colour, more),
        "plain.tif": (colour.convert("L"), {"exif": turned}),
        "packed.tif": (colour, {"compression": "tiff_lzw", **more}),
        "fax.tif": (colour.convert("1"), {"compression": "group4"}),
        "plain.bmp": (colour, {}),
        "plain.ppm": (colour, {}),
        "plain.jp2": (colour, {}),
        "plain.avif": (colour, {}),
    }
    for name, (image, arguments) in options.items():
        image.save(folder / name, **arguments)
    preprocess = Preprocess(size=32)
    return [
        Target("image", f"image/{name}", lambda root, n=name: load_image(root / "image" / n, preprocess))
        for name in options
    ]


def _tables(root: Path, photos: Path) -> list[Target]:
    files = sorted(photos.rglob("*.png"))
    rows = [
        f'"{file}",{file.parent.name},"{i % 2}",{i / 7:.3f},g{i // 2},{i % 3}' for i, file in enumerate(files)
    ]
    text = "\n".join(["path,label,wet,size,group,fold", *rows]) + "\n"
    (root / "classes.csv").write_text(text)
    (root / "numbers.csv").write_bytes(b"\xff\xfe" + text.replace(",", ";").encode("utf-16-le"))

    def classes(root: Path) -> object:
        return load_dataset(root / "classes.csv")

    def numbers(root: Path) -> object:
        load_dataset(root / "numbers.csv", task="multilabel", labels=["wet"])
        return load_dataset(root / "numbers.csv", task="regress", labels=["size", "wet"])

    return [Target("csv", "classes.csv", classes), Target("csv", "numbers.csv", numbers)]


def _lists(folder: Path, photos: Path) -> list[Target]:
    shutil.copytree(photos, folder / "images")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
    lines = [f"{name} {i % 3}\n" for i, name in enumerate(names)]
    parts = {"train800": lines[:8], "val200": lines[8:12], "test": lines[12:], "train800val200": lines[:12]}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text("".join(part))
    (folder / "info.json").write_text(json.dumps({"classes": ["a", "b", "c"], "group": "Natural"}))

    def read(root: Path) -> object:
        return load_dataset(root / "vtab")

    return [
        Target("vtab", f"vtab/{name}", read) for name in (*(f"{part}.txt" for part in parts), "info.json")
    ]


def _recipes(folder: Path) -> list[Target]:
    folder.mkdir()
    fields = Recipe.build({"backbone": {"name": "toy"}}).model_dump(mode="json")
    (folder / "recipe.json").write_text(json.dumps(fields))
    settings = ["side.rank=16", "train.lr=1e-4", "backbone.taps=[block.1, block.2]", "data.labels=[a, b]"]
    (folder / "settings.txt").write_text("\n".join([*settings, "side.pool=cls", "train.epochs=null"]))

    def recipe(root: Path) -> object:
        try:
            value = read_json(root / "recipe" / "recipe.json")
        except (OSError, ValueError) as error:  # who reads it says which file it is
            raise SidetuneError(str(error)) from error
        return Recipe.build(value if isinstance(value, dict) else {"side": value}).hash

    def typed(root: Path) -> object:
        lines = (root / "recipe" / "settings.txt").read_bytes().decode("utf-8", "replace").splitlines()
        return Recipe.build({"backbone": {"name": "toy"}}, lines).hash

    return [Target("recipe", "recipe/recipe.json", recipe), Target("recipe", "recipe/settings.txt", typed)]


def _store_and_run(root: Path, photos: Path) -> list[Target]:
    recipe = Recipe.build({"backbone": {"name": "toy"}, "side": {"name": "losa"}, "train": {"epochs": 2}})
    fit(photos, out=root / "run", recipe=recipe, store=root / "store", quiet=True)
    backbone = build_backbone("toy")
    photo = next(photos.rglob("*.png"))

    def store(root: Path) -> object:
        verify(root / "store")
        list(store_lines([describe(root / "store")]))
        opened = Store.open(root / "store")
        keys = [key for shard in opened.plan.shards for key in shard][:20]
        return opened.final_norm, opened.features(keys), opened.summary(keys), opened.valid(keys)

    def run(root: Path) -> object:
        finished = Run.open(root / "run")
        read_skipped(root / "run")
        with redirect_stdout(io.StringIO()):
            print_scores(finished.metrics)
        write_report(root / "run")
        return Predictor(Artifact.read(root / "run"), backbone).predict([photo])

    def sign(root: Path) -> None:
        """The weights' sha256, as who exchanges them would write it."""
        fields = json.loads((root / "run" / "artifact.json").read_text())
        fields["weights"] = sha256_file(root / "run" / "side.safetensors")
        (root / "run" / "artifact.json").write_text(json.dumps(fields))

    def seal(root: Path) -> None:
        """The seals of a store, likewise, where what was changed is still JSON of some kind."""
        with suppress(ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            seal_again(root / "store")

    def measure(root: Path) -> None:
        """The shard's length, and the seal over it."""
        path = root / "store" / "shards" / "00000.json"
        length = path.with_suffix(".safetensors").stat().st_size
        path.write_text(json.dumps({**json.loads(path.read_text()), "bytes": length}))
        seal(root)

    page = ("run/report.html",)
    parts = ("plan.json", "manifest.json", "norm.safetensors", "shards/00000.json")
    files = ("artifact.json", "metrics.json", "recipe.json", "history.jsonl", "skipped.csv")
    return [
        *(Target("store", f"store/{part}", store) for part in parts),
        Target("store", "store/plan.json", store, seal),
        Target("store", "store/shards/00000.json", store, seal),
        Target("store", "store/shards/00000.safetensors", store),
        Target("store", "store/shards/00000.safetensors", store, measure),
        *(Target("artifact", f"run/{name}", run, writes=page) for name in files),
        Target("artifact", "run/side.safetensors", run, writes=page),
        Target("artifact", "run/side.safetensors", run, sign, page),
    ]


def _checkpoint(folder: Path) -> Target:
    folder.mkdir()
    members = {"one": fleets.member(fleets.recipe_of(epochs=2, batch_size=15))}
    fleet = Fleet(fleets.DATA, fleets.build, 2)
    fleet.add(list(members.values()))
    fleet.train_epoch()
    tracks = {"one": Track([Epoch(0, 0.5, 1e-3, {"accuracy": 0.5}, 1.0)])}
    save_checkpoint(folder / "checkpoint.safetensors", "run", fleet, Saved(tracks))

    def read(root: Path) -> object:
        fleet = Fleet(fleets.DATA, fleets.build, 2)
        saved = load_checkpoint(root / "checkpoint" / "checkpoint.safetensors", "run", fleet, members)
        losses = fleet.train_epoch()
        return [losses, [epoch.to_json() for epoch in saved.tracks["one"].history]]

    return Target("checkpoint", "checkpoint/checkpoint.safetensors", read)


# the mutations

ODD: list[object] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**60, -(2**63), 10**30, 10**400, 1e308, -0.0, 1e-320, 0.5),
    *(
        "",
        "x",
        "../../../etc/passwd",
        "/dev/zero",
        "a\x00b",
        "\ud800",
        "<script>alert(1)</script>",
        "x" * 100_000,
    ),
    *("__import__('os').system('id')", "{{ 7*7 }}", "%s%n", "=1+1", "\x1b[2J", "nan", "1e999"),
    *([], {}, [[]], {"": None}, [None] * 1000, {"a": {"b": {"c": []}}}),
]
TEXTS = [
    *(
        b"NaN",
        b"Infinity",
        b"1e999",
        b"9" * 5000,
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\x00",
        b"\xff\xfe",
    ),
    *(
        b"\xef\xbb\xbf",
        b'"',
        b",",
        b";",
        b"\n",
        b"\r\n",
        b"../",
        b"!!python/object/apply:os.system [id]",
        b"&a [*a]",
    ),
    *(b"x" * 200_000, b"\\ud800", b"-", b"0", b"]", b"}", b"\t", b"=", b"%", b"<b>", b"2001-99-99", b"::"),
]
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**60, 2**63, 2**64 - 1]


def mutate(content: bytes, name: str, rng: np.random.Generator) -> bytes:
    """One to three changes, of the bytes or of what they mean."""
    kinds = {".json": [_json], ".jsonl": [_json], ".safetensors": [_header], ".csv": [_insert, _line, _line]}
    own = kinds.get(Path(name).suffix, [_insert, _line] if name.endswith(".txt") else [])
    choices = own if own and rng.random() < 0.7 else BYTES  # a file that parses is read further
    for _ in range(int(rng.choice([1, 1, 1, 2, 2, 3]))):
        content = choices[rng.integers(len(choices))](content, rng)
    return content


def _at(content: bytes, rng: np.random.Generator) -> int:
    """A place, every second time near the beginning, where headers are."""
    end = len(content) if rng.random() < 0.5 else min(len(content), 200)
    return int(rng.integers(end + 1))


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 9)) if content else 0):
        changed[min(_at(content, rng), len(content) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _number(content: bytes, rng: np.random.Generator) -> bytes:
    value, width = NUMBERS[rng.integers(len(NUMBERS))], int(rng.choice([1, 2, 4, 8]))
    order = "<" if rng.random() < 0.5 else ">"
    packed = struct.pack(f"{order}Q", value)
    packed = packed[:width] if order == "<" else packed[-width:]
    at = _at(content, rng)
    return content[:at] + packed + content[at + width :]


def _range(content: bytes, rng: np.random.Generator) -> bytes:
    at, length = _at(content, rng), int(rng.integers(1, 65))
    fill = [b"\x00" * length, b"\xff" * length, rng.bytes(length)][rng.integers(3)]
    return content[:at] + fill + content[at + length :]


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: _at(content, rng)]


def _insert(content: bytes, rng: np.random.Generator) -> bytes:
    at = _at(content, rng)
    return (
        content[:at]
        + (TEXTS[rng.integers(len(TEXTS))] if rng.random() < 0.7 else rng.bytes(9))
        + content[at:]
    )


def _double(content: bytes, rng: np.random.Generator) -> bytes:
    first, second = sorted((_at(content, rng), _at(content, rng)))
    return content[:second] + content[first:second] * int(rng.integers(1, 4)) + content[second:]


def _remove(content: bytes, rng: np.random.Generator) -> bytes:
    at = _at(content, rng)
    return content[:at] + content[at + int(rng.integers(1, 65)) :]


def _line(content: bytes, rng: np.random.Generator) -> bytes:
    """A line that is removed, doubled, or moved; or a cell that is exchanged."""
    lines = content.split(b"\n")
    one = int(rng.integers(len(lines)))
    if rng.random() < 0.5:
        cells = lines[one].split(b",")
        cells[rng.integers(len(cells))] = TEXTS[rng.integers(len(TEXTS))]
        lines[one] = b",".join(cells)
    else:
        lines.insert(int(rng.integers(len(lines))), lines[one] if rng.random() < 0.5 else lines.pop(one))
    return b"\n".join(lines)


def _json(content: bytes, rng: np.random.Generator) -> bytes:
    """A value of a JSON file, or of one of its lines, exchanged; or a key gone, renamed or doubled."""
    lines = content.splitlines() if content.count(b"\n{") > 0 else [content]
    one = int(rng.integers(len(lines))) if lines else 0
    try:
        value = json.loads(lines[one])
    except (ValueError, IndexError, RecursionError):
        return _insert(content, rng)
    changed = json.dumps(_exchanged(value, rng))
    lines[one] = changed.encode()
    return b"\n".join(lines)


def _exchanged(value: object, rng: np.random.Generator) -> object:
    odd = ODD[rng.integers(len(ODD))]
    holders = [one for one in _holders(value) if one]
    if not holders:
        return odd
    holder = holders[rng.integers(len(holders))]
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = keys[rng.integers(len(keys))]
    what = rng.random()
    inside = _inside(holder[key])
    if inside is not None:
        holder[key] = json.dumps(_exchanged(inside, rng))
    elif what < 0.6:
        holder[key] = odd
    elif what < 0.75:
        del holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}x" if what < 0.9 else "name"] = holder.pop(key)
    else:
        holder.append(holder[key])
    return value


def _inside(value: object) -> object:
    """A checkpoint's state is JSON in JSON; an earlier mutation may have broken it."""
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("{") else None
    except ValueError:
        return None


def _holders(value: object) -> list:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, dict | list) else []) + [x for one in below for x in _holders(one)]


def _header(content: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors header whose JSON is exchanged, its length right or claiming the sky."""
    length = int.from_bytes(content[:8], "little")
    header = _json(content[8 : 8 + length], rng) if length <= len(content) else content[8:]
    header += b" " * (-len(header) % 8)  # as safetensors aligns it
    claimed = len(header) if rng.random() < 0.8 else NUMBERS[rng.integers(len(NUMBERS))]
    return struct.pack("<Q", claimed) + header + content[8 + length :]


BYTES = [_flip, _number, _range, _cut, _insert, _double, _remove]


# reading in a child


def attempt(target: Target, root: Path, content: bytes) -> Outcome:
    """Put content in a target's place, read it in a child process, and put everything back."""
    path = root / target.file
    kept = {
        one: one.read_bytes() for one in path.parent.iterdir() if one.is_file() and one.stat().st_size < 2**25
    }
    before = _listing(root)
    path.write_bytes(content)
    try:
        if target.repair is not None:
            target.repair(root)
        outcome = _in_child(target.read, root)
    finally:
        for one, old in kept.items():
            if not one.exists() or one.read_bytes() != old:
                one.write_bytes(old)
    allowed = {str(root / name) for name in target.writes}
    outcome.written = sorted(name for name in _listing(root) - before if name not in allowed)
    return outcome


def _in_child(read: Callable[[Path], object], root: Path) -> Outcome:
    out, into = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(out)
        _child(read, root, into)
    os.close(into)
    with os.fdopen(out, "rb") as stream:
        growth, _, said = stream.read().decode("utf-8", "replace").partition("\n")
    code, seconds = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - started
    end = {VALID: "valid", REFUSED: "refused", -signal.SIGALRM: "hung"}.get(code, "crashed")
    if int(growth or 0) > GROWTH and end in ("valid", "refused"):
        end = "memory"
    return Outcome(end, seconds, int(growth or 0), said or f"exit {code}")


def _child(read: Callable[[Path], object], root: Path, into: int) -> None:
    """Read, say how it went, and go without any clearing up."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    room = _status("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1), os.dup2(nothing, 2)  # libtiff prints
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    resident, code, text = _status("VmRSS"), VALID, ""
    try:
        read(root)
    except SidetuneError as error:
        code, text = REFUSED, f"{type(error).__name__}: {error}"
    except BaseException:
        code, text = CRASHED, traceback.format_exc()
    os.write(into, f"{_status('VmHWM') - resident}\n{text[-50_000:]}".encode("utf-8", "replace"))
    os._exit(code)


def _listing(root: Path) -> set[str]:
    return {str(path) for path in root.parent.rglob("*") if not path.is_symlink() and path.is_file()}


def _status(field: str) -> int:
    """Bytes that the system counts for this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024
