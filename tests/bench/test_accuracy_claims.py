import numpy as np
import pytest

from sidetune.bench.accuracy.claims import OVER_GROUPS, OVER_TASKS, Outcome, claim, compare
from sidetune.paired import middle, seeds_difference


def outcome(method, right_SN, *, task="a", group="one", wanted=None):
    right_SN = np.asarray(right_SN, bool)
    seeds = tuple(range(len(right_SN)))
    return Outcome(task, group, method, "", {}, None, seeds, wanted or len(seeds), (), {}, right_SN=right_SN)


def drawn(share, seeds, images, seed):
    return np.random.default_rng(seed).random((seeds, images)) < share


def paired(ours, theirs):
    return next(compare([ours, theirs], ours.method, theirs.method))


def test_better_is_a_lower_bound_above_zero():
    found = paired(outcome("x", drawn(0.9, 3, 500, 0)), outcome("y", drawn(0.6, 3, 500, 1)))
    assert found.claim == "better" and found.interval[0] > 0
    back = paired(outcome("y", drawn(0.6, 3, 500, 1)), outcome("x", drawn(0.9, 3, 500, 0)))
    assert back.claim == "worse" and back.value == pytest.approx(-found.value)


def test_non_inferior_needs_ten_thousand_images():
    base = drawn(0.5, 3, 12_000, 0)
    alike = base ^ drawn(0.01, 3, 12_000, 1)  # one of a hundred answers differs, either way
    assert paired(outcome("x", alike), outcome("y", base)).claim == "non-inferior"
    assert paired(outcome("x", alike[:, :9_000]), outcome("y", base[:, :9_000])).claim == "undecided"
    assert claim((-0.009, 0.002), 10_000) == "non-inferior"
    assert claim((-0.010, 0.002), 10_000) == "undecided"
    assert claim((-0.009, 0.002), 9_999) == "undecided"


def test_seeds_that_disagree_widen_the_interval():
    ours = np.zeros((3, 400), bool)
    ours[0] = True  # all right with one seed, all wrong with the others
    theirs = drawn(0.33, 3, 400, 0)
    low, high = paired(outcome("x", ours), outcome("y", theirs)).interval
    assert high - low > 0.9


def test_a_closed_form_stands_against_every_seed():
    theirs = drawn(0.5, 3, 200, 0)
    ridge = Outcome("a", "one", "ridge", "", {}, None, (None,), 3, ("",), {}, right_SN=drawn(0.9, 1, 200, 1))
    found = paired(ridge, outcome("y", theirs))
    assert found.value == pytest.approx(ridge.right_SN.mean() - theirs.mean())
    assert found.claim == "better"


def test_nothing_is_claimed_with_fewer_seeds():
    short = outcome("x", drawn(0.9, 2, 500, 0), wanted=3)
    found = paired(short, outcome("y", drawn(0.5, 3, 500, 1)))
    assert found.claim == "no claim: x has 2 of 3 seeds"


@pytest.mark.parametrize(("seeds", "text"), [(1, "x has 1 seed, not 3"), (2, "x has 2 seeds, not 3")])
def test_nothing_is_claimed_of_what_all_have_too_few_seeds_of(seeds, text):
    ours, theirs = outcome("x", drawn(0.9, seeds, 500, 0)), outcome("y", drawn(0.5, seeds, 500, 1))
    assert paired(ours, theirs).claim == f"no claim: {text}"
    ridge = Outcome("a", "one", "ridge", "", {}, None, (None,), 1, ("",), {}, right_SN=drawn(0.1, 1, 500, 2))
    assert paired(ours, ridge).claim == f"no claim: {text}"
    best = outcome("z", drawn(0.9, 3, 500, 0))
    assert paired(best, ridge).claim == "better", "a closed form has no seed to lack"


def test_means_are_over_groups_and_over_tasks_of_all_that_both_have():
    shares = {"a": ("one", 0.9, 0.5), "b": ("one", 0.8, 0.5), "c": ("two", 0.5, 0.5)}
    every = []
    for i, (task, (group, ours, theirs)) in enumerate(shares.items()):
        every.append(outcome("x", drawn(ours, 2, 2000, 2 * i), task=task, group=group))
        every.append(outcome("y", drawn(theirs, 2, 2000, 2 * i + 1), task=task, group=group))
    found = {one.where: one for one in compare(every, "x", "y")}
    assert set(found) == {"a", "b", "c", "one", OVER_GROUPS, OVER_TASKS}
    value = {name: one.value for name, one in found.items()}
    assert value[OVER_TASKS] == pytest.approx((value["a"] + value["b"] + value["c"]) / 3)
    assert value[OVER_GROUPS] == pytest.approx(((value["a"] + value["b"]) / 2 + value["c"]) / 2)
    assert found[OVER_TASKS].images == 6000
    without = [one for one in every if (one.task, one.method) != ("c", "x")]
    assert {one.where for one in compare(without, "x", "y")} == {"a", "b", "one"}


def test_the_interval_of_one_seed_is_that_of_images_alone():
    ours, theirs = drawn(0.7, 1, 1000, 0), drawn(0.6, 1, 1000, 1)
    value, resampled = seeds_difference(ours, theirs)
    apart = ours[0].astype(float) - theirs[0]
    low, high = middle(resampled)
    assert value == pytest.approx(apart.mean())
    expected = 1.96 * apart.std() / np.sqrt(1000)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
