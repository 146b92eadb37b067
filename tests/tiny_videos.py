"""Folders of tiny video transformers, as on the hub."""

import json

import torch
import transformers

FRAMES, SIZE = 4, 16
SMALL = {"num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "vivit": lambda: transformers.VivitConfig(
        image_size=SIZE,
        num_frames=FRAMES,
        tubelet_size=[2, 8, 8],
        hidden_size=32,
        intermediate_size=64,
        **SMALL,
    ),
    "videomae": lambda: transformers.VideoMAEConfig(
        image_size=SIZE,
        patch_size=8,
        num_frames=FRAMES,
        tubelet_size=2,
        hidden_size=32,
        intermediate_size=64,
        use_mean_pooling=False,
        **SMALL,
    ),
    "vjepa2": lambda: transformers.VJEPA2Config(
        crop_size=SIZE,
        patch_size=8,
        frames_per_clip=FRAMES,
        tubelet_size=2,
        hidden_size=24,
        mlp_ratio=2,
        pred_hidden_size=24,
        pred_num_hidden_layers=1,
        pred_num_attention_heads=2,
        **SMALL,
    ),
}
MODELS = {"vivit": "VivitModel", "videomae": "VideoMAEModel", "vjepa2": "VJEPA2Model"}


def video_model(family, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"add_pooling_layer": False} if family == "vivit" else {}
        return getattr(transformers, MODELS[family])(CONFIGS[family](), **options).eval()


def video_folder(folder, family, seed=0, mean=None):
    """config.json and model.safetensors; with a mean, the processor's file, too."""
    video_model(family, seed).save_pretrained(folder)
    if mean is not None:
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": mean, "image_std": [0.5] * 3})
        )
    return folder
