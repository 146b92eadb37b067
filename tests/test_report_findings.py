"""What the page says about images, calibration and cost."""

import json
import re

import pytest

from findings import HEADLINE_WITHOUT, empty_findings, make_findings
from reports import HOSTILE, Page, write_full_run, write_run
from sidetune.errors import ArtifactError
from sidetune.figures import number, reliability
from sidetune.report import write_report


def test_a_run_of_an_older_version_leaves_out_what_it_lacks(tmp_path):
    write_run(tmp_path / "run")
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert not {"mistakes", "labels", "duplicates", "calibration"} & set(page.ids)
    assert "img" not in page.tags


@pytest.mark.parametrize("kind", ["classify", "multilabel", "regress"])
def test_findings_are_shown_with_their_pictures(tmp_path, kind):
    metrics, found = write_full_run(tmp_path / "run", kind=kind)
    path = write_report(tmp_path / "run")
    page = Page(path.read_text(encoding="utf-8"))
    assert {"mistakes", "labels", "duplicates"} <= set(page.ids)
    rows = [*found["mistakes"]["rows"], *found["right"]["rows"], *found["suspects"]["rows"]]
    for row in rows:
        assert row["path"] in page.text
        assert f"label {row['label']}" in page.text
        answer = f"said {row['predicted']}" if "predicted" in row else f"ridge {row['suggested']}"
        assert answer in page.text
        for name in ("thumbnail", "evidence"):
            assert row.get(name) is None or row[name] in page.links
    for pair in found["leaks"]["pairs"]:
        assert f"test {pair['label']} training {pair['train_label']}" in page.text
        assert pair["path"] in page.text and pair["train_path"] in page.text
    assert "the same bytes" in page.text and "99.2 % alike" in page.text and "labels differ" in page.text
    assert "no picture: the file could not be read" in page.text
    assert "12 of 160 validation and test images are nearly the same" in page.text
    without = number(metrics["headline"], HEADLINE_WITHOUT)
    assert f"without near-duplicates of training images 71 {without}" in page.text
    assert path.stat().st_size < 2e6


def test_of_many_suspects_the_first_are_pictured_and_all_are_counted(tmp_path):
    write_full_run(tmp_path / "run", findings=lambda metrics: make_findings(metrics, suspects=30))
    path = tmp_path / "run" / "findings.json"
    found = json.loads(path.read_text())
    for k, row in enumerate(found["suspects"]["rows"]):
        row["path"] = f"suspect-{k}.png"
    path.write_text(json.dumps(found))
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "suspect-23.png" in page.text and "suspect-24.png" not in page.text
    assert "60 of " in page.text


def test_near_duplicates_are_named_beside_the_verdict(tmp_path):
    metrics, _ = write_full_run(tmp_path / "run")
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    score = number("accuracy", metrics["rows"][-1]["test"]["scores"]["balanced_accuracy"])
    assert (
        f"Without them, balanced accuracy is 71.2\N{NO-BREAK SPACE}% instead of {score}\N{NO-BREAK SPACE}%."
        in page.text
    )
    assert "#duplicates" in page.links


def test_probabilities_are_never_said_to_be_certain(tmp_path):
    def sure(metrics):
        found = make_findings(metrics)
        found["suspects"]["rows"][0] |= {"p_label": 0.0, "p_suggested": 1.0}
        found["leaks"]["pairs"][1] |= {"similarity": 0.99999, "identical": False}
        return found

    write_full_run(tmp_path / "run", findings=sure)
    text = Page(write_report(tmp_path / "run").read_text(encoding="utf-8")).text
    assert "< 1 %" in text and "> 99 %" in text and "> 99.9 % alike" in text


def test_findings_that_found_nothing_say_so(tmp_path):
    write_full_run(tmp_path / "run", findings=empty_findings)
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "losa makes no mistake on the test images" in page.text
    assert "contradicts a label of none of the 1,000 training images" in page.text
    assert "160 validation and test images were compared with 1,000 training images, and no two" in page.text
    assert "Mind:" not in page.text and "img" not in page.tags


def test_findings_that_were_switched_off_say_so(tmp_path):
    write_full_run(tmp_path / "run", findings=lambda metrics: empty_findings(metrics, switched_off=True))
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "the check was switched off with --no-leak-check" in page.text
    assert "labels" not in page.ids


def test_without_evidence_the_page_says_why(tmp_path):
    def plain(metrics):
        found = make_findings(metrics)
        for row in found["mistakes"]["rows"] + found["right"]["rows"]:
            row["evidence"] = None
        return found

    write_full_run(tmp_path / "run", findings=plain)
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "its pooling gives no exact share of the answer a patch" in page.text
    assert "darkened" not in page.text


@pytest.mark.parametrize("kind", ["classify", "multilabel"])
def test_the_calibration_curve_has_a_dot_a_bin(tmp_path, kind):
    metrics, _ = write_full_run(tmp_path / "run", kind=kind)
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    own = metrics["rows"][-1]["test"]
    assert page.tags.count("rect") == len(own["calibration"])
    for row in own["calibration"]:
        numbers = f"{row['count']:,} {100 * row['confidence']:.1f} {100 * row['accuracy']:.1f}"
        assert f"{100 * row['low']:.0f} – {100 * row['high']:.0f} {numbers}" in page.text
    assert "divided by a temperature of 1.35, fitted on validation, which softened them" in page.text
    assert ("sidetune predict run IMAGE.. --abstain-below 0.9" in page.text) == (kind == "classify")
    for row in own.get("answered", []):
        right = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
        assert f"{row['threshold']:g} {100 * row['share']:.1f} {right}" in page.text


def test_the_reliability_diagram_puts_certainty_at_the_corner():
    bins = [
        {"low": 0.0, "high": 0.5, "count": 1, "confidence": 0.0, "accuracy": 0.0},
        {"low": 0.5, "high": 1.0, "count": 12345, "confidence": 1.0, "accuracy": 1.0},
    ]
    drawn = reliability(bins)["bins"]
    assert [(row["x"], row["y"], row["ideal"]) for row in drawn] == [
        ("46.0", "200.0", "200.0"),
        ("348.0", "20.0", "20.0"),
    ]
    assert [(row["height"], row["count"]) for row in drawn] == [("1.0", "1"), ("30.0", "12k")]


def test_time_by_stage_is_a_bar_of_the_longest(tmp_path):
    write_full_run(tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    bars = [float(width) for width in re.findall(r'<i style="width:([\d.]+)%">', html)]
    seconds = [184.2, 0.4, 2.5, 95.0, 3.1, 6.5]
    assert bars == [round(100 * second / 184.2, 1) for second in seconds]
    assert "Training losa" in html and "Findings" in html


def test_of_very_many_classes_the_weakest_are_listed(tmp_path):
    metrics = write_run(tmp_path / "run", num_outputs=3)
    row = metrics["rows"][-1]["test"]
    metrics["outputs"] = [f"class {k}" for k in range(10_000)]
    first = row["per_class"][0]
    row["per_class"] = [first | {"name": f"class {k}", "recall": k / 10_000} for k in range(10_000)][::-1]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    path = write_report(tmp_path / "run")
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Of 10,000, the 200 weakest in recall; metrics.json has all" in text
    assert "class 0 " in text and "class 199 " in text and "class 200 " not in text
    assert path.stat().st_size < 2e5


def test_tables_pictures_and_anchors_are_accessible(tmp_path):
    write_full_run(tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("table") == page.tags.count("caption")
    assert html.count("<th ") == html.count(' scope="')
    assert len(re.findall(r"<img[^>]* alt=", html)) == page.tags.count("img") > 100
    assert len(set(page.ids)) == len(page.ids)
    anchors = [value[1:] for value in page.links if value.startswith("#")]
    assert len(anchors) >= 12 and set(anchors) <= set(page.ids)


def test_names_of_files_are_escaped_and_kept_apart(tmp_path):
    names = [HOSTILE, "\u202egnp.exe", "a" * 300, "مرحبا.png"]
    write_full_run(tmp_path / "run", findings=lambda metrics: make_findings(metrics, paths=names))
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html and not [name for name, _ in page.attributes if name.startswith("on")]
    for name in (HOSTILE, r"\u202egnp.exe", "a" * 300, "مرحبا.png"):
        assert name in page.text
    assert "<bdi>مرحبا.png</bdi>" in html and "\u202e" not in html


def test_a_very_long_label_is_shortened_under_pictures_alone(tmp_path):
    metrics, _ = write_full_run(tmp_path / "run")
    name = "a" * 50 + "b" * 50
    metrics["outputs"][0] = name
    metrics["rows"][-1]["test"]["per_class"][0]["name"] = name
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "run" / "findings.json").write_text(json.dumps(make_findings(metrics)))
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert f"label {'a' * 40} … {'b' * 17} " in page.text
    assert page.text.count(name) == 3  # the matrix's row and column, the table of classes


@pytest.mark.parametrize(
    "uri", ["https://example.org/a.png", "data:image/svg+xml,<svg/>", 'data:image/png;base64,AA" onload="x']
)
def test_pictures_from_elsewhere_are_refused(tmp_path, uri):
    def foreign(metrics):
        found = make_findings(metrics)
        found["suspects"]["rows"][0]["thumbnail"] = uri
        return found

    write_full_run(tmp_path / "run", findings=foreign)
    with pytest.raises(
        ArtifactError, match=r"findings\.json holds a picture that starts with .*, expected 'data:"
    ):
        write_report(tmp_path / "run")


def test_damaged_findings_are_refused(tmp_path):
    write_full_run(tmp_path / "run")
    (tmp_path / "run" / "findings.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"findings\.json holds a list, expected an object.*sidetune fit"):
        write_report(tmp_path / "run")
    (tmp_path / "run" / "findings.json").write_text('{"leaks": null}')
    with pytest.raises(ArtifactError, match="lacks 'mistakes' in its JSON files"):
        write_report(tmp_path / "run")
