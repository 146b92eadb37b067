"""Many members in one pass end where each would have ended alone."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from fleets import DATA, TARGETS, build, inputs, member, recipe_of, run_all
from sidetune.bucket import Member
from sidetune.features import Features
from sidetune.fleet import Fleet, TrainingSet
from sidetune.keyed import Draws
from sidetune.model import SideModel
from sidetune.recipe import Recipe
from sidetune.tasks import Classify, MultiLabel, Regress

THREE = torch.arange(40) * 7 % 3
NUMBERS = torch.linspace(-1, 1, 80).view(40, 2)
NUMBERS[3, 0] = math.nan
YES_NO = (torch.arange(80).view(40, 2) % 3 == 0).float()
CLASSES = ("a", "b", "c")
OTHER_TASKS = {
    "smoothed": {"task": Classify(("a", "b"), (0.5, 0.5), label_smoothing=0.2)},
    "weighted": {"task": Classify(("a", "b"), (0.5, 0.5), class_weights=(0.5, 2.0))},
    "focal": {"task": Classify(("a", "b"), (0.5, 0.5), focal_gamma=2.0)},
    "three classes": {"task": Classify(CLASSES, (0.3, 0.3, 0.4)), "targets": THREE},
    "yes or no": {"task": MultiLabel(("a", "b"), (0.3, 0.3)), "targets": YES_NO},
    "numbers": {"task": Regress(("a", "b"), (0.0, 0.1), (1.0, 2.0)), "targets": NUMBERS},
}


def members() -> list[Member]:
    """One of everything that members may have of their own; 20 steps at most."""
    base = {"batch_size": 6, "epochs": 4, "lr": 1e-2}
    settings = {
        "plain": {},
        "rate": {"lr": 3e-3},
        "decay": {"weight_decay": 0.5},
        "clipped": {"clip_norm": 0.01},
        "unclipped": {"clip_norm": None, "lr": 2e-2},
        "short": {"epochs": 2},
        "long warm-up": {"warmup": 0.5},
        "seed": {"seed": 7, "order_seed": 0},
        "own order": {"seed": 7},
        "batch": {"batch_size": 10},
    }
    found = [member(recipe_of(**{**base, **more}), name) for name, more in settings.items()]
    found += [member(recipe_of(drop_path=rate, **base), f"drop-path {rate}") for rate in (0.2, 0.5)]
    found += [member(recipe_of(**base), name, **more) for name, more in OTHER_TASKS.items()]
    folds = np.arange(30) % 5
    found += [member(recipe_of(**base), f"fold {k}", rows=DATA.rows[folds != k]) for k in range(5)]
    found.append(member(recipe_of(**base), "subset", rows=DATA.rows[:5]))  # none of it in some batches
    found.append(member(recipe_of("last", **base), "last"))
    sides = [{"rank": 3}, {"order": "parallel"}, {"mix_tokens": False}, {"form": "textbook"}]
    for more in sides:
        recipe = Recipe.build({"side": {"name": "losa", "rank": 2, **more}, "train": base})
        found.append(member(recipe, str(more)))
    return found


def in_float64(data: TrainingSet) -> TrainingSet:
    def doubled(rows, spec, draws):
        taps = inputs(rows, spec, draws)
        return Features(tuple(layer.double() for layer in taps.layers), taps.spec)

    return replace(data, inputs=doubled)


def build_float64(recipes, num_outputs) -> SideModel:
    return build(recipes, num_outputs).double()


def trained_weights(fleet: Fleet, which: list[Member], steps: int) -> dict[str, list[torch.Tensor]]:
    """Parameters of members that train together until each has ended."""
    fleet.add(which)
    found = {}
    while fleet.names:
        fleet.train_epoch()
        done = [name for name in fleet.names if fleet.epochs_done(name) == fleet.places[name].member.epochs]
        assert all(fleet.places[name].steps <= steps for name in done)
        found |= {name: list(model.parameters()) for name, model in fleet.remove(done).items()}
    return found


def test_all_parameters_after_twenty_steps_are_those_of_solo_training() -> None:
    everybody = members()
    data = in_float64(DATA)
    together = trained_weights(Fleet(data, build_float64, 3), everybody, 20)
    assert len(together) == len(everybody) > 25
    for one in everybody:
        alone = trained_weights(Fleet(data, build_float64, one.task.num_outputs), [one], 20)[one.name]
        for mine, theirs in zip(together[one.name], alone, strict=True):
            assert mine.shape == theirs.shape
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8, msg=one.name)


def test_outputs_in_float32_are_those_of_solo_training() -> None:
    everybody, rows = members(), np.arange(30, 40)
    fleet = Fleet(DATA, build, 3)
    fleet.add(everybody)
    for _ in range(2):
        fleet.train_epoch()
    together = fleet.outputs(rows)
    assert list(together) != [] and set(together) == {one.name for one in everybody}
    for one in everybody:
        solo = Fleet(DATA, build, one.task.num_outputs)
        solo.add([one])
        for _ in range(2):
            solo.train_epoch()
        expected = solo.outputs(rows)[one.name]
        assert together[one.name].shape == expected.shape == (10, one.task.num_outputs)
        torch.testing.assert_close(together[one.name], expected, rtol=0, atol=1e-3, msg=one.name)
        model = fleet.model(one.name)
        own = model(inputs(rows, model.side.spec, None))[0]
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-3)


def test_members_do_differ() -> None:
    """What is compared above would be worth little if all members were one."""
    fleet = Fleet(DATA, build, 3)
    fleet.add(members())
    fleet.train_epoch()
    outputs = [one[:, :2].flatten().tolist() for one in fleet.outputs(np.arange(30, 40)).values()]
    assert len({tuple(one) for one in outputs}) == len(outputs)


def test_one_pass_reads_a_batch_once_for_all_members_of_a_stream() -> None:
    asked = []

    def counted(rows, spec, draws):
        asked.append(list(rows))
        return inputs(rows, spec, draws)

    fleet = Fleet(replace(DATA, inputs=counted), build, 2)
    shared = {"batch_size": 6, "epochs": 1, "order_seed": 0}
    fleet.add([member(recipe_of(seed=seed, **shared), str(seed)) for seed in range(6)])
    fleet.add([member(recipe_of("last", **shared), "last")])
    fleet.train_epoch()
    assert len(asked) == 5
    assert sorted(row for rows in asked for row in rows) == list(range(30))
    assert [len(stream.buckets) for stream in fleet.streams()] == [2]


def test_a_member_that_leaves_gives_its_place_back_and_the_others_do_not_notice() -> None:
    three = [member(recipe_of(epochs=3, seed=seed, order_seed=0, lr=1e-2), str(seed)) for seed in range(3)]
    fleet = Fleet(DATA, build, 2)
    fleet.add(three)
    fleet.train_epoch()
    left = fleet.remove(["1"])
    assert list(left) == ["1"] and fleet.names == ("0", "2")
    (bucket,) = fleet.buckets()
    assert len(bucket.optimizer.weights_MP) == 2
    late = member(recipe_of(epochs=3, seed=5, order_seed=0, lr=1e-2), "late")
    fleet.add([late])
    fleet.train_epoch()
    assert fleet.epochs_done("late") == 1 and fleet.epochs_done("0") == 2
    undisturbed = Fleet(DATA, build, 2)
    undisturbed.add(three)
    undisturbed.train_epoch()
    undisturbed.train_epoch()
    for name in ("0", "2"):
        pair = (one.model(name).parameters() for one in (fleet, undisturbed))
        for mine, theirs in zip(*pair, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_member_that_diverges_is_dropped_and_named_and_the_others_go_on(capsys) -> None:
    class Breaking(Classify):
        def loss(self, output, target):
            return super().loss(output, target) * math.inf

    good = member(recipe_of(epochs=2, batch_size=8, lr=1e-2), "good")
    bad = member(
        recipe_of(epochs=2, batch_size=8, seed=3, order_seed=0), "bad", task=Breaking(("a", "b"), (0.5, 0.5))
    )
    trained = run_all([good, bad], quiet=False)
    assert "bad diverged at epoch 0, step 0 and is dropped; the others go on" in capsys.readouterr().err
    assert trained["bad"].model is None and math.isnan(trained["bad"].history[0].loss)
    alone = run_all([good])["good"]
    assert alone.model is not None and trained["good"].model is not None
    for mine, theirs in zip(trained["good"].model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert [epoch.loss for epoch in trained["good"].history] == pytest.approx([e.loss for e in alone.history])


def test_a_stream_is_read_no_further_when_all_its_members_have_diverged() -> None:
    class Breaking(Classify):
        def loss(self, output, target):
            return super().loss(output, target) * math.inf

    asked = []

    def counted(rows, spec, draws):
        asked.append(len(rows))
        return inputs(rows, spec, draws)

    bad = member(recipe_of(epochs=1, batch_size=3), "bad", task=Breaking(("a", "b"), (0.5, 0.5)))
    good = member(recipe_of(epochs=1, batch_size=15), "good")
    fleet = Fleet(replace(DATA, inputs=counted, ahead=1), build, 2)
    fleet.add([bad, good])
    losses = fleet.train_epoch()
    assert math.isnan(losses["bad"]) and math.isfinite(losses["good"])
    assert asked.count(3) < 5 and asked.count(15) == 2
    assert fleet.places["good"].steps == 2


def test_waves_end_where_one_pass_ends() -> None:
    everybody = [
        member(recipe_of(epochs=1 + seed % 3, seed=seed, order_seed=0, lr=1e-2), str(seed))
        for seed in range(5)
    ]
    whole, waves = run_all(everybody), run_all(everybody, at_once=2)
    assert list(whole) == list(waves) == list("01234")
    for name, one in whole.items():
        assert one.model is not None and waves[name].model is not None
        assert [epoch.epoch for epoch in one.history] == list(range(1 + int(name) % 3))
        for mine, theirs in zip(one.model.parameters(), waves[name].model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_targets_of_rows_that_a_member_does_not_train_on_are_never_learnt() -> None:
    spoilt = TARGETS.clone()
    spoilt[5:] = 1 - spoilt[5:]
    found = run_all([member(recipe_of(epochs=2, lr=1e-2), name, rows=np.arange(5), targets=targets)
                     for name, targets in (("whole", TARGETS), ("spoilt", spoilt))])  # fmt: skip
    first, second = (found[name].model for name in ("whole", "spoilt"))
    assert first is not None and second is not None
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_batch_is_let_go_before_the_next_is_asked_for(ahead) -> None:
    """With a live backbone each is as large as all taps of a batch."""
    made: list[weakref.ref[Features]] = []

    def alive() -> int:
        return sum(one() is not None for one in made)

    def noted(rows, spec, draws):
        found.append(alive())
        features = inputs(rows, spec, draws)
        made.append(weakref.ref(features.layers[0]))
        return features

    def in_order(rows, spec, view):
        for row in rows[:4]:
            yield noted([row], spec, Draws([0]))

    found: list[int] = []
    fleet = Fleet(replace(DATA, inputs=noted, in_order=in_order, ahead=ahead), build, 2)
    fleet.add([member(recipe_of(epochs=1, batch_size=5))])
    fleet.train_epoch()
    assert len(found) == 6 and max(found) <= 2 * ahead, "those ahead, and the one in use beside them"
    made.clear()
    found.clear()
    assert fleet.outputs(np.arange(4))["one"].shape == (4, 2)
    assert found == [0] * 4


@pytest.mark.parametrize("ahead", [0, 1])
def test_scratch_is_kept_between_steps_but_not_beside_a_live_backbone(ahead) -> None:
    fleet = Fleet(replace(DATA, ahead=ahead), build, 2)
    fleet.add([member(recipe_of(epochs=1, batch_size=15))])
    fleet.train_epoch()
    (bucket,) = fleet.buckets()
    assert bool(bucket.model.side.scratches._free) == bool(ahead)
