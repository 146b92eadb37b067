"""A step in pieces is the step at once."""

import pytest
import torch
from torch import nn

from sidetune import optimizer
from sidetune.optimizer import MemberAdamW, Update

MEMBERS = 2
SHAPES = [(MEMBERS, 5), (MEMBERS, 3, 4), (MEMBERS, 7, 2), (MEMBERS, 6)]  # two of them decay


def trained(clip_norm):
    noise = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=noise)) for shape in SHAPES]
    steps = MemberAdamW(parameters)
    updates = {0: Update(1e-2, 0.1, clip_norm), 1: Update(3e-2, 0.2, None)}
    for number in range(4):
        for parameter in parameters[number > 2 :]:  # one has no gradient at the end
            parameter.grad = torch.randn(parameter.shape, generator=noise)
        steps.step(updates)
        assert all(parameter.grad is None for parameter in parameters)
    return steps.weights_MP


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_large_network_is_updated_piece_by_piece(monkeypatch, clip_norm):
    once = trained(clip_norm)
    monkeypatch.setattr(optimizer, "LARGE", 1)
    found = trained(clip_norm)
    assert torch.equal(found[1], once[1]), "nothing is summed over the pieces"
    torch.testing.assert_close(found[0], once[0], rtol=0 if clip_norm is None else 1e-5, atol=0)


def test_gradients_of_a_large_network_go_one_by_one(monkeypatch):
    monkeypatch.setattr(optimizer, "LARGE", 1)
    parameters = [nn.Parameter(torch.zeros(1, 2, 100)) for _ in range(4)]
    steps, alive = MemberAdamW(parameters), []
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    addresses = {parameter.grad.data_ptr() for parameter in parameters}
    real = MemberAdamW._update

    def update(self, member, columns, gradient_P, update):
        alive.append(gradient_P.data_ptr() in addresses)
        real(self, member, columns, gradient_P, update)

    monkeypatch.setattr(MemberAdamW, "_update", update)
    steps.step({0: Update(1e-2, 0.0, None)})
    assert alive == [True] * 4, "each is the gradient itself, not a copy"
