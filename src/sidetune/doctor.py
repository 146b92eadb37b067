"""What this machine has and lacks, and whether a fit works on it: `sidetune doctor`.

A check says what was found and, where something is missing, what to type. Nothing here needs torchvision
or timm to be importable: a broken installation is what this is for.
"""

from __future__ import annotations

import importlib
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, metadata, version
from pathlib import Path
from typing import Any, Literal

from sidetune.errors import SidetuneError

State = Literal["ok", "note", "bad"]
CORE = ("torch", "torchvision", "timm")  # the packages that a result hangs on: a line each
REINSTALL = "pip install --force-reinstall torch torchvision"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FIT_IMAGES, FIT_SIZE = 12, 32


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        part: ``packages``, ``machine``, ``images``, ``disk`` or ``fit``.
        name: what was looked at.
        state: ``ok``; ``note``: it works without; ``bad``: a fit fails, or will.
        found: what there is, for people.
        fix: what to type, where something is missing.
        facts: the same as numbers, for programs.
    """

    part: str
    name: str
    state: State
    found: str
    fix: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def examine() -> list[Check]:
    """Look at everything; the last check is the fit."""
    from sidetune.machine import machine_checks  # torch's import is slow, and may be what is broken

    pair = _pair()
    return [
        *_packages(),
        *([pair] if pair.state != "ok" else []),
        *_extras(),
        _demo_weights(pair),
        *machine_checks(),
        _tiny_fit(),
    ]


def works(checks: Sequence[Check]) -> bool:
    """Whether the fit worked."""
    return checks[-1].state == "ok"


def _packages() -> Iterator[Check]:
    yield Check("packages", "sidetune", "ok", f"{_version('sidetune')}, Python {platform.python_version()}")
    needed = [name for name, extra in _requirements() if extra is None]
    for name in CORE:
        yield _package(name)
    others = {name: _version(name) for name in needed if name not in CORE}
    there = {name: found for name, found in others.items() if found is not None}
    listed = ", ".join(f"{name} {found}" for name, found in there.items())
    yield Check("packages", "others", "ok", listed, facts={"versions": there})
    for name in others.keys() - there.keys():
        yield _package(name)


def _package(name: str) -> Check:
    found = _version(name)
    if found is None:
        return Check("packages", name, "bad", "not installed", f"pip install {name}", {"version": None})
    return Check("packages", name, "ok", found, facts={"version": found})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[str, str | None]]:
    """(package, the extra that asks for it or None) of sidetune, as it was installed."""
    for line in metadata("sidetune").get_all("Requires-Dist") or ():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name and name[0] != "sidetune":
            yield name[0], extra[1] if extra else None


def _pair() -> Check:
    """The torchvision of another build than torch cannot be imported, nor timm, which needs it."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return Check(
            "packages", "torchvision", "bad", _broken_pair(error), _pair_fix(), {"error": str(error)}
        )
    return Check("packages", "torchvision", "ok", "")


def _broken_pair(error: Exception) -> str:
    built = f"torch {_version('torch')} and torchvision {_version('torchvision')}"
    return f"cannot be imported, and timm needs it ({error}). {built} must come from the same index"


def _pair_fix() -> str:
    """A CPU-only torch comes from an index of its own, and so must its torchvision."""
    return f"{REINSTALL} --index-url {CPU_INDEX}" if "+cpu" in str(_version("torch")) else REINSTALL


def _extras() -> Iterator[Check]:
    """One line an extra that users may want: all of them but the tests'."""
    extras: dict[str, list[str]] = {}
    for name, extra in _requirements():
        if extra is not None and extra != "test":
            extras.setdefault(extra, []).append(name)
    for extra, names in extras.items():
        missing = [name for name in names if _version(name) is None]
        facts = {"missing": missing}
        if missing:
            found = f"{', '.join(missing)} not installed"
            yield Check(
                "packages", f"extra {extra}", "note", found, f"pip install 'sidetune[{extra}]'", facts
            )
        else:
            listed = ", ".join(f"{name} {_version(name)}" for name in names)
            yield Check("packages", f"extra {extra}", "ok", listed, facts=facts)


def _demo_weights(pair: Check) -> Check:
    if pair.state != "ok":
        return Check("packages", "demo weights", "note", "not looked at: torchvision comes first")
    from sidetune.backbones import demo

    found = _version(demo.PACKAGE)
    if found is None or not Path(str(distribution(demo.PACKAGE).locate_file(demo.WEIGHTS_FILE))).is_file():
        lacking = f"{demo.PACKAGE} {demo.VERSION} not installed: --backbone demo, the default, needs it"
        return Check("packages", "demo weights", "note", lacking, demo.INSTALL, {"version": found})
    return Check("packages", "demo weights", "ok", f"{demo.PACKAGE} {found}", facts={"version": found})


def _tiny_fit() -> Check:
    """A dozen drawn images, the toy backbone, two epochs, in a folder that is then removed."""
    started = time.monotonic()
    try:
        device = _fit_once()
    except (SidetuneError, OSError, RuntimeError, ImportError) as error:
        found = f"{FIT_IMAGES} images, toy backbone: {type(error).__name__}: {error}"
        fix = "mend the first line above that is marked !!, then: sidetune doctor"
        return Check("fit", "tiny fit", "bad", found, fix, {"error": str(error)})
    seconds = time.monotonic() - started
    found = f"{FIT_IMAGES} images, toy backbone, {device}: {seconds:.1f} s"
    return Check("fit", "tiny fit", "ok", found, facts={"seconds": round(seconds, 2), "device": device})


def _fit_once() -> str:
    import sidetune
    from sidetune.artifact import find_device

    fields = {"backbone": {"name": "toy"}, "side": {"name": "losa"}, "train": {"epochs": 2}}
    with tempfile.TemporaryDirectory(prefix="sidetune-doctor-") as name:
        folder = Path(name)
        _draw_images(folder / "images")
        run = sidetune.fit(
            folder / "images",
            out=folder / "run",
            recipe=sidetune.Recipe.build(fields),
            store=folder / "store",
            quiet=True,
        )
        image = next((folder / "images").rglob("*.png"))
        assert sidetune.load(run.folder).predict([image])[0].error is None
    return str(find_device("auto"))


def _draw_images(folder: Path) -> None:
    """Two classes, dark and light, with noise from a seed."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(FIT_IMAGES):
        light = number % 2
        place = folder / ("light" if light else "dark")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(128 * light, 128 * light + 128, (FIT_SIZE, FIT_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02d}.png")
