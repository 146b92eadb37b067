import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sidetune.bench import read as module
from sidetune.bench import stores
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
        ("copy-in-cache", "gb_per_s"),
    ]
    copy = bench.row("copy", "gb_per_s")
    assert copy.ratio is None
    for row in bench.rows:
        if row is copy:
            continue
        assert row.against == "copy"
        assert row.ratio == pytest.approx(row.value / copy.value)
        assert row.goal is None, "the goal is about the default sizes"
    assert bench.environment["setting"]["store_bytes"] == 20 * 3 * 5 * 8 * 2
    assert max(map(len, bench.lines())) <= 80


def test_the_store_is_a_real_one_of_whole_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "SHARD_RECORDS", 7)
    keys = [f"{i}.png@bench" for i in range(num_records(TINY))]
    store = module._write(tmp_path, TINY, keys, quiet=True)
    assert (store.num_records, len(store.plan.numbers)) == (20, 3)
    assert verify(tmp_path) == []
    features = store.features(keys[5:9])
    assert features.layers[0].shape == (4, 5, 8)
    assert features.layers[0].float().std() > 0.5
    cases = module._cases(store, keys, 4)
    assert list(cases) == ["read-shuffled", "read-in-order", "copy", "copy-in-cache"]


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


@pytest.mark.parametrize("num_bytes", [1, 24, 30, 48, 1000])
def test_a_copy_takes_every_byte_into_a_target_of_its_size(num_bytes):
    mapped = [torch.arange(24, dtype=torch.float16).view(2, 3, 4), torch.arange(5, dtype=torch.float16)]
    pairs = module._copies(mapped, num_bytes)
    bytes_read = torch.cat([source for source, _ in pairs])
    assert torch.equal(bytes_read, torch.cat([tensor.flatten().view(torch.uint8) for tensor in mapped]))
    targets = {target.untyped_storage().data_ptr(): target.untyped_storage().nbytes() for _, target in pairs}
    assert list(targets.values()) == [num_bytes]
    module._copy(pairs)
    assert torch.equal(pairs[-1][0], pairs[-1][1])
    positions = [place for _, t in pairs for place in range(t.storage_offset(), t.storage_offset() + len(t))]
    assert positions == [place % num_bytes for place in range(58)]


ENDED = """
import os, signal, sys, time
from sidetune.bench import read
from sidetune.bench.setting import Setting
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def inside(*given, **more):
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)  # a signal may reach another thread first
read.in_turn = inside  # the store stands
read.bench_read(Setting(layers=1, tokens=2, width=4, batch=2, rounds=1, threads=1), quiet=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_process_that_is_told_to_end_leaves_no_store(tmp_path, number, code):
    done = subprocess.run(
        [sys.executable, "-c", ENDED, str(int(number))],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_signals_and_threads_are_as_they_were_afterwards():
    before = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    bench_read(replace(TINY, threads=before[1] + 1), quiet=True)
    assert (signal.getsignal(signal.SIGTERM), torch.get_num_threads()) == before


def test_the_default_sizes_make_half_a_gib_of_whole_batches(monkeypatch):
    monkeypatch.undo()
    assert num_records(Setting()) == 200
    assert num_records(Setting(batch=500)) == 500
    assert num_records(TINY) == 2048


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    monkeypatch.setattr(module, "_write", None)
    with pytest.raises(RequestError, match=r"has 100 B free, expected 9.4 KiB\. Type: TMPDIR=/another/disk"):
        bench_read(TINY, quiet=True)
