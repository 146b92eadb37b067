"""What every backbone must be. One row a backbone; an exception is a field of its row, with a reason."""

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sidetune.backbones.base import Identity, Variant, weights_digest
from sidetune.backbones.demo import DemoBackbone, demo_weights
from sidetune.backbones.hooked import HookedBackbone
from sidetune.backbones.streamed import StreamedBackbone
from sidetune.backbones.timm import TimmBackbone
from sidetune.backbones.toy import ToyBackbone
from sidetune.backbones.wrap import Wiring, WrappedBackbone
from sidetune.data.preprocess import Preprocess
from sidetune.errors import BackboneError, RequestError
from tiny_vits import demo_is_missing, hub_folder


@dataclass(frozen=True)
class Row:
    build: Callable[..., HookedBackbone]
    sizes: tuple[int, int]
    own: Callable[[nn.Module, Tensor], Tensor] = lambda module, images: module.forward_features(images)
    norm: Callable[[nn.Module, Tensor], Tensor] = lambda module, tokens: module.norm(tokens)
    block: Callable[[int], str] = lambda number: f"blocks.{number - 1}"
    no_seed: str = ""  # why its weights cannot be drawn anew
    runtime: str = "eager"


def conv_net(seed: int) -> nn.Module:
    """Two stages of different width and grid, with activations that overwrite what came before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
            nn.ReLU(inplace=True),
            nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)),
        )


def wrapped(*, size=32, resize="squash", seed=0, **arguments):
    wiring = Wiring({"block.2": "3", "block.1": "1"}, embedding="1")
    preprocess = Preprocess(size=size, resize=resize)
    return WrappedBackbone(conv_net(seed), wiring, preprocess=preprocess, **arguments)


@functools.cache
def folder(architecture: str, seed: int, **arguments: object) -> Path:
    return hub_folder(scratch() / f"{architecture}-{seed}", architecture, seed=seed, **arguments)


@functools.cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp())


def local(architecture: str, sizes: tuple[int, int], **arguments: object) -> Row:
    def build(*, seed=0, **more):
        weights = folder(architecture, seed, img_size=sizes[0], **arguments)
        return TimmBackbone(architecture, weights=weights, **more)

    return Row(build, sizes)


def streamed(architecture: str, sizes: tuple[int, int]) -> Row:
    def build(*, seed=0, **more):
        return StreamedBackbone(architecture, weights=folder(architecture, seed, img_size=sizes[0]), **more)

    return Row(build, sizes, runtime="streamed")


def random_start(name: str, sizes: tuple[int, int]) -> Row:
    return Row(lambda **more: TimmBackbone(name, weights=None, **{"size": sizes[0], **more}), sizes)


ROWS = {
    "toy": Row(ToyBackbone, (32, 48), own=lambda module, images: module(images)),
    "wrapped convolutions": Row(
        wrapped,
        (32, 64),
        own=lambda module, images: module(images).flatten(2).transpose(1, 2),
        norm=lambda _module, tokens: tokens,
        block=lambda number: {1: "1", 2: "3"}[number],
    ),
    "vit": random_start("vit_tiny_patch16_224", (64, 48)),
    "register, no class token, parallel blocks": local("vit_pwee_patch16_reg1_gap_256", (48, 64)),
    "dinov2 with registers": local("vit_small_patch14_reg4_dinov2", (56, 42)),
    "deit distilled": local("deit_tiny_distilled_patch16_224", (32, 64)),
    "clip": local("vit_base_patch32_clip_224", (64, 96)),
    "siglip": local("vit_base_patch16_siglip_224", (32, 48)),
    "eva02": local("eva02_tiny_patch14_224", (28, 56)),
    "dinov3": local("vit_small_patch16_dinov3", (32, 64), embed_dim=64),
    "beit": local("beit_base_patch16_224", (32, 64)),
    "streamed": streamed("vit_small_patch14_reg4_dinov2", (56, 42)),
    "streamed, rotary": streamed("eva02_tiny_patch14_224", (28, 56)),
    "demo": Row(
        lambda size=56, **more: DemoBackbone(size, **more), (56, 70), no_seed="its weights are one file"
    ),
}


@pytest.fixture(autouse=True, scope="module")
def files_made_or_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sidetune.backbones.demo.demo_weights", functools.cache(demo_weights))
        yield
    shutil.rmtree(scratch())


@functools.cache
def standard(name: str) -> HookedBackbone:
    return ROWS[name].build()


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "demo" and demo_is_missing():
        pytest.skip(demo_is_missing())
    return request.param


@pytest.fixture
def row(name: str) -> Row:
    return ROWS[name]


@pytest.fixture
def backbone(name: str) -> HookedBackbone:
    return standard(name)


@pytest.fixture
def images(row: Row) -> Tensor:
    return torch.randn(2, 3, row.sizes[0], row.sizes[0], generator=torch.Generator().manual_seed(0))


def test_last_tap_then_norm_is_the_modules_own_output(backbone, row, images):
    with torch.no_grad():
        own = row.own(backbone.module, images)
        ours = row.norm(backbone.module, backbone(images).layers[-1])
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)


def test_final_norm_is_the_modules_own(backbone, row, images):
    if backbone.norm is None:
        assert not hasattr(backbone.module, "norm")
        return
    tokens = backbone(images).layers[-1]
    norm = backbone.norm
    ours = nn.functional.layer_norm(tokens, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    fc_norm = getattr(backbone.module, "fc_norm", nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(ours, fc_norm(row.norm(backbone.module, tokens)), rtol=0, atol=1e-5)


def test_the_spec_is_true(backbone, row, images):
    spec = backbone.spec
    assert spec.names[0] == "embedding"
    assert all(name.startswith("block.") for name in spec.names[1:])
    assert backbone.preprocess.size == row.sizes[0]
    for tap, layer in zip(spec.taps, backbone(images).layers, strict=True):
        assert layer.shape == (2, tap.num_tokens, tap.width)
        assert layer.dtype == torch.float32
        assert layer.is_contiguous()


def test_the_class_token_is_where_the_spec_says(backbone, images):
    # The class token that enters block 1 is the same for every image; patch tokens are not.
    embedding = backbone.spec.taps[0]
    tokens = backbone(images)["embedding"]
    same = [torch.equal(tokens[0, n], tokens[1, n]) for n in range(embedding.num_tokens)]
    assert same == [True] * embedding.num_prefix + [False] * (embedding.num_tokens - embedding.num_prefix)
    class_tokens = [getattr(backbone.module, name, None) for name in ("cls", "cls_token")]
    has_one = any(token is not None for token in class_tokens)
    assert embedding.cls_index == (0 if has_one else None)


def test_branches_add_up_to_the_block(row, backbone, images):
    full = row.build(taps=backbone.available.names)
    features = full(images)
    assert full.spec == full.available
    if "attention.1" not in full.spec.names:
        return
    before = features["embedding"]
    for tap in full.spec.blocks:
        number = tap.name.removeprefix("block.")
        after = before + features[f"attention.{number}"] + features[f"ffn.{number}"]
        torch.testing.assert_close(features[tap.name], after, rtol=1e-5, atol=1e-5)
        before = features[tap.name]


def test_alone_equals_in_a_batch(backbone, images):
    batch = backbone(images)
    for index in range(len(images)):
        alone = backbone(images[index : index + 1])
        for got, expected in zip(alone.layers, batch.rows(slice(index, index + 1)).layers, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_autograd_and_no_inference_tensors(backbone, images):
    features = backbone(images.clone().requires_grad_())
    assert torch.is_grad_enabled()
    for layer in features.layers:
        assert layer.grad_fn is None
        assert not layer.requires_grad
        assert not layer.is_inference()
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    assert not any(module.training for module in backbone.module.modules())


def test_weights_and_buffers_keep_their_bytes_while_a_side_trains(backbone, images):
    def state() -> list[bytes]:
        tensors = [*backbone.module.parameters(), *backbone.module.buffers()]
        return [tensor.numpy().tobytes() for tensor in tensors]

    before = state()
    side = nn.Linear(backbone.spec.last.width, 2)
    optimiser = torch.optim.SGD(side.parameters(), lr=1.0)
    side(backbone(images).layers[-1]).square().mean().backward()
    optimiser.step()
    assert side.weight.grad.abs().sum() > 0
    assert state() == before
    assert all(parameter.grad is None for parameter in backbone.module.parameters())


def test_a_subset_of_taps_equals_the_same_taps_of_the_full_read(row, backbone, images):
    available = backbone.available
    full = row.build(taps=available.names)(images)
    for names in (available.names[:1], available.names[::-2], available.names[1:3]):
        part = row.build(taps=names)
        assert part.spec == available.select(names)  # in running order, however they were asked for
        for tap, layer in zip(part.spec.taps, part(images).layers, strict=True):
            assert torch.equal(layer, full[tap.name])


def test_stops_after_the_last_tap_asked_for(row, images):
    for tap, expected in (("embedding", [0, 0]), ("block.1", [1, 0]), ("block.2", [1, 1])):
        backbone = row.build(taps=[tap])
        calls = [0, 0]
        for number in (1, 2):

            def count(_module, _inputs, _output, number=number, calls=calls):
                calls[number - 1] += 1

            # Ours runs before the backbone's own hook, which leaves the pass.
            backbone.module.get_submodule(row.block(number)).register_forward_hook(count)
        backbone(images)
        assert calls == expected


def test_hooks_are_gone_after_a_call_even_after_an_error(row, images):
    backbone = row.build()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.module.modules())

    def broken(_module, _inputs):
        raise ArithmeticError("broken on purpose")

    backbone(images)
    assert hooks() == 0
    handle = backbone.module.get_submodule(row.block(2)).register_forward_pre_hook(broken)
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        backbone(images)
    assert hooks() == 1
    handle.remove()
    assert len(backbone(images)) == 2


def test_identity_follows_what_changes_features(row, backbone):
    identity = backbone.identity
    assert row.build().identity == identity
    assert row.build().identity.digest == identity.digest
    assert row.build(taps=["block.1"], precision="bf16").identity == identity
    assert Identity.from_json(identity.to_json()) == identity
    other_size = row.build(size=row.sizes[1]).identity
    assert other_size.digest != identity.digest
    assert any(line.startswith("preprocess.size") for line in other_size.difference(identity))
    cropped = row.build(resize="crop").identity
    assert cropped.digest != identity.digest
    assert any("preprocess.resize: crop here, squash there" in line for line in cropped.difference(identity))


def test_identity_changes_with_a_weight(row, backbone):
    if row.no_seed:
        pytest.skip(row.no_seed)
    other = row.build(seed=1).identity
    assert other.digest != backbone.identity.digest
    assert [line.partition(":")[0] for line in other.difference(backbone.identity)] == ["weights"]


def test_the_weights_fingerprint_sees_one_changed_number(backbone):
    before = weights_digest(backbone.module)
    parameter = next(backbone.module.parameters())
    old = parameter.flatten()[0].item()
    parameter.data.view(-1)[0] += 1
    try:
        assert weights_digest(backbone.module) != before
    finally:
        parameter.data.view(-1)[0] = old
    assert weights_digest(backbone.module) == before


def test_variant_says_how_it_was_run(row, backbone):
    variant = row.build(taps=["block.2", "embedding"], precision="bf16").variant
    assert variant.taps == ("embedding", "block.2")
    assert variant.precision == "bf16"
    assert variant.runtime == row.runtime
    assert variant.versions["torch"] == torch.__version__
    assert Variant.from_json(variant.to_json()) == variant
    assert backbone.variant.precision == "fp32"


def test_check_values_are_deterministic(row, backbone):
    values = backbone.check_values()
    assert tuple(values) == backbone.spec.names
    assert all(std > 0 for _, std in values.values())
    assert backbone.check_values() == values
    assert row.build().check_values() == values


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_near_fp32_and_the_caller_does_not_decide(row, backbone, images, precision):
    exact = backbone(images)
    near = row.build(precision=precision)(images)
    for got, expected in zip(near.layers, exact.layers, strict=True):
        error = (got.float() - expected).norm() / expected.norm()
        assert 0 < error < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        again = backbone(images)
    assert all(torch.equal(a, b) for a, b in zip(again.layers, exact.layers, strict=True))


def test_another_size_has_another_grid(row, backbone):
    other = row.build(size=row.sizes[1])
    images = torch.zeros(1, 3, row.sizes[1], row.sizes[1])
    ratio = row.sizes[1] / row.sizes[0]
    assert other.preprocess.size == row.sizes[1]
    for tap, native in zip(other(images).spec.taps, backbone.spec.taps, strict=True):
        assert tap.grid == (1, round(native.grid[1] * ratio), round(native.grid[2] * ratio))


def test_building_leaves_the_global_generator_alone(row):
    before = torch.random.get_rng_state()
    row.build()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_refuses_what_it_cannot_do(row, backbone, images):
    with pytest.raises(BackboneError, match=r"no tap named 'block\.22'\. Did you mean 'block\.2'\?"):
        row.build(taps=["block.22"])
    with pytest.raises(BackboneError, match=r"unknown precision 'bf15'.* Did you mean 'bf16'"):
        row.build(precision="bf15")
    with pytest.raises(RequestError, match="at least one tap"):
        row.build(taps=[])
    size = row.sizes[0]
    with pytest.raises(
        BackboneError, match=rf"got images \(2, 3, {size}, {size - 1}\).*\(B, 3, {size}, {size}\)"
    ):
        backbone(images[..., 1:])
    with pytest.raises(BackboneError, match=r"of torch\.float64, expected .* of torch\.float32"):
        backbone(images.double())


def test_moves_to_a_device(backbone, images):
    assert backbone.to("cpu") is backbone
    assert backbone.device == torch.device("cpu")
    assert backbone(images).layers[0].device == torch.device("cpu")
