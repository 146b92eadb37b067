import json
import math

import pytest
from pydantic import ValidationError

from sidetune.errors import RecipeError
from sidetune.recipe import Recipe, TrainRecipe
from sidetune.recipes.demo import demo
from sidetune.sides import SIDES
from sidetune.sides.last import LastRecipe


def value(setting, **fields):
    """The field that a setting reaches."""
    part, _, field = setting.partition("=")[0].partition(".")
    return getattr(getattr(Recipe.build(fields, [setting]), part), field)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("side.rank=16", 16),
        ("train.lr=1e-3", 1e-3),  # YAML 1.1 reads a string here
        ("train.lr=3", 3.0),
        ("train.clip_norm=null", None),
        ("train.epochs=null", None),
        ("train.select=best", "best"),
        ("backbone.taps=[block.1, block.4]", ("block.1", "block.4")),
        ("backbone.taps=null", None),
        ("backbone.name=timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("backbone.weights=a=b.safetensors", "a=b.safetensors"),
        ("data.labels=[a, b]", ("a", "b")),
        ("side.mix_tokens=false", False),
        ("side.order=token->channel", "token->channel"),
        ("head.norm=none", "none"),
        ("features.dtype=bf16", "bf16"),
    ],
)
def test_a_setting_reaches_its_field(setting, expected):
    found = value(setting)
    assert found == expected
    assert type(found) is type(expected)


def test_settings_come_after_fields_and_the_last_one_counts():
    fields = {"train": {"lr": 0.5, "batch_size": 4}}
    recipe = Recipe.build(fields, ["train.lr=0.1", "train.lr=0.2"])
    assert (recipe.train.lr, recipe.train.batch_size) == (0.2, 4)
    assert fields == {"train": {"lr": 0.5, "batch_size": 4}}, "the caller's own fields stay as they were"


@pytest.mark.parametrize("name", sorted(SIDES))
def test_the_side_is_chosen_by_its_name(name):
    recipe = Recipe.build({"side": {"name": name}})
    assert recipe.side.name == name
    assert Recipe.build(recipe.model_dump(mode="json")) == recipe


def test_the_default_side_is_losa():
    assert Recipe().side.name == Recipe.build({}, ["side.rank=3"]).side.name == "losa"


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("rank=16", "--set got 'rank=16', expected part.field=value. Type: --set side.rank=16"),
        ("side.rank", "--set got 'side.rank', expected part.field=value. Type: --set side.rank=16"),
        ("side.rnk=16", "no setting 'side.rnk'. Did you mean 'side.rank'? Known: side.a, "),
        ("train.learning_rate=1", "no setting 'train.learning_rate'."),
        ("trian.lr=1", "no setting 'trian.lr'. Did you mean 'train.lr'? Parts: backbone, clips, data, "),
        ("side.heads=2", "no setting 'side.heads'."),  # LAST has it, LoSA has not
        (
            "side.name=losaa",
            "no side named 'losaa'. Did you mean 'losa'? Known: attentive, bypass, fusion, ladder, last,",
        ),
        ("side.name=[losa]", "no side named ['losa']."),
        (
            "train.select=bst",
            "train.select is 'bst': input should be 'last' or 'best'. Did you mean 'best'?",
        ),
        ("epochs=3", "--set got 'epochs=3', expected part.field=value. Type: --set train.epochs=3"),
        ("train.lr=-1", "train.lr is -1: input should be greater than 0"),
        ("train.lr=.inf", "train.lr is inf: input should be a finite number"),
        ("train.lr=", "train.lr is None: input should be a valid number"),
        ("train.epochs=2.5", "train.epochs is 2.5: input should be a valid integer"),
        ("side.rank=0", "side.rank is 0: input should be greater than or equal to 1"),
        ("side.rank=many", "side.rank is 'many': input should be a valid integer"),
        ("features.dtype=fp8", "features.dtype is 'fp8': input should be 'fp16', 'bf16' or 'fp32'"),
        ("data.labels=a", "data.labels is 'a': input should be a valid tuple"),
        ("data.val_fraction=1", "data.val_fraction is 1: input should be less than 1"),
        ("backbone.taps=[a, 3]", "backbone.taps.1 is 3: input should be a valid string"),
        ("train.lr=[1", "--set 'train.lr=[1': the value is not YAML ("),
    ],
)
def test_a_wrong_setting_says_what_was_got_and_expected(setting, text):
    with pytest.raises(RecipeError) as caught:
        Recipe.build({}, [setting])
    assert str(caught.value).startswith(text)


def test_known_settings_are_those_of_the_side_asked_for():
    with pytest.raises(RecipeError) as caught:
        Recipe.build({"side": {"name": "last"}}, ["side.head=2"])
    assert str(caught.value).startswith("no setting 'side.head'. Did you mean ")
    known = str(caught.value).partition("Known: ")[2]
    assert {f"side.{field}" for field in LastRecipe.model_fields} <= set(known.rstrip(".").split(", "))
    assert "side.mix_tokens" not in known


def test_a_recipe_is_frozen():
    recipe = Recipe()
    for part, field in ((recipe, "train"), (recipe.train, "lr"), (recipe.side, "rank")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 1)


# the hash

# Another value for every field: a new field without one fails the test below.
UNHASHED_FIELDS = {("backbone", "weights"), ("backbone", "runtime"), ("side", "form")}
OTHERS = {
    "data": {
        "task": "regress",
        "labels": ["a"],
        "split_by": "site",
        "split_seed": 1,
        "val_fraction": 0.3,
        "test_fraction": 0.3,
        "class_weights": "balanced",
        "label_smoothing": 0.1,
        "focal_gamma": 2.0,
    },
    "backbone": {
        "name": "toy",
        "size": 48,
        "taps": ["block.1"],
        "weights": "a/path",
        "runtime": "streamed",
        "precision": "bf16",
        "resize": "crop",
        "seed": 1,
        "pooled": 2,
    },
    "features": {
        "mode": "live",
        "dtype": "bf16",
        "tap_scale": "none",
        "views": 4,
        "flip": False,
        "average_views": True,
        "tiles": 2,
    },
    "side": {
        "name": "last",
        "rank": 9,
        "pool": "cls",
        "order": "parallel",
        "mix_tokens": False,
        "first_state": "zero",
        "a": 2.0,
        "every": 2,
        "drop_path": 0.1,
        "time": "joint",
        "form": "textbook",
    },
    "clips": {"frames": 3, "stored": 8, "drawn": 4, "scored": 2, "crops": 3},
    "head": {"norm": "none", "ridge": 0.5},
    "train": {
        "epochs": 7,
        "batch_size": 16,
        "lr": 2e-3,
        "weight_decay": 0.1,
        "total_decay": 1.0,
        "warmup": 0.2,
        "clip_norm": 2.0,
        "select": "best",
        "precision": "bf16",
        "seed": 1,
        "order_seed": 1,
        "shuffle_window": 3,
    },
    "fleet": {"members": "lr=1e-3,3e-3", "folds": 5, "ensemble": True, "own_order": True},
}
# what a field needs beside it
GIVEN = {
    "average_views": {"views": 2},  # one view has no average
    "ensemble": {"folds": 3},  # of one member there is none
    "own_order": {"members": "seed=0,1"},
    "stored": {"frames": 2},  # of an image nothing else is read
    "drawn": {"frames": 2},
    "scored": {"frames": 2},
    "crops": {"frames": 2},
}
FIELDS = [
    (part, field) for part, fields in Recipe().model_dump(mode="json").items() for field in sorted(fields)
]


@pytest.mark.parametrize(("part", "field"), FIELDS, ids=".".join)
def test_every_field_changes_the_hash_but_those_that_change_no_number(part, field):
    given = GIVEN.get(field, {})
    plain = Recipe.build({part: given})
    changed = Recipe.build({part: {**given, field: OTHERS[part][field]}})
    assert changed != plain
    assert (changed.hash == plain.hash) == ((part, field) in UNHASHED_FIELDS)


def test_settings_that_came_later_leave_the_hash_of_earlier_runs_as_it_was():
    """A finished run is found by its hash: the hash of this recipe before forms, windows and focus."""
    earlier = "1b623cafe1b340ed76ae447b48190ede3cf5f43938f710e284dcb12dbc6f1af8"
    assert demo("losa").hash == earlier
    assert Recipe.build({}, ["train.shuffle_window=3"]).hash != Recipe().hash
    assert Recipe.build({}, ["data.focal_gamma=0"]).hash == Recipe().hash


def test_an_average_over_one_view_is_refused():
    with pytest.raises(RecipeError) as caught:
        Recipe.build({}, ["features.average_views=true"])
    assert str(caught.value) == (
        "features.average_views is true and features.views is 0: there is one view, nothing to average. "
        "Type: --views 4 --average-views"
    )
    with pytest.raises(RecipeError, match=r"features\.tiles is 1, which is the image itself"):
        Recipe.build({}, ["features.tiles=1"])
    with pytest.raises(RecipeError, match=r"features\.tiles is 9, expected 0, or 2 to 8\. Type: --set feat"):
        Recipe.build({}, ["features.tiles=9"])
    assert Recipe.build({}, ["features.tiles=2", "features.average_views=true"]).features.tiles == 2


def test_the_hash_does_not_depend_on_the_order_of_fields():
    fields = Recipe.build({"train": {"lr": 0.5, "seed": 3}, "side": {"name": "last", "rank": 4}}).model_dump(
        mode="json"
    )
    turned = {part: dict(reversed(list(values.items()))) for part, values in reversed(list(fields.items()))}
    assert json.dumps(turned) != json.dumps(fields)
    assert Recipe.build(turned).hash == Recipe.build(fields).hash
    assert len(Recipe().hash) == 64


def test_equal_values_give_equal_hashes_however_they_were_written():
    assert Recipe.build({}, ["train.lr=1"]).hash == Recipe.build({"train": {"lr": 1.0}}).hash
    assert Recipe.build({}, ["train.lr=1e-3"]).hash == Recipe().hash


# derived defaults


@pytest.mark.parametrize(
    ("images", "epochs"), [(1, 100), (300, 100), (301, 99), (1000, 30), (3000, 10), (3001, 10), (10**6, 10)]
)
def test_epochs_are_thirty_thousand_visits_between_ten_and_a_hundred(images, epochs):
    assert TrainRecipe().resolved(images).epochs == epochs
    asked = TrainRecipe(epochs=3)
    assert asked.resolved(images) == asked


def test_arguments_of_the_backbone_are_those_asked_for():
    recipe = Recipe.build({"backbone": {"name": "toy", "size": 48, "seed": 0}})
    assert recipe.backbone.arguments() == {"size": 48, "precision": "fp32", "seed": 0}


@pytest.mark.parametrize("steps", [1, 2, 100, 10**6])
@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_decay_adds_up_to_the_same_over_any_training(lr, steps):
    decay = Recipe.build({"train": {"lr": lr, "total_decay": 3.0}}).weight_decay(steps)
    assert (1 - lr * decay) ** steps == pytest.approx(math.exp(-3), rel=1e-6)


@pytest.mark.parametrize(
    ("side", "given", "expected"), [("losa", 0.1, 0.1), ("full", None, 0.05), ("full", 0.1, 0.1)]
)
def test_decay_that_is_given_is_adamws_and_the_backbones_weights_stay_near(side, given, expected):
    recipe = Recipe.build({"side": {"name": side}, "train": {"weight_decay": given}})
    assert recipe.weight_decay(10) == expected


def test_two_decays_are_refused_and_a_total_goes_with_none_of_adamws_own():
    with pytest.raises(RecipeError, match=r"weight_decay is 0.1 and train.total_decay 3. Leave one out"):
        Recipe.build({}, ["train.weight_decay=0.1", "train.total_decay=3"])
    recipe = Recipe.build({}, ["train.weight_decay=null", "train.total_decay=3"])
    assert recipe.weight_decay(1000) * 1e-3 * 1000 == pytest.approx(3.0, rel=1e-2)
