"""LAST against a float64 numpy oracle in the paper's first form: layer sums, then the correction."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.last import LAYER_NORM_EPS, Last

Array = NDArray[np.float64]


def lsa(x: Array, own: dict[str, Array], i: int, heads: int) -> Array:
    mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    normed = (x - mean) / np.sqrt(variance + LAYER_NORM_EPS)
    normed = normed * own[f"attention.{i}.norm_weight_MD"] + own[f"attention.{i}.norm_bias_MD"]
    out = own[f"attention.{i}.out_MRD"]
    rank = len(out)
    q, k, v = np.split(normed @ own[f"attention.{i}.qkv_MDR"], 3, axis=1)
    mixed = np.zeros((len(x), rank))
    for head in np.split(np.arange(rank), heads):
        weights = np.exp(q[:, head] @ k[:, head].T / np.sqrt(rank / heads))
        mixed[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head]
    return mixed @ out


def oracle(z: list[Array], own: dict[str, Array], heads: int) -> Array:
    """One image, one member: u_L minus the sum of z_0 .. z_{L-1}."""
    u = z[0] + lsa(z[0], own, 0, heads)
    for i in range(1, len(z)):
        v = u + z[i]
        u = v + lsa(v, own, i, heads)
    return u - sum(z[:-1])


@pytest.mark.parametrize("heads", [1, 2])
def test_equals_the_oracle(heads: int) -> None:
    members, batch, width = 2, 3, 6
    taps = [Tap("embedding", "embedding", width, (1, 2, 2), 1, "clip", 0)]
    taps += [Tap(f"block.{i}", "block", width, (1, 2, 2), 1, "clip", 0) for i in (1, 2, 3)]
    spec, keyed = Spec(tuple(taps)), generator(0, "last")
    side = Last(spec, rank=4, members=members, heads=heads, pool="tokens").double()
    scale = [1.5, 0.5, 2.0, 1.0]
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
        side.tap_scale.copy_(torch.tensor(scale))
    layers = tuple(torch.randn(batch, 5, width, generator=keyed, dtype=torch.float64) for _ in spec.taps)
    found = side(Features(layers, spec)).detach().numpy()
    for member in range(members):
        own = {name: value[member].detach().numpy() for name, value in side.named_parameters()}
        for image in range(batch):
            z = [layer[image].numpy() * factor for layer, factor in zip(layers, scale, strict=True)]
            np.testing.assert_allclose(found[member, image], oracle(z, own, heads), rtol=0, atol=1e-9)
