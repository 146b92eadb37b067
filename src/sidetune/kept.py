"""What a step keeps for backward: bytes of every storage that the autograd graph holds.

Three places are looked at: tensors that operations save (seen by the pack hook), tensors that a custom
`torch.autograd.Function` leaves on its context, in containers too, and graphs that hang on those. Scratch
that stays with a side is none of that: chunks of any batch work in it, one after another.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sidetune.sides.chunks import Scratches

_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType)


class _Saved:
    """A tensor that an operation saved. It lives as long as the graph does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the same storage; the tensor itself would hold its own graph


def kept_bytes(forward: Callable[[], Tensor], apart: Iterable[Tensor]) -> int:
    """Run a forward pass and count what it keeps for backward.

    Args:
        forward: gives the loss.
        apart: tensors that would be there without the graph: the reader's taps, parameters.

    Returns:
        Bytes of the unique storages that the loss's graph holds, those of `apart` left out.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        one = _Saved(tensor)
        saved.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        loss = forward()
    storages = {}
    for tensor in (*(one.tensor for one in saved), *context_tensors(loss)):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    for tensor in apart:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def context_tensors(loss: Tensor) -> Iterator[Tensor]:
    """Every tensor that stands on the context of a custom function in the graph of a loss."""
    nodes: list[Any] = [loss.grad_fn]
    seen: set[int] = set()
    alive = []  # a node's Python object is made when asked for: its id counts only while it lives
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        alive.append(node)
        nodes += [following for following, _ in node.next_functions]
        for tensor in _tensors_in(getattr(node, "__dict__", None), seen):
            yield tensor
            nodes.append(tensor.grad_fn)


def _tensors_in(holder: object, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in containers and in the attributes of objects, however deep; parameters' modules apart."""
    if isinstance(holder, Tensor):
        yield holder
    if isinstance(holder, (*_LEAVES, Tensor, nn.Module, Scratches)) or id(holder) in seen:
        return
    seen.add(id(holder))
    for one in _parts(holder):
        yield from _tensors_in(one, seen)


def _parts(holder: object) -> list[object]:
    """What an object holds."""
    if isinstance(holder, dict):
        return list(holder.values())
    if isinstance(holder, list | tuple | set | frozenset):
        return list(holder)
    if isinstance(holder, types.FunctionType):  # a backward that is a closure
        return [cell.cell_contents for cell in holder.__closure__ or ()]
    if isinstance(holder, types.MethodType):
        return [holder.__self__, holder.__func__]
    if isinstance(holder, functools.partial):
        return [holder.func, *holder.args, *holder.keywords.values()]
    slots = (getattr(kind, "__slots__", ()) for kind in type(holder).__mro__)
    named = [getattr(holder, name, None) for names in slots for name in names]
    return [*getattr(holder, "__dict__", {}).values(), *named]
