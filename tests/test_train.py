"""The one loop: schedule, groups, clipping, members, resume, all against what they should be."""

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from sidetune import train as loop
from sidetune.checkpoint import Scores
from sidetune.errors import ArtifactError, DivergedError
from sidetune.features import Features, Spec, Tap
from sidetune.keyed import Draws, generator
from sidetune.model import SideModel
from sidetune.reader import Layout
from sidetune.recipe import TrainRecipe
from sidetune.sides.last import Last
from sidetune.sides.losa import Losa
from sidetune.tasks import Classify
from sidetune.train import Trained, TrainingSet, learning_rate, train

SPEC = Spec(
    (
        Tap("embedding", "embedding", 6, (1, 2, 2)),
        *(Tap(f"block.{i}", "block", 6, (1, 2, 2)) for i in (1, 2, 3)),
    )
)
TASK = Classify(("a", "b"), (0.5, 0.5))
TARGETS = torch.arange(40) % 2


def make_layers() -> list[torch.Tensor]:
    keyed = generator(0, "layers")
    return [torch.randn(40, 4, 6, generator=keyed) + TARGETS[:, None, None] * 0.5 for _ in SPEC.taps]


LAYERS = make_layers()


def inputs(rows: Sequence[int], draws: Draws) -> Features:
    return Features(tuple(layer[list(rows)] for layer in LAYERS), SPEC)


DATA = TrainingSet(inputs, TARGETS, np.arange(30))


def no_scores(model: torch.nn.Module) -> list[Scores]:
    return [{"balanced_accuracy": 0.5}]


def make_model(
    seeds: Sequence[int] = (0,), drop_path: float = 0.0, side: type[Losa | Last] = Losa
) -> SideModel:
    model = SideModel(side(SPEC, rank=2, members=len(seeds), drop_path=drop_path), 2)
    model.start(seeds)
    return model


def run(model: SideModel, recipe: TrainRecipe, seeds: Sequence[int] = (0,), **more: object) -> Trained:
    arguments = {"validate": no_scores, "quiet": True, **more}
    return train(model, DATA, TASK, recipe, seeds=seeds, **arguments)  # type: ignore[arg-type]


def test_learning_rate_climbs_then_falls_as_a_cosine() -> None:
    recipe = TrainRecipe(lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.01 + 0.99 * 0.5)
    assert rates[10] == pytest.approx(1.0) == max(rates)
    middle = 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * 45 / 89))
    assert rates[55] == pytest.approx(middle)
    assert rates[99] == pytest.approx(0.001)
    assert learning_rate(0, 1, TrainRecipe(lr=1.0, warmup=0.0)) == 1.0


def test_a_step_is_adamw_on_the_mean_loss_with_clipping() -> None:
    """Ten steps against torch's own AdamW and clip_grad_norm_, written out."""
    recipe = TrainRecipe(epochs=2, batch_size=6, lr=1e-2, clip_norm=0.05)
    model, reference = make_model(), make_model()
    trained = run(model, recipe)
    matrices = [p for p in reference.parameters() if p.ndim > 2]
    vectors = [p for p in reference.parameters() if p.ndim <= 2]
    assert {id(p) for p in vectors} == {id(reference.head.bias_MK)}
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for epoch in range(2):
        order = torch.randperm(30, generator=generator(0, "order", epoch))
        for step in range(5):
            rows = order[6 * step : 6 * step + 6]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(5 * epoch + step, 10, recipe)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                reference(inputs(rows.tolist(), Draws([0])))[0], TARGETS[rows]
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
            optimizer.step()
            losses.append(loss.item())
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert [epoch.loss[0] for epoch in trained.history] == pytest.approx(
        [np.mean(losses[:5]), np.mean(losses[5:])]
    )


@pytest.mark.parametrize("side", [Losa, Last])
def test_members_train_as_they_would_alone(side: type[Losa | Last]) -> None:
    """The first seed orders the batches of all, so solo runs are given the same order."""
    recipe = TrainRecipe(epochs=2, batch_size=8, lr=1e-2)
    fleet = make_model((5, 9), drop_path=0.2, side=side)
    run(fleet, recipe, (5, 9))
    solo = make_model((5,), drop_path=0.2, side=side)
    run(solo, recipe, (5,))
    for (name, many), one in zip(fleet.named_parameters(), solo.parameters(), strict=True):
        torch.testing.assert_close(many[0], one[0], rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(many[0], many[1])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    recipe = TrainRecipe(epochs=1, batch_size=8)
    models = [make_model((seed,)) for seed in (3, 3, 4)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        run(model, recipe, (seed,))
    same = [torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)]
    other = [torch.equal(a, b) for a, b in zip(models[0].parameters(), models[2].parameters(), strict=True)]
    assert all(same) and not all(other)


class Killed(Exception):  # noqa: N818 - not an error
    """What stands for a kill: nothing after it runs."""


def fetch_nothing(numbers: Sequence[int]) -> None:
    """In place of a store's."""


LAYOUT = Layout(np.arange(30) // 5, dict.fromkeys(range(6), 1), fetch_nothing)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 7])
@pytest.mark.parametrize(
    ("select", "window", "ahead"), [("last", None, 2), ("best", None, 0), ("last", 2, 2)]
)
def test_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
    select: Literal["last", "best"],
    window: int | None,
    ahead: int,
) -> None:
    """A machine with other memory, which would shuffle otherwise, goes on in the order that was begun."""
    recipe = TrainRecipe(epochs=3, batch_size=8, lr=1e-2, select=select)  # 4 steps an epoch
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def scored(model: torch.nn.Module) -> list[Scores]:
        with torch.no_grad():
            return [{"balanced_accuracy": float(model(inputs(range(30, 40), Draws([0])))[0, :, 0].mean())}]

    whole = make_model(drop_path=0.3)
    data = TrainingSet(inputs, TARGETS, np.arange(30), LAYOUT, window, ahead=ahead)
    expected = train(whole, data, TASK, recipe, seeds=(0,), validate=scored, quiet=True)
    calls = 0

    def killed(rows: Sequence[int], draws: Draws) -> Features:
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise Killed
        return inputs(rows, draws)

    path = tmp_path / "checkpoint.safetensors"
    first = make_model(drop_path=0.3)
    with pytest.raises(Killed):
        train(first, replace(data, inputs=killed), TASK, recipe, seeds=(0,), validate=scored,
              checkpoint=path, run_hash="r", quiet=True)  # fmt: skip
    resumed = make_model((8,), drop_path=0.3)
    elsewhere = replace(data, window=5)
    found = train(resumed, elsewhere, TASK, recipe, seeds=(0,), validate=scored, checkpoint=path,
                  run_hash="r", quiet=True)  # fmt: skip
    assert found.window == expected.window == window
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert [(row.loss, row.val) for row in found.history] == [(row.loss, row.val) for row in expected.history]


@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_are_prepared_in_step_order_whatever_is_ahead(ahead: int) -> None:
    asked: list[tuple[int, int, list[int]]] = []

    def listed(rows: Sequence[int], draws: Draws) -> Features:
        asked.append((draws.epoch, draws.step, list(rows)))
        return inputs(rows, draws)

    threads = threading.active_count()
    data = TrainingSet(listed, TARGETS, np.arange(30), ahead=ahead)
    train(
        make_model(),
        data,
        TASK,
        TrainRecipe(epochs=2, batch_size=8),
        seeds=(0,),
        validate=no_scores,
        quiet=True,
    )
    assert [(epoch, step) for epoch, step, _ in asked] == [(e, s) for e in range(2) for s in range(4)]
    for epoch in range(2):
        order = torch.randperm(30, generator=generator(0, "order", epoch)).tolist()
        assert [row for of, _, rows in asked for row in rows if of == epoch] == order
    assert threading.active_count() == threads, "the reading thread has ended"


def test_reading_ahead_changes_no_byte_and_a_window_is_asked_for_before_it_is_read() -> None:
    asked: list[int] = []
    models = [make_model() for _ in range(2)]
    layout = replace(LAYOUT, fetch=asked.extend)
    for model, ahead in zip(models, (0, 2), strict=True):
        data = TrainingSet(inputs, TARGETS, np.arange(30), layout, 2, ahead=ahead)
        train(model, data, TASK, TrainRecipe(epochs=2), seeds=(0,), validate=no_scores, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    assert sorted(asked) == sorted(4 * list(range(6))), "every shard once an epoch"


def test_the_reading_thread_ends_when_training_diverges() -> None:
    threads, model = threading.active_count(), make_model()
    with torch.no_grad():
        model.head.weight_MDK.fill_(math.nan)
    with pytest.raises(DivergedError):
        run(model, TrainRecipe(epochs=1, batch_size=4))
    assert threading.active_count() == threads


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    path = tmp_path / "checkpoint.safetensors"
    run(make_model(), TrainRecipe(epochs=1), checkpoint=path, run_hash="one")
    with pytest.raises(ArtifactError, match="is a checkpoint of another run"):
        run(make_model(), TrainRecipe(epochs=1), checkpoint=path, run_hash="two")


def test_select_best_keeps_the_epoch_that_validation_liked() -> None:
    kept: list[dict[str, torch.Tensor]] = []

    def scored(model: torch.nn.Module) -> list[Scores]:
        kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return [{"balanced_accuracy": [0.3, 0.9, 0.9, 0.1][len(kept) - 1]}]

    model = make_model()
    run(model, TrainRecipe(epochs=4, lr=1e-2, select="best"), validate=scored)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[1][name]), name


def test_a_member_that_diverges_is_dropped_and_the_others_go_on() -> None:
    recipe = TrainRecipe(epochs=2, batch_size=8, lr=1e-2)
    fleet, solo = make_model((5, 9)), make_model((5,))
    with torch.no_grad():
        fleet.head.weight_MDK[1] = math.inf
    trained = run(fleet, recipe, (5, 9))
    run(solo, recipe, (5,))
    assert trained.dropped == (1,)
    assert math.isnan(trained.history[0].loss[1]) and math.isfinite(trained.history[0].loss[0])
    for many, one in zip(fleet.parameters(), solo.parameters(), strict=True):
        torch.testing.assert_close(many[0], one[0], rtol=1e-5, atol=1e-6)


def test_no_member_left_is_an_error_that_says_what_to_type() -> None:
    model = make_model()
    with torch.no_grad():
        model.head.weight_MDK.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"the loss is \[nan\] at epoch 0, step 0: every member diverged"):
        run(model, TrainRecipe(epochs=1))


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    run(make_model(drop_path=0.5), TrainRecipe(epochs=1))
    assert torch.equal(before, torch.random.get_rng_state())
