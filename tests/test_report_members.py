"""What the page and the terminal say of a fleet."""

import json

import pytest

from fitted_runs import read_csv
from reports import HOSTILE, Page, add_fleet, write_full_run
from sidetune.recipe import Recipe
from sidetune.report import write_report
from sidetune.report_members import DRAWN, SHOWN, members_view, who_answers
from sidetune.tables import choices, print_scores

LABELS = ["lr=1e-2 seed=0", "lr=1e-2 seed=1", "lr=1e30 seed=0"]


def page_of(folder, labels=LABELS, **fleet):
    write_full_run(folder)
    metrics = add_fleet(folder, labels, **fleet)
    return metrics, Page(write_report(folder).read_text())


def test_the_page_names_every_member_its_scores_and_who_answers(tmp_path):
    metrics, page = page_of(tmp_path / "run", folds=5)
    assert "members" in page.ids and "#members" in page.links
    first = metrics["fleet"]["members"][0]["scores"]
    assert (
        "2 of 3 members (10 networks) answer together: balanced accuracy "
        f"{100 * first['balanced_accuracy']:.1f} % on 80 images out of fold." in page.text
    )
    for label in LABELS:
        assert label in page.text
    assert "1 of 5 diverged" in page.text and "0.50" in page.text and f"{first['log_loss']:.3f}" in page.text
    assert "a new image by the mean over all 5 folds. Members are chosen on these images" in page.text
    assert "Of the networks that answer, the first says so:" in page.text


def test_a_page_without_a_fleet_has_no_such_section(tmp_path):
    write_full_run(tmp_path / "run")
    page = Page(write_report(tmp_path / "run").read_text())
    assert "members" not in page.ids and members_view({}) is None


def test_one_that_answers_is_named_and_its_choice_is_not_hidden(tmp_path):
    metrics, page = page_of(tmp_path / "run", answering=1)
    assert "lr=1e-2 seed=0 answers, the best of 3: balanced accuracy" in page.text
    assert "on 80 images of validation." in page.text
    assert "Members are chosen on these images, so the best looks a little better than it is" in page.text
    view = members_view(metrics)
    assert [row["own"] for row in view["rows"]] == [True, False, False]
    assert [row["own"] for row in view["forest"]["rows"]] == [True, False], "what diverged has no dot"
    assert [row["cells"][0][2] for row in view["rows"]] == [True, False, False], "the best is marked"


def test_hostile_names_are_escaped_and_many_members_are_folded_away(tmp_path):
    labels = [HOSTILE, *(f"seed={seed}" for seed in range(SHOWN + 20))]
    metrics, page = page_of(tmp_path / "run", labels)
    assert "script" not in page.tags
    view = members_view(metrics)
    assert len(view["rows"]) == SHOWN and len(view["forest"]["rows"]) == DRAWN
    assert f"Show the first {SHOWN}" in page.text and "of all 221 members" in page.text


def test_a_real_ensemble_is_on_its_page(ensemble):
    page = Page((ensemble.folder / "report.html").read_text())
    assert "2 of 4 members (6 networks) answer together: balanced accuracy" in page.text
    assert {row["member"].rpartition(" ")[0] for row in read_csv(ensemble.folder / "members.csv")} == {
        one["member"] for one in ensemble.run.metrics["fleet"]["members"]
    }
    assert all(one["member"] in page.text for one in ensemble.run.metrics["fleet"]["members"])


def test_the_terminal_shows_the_first_members_in_eighty_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_full_run(tmp_path / "run")
    long = "side=losa rank=8 drop_path=0.1 weight_decay=0.05 class_weights=balanced label_smoothing=0.1 seed="
    metrics = add_fleet(tmp_path / "run", [f"{long}{seed}" for seed in range(12)], folds=5)
    print_scores(metrics)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "80 images out of fold" in out and "and 2 more in members.csv" in out and "0.50" in out
    assert out.splitlines()[-1] == who_answers(metrics)
    add_fleet(tmp_path / "run", LABELS, answering=1)
    print_scores(json.loads((tmp_path / "run" / "metrics.json").read_text()))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lr=1e30", "seed=0", "diverged", "–"] in lines


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        ({"members": " lr=1e-3,3e-3; seed=0,1;"}, "4 members: lr=1e-3,3e-3; seed=0,1"),
        ({"members": "lr=1e-3"}, "1 member: lr=1e-3"),
        ({"folds": 5}, "5 folds"),
        ({"folds": "column", "ensemble": True}, "folds of the column · ensemble"),
        (
            {"members": "seed=0,1", "folds": 3, "ensemble": True, "own_order": True},
            "2 members: seed=0,1 · 3 folds · ensemble · orders of their own",
        ),
    ],
)
def test_members_folds_and_ensemble_are_among_the_choices_that_are_said(fleet, said):
    assert choices(Recipe.build({"fleet": fleet}), "cpu").splitlines()[-1] == said
    assert said not in choices(Recipe(), "cpu")
