"""Batches out of memory maps: the bytes that were stored, in memory that is used again."""

import gc
import importlib
import os

import pytest
import torch

from sidetune.backbones import build_backbone
from sidetune.data import load_dataset
from sidetune.data.views import split_key, views
from sidetune.errors import StoreError
from sidetune.extract import extract, sample_keys
from sidetune.features import Spec, Tap
from sidetune.records import ALIGNMENT, KEPT, Buffers
from sidetune.shards import shard_path
from sidetune.store import DTYPES, Store

EXTRACT = importlib.import_module("sidetune.extract")  # the package's attribute is the function
SPEC = Spec((Tap("block.1", "block", 3, (1, 1, 5)), Tap("block.2", "block", 7, (1, 2, 2))))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_batch_holds_the_stored_bytes(pictures, tmp_path, small_shards, dtype):
    dataset = load_dataset(pictures)
    store = extract(dataset, build_backbone("toy"), tmp_path / "s", dtype=dtype, quiet=True)
    keys = sample_keys(dataset)
    chosen = [11, 0, 5, 5, 3]
    batch = store.features([keys[row] for row in chosen])
    places = {
        key: (number, slot) for number, held in enumerate(store.plan.shards) for slot, key in enumerate(held)
    }
    for layer, tap in zip(batch.layers, batch.spec.taps, strict=True):
        assert layer.dtype == DTYPES[dtype]
        expected = [store._records.map(places[keys[row]][0]).tensors[tap.name] for row in chosen]
        for row, got, shard in zip(chosen, layer, expected, strict=True):
            assert torch.equal(got, shard[places[keys[row]][1]])


def test_a_shard_of_another_dtype_than_the_plan_says_is_damaged(pictures, tmp_path):
    dataset = load_dataset(pictures)
    extract(dataset, build_backbone("toy"), tmp_path / "s", dtype="fp16", quiet=True)
    store = Store.open(tmp_path / "s")
    store._records.dtype = torch.bfloat16  # as many bytes, and other numbers
    with pytest.raises(
        StoreError, match=r"damaged: 'embedding' is torch.float16, expected torch.bfloat16. Type "
    ):
        store.features(sample_keys(dataset)[:1])


def test_memory_is_used_again_when_nobody_holds_it():
    buffers = Buffers()
    first = buffers.layers(4, SPEC, torch.float16)
    address = first[0].data_ptr()
    second = buffers.layers(4, SPEC, torch.float16)
    assert second[0].data_ptr() != address
    del first
    assert buffers.layers(4, SPEC, torch.float16)[0].data_ptr() == address
    assert buffers.layers(2, SPEC, torch.float16)[0].data_ptr() == address, "a smaller batch fits, too"


@pytest.mark.parametrize(
    "hold", [lambda t: t[1:], lambda t: t.view(-1), lambda t: torch.from_numpy(t.numpy())]
)
def test_memory_that_is_still_seen_is_not_written_over(hold):
    buffers = Buffers()
    layers = buffers.layers(4, SPEC, torch.float16)
    layers[1].fill_(1.0)
    held = hold(layers[1])
    before = held.clone()
    del layers
    for _ in range(3):
        for layer in buffers.layers(4, SPEC, torch.float16):
            layer.fill_(7.0)
    assert torch.equal(held, before)


def test_memory_that_a_graph_holds_is_not_written_over():
    buffers, weight = Buffers(), torch.ones(3, requires_grad=True)
    layer = buffers.layers(2, SPEC, torch.float32)[0].fill_(2.0)
    loss = (layer * weight).sum()
    del layer
    gc.collect()
    buffers.layers(2, SPEC, torch.float32)[0].fill_(9.0)
    loss.backward()
    assert weight.grad.tolist() == [20.0] * 3


def test_few_buffers_are_kept_and_all_begin_where_torch_begins_its_own():
    buffers = Buffers()
    batches = [buffers.layers(3, SPEC, torch.float16) for _ in range(KEPT + 3)]
    assert len(buffers._kept) == KEPT
    assert len({layer.data_ptr() for batch in batches for layer in batch}) == 2 * len(batches)
    assert all(layer.data_ptr() % ALIGNMENT == 0 for batch in batches for layer in batch)
    assert [layer.shape for layer in buffers.layers(0, SPEC, torch.float16)] == [(0, 5, 3), (0, 4, 7)]
    del batches
    big = buffers.layers(300, SPEC, torch.float16)
    assert len(buffers._kept) == 1 and len(big[0]) == 300, "those that have become too small are let go"


def test_the_bytes_of_taps_are_asked_for_and_no_others(pictures, tmp_path, small_shards, monkeypatch):
    dataset = load_dataset(pictures)
    store = extract(dataset, build_backbone("toy"), tmp_path / "s", quiet=True)
    keys = sample_keys(dataset)
    layout = store.layout(keys, store.plan.spec.select(["block.4"]))
    assert layout.num_bytes == {0: 5 * 17 * 32 * 2, 1: 5 * 17 * 32 * 2, 2: 2 * 17 * 32 * 2}
    assert [keys[row] in store.plan.shards[number] for row, number in enumerate(layout.shards)] == [True] * 12
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: asked.append(given[1:]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    layout.fetch([0, 2])
    assert len(asked) == 2
    for number, (first, length, advice) in zip([0, 2], asked, strict=True):
        stored = store._records.map(number).tensors["block.4"].flatten().view(torch.uint8).numpy().tobytes()
        assert shard_path(store.folder, number).read_bytes()[first : first + length] == stored
        assert advice == os.POSIX_FADV_WILLNEED


def test_a_system_that_cannot_be_asked_is_not(pictures, tmp_path, monkeypatch):
    dataset = load_dataset(pictures)
    extract(dataset, build_backbone("toy"), tmp_path / "s", quiet=True)
    store = Store.open(tmp_path / "s")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    store.layout(sample_keys(dataset)).fetch([0])
    assert store._records._maps == {}


def test_a_store_in_the_order_of_paths_is_known(pictures, tmp_path, small_shards, monkeypatch):
    dataset = load_dataset(pictures)
    keys = sample_keys(dataset)
    new = extract(dataset, build_backbone("toy"), tmp_path / "new", views=views(1), quiet=True)
    assert new.layout(keys).by_hash
    monkeypatch.setattr(EXTRACT, "place_by_hash", lambda key: key)  # as it was once
    old = extract(dataset, build_backbone("toy"), tmp_path / "old", quiet=True)
    assert not old.layout(keys).by_hash


def test_shards_mix_the_classes_of_sorted_files_and_keep_views_together(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(EXTRACT, "SHARD_RECORDS", 30)
    dataset = load_dataset(image_folder)
    store = extract(dataset, build_backbone("toy"), tmp_path / "s", views=views(2), quiet=True)
    assert len(store.plan.shards) == 6
    for shard in store.plan.shards:
        samples = [split_key(key)[0] for key in shard]
        assert {key.split("/")[0] for key in samples} == {"class0", "class1", "class2"}
        assert len(set(samples)) == 10, "three views of each"
