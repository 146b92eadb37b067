"""Means of neighbouring patch tokens in their place."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from images import make_folder
from sidetune import build_backbone, fit, load
from sidetune.backbones.pooled import PooledBackbone, _smaller, pooled
from sidetune.backbones.toy import ToyBackbone
from sidetune.data import load_dataset
from sidetune.errors import BackboneError, RequestError, StoreError
from sidetune.extract import extract, sample_keys
from sidetune.features import Tap
from sidetune.keyed import generator
from sidetune.opening import ready_backbone
from sidetune.recipe import Recipe
from sidetune.sources import LiveSource, StoredSource
from tiny_videos import FRAMES, SIZE, video_folder

TAPS = {
    "an image": Tap("block.1", "block", 3, (1, 4, 6), num_prefix=2, cls_index=0),
    "no prefix": Tap("block.1", "block", 3, (1, 2, 2)),
    "a prefix a frame": Tap("block.1", "block", 3, (3, 4, 2), 1, "frame", cls_index=0),
    "a prefix a clip": Tap("block.1", "block", 3, (3, 2, 4), 1, "clip", cls_index=0),
}


def one_by_one(tokens: Tensor, tap: Tap, by: int) -> Tensor:
    """The definition, in loops."""
    time, height, width = tap.grid
    patches = tap.patch_tokens(tokens).reshape(len(tokens), time, height, width, -1)
    units = tokens.reshape(len(tokens), tap.num_units, -1, tokens.shape[2])
    means = [
        patches[:, t, y : y + by, x : x + by].reshape(len(tokens), by * by, -1).mean(1)
        for t in range(time)
        for y in range(0, height, by)
        for x in range(0, width, by)
    ]
    a_unit = len(means) // tap.num_units
    found = []
    for unit in range(tap.num_units):
        found += [units[:, unit, place] for place in range(tap.num_prefix)]
        found += means[unit * a_unit : (unit + 1) * a_unit]
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", TAPS)
def test_is_the_mean_of_each_square(name: str) -> None:
    tap = TAPS[name]
    tokens = torch.randn(2, tap.num_tokens, tap.width, generator=generator(0, "tokens"))
    torch.testing.assert_close(pooled(tokens, tap, 2), one_by_one(tokens, tap, 2))
    half = pooled(tokens.bfloat16(), tap, 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, one_by_one(tokens.bfloat16().float(), tap, 2).bfloat16())


def test_is_another_backbone_whose_taps_have_fewer_tokens() -> None:
    plain, fewer = ToyBackbone(32), build_backbone("toy", size=32, pooled=2)
    assert isinstance(fewer, PooledBackbone)
    images = torch.randn(2, 3, 32, 32, generator=generator(0, "images"))
    features = fewer(images)
    assert features.spec == fewer.spec
    assert [tap.grid for tap in fewer.spec.taps] == [(1, 2, 2)] * len(plain.spec)
    assert fewer.identity.difference(plain.identity) == ["arguments.pooled: 2 here, None there"]
    one = fewer.reading(["block.2"]).giving(torch.bfloat16)
    assert one.spec.names == ("block.2",) and one(images).layers[0].dtype == torch.bfloat16
    torch.testing.assert_close(one(images).layers[0].float(), features["block.2"], rtol=1e-2, atol=1e-2)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"3 and the grid of embedding 4 x 4.* Type: --size 24"):
        build_backbone("toy", size=32, pooled=3)
    tap = Tap("block.1", "block", 3, (2, 4, 4))
    with pytest.raises(BackboneError, match=r"expected a divisor\. Type: --set backbone\.pooled=2"):
        _smaller(tap, 3, [2, 8])  # of a video transformer, whose size is its own
    with pytest.raises(BackboneError, match=r"Type: --set backbone\.pooled=null"):
        _smaller(replace(tap, grid=(2, 5, 5)), 3, [2, 8])
    for by in ("2", 2.0, True):
        with pytest.raises(BackboneError, match=r"expected 2 or more"):
            build_backbone("toy", pooled=by)
    fields = {"backbone": {"pooled": 2}}
    with pytest.raises(RequestError, match=r"backbone is an object\. Give .*PooledBackbone\(backbone, 2\)"):
        ready_backbone(Recipe.build(fields), ToyBackbone(), torch.device("cpu"))
    with pytest.raises(BackboneError, match=r"backbone\.pooled is 1, expected 2 or more"):
        build_backbone("toy", size=32, pooled=1)
    with pytest.raises(BackboneError, match=r"its blocks need all of them\. Type: --set .*pooled=null"):
        build_backbone("toy", size=32, pooled=2).stages()


def test_twice_two_is_four() -> None:
    twice, four = PooledBackbone(PooledBackbone(ToyBackbone(32), 2), 2), PooledBackbone(ToyBackbone(32), 4)
    assert twice.identity == four.identity
    images = torch.randn(2, 3, 32, 32, generator=generator(0, "images"))
    torch.testing.assert_close(twice(images)["block.2"], four(images)["block.2"])


def test_live_features_are_those_of_a_store(tmp_path: Path) -> None:
    dataset = load_dataset(make_folder(tmp_path / "data", 2, 6))
    backbone, keys = PooledBackbone(ToyBackbone(32), 2), sample_keys(dataset)
    stored = StoredSource(extract(dataset, backbone, tmp_path / "store", quiet=True), keys)
    live = LiveSource(dataset, backbone, dtype="fp16", keys=keys, quiet=True)
    for ours, theirs in zip(stored.features([0, 3]).layers, live.features([0, 3]).layers, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_of_clips_at_once_and_of_blocks_on_disk(tmp_path: Path) -> None:
    folder = video_folder(tmp_path / "vjepa2", "vjepa2")
    clips = torch.randn(2, FRAMES, 3, SIZE, SIZE, generator=generator(0, "clips"))
    for runtime in ("eager", "streamed"):
        named = {"weights": folder, "runtime": runtime}
        plain, fewer = build_backbone("hf:a/b", **named), build_backbone("hf:a/b", **named, pooled=2)
        assert fewer.frames == FRAMES and fewer.call_size == plain.call_size
        expected = one_by_one(plain(clips)["block.1"], plain.spec.last, 2)
        torch.testing.assert_close(fewer(clips)["block.1"], expected)


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_a_run_is_trained_and_used_with_fewer_tokens(mode: str, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", 2, 24)
    fields = {"backbone": {"name": "toy", "pooled": 2}, "features": {"mode": mode}, "train": {"epochs": 1}}
    recipe = Recipe.build(fields)
    store = tmp_path / "store" if mode == "stored" else None
    run = fit(data, out=tmp_path / "run", recipe=recipe, store=store, quiet=True)
    predictor = load(tmp_path / "run")
    assert predictor.backbone.spec.last.grid == (1, 2, 2)
    answers = predictor.predict(sorted((data / "class0").iterdir()))
    assert len(answers) == 12 and all(one.label in ("class0", "class1") for one in answers)
    assert run.metrics["side"] == "losa"


def test_its_store_is_smaller_and_its_own(tmp_path: Path) -> None:
    dataset = load_dataset(make_folder(tmp_path / "data", 2, 6))
    plain = extract(dataset, ToyBackbone(32), tmp_path / "plain", quiet=True)
    fewer = extract(dataset, PooledBackbone(ToyBackbone(32), 2), tmp_path / "fewer", quiet=True)
    assert fewer.plan.spec.record_numel() * 17 == plain.plan.spec.record_numel() * 5, (
        "a class token, and 16 or 4"
    )
    with pytest.raises(StoreError, match=r"arguments\.pooled"):
        extract(dataset, PooledBackbone(ToyBackbone(32), 2), tmp_path / "plain", quiet=True)
