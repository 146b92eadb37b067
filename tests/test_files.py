import errno
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import sidetune.files
from sidetune.errors import SidetuneError
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
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


@pytest.mark.parametrize("write", [write_text, write_tensors])
@pytest.mark.parametrize(
    ("number", "todo"),
    [
        (
            errno.ENOSPC,
            "No space left on device. Free the disk, then type the same command again: it resumes",
        ),
        (errno.EDQUOT, "Disk quota exceeded. Free the disk, then type the same command again: it resumes"),
        (
            errno.EROFS,
            "Read-only file system. Type: the same command with a folder that can be written, or mend this "
            "one's permissions",
        ),
    ],
)
def test_a_write_that_the_disk_refuses_says_what_to_do(tmp_path, monkeypatch, write, number, todo):
    path = tmp_path / "a"
    path.write_text("old")

    def refuse(_):
        raise OSError(number, "as the system puts it")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SidetuneError) as caught:
        write(path, "new" if write is write_text else {"t": torch.zeros(1)})
    assert str(caught.value) == f"{path} cannot be written: {todo}"
    assert (list(tmp_path.iterdir()), path.read_text()) == ([path], "old")


def test_a_folder_that_cannot_be_locked_says_why(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SidetuneError) as caught, locked(tmp_path / "file/run"):
        pass
    assert str(caught.value) == (
        f"{tmp_path / 'file/run'} cannot be written: Not a directory. Type: the same command with a folder "
        "that can be written, or mend this one's permissions"
    )


def test_a_lock_removes_what_was_half_written_unless_told_not_to(tmp_path):
    temporary = tmp_path / f".a.json{sidetune.files.TEMPORARY}"
    temporary.write_text("half")
    with locked(tmp_path, sweep=False):
        assert temporary.exists()
    with locked(tmp_path):
        assert not temporary.exists()


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


def test_a_lock_on_a_folder_that_was_removed_meanwhile_is_taken_anew(tmp_path):
    folder = tmp_path / "made"
    entered = threading.Event()

    def work():
        with locked(folder):
            assert (folder / ".lock").exists()
            entered.set()

    folder.mkdir()
    with hold(folder) as first:
        assert first.stdout.readline() == "held\n"
        second = threading.Thread(target=work)
        second.start()
        while not second.is_alive():
            time.sleep(0.01)
        time.sleep(0.05)
        (folder / ".lock").unlink()
        folder.rmdir()
        first.kill()
        assert entered.wait(60)
        second.join()
