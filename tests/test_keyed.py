import hashlib

import pytest
import torch

from sidetune.keyed import Draws, generator

KEY = {"seed": 3, "purpose": "order", "epoch": 5, "step": 7}


def draw(**changes):
    return torch.rand(8, generator=generator(**{**KEY, **changes}))


def test_the_same_key_gives_the_same_draw():
    assert torch.equal(draw(), draw())


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"seed": -3}, {"purpose": "orders"}, {"epoch": 7, "step": 5}, {"epoch": 6}, {"step": 8}],
)
def test_any_part_of_the_key_changes_the_draw(change):
    assert not torch.equal(draw(), draw(**change))


def test_the_key_is_the_one_that_checkpoints_and_artifacts_rest_on():
    digest = hashlib.sha256(b"3/order/5/7").digest()
    expected = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    assert torch.equal(draw(), torch.rand(8, generator=expected))


def test_no_draw_touches_the_global_generator():
    before = torch.random.get_rng_state()
    draw()
    Draws([0, 1]).keep("branch", 0.5, 16, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.6])
def test_keep_is_zero_or_one_over_the_rate_kept_and_one_in_the_mean(rate):
    kept = Draws([0, 1], epoch=2, step=3).keep("branch", rate, 20_000, torch.device("cpu"))
    assert kept.shape == (2, 20_000)
    assert set(kept.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
    assert kept.mean(1) == pytest.approx([1.0, 1.0], abs=0.03)


def test_a_member_draws_what_it_would_draw_alone():
    cpu = torch.device("cpu")
    fleet = Draws([5, 6], epoch=1).keep("branch", 0.5, 64, cpu)
    assert torch.equal(fleet[1:], Draws([6], epoch=1).keep("branch", 0.5, 64, cpu))
    assert not torch.equal(fleet[0], fleet[1])
    assert not torch.equal(fleet, Draws([5, 6], epoch=1).keep("other", 0.5, 64, cpu))
    assert not torch.equal(fleet, Draws([5, 6], epoch=1, step=1).keep("branch", 0.5, 64, cpu))


def test_each_member_has_its_own_rate():
    cpu = torch.device("cpu")
    kept = Draws([5, 6, 7]).keep("branch", [0.5, 0.0, 0.2], 64, cpu)
    for i, (seed, rate) in enumerate([(5, 0.5), (6, 0.0), (7, 0.2)]):
        assert torch.equal(kept[i], Draws([seed]).keep("branch", rate, 64, cpu)[0])
    assert torch.equal(kept[1], torch.ones(64)), "a rate of 0 multiplies by exactly one"
    with pytest.raises(ValueError, match="shorter"):
        Draws([5, 6]).keep("branch", [0.5], 64, cpu)


def test_members_that_joined_later_count_their_own_epochs():
    cpu = torch.device("cpu")
    kept = Draws([5, 6], epoch=[4, 1], step=2).keep("branch", 0.5, 64, cpu)
    assert torch.equal(kept[0], Draws([5], 4, 2).keep("branch", 0.5, 64, cpu)[0])
    assert torch.equal(kept[1], Draws([6], 1, 2).keep("branch", 0.5, 64, cpu)[0])


def test_views_follow_the_order_that_members_share():
    plain = Draws([5, 6], epoch=4, step=2).views(8, 32)
    assert plain == Draws([5, 9], epoch=[4, 1], step=2).views(8, 32), "by the first seed and epoch"
    assert plain != Draws([6, 5], epoch=4, step=2).views(8, 32)
    assert plain != Draws([5, 6], epoch=[3, 4], step=2).views(8, 32)
