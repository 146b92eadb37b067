"""Res-Tuning-Bypass against a float64 numpy oracle that is written from the paper's equations alone."""

from math import erf, sqrt

import numpy as np
import torch

from oracles import Array, assert_equals, oracle_spec
from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.bypass import Bypass

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
    side = Bypass(oracle_spec(), rank=2, members=2, pool="tokens").double()
    assert_equals(side, oracle, seed="bypass")


def test_it_starts_as_the_sum_of_all_taps() -> None:
    taps = [Tap("embedding", "embedding", 4, (1, 1, 2)), Tap("block.1", "block", 4, (1, 1, 2))]
    side = Bypass(Spec(tuple(taps)), pool="tokens")
    side.start([0])
    layers = tuple(torch.randn(3, 2, 4, generator=generator(i, "taps")) for i in range(2))
    torch.testing.assert_close(side(Features(layers, side.spec))[0], layers[0] + layers[1])
