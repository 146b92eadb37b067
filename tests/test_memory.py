import sys
import time

import numpy as np
import pytest

from sidetune.memory import INTERVAL, PeakMemory, anonymous_bytes

MIB = 2**20


def wait_for_samples():
    time.sleep(10 * INTERVAL)


def test_the_peak_holds_what_was_there_and_has_been_given_back():
    before = anonymous_bytes()
    assert before > MIB
    with PeakMemory() as memory:
        block = np.ones(200 * MIB, np.uint8)
        wait_for_samples()
        del block
    assert memory.peak >= before + 190 * MIB
    with PeakMemory() as second:
        wait_for_samples()
    assert second.peak > 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the whole resident size is counted")
def test_pages_of_a_mapped_file_do_not_count(tmp_path):
    np.ones(200 * MIB, np.uint8).tofile(tmp_path / "shard")
    before = anonymous_bytes()
    with PeakMemory() as memory:
        mapped = np.memmap(tmp_path / "shard", np.uint8, "r")
        assert int(mapped[::4096].sum()) == 200 * MIB // 4096
        wait_for_samples()
    assert memory.peak < before + 100 * MIB


def test_sampling_ends_with_the_block_also_after_a_failure():
    memory = PeakMemory()
    with pytest.raises(ConnectionError), memory:
        raise ConnectionError
    assert not memory._thread.is_alive()
    assert memory.peak > 0
