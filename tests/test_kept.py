import functools
from dataclasses import dataclass

import pytest
import torch

from sidetune.kept import kept_bytes
from sidetune.sides.chunks import Scratches

FLOATS = 1000  # a tensor of so many is 4,000 bytes


@dataclass
class Box:
    inside: object


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside):
        self.inside = inside


def closure(tensor):
    return lambda: tensor


class Stash(torch.autograd.Function):
    """x -> x; leaves a tensor of its own on the context, in a wrapping."""

    @staticmethod
    def forward(ctx, x, wrap):
        ctx.stashed = wrap(torch.ones(FLOATS))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Save(torch.autograd.Function):
    """x -> x; saves a tensor as one should."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.ones(FLOATS))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def leaf():
    return torch.ones(FLOATS, requires_grad=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensor: tensor,
        lambda tensor: [tensor, (3, tensor[:5])],
        lambda tensor: {"a": {"b": (tensor,)}},
        Box,
        Slotted,
        closure,
        lambda tensor: functools.partial(print, tensor),
        lambda tensor: Box([Box({"deep": tensor})]),
    ],
)
def test_a_tensor_on_a_context_is_seen_however_it_is_wrapped(wrap):
    x = leaf()
    assert kept_bytes(lambda: Stash.apply(x, wrap).sum(), [x]) == 4 * FLOATS


def test_a_tensor_that_a_function_saves_is_seen():
    x = leaf()
    assert kept_bytes(lambda: Save.apply(x).sum(), [x]) == 4 * FLOATS


def test_saved_tensors_count_once_and_what_is_apart_does_not():
    x, y = leaf(), leaf()
    product = 4 * FLOATS  # x.exp() saves its result, twice used
    assert kept_bytes(lambda: torch.sum(x.exp() * y), [x, y]) == product
    assert kept_bytes(lambda: torch.sum(x.exp() * y), [x]) == 2 * product
    assert kept_bytes(lambda: torch.sum(x * y[:10].sum()), [x, y]) == 4


def test_a_view_keeps_its_whole_storage():
    x, large = leaf(), torch.ones(8 * FLOATS)
    assert kept_bytes(lambda: torch.sum(x * large[:FLOATS]), [x]) == 32 * FLOATS


def test_a_graph_on_a_context_is_walked_too():
    x, y = leaf(), leaf()
    inner = Stash.apply(y, lambda tensor: tensor)
    # the result of the inner clone (1 tensor) and what the inner context holds (1 tensor)
    assert kept_bytes(lambda: Stash.apply(x, lambda tensor: inner).sum(), [x]) == 8 * FLOATS


def test_what_the_graph_lets_go_does_not_count():
    x, y = leaf(), leaf()

    def forward():
        (y.exp() * y.exp()).sum()  # nobody holds it
        return (x.exp() * 2).sum()

    assert kept_bytes(forward, [x, y]) == 4 * FLOATS


def test_backward_is_as_it_would_be():
    x = leaf()
    losses = []
    kept_bytes(lambda: losses.append(x.exp().sum()) or losses[0], [x])
    losses[0].backward()
    assert torch.allclose(x.grad, x.detach().exp())


def test_scratch_that_stays_with_a_side_is_not_kept_for_backward():
    def scratches(tensor):
        stays = Scratches()
        taken = stays.take()
        taken.take("codes", tensor.shape, tensor)
        stays.give_back(taken)
        return stays

    x = torch.ones(3, requires_grad=True)
    assert kept_bytes(lambda: Stash.apply(x, scratches).sum(), [x]) == 0
