import pytest
import torch

from sidetune.backbones.toy import ToyBackbone
from sidetune.errors import BackboneError

GOLDEN_WEIGHTS = "a76148618b77b57ce545c6cbbadc23297a321930c7bdf590305b60672dde6c01"


def test_weights_are_the_same_bits_on_every_machine():
    assert ToyBackbone().identity.weights == GOLDEN_WEIGHTS
    assert ToyBackbone(seed=1).identity.weights != GOLDEN_WEIGHTS


def test_shape():
    backbone = ToyBackbone(48)
    assert backbone.spec.names == ("embedding", "block.1", "block.2", "block.3", "block.4")
    assert backbone.spec.last.grid == (1, 6, 6)
    assert backbone(torch.zeros(3, 3, 48, 48))["block.4"].shape == (3, 37, 32)
    assert ToyBackbone(taps=["ffn.2", "attention.2"]).spec.names == ("attention.2", "ffn.2")


def test_refuses():
    with pytest.raises(BackboneError, match="--size 32 or --size 40"):
        ToyBackbone(33)
    with pytest.raises(BackboneError, match=r"unknown resize 'squish'.*'squash'"):
        ToyBackbone(resize="squish")
