import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sidetune.bench.order import CHANCE, OrderSetting, bench_order
from sidetune.bench.order_set import FRAMES, ORDERS, order_name, write_order_set
from sidetune.cli import app
from sidetune.errors import RequestError

CLIP = 3 * FRAMES


def frames(folder):
    return [np.asarray(Image.open(folder / f"{number}.png")) for number in range(CLIP)]


def test_the_six_clips_of_a_scene_have_the_same_frames_in_six_orders(tmp_path):
    write_order_set(tmp_path, {"train": 2, "test": 1})
    first, *others = ORDERS
    for scene in ("00000", "00001"):
        plain = frames(tmp_path / "train" / order_name(first) / scene)
        for order in others:
            shown = frames(tmp_path / "train" / order_name(order) / scene)
            expected = [plain[FRAMES * segment + number] for segment in order for number in range(FRAMES)]
            assert all(np.array_equal(one, other) for one, other in zip(shown, expected, strict=True))
            assert not all(np.array_equal(one, other) for one, other in zip(shown, plain, strict=True))
    names = {order_name(order) for order in ORDERS}
    assert len(names) == 6 and {one.name for one in (tmp_path / "test").iterdir()} == names
    scenes = [frames(tmp_path / place / order_name(first) / "00000")[0] for place in ("train", "test")]
    assert not np.array_equal(*scenes), "a scene of test is none of training"


def test_the_set_is_the_same_everywhere_and_is_written_once(tmp_path):
    write_order_set(tmp_path / "a", {"train": 1}, seed=3)
    write_order_set(tmp_path / "b", {"train": 1}, seed=3)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 6 * CLIP
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    (tmp_path / "a" / files[0]).unlink()
    write_order_set(tmp_path / "a", {"train": 1}, seed=3)
    assert not (tmp_path / "a" / files[0]).exists(), "what is complete is left as it is"
    with pytest.raises(RequestError, match="holds another set"):
        write_order_set(tmp_path / "a", {"train": 2}, seed=3)


def test_what_was_interrupted_is_begun_again_and_never_as_another_set(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("sidetune.bench.order_set._write_clip", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_order_set(tmp_path, {"train": 2})
    with pytest.raises(RequestError, match="holds another set"):
        write_order_set(tmp_path, {"train": 1})
    write_order_set(tmp_path, {"train": 2})
    assert len(list(tmp_path.rglob("*.png"))) == 2 * len(ORDERS) * CLIP


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    setting = OrderSetting("toy", 32, scenes=12, sides=("losa", "last"), seeds=2, epochs=40)
    return bench_order(setting, tmp_path_factory.mktemp("order"), quiet=True)


def test_means_over_frames_tell_no_order(bench):
    for case in ("ridge", "linear"):
        for metric in ("accuracy", "shuffled_accuracy"):
            row = bench.row(case, metric)
            assert row.value == pytest.approx(CHANCE, abs=0.02), "all six clips get one answer"
            assert row.spread[0] <= row.value <= row.spread[1] and row.goal is None


def test_networks_are_scored_as_they_are_and_shuffled(bench):
    for case in ("losa", "last"):
        row, shuffled = bench.row(case, "accuracy"), bench.row(case, "shuffled_accuracy")
        assert row.goal == 0.95 and row.met == (row.value >= 0.95)
        assert 0 <= shuffled.spread[0] <= CHANCE <= shuffled.spread[1]
        assert row.spread[0] > CHANCE, "even with a backbone of random weights"


def test_the_command(tmp_path):
    asked = [
        "bench",
        "order",
        "--backbone",
        "toy",
        "--size",
        "32",
        "--scenes",
        "2",
        "--seeds",
        "1",
        "--quiet",
    ]
    more = ["--epochs", "1", "--sides", "last", "--out", str(tmp_path / "order"), "--json"]
    found = CliRunner().invoke(app, asked + more)
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout.splitlines()[-1])["rows"]
    assert [row["case"] for row in rows] == [name for name in ("ridge", "linear", "last") for _ in range(2)]
    assert torch.tensor([row["value"] for row in rows]).isfinite().all()


def test_wrong_requests_say_what_to_type():
    with pytest.raises(RequestError, match="no side named 'ridge' is trained"):
        OrderSetting(sides=("ridge",))
    with pytest.raises(RequestError, match=r"--scenes is 1, expected 2 or more. Type: --scenes 2"):
        OrderSetting(scenes=1)
