"""Batches ahead of their use: order, exceptions, bounds; and the shuffled order that memory can follow."""

import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from sidetune.features import Features, Spec, Tap
from sidetune.reader import AHEAD, Ahead, EpochOrder, Layout, sent

SHARDS = np.repeat(np.arange(20), 10)  # 200 rows
ROWS = np.arange(1000, 1200)


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_items_come_in_the_jobs_order(ahead):
    with Ahead(range(50), lambda job: job * job, ahead=ahead) as items:
        assert list(items) == [job * job for job in range(50)]
        assert list(items) == []


def test_all_items_are_made_on_one_thread_that_is_not_the_callers():
    with Ahead(range(9), lambda job: threading.get_ident()) as items:
        made = set(items)
    assert len(made) == 1 and threading.get_ident() not in made
    with Ahead(range(9), lambda job: threading.get_ident(), ahead=0) as items:
        assert set(items) == {threading.get_ident()}


def test_two_items_at_most_are_ahead_of_the_one_in_use():
    begun = []
    with Ahead(range(10), lambda job: begun.append(job) or job) as items:
        assert begun == [], "nothing is read before it is asked for"
        for used in items:
            time.sleep(0.01)  # would be time enough for all
            assert len(begun) <= used + 1 + AHEAD
    assert begun == list(range(10))


def test_the_next_items_are_made_while_one_is_used():
    made = [threading.Event() for _ in range(3)]
    with Ahead(range(3), lambda job: made[job].set()) as items:
        next(items)
        assert all(event.wait(timeout=10) for event in made)


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("ahead", [0, 2])
def test_what_a_job_raises_is_raised_unchanged_where_its_item_would_have_come(error, ahead):
    def make(job):
        if job == 3:
            raise error
        return job

    got = []
    with pytest.raises(type(error)) as caught, Ahead(range(9), make, ahead=ahead) as items:
        got.extend(iter(items.__next__, None))
    assert caught.value is error
    assert got == [0, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_ends_when_its_user_raises(error):
    before, begun = threading.active_count(), []
    with pytest.raises(error), Ahead(range(100), begun.append) as items:
        next(items)
        raise error
    assert threading.active_count() == before
    so_far = len(begun)
    assert so_far <= 1 + AHEAD
    time.sleep(0.05)
    assert len(begun) == so_far, "no job begins after the end"


def test_a_process_that_is_interrupted_in_the_middle_ends():
    code = (
        "from sidetune.reader import Ahead\n"
        "items = Ahead(range(100), lambda job: job)\n"
        "items.__enter__()\n"
        "next(items)\n"
        "raise KeyboardInterrupt\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0 and done.stderr.rstrip().endswith("KeyboardInterrupt")


THREADS = """
import threading, torch
from sidetune.reader import Ahead
torch.set_num_threads(3)
with Ahead(range(2), lambda job: torch.get_num_threads()) as items:
    inside, during, later = next(items), torch.get_num_threads(), []
    other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    other.start()
    other.join()
    print(inside, during, later[0], next(items))
print(torch.get_num_threads())
"""


def test_the_reading_thread_has_one_torch_thread_and_others_keep_theirs():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout == "1 3 3 1\n3\n"


def test_features_are_sent_whole():
    spec = Spec((Tap("block.1", "block", 3, (1, 2, 2)),))
    features = Features((torch.randn(2, 4, 3).half(),), spec, torch.ones(2, 4).bool())
    there = sent(features, torch.device("cpu"))
    assert there.spec is spec
    assert torch.equal(there.layers[0], features.layers[0]) and torch.equal(there.mask, features.mask)


# the order


def draw(window, seed=0, epoch=0):
    return EpochOrder.draw(ROWS, SHARDS, window, seed=seed, epoch=epoch)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 19, 20, 99])
def test_every_row_comes_once(window):
    assert sorted(draw(window).rows) == ROWS.tolist()


@pytest.mark.parametrize("window", [None, 3])
def test_the_order_is_keyed_by_seed_and_epoch(window):
    same, again = draw(window, 5, 2), draw(window, 5, 2)
    assert np.array_equal(same.rows, again.rows) and same.shards == again.shards
    for other in (draw(window, 6, 2), draw(window, 5, 3)):
        assert not np.array_equal(same.rows, other.rows)


def test_a_window_that_holds_all_shards_is_the_full_shuffle():
    for window in (20, 99):
        assert np.array_equal(draw(window).rows, draw(None).rows)
        assert draw(window).shards == ()


@pytest.mark.parametrize("window", [1, 3, 7])
def test_no_more_than_a_window_of_shards_is_read_before_the_next_window(window):
    order = draw(window)
    for first in range(0, 20, window):
        rows = order.rows[first * 10 : (first + window) * 10]
        shards = SHARDS[np.searchsorted(ROWS, rows)]
        assert set(shards) == set(order.shards[first : first + window])
        if window > 1:
            assert len(set(shards[: 5 * window])) > 1, "within a window samples of all its shards are mixed"


def test_a_row_is_anywhere_in_the_epoch_as_often_as_elsewhere():
    quarter = Counter(int(np.flatnonzero(draw(2, epoch=epoch).rows == 1037)[0]) // 50 for epoch in range(400))
    assert all(60 <= quarter[part] <= 140 for part in range(4)), quarter  # 100 expected, 5 deviations


@pytest.mark.parametrize("size", [1, 7, 32, 500])
@pytest.mark.parametrize("window", [1, 3, 19])
def test_shards_are_asked_for_once_before_they_are_needed_and_never_two_windows_ahead(size, window):
    order, asked = draw(window), []
    for first in range(0, 200, size):
        asked += order.soon(first, min(first + size, 200), begins=first == 0)
        needed = {order.shards.index(SHARDS[row - 1000]) for row in order.rows[first : first + size]}
        assert needed <= set(range(len(asked)))
        assert len(asked) <= (first + size) // 10 + 1 + window
    assert asked == list(order.shards)


def test_a_resumed_epoch_asks_for_the_window_that_it_is_in():
    order = draw(4)
    assert order.soon(50, 60, begins=True) == order.shards[4:10]
    assert draw(None).soon(0, 10, begins=True) == ()


def layout(sizes):
    return Layout(np.arange(len(sizes)), dict(enumerate(sizes)), lambda numbers: None)


def test_half_of_the_memory_is_shuffled_whole_and_of_more_a_quarter_at_a_time():
    assert layout([10] * 10).window(200) is None
    assert layout([10] * 10).window(199) == 4
    assert layout([10] * 9 + [30]).window(200) == 1
    assert layout([100, 100]).window(8) == 1, "a shard at least"
