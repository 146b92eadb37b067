"""Confluence against a float64 numpy oracle, and what its frequencies are."""

from math import cos, erf, pi, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sidetune.features import Features, Spec, Tap
from sidetune.keyed import generator
from sidetune.sides.confluence import Confluence, token_basis

Array = NDArray[np.float64]
gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / sqrt(2))))


def wave(frequency: int, place: int, length: int) -> float:
    scale = sqrt((1 if frequency == 0 else 2) / length)
    return scale * cos(pi * frequency * (place + 0.5) / length)


def basis(height: int, width: int, count: int) -> Array:
    """One prefix token, then every pair of the lowest frequencies."""
    rows = [[1.0] + [0.0] * (height * width)]
    for down in range(min(count, height)):
        for across in range(min(count, width)):
            of_places = [
                wave(down, y, height) * wave(across, x, width) for y in range(height) for x in range(width)
            ]
            rows.append([0.0, *of_places])
    return np.array(rows)


def oracle(taps: list[Array], scale: list[float], parameters: dict[str, Array], phi: Array) -> Array:
    """One image, one member: y_L from the taps, each (N, D)."""
    b = [tap * factor for tap, factor in zip(taps, scale, strict=True)]
    y = b[-1]
    for layer in range(len(b)):
        c_down, c_up = (
            parameters[f"losa.channel.{layer}.down_MDR"],
            parameters[f"losa.channel.{layer}.up_MRD"],
        )
        t_down, t_up = parameters[f"losa.token.{layer}.down_MRQ"], parameters[f"losa.token.{layer}.up_MQR"]
        h = b[layer] + y
        c = gelu(h @ c_down) @ c_up
        t = phi.T @ t_up @ gelu(t_down @ phi @ (h + c))
        y = y + c + t
    return y


@pytest.mark.parametrize("form", ["fast", "textbook"])
def test_equals_the_oracle(form: str) -> None:
    members, batch, width, blocks = 2, 3, 6, 3
    spec = Spec(
        tuple(Tap(f"block.{i}", "block", width, (1, 3, 2), 1, "clip", 0) for i in range(1, blocks + 1))
    )
    keyed, scale = generator(0, "confluence"), [0.5, 2.0, 1.0]
    side = Confluence(spec, rank=2, members=members, frequencies=2, form=form).double()
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=keyed, dtype=torch.float64))
        side.tap_scale.copy_(torch.tensor(scale))
        for mixer in side.losa.token:  # the oracle's are not rounded to float32
            mixer.basis_QN.copy_(torch.from_numpy(basis(3, 2, 2)))
    layers = tuple(torch.randn(batch, 7, width, generator=keyed, dtype=torch.float64) for _ in spec.taps)
    found = side(Features(layers, spec)).detach().numpy()
    for member in range(members):
        own = {name: value[member].detach().numpy() for name, value in side.named_parameters()}
        for image in range(batch):
            taps = [layer[image].numpy() for layer in layers]
            expected = oracle(taps, scale, own, basis(3, 2, 2))[1:].mean(0)
            np.testing.assert_allclose(found[member, image], expected, rtol=0, atol=1e-9)


def test_frequencies_are_orthonormal_and_all_of_them_are_every_token() -> None:
    tap = Tap("block.1", "block", 6, (1, 3, 4), 1, "clip", 0)
    np.testing.assert_allclose(token_basis(tap, 2), basis(3, 4, 2), atol=1e-7)
    every_QN = token_basis(tap, 9)
    assert every_QN.shape == (13, 13)
    torch.testing.assert_close(every_QN @ every_QN.mT, torch.eye(13), rtol=0, atol=1e-6)


def test_prefix_tokens_of_every_frame_have_their_own_rows() -> None:
    tap = Tap("block.1", "block", 6, (2, 1, 2), 1, "frame", 0)
    basis_QN = token_basis(tap, 1)
    assert basis_QN[:2].argmax(1).tolist() == [0, 3]
    torch.testing.assert_close(basis_QN[2], torch.tensor([0.0, 0.5, 0.5, 0.0, 0.5, 0.5]))


def test_no_parameter_is_tied_to_the_grid() -> None:
    shapes = []
    for grid in ((1, 4, 4), (1, 7, 5)):
        spec = Spec(tuple(Tap(f"block.{i}", "block", 6, grid, 1, "clip", 0) for i in (1, 2)))
        side = Confluence(spec, frequencies=3)
        shapes.append({name: value.shape for name, value in side.state_dict().items()})
    assert shapes[0] == shapes[1]
