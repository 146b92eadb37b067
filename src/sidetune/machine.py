"""What `sidetune doctor` says of the machine: cores, memory, GPU, disk, image formats, videos."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, features
from PIL import __version__ as pillow_version

from sidetune.data.decoders import decoding
from sidetune.doctor import Check
from sidetune.errors import SidetuneError
from sidetune.extract import disk_room
from sidetune.figures import size
from sidetune.store import stores_root

LITTLE_MEMORY = 4 * 2**30  # a ViT-S, its micro-batch and Python itself stay below
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP", "PPM", "JPEG2000")
NEEDED_FORMATS = ("JPEG", "PNG")
CGROUP = Path("/sys/fs/cgroup")


def machine_checks() -> Iterator[Check]:
    """Cores, memory, GPU, image formats, what decodes videos, disk."""
    yield _cores()
    yield _memory()
    yield _gpu()
    yield _formats()
    yield _videos()
    yield _disk()
    yield _writable()


def _cores() -> Check:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    quota = cpu_quota()
    threads = torch.get_num_threads()
    found = f"{usable} of {count} usable" + ("" if quota is None else f", {quota:g} by the control group")
    facts = {"cores": count, "usable": usable, "quota": quota, "threads": threads}
    return Check("machine", "cores", "ok", f"{found}; threads of PyTorch: {threads}", facts=facts)


def cpu_quota(root: Path = CGROUP) -> float | None:
    """Cores that the process's control group may use; None where there is no limit."""
    limits = []
    for folder in _control_groups(root):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.strip().isdecimal():
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path = CGROUP) -> tuple[int, int] | None:
    """(bytes, bytes in use) of the process's tightest control group; None where there is no limit."""
    limits = []
    for folder in _control_groups(root):
        for most, now in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _read(folder / most), _read(folder / now)
            if limit.isdecimal() and used.isdecimal():
                limits.append((int(limit), int(used)))
    return min(limits, default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """The process's own group and those above it. A container sees its own as the root."""
    yield from (root, root / "memory")
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, names, path = line.split(":", 2)
        top = root if number == "0" else root / "memory"
        if number == "0" or "memory" in names.split(","):
            parts = Path(path.lstrip("/")).parts
            yield from (top.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1))


def _read(path: Path) -> str:
    """A small file of the kernel's, stripped; empty where it is not there."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def total_memory() -> int:
    """Bytes that this process could use if nothing else ran: the machine's, or its control group's limit."""
    total, limit = _physical_memory()[0], memory_limit()
    return total if limit is None else min(total, limit[0])


def available_memory() -> int:
    """Bytes that this process could use now: what is free, within its control group's limit."""
    total, available = _physical_memory()
    limit = memory_limit()
    within = limit is not None and limit[0] < total
    return min(available, max(0, limit[0] - limit[1])) if limit is not None and within else available


def free_memory(device: str) -> int:
    """Bytes that are free on ``cuda``, or for this process on ``cpu``."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else available_memory()


def _memory() -> Check:
    total, available, limit = _physical_memory()[0], available_memory(), memory_limit()
    where = ""
    if limit is not None and limit[0] < total:
        total, where = limit[0], " (the control group's limit)"
    facts = {"total": total, "available": available, "limited": bool(where)}
    found = f"{size(available)} free of {size(total)}{where}"
    if available < LITTLE_MEMORY:
        fix = "--size 112, or --set train.batch_size=8, where a fit runs out"
        return Check("machine", "memory", "note", f"{found}: little", fix, facts)
    return Check("machine", "memory", "ok", found, facts=facts)


def _physical_memory() -> tuple[int, int]:
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    known = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
    total = known.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, known.get("MemAvailable", total)


def _gpu() -> Check:
    with warnings.catch_warnings(record=True) as caught:  # PyTorch warns where a driver is too old
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if there:
        free, total = torch.cuda.mem_get_info(0)
        count, name, driver = torch.cuda.device_count(), torch.cuda.get_device_name(0), _driver()
        more = f", and {count - 1} more" if count > 1 else ""
        found = (
            f"{name}, {size(free)} free of {size(total)}, driver {driver}, CUDA {torch.version.cuda}{more}"
        )
        facts = {"name": name, "count": count, "free": free, "total": total, "driver": driver}
        return Check("machine", "gpu", "ok", found, facts=facts)
    why, fix = _why_no_gpu([str(warning.message) for warning in caught])
    return Check("machine", "gpu", "note" if fix else "ok", f"none: {why}", fix, {"count": 0, "why": why})


def _why_no_gpu(said: list[str]) -> tuple[str, str | None]:
    """Why PyTorch finds none, and what would change that; None where nothing is amiss."""
    driver = _driver()
    if driver is None:
        return "no NVIDIA driver here; everything runs on the CPU", None
    if torch.version.cuda is None:
        why = f"driver {driver} is here, and torch {torch.__version__} is built for the CPU alone"
        return why, "pip install --force-reinstall torch torchvision"
    reason = f": {said[0].splitlines()[0]}" if said else ""
    return f"driver {driver} is here, and torch {torch.__version__} finds no GPU{reason}", "nvidia-smi"


def _driver() -> str | None:
    """The version of the NVIDIA driver, None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _formats() -> Check:
    """Each format is written and read back: what Pillow lists it may still lack the library for."""
    found = {name: _reads(name) for name in FORMATS}
    there = [name.lower() for name, fine in found.items() if fine]
    lacking = [name.lower() for name, fine in found.items() if not fine]
    turbo = bool(features.check_feature("libjpeg_turbo"))
    facts = {"formats": there, "missing": lacking, "libjpeg_turbo": turbo, "pillow": pillow_version}
    text = ", ".join("jpeg (libjpeg-turbo)" if name == "jpeg" and turbo else name for name in there)
    if any(not found[name] for name in NEEDED_FORMATS):
        fix = "pip install --force-reinstall pillow"
        return Check("images", "formats", "bad", f"{text or 'none'}; not {', '.join(lacking)}", fix, facts)
    return Check(
        "images", "formats", "ok", text + (f"; not {', '.join(lacking)}" if lacking else ""), facts=facts
    )


def _videos() -> Check:
    try:
        found = decoding()
    except SidetuneError as error:
        said, _, fix = str(error).partition(" Type: ")
        return Check("images", "videos", "note", said, fix or None, {"decoder": None})
    return Check("images", "videos", "ok", found, facts={"decoder": found})


def _reads(name: str) -> bool:
    stream = io.BytesIO()
    try:
        Image.new("RGB", (16, 16), "teal").save(stream, name)
        with Image.open(io.BytesIO(stream.getvalue())) as image:
            image.load()
    except (OSError, KeyError, ValueError):  # a codec that was not built in, or a format that is unknown
        return False
    return True


def _standing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(one for one in (folder, *folder.parents) if one.exists())


def _disk() -> Check:
    root = stores_root()
    standing = _standing(root)
    free, room = shutil.disk_usage(standing).free, disk_room(standing)
    facts = {"stores": str(root), "free": free, "room": room}
    found = f"{size(free)} free at {root}; features may take {size(room)}"
    if not room:
        fix = "export SIDETUNE_STORES=/another/disk, or fit with --live"
        return Check("disk", "disk", "bad", f"{found}: it is full, and no store is begun", fix, facts)
    return Check(
        "disk", "disk", "ok", f"{found} (up to 90 % of the disk, or a tenth of what is free)", facts=facts
    )


def _writable() -> Check:
    root = stores_root()
    place = _standing(root)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        found = f"{place} cannot be written: {error.strerror}"
        fix = "export SIDETUNE_STORES=/a/folder/of/yours"
        return Check("disk", "stores", "bad", found, fix, {"folder": str(root), "writable": False})
    made = "writable" if place == root.absolute() else "not there yet, can be made"
    return Check("disk", "stores", "ok", f"{root}: {made}", facts={"folder": str(root), "writable": True})
