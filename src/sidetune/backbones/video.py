"""Video transformers of the transformers library, which read a clip at once: ViViT, VideoMAE, V-JEPA 2."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from sidetune.backbones.base import Identity, Precision, Resize, tensors_digest
from sidetune.backbones.hooked import HookedBackbone, Parts, Place, check_choice, final_norm
from sidetune.backbones.weightfile import HUB_PATTERNS, stored_tensors
from sidetune.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from sidetune.errors import BackboneError, MissingExtraError
from sidetune.features import Spec, Tap

CONFIG, WEIGHTS = "config.json", "model*.safetensors"
PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")  # mean and std, as on the hub
ENCODER = ("embeddings", "encoder", "layers")  # a model's own parts, as keys begin; heads are left behind
CENTRED = (0.5, 0.5, 0.5)
Three = tuple[float, float, float]


@dataclass(frozen=True)
class Family:
    """Where the parts of a family's models are.

    Args:
        model: class of the transformers library.
        encoder: what runs, of the whole model.
        layers: the encoder's blocks.
        size: field of the configuration with the side of a frame in pixels.
        frames: likewise the number of frames.
        patch: of a configuration, frames and pixels of a tubelet.
        num_prefix: class tokens in front, of the whole clip.
        mean_std: of pixels, where no file says it.
    """

    model: str
    encoder: Callable[[Any], nn.Module]
    layers: Callable[[Any], nn.ModuleList]
    size: str
    frames: str
    patch: Callable[[Any], tuple[int, Any]]
    num_prefix: int
    mean_std: tuple[Three, Three]


FAMILIES = {
    "vivit": Family(
        "VivitModel",
        encoder=lambda model: model,
        layers=lambda encoder: encoder.layers,
        size="image_size",
        frames="num_frames",
        patch=lambda config: (config.tubelet_size[0], config.tubelet_size[1]),
        num_prefix=1,
        mean_std=(CENTRED, CENTRED),
    ),
    "videomae": Family(
        "VideoMAEModel",
        encoder=lambda model: model,
        layers=lambda encoder: encoder.encoder.layer,
        size="image_size",
        frames="num_frames",
        patch=lambda config: (config.tubelet_size, config.patch_size),
        num_prefix=0,
        mean_std=(IMAGENET_MEAN, IMAGENET_STD),
    ),
    "vjepa2": Family(
        "VJEPA2Model",
        encoder=lambda model: model.encoder,
        layers=lambda encoder: encoder.layer,
        size="crop_size",
        frames="frames_per_clip",
        patch=lambda config: (config.tubelet_size, config.patch_size),
        num_prefix=0,
        mean_std=(IMAGENET_MEAN, IMAGENET_STD),
    ),
}


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
    ) -> None:
        check_choice("resize", resize, ("squash", "crop"))
        folder = _downloaded(name) if weights == "hub" else Path(weights)
        family, model = _load(name, folder)
        config = model.config
        encoder, self.frames = family.encoder(model), int(getattr(config, family.frames))
        own, (deep, wide) = _side(name, getattr(config, family.size)), family.patch(config)
        wide = _side(name, wide)
        if size not in (None, own):
            raise BackboneError(f"size {size}, and {name} reads frames of {own} px alone. Leave --size out")
        preprocess = _preprocess(folder, own, resize, family)
        layers = family.layers(encoder)
        grid = (self.frames // deep, own // wide, own // wide)

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
        )
        super().__init__(parts, taps=taps, precision=precision)

    def _forward(self, images: Tensor) -> object:
        return self.module(images)


def _downloaded(name: str) -> Path:
    """The folder of a model's files in the hub's cache."""
    try:
        return Path(snapshot_download(name, allow_patterns=[*HUB_PATTERNS, *PROCESSORS]))
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error


def _load(name: str, folder: Path) -> tuple[Family, Any]:
    """The model, all of whose parameters were in the folder's files."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "pip install 'sidetune[hf]'") from error
    _check_folder(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _not_loaded(name, error) from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BackboneError(
            f"{name} is of the family {config.model_type!r}, expected {', '.join(FAMILIES)}. An image "
            "backbone reads clips frame by frame. Type: --backbone timm:vit_base_patch16_224 --frames 8"
        )
    kind = getattr(transformers, family.model)
    options = {"add_pooling_layer": False} if config.model_type == "vivit" else {}
    try:
        with _silent():
            model, said = kind.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _not_loaded(name, error) from error
    lacking = [f"lack {key}" for key in said["missing_keys"] if not key.startswith("predictor.")]
    foreign = [f"have {key}" for key in said["unexpected_keys"] if key.partition(".")[0] in ENCODER]
    if wrong := sorted(lacking) + sorted(foreign):
        raise BackboneError(
            f"the weights of {name} {wrong[0]}{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}, "
            f"expected those of a {family.model}. Type: --weights with the folder of the whole model"
        )
    return family, model.eval()


def _not_loaded(name: str, error: Exception) -> BackboneError:
    return BackboneError(
        f"{name} cannot be loaded: {str(error).partition(chr(10))[0]} Expected a network, a filled cache, or "
        f"a folder with {CONFIG} and {WEIGHTS}, as on the hub. Type: --weights FOLDER"
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Without the library's progress and its table of keys: what is wrong with them is said here."""
    from transformers.utils import logging as given

    logging: Any = given  # its functions have no types
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not (folder / CONFIG).is_file() or not list(folder.glob(WEIGHTS)):
        raise BackboneError(
            f"weights {folder}: expected a folder with {CONFIG} and {WEIGHTS}, as on the hub. "
            "Type: --weights FOLDER"
        )


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
    return (value[0], value[1], value[2]) if isinstance(value, list) and len(value) == len(CENTRED) else None


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
