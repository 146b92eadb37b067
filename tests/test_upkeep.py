"""What `store gc` removes, what it keeps, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from extracting import FEW, bring, contents, in_shard_order, seal_again, toy
from images import make_folder
from sidetune.data import load_dataset
from sidetune.errors import RequestError, StoreError
from sidetune.extract import extract, sample_keys
from sidetune.store import Plan, Store, write_manifest
from sidetune.upkeep import collect_garbage, describe, verify, wanted_keys

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture
def shared(own, tmp_path):
    """Two datasets in one store: 12 pictures in shards 0 to 2, 9 others in shards 3 and 4."""
    others = make_folder(tmp_path / "others", 3, 9, seed=11)
    first, _ = bring(own, tmp_path / "s")
    second, _ = bring(others, tmp_path / "s")
    return tmp_path / "s", first, second


def test_without_data_leftovers_go_and_nothing_else(shared):
    store, _, _ = shared
    whole = contents(store)
    names = (".plan.json.sidetune-tmp", "shards/.00001.json.sidetune-tmp", "shards/00009.safetensors")
    for name in names:
        (store / name).write_bytes(b"12345")
    (store / "shards/notes.txt").write_text("mine")
    found = collect_garbage(store)
    assert sorted(str(path.relative_to(store)) for path in found.files) == sorted(names)
    assert (found.bytes, found.samples, found.kept) == (15, 0, 0)
    assert len(contents(store)) == len(whole) + 4, "to find is not to remove"
    assert collect_garbage(store, remove=True) == found
    after = contents(store)
    assert after.pop("shards/notes.txt")
    assert after == whole
    assert collect_garbage(store).files == ()


def test_with_data_shards_that_nobody_wants_go_and_the_rest_is_served_as_ever(shared):
    store, first, second = shared
    before, shards = Store.open(store).features(sample_keys(second)), contents(store, "shards/*")
    found = collect_garbage(store, wanted=wanted_keys([second.root], "classify", None), remove=True)
    assert (found.samples, found.kept, len(found.files)) == (FEW, 0, 6)
    assert contents(store, "shards/*") == {name: shards[name] for name in shards if name[7:12] >= "00003"}
    assert verify(store) == []
    again = Store.open(store)
    assert (again.num_records, len(again.missing(sample_keys(first)))) == (9, FEW)
    for got, expected in zip(again.features(sample_keys(second)).layers, before.layers, strict=True):
        assert torch.equal(got, expected)
    assert describe(store)["samples"] == describe(store)["planned"] == 9
    assert len(json.loads((store / "manifest.json").read_text())["samples"]) == 9


def test_what_went_is_extracted_again_when_it_is_wanted_again(shared):
    store, first, second = shared
    before = Store.open(store).features(sample_keys(first))
    collect_garbage(store, wanted=set(sample_keys(second)), remove=True)
    again = extract(first, toy(), store, dtype="fp32", quiet=True)
    assert again.num_records == FEW + 9
    for got, expected in zip(again.features(sample_keys(first)).layers, before.layers, strict=True):
        assert torch.equal(got, expected)
    assert verify(store) == []


def test_a_shard_with_one_wanted_sample_stays_whole(shared):
    store, first, second = shared
    keys = in_shard_order(sample_keys(first))
    found = collect_garbage(store, wanted={keys[0], *sample_keys(second)}, remove=True)
    assert (found.samples, found.kept) == (7, 4)
    assert Store.open(store).missing(keys) == list(keys[5:])


def test_views_of_a_wanted_sample_are_wanted(shared):
    store, first, second = shared
    keys = sample_keys(first)
    plan = Plan.read(store)
    assert collect_garbage(store, wanted=set(keys)).samples == len(second)
    views = tuple(f"{key}#mirror" for key in keys[:5])
    (store / "plan.json").write_text(
        json.dumps({**plan.to_json(), "shards": [*map(list, plan.shards), list(views)]})
    )
    found = collect_garbage(store, wanted=set(keys))
    assert found.plan.shards == (*plan.shards[:3], (), (), views)


def test_data_that_nothing_is_of_is_refused(shared, tmp_path):
    store, _, _ = shared
    before = contents(store)
    with pytest.raises(RequestError) as caught:
        collect_garbage(store, wanted={"a.png@12"}, remove=True)
    assert str(caught.value) == (
        f"none of the 21 samples of {store} is in the data, expected at least one. If all shall go, "
        f"type: rm -r {store}"
    )
    assert contents(store) == before


def test_an_edited_image_leaves_a_sample_that_may_go(own, tmp_path):
    dataset = load_dataset(own)
    bring(own, tmp_path / "s")
    for key in Store.open(tmp_path / "s").plan.shards[0]:
        path = own / key.rpartition("@")[0]
        path.write_bytes(path.read_bytes() + b"edited")
    bring(own, tmp_path / "s")
    found = collect_garbage(tmp_path / "s", wanted=set(sample_keys(dataset)), remove=True)
    assert found.samples == 5
    assert Store.open(tmp_path / "s").missing(sample_keys(dataset)) == []


def test_an_unfinished_store_stays_unless_asked_for(shared):
    store, _, _ = shared
    (store / "manifest.json").unlink()
    (store / "notes.txt").write_text("mine")
    before = contents(store)
    assert collect_garbage(store, remove=True).files == ()
    assert contents(store) == before
    found = collect_garbage(store, unfinished=True)
    assert (found.plan, found.samples, found.to_json()["whole"]) == (None, 21, True)
    assert contents(store) == before
    collect_garbage(store, unfinished=True, remove=True)
    assert list(contents(store)) == ["notes.txt"], "what is not of a store is never removed"


def test_an_unfinished_store_goes_with_its_folder_and_a_complete_one_stays(shared, tmp_path):
    store, _, _ = shared
    assert collect_garbage(store, unfinished=True, remove=True).files == ()
    shutil.copytree(store, tmp_path / "t")
    (tmp_path / "t/manifest.json").unlink()
    collect_garbage(tmp_path / "t", unfinished=True, remove=True)
    assert not (tmp_path / "t").exists()
    assert verify(store) == []


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "d/shards").mkdir(parents=True)
    (tmp_path / "d/shards/00000.safetensors").write_text("mine")
    for unfinished in (False, True):
        with pytest.raises(StoreError) as caught:
            collect_garbage(tmp_path / "d", unfinished=unfinished, remove=True)
        assert str(caught.value) == (
            f"{tmp_path / 'd/plan.json'} is missing: expected a store's plan. Type: sidetune store ls"
        )
    assert list(contents(tmp_path / "d")) == ["shards/00000.safetensors"]


def test_a_damaged_shard_that_stays_is_an_error_and_nothing_goes(shared):
    store, _, second = shared
    entry = store / "shards/00004.json"
    entry.write_text("{")
    before = contents(store)
    with pytest.raises(StoreError, match=r"00004\.json is damaged: expected a checksum file, got "):
        collect_garbage(store, wanted=set(sample_keys(second)), remove=True)
    assert contents(store) == before


def test_a_manifest_of_before_is_brought_up_to_date(shared):
    """As a kill between plan and manifest leaves it."""
    store, _, second = shared
    old = (store / "manifest.json").read_text()
    collect_garbage(store, wanted=set(sample_keys(second)), remove=True)
    new = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(old)
    assert len(verify(store)) == 1
    collect_garbage(store, remove=True)
    assert ((store / "manifest.json").read_text(), verify(store)) == (new, [])
    write_manifest(store, Plan.read(store))
    assert (store / "manifest.json").read_text() == new


def test_verify_sees_a_tensor_that_a_shard_lacks(shared):
    store, _, _ = shared
    path = store / "shards/00001.safetensors"
    tensors = load_file(path)
    del tensors["block.2"]
    save_file(tensors, path)
    entry = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**entry, "bytes": path.stat().st_size}))
    seal_again(store)
    [defect] = verify(store)
    assert f"shard {path} " in defect
    assert "'block.2'" in defect or "its header" in defect
    assert "Type the same extract or fit command again" in defect
