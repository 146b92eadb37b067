"""The machinery that every eager backbone shares: a frozen module whose taps are read by hooks.

A hook lives only as long as the call that needs it, and the forward pass is left as soon as the
last tap has been read. Nothing here knows what kind of network the module is.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from sidetune.backbones.base import Backbone, Identity, Precision, Variant
from sidetune.data.preprocess import Preprocess
from sidetune.errors import BackboneError, nearest
from sidetune.features import Features, FinalNorm, Spec


@dataclass(frozen=True)
class Place:
    """Where in a module a tap is read.

    Args:
        name: the tap's name.
        module: the submodule that is listened to.
        reads: its first input, or its output.
        copy: copy what is read, for modules that may later overwrite it in place.
    """

    name: str
    module: nn.Module
    reads: Literal["input", "output"] = "output"
    copy: bool = False


@dataclass(frozen=True)
class Parts:
    """What a concrete backbone hands to `HookedBackbone`.

    Args:
        module: the network; from here on it belongs to the backbone.
        spec: every tap that can be read, in running order.
        places: where each tap of `spec` is read, in the same order.
        preprocess: how images reach the module.
        identity: what the backbone is.
        norm: the module's own final LayerNorm, if it has one.
        versions: of the libraries, beside torch, that compute the features.
        runtime: as `Variant` has it.
    """

    module: nn.Module
    spec: Spec
    places: tuple[Place, ...]
    preprocess: Preprocess
    identity: Identity
    norm: FinalNorm | None
    versions: dict[str, str]
    runtime: str = "eager"


class HookedBackbone(Backbone):
    """A frozen module read by hooks. Abstract: a concrete backbone says how its module is run.

    One call at a time: two threads need two backbones.

    Args:
        parts: the module and all that is known about it.
        taps: names of the taps to read; None reads the embedding and every block.
        precision: ``fp32`` (autocast is switched off, whatever the caller has on), or ``bf16`` or
            ``fp16`` by autocast. The weights stay float32, and features have the dtype that autocast
            gives: float32 for the residual stream, 16 bits for most branch outputs.

    Attributes:
        module: the frozen network, in eval mode.
        available: every tap that could be read, in running order.

    Raises:
        BackboneError: an unknown tap or precision.
    """

    module: nn.Module
    available: Spec

    def __init__(self, parts: Parts, *, taps: Sequence[str] | None, precision: Precision) -> None:
        check_choice("precision", precision, get_args(Precision))
        self.module = parts.module.eval().requires_grad_(False)
        self.available, self._every_place = parts.spec, parts.places
        self.spec = _choose(parts.spec, taps)
        self.preprocess = parts.preprocess
        self.identity = parts.identity
        self.norm = parts.norm
        self.variant = Variant(
            taps=self.spec.names,
            precision=precision,
            runtime=parts.runtime,
            versions={"torch": torch.__version__, **parts.versions},
        )
        self.device = module_device(self.module)
        self._places = self._places_of(self.spec)
        self._dtype: torch.dtype | None = None

    def __call__(self, images: Tensor) -> Features:
        """Read the taps of a batch of preprocessed images.

        Args:
            images: (B, 3, size, size) float32, any device; of a backbone of clips (B, T, 3, size, size).

        Returns:
            Features of `self.spec`, contiguous, on the backbone's device, without autograd history.

        Raises:
            BackboneError: images of another shape or dtype.
        """
        together = () if self.frames is None else (self.frames,)
        expected = (*together, 3, self.preprocess.size, self.preprocess.size)
        if tuple(images.shape[1:]) != expected or images.dtype != torch.float32:
            raise BackboneError(
                f"got images {tuple(images.shape)} of {images.dtype}, expected (B, "
                f"{', '.join(map(str, expected))}) of torch.float32: use backbone.preprocess"
            )
        half = torch.float16 if self.variant.precision == "fp16" else torch.bfloat16
        lower = self.variant.precision != "fp32"
        # no_grad, not inference_mode: a side that trains live saves these tensors for its backward.
        with torch.no_grad(), torch.autocast(self.device.type, half, enabled=lower):
            keep = None if self._dtype is None else _Room(self.spec, self._dtype).keep
            read = capture(self._places, lambda: self._forward(images.to(self.device)), keep=keep)
        return Features(tuple(_as_tokens(read[name]) for name in self.spec.names), self.spec)

    def to(self, device: torch.device | str) -> Self:
        """Move the backbone to a device; returns itself."""
        self.module.to(device)
        self.device = torch.device(device)
        return self

    def reading(self, taps: Sequence[str]) -> Self:
        """See `Backbone.reading`."""
        other = copy.copy(self)
        other.spec = _choose(self.available, taps)
        other.variant = replace(self.variant, taps=other.spec.names)
        other._places = other._places_of(other.spec)
        return other

    def giving(self, dtype: torch.dtype) -> Self:
        """See `Backbone.giving`."""
        other = copy.copy(self)
        other._dtype = dtype
        return other

    def _places_of(self, spec: Spec) -> tuple[Place, ...]:
        return tuple(place for place in self._every_place if place.name in spec.names)

    @abstractmethod
    def _forward(self, images: Tensor) -> object:
        """Run the module at least as far as its last tap. What it returns is not used."""


class _Room:
    """Where taps stand that change their type: those of one shape in one piece of memory.

    Each in its own, between what a block makes and gives back, they tear the heap: a call of the model of
    4.4 billion held 0.1 GiB more, and 0.4 GiB after it.

    Args:
        spec: the taps.
        dtype: to keep them in.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        shape = spec.taps[-1].num_tokens, spec.taps[-1].width
        stream = (tap for tap in spec.taps if tap.kind in ("embedding", "block"))  # branches may be 16 bits
        alike = [tap.name for tap in stream if (tap.num_tokens, tap.width) == shape]
        self._dtype, self._shape = dtype, shape
        self._places = {name: place for place, name in enumerate(alike)}
        self._whole: Tensor | None = None

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of a tap."""
        if tensor.dtype == self._dtype or name not in self._places or tensor.shape[1:] != self._shape:
            return tensor.to(self._dtype)
        if self._whole is None:
            self._whole = tensor.new_empty(len(self._places), *tensor.shape, dtype=self._dtype)
        return self._whole[self._places[name]].copy_(tensor)


class _LastTapRead(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the forward pass once nothing more is to be read."""


def capture(
    places: Sequence[Place],
    run: Callable[[], object],
    *,
    keep: Callable[[str, Tensor], Tensor] | None = None,
    to_the_end: bool = False,
) -> dict[str, Tensor]:
    """Listen to submodules while `run` runs.

    Args:
        places: what to listen to.
        run: runs the module.
        keep: gives what stays of a tap, from its name and what was read; None: that itself.
        to_the_end: do not leave once everything has been read.

    Returns:
        A tensor (B, N, D) or (B, D, H, W) a tap, in the order of running.

    Raises:
        BackboneError: a submodule did not run, ran twice, or gave no tensor of such a shape.
    """
    read: dict[str, Tensor] = {}

    def heard(place: Place, value: object) -> None:
        if place.name in read:
            raise BackboneError(
                f"the submodule of tap {place.name!r} runs more than once; choose one that runs once"
            )
        tensor = _tensor(place, value)
        read[place.name] = tensor if keep is None else keep(place.name, tensor)
        if len(read) == len(places) and not to_the_end:
            raise _LastTapRead

    with ExitStack() as hooks:
        for place in places:
            hooks.callback(_listen(place, heard))
        with suppress(_LastTapRead):
            run()
    for place in places:
        if place.name not in read:
            raise BackboneError(f"the submodule of tap {place.name!r} did not run")
    return read


def _listen(place: Place, heard: Callable[[Place, object], None]) -> Callable[[], None]:
    """Register one hook; returns what removes it."""
    if place.reads == "input":
        return place.module.register_forward_pre_hook(lambda _module, inputs: heard(place, inputs)).remove
    return place.module.register_forward_hook(lambda _module, _inputs, output: heard(place, output)).remove


def _tensor(place: Place, value: object) -> Tensor:
    first = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(first, Tensor) or first.ndim not in (3, 4):
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise BackboneError(
            f"the submodule of tap {place.name!r} gave {got}, expected a tensor (B, N, D) or "
            "(B, D, H, W), or a tuple that starts with one"
        )
    return first.clone() if place.copy else first


def _as_tokens(read: Tensor) -> Tensor:
    """(B, N, D) as it is, (B, D, H, W) as (B, H*W, D); contiguous."""
    tokens = read if read.ndim == 3 else read.flatten(2).transpose(1, 2)
    return tokens.contiguous()


def _choose(spec: Spec, taps: Sequence[str] | None) -> Spec:
    if taps is None:
        return spec.select(
            [tap.name for tap in spec.taps if tap.kind in ("embedding", "block")] or spec.names
        )
    for name in taps:
        if name not in spec.names:
            raise BackboneError(f"no tap named {name!r}.{nearest(name, spec.names)}")
    return spec.select(taps)


def final_norm(module: nn.Module | None) -> FinalNorm | None:
    """A copy of a LayerNorm; None for any other module."""
    if not isinstance(module, nn.LayerNorm):
        return None
    shape = module.normalized_shape
    weight = torch.ones(shape) if module.weight is None else module.weight
    bias = torch.zeros(shape) if module.bias is None else module.bias
    return FinalNorm(weight.detach().cpu().clone(), bias.detach().cpu().clone(), module.eps)


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """A value must be one of a few words.

    Raises:
        BackboneError: it is not; names the nearest.
    """
    if value not in choices:
        raise BackboneError(f"unknown {what} {value!r}.{nearest(value, choices)}")


def check_size(size: int, patch: int) -> None:
    """An image's side must be a multiple of the patch's side, both in pixels.

    Raises:
        BackboneError: it is not; names the nearest two sizes that are.
    """
    if size < patch or size % patch:
        lower = max(size // patch * patch, patch)
        raise BackboneError(
            f"size {size} is not a multiple of the patch size {patch}. "
            f"Type: --size {lower} or --size {lower + patch}"
        )


def module_device(module: nn.Module) -> torch.device:
    """Where the module's parameters are; the CPU for a module without any."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
