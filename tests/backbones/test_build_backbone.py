import subprocess
import sys

import pytest

from sidetune.backbones import BACKBONES, build_backbone
from sidetune.backbones.timm import TimmBackbone
from sidetune.backbones.toy import ToyBackbone
from sidetune.errors import BackboneError


def test_names_and_arguments_reach_the_backbone():
    toy = build_backbone("toy", size=40, taps=["block.2"], seed=3, precision="bf16", resize="crop")
    assert isinstance(toy, ToyBackbone)
    assert toy.identity == ToyBackbone(40, seed=3, resize="crop").identity
    assert toy.variant.taps == ("block.2",)
    assert toy.variant.precision == "bf16"


@pytest.mark.parametrize("name", ["timm:test_vit", "timm/test_vit"])
def test_timm_models_by_name(name):
    backbone = build_backbone(name, weights="random", size=64, seed=2)
    assert backbone.identity == TimmBackbone("test_vit", weights=None, size=64, seed=2).identity


def test_none_stands_for_the_default():
    assert build_backbone("toy", size=None, taps=None, weights=None).identity == ToyBackbone().identity


def test_timm_weights_come_from_the_hub_unless_told_otherwise(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "sidetune.backbones.timm.build_vit", lambda _name, weights, *, seed: seen.append(weights) or 1 / 0
    )
    for weights in ({}, {"weights": None}, {"weights": "random"}, {"weights": str(tmp_path)}):
        with pytest.raises(ZeroDivisionError):
            build_backbone("timm:test_vit", **weights)
    assert seen == ["hub", "hub", None, str(tmp_path)]


@pytest.mark.parametrize("name", ["tory", "timm", "timm:", "toy:x", "vit_tiny_patch16_224", ""])
def test_unknown_names(name):
    with pytest.raises(
        BackboneError, match=rf"no backbone named '{name}'\..* Known: demo, hf:MODEL, timm:MODEL, toy\."
    ):
        build_backbone(name)


def test_an_argument_that_a_backbone_does_not_take_is_named():
    with pytest.raises(
        BackboneError,
        match=r"backbone 'toy' takes no 'weights'\. .*Known: pooled, precision, resize, seed, size, taps",
    ):
        build_backbone("toy", weights="x.pth")
    with pytest.raises(BackboneError, match=r"backbone 'toy' takes no 'sizes'\. Did you mean 'size'\?"):
        build_backbone("toy", sizes=3)
    with pytest.raises(BackboneError, match="backbone 'demo' takes no 'seed'"):
        build_backbone("demo", seed=1)


def test_every_builder_says_what_it_builds():
    assert sorted(BACKBONES) == list(BACKBONES)
    assert all(builder.__doc__ for builder in BACKBONES.values())


def test_the_package_does_not_import_what_only_some_backbones_need():
    code = "import sys, sidetune.backbones; print({'timm', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
