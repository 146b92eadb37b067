import io
import sys

import pytest

import sidetune.progress
from sidetune.progress import Progress


class Clock:
    """Time that a test moves on by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(sidetune.progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_plain_line_now_and_then_where_there_is_no_terminal(clock, capsys):
    with Progress("extract", 100, "images") as progress:
        clock.now += 4
        progress.advance(20)
        assert capsys.readouterr().err == "", "not yet"
        clock.now += 6
        progress.advance(20, "loss 0.5")
        assert capsys.readouterr().err == "extract: 40/100 images · 4.0 images/s · loss 0.5 · 15 s left\n"
        clock.now += 9
        progress.advance(20)
        assert capsys.readouterr().err == ""
        clock.now += 1
        progress.advance(40)
        assert capsys.readouterr().err == "extract: 100/100 images · 5.0 images/s · 0 s left\n"
        clock.now += 2
    assert capsys.readouterr() == ("", "extract: done in 22 s\n")


def test_what_an_earlier_run_did_counts_as_done_but_not_in_the_rate(clock, capsys):
    with Progress("extract", 100, "images", done=60) as progress:
        clock.now += 10
        progress.advance(20)
    assert capsys.readouterr().err == (
        "extract: 80/100 images · 2.0 images/s · 10 s left\nextract: done in 10 s\n"
    )


def test_what_is_over_at_once_says_nothing(clock, capsys):
    with Progress("train", 3, "steps") as progress:
        for _ in range(3):
            clock.now += 1
            progress.advance(1)
    assert capsys.readouterr() == ("", "")


def test_quiet_prints_nothing(clock, capsys):
    with Progress("train", 100, "steps", quiet=True) as progress:
        clock.now += 60
        progress.advance(50)
    assert capsys.readouterr() == ("", "")


def test_a_failure_is_not_called_done(clock, capsys):
    with pytest.raises(ConnectionError), Progress("train", 100, "steps") as progress:
        clock.now += 20
        progress.advance(1)
        raise ConnectionError
    assert "done" not in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("extract", 100, "images", done=10) as progress:
        progress.advance(90, "loss 0.5")
    shown = terminal.getvalue()
    assert "extract" in shown
    assert "100/100" in shown
    assert "loss 0.5" in shown

    silent = Terminal()
    monkeypatch.setattr(sys, "stderr", silent)
    with Progress("extract", 100, "images", quiet=True) as progress:
        progress.advance(100)
    assert silent.getvalue() == ""
