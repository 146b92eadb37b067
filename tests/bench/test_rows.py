import json
from dataclasses import replace

import pytest
import torch

from sidetune.bench.rows import Bench, Row, describe_machine
from sidetune.bench.timing import in_turn

FAST = Row("losa-fast", "ms_per_image", 2.0, "ms", spread=(1.5, 2.25))
SLOW = Row("losa-textbook", "ms_per_image", 8.0, "ms")
FIELDS = {"case", "metric", "value", "unit", "against", "ratio", "goal", "spread"}


def bench(*rows):
    return Bench(rows, describe_machine(torch.device("cpu"), {"batch": 4}))


def test_a_ratio_is_the_value_over_that_of_the_other_case():
    row = FAST.to(SLOW, goal=0.3)
    assert (row.value, row.against, row.ratio, row.goal) == (2.0, "losa-textbook", 0.25, 0.3)
    assert FAST.to(SLOW, "taps").against == "taps"


@pytest.mark.parametrize(
    ("metric", "ratio", "met"),
    [
        ("ms_per_image", 0.3, True),
        ("ms_per_image", 0.31, False),
        ("gb_per_s", 0.7, True),
        ("gb_per_s", 0.69, False),
    ],
)
def test_a_goal_is_a_largest_ratio_but_a_least_one_for_rates(metric, ratio, met):
    goal = 0.3 if metric == "ms_per_image" else 0.7
    row = Row("a", metric, 5.0, "", "b", ratio, goal)
    assert row.met is met
    assert replace(row, goal=None).met is None
    assert replace(row, ratio=None, value=goal).met is True


def test_json_is_rows_and_environment_and_comes_back():
    found = bench(FAST.to(SLOW), SLOW)
    fields = json.loads(json.dumps(found.to_json()))
    assert list(fields) == ["rows", "environment"]
    assert all(set(row) == FIELDS for row in fields["rows"])
    assert fields["environment"]["torch"] == str(torch.__version__)
    assert {"threads", "cores", "cpu", "gpu", "platform", "commit", "setting"} <= set(fields["environment"])
    assert Bench.from_json(fields) == found
    assert found.row("losa-textbook", "ms_per_image") == SLOW


def test_the_table_fits_80_columns_and_says_what_is_met():
    large = Row("last-textbook", "peak_bytes", 123456789012.0, "B", "losa-textbook", 1234.5678, 0.12)
    rate = Row("read-shuffled", "gb_per_s", 123.456, "GB/s", "read-in-order", 0.8, 0.7, (100.0, 1234.5))
    point = replace(SLOW, case="growth/N=1025/losa-textbook", value=98765.4)
    lines = list(bench(FAST.to(SLOW, goal=0.3), SLOW, large, rate, point).lines())
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Time, ms an image"
    assert lines[1].split() == [
        "losa-fast",
        "2",
        "1.5..2.25",
        "0.250",
        "of",
        "losa-textbook",
        "<=",
        "0.3",
        "met",
    ]
    assert any("123457 MB" in line and line.endswith("<= 0.12 MISSED") for line in lines)
    assert any("read-shuffled" in line and line.endswith(">= 0.7 met") for line in lines)
    assert any(line.split() == ["N=1025", "98765"] for line in lines)


def test_cases_are_called_in_turn():
    called = []

    def case(name):
        return lambda: called.append(name) or sum(range(3_000_000))  # long enough to be called once a round

    found = in_turn({"a": case("a"), "b": case("b")}, 3)
    assert called[:4] == ["a", "a", "b", "b"]  # warm, then how long
    assert called[-2:] == ["b", "b"] or called[-1] == "b"
    order = [name for i, name in enumerate(called[4:], start=4) if called[i - 1] != name]
    assert order == ["a", "b"] * 3
    assert all(0 < one.least <= one.median <= one.most for one in found.values())
    row = found["a"].rate("a", "gb_per_s", "GB/s", 2.0)
    assert row.value == pytest.approx(2.0 / found["a"].median)
    assert row.spread[0] <= row.value <= row.spread[1]
