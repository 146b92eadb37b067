import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitted_runs import toy_recipe
from sidetune import build_backbone
from sidetune.errors import RecipeError, RequestError
from sidetune.sweep.space import Choice, Range, apply, check_space, current, default_space, read_space


@pytest.fixture(scope="module")
def toy():
    return build_backbone("toy").spec


def write(folder, text):
    (folder / "search.yaml").write_text(text)
    return folder / "search.yaml"


@pytest.mark.parametrize("side", ["losa", "last", "attentive"])
def test_the_default_space_has_the_sides_own_fields_and_holds_the_defaults_rate(side):
    recipe = toy_recipe(side)
    space = default_space(recipe)
    fields = type(recipe.side).model_fields
    assert {name for name in space if name.startswith("side.")} == {
        f"side.{name}" for name in ("rank", "drop_path") if name in fields
    }
    assert {"train.lr", "train.total_decay", "data.label_smoothing"} <= space.keys()
    assert space["train.lr"].contains(recipe.train.lr)
    check_space(space, recipe)


def test_a_decay_that_is_given_is_not_searched():
    recipe = toy_recipe("losa", "train.weight_decay=0.1")
    space = default_space(recipe)
    assert "train.total_decay" not in space
    check_space(space, recipe)


def test_a_regression_has_no_labels_to_smooth():
    recipe = toy_recipe("losa", "data.task=regress")
    assert "data.label_smoothing" not in default_space(recipe)


def test_a_file_says_what_is_searched(tmp_path):
    text = "train.lr: {log: [1e-4, 1e-2]}\nside.rank: [4, 8]\nside.drop_path: {linear: [0, 0.3]}\n"
    assert read_space(write(tmp_path, text), toy_recipe()) == {
        "train.lr": Range(1e-4, 1e-2, log=True),
        "side.rank": Choice((4, 8)),
        "side.drop_path": Range(0.0, 0.3, log=False),
    }


def test_a_whole_number_has_whole_bounds(tmp_path):
    found = read_space(write(tmp_path, "side.rank: {log: [4, 32]}"), toy_recipe())
    assert found == {"side.rank": Range(4, 32, log=True, whole=True)}
    assert found["side.rank"].tried == tuple(range(4, 33))


def test_words_that_yaml_makes_of_numbers_are_numbers(tmp_path):
    assert read_space(write(tmp_path, "train.lr: [1e-4, 1e-3]"), toy_recipe()) == {
        "train.lr": Choice((1e-4, 1e-3))
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.lrr: [1, 2]", "no setting 'train.lrr'. Did you mean 'train.lr'?"),
        ("lr: [1, 2]", "no setting 'lr'."),
        ("train.epochs: [5, 10]", "train.epochs is shared by all trials"),
        ("side.name: [losa, last]", "side.name is shared by all trials"),
        ("data.task: [classify]", "data.task is shared by all trials"),
        ("train.lr: 3", "train.lr is '3', expected a list of values, {log: [low, high]}"),
        ("train.lr: {log: [0, 1]}", "with 0 < low < high"),
        ("train.lr: {log: [1e-2, 1e-4]}", "low < high"),
        ("train.lr: {log: [a, b]}", "train.lr has the bound 'a', expected a finite number"),
        ("train.lr: {log: [1e-4, .inf]}", "train.lr has the bound 'inf', expected a finite number"),
        ("side.rank: {linear: [1, .inf]}", "side.rank has the bound 'inf', expected a finite number"),
        ("side.rank: {linear: [1, 3.5]}", "whole where the setting is"),
        ("train.lr: {cubic: [1, 2]}", "expected a list of values"),
        ("train.lr: []", "expected a list of values"),
        ("side.rank: [4, 4]", "side.rank lists a value twice: [4, 4]"),
        ("side.rank: [[4], [8]]", "side.rank lists '[4]', expected numbers or words"),
    ],
)
def test_what_a_file_gets_wrong_is_said(tmp_path, text, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        read_space(write(tmp_path, text), toy_recipe())


@pytest.mark.parametrize("text", ["- 1", "", "a: [", "7"])
def test_a_file_that_is_no_mapping_is_refused_with_an_example(tmp_path, text):
    with pytest.raises(RequestError, match=re.escape("train.lr: {log: [1e-4, 1e-2]}")):
        read_space(write(tmp_path, text), toy_recipe())


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        read_space(tmp_path / "no.yaml", toy_recipe())


@pytest.mark.parametrize(
    ("name", "domain", "said"),
    [
        ("side.rank", Choice((4, 0)), "side.rank is 0"),
        ("side.drop_path", Range(0.0, 1.0, log=False), "side.drop_path is 1.0"),
        ("side.pool", Choice(("mean", "max")), "side.pool is 'max'"),
        ("train.lr", Range(-1.0, 1.0, log=False), "train.lr is -1.0"),
    ],
)
def test_a_value_that_no_recipe_takes_is_refused_before_anything_runs(name, domain, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_space({name: domain}, toy_recipe())


@pytest.mark.parametrize("side", ["ridge", "linear"])
def test_a_solved_side_is_not_searched(side):
    with pytest.raises(RecipeError, match=f"side '{side}' is solved, not trained.*Type: --side losa"):
        check_space({}, toy_recipe(side))


def test_a_recipe_takes_a_trials_values_and_gives_its_own():
    recipe = toy_recipe("losa", "train.lr=3e-3")
    space = {"train.lr": Range(1e-4, 1e-2, log=True), "side.rank": Choice((4, 8))}
    assert current(recipe, space) == {"train.lr": 3e-3, "side.rank": 8}
    changed = apply(recipe, {"side.rank": 4, "train.lr": 1e-3})
    assert (changed.side.rank, changed.train.lr) == (4, 1e-3)
    assert apply(changed, current(recipe, space)) == recipe


@given(st.floats(-1, 1), st.floats(0.001, 1))
def test_a_range_contains_its_ends_and_nothing_beyond(low, width):
    domain = Range(low, low + width, log=False)
    assert domain.contains(low) and domain.contains(low + width)
    assert not domain.contains(low - width) and not domain.contains(low + 2.5 * width)


def test_true_is_not_one():
    assert Choice((True, False)).contains(True) and not Choice((1, 0)).contains(True)


def test_a_share_that_is_chosen_after_training_is_no_sweeps() -> None:
    recipe = toy_recipe("losa", "head.ridge=auto")
    with pytest.raises(RecipeError, match=r"head.ridge is 'auto'.*search it: head.ridge: \[0, 0.3"):
        check_space({}, recipe)
