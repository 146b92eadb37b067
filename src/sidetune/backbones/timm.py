"""Vision transformers of constant width and grid, built by timm.

Weights come from a local file, from a local folder in the layout of the Hugging Face hub, from the
hub itself, or from a seed.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint, split_model_name_tag
from torch import Tensor

from sidetune import keyed
from sidetune.backbones.base import Precision, Resize, Stages
from sidetune.backbones.checkpoint import HUB_FILES, load_weights, read_checkpoint
from sidetune.backbones.hooked import HookedBackbone
from sidetune.backbones.vit import ViT, classifiers, run_vit, vit_parts, vit_stages
from sidetune.errors import BackboneError, nearest

# timm's files whose models keep one width and one grid from the first block to the last.
FAMILIES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit")


class TimmBackbone(HookedBackbone):
    """A vision transformer of timm, without its classifier.

    Taps: ``image`` is the prepared image, a token a pixel; ``embedding`` is z_0, the tokens that enter
    block 1 (class, distillation and register tokens in front); ``block.l`` the output of block l before
    the final norm; ``attention.l`` and ``ffn.l`` the branches as they are added to the residual stream:
    behind LayerScale, and behind the norm of a post-norm block. Blocks that run both branches side by
    side offer no branch taps. Embedding and blocks are read by default.

    The final norm is the model's ``norm``, or the ``fc_norm`` of models that pool first; None
    where that is not a LayerNorm.

    Args:
        name: timm's name, ``vit_base_patch16_224`` or with a tag, ``vit_base_patch16_224.dino``.
            The tag decides the pixel mean and std, also where weights are given.
        weights: a file (.safetensors, .pth, .pt, .bin), a folder with ``config.json`` and
            ``model.safetensors`` as on the hub, ``"hub"`` to download, or None for a random start.
        size: side of the image in pixels, a multiple of the patch size. None is the model's own;
            for any other the position table is resampled, by timm, on our own copy.
        taps: names of the taps to read.
        precision: ``fp32`` or ``bf16``, see `HookedBackbone`.
        resize: ``squash`` resizes to size x size as the papers on VTAB do; ``crop`` cuts the centre
            with the model's own crop fraction.
        seed: of a random start.

    Raises:
        BackboneError: an unknown or unsupported model, weights that do not fit or cannot be had, a
            size that is no multiple of the patch size, an unknown tap or precision.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: Path | str | None,
        size: int | None = None,
        taps: Sequence[str] | None = None,
        precision: Precision = "fp32",
        resize: Resize = "squash",
        seed: int = 0,
    ) -> None:
        model, arguments = build_vit(name, weights, seed=seed)
        parts = vit_parts(model, arguments, size=size, resize=resize)
        super().__init__(parts, taps=taps, precision=precision)

    def _forward(self, images: Tensor) -> object:
        return run_vit(self.module, images)

    def stages(self) -> Stages:
        """See `Backbone.stages`."""
        return vit_stages(self.module, self.available.blocks[-1])


def build_vit(
    name: str, weights: Path | str | Mapping[str, Tensor] | None, *, seed: int
) -> tuple[ViT, dict[str, Any]]:
    """A model of timm without its classifier, at its own size.

    Args:
        name: timm's name.
        weights: as in `TimmBackbone`, or tensors by name.
        seed: of a random start.

    Returns:
        The model, and the arguments that the folder of its weights adds to its architecture.

    Raises:
        BackboneError: as in `TimmBackbone`.
    """
    architecture = known_architecture(name)
    start = keyed.generator(seed, f"backbones/timm/{architecture}").initial_seed()
    with torch.random.fork_rng(devices=[]):  # timm draws from the global generator
        torch.default_generator.manual_seed(start)
        if weights == "hub":
            return _from_hub(name), {}
        if isinstance(weights, str):
            weights = Path(weights)
        if isinstance(weights, Path) and weights.is_dir():
            return _from_folder(architecture, weights)
        model = create(name)
    if weights is not None:
        _load(model, architecture, weights)
    return model, {}


def known_architecture(name: str) -> str:
    """The architecture that a name with or without a tag stands for.

    Raises:
        BackboneError: timm does not know it, or it is no plain vision transformer.
    """
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise BackboneError(f"timm {timm.__version__} has no model {architecture!r}.{hint}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise BackboneError(
            f"timm {timm.__version__} has no weights {name!r}, of {architecture}.{nearest(tag, tags)}"
        )
    family = model_entrypoint(architecture).__module__.rpartition(".")[2]
    if family not in FAMILIES:
        raise BackboneError(
            f"{name} is of timm's family {family!r}; expected a vision transformer of constant width "
            f"and grid, of the families {', '.join(FAMILIES)}. Type: --backbone timm:vit_base_patch16_224, "
            "or wrap the module yourself with sidetune.backbones.wrap"
        )
    return architecture


def create(name: str, **arguments: Any) -> ViT:  # noqa: ANN401 - timm's own keywords
    """A model with random weights and no classifier.

    Raises:
        BackboneError: timm cannot build it.
    """
    try:
        model = timm.create_model(name, num_classes=0, **arguments)
    except RuntimeError as error:
        raise BackboneError(f"timm cannot build {name}: {error}") from error
    assert isinstance(model, ViT)
    return model


def _from_hub(name: str) -> ViT:
    try:
        # With its classifier, because timm checks the names strictly only then.
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise no_hub(name, error) from error
    assert isinstance(model, ViT)
    model.reset_classifier(0)
    return model


def no_hub(name: str, error: Exception) -> BackboneError:
    """What is said where the hub does not give a model's weights."""
    return BackboneError(
        f"the weights of {name} cannot be had from the hub: {str(error).partition(chr(10))[0]} "
        "Expected a network or a filled cache. Type: --weights PATH, a local .safetensors or .pth file"
    )


def _from_folder(architecture: str, folder: Path) -> tuple[ViT, dict[str, Any]]:
    """A folder as on the hub: config.json says architecture, arguments and pixel statistics."""
    file = next((folder / file for file in HUB_FILES if (folder / file).is_file()), None)
    config = hub_config(folder / "config.json")
    if file is None or config is None:
        raise BackboneError(
            f"weights {folder}: a folder needs {' or '.join(HUB_FILES)} and timm's config.json, as on "
            "the hub. Type: --weights with the path of the weights file itself"
        )
    model = create_from(folder, config, architecture)
    _load(model, architecture, file)
    return model, dict(config.get("model_args") or {})


def create_from(folder: Path, config: Mapping[str, Any], architecture: str, **arguments: Any) -> ViT:  # noqa: ANN401 - as there
    """The model that a folder's config.json describes, with random weights.

    Raises:
        BackboneError: it is of another architecture.
    """
    if config["architecture"] != architecture:
        raise BackboneError(
            f"weights {folder}: config.json says {config['architecture']}, got {architecture}. "
            f"Type: --backbone timm:{config['architecture']}"
        )
    return create(f"local-dir:{folder}", **arguments)


def hub_config(path: Path) -> dict[str, Any] | None:
    """The config.json of timm; None where there is none, or it is another library's."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BackboneError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) and "architecture" in config else None


def _load(model: ViT, architecture: str, weights: Path | Mapping[str, Tensor]) -> None:
    source = f"weights {weights}" if isinstance(weights, Path) else "the weights"
    load_weights(
        model,
        read_checkpoint(weights) if isinstance(weights, Path) else weights,
        source,
        classifier=classifiers(model),
        # Each of timm's files knows the names that its models' authors published under.
        rename=sys.modules[model_entrypoint(architecture).__module__].checkpoint_filter_fn,
    )
