"""Weights from a local file: read safely, brought to a model's own names, loaded strictly."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sidetune.errors import BackboneError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# In order of preference: what the Hugging Face hub calls a repository's weights.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")

Weights = Mapping[str, Tensor]
AnyWeight = TypeVar("AnyWeight")  # a tensor, or where one stands


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a ``.pth``, ``.pt`` or ``.bin`` file.

    The latter are opened with ``weights_only=True``: nothing in them is executed. A surrounding
    ``{"model": ...}`` or ``{"state_dict": ...}`` is taken off, and so is a ``module.`` before
    every name.

    Raises:
        BackboneError: the file is missing, damaged, or holds more than tensors.
    """
    if path.suffix not in SUFFIXES:
        raise BackboneError(
            f"weights {path}: expected hub, a folder as on the hub, or a file ending in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise BackboneError(f"weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BackboneError(
            f"weights {path} cannot be read: {reason} Expected a file of tensors only; "
            "save the model's state_dict with safetensors.torch.save_file"
        ) from error
    return _unwrap(content, path)


def load_weights(
    model: nn.Module,
    weights: Weights,
    source: str,
    *,
    classifier: tuple[str, ...] = (),
    rename: Callable[[dict[str, Tensor], nn.Module], Weights] | None = None,
) -> None:
    """Load weights into a model; every name and shape must fit.

    Args:
        model: has no classifier of its own.
        weights: by name.
        source: where the weights come from, for messages.
        classifier: names of submodules whose weights are left out: no tap lies behind them.
        rename: brings foreign names to the model's; asked only where names differ.

    Raises:
        BackboneError: names are missing or unexpected, or shapes differ.
    """
    own = model.state_dict()
    given = without(weights, classifier)
    if given.keys() != own.keys() and rename is not None:
        given = without(rename(given, model), classifier)
    missing, unexpected = own.keys() - given.keys(), given.keys() - own.keys()
    if missing or unexpected:
        raise BackboneError(
            f"{source} does not fit {type(model).__name__}: {len(missing)} weights are missing "
            f"{_few(missing)}, {len(unexpected)} are unexpected {_few(unexpected)}. "
            "Name the model that these weights belong to"
        )
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            raise BackboneError(
                f"{source} does not fit {type(model).__name__}: {name} has shape "
                f"{tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
            )
    model.load_state_dict(given, strict=True)


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise BackboneError(f"weights {path}: got {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise BackboneError(
                f"weights {path}: {name!r} is a {type(value).__name__}, expected tensors by name, "
                "or such under the key 'state_dict' or 'model'"
            )
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def without(weights: Mapping[str, AnyWeight], submodules: tuple[str, ...]) -> dict[str, AnyWeight]:
    """What is known by the names of weights, but for those of some submodules."""
    prefixes = tuple(f"{name}." for name in submodules)
    return {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}


def _few(names: Iterable[str]) -> str:
    first = sorted(names)[:3]
    return f"({', '.join(first)})" if first else ""
