"""Reading a store, and what is said of a damaged one."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from images import make_csv
from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
from sidetune.errors import RequestError, StoreError
from sidetune.extract import extract, sample_keys
from sidetune.features import Features, Spec
from sidetune.store import Store, describe, list_stores, stores_root, verify
from sidetune.summary import summarise

EXTRACT = importlib.import_module("sidetune.extract")  # the package's attribute is the function


@pytest.fixture(scope="module")
def stored(image_folder, tmp_path_factory):
    """A store of 60 images in five shards, and its keys in row order. Read only."""
    folder = tmp_path_factory.mktemp("store") / "s"
    dataset = load_dataset(image_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXTRACT, "SHARD_RECORDS", 13)
        extract(dataset, build_backbone("toy"), folder, dtype="bf16", quiet=True)
    return folder, sample_keys(dataset)


@pytest.fixture
def own(stored, tmp_path):
    """A copy of the store that a test may damage."""
    return Path(shutil.copytree(stored[0], tmp_path / "own"))


def test_a_batch_is_read_in_the_order_asked_for(stored):
    folder, keys = stored
    store = Store.open(folder)
    assert (store.num_records, len(store.plan.shards)) == (60, 5)
    everything = store.features(keys)
    rows = [59, 0, 13, 12, 0]
    some = store.features([keys[row] for row in rows])
    assert some.spec == store.plan.spec
    for got, layer in zip(some.layers, everything.layers, strict=True):
        assert torch.equal(got, layer[rows])
    assert len(store.features([])) == 0
    assert store.valid(keys).all()


def test_some_taps_are_read_by_a_smaller_spec(stored):
    folder, keys = stored
    store = Store.open(folder)
    spec = store.plan.spec.select(["block.3", "embedding"])
    some = store.features(keys[:3], spec)
    assert some.spec.names == ("embedding", "block.3")
    assert torch.equal(some["block.3"], store.features(keys[:3])["block.3"])


def test_bf16_makes_the_round_trip(stored):
    folder, keys = stored
    layer = Store.open(folder).features(keys)["block.4"]
    assert layer.dtype == torch.float32
    assert torch.equal(layer, layer.bfloat16().float())
    assert Store.open(folder).summary(keys[:1]).mean[0].dtype == torch.float32


def test_the_summary_is_that_of_the_features_read_back(stored):
    folder, keys = stored
    store = Store.open(folder)
    rows = [keys[row] for row in (40, 3, 14)]
    got, expected = store.summary(rows), summarise(store.features(rows))
    assert (got.spec, len(got)) == (expected.spec, 3)
    for a, b in zip((*got.mean, *got.cls), (*expected.mean, *expected.cls), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
    assert torch.allclose(got.mean_square, expected.mean_square, rtol=1e-6)


def test_the_final_norm_is_the_backbones_own(stored):
    norm, own_norm = Store.open(stored[0]).final_norm, build_backbone("toy").norm
    assert torch.equal(norm.weight, own_norm.weight)
    assert torch.equal(norm.bias, own_norm.bias)
    assert norm.eps == own_norm.eps == 1e-6


def test_reading_does_not_change_the_store(stored):
    folder, keys = stored
    batch = Store.open(folder).features(keys[:2])
    batch.layers[0].zero_()
    assert verify(folder) == []
    assert Store.open(folder).features(keys[:2]).layers[0].any()


def test_a_tap_without_class_token_and_targets_of_regression_are_stored(tmp_path):
    class NoClassToken:
        """The patch tokens of a toy backbone as a tap without prefix tokens."""

        def __init__(self):
            self.toy = build_backbone("toy", taps=["block.4"])
            tap = replace(self.toy.spec.last, num_prefix=0, cls_index=None)
            self.spec, self.norm = Spec((tap,)), None

        def __getattr__(self, name):
            return getattr(self.toy, name)

        def __call__(self, pixels):
            return Features((self.toy(pixels).layers[0][:, 1:],), self.spec)

    dataset = load_dataset(make_csv(tmp_path / "d", "regress", 10), task="regress", labels=["x", "y"])
    store = extract(dataset, NoClassToken(), tmp_path / "s", quiet=True)
    keys = sample_keys(dataset)
    assert store.features(keys)["block.4"].shape == (10, 16, 32)
    assert store.summary(keys).cls[0].shape == (10, 0)
    assert store.final_norm is None
    assert not (tmp_path / "s/norm.safetensors").exists()
    assert verify(tmp_path / "s") == []
    first = json.loads((tmp_path / "s/manifest.json").read_text())["samples"][0]
    assert first["label"] == str(dataset.targets[0].tolist())


# what is said of a store that is not whole


def test_missing_samples_are_counted_and_the_first_is_named(stored):
    folder, keys = stored
    for ask in (Store.open(folder).features, Store.open(folder).summary):
        with pytest.raises(StoreError) as caught:
            ask([keys[0], "a/b.png@12", "c.png@34"])
        assert str(caught.value) == (
            f"{folder} lacks 2 of 3 samples, the first 'a/b.png@12' (new, edited, or moved). "
            f"Type: sidetune extract DATA --out {folder}"
        )


def test_a_tap_that_is_not_stored_is_named(stored):
    folder, _ = stored
    with pytest.raises(RequestError, match=r"^no tap named 'attention\.1'\."):
        Store.open(folder).plan.spec.select(["attention.1"])


def test_no_store(tmp_path):
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'plan.json'} is missing: expected a store's plan. Type: sidetune store ls"
    )


def test_not_complete(own):
    (own / "manifest.json").unlink()
    with pytest.raises(StoreError) as caught:
        Store.open(own)
    assert str(caught.value) == (
        f"the store {own} is not complete. Type the same extract command again: it resumes"
    )
    assert verify(own) == [
        "manifest.json: missing, the store is not complete. Type the same extract command again: it resumes"
    ]
    assert describe(own)["state"] == "not complete: extract again"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"plan\.json is damaged: expected a store's plan, got Expecting property name"),
        (
            "[]",
            r"plan\.json is damaged: expected a store's plan, got a list\. Type: rm -r .*, then the same",
        ),
        (
            '{"format": 1}',
            r"plan\.json is damaged: 'identity' is missing\. Type: rm -r .*, then the same extract",
        ),
        (
            '{"format": 9}',
            r"has store format 9, expected 1\. Type: sidetune extract \.\. with a new --out$",
        ),
    ],
)
def test_a_damaged_plan(own, text, said):
    (own / "plan.json").write_text(text)
    with pytest.raises(StoreError, match=said):
        Store.open(own)


def damage(own, kind):
    """Spoil shard 3; returns what it has now and should have."""
    shard = own / "shards/00003.safetensors"
    whole = shard.read_bytes()
    if kind == "missing":
        shard.unlink()
        return None, len(whole)
    if kind == "no checksum file":
        shard.with_suffix(".json").unlink()
        return len(whole), "a checksum file beside it"
    shard.write_bytes(whole[:-1])
    return len(whole) - 1, len(whole)


@pytest.mark.parametrize("kind", ["missing", "cut short", "no checksum file"])
def test_a_shard_that_is_not_whole_is_seen_at_once(own, kind):
    has, expected = damage(own, kind)
    with pytest.raises(StoreError) as caught:
        Store.open(own)
    assert str(caught.value) == (
        f"shard {own / 'shards/00003.safetensors'} has {has} bytes, expected {expected}. "
        "Type the same extract command again: it writes this shard anew"
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "00003.safetensors: missing. Type the same extract command again: it resumes"),
        ("no checksum file", "00003.safetensors: no checksum file. Type the same extract command again: "),
        ("cut short", "00003.safetensors: sha256 is "),
    ],
)
def test_verify_names_the_shard(own, kind, said):
    damage(own, kind)
    (defect,) = verify(own)
    assert defect.startswith(said)


def test_verify_sees_one_flipped_bit(own):
    assert verify(own) == []
    shard = own / "shards/00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    expected = json.loads(shard.with_suffix(".json").read_text())["sha256"]
    (defect,) = verify(own)
    assert defect.startswith("00002.safetensors: sha256 is ")
    assert defect.endswith(f".., expected {expected[:12]}... Type: rm {shard}, then the same extract command")


def test_verify_sees_a_spoilt_norm_and_extracting_again_mends_it(own, stored, image_folder):
    norm = own / "norm.safetensors"
    whole = norm.read_bytes()
    norm.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    manifest = own / "manifest.json"
    assert verify(own) == [
        f"norm.safetensors: not as written. Type: rm {manifest}, then the same extract command"
    ]
    norm.unlink()
    assert len(verify(own)) == 1
    with pytest.raises(StoreError) as caught:
        _ = Store.open(own).final_norm
    assert str(caught.value).startswith(f"{norm} is missing or damaged: ")
    assert str(caught.value).endswith(f"Type: rm {manifest}, then the same extract command")

    manifest.unlink()
    extract(load_dataset(image_folder), build_backbone("toy"), own, dtype="bf16", quiet=True)
    assert verify(own) == []
    assert norm.read_bytes() == whole


@pytest.mark.parametrize("at", [0, 8, 60])
def test_a_spoilt_header_is_a_damaged_shard(own, stored, at):
    shard = own / "shards/00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[at] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        Store.open(own).features(stored[1][:1])
    assert str(caught.value).startswith(f"shard {shard} is damaged: ")
    assert str(caught.value).endswith(f"Type: sidetune store verify {own}")


# listing


def test_describe_counts_what_is_there(stored, own):
    folder, _ = stored
    digest = build_backbone("toy").identity.digest
    assert describe(folder) == {
        "store": str(folder),
        "architecture": "toy",
        "identity": digest,
        "samples": 60,
        "planned": 60,
        "taps": 5,
        "dtype": "bf16",
        "bytes": Store.open(folder).num_bytes,
        "state": "complete",
    }
    assert describe(folder)["bytes"] == sum(f.stat().st_size for f in folder.glob("shards/*.safetensors"))
    for name in ("manifest.json", "shards/00004.json", "shards/00003.json"):
        (own / name).unlink()
    assert (describe(own)["samples"], describe(own)["planned"]) == (39, 60)


def test_list_stores_finds_every_store_under_the_root(own, tmp_path, monkeypatch):
    shutil.copytree(own, tmp_path / "another")
    (tmp_path / "no store").mkdir()
    assert list_stores(tmp_path) == [tmp_path / "another", tmp_path / "own"]
    monkeypatch.setenv("SIDETUNE_STORES", str(tmp_path))
    assert stores_root() == tmp_path
    assert list_stores() == [tmp_path / "another", tmp_path / "own"]
    monkeypatch.delenv("SIDETUNE_STORES")
    assert stores_root() == Path(".sidetune/stores")
    assert list_stores(tmp_path / "nowhere") == []
