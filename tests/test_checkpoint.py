import copy
import json
import math

import pytest
import torch
from torch import nn

from sidetune.checkpoint import Epoch, State, load_checkpoint, save_checkpoint
from sidetune.errors import ArtifactError


def start(seed=0):
    """A small model of two weight-decay groups, and its optimizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    groups = [{"params": [model[0].weight], "weight_decay": 0.1}, {"params": model[1].parameters()}]
    return model, torch.optim.AdamW([*groups, {"params": [model[0].bias]}], lr=0.01)


def step(model, optimizer, number):
    optimizer.zero_grad()
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
    model(inputs).square().sum().backward()
    optimizer.step()


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after three steps, and what it holds."""
    model, optimizer = start()
    for number in range(3):
        step(model, optimizer, number)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    history = [
        Epoch(0, (0.1 + 0.2, math.nan), 1e-3, ({"accuracy": 1 / 3, "auroc": None}, {"accuracy": 0.5}), 1.5),
        Epoch(1, (0.25, math.nan), 5e-4, ({"accuracy": 0.5}, {"accuracy": 0.5}), 2.5),
    ]
    state = State(
        epoch=2,
        step=7,
        loss_sum=torch.tensor([1 / 3, math.nan], dtype=torch.float64),
        alive=torch.tensor([True, False]),
        history=history,
        best=0.5,
        best_weights=weights,
    )
    save_checkpoint(tmp_path / "c.safetensors", "run-1", model, optimizer, state)
    return tmp_path / "c.safetensors", model, optimizer, state


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


def all_bits(value):
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: all_bits(item) for key, item in value.items()}
    return [all_bits(item) for item in value] if isinstance(value, list) else value


def test_weights_and_moments_come_back_bit_for_bit(saved):
    path, model, optimizer, _ = saved
    restored, fresh = start(seed=1)
    load_checkpoint(path, "run-1", restored, fresh, State())
    assert all_bits(dict(restored.state_dict())) == all_bits(dict(model.state_dict()))
    moments = optimizer.state_dict()["state"]
    assert set(moments[0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert all_bits(fresh.state_dict()) == all_bits(optimizer.state_dict())


def test_training_goes_on_as_if_it_had_not_stopped(saved):
    path, model, optimizer, _ = saved
    restored, fresh = start(seed=1)
    load_checkpoint(path, "run-1", restored, fresh, State())
    for number in range(3, 6):
        step(model, optimizer, number)
        step(restored, fresh, number)
    assert all_bits(dict(restored.state_dict())) == all_bits(dict(model.state_dict()))


def test_where_training_stands_comes_back(saved):
    path, _, _, state = saved
    found = State()
    load_checkpoint(path, "run-1", *start(), found)
    assert (found.epoch, found.step, found.best) == (2, 7, 0.5)
    assert bits(found.loss_sum) == bits(state.loss_sum)
    assert found.alive.tolist() == [True, False]
    assert all_bits(found.best_weights) == all_bits(state.best_weights)
    # NaN is unequal to itself, so histories are compared as text.
    assert repr(found.history) == repr(state.history)


def test_before_anything_is_best(tmp_path):
    save_checkpoint(tmp_path / "c", "run-1", *start(), State())
    found = State(best=0.7, best_weights={"old": torch.zeros(1)})
    load_checkpoint(tmp_path / "c", "run-1", *start(), found)
    assert (found.best, found.best_weights, found.history) == (-math.inf, {}, [])


def test_a_newer_checkpoint_takes_the_place_of_the_older(saved):
    path, model, optimizer, state = saved
    state.step = 8
    save_checkpoint(path, "run-1", model, optimizer, state)
    found = State()
    load_checkpoint(path, "run-1", *start(), found)
    assert found.step == 8
    assert [item.name for item in path.parent.iterdir()] == ["c.safetensors"]


def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(saved):
    path = saved[0]
    model, optimizer = start(seed=1)
    before, state = copy.deepcopy(all_bits(dict(model.state_dict()))), State()
    with pytest.raises(ArtifactError) as caught:
        load_checkpoint(path, "run-2", model, optimizer, state)
    assert str(caught.value) == f"{path} is a checkpoint of another run. Type: --out with a new folder"
    assert all_bits(dict(model.state_dict())) == before
    assert (optimizer.state_dict()["state"], state.epoch) == ({}, 0)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_checkpoint_cut_short_says_what_to_type(saved, keep):
    path = saved[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError) as caught:
        load_checkpoint(path, "run-1", *start(), State())
    assert str(caught.value).startswith(f"{path} is damaged: ")
    assert str(caught.value).endswith(f"Type: rm {path}, then the same fit command, which trains anew")


def test_a_file_that_is_no_checkpoint_says_what_to_type(saved):
    from safetensors.torch import save_file

    path = saved[0]
    for metadata in (None, {"other": "1"}, {"state": "{"}):
        save_file({"a": torch.zeros(1)}, path, metadata)
        with pytest.raises(ArtifactError, match=r"is damaged: .*Type: rm "):
            load_checkpoint(path, "run-1", *start(), State())


def test_a_line_of_history_is_json_without_nan():
    single = Epoch(3, (0.5,), 1e-3, ({"accuracy": 0.9, "auroc": None},), 1.0)
    assert single.to_json() == {
        "epoch": 3,
        "loss": 0.5,
        "lr": 1e-3,
        "val": {"accuracy": 0.9, "auroc": None},
        "seconds": 1.0,
    }
    several = Epoch(0, (0.5, math.nan), 1e-3, ({"accuracy": 0.9}, {"accuracy": None}), 1.0)
    text = json.dumps(several.to_json(), allow_nan=False)
    assert json.loads(text)["loss"] == [0.5, None]
    assert json.loads(text)["val"] == [{"accuracy": 0.9}, {"accuracy": None}]
