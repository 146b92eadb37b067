import shutil

import pytest
import torch

from sidetune.bench import read as module
from sidetune.bench.read import bench_read, num_records
from sidetune.bench.setting import Setting
from sidetune.errors import RequestError
from sidetune.upkeep import verify

TINY = Setting(layers=2, tokens=5, width=8, batch=4, rounds=1, threads=1)


@pytest.fixture(autouse=True)
def few_records(monkeypatch):
    monkeypatch.setattr(module, "MOST_RECORDS", 22)


def test_reading_is_against_a_plain_copy_of_the_same_run():
    bench = bench_read(TINY, quiet=True)
    assert [(row.case, row.metric) for row in bench.rows] == [
        ("read-shuffled", "gb_per_s"),
        ("read-in-order", "gb_per_s"),
        ("copy", "gb_per_s"),
    ]
    copy = bench.row("copy", "gb_per_s")
    assert copy.ratio is None
    for row in bench.rows[:2]:
        assert row.against == "copy"
        assert row.ratio == pytest.approx(row.value / copy.value)
        assert row.goal is None, "the goal is about the default sizes"
    assert bench.environment["setting"]["store_bytes"] == 20 * 3 * 5 * 8 * 2
    assert max(map(len, bench.lines())) <= 80


def test_the_store_is_a_real_one_of_whole_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_RECORDS", 7)
    keys = [f"{i}.png@bench" for i in range(num_records(TINY))]
    store = module._write(tmp_path, TINY, keys, quiet=True)
    assert (store.num_records, len(store.plan.numbers)) == (20, 3)
    assert verify(tmp_path) == []
    features = store.features(keys[5:9])
    assert features.layers[0].shape == (4, 5, 8)
    assert features.layers[0].float().std() > 0.5
    cases = module._cases(store, keys, 4)
    assert list(cases) == ["read-shuffled", "read-in-order", "copy"]


def test_every_byte_is_read_once_by_every_case(tmp_path, monkeypatch):
    keys = [f"{i}.png@bench" for i in range(20)]
    store = module._write(tmp_path, TINY, keys, quiet=True)
    asked = []
    monkeypatch.setattr(
        module.StoredSource, "features", lambda self, rows, spec=None, views=0: asked.append(list(rows))
    )
    cases = module._cases(store, keys, 4)
    cases["read-in-order"]()
    assert asked == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    asked.clear()
    cases["read-shuffled"]()
    first = [row for rows in asked for row in rows]
    asked.clear()
    cases["read-shuffled"]()
    second = [row for rows in asked for row in rows]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_the_default_sizes_make_half_a_gib_of_whole_batches(monkeypatch):
    monkeypatch.undo()
    assert num_records(Setting()) == 200
    assert num_records(Setting(batch=500)) == 500
    assert num_records(TINY) == 2048


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    monkeypatch.setattr(module, "_write", None)
    with pytest.raises(RequestError, match=r"has 100 B free, expected 9.4 KiB\. Type: TMPDIR=/another/disk"):
        bench_read(TINY, quiet=True)
    assert torch.get_num_threads() >= 1
