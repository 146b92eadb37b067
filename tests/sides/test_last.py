"""LAST against a float64 numpy oracle in the paper's first form: layer sums, then the correction."""

import numpy as np
import pytest

from oracles import Array, assert_equals, oracle_spec
from sidetune.sides.last import LAYER_NORM_EPS, Last


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
    side = Last(oracle_spec(), rank=4, members=2, heads=heads, pool="tokens").double()
    assert_equals(side, lambda z, own: oracle(z, own, heads), seed="last")
