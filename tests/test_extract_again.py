"""Extracting again: what is new is added, what was interrupted goes on, what is damaged is mended."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import sidetune.shards
from extracting import FEW, bring, contents, in_shard_order, toy
from images import make_folder
from sidetune.data import Dataset, load_dataset
from sidetune.errors import StoreError
from sidetune.extract import extract, sample_keys
from sidetune.shards import is_written
from sidetune.store import Plan, Store


def test_extracting_again_changes_nothing(pictures, tmp_path, small_shards):
    bring(pictures, tmp_path / "s")
    before = contents(tmp_path / "s")
    bring(pictures, tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_relabelling_and_another_split_never_extract_again(pictures, tmp_path):
    dataset, _ = bring(pictures, tmp_path / "s")
    before = contents(tmp_path / "s")
    relabelled = replace(dataset, targets=(dataset.targets + 1) % 3, split=dataset.split[::-1].copy())
    extract(relabelled, toy(), tmp_path / "s", dtype="fp32", quiet=True)
    assert contents(tmp_path / "s") == before


def test_new_files_go_into_new_shards_and_keep_the_labels_first_seen(own, tmp_path, small_shards):
    dataset, old = bring(own, tmp_path / "s")
    shards = contents(tmp_path / "s", "shards/*")
    make_folder(own / "new", 1, 2, seed=9)
    for number, file in enumerate(sorted((own / "new/class0").iterdir())):
        file.rename(own / f"class{number}/another{number}.png")
    shutil.rmtree(own / "new")
    grown = load_dataset(own)
    store = extract(replace(grown, outputs=("a", "b", "c")), toy(), tmp_path / "s", dtype="fp32", quiet=True)

    assert [len(shard) for shard in store.plan.shards] == [5, 5, 2, 2]
    assert store.plan.shards[:3] == old.plan.shards
    after = contents(tmp_path / "s", "shards/*")
    assert {name: after[name] for name in shards} == shards
    labels = [sample["label"] for sample in json.loads((tmp_path / "s/manifest.json").read_text())["samples"]]
    first_seen = dict(zip(sample_keys(load_dataset(own)), grown.targets, strict=True))
    keys = [key for shard in old.plan.shards for key in shard]
    assert labels[:FEW] == [dataset.outputs[int(first_seen[key])] for key in keys]
    assert sorted(labels[FEW:]) == ["a", "b"]
    assert store.valid(sample_keys(grown)).all()


def test_an_edited_image_under_the_same_path_is_a_new_sample(own, tmp_path):
    dataset, old = bring(own, tmp_path / "s")
    before = sample_keys(dataset)
    shutil.copy(own / dataset.paths[5], own / dataset.paths[4])
    _, store = bring(own, tmp_path / "s")
    after = sample_keys(dataset)
    assert [row for row in range(FEW) if before[row] != after[row]] == [4]
    assert store.num_records == FEW + 1
    edited, source = store.features([after[4], after[5]])["block.4"]
    assert torch.allclose(edited, source, atol=1e-5)
    assert torch.equal(store.features([before[4]])["block.4"], old.features([before[4]])["block.4"])


def interrupted(images, folder, batches):
    """Extract until the backbone has run `batches` times, then fail as a cut cable would."""
    backbone = toy()
    calls = iter(range(batches))

    class Cut:
        def giving(self, dtype):
            return self

        def __getattr__(self, name):
            return getattr(backbone, name)

        def __call__(self, pixels):
            if next(calls, None) is None:
                raise ConnectionError
            return backbone(pixels)

    with pytest.raises(ConnectionError):
        bring(images, folder, backbone=Cut())


@pytest.mark.parametrize("batches", [0, 2, 4, 6])
def test_bytes_do_not_depend_on_where_it_was_interrupted(pictures, tmp_path, small_shards, batches):
    bring(pictures, tmp_path / "whole")
    interrupted(pictures, tmp_path / "s", batches)
    with pytest.raises(
        StoreError, match=r"is not complete\. Type the same extract command again: it resumes"
    ):
        Store.open(tmp_path / "s")
    finished = contents(tmp_path / "s", "shards/*")
    bring(pictures, tmp_path / "s")

    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "s")
    assert {name: digest for name, (digest, _) in resumed.items()} == {
        name: digest for name, (digest, _) in whole.items()
    }
    assert {name: resumed[name] for name in finished} == finished, "finished shards are not written again"


def test_a_photo_deleted_before_resuming_is_planned_away(own, tmp_path, small_shards):
    interrupted(own, tmp_path / "s", 4)  # the first shard of three is written
    dataset = load_dataset(own)
    first = contents(tmp_path / "s", "shards/00000.*")
    (own / in_shard_order(sample_keys(dataset))[7].rpartition("@")[0]).unlink()
    shrunk, store = bring(own, tmp_path / "s")
    assert len(shrunk) == store.num_records == FEW - 1
    assert contents(tmp_path / "s", "shards/00000.*") == first
    assert [len(shard) for shard in store.plan.shards] == [5, 5, 1]


def test_a_resumed_extraction_must_read_the_same_taps(pictures, tmp_path, small_shards):
    interrupted(pictures, tmp_path / "s", 4)
    before = contents(tmp_path / "s")
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s", backbone=toy(taps=["block.4"]))
    assert str(caught.value) == (
        f"{tmp_path / 's'} lacks 7 of these samples and cannot be extended: it holds 5 taps, the backbone "
        "reads 1. Type: fit --store OTHER, or extract --out OTHER"
    )
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize("complete", [True, False])
def test_a_store_of_another_precision_is_never_read_silently(pictures, tmp_path, small_shards, complete):
    if complete:
        bring(pictures, tmp_path / "s")
    else:
        interrupted(pictures, tmp_path / "s", 4)
    with pytest.raises(StoreError) as caught:
        bring(pictures, tmp_path / "s", backbone=toy(precision="bf16"))
    assert str(caught.value) == (
        f"{tmp_path / 's'} holds features computed in fp32, asked for bf16. Type: --set "
        "backbone.precision=fp32, or fit --store OTHER, or extract --out OTHER"
    )


@pytest.mark.parametrize("damage", ["missing", "cut short", "no checksum file"])
def test_extracting_again_mends_a_damaged_shard_and_only_that(pictures, tmp_path, small_shards, damage):
    bring(pictures, tmp_path / "s")
    before = contents(tmp_path / "s")
    shard = tmp_path / "s/shards/00001.safetensors"
    if damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "no checksum file":
        shard.with_suffix(".json").unlink()
    else:
        shard.unlink()
    bring(pictures, tmp_path / "s")
    after = contents(tmp_path / "s")
    assert {name: digest for name, (digest, _) in after.items()} == {
        name: digest for name, (digest, _) in before.items()
    }
    for name in ("shards/00000.safetensors", "shards/00002.safetensors"):
        assert after[name] == before[name]


def test_an_old_checksum_file_does_not_vouch_for_a_shard_written_anew(
    pictures, tmp_path, small_shards, monkeypatch
):
    bring(pictures, tmp_path / "s")
    shard = tmp_path / "s/shards/00001.safetensors"
    whole = shard.stat().st_size
    shard.write_bytes(b"cut short")

    def cut(path, value):
        raise ConnectionError(path)

    with monkeypatch.context() as patch, pytest.raises(ConnectionError, match=r"00001\.json"):
        patch.setattr(sidetune.shards, "write_json", cut)
        bring(pictures, tmp_path / "s")
    assert shard.stat().st_size == whole, "the new shard stands there, of the length of the old one"
    assert not is_written(tmp_path / "s", 1, Plan.read(tmp_path / "s").claim(1))


def test_a_damaged_shard_of_other_data_is_not_forgotten(own, tmp_path, small_shards):
    dataset, _ = bring(own, tmp_path / "s")
    shard = tmp_path / "s/shards/00000.safetensors"
    shard.unlink()
    rows = np.arange(6, FEW)
    rest = Dataset(
        own, dataset.paths[6:], "classify", dataset.targets[rows], dataset.outputs, dataset.split[rows]
    )
    with pytest.raises(StoreError) as caught:
        extract(rest, toy(), tmp_path / "s", dtype="fp32", quiet=True)
    assert str(caught.value) == (
        f"shard {shard} is damaged, and only the data that it was extracted from can mend it. "
        "Type: extract that data again, or fit --store OTHER, or extract --out OTHER"
    )
