import weakref

import numpy as np
import pytest
import torch

from sidetune.features import Features, Spec, Tap
from sidetune.summary import Summary, gathered, over_time, summarise

SHAPE = {"width": 6, "grid": (2, 2, 2), "num_prefix": 2}
CLIP = (
    Tap("embedding", "embedding", **SHAPE),
    Tap("block.1", "block", **SHAPE, cls_index=1),
    Tap("block.2", "block", **{**SHAPE, "width": 4}, cls_index=0),
)
FRAME = tuple(
    Tap(tap.name, tap.kind, tap.width, tap.grid, 2, prefix_per="frame", cls_index=tap.cls_index)
    for tap in CLIP
)


def features(taps, *, masked, batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(
        10.0**scale * (torch.randn(batch, tap.num_tokens, tap.width, generator=generator) + 0.5)
        for scale, tap in enumerate(taps)
    )
    mask = None
    if masked:
        mask = torch.rand(batch, taps[0].num_tokens, generator=generator) > 0.4
        mask[:, -1] = True  # at least one patch token counts
    return Features(layers, Spec(taps), mask)


def oracle(layer, tap, mask):
    """One sample at a time, one token at a time, float64: mean of patches, class token, mean square."""
    frames, height, width = tap.grid
    units, patches = (frames, height * width) if tap.prefix_per == "frame" else (1, frames * height * width)
    is_prefix = ([True] * tap.num_prefix + [False] * patches) * units
    means, classes, squares = [], [], []
    for tokens, counts in zip(layer.double().numpy(), mask.numpy(), strict=True):
        inside = [t for t, prefix, c in zip(tokens, is_prefix, counts, strict=True) if c and not prefix]
        means.append(sum(inside) / len(inside))
        squares.append(np.mean([t**2 for t, c in zip(tokens, counts, strict=True) if c]))
        if tap.cls_index is not None:
            starts = range(0, len(tokens), tap.num_prefix + patches)
            classes.append(sum(tokens[start + tap.cls_index] for start in starts) / units)
    return np.array(means), np.array(classes), np.array(squares)


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "mask"])
@pytest.mark.parametrize("taps", [CLIP, FRAME], ids=["clip", "frame"])
def test_summary_equals_a_float64_oracle(taps, masked):
    batch = features(taps, masked=masked)
    summary = summarise(batch)
    everything = torch.ones(len(batch), taps[0].num_tokens)
    for i, (layer, tap) in enumerate(zip(batch.layers, taps, strict=True)):
        mean, cls, square = oracle(layer, tap, everything if batch.mask is None else batch.mask)
        scale = 10.0**i
        np.testing.assert_allclose(summary.mean[i].numpy(), mean, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(summary.mean_square[:, i].numpy(), square, rtol=1e-5)
        if tap.cls_index is None:
            assert summary.cls[i].shape == (5, 0)
        else:
            np.testing.assert_allclose(summary.cls[i].numpy(), cls, rtol=0, atol=1e-5 * scale)
        assert {summary.mean[i].dtype, summary.cls[i].dtype, summary.mean_square.dtype} == {torch.float32}


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "mask"])
@pytest.mark.parametrize("taps", [CLIP, FRAME], ids=["clip", "frame"])
def test_more_statistics_equal_a_float64_oracle(taps, masked):
    batch = features(taps, masked=masked)
    summary = summarise(batch, ("std", "quadrants"))
    counts = torch.ones(len(batch), taps[0].num_tokens) if batch.mask is None else batch.mask
    for i, (layer, tap) in enumerate(zip(batch.layers, taps, strict=True)):
        patches = tap.patch_tokens(layer).double().numpy().reshape(5, 2, 2, 2, -1)  # (B, T, H, W, D)
        kept = tap.patch_tokens(counts[..., None]).numpy().reshape(5, 2, 2, 2).astype(bool)
        for sample in range(5):
            std = patches[sample][kept[sample]].std(0)
            np.testing.assert_allclose(summary.more["std"][i][sample], std, atol=1e-5 * 10**i)
            for number, (row, column) in enumerate(np.ndindex(2, 2)):
                inside = patches[sample, :, row, column][kept[sample, :, row, column]]
                found = summary.more["quadrants"][i][sample].reshape(4, -1)[number]
                expected = inside.mean(0) if len(inside) else np.zeros(tap.width)
                np.testing.assert_allclose(found, expected, atol=1e-5 * 10**i)


def test_odd_sides_share_their_middle_among_quadrants():
    tap = Tap("block.1", "block", 1, (1, 3, 1))
    found = summarise(Features((torch.tensor([[[1.0], [2.0], [6.0]]]),), Spec((tap,))), ("quadrants",))
    assert found.more["quadrants"][0].tolist() == [[1.5, 1.5, 4.0, 4.0]]


def test_half_precision_is_pooled_in_float32():
    batch = features(CLIP, masked=False).to("cpu", torch.float16)
    expected = summarise(batch.to("cpu", torch.float32))
    for got, wanted in zip(summarise(batch).mean, expected.mean, strict=True):
        assert torch.equal(got, wanted)


def test_tap_scale_is_rms_of_the_last_tap_over_rms_of_each():
    batch = features(CLIP, masked=False)
    rms = [np.sqrt(np.mean(layer.double().numpy() ** 2)) for layer in batch.layers]
    scale = summarise(batch).tap_scale()
    np.testing.assert_allclose(scale.numpy(), [rms[-1] / r for r in rms], rtol=1e-5)
    assert scale.dtype == torch.float32
    assert scale[-1] == 1.0


def test_tap_scale_of_a_tap_of_zeros_is_finite():
    batch = features(CLIP, masked=False)
    dead = Features((torch.zeros_like(batch.layers[0]), *batch.layers[1:]), batch.spec)
    assert summarise(dead).tap_scale().isfinite().all()


def test_pooled_gives_mean_cls_or_both():
    summary = summarise(features(CLIP, masked=False))
    assert torch.equal(summary.pooled("block.1", "mean"), summary.mean[1])
    assert torch.equal(summary.pooled("block.1", "cls"), summary.cls[1])
    assert torch.equal(summary.pooled("block.1", "cls+mean"), torch.cat([summary.cls[1], summary.mean[1]], 1))
    no_cls = summary.pooled("embedding", "cls+mean")
    assert torch.equal(no_cls, summary.mean[0]), "without a class token the mean alone"


def test_rows_and_gathered_are_inverse():
    summary = summarise(features(CLIP, masked=True), ("std",))
    parts = [summary.rows(torch.tensor(rows)) for rows in ([0, 1], [2], [3, 4])]
    assert [len(part) for part in parts] == [2, 1, 2]
    again = gathered(iter(parts), len(summary))
    assert (again.spec, len(again)) == (summary.spec, 5)
    columns = ((*one.mean, *one.cls, *one.more["std"]) for one in (again, summary))
    for got, wanted in zip(*columns, strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(again.mean_square, summary.mean_square)


def test_gathered_lets_each_part_go_before_it_asks_for_the_next():
    """Small parts that outlive their batches keep the heap between them from being joined: gigabytes."""
    batch = features(CLIP, masked=False)
    earlier: list[weakref.ref[Summary]] = []

    def parts():
        for _ in range(3):
            alive = [ref for ref in earlier if ref() is not None]
            assert len(alive) <= 1, "the one that the caller's loop still names"
            part = summarise(batch)
            earlier.append(weakref.ref(part))
            yield part
            del part

    assert len(gathered(parts(), 3 * len(batch))) == 3 * len(batch)


def test_select_keeps_only_the_taps_asked_for():
    summary = summarise(features(CLIP, masked=False), ("quadrants",))
    few = summary.select(summary.spec.select(["block.2", "embedding"]))
    assert few.spec.names == ("embedding", "block.2")
    assert torch.equal(few.mean[1], summary.mean[2])
    assert torch.equal(few.cls[1], summary.cls[2])
    assert torch.equal(few.more["quadrants"][1], summary.more["quadrants"][2])
    assert torch.equal(few.mean_square, summary.mean_square[:, [0, 2]])


@pytest.mark.parametrize("taps", [CLIP, FRAME], ids=["clip", "frame"])
def test_a_summary_does_not_keep_the_features(taps):
    """A view would keep a batch's features as long as its summary lives."""
    given = features(taps, masked=False)
    found = summarise(given, ("std", "quadrants"))
    kept = [*found.mean, *found.cls, found.mean_square, *found.more["std"], *found.more["quadrants"]]
    theirs = {layer.untyped_storage().data_ptr() for layer in given.layers}
    for tensor in kept:
        storage = tensor.untyped_storage()
        assert storage.data_ptr() not in theirs
        assert storage.nbytes() == tensor.nbytes


def test_the_summary_of_clips_is_the_mean_of_their_frames():
    frames = [summarise(features(FRAME, masked=False, seed=seed)) for seed in range(3)]
    before = frames[0].mean[0].clone()
    found = over_time(iter(frames), frames[0].spec)
    for name in ("mean", "cls"):
        for at, tensor in enumerate(getattr(found, name)):
            expected = torch.stack([getattr(one, name)[at] for one in frames]).double().mean(0)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)
    expected = torch.stack([one.mean_square for one in frames]).mean(0)
    torch.testing.assert_close(found.mean_square, expected)
    assert torch.equal(frames[0].mean[0], before), "what it is of stays"
