"""What every backbone is: a frozen source of features with a spec and two fingerprints.

*Identity* is what must be equal for stored features or a trained side to be used: the weights as
loaded, the architecture and its arguments, the preprocessing. *Variant* is how it was run: taps
(which must be a superset), precision, runtime and library versions (which may differ within limits).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sidetune.data.preprocess import Preprocess, built_in_image
from sidetune.errors import BackboneError
from sidetune.features import Features, FinalNorm, Spec, Tap

Precision = Literal["fp32", "bf16", "fp16"]
Resize = Literal["squash", "crop"]
Runtime = Literal["eager", "streamed"]

MICRO_BATCH = 32  # images that go through a block at once


@dataclass(frozen=True)
class Identity:
    """What a backbone is. Two backbones with equal identity give the same features.

    Args:
        weights: sha256 over every parameter and buffer as loaded: name, dtype, shape, bytes.
        architecture: the model's name.
        arguments: what it was built with, by name; plain JSON values.
        preprocess: the preprocessing's fields.
    """

    weights: str
    architecture: str
    arguments: dict[str, Any]
    preprocess: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of all fields, 64 hex digits."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()

    def difference(self, other: Identity) -> list[str]:
        """One line a field that differs: ``weights: 12ab.. here, 34cd.. there``."""
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        return [
            f"{key}: {_short(mine.get(key))} here, {_short(theirs.get(key))} there"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    def to_json(self) -> dict[str, Any]:
        """Fields and digest, for manifests and artifacts."""
        return {**asdict(self), "digest": self.digest}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Variant:
    """How a backbone was run. May differ between training and use, within limits.

    Args:
        taps: names of the taps that are read.
        precision: ``fp32``, or ``bf16`` or ``fp16`` by autocast.
        runtime: ``eager`` is PyTorch itself; ``streamed`` reads block after block from disk.
        versions: of the libraries that computed the features.
    """

    taps: tuple[str, ...]
    precision: Precision
    runtime: str
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts, for manifests and artifacts."""
        return {**asdict(self), "taps": list(self.taps)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**fields, "taps": tuple(fields["taps"])})


@dataclass(frozen=True)
class Stages:
    """A backbone taken apart. The modules are its own, never to be changed.

    Args:
        embed: images (B, 3, size, size) -> the tokens (B, N, D) that enter block 1.
        blocks: each tokens -> tokens.
        tap: of the last block: grid and prefix of all these tokens.
    """

    embed: nn.Module
    blocks: tuple[nn.Module, ...]
    tap: Tap


class Backbone(ABC):
    """A frozen feature source: images (B, 3, size, size) -> `Features`.

    Always in eval mode, never mutated, no autograd graph: calling runs under `torch.no_grad`.

    Attributes:
        frames: T, of one that reads clips (B, T, 3, size, size) at once; None: it reads images.
    """

    frames: int | None = None

    spec: Spec
    preprocess: Preprocess
    identity: Identity
    variant: Variant
    norm: FinalNorm | None
    device: torch.device

    @abstractmethod
    def __call__(self, images: Tensor) -> Features:
        """Read the taps of a batch of preprocessed images.

        Args:
            images: (B, 3, size, size) float32, any device.

        Returns:
            Features of `self.spec`, on the backbone's device.
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move the backbone to a device; returns itself."""

    @property
    def call_size(self) -> int | None:
        """Images that a call should have, for it costs much by itself; or clips. None: it costs nothing."""
        return None

    def reading(self, taps: Sequence[str]) -> Self:
        """The same network with other taps. Its weights are shared: be on the device before.

        Args:
            taps: names, of any taps that it offers.

        Raises:
            BackboneError: there is no such tap, or it reads what it was built with alone.
        """
        raise BackboneError(
            f"{self.identity.architecture} reads the taps that it was built with, "
            f"{', '.join(self.spec.names)}, and got {', '.join(taps)}. Build it with those"
        )

    def giving(self, dtype: torch.dtype) -> Self:
        """The same network, whose taps have this type as soon as each is read, if it can: memory is theirs.

        Who must have it converts what it gets, too. Its weights are shared: be on the device before.

        Args:
            dtype: floating.
        """
        return self

    def stages(self) -> Stages:
        """Embedding and blocks, for what runs or changes them one by one.

        Raises:
            BackboneError: it cannot be taken apart.
        """
        raise BackboneError(
            f"{self.identity.architecture} cannot be taken apart into blocks, expected a plain vision "
            "transformer. Type: --backbone timm:vit_base_patch16_224"
        )

    @torch.no_grad()
    def check_values(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation a tap on the built-in image: measured at save and at load."""
        image = self.preprocess(built_in_image(self.preprocess.size))
        features = self((image if self.frames is None else image.expand(self.frames, -1, -1, -1))[None])
        return {
            tap.name: (layer.float().mean().item(), layer.float().std().item())
            for tap, layer in zip(self.spec.taps, features.layers, strict=True)
        }


def weights_digest(module: nn.Module) -> str:
    """sha256 over every parameter and saved buffer in name order: name, dtype, shape, bytes."""
    return tensors_digest(sorted(module.state_dict().items()))


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same over tensors that come one at a time, in name order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shared_copy(module: nn.Module) -> nn.Module:
    """Modules of its own around the same tensors: what is put into the copy is not in the module."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def canonical_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _short(value: Any) -> str:  # noqa: ANN401 - any JSON value
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}.."
