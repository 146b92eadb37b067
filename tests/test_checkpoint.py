import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fleets import DATA, build, member, recipe_of
from sidetune.checkpoint import Epoch, Saved, Track, load_checkpoint, save_checkpoint
from sidetune.errors import ArtifactError
from sidetune.fleet import Fleet

MEMBERS = {
    "a": member(recipe_of(epochs=3, batch_size=8), "a"),
    "b": member(recipe_of(epochs=2, batch_size=8, seed=4, order_seed=0), "b", rows=np.arange(7)),
    "c": member(recipe_of("last", epochs=3, batch_size=5), "c"),
}


class Stop(Exception):  # noqa: N818 - not an error
    """Ends an epoch early."""


def stopped(steps):
    """A fleet in the middle of an epoch, after so many steps."""
    fleet = Fleet(DATA, build, 2)
    fleet.add(list(MEMBERS.values()))

    def after_step():
        nonlocal steps
        steps -= 1
        if not steps:
            raise Stop

    with pytest.raises(Stop):
        while True:
            fleet.train_epoch(after_step)
    return fleet


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in the second epoch, of a fleet of two streams, and what it holds."""
    fleet = stopped(4 + 6 + 2)
    fleet.places["b"].died = (1, 1)
    history = [
        Epoch(0, 0.1 + 0.2, 1e-3, {"accuracy": 1 / 3, "auroc": None}, 1.5),
        Epoch(1, math.nan, 0.0, {}, 1.0),
    ]
    rest = Saved(
        {"a": Track(history, 0.5, fleet_model(fleet, "a")), "b": Track(ended=True, dropped=True)},
        seconds=2.5,
        extra={"k": [1, None]},
    )
    save_checkpoint(tmp_path / "c.safetensors", "run-1", fleet, rest)
    return tmp_path / "c.safetensors", fleet, rest


def fleet_model(fleet, name):
    """A member's model in the middle of an epoch."""
    bucket, m = fleet._find(name)
    return bucket.alone(m, build)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


def all_bits(fleet):
    return {
        name: [bits(state.weights), bits(state.mean), bits(state.square), state.steps]
        for name, state in fleet.states().items()
    }


def load(path, run="run-1", members=MEMBERS):
    fleet = Fleet(DATA, build, 2)
    return fleet, load_checkpoint(path, run, fleet, members)


def test_weights_and_moments_come_back_bit_for_bit(saved):
    path, fleet, _ = saved
    found, _ = load(path)
    assert found.names == fleet.names == ("a", "b", "c")
    assert all_bits(found) == all_bits(fleet)
    assert min(state.steps for state in found.states().values()) > 0


def test_training_goes_on_as_if_it_had_not_stopped(saved):
    path, fleet, _ = saved
    found, _ = load(path)
    losses = [one.train_epoch() for one in (fleet, found)]
    losses += [one.train_epoch() for one in (fleet, found)]
    assert repr(losses[0]) == repr(losses[1])
    assert repr(losses[2]) == repr(losses[3])
    assert all_bits(found) == all_bits(fleet)


def test_where_training_stands_comes_back(saved):
    path, fleet, rest = saved
    found, saved_rest = load(path)
    assert (found.epoch, found.stream, found.step) == (fleet.epoch, fleet.stream, fleet.step) == (1, 0, 2)
    for name, place in fleet.places.items():
        assert replace(found.places[name], state=None) == replace(place, state=None)
    assert found.places["b"].died == (1, 1)
    # NaN is unequal to itself, so histories are compared as text.
    assert repr(saved_rest.tracks["a"].history) == repr(rest.tracks["a"].history)
    assert saved_rest.tracks["a"].best == 0.5
    ours, theirs = (one.tracks["a"].model.state_dict() for one in (saved_rest, rest))
    assert {name: bits(ours[name]) for name in ours} == {name: bits(theirs[name]) for name in theirs}
    assert (saved_rest.tracks["b"].ended, saved_rest.tracks["b"].dropped) == (True, True)
    assert (saved_rest.tracks["b"].best, saved_rest.tracks["b"].model) == (-math.inf, None)
    assert (saved_rest.seconds, saved_rest.extra) == (2.5, {"k": [1, None]})


def test_a_newer_checkpoint_takes_the_place_of_the_older(saved):
    path, fleet, rest = saved
    fleet.train_epoch()
    save_checkpoint(path, "run-1", fleet, rest)
    found, _ = load(path)
    assert (found.epoch, found.step) == (2, 0)
    assert [item.name for item in path.parent.iterdir()] == ["c.safetensors"]


def test_a_checkpoint_of_another_run_is_refused(saved):
    path = saved[0]
    with pytest.raises(ArtifactError) as caught:
        load(path, "run-2")
    assert str(caught.value) == f"{path} is a checkpoint of another run. Type: --out with a new folder"


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_checkpoint_cut_short_says_what_to_type(saved, keep):
    path = saved[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path} is damaged, or of another version: ")
    assert str(caught.value).endswith(f"Type: rm {path}, then the same command, which trains anew")


def test_a_file_that_is_no_checkpoint_says_what_to_type(saved):
    path = saved[0]
    for metadata in (None, {"other": "1"}, {"state": "{"}):
        save_file({"a": torch.zeros(1)}, path, metadata)
        with pytest.raises(ArtifactError, match=r"is damaged, .*Type: rm "):
            load(path)


def test_members_of_another_size_or_name_are_refused(saved):
    path = saved[0]
    other = MEMBERS | {"a": member(recipe_of("last"), "a")}
    for members in ({"a": MEMBERS["a"]}, other):
        with pytest.raises(ArtifactError, match=r"is damaged, or of another version: .*Type: rm "):
            load(path, members=members)


def test_a_line_of_history_is_json_without_nan():
    line = Epoch(3, math.nan, 1e-3, {"accuracy": 0.9, "auroc": None}, 1.0)
    text = json.dumps(line.to_json(), allow_nan=False)
    assert json.loads(text) == {
        "epoch": 3,
        "loss": None,
        "lr": 1e-3,
        "val": {"accuracy": 0.9, "auroc": None},
        "seconds": 1.0,
    }
    assert Epoch(3, 0.5, 1e-3, {}, 1.0).to_json()["loss"] == 0.5
