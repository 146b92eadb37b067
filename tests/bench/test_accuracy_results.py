import json
import runpy
from pathlib import Path

import pytest

from accuracy_requests import request
from sidetune.bench.accuracy import bench_accuracy
from vtab_tasks import make_suite

SCRIPTS = Path(__file__).parents[2] / "scripts"
ABOUT = {"command": "sidetune bench accuracy suite", "commit": "c" * 40, "hardware": "none"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return runpy.run_path(str(SCRIPTS / "accuracy_results.py"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    suite = make_suite(folder / "suite")
    bench_accuracy(request(suite, folder, "ridge,ridge-last,losa", reveal=True, seeds=1, shots=(1,)))
    return folder / "out"


def report_of(out):
    return json.loads((out / "accuracy.json").read_text())


def test_a_line_says_where_it_comes_from(script, out):
    fields = {
        "method",
        "task",
        "seed",
        "metric",
        "value",
        "command",
        "commit",
        "hardware",
        "recipe",
        "backbone",
    }
    report = report_of(out)
    for one in report["outcomes"]:
        for made in one["made"]:
            made["commit"] = "f" * 40
    found = script["lines"](report, ABOUT, own_commit=True)
    for line in found:
        assert fields <= line.keys() and len(line["recipe"]) == 64
    (losa,) = [line for line in found if line["method"] == "losa" and line["task"].startswith("shapes ")][:1]
    assert losa["commit"] == "f" * 40 and losa["of"] == ["losa"]
    given = script["lines"](report, ABOUT, own_commit=False)
    assert {line["commit"] for line in given} == {"c" * 40}


def test_all_lines_of_what_was_measured_again_are_replaced(script, out):
    report = report_of(out)
    old = script["lines"](report, {**ABOUT, "commit": "a" * 40}, own_commit=False)
    elsewhere = [{**line, "backbone": "other"} for line in old]
    part = json.loads(json.dumps(report))
    for name in ("outcomes", "timed_outcomes", "shots_outcomes"):  # ridge on one task, no second table
        kept = [one for one in part[name] if (one["task"], one["method"]) == ("colours", "ridge")]
        part[name] = kept if name == "outcomes" else []
    part["comparisons"] = part["timed_comparisons"] = []
    fresh = script["lines"](part, ABOUT, own_commit=False)
    assert len(fresh) == 1
    merged = script["merged"](old + elsewhere, fresh)
    assert [line for line in merged if line["backbone"] == "other"] == elsewhere
    stale = [line for line in merged if line["backbone"] != "other" and "ridge" in line["of"]]
    where = {(line["task"].partition(" at ")[0], line["commit"][0]) for line in stale}
    assert where == {("colours", "c"), ("shapes", "a")}, "its means and its differences there are gone"
    others = [line for line in old if "ridge" not in line["of"]]
    assert others and [line for line in merged if line in others] == others


def test_fits_of_another_environment_are_refused(script, out, tmp_path, monkeypatch, capsys):
    assert not list(script["differences"](report_of(out)))
    report = report_of(out)
    report["outcomes"][0]["made"][0]["environment"]["torch"] = "1.0"
    (found,) = script["differences"](report)
    assert found.startswith("colours/ridge, seed None: torch was 1.0 and is ")
    (tmp_path / "accuracy.json").write_text(json.dumps(report))
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "git", lambda *words: "")
    words = ["accuracy_results.py", str(tmp_path), "--into", str(tmp_path / "lines.jsonl")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "--command is missing" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*words, "--command", "sidetune bench accuracy suite"])
    with pytest.raises(SystemExit, match=r"torch was 1\.0"):
        main()
    monkeypatch.setitem(main.__globals__, "git", lambda *words: " M README.md")
    with pytest.raises(SystemExit, match="the tree has changes"):
        main()
    assert not (tmp_path / "lines.jsonl").exists()


def test_the_script_writes_lines_and_prints_a_table(script, out, tmp_path, monkeypatch, capsys):
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "git", lambda *words: "" if words[0] == "status" else "d" * 40)
    words = [out, "--into", tmp_path / "lines.jsonl", "--command", "sidetune bench accuracy suite"]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["accuracy_results.py", *map(str, words)])
        main()
        count = len((tmp_path / "lines.jsonl").read_text().splitlines())
        assert count == len(script["lines"](report_of(out), ABOUT, own_commit=True))
    assert "| colours (natural) |" in capsys.readouterr().out


def test_the_picture_has_the_methods_of_all_tasks_and_a_star_where_seeds_are_fewer(script, out, tmp_path):
    rows = script["lines"](report_of(out), ABOUT, own_commit=False)
    for row in rows:
        row["seeds_wanted"] = 2
    asked = {}
    script["picture"].__globals__["draw_points"] = lambda panels, path, words: asked.update(
        panels, words=words
    )
    script["picture"](rows, tmp_path / "one.png")
    assert [name for name, _, _ in asked["parameters"]] == ["ridge", "ridge-last", "losa*"]
    one_task = [row for row in rows if not (row["method"] == "losa" and row["task"].startswith("shapes "))]
    script["picture"](one_task, tmp_path / "one.png")
    assert [name for name, _, _ in asked["bytes"]] == ["ridge", "ridge-last"]
    tasks = {row["task"] for row in script["of_first_table"](rows)}
    assert asked["words"] == ("Test accuracy", f"mean of {len(tasks)} tasks, 2 seeds (*: fewer)")


def test_the_second_table_is_of_equal_time_and_marks_what_does_not_fit(script, out):
    rows = script["lines"](report_of(out), ABOUT, own_commit=False)
    timed = [row for row in rows if row["method"] == "losa at equal time" and "cost" in row and row["group"]]
    assert timed, "the bench has a second table"
    for row in timed:
        row["over"] = True
    first = timed[0]
    shown = script["timed_table"](rows).splitlines()
    assert shown[0] == "| | ridge | ridge-last | losa |"
    name = f"| {first['task'].partition(' ')[0]} ("
    (line,) = [line for line in shown if line.startswith(name)]
    assert line.endswith(f" {100 * first['value']:.1f}† |")
    assert "equal time" not in script["table"](rows)
