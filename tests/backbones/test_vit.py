import pytest
import timm
import torch
from torch import nn

from sidetune.backbones.base import weights_digest
from sidetune.backbones.timm import TimmBackbone
from sidetune.backbones.vit import vit_parts
from sidetune.errors import BackboneError


def test_a_size_that_is_no_multiple_of_the_patch_names_the_nearest_two():
    with pytest.raises(BackboneError, match=r"size 100 .* 16\. Type: --size 96 or --size 112"):
        TimmBackbone("test_vit", weights=None, size=100)


def test_the_preprocessing_follows_the_size_and_takes_the_models_own_pixels():
    own = TimmBackbone("test_vit", weights=None)
    assert (own.preprocess.size, own.preprocess.resize, own.preprocess.crop_fraction) == (160, "squash", 1.0)
    cropped = TimmBackbone("test_vit", weights=None, size=64, resize="crop")
    config = timm.get_pretrained_cfg("test_vit")
    assert (cropped.preprocess.size, cropped.preprocess.crop_fraction) == (64, config.crop_pct)
    assert cropped.preprocess.mean == config.mean
    assert cropped.preprocess.std == config.std
    assert cropped.preprocess.interpolation == config.interpolation
    with pytest.raises(BackboneError, match="unknown resize 'cut'"):
        TimmBackbone("test_vit", weights=None, resize="cut")


def test_models_that_pool_first_bring_their_fc_norm():
    pooled = TimmBackbone("test_vit2", weights=None)
    assert isinstance(pooled.module.norm, nn.Identity)
    assert torch.equal(pooled.norm.weight, pooled.module.fc_norm.weight)
    assert TimmBackbone("test_vit4", weights=None).norm is None  # it ends in an RMSNorm


def test_blocks_with_parallel_branches_offer_no_branch_taps():
    backbone = TimmBackbone("vit_pwee_patch16_reg1_gap_256", weights=None, size=32)
    assert {tap.kind for tap in backbone.available.taps} == {"image", "embedding", "block"}


def test_branches_are_read_behind_layer_scale():
    backbone = TimmBackbone("test_vit3", weights=None, size=64, taps=["attention.1", "ffn.2"])
    module = backbone.module
    assert isinstance(module.blocks[0].ls1, timm.layers.LayerScale)
    scaled: list[torch.Tensor] = []
    module.blocks[0].ls1.register_forward_hook(lambda _module, _inputs, output: scaled.append(output))
    images = torch.ones(1, 3, 64, 64)
    assert torch.equal(backbone(images)["attention.1"], scaled[0])


def test_a_model_that_reads_one_channel_is_refused():
    model = timm.create_model(
        "test_vit", num_classes=0, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 160, 160)}
    )
    with pytest.raises(BackboneError, match="reads 1 channels resized by bicubic, expected 3 channels"):
        vit_parts(model, {}, size=None, resize="squash")


def test_a_model_that_reads_no_square_needs_a_size():
    model = timm.create_model("test_vit", num_classes=0, img_size=(64, 96))
    with pytest.raises(BackboneError, match=r"reads 64 x 96 pixels, expected a square\. Type: --size 64"):
        vit_parts(model, {}, size=None, resize="squash")
    assert vit_parts(model, {}, size=64, resize="squash").spec.last.grid == (1, 4, 4)


def test_activations_write_over_their_input_and_compute_the_same_bits():
    own = timm.create_model("test_vit", num_classes=0).eval()
    ours = timm.create_model("test_vit", num_classes=0).eval()
    ours.load_state_dict(own.state_dict())
    before = weights_digest(ours)
    vit_parts(ours, {}, size=None, resize="squash")
    assert weights_digest(ours) == before
    act = ours.blocks[0].mlp.act
    assert type(act) is not nn.GELU
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.forward_features(images), own.forward_features(images))
    hidden = torch.linspace(-3, 3, 64)
    kept = hidden.clone()
    assert act(hidden) is hidden
    assert torch.equal(hidden, nn.functional.gelu(kept))
    trained = kept.clone().requires_grad_()
    act(trained).sum().backward()
    assert torch.equal(trained.detach(), kept), "what a gradient needs stays"
    expected = kept.clone().requires_grad_()
    nn.functional.gelu(expected).sum().backward()
    assert torch.equal(trained.grad, expected.grad)
