"""LoSA against a float64 numpy oracle that is written from the paper's equations alone."""

from math import erf, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.losa import Losa

Array = NDArray[np.float64]
gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / sqrt(2))))


def oracle(
    taps: list[Array], scale: list[float], parameters: dict[str, Array], order: str, a: float
) -> Array:
    """One image, one member: y_L from the taps b_1 .. b_L, each (N, D)."""
    b = [tap * factor for tap, factor in zip(taps, scale, strict=True)]
    y = b[-1]
    for layer in range(len(b)):
        c_down, c_up = parameters[f"channel.{layer}.down_MDR"], parameters[f"channel.{layer}.up_MRD"]
        t_down, t_up = parameters[f"token.{layer}.down_MRN"], parameters[f"token.{layer}.up_MNR"]
        h = b[layer] + y
        if order == "channel->token":
            c = a * gelu(h @ c_down) @ c_up
            t = a * t_up @ gelu(t_down @ (h + c))
        elif order == "token->channel":
            t = a * t_up @ gelu(t_down @ h)
            c = a * gelu((h + t) @ c_down) @ c_up
        else:
            c = a * gelu(h @ c_down) @ c_up
            t = a * t_up @ gelu(t_down @ h)
        y = y + c + t
    return y


@pytest.mark.parametrize("order", ["channel->token", "token->channel", "parallel"])
def test_equals_the_oracle(order: str) -> None:
    members, batch, width, blocks = 2, 3, 6, 3
    spec = Spec(
        tuple(Tap(f"block.{i}", "block", width, (1, 2, 2), 1, "clip", 0) for i in range(1, blocks + 1))
    )
    keyed = generator(0, order)
    side = Losa(spec, rank=2, members=members, order=order, a=0.7, pool="tokens").double()
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
        side.tap_scale.copy_(torch.tensor([0.5, 2.0, 1.0]))
    layers = tuple(torch.randn(batch, 5, width, generator=keyed, dtype=torch.float64) for _ in spec.taps)
    found = side(Features(layers, spec)).detach().numpy()
    for member in range(members):
        own = {name: value[member].detach().numpy() for name, value in side.named_parameters()}
        for image in range(batch):
            taps = [layer[image].numpy() for layer in layers]
            expected = oracle(taps, [0.5, 2.0, 1.0], own, order, 0.7)
            np.testing.assert_allclose(found[member, image], expected, rtol=0, atol=1e-9)
