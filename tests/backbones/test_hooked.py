import pytest
import torch
from torch import nn

from sidetune.backbones.hooked import Place, capture, check_size, final_norm
from sidetune.backbones.toy import ToyBackbone
from sidetune.errors import BackboneError


@pytest.mark.parametrize(
    ("size", "patch", "near"), [(100, 14, (98, 112)), (5, 8, (8, 16)), (0, 8, (8, 16)), (225, 16, (224, 240))]
)
def test_a_wrong_size_names_the_nearest_two(size, patch, near):
    with pytest.raises(
        BackboneError, match=rf"not a multiple .* {patch}\. Type: --size {near[0]} or --size {near[1]}$"
    ):
        check_size(size, patch)


def test_a_right_size_passes():
    check_size(98, 14)


def test_final_norm_copies():
    norm = nn.LayerNorm(4, eps=1e-3)
    copied = final_norm(norm)
    norm.weight.data += 1
    assert torch.equal(copied.weight, torch.ones(4))
    assert copied.eps == 1e-3
    assert not copied.weight.requires_grad
    assert final_norm(nn.Identity()) is None
    assert final_norm(None) is None


def test_final_norm_without_weight_or_bias():
    bare = final_norm(nn.LayerNorm(4, elementwise_affine=False))
    assert torch.equal(bare.weight, torch.ones(4))
    assert torch.equal(bare.bias, torch.zeros(4))
    assert torch.equal(final_norm(nn.LayerNorm(4, bias=False)).bias, torch.zeros(4))


def test_capture_leaves_once_everything_is_read():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(7, 7))  # the last would fail
    read = capture([Place("block.1", net[1])], lambda: net(torch.ones(1, 3, 2)))
    assert read["block.1"].shape == (1, 3, 2)
    assert not net[1]._forward_hooks


def test_a_tap_has_its_type_as_soon_as_it_is_read():
    images, whole = torch.rand(2, 3, 32, 32), ToyBackbone()
    half = whole.giving(torch.float16)
    assert (half.module, half.spec, half.variant) == (whole.module, whole.spec, whole.variant)
    found, expected = half(images), whole(images)
    assert all(torch.equal(a, b.half()) for a, b in zip(found.layers, expected.layers, strict=True))
    blocks = [found[tap.name].untyped_storage().data_ptr() for tap in found.spec.blocks]
    assert len(set(blocks)) == 1, "what stays is one piece of memory"
    seen: list[torch.dtype] = []
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    places = [Place("block.1", net[0]), Place("block.2", net[1])]
    read = capture(places, lambda: net(torch.ones(1, 3, 2)), keep=lambda _, tap: tap.to(torch.float16))
    assert {one.dtype for one in read.values()} == {torch.float16}
    assert seen == [torch.float32], "the network goes on with what it had"


def test_capture_refuses_a_submodule_that_does_not_run():
    net, stray = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(BackboneError, match=r"tap 'block\.2' did not run"):
        capture([Place("block.1", net), Place("block.2", stray)], lambda: net(torch.ones(1, 3, 2)))
    assert not net._forward_hooks
    assert not stray._forward_hooks


def test_capture_refuses_a_submodule_that_runs_twice():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, shared)
    with pytest.raises(BackboneError, match=r"tap 'block\.1' runs more than once"):
        capture([Place("block.1", shared)], lambda: net(torch.ones(1, 3, 2)), to_the_end=True)


@pytest.mark.parametrize(("value", "got"), [(torch.ones(2, 2), r"\(2, 2\)"), ({"a": 1}, "dict")])
def test_capture_refuses_what_is_no_tensor_of_tokens(value, got):
    class Net(nn.Module):
        def forward(self, _images):
            return value

    net = Net()
    with pytest.raises(BackboneError, match=rf"gave {got}, expected a tensor \(B, N, D\) or"):
        capture([Place("block.1", net)], lambda: net(None))


def test_the_same_network_reads_other_taps():
    whole, built = ToyBackbone(), ToyBackbone(taps=["image", "block.2"])
    names, images = whole.spec.names, torch.rand(2, 3, 32, 32)
    other = whole.reading(["image", "block.2"])
    assert other.module is whole.module
    assert (other.spec, other.variant, other.identity) == (built.spec, built.variant, built.identity)
    read, expected = other(images), built(images)
    assert all(torch.equal(a, b) for a, b in zip(read.layers, expected.layers, strict=True))
    assert whole.spec.names == names and whole.variant.taps == names
    assert whole(images).spec.names == names
    with pytest.raises(BackboneError, match=r"no tap named 'block\.9'"):
        whole.reading(["block.9"])
