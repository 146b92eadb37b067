"""How many threads torch has: here, and on threads of our own."""

import subprocess
import sys
import threading

import pytest
import torch

from sidetune.threads import TINY, one_thread, single_threads, tiny_to_zero, torch_threads


def test_threads_are_as_they_were_afterwards():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(ConnectionError), torch_threads(before + 1):
        raise ConnectionError
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before


def is_zero(factor: int = 1) -> bool:
    return bool((TINY * factor == 0).all())


def test_tiny_numbers_are_zero_inside_and_on_threads_of_our_own():
    assert TINY.view(torch.int32).item() and not is_zero()
    with pytest.raises(ConnectionError), tiny_to_zero():
        with tiny_to_zero():
            assert is_zero()
        assert is_zero(), "as it was outside the inner one"
        raise ConnectionError
    assert not is_zero()
    with single_threads(2, "test") as pool:
        assert list(pool.map(is_zero, [1, 1])) == [True, True]
    assert not is_zero()


SINGLE = """
import threading, torch
from sidetune.threads import single_threads
torch.set_num_threads(3)
pool, later = single_threads(4, "name"), []
print([torch.get_num_threads(), *pool.map(lambda _: torch.get_num_threads(), range(8))])
other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
other.start()
other.join()
print(later, sum(thread.name.startswith("name") for thread in threading.enumerate()))
"""


def test_threads_of_our_own_have_one_torch_thread_and_all_others_keep_theirs():
    done = subprocess.run([sys.executable, "-c", SINGLE], capture_output=True, text=True, check=True)
    assert done.stdout == "[3, 1, 1, 1, 1, 1, 1, 1, 1]\n[3] 4\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_threads_that_began_end_when_the_others_cannot(monkeypatch, error, caplog):
    """Without that they would wait for the others, and the process for them."""
    start, begun, before = threading.Thread.start, [], torch.get_num_threads()

    def second_fails(self):
        if self.name.startswith("few"):
            begun.append(self)
            if len(begun) == 2:
                raise error
        start(self)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(error):
        single_threads(3, "few")
    begun[0].join(timeout=30)
    assert not begun[0].is_alive()
    assert torch.get_num_threads() == before
