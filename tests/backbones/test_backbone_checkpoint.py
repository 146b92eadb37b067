import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sidetune.backbones.checkpoint import load_weights, read_checkpoint
from sidetune.errors import BackboneError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(read: dict) -> bool:
    return read.keys() == WEIGHTS.keys() and all(torch.equal(read[name], WEIGHTS[name]) for name in read)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize(
    "around",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights},
        lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}},
    ],
)
def test_reads_torch_files_and_takes_off_what_is_around(tmp_path, suffix, around):
    torch.save(around(WEIGHTS), tmp_path / f"weights{suffix}")
    assert same(read_checkpoint(tmp_path / f"weights{suffix}"))


def test_reads_safetensors(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert same(read_checkpoint(tmp_path / "weights.safetensors"))


def test_refuses_a_pickle_with_code_in_it_and_does_not_run_it(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(BackboneError, match=r"cannot be read: .*safetensors\.torch\.save_file"):
        read_checkpoint(tmp_path / "weights.pth")
    torch.save({"model": WEIGHTS, "trap": Trap()}, tmp_path / "weights.pt")
    with pytest.raises(BackboneError, match="Expected a file of tensors only"):
        read_checkpoint(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all, only text"])
def test_refuses_a_damaged_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=f"{name} cannot be read: "):
        read_checkpoint(tmp_path / name)


def test_refuses_a_missing_file_and_another_suffix(tmp_path):
    with pytest.raises(BackboneError, match=r"nothing\.pth: there is no such file"):
        read_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(
        BackboneError, match=r"weights\.npz: expected hub, a folder .*\.safetensors, \.pth, \.pt, \.bin"
    ):
        read_checkpoint(tmp_path / "weights.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "got list, expected tensors by name"),
        ({}, "got dict, expected tensors by name"),
        ({"epoch": 3}, "'epoch' is a int, expected tensors by name, or such under the key 'state_dict'"),
    ],
)
def test_refuses_what_is_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(BackboneError, match=message):
        read_checkpoint(tmp_path / "weights.pth")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)


def test_loads_without_the_classifier():
    net = Net()
    load_weights(net, {**WEIGHTS, "head.weight": torch.ones(1)}, "weights x", classifier=("head",))
    assert torch.equal(net.a.weight, WEIGHTS["a.weight"])


def test_renames_only_where_names_differ():
    def rename(weights, _model):
        return {name.replace("old", "a"): tensor for name, tensor in weights.items()}

    def never(_weights, _model):
        raise AssertionError("names are equal")

    net = Net()
    load_weights(net, WEIGHTS, "weights x", rename=never)
    old = {name.replace("a.", "old."): tensor for name, tensor in WEIGHTS.items()}
    load_weights(net, old, "weights x", rename=rename)
    assert torch.equal(net.a.bias, WEIGHTS["a.bias"])


def test_a_mismatch_names_a_few_weights():
    wrong = {f"z{number}": torch.ones(1) for number in range(5)} | {"a.bias": torch.ones(2)}
    with pytest.raises(
        BackboneError,
        match=r"weights x does not fit Net: 1 weights are missing \(a\.weight\), "
        r"5 are unexpected \(z0, z1, z2\)",
    ):
        load_weights(Net(), wrong, "weights x")


def test_a_mismatch_of_shape_changes_nothing():
    net = Net()
    before = net.a.bias.clone()
    with pytest.raises(BackboneError, match=r"a\.weight has shape \(1, 1\), expected \(2, 3\)"):
        load_weights(net, {"a.weight": torch.ones(1, 1), "a.bias": torch.ones(2)}, "weights x")
    assert torch.equal(net.a.bias, before)
