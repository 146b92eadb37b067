"""What members take is said before they take it, and holds."""

from dataclasses import dataclass

import pytest
import torch

import sidetune.waves
from fleets import DATA, TASK, build, member, recipe_of
from peaks import measured
from sidetune.fleet import Fleet
from sidetune.sides.chunks import CACHE_BYTES
from sidetune.waves import COPIES, SHARE, member_bytes, members_at_once

CASES = ["losa-fast", "losa-textbook", "last-fast", "last-textbook"]


@pytest.fixture(scope="module")
def peaks():
    return measured(CASES)


@pytest.mark.parametrize("case", CASES)
def test_what_members_are_said_to_take_is_what_they_take(peaks, case):
    """Within a quarter, and beside it what two chunks work in. B 32, N 65, D 96, L 12, M 8."""
    predicted, taken = peaks[case]
    assert predicted > 30e6, "at a size where it matters"
    assert 0.75 * predicted <= taken <= 1.25 * predicted + 2 * CACHE_BYTES


@dataclass
class Told:
    """As much of a job as `members_at_once` asks for."""

    said: list[str]
    device: str = "cpu"

    @property
    def backbone(self):
        return self

    def say(self, text):
        self.said.append(text)


def fleet_of(count, side="losa"):
    members = [member(recipe_of(side, epochs=1, seed=seed), str(seed)) for seed in range(count)]
    return Fleet(DATA, build, 2), members


def at_once(memory, fleet, members, monkeypatch):
    monkeypatch.setattr(sidetune.waves, "total_memory", lambda: memory)
    told = Told([], torch.device("cpu"))
    return members_at_once(told, fleet, members), told.said[0]


def test_as_many_train_at_once_as_a_quarter_of_the_memory_holds(monkeypatch):
    fleet, members = fleet_of(5)
    each = member_bytes(fleet, members[0])
    found, said = at_once(SHARE * 5 * each, fleet, members, monkeypatch)
    assert found == 5 and said.startswith("training 5 members in one pass: about ")
    found, said = at_once(SHARE * 5 * each - 1, fleet, members, monkeypatch)
    assert found == 4 and said.startswith("training 5 members in 2 passes of 4 at most: all would take ")
    assert at_once(SHARE * 2 * each, fleet, members, monkeypatch)[0] == 2
    assert at_once(0, fleet, members, monkeypatch)[0] == 1, "one trains whatever the memory"


def test_the_largest_kind_of_member_counts_for_all(monkeypatch):
    fleet, members = fleet_of(2)
    large = member(recipe_of("last", epochs=1, batch_size=256), "large")
    most = member_bytes(fleet, large)
    assert most > 2 * member_bytes(fleet, members[0])
    assert at_once(SHARE * 2 * most, fleet, [*members, large], monkeypatch)[0] == 3, "all fit"
    assert at_once(SHARE * 2 * most, fleet, [*members, large, large], monkeypatch)[0] == 2


def test_members_of_one_architecture_count_with_their_own_batches(monkeypatch):
    fleet, _ = fleet_of(0)
    large, small = (member(recipe_of("last", epochs=1, batch_size=n), str(n)) for n in (256, 8))
    most = member_bytes(fleet, large)
    for members in ([large, small], [small, large]):
        assert at_once(SHARE * most, fleet, members, monkeypatch)[0] == 1


def test_memory_grows_with_the_batch_and_holds_every_copy_of_a_parameter():
    fleet, _ = fleet_of(1)
    small, large = (
        member_bytes(fleet, member(recipe_of("last", batch_size=size, epochs=1))) for size in (16, 64)
    )
    numbers = sum(parameter.numel() for parameter in build([recipe_of("last")], 2).parameters())
    fixed = COPIES * 4 * numbers
    assert large - fixed == pytest.approx(4 * (small - fixed), rel=0.01)
    assert TASK.num_outputs == 2 and small > fixed


def test_to_measure_leaves_the_fleet_as_it_was():
    fleet, members = fleet_of(2)
    member_bytes(fleet, members[0])
    assert fleet.names == () and fleet.epoch == 0
    assert not any(one.grad is not None for bucket in fleet.buckets() for one in bucket.model.parameters())
