import pytest
import torch

from sidetune.bench import members as module
from sidetune.bench.cases import Case
from sidetune.bench.members import GROWTH, bench_members
from sidetune.bench.setting import Setting, batches, noise
from sidetune.errors import RequestError

TINY = Setting(layers=2, tokens=5, width=8, batch=4, rounds=1, threads=1)


@pytest.fixture(scope="module")
def bench():
    return bench_members(TINY, 3, growth=True, peak=False, quiet=True)


def test_many_members_are_against_as_many_steps_of_one(bench):
    together, solo = (bench.row(f"losa-fast-{name}", "ms_per_image") for name in ("m3", "solo-m3"))
    assert together.against == "losa-fast-solo-m3"
    assert together.ratio == pytest.approx(together.value / solo.value)
    assert solo.against is None
    assert bench.environment["setting"]["members"] == 3


def test_the_growth_is_to_one_member(bench):
    rows = [bench.row(f"growth/M={count}/losa-fast", "ms_per_image") for count in GROWTH]
    assert all(row.ratio == pytest.approx(row.value / rows[0].value) for row in rows)
    assert any("M=64" in line for line in bench.lines())


def test_goals_are_about_the_default_sizes_and_sixteen_members(bench, monkeypatch):
    assert all(row.goal is None for row in bench.rows)
    found = []
    monkeypatch.setattr(module, "Case", lambda *_: type("Step", (), {"step": staticmethod(int)}))
    monkeypatch.setattr(module, "batches", lambda *_: [])
    monkeypatch.setattr(module, "noise", lambda *_: None)
    monkeypatch.setattr(module, "peak_bytes", lambda *one: found.append(one) or 3 * 2**30)
    rows = {row.case: row for row in bench_members(Setting(rounds=1), 16, quiet=True).rows}
    assert rows["losa-fast-m16"].goal == 0.40
    assert rows["losa-fast-m64"].met
    assert [(name, setting.batch) for name, setting in found] == [("losa-fast-m64", 32)]
    assert all(row.goal is None for row in bench_members(Setting(rounds=1), 4, peak=False, quiet=True).rows)


def test_every_member_takes_a_step():
    case = Case("losa-fast-m3", TINY, batches(TINY, noise([TINY]))[:2])
    before = [parameter.detach().clone() for parameter in case.model.parameters()]
    case.step()
    for old, new in zip(before, case.model.parameters(), strict=True):
        assert (old != new).flatten(1).any(1).tolist() == [True] * 3
    assert case.loss(case.taps[0]).shape == (3,)
    assert not torch.equal(before[0][0], before[0][1]), "each from a seed of its own"


def test_the_table_fits_80_columns(bench):
    assert max(map(len, bench.lines())) <= 80


def test_one_member_is_no_fleet():
    with pytest.raises(RequestError) as caught:
        bench_members(TINY, 1)
    assert str(caught.value) == "members is 1, expected 2 or more. Type: --members 16"
