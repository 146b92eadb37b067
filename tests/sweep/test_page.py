import json
import re
import shutil

import pytest

from sidetune.errors import ArtifactError
from sidetune.figures import scatter
from sidetune.sweep.page import write_page
from sweeps import TRIALS, small_sweep


@pytest.fixture(scope="module")
def done(tmp_path_factory, image_folder):
    """A finished sweep's folder. Read only."""
    return small_sweep(image_folder, tmp_path_factory.mktemp("sweep")).folder


@pytest.fixture
def folder(done, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(done, tmp_path / "copy")


def changed(folder, **fields):
    found = json.loads((folder / "sweep.json").read_text()) | fields
    (folder / "sweep.json").write_text(json.dumps(found))
    return write_page(folder).read_text()


def words(page):
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_the_page_has_every_trial_and_every_searched_field(done):
    page = (done / "report.html").read_text()
    found = json.loads((done / "sweep.json").read_text())
    table = page[page.index('id="trials"') : page.index('id="cost"')]
    assert table.count("<tr") == 1 + TRIALS
    assert table.count("the winner") == 1
    assert all(page.count(name) >= 3 for name in found["space"]), "as won, as figure, as column"
    assert page.count("<circle") >= TRIALS * len(found["space"])


@pytest.mark.parametrize(
    ("value", "interval", "said"),
    [
        (0.05, [0.01, 0.09], "is 5.0 points above the recipe as it was given in balanced accuracy on test"),
        (0.05, [-0.01, 0.09], "(95 % of the difference: -1.0 to 9.0), so it may be chance."),
        (0.05, [0.01, 0.09], "(95 % of the difference: 1.0 to 9.0), which leaves no doubt."),
        (-0.02, [-0.05, 0.01], "is 2.0 points below the recipe"),
        (0.0, [-0.05, 0.05], "is level with the recipe"),
    ],
)
def test_the_first_sentence_says_what_was_won_and_how_sure_it_is(folder, value, interval, said):
    difference = {"split": "test", "metric": "balanced_accuracy", "value": value, "interval": interval}
    assert said in words(changed(folder, winner=1, difference=difference))


def test_a_default_that_won_is_said(folder):
    assert "No trial beat the recipe as it was given" in changed(folder, winner=0)


def test_a_default_that_diverged_leaves_nothing_to_compare_with(folder):
    assert "Trial 1 won." in changed(folder, winner=1, difference=None)


def test_what_was_computed_is_marked(done):
    page = words((done / "report.html").read_text())
    assert re.search(r"One by one [^,]+, computed from that epoch: 6 x 2 networks, 4 epochs each", page)
    assert re.search(r"One network alone [\d.]+ s an epoch, measured", page)


def test_too_few_scores_give_no_importance(folder):
    assert "Too few trials were scored to say." in changed(folder, importance={})


def test_names_are_escaped(folder):
    text = (folder / "metrics.json").read_text().replace("class0", "<script>alert(1)</script>")
    (folder / "metrics.json").write_text(text)
    assert "<script" not in write_page(folder).read_text()


@pytest.mark.parametrize("name", ["sweep.json", "metrics.json"])
def test_a_damaged_file_is_said(folder, name):
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({key: found[key] for key in list(found)[:2]}))
    with pytest.raises(ArtifactError, match="damaged, or of another version"):
        write_page(folder)


def test_a_scatter_places_values_by_their_domain():
    points = [(1e-4, 0.2, True), (1e-3, 0.4, False), (1e-2, 0.6, True), (1.0, 0.9, True)]
    figure = scatter("rate", "accuracy", points, {"log": [1e-4, 1e-2]})
    assert [x for x, _, _ in figure["points"]] == ["46.0", "197.0", "348.0"], "what is outside is left out"
    assert [name for _, name in figure["marks"]] == ["0.0001", "0.001", "0.01"]
    figure = scatter("pool", "accuracy", [("cls", 0.5, True)], ["mean", "cls"])
    assert figure["points"][0][0] == figure["marks"][1][0]
    assert scatter("pool", "accuracy", [], ["mean", "cls"]) is None
