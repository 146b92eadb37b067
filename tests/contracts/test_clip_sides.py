"""Side networks on clips: T frames of S tokens each, a class token a frame."""

from math import erf, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetune.errors import SideError
from sidetune.features import Features, Spec, Tap
from sidetune.keyed import Draws, generator
from sidetune.sides import SIDES
from sidetune.sides.base import Side, pool_tokens
from sidetune.sides.last import LAYER_NORM_EPS

Array = NDArray[np.float64]
WIDTH, BLOCKS, FRAMES, PER_FRAME, BATCH = 6, 3, 4, 5, 3
gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / sqrt(2))))
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "losa": ("losa", {"rank": 2}),
    "losa token->channel": ("losa", {"rank": 2, "order": "token->channel"}),
    "losa parallel": ("losa", {"rank": 2, "order": "parallel", "a": 0.7}),
    "last": ("last", {"rank": 4}),
    "last 2 heads": ("last", {"rank": 4, "heads": 2}),
    "last cls": ("last", {"rank": 4, "pool": "cls"}),
}
LAST = [name for name, (side, _) in ROWS.items() if side == "last"]


def clip_spec(prefix_per: Any = "frame", num_prefix: int = 1) -> Spec:
    def tap(name: str, kind: Any) -> Tap:
        cls = 0 if num_prefix else None
        return Tap(name, kind, WIDTH, (FRAMES, 2, 2), num_prefix, prefix_per, cls)

    return Spec((tap("embedding", "embedding"), *(tap(f"block.{i}", "block") for i in range(1, BLOCKS + 1))))


def features(*, masked: bool = False, dtype: torch.dtype = torch.float64) -> Features:
    spec, keyed = clip_spec(), generator(0, "clips")
    shape = (BATCH, FRAMES * PER_FRAME, WIDTH)
    layers = tuple(torch.randn(shape, generator=keyed, dtype=torch.float64).to(dtype) for _ in spec.taps)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    mask[1:, 13:] = False
    mask[1, 13] = True  # one token of the third frame, and of the last none
    mask[1, 15] = True
    mask[2, 15:] = True
    return Features(layers, spec, mask if masked else None)


def drawn(name: str, members: int = 2, **more: Any) -> Side:
    """Every parameter non-zero, up-projections too."""
    side, arguments = ROWS[name]
    made = SIDES[side](clip_spec(), members=members, **{**arguments, **more}).double()
    keyed = generator(0, "parameters")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
        made.tap_scale.copy_(torch.linspace(0.5, 1.5, len(made.tap_scale)))
    return made


def losa_oracle(taps: list[Array], own: dict[str, Array], order: str, a: float) -> Array:
    """y_L of one clip and member from b_1 .. b_L, each (T, S, D)."""

    def channel(x: Array, layer: int) -> Array:
        return a * gelu(x @ own[f"channel.{layer}.down_MDR"]) @ own[f"channel.{layer}.up_MRD"]

    def space(x: Array, layer: int) -> Array:
        down, up = own[f"token.{layer}.down_MRN"], own[f"token.{layer}.up_MNR"]
        return np.stack([a * up @ gelu(down @ frame) for frame in x])

    def time(x: Array, layer: int) -> Array:
        z = x @ own[f"time.{layer}.down_MDR"]
        out = np.zeros((*x.shape[:2], z.shape[2]))
        for place in range(x.shape[1]):
            code = gelu(own[f"time.{layer}.time_down_MQT"] @ z[:, place])
            out[:, place] = a * own[f"time.{layer}.time_up_MTQ"] @ code
        return out @ own[f"time.{layer}.up_MRD"]

    y = taps[-1]
    for layer, b in enumerate(taps):
        h = b + y
        if order == "channel->token":
            c = channel(h, layer)
            s = space(h + c, layer)
            u = time(h + c + s, layer)
        elif order == "token->channel":
            s = space(h, layer)
            u = time(h + s, layer)
            c = channel(h + s + u, layer)
        else:
            c, s, u = channel(h, layer), space(h, layer), time(h, layer)
        y = y + c + s + u
    return y


def last_oracle(taps: list[Array], own: dict[str, Array], heads: int) -> Array:
    """The final tokens of one clip and member from z_0 .. z_L, each (T, S, D)."""

    def attention(x: Array, name: str, places: Array | float = 0.0) -> Array:
        centred = x - x.mean(1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + LAYER_NORM_EPS)
        normed = normed * own[f"{name}.norm_weight_MD"] + own[f"{name}.norm_bias_MD"] + places
        q, k, v = np.split(normed @ own[f"{name}.qkv_MDR"], 3, axis=1)
        mixed = np.zeros_like(q)
        for head in np.split(np.arange(q.shape[1]), heads):
            weights = np.exp(q[:, head] @ k[:, head].T / np.sqrt(q.shape[1] / heads))
            mixed[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head]
        return mixed @ own[f"{name}.out_MRD"]

    places = np.zeros(taps[0].shape[::2])
    for t in range(len(places)):
        for d in range(WIDTH):
            angle = t / 10_000 ** (d // 2 * 2 / WIDTH)
            places[t, d] = np.cos(angle) if d % 2 else np.sin(angle)
    u, out = np.zeros_like(taps[0]), taps[-1]
    for i, z in enumerate(taps):
        v = u + z
        space = np.stack([attention(frame, f"attention.{i}") for frame in v])
        v = v + space
        time = np.stack(
            [attention(v[:, s], f"time_attention.{i}", places) for s in range(v.shape[1])], axis=1
        )
        u, out = v + time, out + space + time
    return out


@pytest.mark.parametrize("name", [name for name in ROWS if name != "last cls"])
def test_equals_the_equations_of_one_clip(name: str) -> None:
    side = drawn(name, pool="tokens")
    given = features()
    found = side(given).detach().numpy()
    scale = side.tap_scale.tolist()
    for member in range(2):
        own = {key: value[member].detach().numpy() for key, value in side.named_parameters()}
        for clip in range(BATCH):
            taps = [
                factor * layer[clip].view(FRAMES, PER_FRAME, WIDTH).numpy()
                for factor, layer in zip(scale, given.layers, strict=True)
            ]
            if name.startswith("losa"):
                arguments = ROWS[name][1]
                order, a = arguments.get("order", "channel->token"), arguments.get("a", 1.0)
                expected = losa_oracle(taps[1:], own, order, a)
            else:
                expected = last_oracle(taps, own, ROWS[name][1].get("heads", 1))
            np.testing.assert_allclose(found[member, clip], expected.reshape(-1, WIDTH), rtol=0, atol=1e-8)


def outputs_and_gradients(side: Side, given: Features) -> dict[str, Tensor]:
    out = side.train()(given, Draws((3, 4)))
    weight = torch.randn(out.shape, generator=generator(1, "loss"), dtype=torch.float64)
    (out * weight).sum().backward()
    found = {"output": out.detach()}
    for key, parameter in side.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
        found[key] = parameter.grad
    return found


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_the_fast_form_equals_the_textbook_form(name: str, masked: bool, drop_path: float) -> None:
    given = features(masked=masked)
    expected, found = (
        outputs_and_gradients(drawn(name, form=form, drop_path=drop_path), given)
        for form in ("textbook", "fast")
    )
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("pool", ["mean", "all", "cls+mean"])
def test_the_fast_form_in_pieces_equals_the_textbook_form(monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    """A clip, a member and a layer at a time."""
    monkeypatch.setattr("sidetune.sides.losa_fast.BLOCK_ROWS", 2)
    monkeypatch.setattr("sidetune.sides.losa_fast.MOST_MEMBERS", 1)
    one_by_one = lambda batch, *_: [slice(clip, clip + 1) for clip in range(batch)]  # noqa: E731
    monkeypatch.setattr("sidetune.sides.losa_fast.over_rows", one_by_one)
    rates = [0.4, 0.0]
    for name, given in (("losa", features()), ("losa token->channel", features(masked=True))):
        expected, found = (
            outputs_and_gradients(drawn(name, form=form, drop_path=rates, pool=pool), given)
            for form in ("textbook", "fast")
        )
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("first_state", ["b_L", "z_0", "zero"])
def test_the_fast_form_in_float32_by_large_products(
    monkeypatch: pytest.MonkeyPatch, first_state: str
) -> None:
    monkeypatch.setattr("sidetune.sides.products.WIDE", 1)
    exact = outputs_and_gradients(drawn("losa", form="textbook", first_state=first_state), features())
    side = drawn("losa", first_state=first_state).float()
    found = outputs_and_gradients(side, features(dtype=torch.float32))
    for key, value in exact.items():
        assert (found[key] - value).norm() <= 1e-5 * value.norm(), key
    with torch.inference_mode():
        torch.testing.assert_close(side(features(dtype=torch.float32)), found["output"].float())


@pytest.mark.parametrize("name", ["losa", "last"])
def test_it_starts_as_the_probe(name: str) -> None:
    side, arguments = ROWS[name]
    made = SIDES[side](clip_spec(), **arguments).double()
    made.start([0])
    given = features()
    expected = pool_tokens(given["block.3"], made.out, "mean")
    torch.testing.assert_close(made(given)[0], expected)
    out = made(given)
    out.square().sum().backward()
    learns = {key for key, parameter in made.named_parameters() if parameter.grad.any()}
    last_ups = {key for key in learns if "up_MRD" in key or "up_MNR" in key or "out_MRD" in key}
    assert learns == last_ups and len(learns) == (3 * BLOCKS if side == "losa" else 2 * (BLOCKS + 1))


def test_counts_equal_the_formulas() -> None:
    losa, last = drawn("losa"), drawn("last")
    assert losa.num_parameters() == 2 * 2 * BLOCKS * (2 * WIDTH + PER_FRAME) + 2 * BLOCKS * FRAMES * 2
    assert last.num_parameters() == 2 * (BLOCKS + 1) * (4 * WIDTH * 4 + 2 * WIDTH)
    joint = drawn("losa", time="joint")
    assert joint.num_parameters() == 2 * 2 * BLOCKS * (WIDTH + FRAMES * PER_FRAME)


@pytest.mark.parametrize("name", ROWS)
def test_the_order_of_frames_matters(name: str) -> None:
    """The frames come out of an image backbone, which knows no order."""
    side, given = drawn(name), features()
    turned = tuple(
        layer.unflatten(1, (FRAMES, PER_FRAME)).flip(1).flatten(1, 2).contiguous() for layer in given.layers
    )
    before, after = side(given), side(Features(turned, given.spec))
    assert (before - after).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("name", ["losa", "last", "last 2 heads"])
def test_members_are_as_they_are_alone(name: str) -> None:
    both, given = drawn(name), features(masked=True)
    for member in range(2):
        alone = drawn(name, members=1)
        with torch.no_grad():
            for own, parameter in zip(alone.parameters(), both.parameters(), strict=True):
                own.copy_(parameter[member : member + 1])
        torch.testing.assert_close(alone(given)[0], both(given)[member], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(SIDES))
def test_every_side_reads_clips(name: str) -> None:
    more = {"ladder": {"reduction": 2, "heads": 1}, "fusion": {"heads": 2}}.get(name, {})
    side = SIDES[name](clip_spec(), **more)  # type: ignore[arg-type]
    side.start([0])
    out = side.double()(features())
    assert out.shape == (1, BATCH, side.width) and out.isfinite().all()


def test_prefix_tokens_of_a_clip_are_of_no_frame() -> None:
    for name in ("losa", "last"):
        with pytest.raises(
            SideError, match=r"1 prefix tokens a clip, which are of no frame.*side.time=joint"
        ):
            SIDES[name](clip_spec("clip"))
        assert SIDES[name](clip_spec("clip"), time="joint").spec.last.num_tokens == 17  # type: ignore[call-arg]
        assert SIDES[name](clip_spec("clip", 0)).frames == FRAMES  # type: ignore[attr-defined]
        with pytest.raises(SideError, match="time is 'both'"):
            SIDES[name](clip_spec(), time="both")  # type: ignore[call-arg]
