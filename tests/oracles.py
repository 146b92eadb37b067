"""A side network against an oracle of one image and one member, in float64."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.base import Side

Array = NDArray[np.float64]
WIDTH, BLOCKS, TOKENS = 6, 3, 5
SCALE = [1.5, 0.5, 2.0, 1.0]


def oracle_spec() -> Spec:
    """The embedding and three blocks: a class token and 2 x 2 patches of width 6."""
    taps = [Tap("embedding", "embedding", WIDTH, (1, 2, 2), 1, "clip", 0)]
    taps += [Tap(f"block.{i}", "block", WIDTH, (1, 2, 2), 1, "clip", 0) for i in range(1, BLOCKS + 1)]
    return Spec(tuple(taps))


def assert_equals(side: Side, oracle: Callable[[list[Array], dict[str, Array]], Array], *, seed: str) -> None:
    """Every member's tokens of every image, all parameters drawn and every tap scaled.

    Args:
        side: in float64, of `oracle_spec`, with pool ``tokens``.
        oracle: scaled taps (N, D) each, and a member's parameters by name -> (N, D).
        seed: of parameters and features.
    """
    keyed, batch = generator(0, seed), 3
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
        side.tap_scale.copy_(torch.tensor(SCALE))
    layers = tuple(
        torch.randn(batch, TOKENS, WIDTH, generator=keyed, dtype=torch.float64) for _ in side.spec.taps
    )
    found = side(Features(layers, side.spec)).detach().numpy()
    for member in range(side.members):
        own = {name: value[member].detach().numpy() for name, value in side.named_parameters()}
        for image in range(batch):
            taps = [layer[image].numpy() * factor for layer, factor in zip(layers, SCALE, strict=True)]
            np.testing.assert_allclose(found[member, image], oracle(taps, own), rtol=0, atol=1e-9)
