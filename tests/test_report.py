import re

import numpy as np
import pytest

from reports import HOSTILE, Page, write_run
from sidetune.errors import ArtifactError
from sidetune.figures import duration, number, size
from sidetune.report import write_report


def test_the_page_is_one_self_contained_file(tmp_path):
    write_run(tmp_path / "run")
    path = write_report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("html") == 1 and "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(", html)
    assert [value for value in page.links if not value.startswith("#")] == ["data:,"]
    assert "prefers-color-scheme: dark" in html


def test_the_page_holds_the_numbers(tmp_path):
    metrics = write_run(tmp_path / "run")
    text = Page(write_report(tmp_path / "run").read_text(encoding="utf-8")).text
    for row in metrics["rows"]:
        for split in ("val", "test"):
            for name, value in row[split]["scores"].items():
                pair = row[split]["intervals"].get(name)
                interval = f" {number(name, pair[0])} – {number(name, pair[1])}" if pair else ""
                assert f"{number(name, value)}{interval}" in text
    for expected in (
        "losa on toy",
        "73,856",
        "1,155",
        "3.0 GiB",
        "790.0 MiB",
        "3 min 04 s",
        "ab" * 32,
        "2.8",
    ):
        assert expected in text, expected
    for row in metrics["rows"][-1]["test"]["per_class"][1:]:
        numbers = " ".join(number(name, row[name]) for name in ("precision", "recall", "f1", "auroc"))
        assert f"{row['name']} {row['support']} {numbers}" in text
    assert "side.rank 8" in text and "lambda 0.01" in text and "skipped.csv" in text


def test_the_confusion_matrix_shows_every_count(tmp_path):
    metrics = write_run(tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    cells = re.findall(r'<td class="(?:zero|right|wrong)[^"]*" style="--share:[\d.]+">(\d+)</td>', html)
    matrix = np.zeros((3, 3), int)
    for truth, guess, count in metrics["rows"][-1]["test"]["confusion"]:
        matrix[truth, guess] = count
    assert [int(cell) for cell in cells] == matrix.ravel().tolist()


def test_hostile_names_are_escaped(tmp_path):
    write_run(tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(html)
    assert page.text.count(HOSTILE) >= 3  # the matrix's row and column, the table of classes
    assert "<script" not in html and not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_verdict_compares_with_the_best_other_method(tmp_path):
    metrics = write_run(tmp_path / "run")
    ridge, linear, losa = (row["test"]["scores"]["balanced_accuracy"] for row in metrics["rows"])
    assert losa > linear > ridge
    text = Page(write_report(tmp_path / "run").read_text(encoding="utf-8")).text
    gap = f"{100 * (losa - linear):.1f}"
    assert f"losa is {gap} points above linear, the best of the other methods, in balanced accuracy" in text


def test_a_closed_form_side_says_that_it_has_no_curve(tmp_path):
    write_run(tmp_path / "run", epochs=0, methods=("linear", "ridge"))
    (tmp_path / "run" / "history.jsonl").unlink()
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "There is none: ridge is solved directly" in page.text and "polyline" not in page.tags


def test_a_curve_has_one_point_an_epoch_and_skips_what_is_not_finite(tmp_path):
    write_run(tmp_path / "run", epochs=8)
    with (tmp_path / "run" / "history.jsonl").open("a") as stream:
        stream.write('{"epoch": 8, "loss": NaN, "lr": 0.0, "val": null, "seconds": 1.0}\n')
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    lines = [value.split() for name, value in page.attributes if name == "points"]
    assert [len(line) for line in lines] == [8, 4]
    heights = [[float(point.split(",")[1]) for point in line] for line in lines]
    assert heights[0] == sorted(heights[0])  # a falling loss runs down the page
    assert heights[1] == sorted(heights[1], reverse=True)


@pytest.mark.parametrize("kind", ["multilabel", "regress"])
def test_other_tasks_show_a_row_an_output(tmp_path, kind):
    metrics = write_run(tmp_path / "run", kind=kind)
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    column = {"multilabel": "average_precision", "regress": "mae"}[kind]
    for row in metrics["rows"][-1]["test"]["per_class"]:
        assert f"{row['name']} {row['support']} " in page.text
        assert number(column, row[column]) in page.text
    assert "Confusion" not in page.text


def test_many_classes_are_folded_away(tmp_path):
    write_run(tmp_path / "run", num_outputs=25)
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "Show all 25" in page.text and "Confusion" not in page.text


def test_without_a_test_split_validation_is_shown(tmp_path):
    write_run(tmp_path / "run", test=False, epochs=1, methods=("losa",))
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "losa on the validation images" in page.text and "Test, 80 images" not in page.text


def test_damaged_runs_are_refused(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    (run / "history.jsonl").write_text('{"epoch": 0,\n')
    with pytest.raises(ArtifactError, match=r"history\.jsonl is not JSON lines"):
        write_report(run)
    (run / "history.jsonl").unlink()
    (run / "recipe.json").write_text('{"recipe": {}}')
    with pytest.raises(ArtifactError, match="lacks 'hash' in its JSON files"):
        write_report(run)
    (run / "recipe.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"recipe\.json is not JSON"):
        write_report(run)
    (run / "metrics.json").unlink()
    with pytest.raises(ArtifactError, match=r"is no finished run. Type: sidetune fit DATA --out"):
        write_report(run)


def test_numbers_are_short():
    assert [number("accuracy", 0.8214), number("r2", -0.12345), number("mae", 1234.56)] == [
        "82.1",
        "−0.123",
        "1234.6",
    ]
    assert number("auroc", None) == "–"
    assert [duration(s) for s in (0.44, 12.3, 59.6, 185, 7800)] == [
        "0.4 s",
        "12 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert [size(b) for b in (0, 512, 1536, 790 * 2**20, None)] == [
        "0 B",
        "512 B",
        "1.5 KiB",
        "790.0 MiB",
        "–",
    ]
