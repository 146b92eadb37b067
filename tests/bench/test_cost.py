import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sidetune.bench import cost as module
from sidetune.bench.cost import bench_cost
from sidetune.bench.cost_cases import DEFAULT, METHODS, CostCase, CostSetting, Trial
from sidetune.bench.cost_growth import AXES, MODELS, growth_points, growth_rows, known_axes
from sidetune.bench.cost_rows import COMPUTED, Measured, cost_rows, job_seconds
from sidetune.bench.cost_worker import facts, write_small_store
from sidetune.bench.rows import Bench
from sidetune.bench.timing import Timing
from sidetune.errors import RecipeError, RequestError, SidetuneError
from sidetune.upkeep import verify

TOY = CostSetting(backbone="toy", size=16, batch=2, images=10, epochs=3, rounds=1, threads=1)
CASES = ("losa-stored",)


@pytest.fixture(scope="module")
def bench():
    return bench_cost(TOY, CASES, quiet=True)


def measured(seconds, peak=1000, steps=1, **more):
    return Measured(Timing(seconds, seconds, seconds), steps, peak, **more)


KNOWN = {
    "forward": measured(2.0, 100),
    "losa": measured(2.2, 350, parameters=5, artifact_bytes=50, tap_bytes=300),
    "losa-stored": measured(1.6, 90, steps=16, parameters=5, artifact_bytes=50, tap_bytes=300),
    "lora": measured(4.0, 2000, parameters=10, artifact_bytes=80, tap_bytes=20),
}


def rows_of(setting, known=KNOWN):
    return Bench(tuple(cost_rows(setting, {name: CostCase.parse(name) for name in known}, known)), {})


def test_every_case_is_measured_in_processes_of_its_own(bench):
    found = {(row.case, row.metric) for row in bench.rows}
    trained = ["parameters", "artifact_bytes", "tap_bytes", "job_s"]
    assert found == {
        *((case, metric) for case in CASES for metric in trained),
        *(
            (case, metric)
            for case in ("forward", *CASES)
            for metric in ("step_s", "images_per_s", "peak_bytes")
        ),
    }
    assert all(row.value > 0 for row in bench.rows if row.metric != "peak_bytes")
    assert all(row.goal is None for row in bench.rows), "the goals are about the default setting"
    assert bench.environment["setting"] == {**TOY.to_json(), "cases": list(CASES), "growth": []}
    assert bench.environment["threads"] == 1
    assert max(map(len, bench.lines())) <= 80


def test_the_json_form_comes_back(bench):
    assert Bench.from_json(bench.to_json()) == bench
    assert set(bench.to_json()) == {"rows", "environment"}


def test_a_metric_has_a_row_against_lora_and_one_against_the_backbone_alone():
    bench = rows_of(TOY)
    assert bench.row("losa", "step_s", "lora").ratio == pytest.approx(2.2 / 4.0)
    assert bench.row("losa", "step_s", "forward").ratio == pytest.approx(2.2 / 2.0)
    assert bench.row("losa-stored", "step_s", "lora").value == pytest.approx(0.1), "a step, not a round"
    assert bench.row("lora", "peak_bytes").against == "forward"
    assert bench.row("forward", "peak_bytes").against == "lora"
    assert bench.row("losa", "parameters").ratio == 0.5
    assert bench.row("losa", "images_per_s", "lora").value == pytest.approx(2 / 2.2)
    assert bench.row("losa", "tap_bytes").against is None


def test_without_lora_there_is_one_row_a_metric():
    bench = rows_of(TOY, {name: KNOWN[name] for name in ("forward", "losa")})
    assert bench.row("losa", "step_s").against == "forward"
    assert bench.row("losa", "job_s").ratio is None


def test_goals_are_those_of_the_default_setting():
    bench = rows_of(CostSetting(rounds=9, threads=2))
    goals = {(row.case, row.metric, row.against): row.goal for row in bench.rows if row.goal is not None}
    assert goals == {
        ("losa", "step_s", "forward"): 1.10,
        ("losa", "step_s", "lora"): 0.51,
        ("losa", "peak_bytes", "forward"): 1.5 + 300 / 100,
        ("losa", "peak_bytes", "lora"): 0.15,
        ("losa-stored", "job_s", "lora"): 0.036,
    }
    assert bench.row("losa", "peak_bytes", "forward").met
    assert bench.row("losa", "peak_bytes", "lora").met is False


def test_the_whole_job_is_computed_from_steps_and_one_extraction():
    setting = CostSetting(images=100, batch=16, epochs=10)
    live, stored = (CostCase.parse(name) for name in ("losa", "losa-stored"))
    assert job_seconds(setting, live, KNOWN) == pytest.approx(7 * 10 * 2.2)
    assert job_seconds(setting, stored, KNOWN) == pytest.approx(7 * 10 * 0.1 + 100 / 16 * 2.0)
    assert job_seconds(setting, live, KNOWN, epochs=1) == pytest.approx(7 * 2.2)
    assert rows_of(setting).row("losa", "job_s").unit == COMPUTED


@pytest.mark.parametrize(
    ("name", "fields", "how"),
    [
        ("losa", {"name": "losa", "form": "fast"}, (False, 1)),
        ("last-textbook", {"form": "textbook"}, (False, 1)),
        ("losa-textbook-stored", {"form": "textbook"}, (True, 1)),
        ("losa-m4", {}, (False, 4)),
        ("lora-linear", {"layers": "linear"}, (False, 1)),
        ("lora-last3", {"blocks": 3}, (True, 1)),
        ("lora-checkpointing", {"checkpointing": True}, (False, 1)),
        ("full-checkpointing", {"name": "full", "checkpointing": True}, (False, 1)),
        ("lora-compile", {"compiled": True}, (False, 1)),
    ],
)
def test_a_name_says_what_is_trained_and_how(name, fields, how):
    case = CostCase.parse(name)
    found = case.recipe.side.model_dump()
    assert {key: found[key] for key in fields} == fields
    assert (case.stored, case.members) == how


def test_other_names():
    assert CostCase.parse("lora-bf16").recipe.train.precision == "bf16"
    assert CostCase.parse("forward").recipe is None
    assert {CostCase.parse(name).name for name in (*METHODS, *DEFAULT)} >= set(DEFAULT)
    with pytest.raises(RequestError, match=r"no case named 'loraa'. Did you mean 'lora'"):
        CostCase.parse("loraa")
    with pytest.raises(RequestError, match=r"case 'losa-sored' ends in 'sored'. Did you mean 'stored'"):
        CostCase.parse("losa-sored")
    with pytest.raises(RecipeError, match=r"checkpointing"):
        CostCase.parse("losa-checkpointing")


def test_a_backbone_computes_what_the_method_reads_and_no_more():
    read = {
        name: Trial(CostCase.parse(name), TOY).backbone.spec.names for name in ("forward", "lora", "full")
    }
    assert read == {"forward": ("block.4",), "lora": ("embedding",), "full": ("image",)}
    losa = Trial(CostCase.parse("losa"), TOY)
    assert losa.backbone.spec.names[-1] == "block.4"
    losa.seat()
    assert losa.tap_bytes() == 2 * 2 * sum(tap.num_tokens * tap.width for tap in losa.model().side.spec.taps)


def test_a_live_round_is_one_step_and_a_stored_one_goes_through_a_real_store(tmp_path):
    store = write_small_store(TOY, tmp_path)
    assert verify(tmp_path) == []
    live, stored, two = (
        Trial(CostCase.parse("losa"), TOY),
        Trial(CostCase.parse("losa-stored"), TOY, store),
        Trial(CostCase.parse("losa-m2-stored"), TOY, store),
    )
    for trial, steps in ((live, 1), (stored, 16), (two, 16)):
        trial.seat()
        before = trial.fleet.states()
        assert trial.run() == steps
        for name, state in trial.fleet.states().items():
            assert state.steps == steps
            assert (state.weights != before[name].weights).any()
    assert stored.backbone is None, "nothing of the backbone is loaded where features are read"
    assert len(two.fleet.names) == 2
    assert facts(stored) == facts(live)


def test_the_last_blocks_train_on_a_stored_prefix(tmp_path):
    trial = Trial(CostCase.parse("lora-last2"), TOY, write_small_store(TOY, tmp_path))
    trial.seat()
    assert trial.model().side.spec.names == ("block.2",)
    assert trial.run() == 16


def test_a_process_that_fails_says_why():
    with (
        pytest.raises(
            SidetuneError, match=r"the process of adaptformer ended with exit 1: SideError: .* Type"
        ),
        module._worker("adaptformer", "memory", "adaptformer", module._json(TOY), "") as worker,
    ):
        worker.hear()


def test_a_process_that_is_killed_says_so(tmp_path):
    (tmp_path / "errors").touch()
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        worker = module._Worker("full", process, tmp_path / "errors")
        with pytest.raises(SidetuneError) as caught:
            worker.run()
        with pytest.raises(SidetuneError):
            worker.end()
    assert str(caught.value) == (
        "the process of full ended with exit -9: it said nothing. "
        "Type: the same command with --cases and without it"
    )


def test_growth_changes_one_size_at_a_time():
    setting = CostSetting()
    assert list(growth_points(setting, "batch")) == ["batch=4", "batch=8", "batch=16", "batch=32"]
    assert list(growth_points(setting, "size")) == ["size=112", "size=224", "size=448"]
    models = growth_points(setting, "model")
    assert list(models) == [f"model={label}" for label in ("ViT-Ti", "ViT-S", "ViT-B", "ViT-L", "ViT-g")]
    assert models["model=ViT-g"] == replace(setting, backbone=MODELS["ViT-g"], batch=2)
    assert known_axes(["all"]) == AXES
    with pytest.raises(RequestError, match=r"--growth names 'bach'. Did you mean 'batch'"):
        bench_cost(TOY, ["losa"], growth=["bach"])


def test_growth_rows_have_a_point_a_case_and_a_ratio():
    asked = []

    def fake(setting, cases):
        asked.append(setting)
        return {name: KNOWN.get(name, measured(1.0)) for name in cases}

    bench = Bench(tuple(growth_rows(TOY, AXES, fake)), {})
    assert bench.row("growth/batch=1/losa", "step_s").against == "growth/batch=1/lora"
    assert bench.row("growth/size=32/losa", "peak_bytes").ratio == pytest.approx(350 / 2000)
    assert bench.row("growth/model=ViT-L/last", "step_s").value == 1.0
    assert bench.row("growth/members=4/losa", "step_s").against == "growth/members=1/losa"
    ten, hundred = (bench.row(f"growth/epochs={n}/losa-stored", "job_s") for n in (10, 100))
    assert ten.value == pytest.approx(5 * 10 * 0.1 + 5 * 2.0)
    assert hundred.ratio < ten.ratio, "the extraction is paid once"
    assert {setting.backbone for setting in asked} == {"toy", *MODELS.values()}
    about = {"cpu": "", "threads": 1, "cores": 1, "gpu": None, "torch": "", "commit": None}
    lines = list(Bench(bench.rows, about).lines())
    assert "How the peak memory of a step grows, MB" in lines
    assert max(map(len, lines)) <= 80


ROUNDS_OF_64_MIB = """
import time
import torch
from sidetune.bench import cost_worker
from sidetune.bench.cost_cases import CostCase, CostSetting, Trial
from sidetune.memory import PeakMemory, anonymous_bytes

samplers = []

class Sampler(PeakMemory):
    def __enter__(self):
        samplers.append(self)
        return super().__enter__()

def run(trial):
    block = torch.ones(2**24)
    deadline = time.monotonic() + 10  # on busy cores the sampler waits for its turn
    while samplers and samplers[0].peak < anonymous_bytes() - 2**22 and time.monotonic() < deadline:
        time.sleep(0.01)
    return int(block[0])

there_before = torch.ones(2**25)
Trial.run, cost_worker.PeakMemory = run, Sampler
found = cost_worker.peaks(CostCase.parse("forward"), CostSetting(backbone="toy", size=16, batch=4))
print(found["peak_bytes"])
"""


def test_the_peak_is_what_a_round_takes():
    """64 MiB that live until they can have been seen are; 128 that were there before are not.

    In a process of its own, as in the bench: in one that has run other tests memory is given back meanwhile.
    """
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS_OF_64_MIB], capture_output=True, text=True, check=True
    )
    assert 0.9 * 2**26 < int(done.stdout) < 1.5 * 2**26


def test_the_model_is_no_part_of_the_peak():
    trial = Trial(CostCase.parse("full"), replace(TOY, size=32))
    assert trial.seat() > 4 * 4 * 12 * 32 * 32


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(RequestError, match=r"batch is 0, expected 1 or more. Type: --batch 16"):
        CostSetting(batch=0)
    with pytest.raises(RequestError, match=r"threads is 0, expected 1 or more. Type: --threads 2"):
        CostSetting(threads=0)
    with pytest.raises(RequestError, match="device is 'gpu'"):
        CostSetting(device="gpu")


CLIPS = replace(TOY, frames=3)


def test_a_clip_has_a_frame_or_more():
    with pytest.raises(RequestError, match=r"^frames is 0, expected 1 or more\. Type: --frames 8$"):
        replace(TOY, frames=0)


def test_of_clips_a_batch_is_all_their_frames(tmp_path):
    store = write_small_store(CLIPS, tmp_path)
    assert store.num_records == 4 * CLIPS.batch * 3
    live, stored = Trial(CostCase.parse("losa"), CLIPS), Trial(CostCase.parse("losa-stored"), CLIPS, store)
    baseline = Trial(CostCase.parse("norms"), CLIPS)
    assert len(live.images) == CLIPS.pictures == 6
    for trial, steps in ((live, 1), (stored, 16), (baseline, 1)):
        trial.seat()
        assert trial.run() == steps
        assert trial.model().side.out.grid[0] == 3
    assert live.tap_bytes() == stored.tap_bytes() == 3 * losa_bytes(TOY)


def losa_bytes(setting):
    trial = Trial(CostCase.parse("losa"), setting)
    trial.seat()
    return trial.tap_bytes()


def test_features_keep_every_tap_in_the_type_of_a_store():
    features, forward = (Trial(CostCase.parse(name), TOY) for name in ("features", "forward"))
    assert features.backbone.spec.names == ("embedding", *(f"block.{i}" for i in range(1, 5)))
    assert features.dtype == torch.float16 and len(forward.backbone.spec.taps) == 1
    assert features.run() == 1 and features.case.recipe is None
    with pytest.raises(RequestError, match="no case named 'forward-stored'"):
        CostCase.parse("forward-stored")
    for name in ("losa-stored-streamed", "lora-streamed"):
        with pytest.raises(
            RequestError, match=f"case '{name}' is streamed, expected a side network that is live"
        ):
            CostCase.parse(name)
    assert "frames" not in TOY.to_json() and CLIPS.to_json()["frames"] == 3
    assert CostCase.parse("losa-streamed").streamed and CostCase.parse("features-streamed").streamed


def test_a_backbone_that_is_not_timms_cannot_be_streamed():
    with pytest.raises(RequestError, match="toy cannot be streamed or cut, expected a model of timm"):
        bench_cost(TOY, ["losa-streamed"], quiet=True)
