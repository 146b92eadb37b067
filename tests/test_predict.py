import json
import shutil

import numpy as np
import pytest
import torch

from fitted_runs import read_csv, toy_recipe
from images import make_csv, make_folder
from sidetune import Artifact, build_backbone, fit, load
from sidetune.backbones import BACKBONES
from sidetune.errors import ArtifactError, BackboneError, DataError, RequestError
from sidetune.predict import Prediction
from sidetune.rescore import evaluate_run
from sidetune.tasks import Classify


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """A run of two numbers, and its table."""
    root = tmp_path_factory.mktemp("regression")
    table = make_csv(root / "data", "regress", 40)
    recipe = toy_recipe("ridge", "data.task=regress", "data.labels=[x,y]")
    return fit(table, out=root / "run", recipe=recipe, store=root / "store", quiet=True), table


def test_one_prediction_an_image_in_the_order_given(runs, image_folder):
    files = sorted(image_folder.glob("*/*.png"), reverse=True)[:40]  # more than a micro-batch
    predictor = load(runs("ridge").folder)
    together = predictor.predict(files)
    assert [item.path for item in together] == [str(file) for file in files]
    for file, item in list(zip(files, together, strict=True))[::13]:
        (alone,) = predictor.predict([str(file)])
        assert alone.label == item.label
        assert alone.values == pytest.approx(item.values, abs=1e-5)
    assert all(sum(item.values.values()) == pytest.approx(1, abs=1e-5) for item in together)
    assert all(item.label == max(item.values, key=item.values.get) for item in together)
    assert predictor.predict([]) == []


def test_an_image_that_cannot_be_read_has_its_reason(runs, image_folder, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    good = image_folder / "class1" / "0001.png"
    files = [tmp_path / "text.png", good, tmp_path / "nowhere.png", tmp_path]
    first, second, third, fourth = load(runs().folder).predict(files)
    assert first == Prediction(str(files[0]), error="not an image that Pillow reads")
    assert second.error is None
    assert second.values == pytest.approx(load(runs().folder).predict([good])[0].values, abs=1e-6)
    assert (third.error, fourth.error) == ("No such file or directory", "Is a directory")


def test_a_single_path_is_not_taken_for_a_list_of_letters(runs):
    with pytest.raises(RequestError) as error:
        load(runs().folder).predict("new.jpg")
    assert str(error.value) == "got the path 'new.jpg', expected a list. Type: predict(['new.jpg'])"


def test_numbers_are_in_the_targets_units(regression):
    run, table = regression
    rows = read_csv(table)
    for item in load(run.folder).predict([table.parent / row["path"] for row in rows]):
        assert item.label is None
        assert list(item.values) == ["x", "y"]
        assert all(0 < value < 1 for value in item.values.values())


def test_classes_are_matched_by_name(runs, image_folder, tmp_path):
    run = runs("ridge").folder
    shutil.copytree(image_folder / "class2", tmp_path / "class2")
    shutil.copytree(image_folder / "class1", tmp_path / "class1")
    found = evaluate_run(run, tmp_path)
    assert (found.split, found.evaluation.num_samples) == ("all", 40)
    assert [row["support"] for row in found.evaluation.per_class] == [0, 20, 20]
    assert found.evaluation.scores["accuracy"] == 1
    assert evaluate_run(run, image_folder, split="all").evaluation.scores["accuracy"] == 1


def test_other_classes_are_refused(runs, tmp_path):
    data = make_folder(tmp_path / "data", 4, 24)
    with pytest.raises(DataError) as error:
        evaluate_run(runs().folder, data)
    assert str(error.value) == (
        "the data are for classify with class3; the run knows classify with class0, class1, class2. "
        "Rename the folders or columns to the run's"
    )


def test_another_task_is_refused(regression, image_folder):
    run, table = regression
    with pytest.raises(
        DataError, match="so only --task classify without --labels is possible, got --task reg"
    ):
        evaluate_run(run.folder, image_folder)
    with pytest.raises(DataError, match=r"has no column 'z'"):
        evaluate_run(run.folder, table, labels=["z"])


def test_some_of_the_columns_can_be_scored(regression):
    run, table = regression
    both, one = (evaluate_run(run.folder, table, split="all", labels=labels) for labels in (None, ["y"]))
    assert [row["support"] for row in one.evaluation.per_class] == [0, 40]
    assert one.evaluation.per_class[1] == pytest.approx(both.evaluation.per_class[1])


@pytest.mark.parametrize(
    ("split", "expected", "images"),
    [
        ("auto", "test", 12),
        ("test", "test", 12),
        ("val", "val", 12),
        ("train", "train", 36),
        ("all", "all", 60),
    ],
)
def test_splits_of_the_runs_own_data(runs, image_folder, split, expected, images):
    found = evaluate_run(runs("ridge").folder, image_folder, split=split)
    assert (found.split, found.evaluation.num_samples) == (expected, images)


def test_auto_scores_the_test_split_where_foreign_data_name_one(runs, tmp_path):
    for split, seed in (("train", 1), ("test", 2)):
        make_folder(tmp_path / split, 3, 12, seed=seed)
    found = evaluate_run(runs("ridge").folder, tmp_path)
    assert (found.split, found.evaluation.num_samples) == ("test", 12)


def test_an_unknown_split_is_refused_first(tmp_path):
    with pytest.raises(DataError) as error:
        evaluate_run(tmp_path / "nowhere", tmp_path, split="tset")
    assert str(error.value) == (
        "no split named 'tset'. Did you mean 'test'? Known: all, auto, test, train, val."
    )


def test_unreadable_images_are_left_out_and_named(runs, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "class0" / "0003.png").write_text("no image")
    found = evaluate_run(runs("ridge").folder, data)
    assert found.skipped == {"class0/0003.png": "not an image that Pillow reads"}
    assert found.evaluation.num_samples == 59
    for file in data.glob("*/*.png"):
        file.write_text("no image")
    with pytest.raises(DataError, match=r"none of 60 images of .*data can be read, expected at least one"):
        evaluate_run(runs("ridge").folder, data)


def test_weights_that_have_moved_are_asked_for(runs, tmp_path, monkeypatch):
    """The toy backbone has no weights file: a stand-in for timm takes one."""
    asked = []

    def stand_in(model, /, *, weights="hub", precision="fp32"):
        asked.append((model, weights))
        if weights.endswith("other.pth"):
            raise BackboneError("the weights are of vit_tiny. Type: --backbone timm:vit_tiny")
        return build_backbone("toy")

    monkeypatch.setitem(BACKBONES, "timm", stand_in)
    artifact = Artifact.read(runs().folder)
    named = {"name": "timm:vit", "weights": str(tmp_path / "old.pth")}
    recipe = artifact.recipe.model_copy(
        update={"backbone": artifact.recipe.backbone.model_copy(update=named)}
    )
    moved = Artifact(**{**vars(artifact), "recipe": recipe})
    moved.save(tmp_path / "run")
    with pytest.raises(ArtifactError) as error:
        load(tmp_path / "run")
    assert str(error.value) == (
        f"the run was trained with the weights {tmp_path / 'old.pth'}, and they are not there (any more, or "
        "seen from this folder). Type: --weights with their path"
    )
    assert asked == []
    load(tmp_path / "run", weights=tmp_path / "new.pth")
    (tmp_path / "old.pth").touch()
    load(tmp_path / "run")
    assert asked == [("vit", str(tmp_path / "new.pth")), ("vit", str(tmp_path / "old.pth"))]
    with pytest.raises(ArtifactError) as error:
        load(tmp_path / "run", weights=tmp_path / "other.pth")
    assert str(error.value) == (
        "the weights are of vit_tiny; the run was trained on timm:vit. Type: --weights with the weights that "
        "it was trained on"
    )


def test_a_device_that_is_not_there_is_refused_first(tmp_path):
    with pytest.raises(RequestError, match="no device named 'gpu'"):
        load(tmp_path / "nowhere", device="gpu")


def test_predicting_leaves_no_graph(runs, image_folder):
    predictor = load(runs().folder)
    (voice,) = predictor.committee.voices
    assert not voice.model.training
    predictor.predict([image_folder / "class0" / "0000.png"])
    assert all(parameter.grad is None for parameter in voice.model.parameters())
    assert torch.is_grad_enabled()


def test_the_runs_task_is_what_it_was_fitted_on(runs):
    assert load(runs().folder).artifact.task == Classify(
        ("class0", "class1", "class2"), (1 / 3, 1 / 3, 1 / 3)
    )


def test_a_few_images_are_all_scored(runs, image_folder, tmp_path):
    """Too few to draw splits from: `auto` means all of them, and a split that is asked for is refused."""
    for name in ("class0/0000.png", "class1/0001.png", "class1/0004.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(image_folder / name, tmp_path / name)
    found = evaluate_run(runs("ridge").folder, tmp_path)
    assert (found.split, found.evaluation.num_samples) == ("all", 3)
    with pytest.raises(DataError, match="each class needs at least 3"):
        evaluate_run(runs("ridge").folder, tmp_path, split="val")


# answers withheld


def test_answers_of_little_confidence_are_withheld(runs, image_folder):
    predictor = load(runs("losa").folder)
    paths = sorted(image_folder.rglob("*.png"))
    free = predictor.predict(paths)
    confidence = [max(item.values.values()) for item in free]
    threshold = float(np.median(confidence))
    found = predictor.predict(paths, abstain_below=threshold)
    for item, before, sure in zip(found, free, confidence, strict=True):
        assert item.values == before.values and item.error is None
        if sure < threshold:
            assert (item.label, item.withheld) == (None, (before.label,))
        else:
            assert (item.label, item.withheld) == (before.label, ())
    assert 0 < sum(item.label is None for item in found) < len(found)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, 90])
def test_a_threshold_is_a_probability(runs, threshold):
    with pytest.raises(RequestError) as caught:
        load(runs("ridge").folder).predict([], abstain_below=threshold)
    assert str(caught.value) == (
        f"got --abstain-below {threshold:g}, expected a probability from 0 to 1. Type: --abstain-below 0.9"
    )


def test_labels_are_withheld_one_by_one(tmp_path):
    predictor = fitted_on_a_table(tmp_path, "multilabel", ("coloured", "right"))
    path = tmp_path / "data/images/0000.png"
    values = predictor.predict([path])[0].values
    surest = {name: max(value, 1 - value) for name, value in values.items()}
    between = sum(surest.values()) / 2
    found = predictor.predict([path], abstain_below=between)[0]
    assert found.withheld == (min(surest, key=surest.__getitem__),) and found.values == values


def test_a_regression_has_no_probabilities_to_withhold(tmp_path):
    predictor = fitted_on_a_table(tmp_path, "regress", ("x", "y"))
    with pytest.raises(RequestError, match=r"^--abstain-below needs probabilities, and the run is a regr"):
        predictor.predict([], abstain_below=0.9)


def fitted_on_a_table(root, task, labels):
    table = make_csv(root / "data", task, 40)
    recipe = toy_recipe("ridge", f"data.task={task}", f"data.labels=[{','.join(labels)}]")
    run = fit(table, out=root / "run", recipe=recipe, store=root / "store", quiet=True)
    return load(run.folder)


def test_probabilities_are_those_that_the_run_was_scored_with(runs, image_folder):
    run = runs("losa")
    lines = [line for line in read_csv(run.folder / "predictions.csv") if line["split"] == "test"]
    found = load(run.folder).predict([image_folder / line["path"] for line in lines])
    for line, item in zip(lines, found, strict=True):
        stored = [float(line[f"p_{name}"]) for name in item.values]
        assert list(item.values.values()) == pytest.approx(stored, abs=2e-3)
    assert json.loads((run.folder / "artifact.json").read_text())["temperature"] != 1.0
