"""Reading a store, and what is said of a damaged one."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from extracting import in_shard_order
from images import make_csv
from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
from sidetune.errors import RequestError, StoreError
from sidetune.extract import extract, sample_keys
from sidetune.features import Features, Spec
from sidetune.store import Store, stores_root
from sidetune.summary import summarise
from sidetune.upkeep import describe, list_stores, verify

EXTRACT = importlib.import_module("sidetune.extract")  # the package's attribute is the function


@pytest.fixture(scope="module")
def stored(image_folder, tmp_path_factory):
    """A store of 60 images in five shards, and its keys in shard order. Read only."""
    folder = tmp_path_factory.mktemp("store") / "s"
    dataset = load_dataset(image_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXTRACT, "SHARD_RECORDS", 13)
        extract(dataset, build_backbone("toy"), folder, dtype="bf16", quiet=True)
    return folder, in_shard_order(sample_keys(dataset))


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


def test_features_come_in_the_stored_dtype(stored):
    folder, keys = stored
    layer = Store.open(folder).features(keys)["block.4"]
    assert layer.dtype == torch.bfloat16, "nothing is converted on the way"
    assert torch.isfinite(layer).all() and layer.any()
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

        def giving(self, dtype):
            return self

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
    assert first["label"] == str(dataset.targets[keys.index(first["key"])].tolist())


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
        f"{own / 'manifest.json'} is missing: the store is not complete. "
        "Type the same extract command again: it resumes"
    ]
    assert describe(own)["state"] == "not complete: extract again"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"plan\.json is damaged: expected a store's plan, got Expecting property name"),
        (
            "[]",
            r"plan\.json is damaged: expected a store's plan, got a list\. Type: rm -r .* and extract again$",
        ),
        (
            '{"format": 2}',
            r"plan\.json is damaged: 'identity' is missing\. Type: rm -r .* and extract again$",
        ),
        (
            '{"format": 1}',
            r"has store format 1, expected 2\. Type: rm -r .*, or name a new folder; then extract again$",
        ),
    ],
)
def test_a_damaged_plan(own, text, said):
    (own / "plan.json").write_text(text)
    with pytest.raises(StoreError, match=said):
        Store.open(own)


AGAIN = "Type the same extract or fit command again: it writes this shard anew"


def damage(own, kind):
    """Spoil shard 3; returns what is said of it."""
    shard = own / "shards/00003.safetensors"
    whole = shard.read_bytes()
    if kind == "missing":
        shard.unlink()
        return f"shard {shard} is missing, expected {len(whole)} bytes. {AGAIN}"
    if kind == "no checksum file":
        shard.with_suffix(".json").unlink()
        return f"shard {shard} has {len(whole)} bytes, expected its checksum file beside it. {AGAIN}"
    shard.write_bytes(whole[:-1])
    return f"shard {shard} has {len(whole) - 1} bytes, expected {len(whole)} bytes. {AGAIN}"


@pytest.mark.parametrize("kind", ["missing", "cut short", "no checksum file"])
def test_a_shard_that_is_not_whole_is_seen_at_once(own, kind):
    said = damage(own, kind)
    with pytest.raises(StoreError) as caught:
        Store.open(own)
    assert str(caught.value) == said
    assert verify(own) == [said]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_seen_by_verify_and_by_whoever_reads_it(own, stored):
    assert verify(own) == []
    shard = own / "shards/00002.safetensors"
    key, other = stored[1][30], stored[1][0]
    at = tensor_at(shard, "block.3")
    expected = json.loads(shard.with_suffix(".json").read_text())["tensors"]["block.3"]
    flip(shard, at)
    (defect,) = verify(own)
    assert defect.startswith(f"shard {shard} is damaged or another: the sha256 of its 'block.3' starts with ")
    assert defect.endswith(f", expected {expected[:12]}. {AGAIN}")
    store = Store.open(own)
    spec = store.plan.spec
    with pytest.raises(StoreError) as caught:
        store.features([other, key])
    assert str(caught.value) == defect
    assert len(store.features([other])) == 1, "another shard is read as ever"
    assert len(store.features([key], spec.select(["block.4"]))) == 1, "what is not read is not hashed"
    assert store.damaged([other, key]) == {2: defect}
    assert store.damaged([other, key], ["block.4"]) == store.damaged([other], None) == {}


def tensor_at(shard, name):
    """Where a tensor's first byte stands in its file."""
    data = shard.read_bytes()
    header = int.from_bytes(data[:8], "little")
    return 8 + header + json.loads(data[8 : 8 + header])[name]["data_offsets"][0]


@pytest.mark.parametrize("name", ["summary.mean.block.2", "summary.mean_square"])
def test_a_flipped_bit_of_a_summary_is_seen_by_whoever_reads_it(own, stored, name):
    shard = own / "shards/00000.safetensors"
    flip(shard, tensor_at(shard, name))
    with pytest.raises(StoreError, match=rf"the sha256 of its '{name}' starts with "):
        Store.open(own).summary(stored[1][:2])


def test_every_byte_of_a_shard_and_its_checksum_file_counts(own):
    """A flip anywhere is a defect; of a sample of places, all of them."""
    shard = own / "shards/00004.safetensors"
    for path in (shard, shard.with_suffix(".json")):
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        places = rng.choice(len(whole), 40, replace=False).tolist()
        for at in [place for place in places if not whole[place : place + 1].isspace()]:
            flip(path, at)
            (defect,) = verify(own)
            assert defect.endswith(AGAIN), defect
            path.write_bytes(whole)
    assert verify(own) == []


def test_a_flipped_byte_in_the_plan_belongs_to_no_shard(own):
    plan = own / "plan.json"
    plan.write_text(plan.read_text().replace('"dtype": "bf16"', '"dtype": "fp16"'))
    with pytest.raises(StoreError) as caught:
        Store.open(own)
    assert str(caught.value).startswith(
        f"{own / 'shards/00000.json'} is damaged, or of another store or shard: its seal starts with "
    )
    assert str(caught.value).endswith(AGAIN)


def test_shards_swapped_are_seen(own, stored):
    one, two = own / "shards/00000.safetensors", own / "shards/00001.safetensors"
    assert one.stat().st_size == two.stat().st_size
    swap(one, two)
    with pytest.raises(StoreError, match=r"00000\.safetensors is damaged or another: the sha256 of its "):
        Store.open(own).features(stored[1][:1])
    assert len(verify(own)) == 2
    swap(one.with_suffix(".json"), two.with_suffix(".json"))  # now each shard has its own checksum file
    with pytest.raises(StoreError, match=r"00000\.json is damaged, or of another store or shard: its seal "):
        Store.open(own)
    assert len(verify(own)) == 2


def swap(one, two):
    here, there = one.read_bytes(), two.read_bytes()
    one.write_bytes(there)
    two.write_bytes(here)


def test_a_manifest_that_is_not_as_written_is_written_anew(own, image_folder):
    manifest = own / "manifest.json"
    whole = manifest.read_text()
    again = f"Type: rm {manifest}, then the same extract command: it writes it anew"
    manifest.write_text(whole.replace("class1", "class2", 1))
    assert verify(own) == [f"{manifest} is not as written. {again}"]
    manifest.write_text(whole[:-3])
    (defect,) = verify(own)
    assert defect.startswith(f"{manifest} is damaged: expected a manifest, got ")
    assert defect.endswith(again)
    manifest.unlink()
    extract(load_dataset(image_folder), build_backbone("toy"), own, dtype="bf16", quiet=True)
    assert (manifest.read_text(), verify(own)) == (whole, [])


def test_a_spoilt_norm_is_seen_and_extracting_again_mends_it(own, image_folder):
    norm = own / "norm.safetensors"
    whole = norm.read_bytes()
    again = "Type the same extract or fit command again: it writes it anew"
    for spoil in (lambda: flip(norm, len(whole) - 1), norm.unlink):
        spoil()
        (defect,) = verify(own)
        with pytest.raises(StoreError) as caught:
            _ = Store.open(own).final_norm
        assert str(caught.value) == defect
        assert defect.startswith(f"{norm} is ")
        assert defect.endswith(again)
        extract(load_dataset(image_folder), build_backbone("toy"), own, dtype="bf16", quiet=True)
        assert (verify(own), norm.read_bytes()) == ([], whole)


@pytest.mark.parametrize("at", [0, 8, 60])
def test_a_spoilt_header_is_a_damaged_shard(own, stored, at):
    shard = own / "shards/00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[at] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        Store.open(own).features(stored[1][:1])
    assert str(caught.value).startswith(f"shard {shard} is damaged: ")
    assert str(caught.value).endswith(AGAIN)


# listing


def test_damaged_stores_are_listed_with_their_damage(own, tmp_path):
    plan = own / "plan.json"
    (own / "shards/00001.json").write_text("{")
    assert describe(own)["state"] == f"damaged: 1 of 5 shards. Type: sidetune store verify {own}"
    assert describe(own)["samples"] == 47
    plan.write_text("{")
    row = describe(own)
    assert row["store"] == str(own)
    assert row["state"].startswith(f"damaged: {plan} is damaged: expected a store's plan, got ")
    assert row["state"].endswith(f"Type: rm -r {own} and extract again")
    missing = tmp_path / "nowhere"
    assert describe(missing)["state"] == (
        f"damaged: {missing / 'plan.json'} is missing: expected a store's plan. Type: sidetune store ls"
    )


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
