"""Sides that pool before their last product equal the tokens that their papers' equations give, pooled."""

import pytest
import torch
from torch import Tensor

from oracles import oracle_spec
from sidetune.features import Features
from sidetune.keyed import generator
from sidetune.sides.base import Pool, Side
from sidetune.sides.bypass import Bypass
from sidetune.sides.ladder import Ladder

MEMBERS, BATCH = 2, 3


def built(name: str, pool: Pool) -> Side:
    """With every parameter drawn, up-projections and gates too."""
    spec = oracle_spec()
    made: dict[str, Side] = {
        "bypass": Bypass(spec, rank=2, members=MEMBERS, pool=pool),
        "bypass, every second": Bypass(spec, rank=2, members=MEMBERS, pool=pool, every=2),
        "ladder": Ladder(spec, reduction=2, heads=1, members=MEMBERS, pool=pool),
        "ladder, Up alone": Ladder(spec, reduction=2, heads=1, members=MEMBERS, pool=pool, keep_last=False),
    }
    side, keyed = made[name].double(), generator(0, "pooled forms")
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
        side.tap_scale.copy_(torch.rand(len(spec), generator=keyed) + 0.5)
    return side


def features_of(side: Side, *, masked: bool) -> Features:
    keyed = generator(1, "pooled forms")
    shapes = [(BATCH, tap.num_tokens, tap.width) for tap in side.spec.taps]
    layers = tuple(torch.randn(shape, generator=keyed, dtype=torch.float64) for shape in shapes)
    mask = torch.ones(BATCH, shapes[0][1], dtype=torch.bool)
    mask[1:, -1] = False
    return Features(layers, side.spec, mask if masked else None)


def outputs_and_gradients(side: Side, pooled: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(pooled.shape, generator=generator(2, "pooled forms"), dtype=torch.float64)
    side.zero_grad()
    (pooled * weight).sum().backward()
    gradients = {name: p.grad for name, p in side.named_parameters() if p.grad is not None}
    return {"output": pooled.detach(), **gradients}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["mean", "cls", "cls+mean", "all"])
@pytest.mark.parametrize("name", ["bypass", "bypass, every second", "ladder", "ladder, Up alone"])
def test_pooling_first_changes_no_output_and_no_gradient(name: str, pool: Pool, masked: bool) -> None:
    side = built(name, pool)
    features = features_of(side, masked=masked)
    textbook = outputs_and_gradients(side, Side.forward(side, features))
    own = outputs_and_gradients(side, side(features))
    assert own.keys() == textbook.keys() == {"output", *dict(side.named_parameters())}
    for key, expected in textbook.items():
        assert expected.any(), key
        torch.testing.assert_close(own[key], expected, rtol=1e-9, atol=1e-9, msg=key)
