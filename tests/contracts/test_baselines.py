"""Every baseline passes the same tests. An exception is a field of its row, with the reason."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sidetune.artifact import build_model
from sidetune.backbones.base import Stages, weights_digest
from sidetune.backbones.timm import TimmBackbone
from sidetune.backbones.vit import vit_stages
from sidetune.baselines import BASELINES
from sidetune.baselines.lora import Lora
from sidetune.baselines.stadapter import _Bottleneck
from sidetune.errors import BackboneError, SideError
from sidetune.features import Features, Tap
from sidetune.keyed import Draws, generator
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from tiny_vits import hub_folder

CLASSES, BLOCKS = 3, 3
TAPS = ["image", "embedding", "block.1", "block.2", "block.3"]


@dataclass(frozen=True)
class Row:
    side: str
    vit_b: int  # parameters in ViT-B/16, without the final norm and the head
    arguments: dict[str, Any] = field(default_factory=dict)
    reads: str = "embedding"
    is_backbone_at_start: bool = True


ROWS = {
    "lora": Row("lora", 294_912),
    "lora linear": Row("lora", 1_179_648, {"layers": "linear"}),
    "lora last 2": Row("lora", 49_152, {"blocks": 2}, reads="block.1"),
    "norms": Row("norms", 36_864),
    "bitfit": Row("bitfit", 101_376),
    "adaptformer": Row("adaptformer", 156_768),
    "stadapter": Row("stadapter", 7_110_144),
    "vpt": Row("vpt", 92_160, is_backbone_at_start=False),  # drawn prompts are attended to
    "full": Row("full", 85_797_120, reads="image"),
}
every_row = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> TimmBackbone:
    folder = hub_folder(tmp_path_factory.mktemp("vit"), "vit_tiny_patch16_224", init_values=0.5)
    return TimmBackbone("vit_tiny_patch16_224", weights=folder, taps=TAPS)


def build(name: str, backbone: TimmBackbone, **more: Any) -> SideModel:
    row = ROWS[name]
    recipe = Recipe.build({"side": {"name": row.side, **row.arguments, **more}})
    model = build_model(recipe, backbone.spec, CLASSES, backbone.norm, backbone=backbone)
    model.start([0])
    return model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=generator(0, "images"))


def features(model: SideModel, backbone: TimmBackbone, count: int = 4) -> Features:
    return backbone(images(count)).select(model.side.spec.names)


def draw_all(model: SideModel) -> SideModel:
    keyed = generator(0, "all parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=keyed))
    return model


def gradients(model: SideModel, inputs: Features) -> dict[str, Tensor]:
    model.zero_grad()
    model(inputs, Draws([0])).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def adam(model: SideModel, inputs: Features, targets: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(inputs, Draws([0]))[0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def vit_b_stages() -> Stages:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    return vit_stages(model, Tap("block.12", "block", 768, (1, 14, 14), num_prefix=1, cls_index=0))


@every_row
def test_counts_of_vit_b(name: str, backbone: TimmBackbone) -> None:
    row, spec = ROWS[name], backbone.available
    side = Recipe.build({"side": {"name": row.side, **row.arguments}}).side
    taps = [*spec.taps, *(Tap(f"block.{i}", "block", 32, (1, 2, 2), 1) for i in range(4, 13))]
    with torch.device("meta"):
        built = BASELINES[row.side](type(spec)(tuple(taps)), vit_b_stages(), side)
    assert built.num_parameters() == row.vit_b


@every_row
def test_reads_one_tap(name: str, backbone: TimmBackbone) -> None:
    assert build(name, backbone).side.spec.names == (ROWS[name].reads,)


@every_row
def test_is_the_backbone_at_step_0(name: str, backbone: TimmBackbone) -> None:
    model = build(name, backbone)
    tokens = model.side.tokens(features(model, backbone))[0]
    same = torch.allclose(tokens, backbone(images())["block.3"], atol=1e-6)
    assert same is ROWS[name].is_backbone_at_start


@every_row
def test_every_parameter_learns_by_step_two(name: str, backbone: TimmBackbone) -> None:
    model = build(name, backbone)
    inputs = features(model, backbone)
    adam(model, inputs, torch.tensor([0, 1, 2, 0]), 2)
    unmoved = [key for key, gradient in gradients(model, inputs).items() if not gradient.any()]
    assert not unmoved


@every_row
def test_learns_eight_samples_and_leaves_the_backbone_bit_for_bit(name: str, backbone: TimmBackbone) -> None:
    before, digest = backbone(images()), weights_digest(backbone.module)
    model = build(name, backbone)
    losses = adam(model, features(model, backbone, 8), torch.arange(8) % CLASSES, 60)
    assert losses[-1] < 0.1 * losses[0]
    after = backbone(images())
    assert weights_digest(backbone.module) == digest
    assert all(torch.equal(a, b) for a, b in zip(before.layers, after.layers, strict=True))
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())


@every_row
def test_start_is_the_seeds(name: str, backbone: TimmBackbone) -> None:
    model, again, other = (build(name, backbone) for _ in range(3))
    other.start([1])
    first, second, third = (one.state_dict() for one in (model, again, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    model.start([None])
    assert all(torch.equal(model.state_dict()[key], second[key]) for key in first)


@every_row
def test_checkpointing_changes_no_gradient(name: str, backbone: TimmBackbone) -> None:
    model, saving = (draw_all(build(name, backbone, checkpointing=on)) for on in (False, True))
    inputs = features(model, backbone)
    expected, found = gradients(model, inputs), gradients(saving, inputs)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


@every_row
def test_the_state_is_what_is_trained_and_no_more(name: str, backbone: TimmBackbone) -> None:
    model = draw_all(build(name, backbone))
    trained = {key for key, _ in model.named_parameters()}
    rest = set(model.state_dict()) - trained
    assert rest == {"side.tap_scale", "norm.weight", "norm.bias"}
    loaded = build(name, backbone)
    loaded.load_state_dict(model.state_dict())
    inputs = features(model, backbone)
    assert torch.equal(loaded(inputs), model(inputs))


@every_row
def test_a_clip_is_its_frames_where_nothing_mixes_them(name: str, backbone: TimmBackbone) -> None:
    """Pooled over all frames; ST-Adapter is the one that mixes them."""
    inputs = features(model := draw_all(build(name, backbone)), backbone, 6)
    clips = build_model(
        Recipe.build({"side": {"name": ROWS[name].side, **ROWS[name].arguments}}),
        backbone.spec.of_clips(3),
        CLASSES,
        backbone.norm,
        backbone=backbone,
    )
    clips.load_state_dict(model.state_dict())
    found = clips.side(inputs.of_clips(3))
    by_frame = model.side(inputs)[0].unflatten(0, (2, 3)).mean(1)
    assert torch.allclose(found[0], by_frame, atol=1e-5) is (name != "stadapter")
    assert clips.side.out.grid[0] == 3 and found.shape == (1, 2, by_frame.shape[-1])


def test_stadapter_is_its_equation() -> None:
    """On two clips, by hand: a depthwise convolution over frames between two linear layers."""
    tokens = torch.randn(2 * 4, 5, 32, generator=generator(0, "tokens"))
    one, keyed = _Bottleneck(32, 6, 4, 1), generator(0, "parameters")
    for parameter in one.parameters():
        nn.init.normal_(parameter, generator=keyed)
    codes = torch.nn.functional.linear(tokens[:, 1:], one.down_RD, one.down_R)
    conv = nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0), groups=6)
    with torch.no_grad():
        conv.weight.copy_(one.conv_RK[:, None, :, None, None])
        conv.bias.copy_(one.conv_R)
    mixed = conv(codes.unflatten(0, (2, 4)).permute(0, 3, 1, 2)[..., None])[..., 0].permute(0, 2, 3, 1)
    expected = tokens.clone()
    expected[:, 1:] += torch.nn.functional.linear(mixed.flatten(0, 1), one.up_DR, one.up_D)
    torch.testing.assert_close(one(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "lora linear", "lora last 2"])
def test_lora_merged_equals_unmerged(name: str, backbone: TimmBackbone) -> None:
    model = draw_all(build(name, backbone))
    inputs = features(model, backbone)
    assert isinstance(model.side, Lora)
    merged = model.side.merged()
    assert not any("lora" in key for key in merged.state_dict())
    with torch.no_grad():
        tokens, expected = merged(inputs.layers[0]), model.side.tokens(inputs)[0]
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tokens, backbone(images())["block.3"], atol=1e-3)


def test_lora_on_the_last_blocks_is_lora_with_nothing_in_the_first(backbone: TimmBackbone) -> None:
    last, whole = draw_all(build("lora last 2", backbone)), build("lora", backbone)
    with torch.no_grad():
        for key, parameter in last.named_parameters():
            whole.get_parameter(key).copy_(parameter)
    torch.testing.assert_close(
        last(features(last, backbone)), whole(features(whole, backbone)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow  # compiling takes half a minute
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo asks for it
def test_compiled_blocks_give_the_same(backbone: TimmBackbone) -> None:
    model, compiled = (draw_all(build("lora last 2", backbone, compiled=on)) for on in (False, True))
    inputs = features(model, backbone)
    expected, found = gradients(model, inputs), gradients(compiled, inputs)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more blocks than there are": ({"name": "lora", "blocks": 9}, "side.blocks is 9, expected at most 3"),
}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_in_bf16_is_plain_products(checkpointing: bool, backbone: TimmBackbone) -> None:
    model = draw_all(build("lora", backbone, checkpointing=checkpointing))
    inputs = features(model, backbone)
    expected = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16), profile(activities=[ProfilerActivity.CPU]) as seen:
        found = gradients(model, inputs)
    assert not [event.key for event in seen.key_averages() if "flash" in event.key]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.1, atol=0.1 * gradient.abs().max().item())


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, backbone: TimmBackbone) -> None:
    side, words = REFUSED[case]
    with pytest.raises(SideError, match=words):
        build_model(Recipe.build({"side": side}), backbone.spec, CLASSES, backbone.norm, backbone=backbone)


def test_refuses_a_share_of_ridge(backbone: TimmBackbone) -> None:
    recipe = Recipe.build({"side": {"name": "norms"}, "head": {"ridge": 0.5}})
    with pytest.raises(SideError, match=r"head\.ridge is 0\.5 and norms is a baseline"):
        build_model(recipe, backbone.spec, CLASSES, backbone.norm, backbone=backbone)


def test_refuses_features_without_its_tap(backbone: TimmBackbone) -> None:
    spec = backbone.spec.select(["block.3"])
    with pytest.raises(SideError, match=r"reads the tap 'embedding' and got block\.3"):
        build_model(Recipe.build({"side": {"name": "norms"}}), spec, CLASSES, None, backbone=backbone)


def test_refuses_blocks_that_take_more_than_tokens(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "eva", "eva02_tiny_patch14_224", img_size=28)
    rotary = TimmBackbone("eva02_tiny_patch14_224", weights=folder)
    with pytest.raises(BackboneError, match="take more than tokens"):
        rotary.stages()


@pytest.fixture(scope="module")
def eva(tmp_path_factory: pytest.TempPathFactory) -> TimmBackbone:
    """Norms behind the branches, and biases of query and value that stand beside the layer qkv."""
    name = "eva02_enormous_patch14_clip_224"
    folder = hub_folder(tmp_path_factory.mktemp("eva"), name, img_size=28, mlp_ratio=2, global_pool="token")
    return TimmBackbone(name, weights=folder, size=32 // 14 * 14, taps=TAPS)


@pytest.mark.parametrize("name", ["lora", "lora linear", "bitfit", "stadapter", "full"])
def test_eva_without_rotary_positions(name: str, eva: TimmBackbone) -> None:
    model = build(name, eva)
    pictures = images()[..., :28, :28]
    inputs = eva(pictures).select(model.side.spec.names)
    tokens = model.side.tokens(inputs)[0]
    torch.testing.assert_close(tokens, eva(pictures)["block.3"], rtol=1e-4, atol=1e-5)
    if name == "bitfit":
        assert any(key.endswith("q_bias") for key in model.side.trained)
    adam(model, inputs, torch.tensor([0, 1, 2, 0]), 2)
    assert not [key for key, gradient in gradients(model, inputs).items() if not gradient.any()]


def test_adaptformer_refuses_blocks_whose_norm_is_behind(eva: TimmBackbone) -> None:
    with pytest.raises(SideError, match=r"behind its norm, .* EvaBlockPostNorm has none. Type: --backbone"):
        build("adaptformer", eva)


def test_stages_run_to_the_last_tap(backbone: TimmBackbone) -> None:
    stages, found = backbone.stages(), backbone(images())
    with torch.no_grad():
        tokens = stages.embed(images())
        torch.testing.assert_close(tokens, found["embedding"])
        for block in stages.blocks:
            tokens = block(tokens)
    torch.testing.assert_close(tokens, found["block.3"])
