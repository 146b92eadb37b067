from dataclasses import replace

import pytest
import torch

from sidetune.bench import side as module
from sidetune.bench.cases import CASES, Case, floor_rows
from sidetune.bench.peak import peak_bytes
from sidetune.bench.setting import Setting, batches, cache_bytes, noise
from sidetune.bench.side import bench_side, growth_points
from sidetune.bench.timing import Timing
from sidetune.errors import RequestError, SidetuneError

TINY = Setting(layers=2, tokens=5, width=8, batch=3, rounds=1, threads=1)


@pytest.fixture(scope="module")
def bench():
    return bench_side(TINY, growth=True, peak=False, quiet=True)


def test_every_case_has_its_metrics(bench):
    found = {(row.case, row.metric) for row in bench.rows if not row.case.startswith("growth/")}
    cases = ["losa-fast", "last-fast", "losa-textbook", "last-textbook"]
    assert found == {
        *((case, metric) for case in cases for metric in ("ms_per_image", "kept_bytes")),
        *((case, "ms_per_image") for case in ("floor", "floor-last")),
        *((case, "times_floor") for case in ("losa-fast", "last-fast")),
        *(("taps", metric) for metric in ("losa_bytes", "last_bytes")),
        ("read", "gb_per_s"),
        ("copy", "gb_per_s"),
        ("gemm", "gflop_per_s"),
    }
    assert all(row.value > 0 for row in bench.rows)


@pytest.mark.parametrize("side", ["losa", "last"])
def test_ratios_are_to_cases_of_the_same_run(bench, side):
    fast, textbook = (bench.row(f"{side}-{form}", "ms_per_image") for form in ("fast", "textbook"))
    assert (fast.against, textbook.against) == (f"{side}-textbook", None)
    assert fast.ratio == pytest.approx(fast.value / textbook.value)
    kept, taps = bench.row(f"{side}-fast", "kept_bytes"), bench.row("taps", f"{side}_bytes")
    assert kept.against == "taps"
    assert kept.ratio == pytest.approx(kept.value / taps.value)
    floor = bench.row({"losa": "floor", "last": "floor-last"}[side], "ms_per_image")
    assert floor.against == f"{side}-textbook"
    assert bench.row(f"{side}-fast", "times_floor").value == pytest.approx(fast.value / floor.value)


def test_the_stored_taps_are_those_that_a_side_reads(bench):
    one = 3 * 5 * 8 * 2  # B, N, D, bytes of fp16
    assert bench.row("taps", "losa_bytes").value == 2 * one
    assert bench.row("taps", "last_bytes").value == 3 * one


def test_a_fast_form_keeps_less_than_its_textbook_form():
    setting = replace(TINY, layers=4, tokens=33, width=64, batch=8)
    rows = bench_side(setting, peak=False, quiet=True)
    for side in ("losa", "last"):
        fast, textbook = (rows.row(f"{side}-{form}", "kept_bytes").value for form in ("fast", "textbook"))
        assert 0 < fast < 0.6 * textbook


def test_goals_are_about_the_default_sizes_alone(bench):
    assert all(row.goal is None for row in bench.rows)
    assert Setting().is_the_goals
    assert Setting(threads=2, rounds=9).is_the_goals
    assert not any(one.is_the_goals for one in (Setting(batch=49), Setting(rank=8), Setting(dtype="bf16")))


def test_the_table_fits_80_columns(bench):
    assert max(map(len, bench.lines())) <= 80


def test_growth_has_every_size_in_turn(bench):
    cases = {row.case for row in bench.rows if row.case.startswith("growth/")}
    points = [label for label, _ in growth_points(replace(TINY, batch=1))]
    assert points == [
        "N=2", "N=3", "N=5", "N=9", "D=2", "D=4", "D=8", "D=16", "L=1", "L=2", "L=4", "R=4", "R=8", "R=16",
        "R=32", "B=1", "B=2",
    ]  # fmt: skip
    assert cases == {f"growth/{point}/{case}" for point in points for case in CASES}
    row = bench.row("growth/N=9/losa-fast", "ms_per_image")
    assert row.against == "growth/N=9/losa-textbook"
    # the setting itself is on every axis, and measured once
    assert (
        len({bench.row(f"growth/{one}/last-fast", "ms_per_image").value for one in ("N=5", "D=8", "L=2")})
        == 1
    )


def test_peaks_are_against_the_textbook_form(monkeypatch):
    monkeypatch.setattr(module, "peak_bytes", lambda name, setting: 100 if name.endswith("fast") else 400)
    rows = {row.case: row for row in module._peaks(TINY, quiet=True)}
    assert (rows["last-fast"].against, rows["last-fast"].ratio) == ("last-textbook", 0.25)
    assert rows["losa-textbook"].ratio is None


def test_peak_memory_is_measured_in_a_process_of_its_own():
    large = Setting(layers=4, tokens=65, width=128, batch=64, threads=1)
    case = Case("losa-textbook", large, batches(large, noise([large]))[:1])
    found = peak_bytes("losa-textbook", large)
    one = 64 * 65 * 128 * 4
    assert found > 4 * one, "h and h + c of each layer are kept, at least half of them"
    assert found < 60 * one
    assert case.tap_bytes == 4 * one // 2


def test_a_process_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(Setting, "to_json", lambda self: {"layers": 0})
    with pytest.raises(
        SidetuneError, match=r"layers is 0, expected 1 or more.* Type: sidetune bench side --batch 1"
    ):
        peak_bytes("losa-fast", TINY)


@pytest.mark.parametrize("name", CASES)
def test_a_step_trains_every_parameter(name):
    case = Case(name, TINY, batches(TINY, noise([TINY]))[:2])
    before = [parameter.detach().clone() for parameter in case.model.parameters()]
    assert all(one.any() for one in before), "up-projections are drawn"
    case.step()
    after = [parameter.detach() for parameter in case.model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert case.loss(case.taps[0]).shape == (1,)


def test_taps_are_of_the_stored_dtype_and_leave_the_cache_behind():
    setting = Setting(layers=2, tokens=65, width=384, batch=64, dtype="bf16")
    pool = batches(setting, noise([setting]))
    assert {layer.dtype for features in pool for layer in features.layers} == {torch.bfloat16}
    total = sum(layer.nbytes for features in pool for layer in features.layers)
    assert total > 3 * cache_bytes(torch.device("cpu")) or len(pool) == 64
    assert len(pool) >= 2
    assert not torch.equal(pool[0].layers[0], pool[1].layers[0])


def test_the_floor_is_two_readings_and_the_products():
    setting = Setting(layers=2, tokens=5, width=8, batch=3)
    timings = {
        name: Timing(*[seconds] * 3) for name, seconds in {"read": 3.0, "copy": 6.0, "gemm": 2.0}.items()
    }
    losa, last = (row.value for row in floor_rows(setting, timings))
    product = 1024**3  # FLOPs a second
    read = 3 * 3 * 80 / 3.0  # bytes a second: B, taps, N * D * 2 bytes
    assert losa == pytest.approx(1000 * (2 * 2 * 80 / read + 2 * 4 * 2 * 5 * 8 * 8 / product * 1.0))
    flops = 3 * (3 * 2 * 5 * 8 * 48 + 3 * 2 * 5 * 8 * 16 + 6 * 2 * 5 * 5 * 16)
    assert last == pytest.approx(1000 * (2 * 3 * 80 / read + flops / product))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": 0}, "layers is 0, expected 1 or more. Type: --layers 12"),
        ({"tokens": 1}, "tokens is 1, expected 2 or more. Type: --tokens 257"),
        ({"rank": 0}, "rank is 0, expected 1 or more. Type: --rank 8"),
        ({"threads": -1}, "threads is -1, expected 1 or more. Type: --threads 2"),
        ({"rounds": 0}, "rounds is 0, expected 1 or more. Type: --rounds 5"),
        (
            {"dtype": "fp61"},
            "dtype is 'fp61'. Did you mean 'fp16'? Known: bf16, fp16, fp32. Type: --dtype fp16",
        ),
        ({"device": "cpuu"}, "device is 'cpuu'. Did you mean 'cpu'? Known: cpu, cuda. Type: --device cpu"),
    ],
)
def test_sizes_that_cannot_be(wrong, said):
    with pytest.raises(RequestError) as caught:
        Setting(**wrong)
    assert str(caught.value) == said
