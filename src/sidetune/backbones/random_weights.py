"""Random weights of any size, written tensor by tensor, for what a model costs: that needs no knowledge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sidetune import keyed
from sidetune.backbones.timm import create, known_architecture
from sidetune.backbones.weightfile import stored_tensors, write_in_turn

STD = 0.02  # of matrices and tables


def write_random_weights(
    name: str, path: Path, *, dtype: torch.dtype = torch.bfloat16, depth: int | None = None, seed: int = 0
) -> int:
    """Weights of a model of timm as a safetensors file, never more than one tensor of them in memory.

    Matrices and tables are drawn, normal with a standard deviation of 0.02; scales are ones, biases zeros.

    Args:
        name: timm's name.
        path: of the file.
        dtype: of all tensors.
        depth: blocks; None: as the name says.
        seed: of the draws, a generator a tensor.

    Returns:
        The number of parameters.

    Raises:
        BackboneError: an unknown or unsupported model.
        SidetuneError: the disk is full, or the folder cannot be written.
    """
    shapes = weight_shapes(name, depth)

    def tensors() -> Iterator[Tensor]:
        for key, shape in shapes.items():
            if len(shape) > 1:
                yield STD * torch.randn(shape, generator=keyed.generator(seed, f"backbones/random/{key}"))
            else:
                yield (torch.ones if key.endswith(("weight", "gamma", "scale")) else torch.zeros)(shape)

    write_in_turn(path, shapes, dtype, tensors())
    return sum(shape.numel() for shape in shapes.values())


def differing(name: str, path: Path, dtype: torch.dtype, depth: int | None = None) -> str | None:
    """Why a file is not what `write_random_weights` would write, in words; None: it is.

    Args:
        name: timm's name.
        path: of the file.
        dtype: of all tensors.
        depth: blocks; None: as the name says.

    Raises:
        BackboneError: an unknown model, or no safetensors file.
    """
    stored, shapes = stored_tensors(path), weight_shapes(name, depth)
    if more := sorted(stored.keys() - shapes.keys()):
        return f"has {more[0]}, which the model has not"
    for key, shape in shapes.items():
        if key not in stored or tuple(stored[key].shape) != tuple(shape):
            found = tuple(stored[key].shape) if key in stored else "none"
            return f"has {key} {found} instead of {tuple(shape)}"
        if stored[key].dtype != dtype:
            return f"has {key} in {stored[key].dtype}"
    return None


def weight_shapes(name: str, depth: int | None = None) -> dict[str, torch.Size]:
    """Name -> shape of every tensor of a model of timm, none of which is made.

    Args:
        name: timm's name.
        depth: blocks; None: as the name says.

    Raises:
        BackboneError: an unknown or unsupported model.
    """
    known_architecture(name)
    given = {} if depth is None else {"depth": depth}
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in create(name, **given).state_dict().items()}
