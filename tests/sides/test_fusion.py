"""The fusion probe against a float64 numpy oracle with keys, values and softmax written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.fusion import LAYER_NORM_EPS, Fusion

Array = NDArray[np.float64]


def oracle(taps: list[Array], own: dict[str, Array], heads: int, has_cls: bool) -> Array:
    """One image, one member: taps b_1 .. b_L (N, D), the first token the class token."""
    pooled = []
    for tap in taps:
        pooled += [tap[0], tap[1:].mean(0)] if has_cls else [tap.mean(0)]
    x = np.stack(pooled)
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + LAYER_NORM_EPS)
    keys, values = x @ own["query.key_MDD"], x @ own["query.value_MDD"]
    mixed = np.zeros(x.shape[1])
    for head in np.split(np.arange(x.shape[1]), heads):
        weights = np.exp(keys[:, head] @ own["query.query_MD"][head] / np.sqrt(len(head)))
        mixed[head] = weights / weights.sum() @ values[:, head]
    return mixed @ own["query.out_MDD"]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("has_cls", [True, False])
def test_equals_the_oracle(heads: int, has_cls: bool) -> None:
    members, batch, width = 2, 3, 6
    prefix = (1, "clip", 0) if has_cls else ()
    taps = [Tap("embedding", "embedding", width, (1, 2, 2), *prefix)]  # type: ignore[arg-type]
    taps += [Tap(f"block.{i}", "block", width, (1, 2, 2), *prefix) for i in (1, 2, 3)]  # type: ignore[arg-type]
    spec, keyed = Spec(tuple(taps)), generator(0, "fusion")
    side = Fusion(spec, heads=heads, members=members).double()
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
    shape = (batch, spec.last.num_tokens, width)
    layers = tuple(torch.randn(shape, generator=keyed, dtype=torch.float64) for _ in spec.taps)
    found = side(Features(layers, spec)).detach().numpy()
    for member in range(members):
        own = {name: value[member].detach().numpy() for name, value in side.named_parameters()}
        for image in range(batch):
            b = [layer[image].numpy() for layer in layers[1:]]
            np.testing.assert_allclose(
                found[member, image], oracle(b, own, heads, has_cls), rtol=0, atol=1e-9
            )


def test_it_starts_as_a_mixture_of_the_layers() -> None:
    spec = Spec(tuple(Tap(f"block.{i}", "block", 8, (1, 1, 3)) for i in (1, 2)))
    side = Fusion(spec, heads=1)
    side.start([0])
    layers = tuple(torch.randn(5, 3, 8, generator=generator(i, "taps")) for i in range(2))
    first, second = (F.layer_norm(layer.mean(1), (8,), eps=LAYER_NORM_EPS) for layer in layers)
    found = side(Features(layers, spec))[0]
    share = ((found - second) / (first - second)).mean(1, keepdim=True)
    assert ((share > 0) & (share < 1)).all()
    torch.testing.assert_close(found, share * first + (1 - share) * second)
