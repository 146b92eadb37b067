import importlib
from dataclasses import replace

import pytest

from accuracy_requests import frozen, of, request
from sidetune.bench.accuracy import bench_accuracy, fits
from sidetune.errors import ArtifactError
from vtab_tasks import make_suite

SECONDS = {"losa": 2.0, "last": 4.0, "attentive": 1.0}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return make_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture
def timed(monkeypatch):
    """The methods whose epochs were timed; a method's epoch takes what `SECONDS` says."""
    protocol, names = importlib.import_module("sidetune.bench.accuracy.protocol"), []

    def seconds(job, member, timed):
        names.append(member.recipe.side.name)
        return SECONDS[names[-1]]

    monkeypatch.setattr(protocol, "solo_epoch_seconds", seconds)
    return names


def command(suite, folder, methods, **changed):
    changed = {"settings": ["train.epochs=4"], "against": (), "grid_size": 1, "seeds": 1} | changed
    asked = request(suite, folder, methods, **changed)
    return bench_accuracy(replace(asked, tasks=asked.tasks[:1]))


def epochs(report):
    return {one.method: one.point["epochs"] for one in report.timed}


def test_a_quicker_method_that_joins_changes_nobodys_epochs(suite, timed, tmp_path):
    first = command(suite, tmp_path, "losa,last")
    assert epochs(first) == {"losa": 4, "last": 2}
    assert frozen(tmp_path)["colours at equal time"] == {"seconds": 8.0, "by": "losa"}
    joined = command(suite, tmp_path, "losa,last,attentive")
    assert epochs(joined) == {"losa": 4, "last": 2, "attentive": 8}, "a quick one has more"
    alone = command(suite, tmp_path, "last")
    assert epochs(alone) == {"last": 2}, "the quickest is left out"
    assert "  colours: 8.0 s, by losa, frozen by the first command" in list(alone.lines())
    assert timed == ["losa", "last", "attentive"], "each once"


def test_other_minutes_are_refused_before_anything_trains(suite, timed, tmp_path, monkeypatch):
    command(suite, tmp_path, "losa", minutes=0.2)
    assert frozen(tmp_path)["colours at equal time"] == {"seconds": 12.0, "by": "--minutes"}
    assert epochs(command(suite, tmp_path, "losa")) == {"losa": 6}
    monkeypatch.setattr(fits, "train", pytest.fail)
    with pytest.raises(ArtifactError, match=r"is 2, .* colours may take 0.2 minutes .* Leave --minutes"):
        command(suite, tmp_path, "losa,last", minutes=2.0)


def test_an_epoch_that_is_longer_than_the_time_is_marked(suite, timed, tmp_path):
    report = command(suite, tmp_path, "losa,last", minutes=3.0 / 60, reveal=True)
    assert epochs(report) == {"losa": 1, "last": 1}
    assert {one.method: one.over for one in report.timed} == {"losa": False, "last": True}
    assert not any(one.over for one in report.outcomes)
    text = list(report.lines())
    assert [line[:4] for line in text if "†" in line] == ["last", "† on"]
    assert max(len(line) for line in text if "looks.jsonl" not in line) <= 80


def test_what_is_answered_for_elsewhere_does_not_start_the_clock_anew(suite, timed, tmp_path):
    first = command(suite, tmp_path, "losa,last")
    more = command(suite, tmp_path, "losa,last", also=(suite / "shapes",))
    assert timed == ["losa", "last"]
    assert epochs(more) == epochs(first)
    assert of(more, "colours -> shapes", "losa").elsewhere
