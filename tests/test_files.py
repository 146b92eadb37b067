import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from sidetune.files import csv_text, locked, sha256_file, write_json, write_tensors, write_text


def test_what_is_written_is_read_back_and_leaves_no_temporary_file(tmp_path):
    folder = tmp_path / "made" / "on the way"
    write_text(folder / "a.txt", "λ\n")
    write_json(folder / "a.json", {"λ": [1, None]})
    write_tensors(folder / "a.safetensors", {"t": torch.arange(6).view(2, 3).T}, {"note": "n"})
    assert (folder / "a.txt").read_text(encoding="utf-8") == "λ\n"
    assert (folder / "a.json").read_text(encoding="utf-8") == '{\n "λ": [\n  1,\n  null\n ]\n}\n'
    assert torch.equal(load_file(folder / "a.safetensors")["t"], torch.arange(6).view(2, 3).T)
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.safetensors", "a.txt"]


def test_tensor_files_are_readable_by_whoever_reads_their_folder(tmp_path):
    for mode, expected in ((0o755, 0o644), (0o700, 0o600)):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir(mode=mode)
        write_tensors(folder / "a.safetensors", {"t": torch.zeros(1)})
        assert (folder / "a.safetensors").stat().st_mode & 0o777 == expected


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_json(path, {"new": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == '{\n "old": 1\n}\n'


def test_sha256_of_a_known_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_csv_quotes_where_needed():
    assert csv_text([["path", "reason"], ["a, b.png", 'it is "cut"']]) == (
        'path,reason\n"a, b.png","it is ""cut"""\n'
    )


# Another process that holds a folder's lock. It imports nothing of ours: that would take seconds.
HOLDER = """
import fcntl, sys

with open(sys.argv[1] + "/.lock", "w") as stream:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    command = [sys.executable, "-c", HOLDER, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True)


def test_while_one_process_works_a_second_says_that_it_waits_and_waits(tmp_path, capsys):
    entered = threading.Event()

    def work():
        with locked(tmp_path):
            entered.set()

    with hold(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        second = threading.Thread(target=work)
        second.start()
        said = ""
        while not said:
            said += capsys.readouterr().err
            time.sleep(0.01)
        assert said == f"another process works in {tmp_path}; waiting for it\n"
        assert not entered.wait(0.1)
        first.kill()  # a killed process leaves no lock behind
        assert entered.wait(60)
        second.join()
    assert capsys.readouterr() == ("", "")


def test_the_lock_keeps_other_processes_out_until_it_is_given_back(tmp_path):
    folder = tmp_path / "made"
    with locked(folder), hold(folder) as second:
        _, errors = second.communicate(timeout=60)
        assert "BlockingIOError" in errors
    with hold(folder) as third:
        assert third.stdout.readline() == "held\n"
        third.communicate(timeout=60)
    with locked(folder):
        pass
