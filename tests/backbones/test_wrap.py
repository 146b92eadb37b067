import copy

import pytest
import torch
from torch import nn

from sidetune.backbones.base import weights_digest
from sidetune.backbones.toy import ToyBackbone, ToyViT
from sidetune.backbones.wrap import Wiring, WrappedBackbone, wrap
from sidetune.data.preprocess import Preprocess
from sidetune.errors import BackboneError

SMALL = Preprocess(size=32)
BLOCKS = {f"block.{number}": f"blocks.{number - 1}" for number in (3, 1, 2, 4)}


def vit() -> ToyViT:
    module = copy.deepcopy(ToyBackbone().module)
    assert isinstance(module, ToyViT)
    return module.requires_grad_(True).train()


def test_equals_the_backbone_that_knows_the_module():
    module = vit()
    wrapped = wrap(
        module, BLOCKS, preprocess=SMALL, embedding="blocks.0", norm="norm", num_prefix=1, cls_index=0
    )
    toy = ToyBackbone()
    assert wrapped.spec == toy.spec
    assert wrapped.identity.weights == toy.identity.weights
    assert wrapped.identity.architecture == "wrapped:ToyViT"
    assert torch.equal(wrapped.norm.weight, toy.norm.weight)
    images = torch.ones(2, 3, 32, 32)
    for ours, theirs in zip(wrapped(images).layers, toy(images).layers, strict=True):
        assert torch.equal(ours, theirs)


def test_the_callers_module_is_left_as_it_was():
    module = vit()
    before = weights_digest(module)
    wrapped = wrap(module, BLOCKS, preprocess=SMALL, num_prefix=1)
    wrapped(torch.ones(1, 3, 32, 32))
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(part._forward_hooks for part in module.modules())
    module.cls.data += 1
    assert weights_digest(wrapped.module) == before


def test_what_is_read_is_not_overwritten_later_in_the_pass():
    net = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(inplace=True))
    backbone = wrap(net, {"block.1": "0", "block.2": "1"}, preprocess=SMALL)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = backbone(images)
    assert features["block.1"].min() < 0
    assert torch.equal(features["block.1"].relu(), features["block.2"])
    with torch.no_grad():
        expected = net[0](images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features["block.1"], expected)


def test_tuples_and_grids_that_are_no_squares():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, (16, 8), stride=(16, 8))
            self.recurrent = nn.GRU(4, 4, batch_first=True)

        def forward(self, images):
            return self.recurrent(self.stem(images).flatten(2).transpose(1, 2))

    backbone = wrap(Net(), {"embedding": "stem", "block.1": "recurrent"}, preprocess=SMALL, grid=(1, 2, 4))
    features = backbone(torch.ones(2, 3, 32, 32))
    assert [tap.grid for tap in backbone.spec.taps] == [(1, 2, 4), (1, 2, 4)]
    assert features["block.1"].shape == (2, 8, 4)
    with pytest.raises(
        BackboneError, match=r"tap 'block\.1' has 8 tokens: 0 prefix tokens and a grid that is a square"
    ):
        wrap(Net(), {"block.1": "recurrent"}, preprocess=SMALL)
    with pytest.raises(BackboneError, match=r"grid \(1, 2, 3\) do not make 8\. Type: num_prefix"):
        wrap(Net(), {"block.1": "recurrent"}, preprocess=SMALL, grid=(1, 2, 3))


def test_branch_taps_alone_are_read_when_there_is_nothing_else():
    backbone = wrap(vit(), {"attention.1": "blocks.0.attention"}, preprocess=SMALL, num_prefix=1)
    assert backbone.spec.names == ("attention.1",)


def test_the_identity_knows_where_the_taps_are():
    def identity(**taps: str):
        wiring = Wiring({name.replace("_", "."): path for name, path in taps.items()}, num_prefix=1)
        return WrappedBackbone(vit(), wiring, preprocess=SMALL).identity

    assert identity(block_1="blocks.0") == identity(block_1="blocks.0")
    difference = identity(block_1="blocks.0").difference(identity(block_1="blocks.1"))
    assert difference == ["arguments.taps.block.1: blocks.0 here, blocks.1 there"]


@pytest.mark.parametrize(
    ("taps", "more", "message"),
    [
        ({"block.1": "block.0"}, {}, r"ToyViT has no submodule 'block\.0'\. Did you mean 'blocks\.0'\?"),
        ({"block.1": "blocks.0"}, {"norm": "nrom"}, r"no submodule 'nrom'\. Did you mean 'norm'\?"),
        ({"block.1": "blocks.0"}, {"norm": "blocks"}, r"norm 'blocks' is a Sequential, expected a LayerNorm"),
        (
            {"layer1": "blocks.0"},
            {},
            r"a tap named 'layer1', expected embedding, block\.1, attention\.1 or ffn\.1",
        ),
        ({"embedding": "patches"}, {"embedding": "blocks.0"}, "the embedding is given twice"),
        ({}, {}, r"no taps to read\. Type: taps="),
    ],
)
def test_refuses(taps, more, message):
    with pytest.raises(BackboneError, match=message):
        wrap(vit(), taps, preprocess=SMALL, num_prefix=1, **more)
