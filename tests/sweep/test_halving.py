import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidetune.sweep.halving import expected_epochs, goes_on, rungs, share_trained


@pytest.mark.parametrize(
    ("epochs", "eta", "expected"),
    [(37, 3, (4, 12, 37)), (100, 3, (11, 33, 100)), (16, 4, (1, 4, 16)), (2, 3, (1, 2)), (1, 3, (1,))],
)
def test_rungs_are_thirds_of_thirds(epochs, eta, expected):
    assert rungs(epochs, eta) == expected


@given(st.dictionaries(st.integers(0, 99), st.floats(0, 1), min_size=1), st.integers(2, 4))
def test_the_best_share_goes_on_and_the_best_always(scores, eta):
    going = {number for number in scores if goes_on(number, scores, eta)}
    assert len(going) == math.ceil(len(scores) / eta)
    assert min(scores[number] for number in going) >= max(
        (score for number, score in scores.items() if number not in going), default=0.0
    )


def test_of_equals_the_earlier_goes_on():
    assert [goes_on(number, {4: 0.5, 7: 0.5, 9: 0.5}, 3) for number in (4, 7, 9)] == [True, False, False]


def test_64_trials_cost_about_a_third_of_training_all_to_their_ends():
    """In waves of 16 places, with scores that say at every rung what the end would have said."""
    rng, epochs, eta, places = np.random.default_rng(0), 37, 3, 16
    value = {number: float(score) for number, score in enumerate(rng.random(64))}
    waiting, running, trained = list(value), {}, dict.fromkeys(value, 0)
    reached = {rung: {} for rung in rungs(epochs, eta)}
    while waiting or running:
        while waiting and len(running) < places:
            running[waiting.pop(0)] = 0
        running = {number: done + 1 for number, done in running.items()}
        due = [number for number, done in running.items() if done in reached]
        for number in due:
            reached[running[number]][number] = value[number]
        for number in due:
            others = {one: score for one, score in reached[running[number]].items() if one != 0}
            if running[number] == epochs or not (number == 0 or goes_on(number, others, eta)):
                trained[number] = running.pop(number)
    assert 0.2 < share_trained(trained.values(), epochs) < 0.35
    assert trained[max(value, key=value.get)] == epochs


def test_what_progress_is_counted_against_is_what_halving_lets_through():
    assert expected_epochs(64, 37, 3) == round(64 * 4 + 64 / 3 * 8 + 64 / 9 * 25)
    assert expected_epochs(2, 37, 3) == 2 * 4 + 8 + 25, "one always goes on"
