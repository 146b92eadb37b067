"""``--members``: from text to recipes, and every text that is none."""

import pytest

from sidetune.errors import RecipeError
from sidetune.members import OWN, variations
from sidetune.recipe import Recipe


def recipe_of(members, *settings, side="losa", **fleet):
    return Recipe.build({"side": {"name": side}, "fleet": {"members": members, **fleet}}, settings)


def test_every_combination_is_a_recipe_for_one_member_in_the_order_that_was_typed():
    found = variations(recipe_of("lr=1e-3,3e-3;seed=0,1", "train.epochs=7", "side.rank=4"))
    assert [one.label for one in found] == [
        "lr=1e-3 seed=0", "lr=1e-3 seed=1", "lr=3e-3 seed=0", "lr=3e-3 seed=1",
    ]  # fmt: skip
    assert [(one.recipe.train.lr, one.recipe.train.seed) for one in found] == [
        (1e-3, 0), (1e-3, 1), (3e-3, 0), (3e-3, 1),
    ]  # fmt: skip
    assert [one.choices for one in found][1] == {"train.lr": "1e-3", "train.seed": 1}
    assert all(one.recipe.train.epochs == 7 and one.recipe.side.rank == 4 for one in found)
    assert len({one.recipe.hash for one in found}) == 4


def test_a_member_that_is_what_a_run_alone_would_be_has_the_hash_of_that_run():
    first, second = variations(recipe_of("lr=1e-3,3e-3", ensemble=True))
    assert first.recipe == Recipe() and first.recipe.hash == Recipe().hash
    assert second.recipe.hash == Recipe.build({}, ["train.lr=3e-3"]).hash


def test_without_members_there_is_one_and_the_side_names_it():
    (one,) = variations(Recipe.build({"side": {"name": "last"}, "fleet": {"folds": 3}}))
    assert (one.label, one.choices) == ("last", {})
    assert one.recipe == Recipe.build({"side": {"name": "last"}})


def test_seeds_share_the_run_s_order_unless_each_is_to_have_its_own():
    shared = variations(recipe_of("seed=0,1,2", "train.seed=1"))
    assert [one.recipe.train.order_seed for one in shared] == [1, None, 1]  # None: as its seed
    own = variations(recipe_of("seed=0,1,2", "train.seed=1", own_order=True))
    assert [one.recipe.train.order_seed for one in own] == [None, None, None]
    asked = variations(recipe_of("seed=0,1;order_seed=5"))
    assert [one.recipe.train.order_seed for one in asked] == [5, 5]
    fixed = variations(recipe_of("seed=0,1", "train.order_seed=9"))
    assert [one.recipe.train.order_seed for one in fixed] == [9, 9]


def test_another_side_starts_from_its_own_settings():
    losa, last = variations(recipe_of("side=losa,last", "side.rank=5"))
    assert (losa.label, losa.recipe.side.rank) == ("side=losa", 5)
    assert (last.label, last.recipe.side) == ("side=last", Recipe.build({"side": {"name": "last"}}).side)
    ranks = variations(recipe_of("side=losa,last;rank=4,8"))
    assert [(one.recipe.side.name, one.recipe.side.rank) for one in ranks] == [
        ("losa", 4), ("losa", 8), ("last", 4), ("last", 8),
    ]  # fmt: skip


def test_every_setting_that_members_may_differ_in_is_found_by_its_whole_name_and_its_last_part():
    values = {
        "class_weights": "balanced", "label_smoothing": 0.1, "focal_gamma": 2.0, "norm": "trained",
        "ridge": 0.5,
        "epochs": 3, "batch_size": 4, "lr": 0.5, "weight_decay": 0.1, "total_decay": 3.0, "warmup": 0.0,
        "clip_norm": None, "select": "best", "precision": "fp32", "seed": 4, "order_seed": 6,
    }  # fmt: skip
    assert {field for fields in OWN.values() for field in fields} == set(values)
    for part, fields in OWN.items():
        for field in fields:
            text = "null" if values[field] is None else values[field]
            for name in (field, f"{part}.{field}"):
                (one,) = variations(recipe_of(f"{name}={text}"))
                assert getattr(getattr(one.recipe, part), field) == values[field]
                assert one.label == f"{field}={text}"


def test_spaces_empty_parts_lists_and_words_are_read_as_yaml():
    found = variations(recipe_of(" mix_tokens = true, false ; ; clip_norm=null,0.5;"))
    assert [one.label for one in found] == [
        "mix_tokens=true clip_norm=null", "mix_tokens=true clip_norm=0.5",
        "mix_tokens=false clip_norm=null", "mix_tokens=false clip_norm=0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ("", "--members is empty. Type: --members 'lr=1e-3,3e-3;seed=0,1'"),
        (" ; ", "--members is empty. Type"),
        ("lr", "got 'lr', expected setting=value,value. Type"),
        ("lr=", "got 'lr=', expected setting=value,value. Type"),
        ("lr=1e-3;train.lr=3e-3", "names train.lr twice. Join their values with commas"),
        ("rank=[4", r"'rank=\[4' cannot be read. Type"),
        ("rank=*all", r"'rank=\*all' cannot be read. Type"),
        ("lrr=1", "no setting 'lrr'. Did you mean 'lr'?"),
        ("name=losa,last", "no setting 'name'"),
        ("taps=all", "got 'taps', which all members of a run share. Type: --set backbone.taps="),
        ("size=64", "got 'size', which all members of a run share. Type: --set backbone.size=.., or fit"),
        ("data.split_seed=1,2", "share. Type: --set data.split_seed="),
        ("shuffle_window=1", "share. Type: --set train.shuffle_window="),
        ("folds=3", "no setting 'folds'"),
        ("rank=4,a", "--members, rank=a: side.rank is 'a': input should be a valid integer"),
        ("lr=-1", "--members, lr=-1: train.lr is -1: input should be greater than 0"),
        ("lr=[1e-3]", "train.lr is"),
        ("side=losa,lossa", "no side named 'lossa'. Did you mean 'losa'?"),
        ("side=losa,attentive;rank=4", "side=attentive rank=4: no setting 'side.rank'"),
        ("side=losa,lora", "side=lora is a baseline, which is measured and not kept. Type: sidetune bench"),
        ("side=ridge", "ridge is solved, not trained, and every run scores it. Type: --members 'side="),
        ("lr=1e-3,0.001", "lr=1e-3 and lr=0.001 are one recipe. Leave one of the two out"),
        ("seed=0,0", "seed=0 and seed=0 are one recipe"),
        ("form=fast,textbook", "form=fast and form=textbook are one recipe"),
    ],
)
def test_what_is_no_list_of_members_is_refused_with_what_to_type(members, message):
    with pytest.raises(RecipeError, match=message):
        variations(recipe_of(members))


def test_no_epoch_is_chosen_on_the_fold_that_scores_it():
    with pytest.raises(RecipeError, match=r"select=best: .* there are folds.* Type: select=last, or leave"):
        variations(recipe_of("select=last,best", folds=3))


@pytest.mark.parametrize(
    ("fleet", "settings", "side", "message"),
    [
        ({"ensemble": True}, (), "losa", "nothing to choose from. Type: --ensemble --members"),
        ({"own_order": True}, (), "losa", "no order to share. Type: --own-order --members 'seed=0,1'"),
        ({"folds": 3}, ("train.select=best",), "losa", "there are folds.*Type: --set train.select=last"),
        ({"folds": 3}, (), "ridge", "solved, not trained.* Type: --side losa"),
        ({"members": "lr=1e-3"}, (), "linear", "solved, not trained"),
        ({"folds": 1}, (), "losa", "fleet.folds is 1, expected 2 or more, or column. Type: --folds 5"),
        ({"folds": "x"}, (), "losa", "fleet.folds is 'x', expected 2 or more, or column"),
        ({"folds": "2.5"}, (), "losa", "fleet.folds is '2.5', expected"),
    ],
)
def test_a_fleet_that_makes_no_sense_is_refused(fleet, settings, side, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.build({"side": {"name": side}, "fleet": fleet}, settings)


def test_a_recipe_made_without_build_is_checked_where_its_members_are_read():
    with pytest.raises(RecipeError, match="nothing to choose from"):
        variations(Recipe(fleet=Recipe().fleet.model_copy(update={"ensemble": True})))
