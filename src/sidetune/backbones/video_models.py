"""Models of the transformers library that read clips, from folders as on the hub: whole, or as an outline.

An outline has one block, into which the others are read from the files while it runs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from sidetune.backbones.blocks import Block, blocks_of, numbered
from sidetune.backbones.weightfile import HUB_PATTERNS, Stored, stored_tensors
from sidetune.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sidetune.errors import BackboneError, MissingExtraError

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
        blocks: path of the blocks in the whole model.
        pixels: path of what makes tokens of pixels.
        size: field of the configuration with the side of a frame in pixels.
        frames: likewise the number of frames.
        patch: of a configuration, frames and pixels of a tubelet.
        num_prefix: class tokens in front, of the whole clip.
        mean_std: of pixels, where no file says it.
        renames: patterns of names in files, and what stands in their place in the model.
    """

    model: str
    encoder: Callable[[Any], nn.Module]
    blocks: str
    pixels: str
    size: str
    frames: str
    patch: Callable[[Any], tuple[int, Any]]
    num_prefix: int
    mean_std: tuple[Three, Three]
    renames: tuple[tuple[str, str], ...] = ()


FAMILIES = {
    "vivit": Family(
        "VivitModel",
        encoder=lambda model: model,
        blocks="layers",
        pixels="embeddings.patch_embeddings.projection",
        size="image_size",
        frames="num_frames",
        patch=lambda config: (config.tubelet_size[0], config.tubelet_size[1]),
        num_prefix=1,
        mean_std=(CENTRED, CENTRED),
        renames=(
            (r"^encoder\.layer\.", "layers."),
            (r"\.attention\.attention\.([qkv])\w+\.", r".attention.\1_proj."),
            (r"\.attention\.output\.dense\.", ".attention.o_proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
        ),
    ),
    "videomae": Family(
        "VideoMAEModel",
        encoder=lambda model: model,
        blocks="encoder.layer",
        pixels="embeddings.patch_embeddings.projection",
        size="image_size",
        frames="num_frames",
        patch=lambda config: (config.tubelet_size, config.patch_size),
        num_prefix=0,
        mean_std=(IMAGENET_MEAN, IMAGENET_STD),
        renames=((r"\.q_bias$", ".query.bias"), (r"\.v_bias$", ".value.bias")),
    ),
    "vjepa2": Family(
        "VJEPA2Model",
        encoder=lambda model: model.encoder,
        blocks="encoder.layer",
        pixels="encoder.embeddings.patch_embeddings.proj",
        size="crop_size",
        frames="frames_per_clip",
        patch=lambda config: (config.tubelet_size, config.patch_size),
        num_prefix=0,
        mean_std=(IMAGENET_MEAN, IMAGENET_STD),
    ),
}


def downloaded(name: str) -> Path:
    """The folder of a model's files in the hub's cache.

    Raises:
        BackboneError: no such model, or no network.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=[*HUB_PATTERNS, *PROCESSORS]))
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error


@dataclass(frozen=True)
class VideoModel:
    """A model, and what is known of it.

    Args:
        family: of its kind.
        config: the library's own.
        model: in eval mode; of an outline with its first block alone.
        blocks: of an outline, where the parameters of all blocks stand.
    """

    family: Family
    config: Any
    model: Any
    blocks: tuple[Block, ...] = ()

    @classmethod
    def whole(cls, name: str, folder: Path) -> VideoModel:
        """All of it, whose every parameter was in the folder's files.

        Raises:
            BackboneError: no such folder, another family, or parameters that are lacking.
            MissingExtraError: the transformers library is not installed.
        """
        family, config = _config(name, folder)
        kind, options = _kind(family)
        try:
            with _silent():
                model, said = kind.from_pretrained(
                    folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
                )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise _not_loaded(name, error) from error
        _check_names(name, family, said["missing_keys"], said["unexpected_keys"])
        return cls(family, config, model.eval())

    @classmethod
    def outline(cls, name: str, folder: Path) -> VideoModel:
        """All but its blocks, of which there is one.

        Raises:
            BackboneError: as of `whole`; or blocks that differ from each other.
            MissingExtraError: likewise.
        """
        family, config = _config(name, folder)
        kind, options = _kind(family)
        small = copy.deepcopy(config)
        for field in ("num_hidden_layers", "pred_num_hidden_layers"):
            if hasattr(small, field):
                setattr(small, field, 1)
        try:
            with torch.random.fork_rng(devices=[]), _silent():  # a start is drawn from the global generator
                model = kind(small, **options)
            tensors = _renamed(folder, family, kind.base_model_prefix)
            own, block = model.state_dict(), numbered(family.blocks)
            known = [key for key in tensors if key in own or block.fullmatch(key)]
            _check_names(name, family, set(own) - set(tensors), set(tensors) - set(known))
            given = {key: tensors[key] for key in own if key in tensors}
            _check_shapes(name, given, own)
            model.load_state_dict({key: one.read().float() for key, one in given.items()}, strict=False)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise _not_loaded(name, error) from error
        blocks = blocks_of(tensors, family.blocks, model.get_submodule(family.blocks)[0], folder)
        if len(blocks) != config.num_hidden_layers:
            raise BackboneError(
                f"weights {folder} have {len(blocks)} blocks, and {CONFIG} says {config.num_hidden_layers}. "
                "Type: --weights with the folder of the whole model"
            )
        return cls(family, config, model.eval(), tuple(blocks))


def _config(name: str, folder: Path) -> tuple[Family, Any]:
    """The library's configuration of a model, and its family."""
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
    return family, config


def _kind(family: Family) -> tuple[Any, dict[str, bool]]:
    """The class of a model, and what it is built with."""
    import transformers

    options = {"add_pooling_layer": False} if family.model == "VivitModel" else {}
    return getattr(transformers, family.model), options


def _check_names(name: str, family: Family, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Every parameter must be there, and none more that is the encoder's; heads are left behind."""
    lacking = [f"lack {key}" for key in missing if not key.startswith("predictor.")]
    foreign = [f"have {key}" for key in unexpected if key.partition(".")[0] in ENCODER]
    if wrong := sorted(lacking) + sorted(foreign):
        raise BackboneError(
            f"the weights of {name} {wrong[0]}{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}, "
            f"expected those of a {family.model}. Type: --weights with the folder of the whole model"
        )


def _check_shapes(name: str, given: Mapping[str, Stored], own: Mapping[str, Tensor]) -> None:
    """Shapes in files must be those of the configuration."""
    for key, stored in given.items():
        if stored.shape != (expected := tuple(own[key].shape)):
            raise BackboneError(
                f"the weights of {name} have {key} {stored.shape}, and {CONFIG} asks for {expected}. "
                "Type: --weights with the folder of the whole model"
            )


def _renamed(folder: Path, family: Family, prefix: str) -> dict[str, Stored]:
    """A folder's tensors under the model's own names, as the library renames them when it loads."""
    found = {}
    for key, stored in stored_tensors(folder).items():
        name = key.removeprefix(f"{prefix}.")
        for pattern, instead in family.renames:
            name = re.sub(pattern, instead, name)
        if name in found:
            raise BackboneError(f"weights {folder} have {name} twice, one of them as {key}")
        found[name] = stored
    return found


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
