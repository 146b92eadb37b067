import json
import sys

import pytest

from sidetune import cli
from sidetune.recipe import Recipe
from sweeps import sweep_words


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run one command line: its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sidetune", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


def test_a_sweep_prints_its_two_rows_and_where_the_report_is(run_cli, image_folder, tmp_path):
    code, out, err = run_cli(*sweep_words(image_folder, tmp_path, trials=3))
    assert code == 0, err
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(("default", "winner"))]
    assert rows == ["default", "winner"]
    assert out.splitlines()[-1] == str(tmp_path / "sweep" / "report.html")
    assert "3 trials of 2 networks, 4 epochs, compared after 1, 4" in err
    assert max(map(len, out.splitlines()[:-1])) <= 80

    code, out, _ = run_cli(*sweep_words(image_folder, tmp_path, trials=3), "--json", "--quiet")
    found = json.loads(out.splitlines()[-1])
    assert (code, found["side"], found["headline"]) == (0, "winner", "balanced_accuracy")
    assert [row["method"] for row in found["rows"]] == ["default", "winner"]

    code, out, _ = run_cli("predict", tmp_path / "sweep", image_folder / "class0" / "0000.png")
    assert code == 0 and "class0" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folds", "some"], "--folds is 'some', expected 2 or more, or column. Type: --folds 5"),
        (["--on", "val"], "got --on val and --folds 2"),
        (["--search", "nothing.yaml"], "--search nothing.yaml cannot be read"),
        (["--side", "ridge"], "side 'ridge' is solved, not trained"),
        (["--trials", "0"], "--trials is 0, expected 2 or more"),
    ],
)
def test_a_wrong_request_ends_with_2(run_cli, image_folder, tmp_path, words, said):
    code, out, err = run_cli(*sweep_words(image_folder, tmp_path), *words)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())


def test_options_reach_the_recipe(image_folder, tmp_path, monkeypatch, run_cli):
    class Asked(Exception):  # noqa: N818
        pass

    asked = {}

    def note(*_, **given):
        asked.update(given)
        raise Asked

    monkeypatch.setattr("sidetune.sweep", note)
    words = sweep_words(image_folder, tmp_path)
    with pytest.raises(Asked):
        run_cli(*words, "--side", "last", "--set", "train.lr=3e-3", "--views", "2")
    recipe = asked.pop("recipe")
    assert isinstance(recipe, Recipe)
    assert (recipe.side.name, recipe.train.lr, recipe.train.epochs, recipe.features.views) == (
        "last",
        3e-3,
        4,
        2,
    )
    assert (asked["trials"], asked["folds"], asked["places"], asked["seed"]) == (6, 2, 3, 0)
