import importlib
import shutil
import weakref

import numpy as np
import pytest
import torch

from sidetune import sources
from sidetune.backbones import build_backbone
from sidetune.backbones.base import Backbone
from sidetune.data import load_dataset, pictures
from sidetune.errors import RequestError, StoreError
from sidetune.extract import extract, sample_keys
from sidetune.sources import LiveSource, StoredSource

EXTRACT = importlib.import_module("sidetune.extract")  # the package's attribute is the function


@pytest.fixture(scope="module")
def both(image_folder, tmp_path_factory):
    """The same 60 images, two of them spoilt, from a store of small shards and live."""
    own = tmp_path_factory.mktemp("sources")
    images = shutil.copytree(image_folder, own / "images")
    dataset = load_dataset(images)
    for row in (4, 37):
        dataset.file(row).write_bytes(b"no image")
    backbone = build_backbone("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXTRACT, "SHARD_RECORDS", 13)
        store = extract(dataset, backbone, own / "s", dtype="fp32", quiet=True)
    return StoredSource(store, sample_keys(dataset)), LiveSource(dataset, backbone, quiet=True)


def test_features_are_the_same_stored_and_live(both):
    stored, live = both
    assert stored.spec == live.spec
    rows = [59, 0, 17, 0, *range(20, 55)]  # more than one micro-batch
    for got, expected in zip(stored.features(rows).layers, live.features(rows).layers, strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)
        assert {got.dtype, expected.dtype} == {torch.float32}
        assert not (got.requires_grad or expected.requires_grad)
        assert not (got.is_inference() or expected.is_inference()), (
            "a side's backward must be able to keep it"
        )


def test_a_live_feature_is_rounded_as_the_store_rounds_it(image_folder, tmp_path):
    dataset, backbone = load_dataset(image_folder), build_backbone("toy")
    store = extract(dataset, backbone, tmp_path / "s", dtype="fp16", quiet=True)
    stored = StoredSource(store, sample_keys(dataset))
    live = LiveSource(dataset, backbone, dtype="fp16", quiet=True)
    rows = list(range(len(dataset)))
    for got, expected in zip(live.features(rows).layers, stored.features(rows).layers, strict=True):
        assert got.dtype == expected.dtype == torch.float16
        assert torch.equal(got, expected)
    for got, expected in zip(live.summary().mean, stored.summary().mean, strict=True):
        assert torch.equal(got, expected)


class Own(Backbone):
    """What a user has to write: it reads the taps that it was built with."""

    def __init__(self, inner):
        self.inner = inner
        for name in ("spec", "preprocess", "identity", "variant", "norm", "device"):
            setattr(self, name, getattr(inner, name))

    def __call__(self, images):
        return self.inner(images)

    def to(self, device):
        return self


def test_a_backbone_of_ones_own_trains_live_and_need_not_leave_out_taps(image_folder):
    dataset, toy = load_dataset(image_folder), build_backbone("toy")
    live = LiveSource(dataset, Own(toy), quiet=True)
    expected = LiveSource(dataset, toy, quiet=True).features([3, 1])
    for got, wanted in zip(live.features([3, 1]).layers, expected.layers, strict=True):
        assert torch.equal(got, wanted)
    last = live.spec.select([live.spec.names[-1]])
    (got,) = live.features([3, 1], last).layers
    assert torch.equal(got, expected.layers[-1])


def test_a_live_feature_that_the_type_cannot_hold_is_refused(image_folder):
    backbone = build_backbone("toy")
    backbone.module.blocks[-1].register_forward_hook(lambda module, inputs, output: output * 1e6)
    with pytest.raises(StoreError, match=r"tap 'block\.4' reaches .*more than fp16.*features\.dtype=bf16"):
        LiveSource(load_dataset(image_folder), backbone, dtype="fp16", quiet=True)


def test_summaries_are_the_same_stored_and_live(both):
    stored, live = both
    a, b = stored.summary(), live.summary()
    assert len(a) == len(b) == 60
    for got, expected in zip((*a.mean, *a.cls), (*b.mean, *b.cls), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)
    assert torch.allclose(a.mean_square, b.mean_square, rtol=1e-5)
    assert torch.allclose(a.tap_scale(), b.tap_scale(), rtol=1e-5)


def test_more_statistics_are_the_same_stored_and_live_and_read_once(both, monkeypatch):
    found = [source.richer(("std", "quadrants")) for source in both]
    for stored, live in zip(*(one.more.values() for one in found), strict=True):
        for a, b in zip(stored, live, strict=True):
            assert torch.allclose(a[both[0].valid], b[both[0].valid], rtol=0, atol=1e-4)
    for source, one in zip(both, found, strict=True):
        assert torch.allclose(one.mean[2][0], source.summary().mean[2][0], rtol=0, atol=1e-6)
        monkeypatch.setattr(source, "features", None)  # not asked again
        assert source.richer(("std", "quadrants")) is one
        assert source.richer(()).more == {}


def test_norm_and_skipped_images_are_the_same_stored_and_live(both):
    for source in both:
        assert source.skipped == {
            4: "not an image that Pillow reads",
            37: "not an image that Pillow reads",
        }
        assert np.flatnonzero(~source.valid).tolist() == [4, 37]
        assert source.final_norm.eps == 1e-6
    assert torch.equal(both[0].final_norm.weight, both[1].final_norm.weight)


@pytest.mark.parametrize("size", [7, 32])
def test_batches_are_all_rows_in_order(both, size, monkeypatch):
    monkeypatch.setattr(sources, "MICRO_BATCH", size)
    rows = np.array([3, 50, 9, 8, 7, 33, 2, 1])
    for source in both:
        parts = list(source.batches(rows))
        assert [len(part) for part in parts] == ([7, 1] if size == 7 else [8])
        got = torch.cat([part["block.4"] for part in parts])
        assert torch.allclose(got, source.features(rows.tolist())["block.4"], rtol=0, atol=1e-5)
        assert list(source.batches(rows[:0])) == []


def test_a_few_taps_of_a_source_are_the_same_taps(both):
    for source in both:
        few = source.features([3, 5], source.spec.select(["block.1", "block.3"]))
        assert few.spec.names == ("block.1", "block.3")
        whole = source.features([3, 5])
        assert all(torch.equal(few[name], whole[name]) for name in few.spec.names)


def test_a_live_source_holds_what_is_asked_for_and_once(both, monkeypatch):
    _, live = both
    rows = [0, 1, *range(5, 11)]
    whole = live.features(rows)
    monkeypatch.setattr(pictures, "MICRO_BATCH", 3)
    made, run = [], live._run

    def noted(backbone, images):
        features = run(backbone, images)
        made.append([weakref.ref(layer) for layer in features.layers])
        return features

    monkeypatch.setattr(live, "_run", noted)
    few = live.features(rows, live.spec.select(["block.2", "block.4"]))
    for name in few.spec.names:
        assert torch.allclose(few[name], whole[name], rtol=0, atol=1e-6)
    assert [len(part) for part in made] == [2, 2, 2], "the backbone keeps what is asked for"
    assert not any(layer() is not None for part in made for layer in part)
    one = live.features(rows[:3])
    assert all(layer is ref() for layer, ref in zip(one.layers, made[-1], strict=True)), "nothing is copied"


def test_a_stored_source_reads_only_the_taps_asked_for(both):
    stored, _ = both
    spec = build_backbone("toy", taps=["block.2", "block.4"]).spec
    few = StoredSource(stored.store, stored.keys[0], spec)
    assert few.spec == few.features([0]).spec == few.summary().spec == spec
    assert torch.equal(few.features([5])["block.2"], stored.features([5])["block.2"])
    assert torch.equal(few.summary().mean[1], stored.summary().mean[4])
    with pytest.raises(RequestError, match=r"^no tap named 'ffn\.1'\."):
        StoredSource(stored.store, stored.keys[0], build_backbone("toy", taps=["ffn.1"]).spec)


def test_missing_samples_say_what_to_type(both):
    store = both[0].store
    with pytest.raises(StoreError) as caught:
        StoredSource(store, [both[0].keys[0][0], "class0/new.png@ab"])
    assert str(caught.value) == (
        f"{store.folder} lacks 1 of 2 samples, the first 'class0/new.png@ab' (new, edited, or moved). "
        f"Type: sidetune extract DATA --out {store.folder}"
    )


def test_nothing_of_the_backbone_stays_in_the_autograd_graph(both):
    _, live = both
    layer = live.features([0, 1]).layers[-1]
    weight = torch.ones(32, requires_grad=True)
    (layer * weight).sum().backward()
    assert weight.grad is not None
    assert all(parameter.grad is None for parameter in live.backbone.module.parameters())
