import json

import pytest
import torch

from sidetune.errors import RequestError
from sidetune.features import Features, Spec, Tap

CLIP = Tap("block.1", "block", 3, (2, 2, 3), num_prefix=2, cls_index=1)
FRAME = Tap("block.2", "block", 3, (4, 2, 1), num_prefix=3, prefix_per="frame", cls_index=0)
BARE = Tap("embedding", "embedding", 5, (1, 2, 2))


def features(*taps, batch=3, mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(torch.randn(batch, tap.num_tokens, tap.width, generator=generator) for tap in taps)
    return Features(layers, Spec(taps), mask)


def units_by_loop(tap, tokens):
    """The tokens of each unit, walked one by one: [(prefix tokens, patch tokens), ..] a unit."""
    frames, height, width = tap.grid
    units, patches = (frames, height * width) if tap.prefix_per == "frame" else (1, frames * height * width)
    walk = iter(tokens)
    return [
        ([next(walk) for _ in range(tap.num_prefix)], [next(walk) for _ in range(patches)])
        for _ in range(units)
    ]


@pytest.mark.parametrize(("tap", "units", "tokens"), [(CLIP, 1, 14), (FRAME, 4, 20), (BARE, 1, 4)])
def test_num_tokens_counts_prefix_and_patches_of_every_unit(tap, units, tokens):
    assert (tap.num_units, tap.num_tokens) == (units, tokens)


@pytest.mark.parametrize("tap", [CLIP, FRAME, BARE], ids=lambda tap: tap.name)
def test_patch_tokens_equals_a_naive_loop(tap):
    tokens = features(tap).layers[0]
    expected = [torch.stack([t for _, patches in units_by_loop(tap, one) for t in patches]) for one in tokens]
    assert torch.equal(tap.patch_tokens(tokens), torch.stack(expected))
    assert torch.equal(tap.patch_tokens(tokens[None]), torch.stack(expected)[None]), "leading axes stay"


@pytest.mark.parametrize("tap", [CLIP, FRAME], ids=lambda tap: tap.name)
def test_cls_token_equals_a_naive_loop(tap):
    tokens = features(tap).layers[0]
    expected = [
        torch.stack([prefix[tap.cls_index] for prefix, _ in units_by_loop(tap, one)]).mean(0)
        for one in tokens
    ]
    assert torch.allclose(tap.cls_token(tokens), torch.stack(expected), atol=1e-6)


def test_a_tap_without_class_token_says_what_to_type():
    with pytest.raises(
        RequestError, match=r"^tap 'embedding' has no class token\. Type: --set side\.pool=mean$"
    ):
        BARE.cls_token(torch.zeros(1, 4, 5))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"kind": "blocks"},
            "tap 't' has kind 'blocks'. Did you mean 'block'? Known: attention, block, embedding, ffn, "
            "image.",
        ),
        (
            {"prefix_per": "frames"},
            "tap 't' has prefix_per 'frames'. Did you mean 'frame'? Known: clip, frame.",
        ),
        (
            {"width": 0},
            "tap 't' has width 0, grid (1, 2, 2), num_prefix 1; expected positive sizes and a grid (T, H, W)",
        ),
        ({"grid": (2, 2)}, "tap 't' has width 3, grid (2, 2), num_prefix 1; expected positive sizes"),
        ({"grid": (1, 0, 2)}, "tap 't' has width 3, grid (1, 0, 2), num_prefix 1; expected positive sizes"),
        ({"num_prefix": -1}, "tap 't' has width 3, grid (1, 2, 2), num_prefix -1; expected positive sizes"),
        (
            {"cls_index": 1},
            "tap 't' has cls_index 1 but num_prefix 1; expected None or an index below num_prefix",
        ),
        ({"cls_index": -1}, "tap 't' has cls_index -1 but num_prefix 1"),
    ],
)
def test_a_tap_refuses_what_it_cannot_be(fields, text):
    with pytest.raises(RequestError) as caught:
        Tap(**{"name": "t", "kind": "block", "width": 3, "grid": (1, 2, 2), "num_prefix": 1} | fields)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(("taps", "names"), [((), r"\[\]"), ((BARE, BARE), r"\['embedding', 'embedding'\]")])
def test_a_spec_needs_taps_of_unique_names(taps, names):
    with pytest.raises(RequestError, match=f"^a spec needs at least one tap and unique names, got {names}$"):
        Spec(taps)


def test_a_spec_knows_its_taps():
    spec = Spec((BARE, CLIP, FRAME))
    assert spec.names == ("embedding", "block.1", "block.2")
    assert (len(spec), spec.blocks, spec.last, spec.index("block.2")) == (3, (CLIP, FRAME), FRAME, 2)
    assert spec.record_numel() == 4 * 5 + 14 * 3 + 20 * 3
    assert spec.select(["block.2", "embedding", "block.2"]) == Spec((BARE, FRAME)), "running order, each once"


@pytest.mark.parametrize("ask", [lambda spec: spec.index("blok.1"), lambda spec: spec.select(["blok.1"])])
def test_an_unknown_tap_names_the_nearest(ask):
    with pytest.raises(RequestError) as caught:
        ask(Spec((BARE, CLIP)))
    assert str(caught.value) == "no tap named 'blok.1'. Did you mean 'block.1'? Known: block.1, embedding."


def test_a_spec_survives_json():
    spec = Spec((BARE, CLIP, FRAME))
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_features_refuse_a_wrong_number_of_layers():
    with pytest.raises(RequestError, match=r"^got 1 layers, expected 2 taps$"):
        Features((torch.zeros(2, 4, 5),), Spec((BARE, CLIP)))


@pytest.mark.parametrize("shape", [(2, 14, 4), (2, 13, 3), (3, 14, 3), (14, 3)])
def test_features_refuse_shapes_that_are_not_the_spec(shape):
    with pytest.raises(RequestError) as caught:
        Features((torch.zeros(2, 4, 5), torch.zeros(shape)), Spec((BARE, CLIP)))
    assert str(caught.value) == (
        f"tap 'block.1' has shape {shape}, expected (B, N, D) = (2, 14, 3): grid (2, 2, 3), 2 prefix tokens"
    )


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(3, 14), r"torch.float32 \(3, 14\)"),
        (torch.ones(3, 13).bool(), r"torch.bool \(3, 13\)"),
    ],
)
def test_features_refuse_a_wrong_mask(mask, got):
    with pytest.raises(RequestError, match=rf"^mask is {got}, expected torch.bool \(3, 14\)$"):
        features(CLIP, mask=mask)


def test_select_rows_and_to_keep_spec_and_mask():
    mask = torch.rand(3, 14) > 0.5
    # Equal token counts, so that one mask fits both taps.
    other = Tap("block.9", "block", 2, (2, 2, 3), num_prefix=2, cls_index=1)
    full = features(CLIP, other, mask=mask)
    assert len(full) == 3
    assert full["block.9"] is full.layers[1]

    one = full.select(["block.9"])
    assert (one.spec, one.layers[0], one.mask) == (Spec((other,)), full.layers[1], mask)

    for rows in (torch.tensor([2, 0]), slice(1, 3)):
        some = full.rows(rows)
        assert torch.equal(some["block.1"], full["block.1"][rows])
        assert torch.equal(some.mask, mask[rows])

    half = full.to("cpu", torch.float16)
    assert [layer.dtype for layer in half.layers] == [torch.float16] * 2
    assert half.mask.dtype == torch.bool
    assert torch.equal(half["block.1"], full["block.1"].half())
    assert features(BARE).rows(slice(0, 1)).mask is None
