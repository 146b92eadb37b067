import json
import struct

import pytest
import safetensors.torch
import torch

from sidetune.backbones.weightfile import stored_tensors, write_in_turn
from sidetune.errors import BackboneError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c.d": torch.ones(1, 2, 2, dtype=torch.float16),
}


def test_tensors_are_read_as_they_stand(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    found = stored_tensors(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        got = found[name].read()
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got, tensor)
        assert found[name].nbytes == tensor.nbytes


def test_a_folder_with_several_files_and_an_index(tmp_path):
    safetensors.torch.save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    safetensors.torch.save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = stored_tensors(tmp_path)
    assert torch.equal(found["a"].read(), TENSORS["a"])
    assert torch.equal(found["b"].read(), TENSORS["b"])


def test_what_is_written_in_turn_is_what_the_library_reads(tmp_path):
    path = tmp_path / "a.safetensors"
    shapes = {name: tensor.shape for name, tensor in TENSORS.items()}
    write_in_turn(path, shapes, torch.bfloat16, iter(TENSORS.values()))
    found = safetensors.torch.load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor.bfloat16())
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def damaged(path, how):
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    if how == "cut":
        path.write_bytes(whole[:-4])
    elif how == "header":
        path.write_bytes(whole[:12] + b"!" + whole[13:])
    elif how == "type":
        path.write_bytes(whole[: 8 + length].replace(b'"F32"', b'"I32"') + whole[8 + length :])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be read"),
        ("header", "cannot be read"),
        ("type", "a is of type I32, expected F16, BF16, F32"),
        ("gone", "there is no such file"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, how, message):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": TENSORS["a"]}, path)
    damaged(path, how)
    with pytest.raises(BackboneError, match=message):
        stored_tensors(path)


def test_a_file_that_shrinks_while_it_is_used_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": TENSORS["a"]}, path)
    stored = stored_tensors(path)["a"]
    damaged(path, "cut")
    with pytest.raises(BackboneError, match="end in the middle of a tensor"):
        stored.read()
    damaged(path, "gone")
    with pytest.raises(BackboneError, match="cannot be read: No such file"):
        stored.read()


def test_other_paths_are_refused_with_what_is_expected(tmp_path):
    with pytest.raises(BackboneError, match=r"expected a \.safetensors file or a folder"):
        stored_tensors(tmp_path / "a.pth")
    with pytest.raises(
        BackboneError, match=r"expected model\.safetensors or model\.safetensors\.index\.json"
    ):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BackboneError, match="is damaged: KeyError"):
        stored_tensors(tmp_path)
