"""The one loop: schedule, groups, clipping, members, resume, all against what they should be."""

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fleets import DATA, TARGETS, build, inputs, member, recipe_of, run, run_all, weights
from sidetune import train as loop
from sidetune.bucket import learning_rate
from sidetune.checkpoint import Scores
from sidetune.errors import ArtifactError, DivergedError
from sidetune.features import Features, Spec
from sidetune.fleet import Fleet
from sidetune.keyed import Draws, generator
from sidetune.reader import Layout
from sidetune.recipe import TrainRecipe
from sidetune.tasks import Regress


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


@pytest.mark.parametrize("side", ["losa", "last"])
def test_a_step_is_adamw_on_the_mean_loss_with_clipping(side: str) -> None:
    """Ten steps against torch's own AdamW and clip_grad_norm_, written out."""
    recipe = recipe_of(side, epochs=2, batch_size=6, lr=1e-2, clip_norm=0.05)
    trained, reference = run(recipe), build([recipe], 2)
    reference.start([0])
    matrices = [p for p in reference.parameters() if p.ndim > 2]
    vectors = [p for p in reference.parameters() if p.ndim <= 2]
    assert id(reference.head.bias_MK) in {id(p) for p in vectors}
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay(10)},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for epoch in range(2):
        order = torch.randperm(30, generator=generator(0, "order", epoch))
        for step in range(5):
            rows = order[6 * step : 6 * step + 6]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(5 * epoch + step, 10, recipe.train)
            optimizer.zero_grad()
            output = reference(inputs(rows.tolist(), reference.side.spec, Draws([0])))[0]
            loss = torch.nn.functional.cross_entropy(output, TARGETS[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
            optimizer.step()
            losses.append(loss.item())
    for mine, theirs in zip(weights(trained), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert [epoch.loss for epoch in trained.history] == pytest.approx(
        [np.mean(losses[:5]), np.mean(losses[5:])]
    )


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    found = [weights(run(recipe_of(epochs=1, batch_size=8, seed=seed))) for seed in (3, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


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
    select: str,
    window: int | None,
    ahead: int,
) -> None:
    """A machine with other memory, which would shuffle otherwise, goes on in the order that was begun."""
    recipe = recipe_of(drop_path=0.3, epochs=3, batch_size=8, lr=1e-2, select=select)  # 4 steps an epoch
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def scored(fleet: Fleet) -> dict[str, Scores]:
        outputs = fleet.outputs(np.arange(30, 40))
        return {name: {"balanced_accuracy": float(one[:, 0].mean())} for name, one in outputs.items()}

    data = replace(DATA, layout=lambda spec: LAYOUT, window=window, ahead=ahead)
    expected = run(recipe, data, validate=scored)
    calls = 0

    def killed(rows: Sequence[int], spec: Spec, draws: Draws) -> Features:
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise Killed
        return inputs(rows, spec, draws)

    file = {"checkpoint": tmp_path / "checkpoint.safetensors", "run_hash": "r"}
    with pytest.raises(Killed):
        run(recipe, replace(data, inputs=killed), validate=scored, **file)
    found = run(recipe, replace(data, window=5), validate=scored, **file)
    for one, two in zip(weights(expected), weights(found), strict=True):
        assert torch.equal(one, two)
    assert [(row.loss, row.val) for row in found.history] == [(row.loss, row.val) for row in expected.history]


@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_are_prepared_in_step_order_whatever_is_ahead(ahead: int) -> None:
    asked: list[tuple[int, int, list[int]]] = []

    def listed(rows: Sequence[int], spec: Spec, draws: Draws) -> Features:
        asked.append((draws.epochs[0], draws.step, list(rows)))
        return inputs(rows, spec, draws)

    threads = threading.active_count()
    run(recipe_of(epochs=2, batch_size=8), replace(DATA, inputs=listed, ahead=ahead))
    assert [(epoch, step) for epoch, step, _ in asked] == [(e, s) for e in range(2) for s in range(4)]
    for epoch in range(2):
        order = torch.randperm(30, generator=generator(0, "order", epoch)).tolist()
        assert [row for of, _, rows in asked for row in rows if of == epoch] == order
    assert threading.active_count() == threads, "the reading thread has ended"


def test_reading_ahead_changes_no_byte_and_a_window_is_asked_for_before_it_is_read() -> None:
    asked: list[int] = []
    layout = replace(LAYOUT, fetch=asked.extend)
    found = [
        weights(run(recipe_of(epochs=2), replace(DATA, layout=lambda spec: layout, window=2, ahead=ahead)))
        for ahead in (0, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sorted(asked) == sorted(4 * list(range(6))), "every shard once an epoch"


class Diverging(Regress):
    """A task whose loss is never finite."""

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * math.inf).mean(-1)


DIVERGING = Diverging(("a",), (0.0,), (1.0,))


def test_the_reading_thread_ends_when_training_diverges() -> None:
    threads = threading.active_count()
    with pytest.raises(DivergedError):
        run_all([member(recipe_of(epochs=1, batch_size=4), task=DIVERGING)])
    assert threading.active_count() == threads


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    path = tmp_path / "checkpoint.safetensors"
    run(recipe_of(epochs=1), checkpoint=path, run_hash="one")
    with pytest.raises(ArtifactError, match="is a checkpoint of another run"):
        run(recipe_of(epochs=1), checkpoint=path, run_hash="two")


def test_select_best_keeps_the_epoch_that_validation_liked() -> None:
    kept: list[dict[str, torch.Tensor]] = []

    def scored(fleet: Fleet) -> dict[str, Scores]:
        kept.append({name: tensor.clone() for name, tensor in fleet.model("one").state_dict().items()})
        return {"one": {"balanced_accuracy": [0.3, 0.9, 0.9, 0.1][len(kept) - 1]}}

    trained = run(recipe_of(epochs=4, lr=1e-2, select="best"), validate=scored)
    assert trained.model is not None
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, kept[1][name]), name


def test_no_member_left_is_an_error_that_says_what_to_type() -> None:
    expected = "the loss is not finite at epoch 0, step 0: every member diverged. Type: --set train.lr=3e-4"
    with pytest.raises(DivergedError) as error:
        run_all([member(recipe_of(epochs=1), task=DIVERGING)])
    assert str(error.value) == expected


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    run(recipe_of(drop_path=0.5, epochs=1))
    assert torch.equal(before, torch.random.get_rng_state())
