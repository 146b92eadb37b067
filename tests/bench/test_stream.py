"""A backbone on disk, measured: real processes, a real file, a model that is small."""

import subprocess
import sys
from dataclasses import replace

import pytest

from sidetune.bench import stream as module
from sidetune.bench.cost_cases import CostSetting
from sidetune.bench.cost_rows import Measured
from sidetune.bench.stream import GOAL, StreamCases, bench_stream
from sidetune.bench.timing import Timing
from sidetune.errors import RequestError

SETTING = CostSetting(
    backbone="timm:vit_tiny_patch16_224", size=32, batch=1, frames=2, rounds=1, threads=1, precision="bf16"
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    return file, bench_stream(SETTING, weights=file, quiet=True)


def test_features_a_step_and_the_backbone_alone_are_measured_streamed_and_in_memory(measured):
    file, bench = measured
    names = ["features-streamed", "losa-streamed", "forward-streamed", "forward"]
    assert [row.case for row in bench.rows if row.metric == "resident_bytes"] == names
    assert [row.case for row in bench.rows if row.metric == "step_s"] == names
    assert all(row.value > 0 for row in bench.rows)
    rate = bench.row("forward-streamed", "images_per_s")
    assert rate.against == "forward" and rate.goal is None, "two images are less than a chunk"
    assert bench.row("backbone", "file_bytes").value < file.stat().st_size
    assert bench.row("backbone", "backbone_parameters").value * 2 == bench.row("backbone", "file_bytes").value
    assert max(map(len, bench.lines())) <= 80


def test_a_file_that_is_there_is_read_and_kept(measured):
    file, _ = measured
    before = file.stat().st_mtime_ns
    module.drawn(SETTING, file)
    assert file.stat().st_mtime_ns == before


def test_what_cannot_be_is_refused_before_a_file_is_written(measured, tmp_path):
    file, _ = measured
    for setting, options, said in (
        (SETTING, {"side": "lora"}, "'lora-streamed' is streamed, expected a side network that is live"),
        (SETTING, {"weights": tmp_path / "weights.bin"}, r"expected a \.safetensors file"),
        (replace(SETTING, precision="fp32"), {"weights": file}, "in torch.bfloat16, expected .* in fp32"),
        (replace(SETTING, backbone="timm:vit_small_patch16_224"), {"weights": file}, r"has .* instead of"),
    ):
        with pytest.raises(RequestError, match=said):
            bench_stream(setting, quiet=True, **options)
    with pytest.raises(RequestError, match=r"precision is 'fp8'.* Type: --precision bf16"):
        replace(SETTING, precision="fp8")
    assert not list(tmp_path.iterdir())


def test_what_a_process_held_is_its_own():
    """The system's own peak of a child begins with that of its parent."""
    held = b"x" * 2**30
    code = "from sidetune.memory import resident_bytes; print(resident_bytes())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 2**20 < int(said) < len(held)


def test_goals_are_those_of_the_largest_model_and_of_whole_chunks():
    one = Measured(Timing(2.0, 2.0, 2.0), 1, 5, resident_bytes=2 * 2**30)
    cases = StreamCases("losa", in_memory=True)

    def goals(setting):
        rows = module._rows(setting, cases, dict.fromkeys(cases.names, one))
        return {(row.case, row.metric): row.met for row in rows if row.goal is not None}

    assert goals(GOAL) == {
        ("features-streamed", "resident_bytes"): False,
        ("losa-streamed", "resident_bytes"): True,
    }
    assert goals(replace(GOAL, precision="fp32")) == {}
    assert goals(replace(SETTING, batch=32)) == {("forward-streamed", "images_per_s"): True}


def test_a_side_that_there_is_not():
    with pytest.raises(RequestError, match=r"no case named 'losaa-streamed'\. Did you mean 'losa'"):
        bench_stream(SETTING, side="losaa", quiet=True)
