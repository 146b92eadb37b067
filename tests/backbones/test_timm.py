from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch

from sidetune.backbones.base import weights_digest
from sidetune.backbones.timm import TimmBackbone
from sidetune.errors import BackboneError
from tiny_vits import hub_folder

NAME = "test_vit"  # timm's own small model: 160 px, patch 16, 6 blocks of width 64


def weights_of(backbone: TimmBackbone) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}


@pytest.fixture(scope="module")
def source() -> TimmBackbone:
    return TimmBackbone(NAME, weights=None, seed=7)


def test_a_random_start_follows_the_seed(source):
    assert TimmBackbone(NAME, weights=None, seed=7).identity == source.identity
    assert TimmBackbone(NAME, weights=None, seed=8).identity.weights != source.identity.weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path, source, suffix):
    weights = {**weights_of(source), "head.weight": torch.ones(3, 64), "head.bias": torch.ones(3)}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": weights}, path)
    else:
        safetensors.torch.save_file(weights, path)
    loaded = TimmBackbone(NAME, weights=path)
    assert loaded.identity == source.identity
    images = torch.ones(1, 3, 160, 160)
    assert torch.equal(loaded(images).layers[-1], source(images).layers[-1])
    assert TimmBackbone(NAME, weights=str(path)).identity == source.identity


def test_weights_under_their_authors_names(tmp_path):
    # DINOv2's own files carry a mask token, and name the registers otherwise than timm.
    folder = hub_folder(tmp_path / "hub", "vit_small_patch14_reg4_dinov2", img_size=42)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    theirs = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in weights.items()}
    theirs["mask_token"] = torch.zeros(1, 32)
    theirs["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), weights["pos_embed"]], 1)
    theirs["cls_token"] = weights["cls_token"]
    expected = TimmBackbone("vit_small_patch14_reg4_dinov2", weights=folder)
    safetensors.torch.save_file(theirs, folder / "model.safetensors")
    loaded = TimmBackbone("vit_small_patch14_reg4_dinov2", weights=folder)
    assert loaded.module.reg_token.shape == (1, 4, 32)
    assert torch.equal(loaded.module.reg_token, expected.module.reg_token)


def test_weights_that_do_not_fit(tmp_path, source):
    weights = weights_of(source)
    del weights["norm.weight"]
    weights["surplus"] = torch.ones(1)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(
        BackboneError,
        match=r"weights\.pth does not fit VisionTransformer: 1 weights are missing \(norm\.weight\), "
        r"1 are unexpected \(surplus\)",
    ):
        TimmBackbone(NAME, weights=tmp_path / "weights.pth")
    with pytest.raises(BackboneError, match=r"weights\.pth does not fit VisionTransformer: .* missing"):
        TimmBackbone("vit_tiny_patch16_224", weights=tmp_path / "weights.pth")


def test_weights_from_a_folder_as_on_the_hub(tmp_path):
    folder = hub_folder(tmp_path, NAME)
    backbone = TimmBackbone(NAME, weights=folder)
    assert backbone.preprocess.size == 32
    assert backbone.preprocess.mean == (0.5, 0.5, 0.5)
    assert backbone.identity.arguments["embed_dim"] == 32
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(backbone.module.pos_embed, weights["pos_embed"])
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert TimmBackbone(NAME, weights=folder).identity == backbone.identity


def test_a_folder_that_is_not_as_on_the_hub(tmp_path):
    with pytest.raises(
        BackboneError, match=r"a folder needs model\.safetensors or .* and timm's config\.json"
    ):
        TimmBackbone(NAME, weights=tmp_path)
    folder = hub_folder(tmp_path, NAME)
    with pytest.raises(
        BackboneError, match=r"says test_vit, got vit_tiny_patch16_224\. Type: --backbone timm:test_vit"
    ):
        TimmBackbone("vit_tiny_patch16_224", weights=folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BackboneError, match=r"config\.json is not JSON"):
        TimmBackbone(NAME, weights=folder)


def test_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nowhere")
    with pytest.raises(
        BackboneError, match=r"vit_tiny_patch16_224 cannot be had from the hub: .*Type: --weights PATH"
    ):
        TimmBackbone("vit_tiny_patch16_224", weights="hub")


def test_weights_from_the_hub_have_no_classifier(monkeypatch, source):
    def create(name: str, *, pretrained: bool):
        assert pretrained
        model = real(name)
        model.load_state_dict(weights_of(source), strict=False)
        return model

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    backbone = TimmBackbone(NAME, weights="hub")
    assert isinstance(backbone.module.head, torch.nn.Identity)
    assert backbone.identity == source.identity


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "convnext_tiny", "resnet18", "vit_relpos_small_patch16_224"]
)
def test_other_families_are_refused_by_name(name):
    with pytest.raises(
        BackboneError, match=rf"^{name} is of timm's family '\w+'; expected a vision transformer of constant"
    ):
        TimmBackbone(name, weights=None)


def test_unknown_models_and_tags():
    with pytest.raises(
        BackboneError, match=r"has no model 'vit_tiny_patch16_225'\. Did you mean vit_tiny_patch16_224"
    ):
        TimmBackbone("vit_tiny_patch16_225", weights=None)
    with pytest.raises(BackboneError, match=r"has no model 'zzz'\.$"):
        TimmBackbone("zzz", weights=None)
    with pytest.raises(BackboneError, match=r"no weights 'test_vit\.nope', of test_vit\. Known: r160_in1k"):
        TimmBackbone("test_vit.nope", weights=None)


def test_the_tag_decides_the_pixels():
    plain = TimmBackbone("vit_tiny_patch16_224", weights=None, size=32)
    assert plain.preprocess.mean == (0.5, 0.5, 0.5)
    clip = TimmBackbone("vit_tiny_patch16_224.augreg_in21k", weights=None, size=32)
    assert clip.identity == plain.identity  # the same pixels and weights: the tag's name is no matter


def test_resampling_the_position_table_leaves_the_file_and_the_identity_of_weights_alone(tmp_path, source):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(weights_of(source), path)
    before = path.read_bytes()
    small = TimmBackbone(NAME, weights=path, size=64)
    assert small.module.pos_embed.shape != source.module.pos_embed.shape
    assert small.identity.weights == source.identity.weights == weights_digest(source.module)
    assert path.read_bytes() == before


def test_paths_need_not_be_paths(tmp_path):
    assert TimmBackbone(NAME, weights=Path(hub_folder(tmp_path, NAME))).spec.last.name == "block.3"
