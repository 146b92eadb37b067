"""A store under fire: each ends in a clear error or in the right thing, never in silent reuse."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sidetune.files
from extracting import FEW, bring, contents, in_shard_order, toy
from images import make_folder
from sidetune.data import Dataset, load_dataset
from sidetune.errors import RequestError, SidetuneError, StoreError
from sidetune.extract import extract, sample_keys
from sidetune.files import locked
from sidetune.store import Store
from sidetune.upkeep import verify

pytestmark = pytest.mark.usefixtures("small_shards")
ANOTHER = "Type: fit --store OTHER, or extract --out OTHER"


def shard_of(store, number=1):
    return store / f"shards/{number:05d}.safetensors"


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def names_and_bytes(store):
    return {name: digest for name, (digest, _) in contents(store).items()}


# damage is mended by the same command


def other_store(pictures, tmp_path):
    """The same pictures by another backbone: shards of the same length."""
    bring(pictures, tmp_path / "foreign", backbone=toy(seed=1))
    return tmp_path / "foreign"


def damage(kind, store, pictures, tmp_path):
    shard, entry = shard_of(store), shard_of(store).with_suffix(".json")
    if kind == "flipped byte":
        flip(shard)
    elif kind == "flipped byte, dates as before":
        before = shard.stat()
        flip(shard)
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif kind == "flipped byte in the header":
        flip(shard, 20)
    elif kind == "flipped byte in the checksum file":
        flip(entry, entry.read_bytes().index(b'"skipped"') + 3)
    elif kind == "foreign shard":
        shutil.copy(shard_of(other_store(pictures, tmp_path)), shard)
    elif kind == "foreign shard with its checksum file":
        foreign = shard_of(other_store(pictures, tmp_path))
        shutil.copy(foreign, shard)
        shutil.copy(foreign.with_suffix(".json"), entry)
    elif kind == "shards swapped":
        swap(shard, shard_of(store, 0))
    elif kind == "shards and checksum files swapped":
        swap(shard, shard_of(store, 0))
        swap(entry, shard_of(store, 0).with_suffix(".json"))
    elif kind == "empty":
        shard.write_bytes(b"")
    elif kind == "longer":
        shard.write_bytes(shard.read_bytes() + b"0")


def swap(one, two):
    here, there = one.read_bytes(), two.read_bytes()
    one.write_bytes(there)
    two.write_bytes(here)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("flipped byte", "00001.safetensors is damaged or another: the sha256 of its 'valid' starts with "),
        (
            "flipped byte, dates as before",
            "00001.safetensors is damaged or another: the sha256 of its 'valid' ",
        ),
        ("flipped byte in the header", "00001.safetensors is damaged"),
        (
            "flipped byte in the checksum file",
            "00001.json is damaged, or of another store or shard: its seal ",
        ),
        ("foreign shard", "00001.safetensors is damaged or another: the sha256 of its 'block.1' "),
        ("foreign shard with its checksum file", "00001.json is damaged, or of another store or shard: its "),
        ("shards swapped", "00001.safetensors is damaged or another: the sha256 of its 'block.1' starts "),
        (
            "shards and checksum files swapped",
            "00000.json is damaged, or of another store or shard: its seal ",
        ),
        ("empty", "00001.safetensors has 0 bytes, expected "),
        ("longer", "00001.safetensors has "),
    ],
)
def test_a_damaged_shard_is_said_and_mended(pictures, tmp_path, capsys, kind, said):
    dataset, _ = bring(pictures, tmp_path / "s")
    before = contents(tmp_path / "s")
    damage(kind, tmp_path / "s", pictures, tmp_path)
    assert verify(tmp_path / "s")
    capsys.readouterr()
    store = extract(dataset, toy(), tmp_path / "s", dtype="fp32")
    assert said in capsys.readouterr().err
    assert names_and_bytes(tmp_path / "s") == {name: digest for name, (digest, _) in before.items()}
    assert contents(tmp_path / "s")["shards/00002.safetensors"] == before["shards/00002.safetensors"]
    assert verify(tmp_path / "s") == []
    assert len(store.features(sample_keys(dataset))) == FEW


def test_only_what_will_be_read_is_hashed(pictures, tmp_path):
    dataset, _ = bring(pictures, tmp_path / "s", backbone=toy(taps=["block.1", "block.2"]))
    whole = contents(tmp_path / "s")
    data = shard_of(tmp_path / "s").read_bytes()
    flip(shard_of(tmp_path / "s"), 8 + int.from_bytes(data[:8], "little"))  # the first tensor: no summary
    spoilt = contents(tmp_path / "s")
    backbone = toy(taps=["block.1", "block.2"])
    first = next(iter(Store.open(tmp_path / "s").damaged(sample_keys(dataset)).values())).split("'")[1]
    (other,) = {"block.1", "block.2"} - {first}
    for reads in ((), (other,)):
        extract(dataset, backbone, tmp_path / "s", dtype="fp32", reads=reads, quiet=True)
        assert contents(tmp_path / "s") == spoilt
    extract(dataset, backbone, tmp_path / "s", dtype="fp32", reads=(first,), quiet=True)
    assert names_and_bytes(tmp_path / "s") == {name: digest for name, (digest, _) in whole.items()}


def test_a_flipped_byte_among_other_peoples_samples_is_not_forgotten(own, tmp_path):
    dataset, _ = bring(own, tmp_path / "s")
    flip(shard_of(tmp_path / "s"))
    before = contents(tmp_path / "s")
    rows = np.arange(6, FEW)  # shard 1 has samples 5 to 9
    rest = Dataset(
        own, dataset.paths[6:], "classify", dataset.targets[rows], dataset.outputs, dataset.split[rows]
    )
    with pytest.raises(StoreError) as caught:
        extract(rest, toy(), tmp_path / "s", dtype="fp32", quiet=True)
    assert str(caught.value) == (
        f"shard {shard_of(tmp_path / 's')} is damaged, and only the data that it was extracted from can mend "
        "it. Type: extract that data again, or fit --store OTHER, or extract --out OTHER"
    )
    assert contents(tmp_path / "s") == before
    bring(own, tmp_path / "s")  # as it says
    assert verify(tmp_path / "s") == []


def test_a_backbone_of_fewer_taps_cannot_mend(pictures, tmp_path):
    bring(pictures, tmp_path / "s")
    flip(shard_of(tmp_path / "s"))
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s", backbone=toy(taps=["block.4"]))
    text = str(caught.value)
    assert text.startswith(
        f"shard {shard_of(tmp_path / 's')} is damaged or another: the sha256 of its 'valid' "
    )
    assert text.endswith(
        f". It holds 5 taps and the backbone reads 1, so it cannot be written anew. {ANOTHER}"
    )


def test_a_disk_that_does_not_keep_what_is_written_is_named(pictures, tmp_path, monkeypatch):
    dataset, _ = bring(pictures, tmp_path / "s")
    flip(shard_of(tmp_path / "s"))
    write = extract.__globals__["write_shard"]

    def spoil(folder, number, *arguments, **named):
        write(folder, number, *arguments, **named)
        flip(shard_of(folder, number))

    monkeypatch.setitem(extract.__globals__, "write_shard", spoil)
    with pytest.raises(StoreError) as caught:
        extract(dataset, toy(), tmp_path / "s", dtype="fp32", quiet=True)
    assert str(caught.value) == (
        f"shard {shard_of(tmp_path / 's')} was written just now and reads otherwise than written: disk or "
        f"memory fail. {ANOTHER} on another disk"
    )


# a full disk


def test_a_full_disk_at_any_write_leaves_a_store_that_resumes(pictures, tmp_path, monkeypatch):
    bring(pictures, tmp_path / "whole")
    commit, seen = sidetune.files._commit, []

    def full(temporary, path):
        if path.name not in seen:
            seen.append(path.name)
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(temporary, path)

    monkeypatch.setattr(sidetune.files, "_commit", full)
    while len(seen) < 9:
        with pytest.raises(SidetuneError) as caught:
            bring(pictures, tmp_path / "s")
        assert str(caught.value).endswith(
            f"{seen[-1]} cannot be written: No space left on device. Free the disk, then type the same "
            "command again: it resumes"
        )
        assert not list((tmp_path / "s").rglob(".*.sidetune-tmp"))
    assert seen == [
        "norm.safetensors",
        "plan.json",
        *(f"0000{number}.{kind}" for number in range(3) for kind in ("safetensors", "json")),
        "manifest.json",
    ]
    bring(pictures, tmp_path / "s")
    assert names_and_bytes(tmp_path / "s") == names_and_bytes(tmp_path / "whole")


def test_a_file_that_may_not_grow_is_an_error_and_the_next_try_resumes(pictures, tmp_path):
    whole = bring(pictures, tmp_path / "whole")[1]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # shards are about 50 kB; the process gets an error where the file system would give one
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(SidetuneError) as caught:
            bring(pictures, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = str(caught.value)
    assert text.startswith(f"{shard_of(tmp_path / 's', 0)} cannot be written: ")
    assert "File too large" in text
    assert text.endswith("Free the disk, then type the same command again: it resumes")
    assert not list((tmp_path / "s").rglob(".*.sidetune-tmp"))
    bring(pictures, tmp_path / "s")
    assert names_and_bytes(tmp_path / "s") == names_and_bytes(whole.folder)


# a folder that cannot be written


@pytest.fixture
def read_only(monkeypatch):
    """Writes fail as on a disk that is mounted read-only: tests may run as root, whom no bits stop."""

    def fail(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    opened = Path.open

    def open_to_read(path, mode="r", *arguments, **named):
        return fail(path) if set(mode) & set("wax+") else opened(path, mode, *arguments, **named)

    def start():
        monkeypatch.setattr(Path, "open", open_to_read)
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        for name in ("unlink", "touch", "rename", "replace", "chmod"):
            monkeypatch.setattr(Path, name, fail)

    return start


def test_a_complete_store_that_cannot_be_written_is_read(pictures, tmp_path, read_only):
    dataset, store = bring(pictures, tmp_path / "s")
    expected = store.features(sample_keys(dataset))
    (tmp_path / "s/.lock").unlink()
    read_only()
    _, again = bring(pictures, tmp_path / "s")
    assert verify(tmp_path / "s") == []
    for got, wanted in zip(again.features(sample_keys(dataset)).layers, expected.layers, strict=True):
        assert torch.equal(got, wanted)
    assert not (tmp_path / "s/.lock").exists()


def test_a_store_that_must_be_written_and_cannot_be_is_an_error(own, tmp_path, read_only):
    bring(own, tmp_path / "s")
    flip(own / "class0/0000.png")
    read_only()
    with pytest.raises(SidetuneError) as caught:
        bring(own, tmp_path / "s")
    assert str(caught.value) == (
        f"{tmp_path / 's'} cannot be written: Read-only file system. Type: the same command with a folder "
        "that can be written, or mend this one's permissions"
    )


def test_a_damaged_store_that_cannot_be_written_is_an_error(pictures, tmp_path, read_only):
    bring(pictures, tmp_path / "s")
    flip(shard_of(tmp_path / "s"))
    read_only()
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s")
    text = str(caught.value)
    assert text.startswith(
        f"shard {shard_of(tmp_path / 's')} is damaged or another: the sha256 of its 'valid' "
    )
    assert text.endswith(f"; and {tmp_path / 's'} cannot be written. {ANOTHER}")


# what is no store, or another's


def test_a_folder_of_something_else_is_not_made_a_store(pictures, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("recipe.json", "metrics.json", "artifact.json", "side.safetensors"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(RequestError) as caught:
        bring(pictures, tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path / 'run'} holds no store but artifact.json, metrics.json, recipe.json ..; expected a "
        "store, an empty or a new folder. Type: fit --store NEW, or extract --out NEW"
    )
    assert len(contents(tmp_path / "run")) == 4


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(pictures, tmp_path):
    bring(pictures, tmp_path / "s")
    (tmp_path / "s/manifest.json").unlink()
    for name in (".manifest.json.sidetune-tmp", "shards/.00002.json.sidetune-tmp"):
        (tmp_path / "s" / name).write_text("half")
    (tmp_path / "s/.mine.tmp").touch()
    bring(pictures, tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").rglob(".*tmp")] == [".mine.tmp"]


def test_a_store_that_another_process_finishes_meanwhile_is_not_written_twice(
    pictures, tmp_path, monkeypatch
):
    """The second waits for the lock; what the first has done in the meantime counts."""
    dataset = load_dataset(pictures)
    calls = []

    def late(folder, **named):
        if not calls:
            calls.append(folder)
            extract(dataset, toy(), tmp_path / "s", dtype="fp32", quiet=True)
            calls.append(contents(tmp_path / "s"))
        return locked(folder, **named)

    monkeypatch.setitem(extract.__globals__, "locked", late)
    store = extract(dataset, toy(), tmp_path / "s", dtype="fp32", quiet=True)
    assert contents(tmp_path / "s") == calls[1]
    assert store.num_records == FEW


def test_relabelled_data_mend_a_shard_all_the_same(pictures, tmp_path):
    dataset, _ = bring(pictures, tmp_path / "s")
    features = contents(tmp_path / "s", "shards/*.safetensors")
    flip(shard_of(tmp_path / "s"))
    other = replace(dataset, targets=(dataset.targets + 1) % 3)
    extract(other, toy(), tmp_path / "s", dtype="fp32", quiet=True)
    after = contents(tmp_path / "s", "shards/*.safetensors")
    assert {name: digest for name, (digest, _) in after.items()} == {
        name: digest for name, (digest, _) in features.items()
    }
    assert verify(tmp_path / "s") == []


@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_an_image_that_changes_while_it_is_extracted_is_never_stored_under_its_old_key(own, tmp_path, change):
    dataset, backbone = load_dataset(own), toy()
    row = sample_keys(dataset).index(in_shard_order(sample_keys(dataset))[6])  # of the second shard
    path, before = dataset.paths[row], sample_keys(dataset)[row].rpartition("@")[2]

    class Meanwhile:
        def giving(self, dtype):
            return self

        def __getattr__(self, name):
            return getattr(backbone, name)

        def __call__(self, pixels):
            if change == "deleted":
                (own / path).unlink(missing_ok=True)
            elif not shard_of(tmp_path / "s", 0).exists():
                (own / path).write_bytes((own / dataset.paths[row - 1]).read_bytes())
            return backbone(pixels)

    with pytest.raises(StoreError) as caught:
        bring(own, tmp_path / "s", backbone=Meanwhile())
    now = sample_keys(dataset)[row].rpartition("@")[2]
    assert str(caught.value) == (
        f"{path} was changed while {tmp_path / 's'} was extracted: its sha256 starts with {now[:12]}, "
        f"expected {before[:12]}. Type the same command again: it resumes"
    )
    first = contents(tmp_path / "s", "shards/00000.*")
    _, store = bring(own, tmp_path / "s")
    assert contents(tmp_path / "s", "shards/00000.*") == first
    assert (store.num_records, store.skipped) == (FEW if change == "edited" else FEW - 1, {})


FEW_DESCRIPTORS = """
import importlib, resource, sys
from pathlib import Path
from sidetune.backbones import build_backbone
from sidetune.data import load_dataset

extract = importlib.import_module("sidetune.extract")
extract.SHARD_RECORDS = 1
dataset, backbone, folder = load_dataset(Path(sys.argv[1])), build_backbone("toy"), Path(sys.argv[2])
extract.extract(dataset, backbone, folder, quiet=True)  # all modules are imported
before = {path: path.stat().st_mtime_ns for path in (folder / "shards").iterdir()}
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
store = extract.extract(dataset, backbone, folder)
store.features(list(store._slots))
assert {path: path.stat().st_mtime_ns for path in (folder / "shards").iterdir()} == before
print(store.num_records)
"""


def test_a_store_of_more_shards_than_file_descriptors_is_read(tmp_path):
    images = make_folder(tmp_path / "images", 3, 60)
    command = [sys.executable, "-c", FEW_DESCRIPTORS, str(images), str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("60\n", 0), done.stderr
