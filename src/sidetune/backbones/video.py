"""Video transformers of the transformers library, which read a clip at once: ViViT, VideoMAE, V-JEPA 2."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from sidetune.backbones.base import Identity, Precision, Resize, Runtime, tensors_digest
from sidetune.backbones.blocks import Stream, StreamedBlock, a_call, run_in_parts
from sidetune.backbones.hooked import HookedBackbone, Parts, Place, check_choice, final_norm
from sidetune.backbones.video_models import PROCESSORS, Family, Three, VideoModel, downloaded
from sidetune.backbones.weightfile import stored_tensors
from sidetune.data.preprocess import Preprocess
from sidetune.errors import BackboneError
from sidetune.features import Spec, Tap
from sidetune.store import DTYPES

TOKENS = 8192  # of the clips that go through a streamed block at once
CHANNELS = 3


class VideoBackbone(HookedBackbone):
    """A video transformer: clips (B, T, 3, size, size) -> features of grid (T / tubelet, H, W).

    Taps: ``embedding`` is z_0, the tokens that enter block 1 (ViViT's class token in front); ``block.l`` the
    output of block l before the final norm. T and the size are those of the model's config.json.

    Args:
        name: of the model on the Hugging Face hub, ``MCG-NJU/videomae-base``; of the architecture, for the
            identity.
        weights: a folder as on the hub, with config.json and safetensors; ``"hub"`` to download it.
        size: side of a frame in pixels: the model's own.
        taps: names of the taps to read.
        precision: ``fp32``, or ``bf16`` or ``fp16`` by autocast.
        resize: of each frame: ``squash`` or ``crop``.
        runtime: ``eager``, or ``streamed``: the blocks stay on disk, see `sidetune.backbones.streamed`.

    Attributes:
        frames: T, that it reads at once.

    Raises:
        BackboneError: no such folder or model, of another family, or weights that lack parameters.
        MissingExtraError: the transformers library is not installed.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: Path | str = "hub",
        size: int | None = None,
        taps: Sequence[str] | None = None,
        precision: Precision = "fp32",
        resize: Resize = "squash",
        runtime: Runtime = "eager",
    ) -> None:
        for what, value, choices in (("resize", resize, Resize), ("precision", precision, Precision)):
            check_choice(what, value, get_args(choices))
        check_choice("runtime", runtime, get_args(Runtime))
        folder = downloaded(name) if weights == "hub" else Path(weights)
        streamed = runtime == "streamed"
        loaded = VideoModel.outline(name, folder) if streamed else VideoModel.whole(name, folder)
        family, config = loaded.family, loaded.config
        self.frames = int(getattr(config, family.frames))
        own, (deep, wide) = _side(name, getattr(config, family.size)), family.patch(config)
        wide = _side(name, wide)
        if size not in (None, own):
            raise BackboneError(f"size {size}, and {name} reads frames of {own} px alone. Leave --size out")
        preprocess = _preprocess(folder, own, resize, family)
        grid = (self.frames // deep, own // wide, own // wide)
        self._stream = _streaming(loaded, DTYPES[precision], math.prod(grid)) if streamed else None
        encoder, layers = family.encoder(loaded.model), loaded.model.get_submodule(family.blocks)

        def tap(tap_name: str, kind: Any) -> Tap:  # noqa: ANN401 - a literal
            cls = 0 if family.num_prefix else None
            return Tap(tap_name, kind, config.hidden_size, grid, family.num_prefix, "clip", cls)

        names = [f"block.{number}" for number in range(1, len(layers) + 1)]
        places = [Place(block, layer) for block, layer in zip(names, layers, strict=True)]
        identity = Identity(
            weights=tensors_digest((key, one.read()) for key, one in sorted(stored_tensors(folder).items())),
            architecture=f"transformers:{config.model_type}",
            arguments={"frames": self.frames, "patch": [deep, wide], "layers": len(layers)},
            preprocess=preprocess.model_dump(mode="json"),
        )
        parts = Parts(
            encoder,
            Spec((tap("embedding", "embedding"), *(tap(block, "block") for block in names))),
            (Place("embedding", layers[0], "input"), *places),
            preprocess,
            identity,
            final_norm(getattr(encoder, "layernorm", None)),
            {"transformers": _version()},
            runtime=runtime,
        )
        super().__init__(parts, taps=taps, precision=precision)

    @property
    def call_size(self) -> int | None:
        """See `Backbone.call_size`; of a streamed one, clips whose pixels, tokens and taps fit."""
        if self._stream is None or self.frames is None:
            return super().call_size
        pixels, tap = 3 * self.frames * self.preprocess.size**2, self.spec.last
        return a_call(pixels + 2 * tap.num_tokens * tap.width + self.spec.record_numel())

    def to(self, device: torch.device | str) -> Self:
        """Move what is in memory to a device; returns itself."""
        super().to(device)
        if self._stream is not None:
            self._stream.to(self.device)
        return self

    def _forward(self, images: Tensor) -> object:
        return self.module(images)


def _streaming(loaded: VideoModel, lower: torch.dtype, tokens: int) -> Stream:
    """Put stand-ins where the blocks of an outline stood.

    Args:
        loaded: an outline.
        lower: the type that autocast multiplies in.
        tokens: of a clip.
    """
    model, family = loaded.model, loaded.family
    clips = max(1, TOKENS // tokens)
    (template,) = model.get_submodule(family.blocks)
    stream = Stream(template, loaded.blocks, lower, clips)
    run_in_parts(model.get_submodule(family.pixels), clips)
    parent, _, name = family.blocks.rpartition(".")
    stand_ins = nn.ModuleList(StreamedBlock(stream, number) for number in range(len(loaded.blocks)))
    setattr(model.get_submodule(parent), name, stand_ins)
    return stream


def _side(name: str, value: Any) -> int:  # noqa: ANN401 - a number, or one an axis
    sides = {*value} if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise BackboneError(
            f"{name} has frames or patches of {value}, expected squares. "
            "Type: --backbone hf:MCG-NJU/videomae-base"
        )
    return int(sides.pop())


def _preprocess(folder: Path, size: int, resize: Resize, family: Family) -> Preprocess:
    """As the model's own processor prepares frames; where no file says it, the family's mean and std.

    A processor multiplies bytes by a factor, may subtract one, then a mean, and divides: of a pixel in 0..1
    that is one mean and one std.
    """
    mean, std = family.mean_std
    fields = _processor(folder)
    if fields:
        scale = 255 * (fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0)
        centre = 1.0 if fields.get("offset") else 0.0
        if not fields.get("do_normalize", True):
            mean, std = _over(scale, (0.0, 0.0, 0.0), centre), _over(scale, (1.0, 1.0, 1.0))
        elif (own_mean := _three(fields.get("image_mean"))) and (own_std := _three(fields.get("image_std"))):
            mean, std = _over(scale, own_mean, centre), _over(scale, own_std)
    resized = fields.get("size")
    shorter = resized.get("shortest_edge", size) if isinstance(resized, dict) else size
    return Preprocess(
        size=size,
        resize=resize,
        crop_fraction=min(1.0, size / shorter),
        interpolation="bilinear",
        mean=mean,
        std=std,
    )


def _three(value: Any) -> Three | None:  # noqa: ANN401 - a number, or one a channel
    if isinstance(value, int | float):
        return (value, value, value)
    return (value[0], value[1], value[2]) if isinstance(value, list) and len(value) == CHANNELS else None


def _over(scale: float, values: Three, more: float = 0.0) -> Three:
    first, second, third = ((value + more) / scale for value in values)
    return first, second, third


def _processor(folder: Path) -> Mapping[str, Any]:
    """The first of the files that a processor is described in; nothing where there is none."""
    file = next((folder / name for name in PROCESSORS if (folder / name).is_file()), None)
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BackboneError(f"{file} is no JSON: {error}. Type: --weights with another folder") from error
    return found if isinstance(found, Mapping) else {}


def _version() -> str:
    import transformers

    return str(transformers.__version__)
