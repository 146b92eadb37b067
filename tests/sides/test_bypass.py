"""Res-Tuning-Bypass against a float64 numpy oracle that is written from the paper's equations alone."""

from math import erf, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.bypass import Bypass

Array = NDArray[np.float64]
gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / sqrt(2))))


def oracle(taps: list[Array], own: dict[str, Array]) -> Array:
    """One image, one member: x_L from z_0, b_1 .. b_L, each (N, D)."""

    def adapter(x: Array, name: str) -> Array:
        return x + gelu(x @ own[f"{name}.down_MDR"]) @ own[f"{name}.up_MRD"]

    x = taps[0]
    for layer, tap in enumerate(taps[1:]):
        x = adapter(tap, f"lateral.{layer}") + adapter(x, f"vertical.{layer}")
    return x


def test_equals_the_oracle() -> None:
    members, batch, width = 2, 3, 6
    taps = [Tap("embedding", "embedding", width, (1, 2, 2), 1, "clip", 0)]
    taps += [Tap(f"block.{i}", "block", width, (1, 2, 2), 1, "clip", 0) for i in (1, 2, 3)]
    spec, keyed = Spec(tuple(taps)), generator(0, "bypass")
    side = Bypass(spec, rank=2, members=members, pool="tokens").double()
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
            np.testing.assert_allclose(found[member, image], oracle(z, own), rtol=0, atol=1e-9)


def test_it_starts_as_the_sum_of_all_taps() -> None:
    taps = [Tap("embedding", "embedding", 4, (1, 1, 2)), Tap("block.1", "block", 4, (1, 1, 2))]
    side = Bypass(Spec(tuple(taps)), pool="tokens")
    side.start([0])
    layers = tuple(torch.randn(3, 2, 4, generator=generator(i, "taps")) for i in range(2))
    torch.testing.assert_close(side(Features(layers, side.spec))[0], layers[0] + layers[1])
