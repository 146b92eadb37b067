"""LST against a float64 numpy oracle: gate, blend and blocks written token by token."""

from math import erf, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.ladder import LAYER_NORM_EPS, Ladder

Array = NDArray[np.float64]
gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / sqrt(2))))


def norm(x: Array, own: dict[str, Array], name: str) -> Array:
    centred = x - x.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + LAYER_NORM_EPS)
    return normed * own[f"{name}.weight_MD"] + own[f"{name}.bias_MD"]


def block(s: Array, own: dict[str, Array], name: str, heads: int, counts: Array) -> Array:
    width = s.shape[1]
    q, k, v = np.split(norm(s, own, f"{name}.norm_attention") @ own[f"{name}.qkv.weight_MIO"], 3, axis=1)
    mixed = np.zeros_like(s)
    for head in np.split(np.arange(width), heads):
        weights = np.exp(q[:, head] @ k[:, head].T / np.sqrt(width / heads)) * counts
        mixed[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head]
    s = s + mixed @ own[f"{name}.out.weight_MIO"]
    hidden = gelu(norm(s, own, f"{name}.norm_mlp") @ own[f"{name}.wide.weight_MIO"])
    return s + hidden @ own[f"{name}.narrow.weight_MIO"]


def oracle(taps: list[Array], own: dict[str, Array], heads: int, keep_last: bool, counts: Array) -> Array:
    """One image, one member, from z_0, b_1 .. b_L; `counts` is 1 at tokens that are keys."""
    s = taps[0] @ own["down.0.weight_MIO"]
    for layer, tap in enumerate(taps[1:]):
        gate = 1 / (1 + np.exp(-own[f"gate.{layer}"] / 0.1))
        s = gate * s + (1 - gate) * (tap @ own[f"down.{layer + 1}.weight_MIO"])
        s = block(s, own, f"block.{layer}", heads, counts)
    return keep_last * taps[-1] + norm(s, own, "norm") @ own["up.weight_MIO"]


@pytest.mark.parametrize(
    ("heads", "keep_last", "masked"), [(1, True, False), (2, False, False), (2, True, True)]
)
def test_equals_the_oracle(heads: int, keep_last: bool, masked: bool) -> None:
    members, batch, width = 2, 3, 8
    taps = [Tap("embedding", "embedding", width, (1, 2, 2), 1, "clip", 0)]
    taps += [Tap(f"block.{i}", "block", width, (1, 2, 2), 1, "clip", 0) for i in (1, 2, 3)]
    spec, keyed = Spec(tuple(taps)), generator(0, "ladder")
    side = Ladder(
        spec, reduction=2, members=members, heads=heads, keep_last=keep_last, pool="tokens"
    ).double()
    scale = [1.5, 0.5, 2.0, 1.0]
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
        for gate in side.gate:
            gate.mul_(0.2)  # or every sigmoid would be 0 or 1
        side.tap_scale.copy_(torch.tensor(scale))
    layers = tuple(torch.randn(batch, 5, width, generator=keyed, dtype=torch.float64) for _ in spec.taps)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[1:, 3:] = not masked
    found = side(Features(layers, spec, mask if masked else None)).detach().numpy()
    for member in range(members):
        own = {name: value[member].detach().numpy() for name, value in side.named_parameters()}
        for image in range(batch):
            z = [layer[image].numpy() * factor for layer, factor in zip(layers, scale, strict=True)]
            expected = oracle(z, own, heads, keep_last, mask[image].double().numpy())
            np.testing.assert_allclose(found[member, image], expected, rtol=0, atol=1e-9)


def test_the_gate_starts_half_open_and_up_at_zero() -> None:
    spec = Spec(tuple(Tap(n, k, 8, (1, 2, 2)) for n, k in (("embedding", "embedding"), ("block.1", "block"))))  # type: ignore[arg-type]
    side = Ladder(spec, reduction=2, heads=2)
    side.start([0])
    assert not side.gate[0].any() and not side.up.weight_MIO.any()
    alone = Ladder(spec, reduction=2, heads=2, keep_last=False)
    alone.start([0])
    assert alone.up.weight_MIO.std() > 0.3, "without b_L nothing would be learnt from zero"
