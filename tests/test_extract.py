"""Extraction: what is written, images that cannot be read, and what is refused."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from extracting import EXTRACT, FEW, bring, contents, in_shard_order, seal_again, toy
from sidetune.backbones import build_backbone
from sidetune.data import load_dataset, load_image
from sidetune.data.notes import first_frames, other_files
from sidetune.errors import DataError, StoreError
from sidetune.extract import disk_room, extract, sample_keys
from sidetune.features import Features
from sidetune.files import sha256_file
from sidetune.store import DTYPES, Store
from tiny_vits import hub_folder

Disk = namedtuple("Disk", "total used free")


def direct(dataset, backbone, rows=None):
    """What the backbone says of some rows, in one batch."""
    rows = range(len(dataset)) if rows is None else rows
    return backbone(torch.stack([load_image(dataset.file(row), backbone.preprocess) for row in rows]))


# what is written


def test_the_layout_on_disk_is_the_documented_one(pictures, tmp_path, small_shards):
    backbone = toy(taps=["embedding", "block.4"])
    dataset, _ = bring(pictures, tmp_path / "s", backbone=backbone, dtype="fp16")
    assert sorted(contents(tmp_path / "s")) == [
        "manifest.json",
        "norm.safetensors",
        "plan.json",
        *(f"shards/{number:05d}.{kind}" for number in range(3) for kind in ("json", "safetensors")),
    ]
    keys = in_shard_order(sample_keys(dataset))
    assert keys != sample_keys(dataset), "files sorted by class are mixed"
    plan = json.loads((tmp_path / "s/plan.json").read_text())
    assert plan["shards"] == [list(keys[:5]), list(keys[5:10]), list(keys[10:])]
    assert (plan["dtype"], plan["variant"]["taps"]) == ("fp16", ["embedding", "block.4"])
    assert plan["identity"]["digest"] == backbone.identity.digest

    shard = load_file(tmp_path / "s/shards/00001.safetensors")
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in shard.items()} == {
        "embedding": ((5, 17, 32), "torch.float16"),
        "block.4": ((5, 17, 32), "torch.float16"),
        "valid": ((5,), "torch.uint8"),
        **{
            f"summary.{pool}.{tap}": ((5, 32), "torch.float32")
            for pool in ("mean", "cls")
            for tap in ("embedding", "block.4")
        },
        "summary.mean_square": ((5, 2), "torch.float32"),
    }
    entry = json.loads((tmp_path / "s/shards/00001.json").read_text())
    file = tmp_path / "s/shards/00001.safetensors"
    assert (entry["bytes"], entry["skipped"]) == (file.stat().st_size, {})
    assert entry["tensors"] == {
        name: sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in shard.items()
    }

    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    assert (manifest["format"], manifest["records"]) == (2, FEW)
    assert manifest["identity"] == backbone.identity.digest
    norm = load_file(tmp_path / "s/norm.safetensors")
    digest = sha256(norm["weight"].numpy().tobytes() + norm["bias"].numpy().tobytes()).hexdigest()
    assert manifest["norm"] == plan["norm"] == digest
    label = dataset.outputs[int(dataset.targets[sample_keys(dataset).index(keys[7])])]
    assert manifest["samples"][7] == {"key": keys[7], "records": [7], "label": label}


def test_a_key_is_the_relative_path_and_the_sha256_of_the_bytes(pictures):
    dataset = load_dataset(pictures)
    path = dataset.paths[3]
    assert sample_keys(dataset)[3] == f"{path.as_posix()}@{sha256_file(pictures / path)}"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_is_read_is_what_the_backbone_gives_rounded_once(pictures, tmp_path, dtype):
    backbone = toy()
    dataset, store = bring(pictures, tmp_path / "s", backbone=backbone, dtype=dtype)
    read = store.features(sample_keys(dataset))
    for layer, expected in zip(read.layers, direct(dataset, backbone).layers, strict=True):
        assert layer.dtype == DTYPES[dtype]
        assert torch.equal(layer, expected.to(DTYPES[dtype]))


def test_small_shards_hold_the_same_features_as_one(pictures, tmp_path, monkeypatch):
    dataset, one = bring(pictures, tmp_path / "one")
    monkeypatch.setattr(EXTRACT, "SHARD_RECORDS", 5)
    _, many = bring(pictures, tmp_path / "many")
    assert [len(shard) for shard in many.plan.shards] == [5, 5, 2]
    keys = sample_keys(dataset)
    for got, expected in zip(many.features(keys).layers, one.features(keys).layers, strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)


def test_a_shard_is_bounded_in_bytes_too(pictures, tmp_path, monkeypatch):
    record = 5 * 17 * 32 * 4
    monkeypatch.setattr(EXTRACT, "SHARD_BYTES", 4 * record + 1)
    _, store = bring(pictures, tmp_path / "s")
    assert [len(shard) for shard in store.plan.shards] == [4, 4, 4]
    monkeypatch.setattr(EXTRACT, "SHARD_BYTES", 1)
    _, store = bring(pictures, tmp_path / "t")
    assert [len(shard) for shard in store.plan.shards] == [1] * FEW


def test_a_streamed_backbone_gets_whole_calls_and_writes_the_same_features(pictures, tmp_path, monkeypatch):
    """However small a shard would be, the blocks are read once a call's worth of images."""
    folder = hub_folder(tmp_path / "hub", "vit_small_patch16_224")
    eager, streamed = (
        build_backbone("timm:vit_small_patch16_224", weights=folder, runtime=runtime)
        for runtime in ("eager", "streamed")
    )
    assert streamed.call_size == 64 and eager.call_size is None
    dataset, expected = bring(pictures, tmp_path / "eager", backbone=eager, dtype="fp16")
    monkeypatch.setattr(EXTRACT, "SHARD_BYTES", 1)
    monkeypatch.setattr(type(streamed), "call_size", 8)
    _, store = bring(pictures, tmp_path / "streamed", backbone=streamed, dtype="fp16")
    assert [len(shard) for shard in store.plan.shards] == [8, 4]
    assert store.plan.variant.runtime == "streamed"
    keys = sample_keys(dataset)
    for got, wanted in zip(store.features(keys).layers, expected.features(keys).layers, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)  # batches of 8 and of 12


def test_identical_bytes_under_two_paths_are_two_samples(own, tmp_path):
    first = next((own / "class0").iterdir())
    shutil.copy(first, own / "class1" / "twin.png")
    dataset, store = bring(own, tmp_path / "s")
    rows = [row for row, path in enumerate(dataset.paths) if path.name in ("twin.png", first.name)]
    keys = [sample_keys(dataset)[row] for row in rows]
    assert (len(set(keys)), len({key.split("@")[1] for key in keys})) == (2, 1)
    a, b = store.features(keys)["block.4"]
    assert torch.equal(a, b)


def test_a_path_listed_twice_is_one_sample(pictures, tmp_path):
    dataset = load_dataset(pictures)
    dataset = replace(dataset, paths=dataset.paths[:1] * 2 + dataset.paths[2:])
    store = extract(dataset, toy(), tmp_path / "s", quiet=True)
    assert (len(dataset), store.num_records) == (FEW, FEW - 1)
    a, b = store.features(sample_keys(dataset)[:2])["block.4"]
    assert torch.equal(a, b)


# images that cannot be read


def test_a_corrupt_image_keeps_its_slot_and_harms_no_other(own, tmp_path, small_shards):
    whole, sound = bring(own, tmp_path / "sound")
    (own / whole.paths[3]).write_bytes(b"no image")
    (own / whole.paths[6]).write_bytes((own / whole.paths[6]).read_bytes()[:900])
    (own / whole.paths[11]).write_bytes(b"")
    dataset, store = bring(own, tmp_path / "s")
    keys = sample_keys(dataset)
    assert [len(shard) for shard in store.plan.shards] == [5, 5, 2]
    assert store.skipped == {
        keys[3]: "not an image that Pillow reads",
        keys[6]: "damaged or cut short",
        keys[11]: "the file is empty",
    }
    bad = np.isin(np.arange(FEW), [3, 6, 11])
    assert store.valid(keys).tolist() == (~bad).tolist()
    valid = [load_file(tmp_path / f"s/shards/{number:05d}.safetensors")["valid"] for number in range(3)]
    assert torch.cat(valid).tolist() == [key not in store.skipped for key in in_shard_order(keys)]

    rows = np.flatnonzero(~bad).tolist()
    read = store.features([keys[row] for row in rows])
    expected = sound.features([sample_keys(whole)[row] for row in rows])
    for got, wanted in zip(read.layers, expected.layers, strict=True):
        assert torch.equal(got, wanted)


def test_a_missing_file_keeps_its_slot_and_its_return_is_a_new_sample(own, tmp_path):
    dataset = load_dataset(own)
    (own / dataset.paths[2]).rename(tmp_path / "away.png")
    store = extract(dataset, toy(), tmp_path / "s", quiet=True)
    key = sample_keys(dataset)[2]
    assert key == f"{dataset.paths[2].as_posix()}@unreadable"
    assert store.skipped == {key: "No such file or directory"}

    (tmp_path / "away.png").rename(own / dataset.paths[2])
    store = extract(dataset, toy(), tmp_path / "s", quiet=True)
    assert (store.num_records, store.valid(sample_keys(dataset)).all()) == (FEW + 1, True)


# what is refused


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"seed": 1}, ["weights: ", " here, ", " there"]),
        (
            {"size": 48},
            ["arguments.size: 48 here, 32 there", "preprocess.size: 48 here, 32 there"],
        ),
        ({"resize": "crop"}, ["preprocess.resize: crop here, squash there"]),
    ],
)
def test_another_backbone_is_refused_with_what_differs(pictures, tmp_path, arguments, texts):
    bring(pictures, tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s", backbone=toy(**arguments))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 's'} holds features of another backbone; ")
    assert text.endswith(". Type: fit --store OTHER, or extract --out OTHER")
    assert all(part in text for part in texts), text
    assert contents(tmp_path / "s") == before


def test_another_dtype_is_refused(pictures, tmp_path):
    bring(pictures, tmp_path / "s", dtype="bf16")
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s", dtype="fp32")
    assert str(caught.value) == (
        f"{tmp_path / 's'} holds bf16, asked for fp32. Type: --set features.dtype=bf16"
    )


def test_more_taps_are_refused_and_fewer_are_served(pictures, tmp_path):
    dataset, full = bring(pictures, tmp_path / "s", backbone=toy(taps=["block.2", "block.4"]))
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s", backbone=toy(taps=["block.1", "block.2", "attention.3"]))
    assert str(caught.value) == (
        f"{tmp_path / 's'} lacks the taps block.1, attention.3. "
        "Type: fit --store OTHER, or extract --out OTHER"
    )
    fewer = toy(taps=["block.4"])
    before = contents(tmp_path / "s")
    _, store = bring(pictures, tmp_path / "s", backbone=fewer)
    assert contents(tmp_path / "s") == before
    keys = sample_keys(dataset)
    assert torch.equal(store.features(keys, fewer.spec).layers[0], full.features(keys)["block.4"])


def scaled_toy(tap, factor):
    """A toy backbone one of whose taps is multiplied."""
    backbone = toy()

    class Scaled:
        def __init__(self, dtype=torch.float32):
            self.dtype = dtype

        def giving(self, dtype):
            return Scaled(dtype)

        def __getattr__(self, name):
            return getattr(backbone, name)

        def __call__(self, pixels):
            read = backbone(pixels)
            at = read.spec.index(tap)
            layers = [layer * factor if i == at else layer for i, layer in enumerate(read.layers)]
            return Features(tuple(layer.to(self.dtype) for layer in layers), read.spec)

    return Scaled()


def test_an_overflow_of_fp16_names_the_tap(pictures, tmp_path):
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s", backbone=scaled_toy("block.3", 1e6), dtype="fp16")
    text = str(caught.value)
    assert text.startswith("tap 'block.3' reaches ")
    assert text.endswith(
        ", more than fp16 can hold. Type: --set features.dtype=bf16, "
        "and a new folder where --store or --out names one"
    )
    assert not (tmp_path / "s/manifest.json").exists()
    dataset, store = bring(pictures, tmp_path / "t", backbone=scaled_toy("block.3", 1e6), dtype="bf16")
    assert store.features(sample_keys(dataset))["block.3"].max() > 65_504, "bf16 has the range of fp32"


def test_a_backbone_that_gives_nan_is_named_as_such(pictures, tmp_path):
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s", backbone=scaled_toy("block.2", float("nan")), dtype="bf16")
    assert str(caught.value) == (
        "tap 'block.2' holds NaN or infinity as the backbone gives it in fp32. "
        "Type: --set backbone.precision=fp32, or other --weights"
    )


def test_a_disk_is_filled_to_nine_tenths_or_by_a_tenth_of_the_rest(pictures, tmp_path, monkeypatch):
    needed = FEW * 5 * 17 * 32 * 4
    free = 2 * needed
    total = 1000 * needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(total, total - free, free))
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s")
    assert str(caught.value) == (
        f"the store needs {needed / 2**20:.1f} MiB more; of {free / 2**20:.1f} MiB free at {tmp_path / 's'} "
        f"it may take {free // 10 / 2**20:.1f} (up to 90 % of the disk, or a tenth of what is free). "
        "Type: --live, or --set features.dtype=fp16, or a smaller --size"
    )
    assert contents(tmp_path / "s") == {}, "nothing was written"

    free = 11 * needed  # past nine tenths, and yet nothing that a small store could fill
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(total, total - free, free))
    bring(pictures, tmp_path / "small")

    for free, fits in ((2 * needed - 1000, False), (2 * needed, True)):  # of ten parts eight are used
        disk = Disk(8 * needed + free, 8 * needed, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, disk=disk: disk)
        assert (disk_room(tmp_path) >= needed) == fits

    used = 899 * needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(total, used, total - used))
    bring(pictures, tmp_path / "s")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(total, total, 0))
    (tmp_path / "s/manifest.json").unlink()
    bring(pictures, tmp_path / "s")  # a complete store needs no room


def test_the_bytes_are_said_first_unless_quiet(pictures, tmp_path, capsys):
    dataset = load_dataset(pictures)
    extract(dataset, toy(), tmp_path / "s")
    assert capsys.readouterr().err == "extract: 0.1 MiB of features to write\n"
    extract(dataset, toy(), tmp_path / "s")
    extract(dataset, toy(), tmp_path / "t", quiet=True)
    assert capsys.readouterr() == ("", "")


def test_strict_names_the_first_image_and_keeps_the_store(own, tmp_path):
    bad = sorted(own.rglob("*.png"))[3]
    bad.write_bytes(b"")
    dataset = load_dataset(own)
    with pytest.raises(DataError) as error:
        extract(dataset, toy(), tmp_path / "s", strict=True, quiet=True)
    assert str(error.value) == (
        f"1 image cannot be read, the first {bad.relative_to(own)}: the file is empty; --strict expects "
        "none. Mend or remove them, or type the same command without --strict, which leaves them out"
    )
    assert Store.open(tmp_path / "s").num_records == 12
    before = contents(tmp_path / "s")
    assert len(extract(dataset, toy(), tmp_path / "s", quiet=True).skipped) == 1
    assert contents(tmp_path / "s") == before


def test_the_store_knows_of_which_files_it_holds_the_first_frame(own, tmp_path, small_shards):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(own / "class1" / "moving.gif", save_all=True, append_images=frames[1:])
    _, store = bring(own, tmp_path / "s")
    assert [key.split("@")[0] for key in store.animated] == ["class1/moving.gif"]
    path = next(
        path
        for path in (tmp_path / "s" / "shards").glob("*.json")
        if json.loads(path.read_text())["animated"]
    )
    entry = json.loads(path.read_text())
    del entry["animated"]  # as stores were written before
    path.write_text(json.dumps(entry))
    seal_again(tmp_path / "s")
    assert Store.open(tmp_path / "s").animated == frozenset()


def test_a_pipe_among_the_images_is_skipped(own, tmp_path):
    os.mkfifo(own / "class0" / "pipe.png")
    _, store = bring(own, tmp_path / "s")
    assert store.skipped == {"class0/pipe.png@unreadable": "a pipe, a socket or a device, not a file"}


def test_one_file_and_several_are_said_in_words():
    one = "1 image is an animation or has several pages; its first is used: a.gif"
    assert first_frames([Path("a.gif")]) == one
    assert other_files(3) == (
        "3 other files beside the images have no image's ending and are left out; "
        "photographs in HEIC have to be made JPEG first"
    )
