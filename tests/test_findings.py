import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import sidetune
from fitted_runs import read_csv, toy_recipe
from images import make_csv


def findings_of(run):
    return json.loads((run.folder / "findings.json").read_text())


def picture(uri):
    kind, _, data = uri.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


@pytest.fixture(scope="module")
def messy(image_folder, tmp_path_factory):
    """60 images in splits: two test images are copies of training images, one training label is wrong."""
    root = tmp_path_factory.mktemp("messy")
    for number, path in enumerate(sorted(image_folder.rglob("*.png"))):
        split = ("train", "train", "train", "val", "test")[number % 5]
        (root / split / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / split / path.parent.name)
    known = sorted((root / "train/class0").iterdir())[0]
    Image.open(known).transpose(Image.Transpose.ROTATE_90).save(root / "train/class1/wrong.png")
    twins = sorted((root / "train/class2").iterdir())[:2]
    for twin in twins:
        (root / "test/class2" / f"copy-{twin.name}").write_bytes(twin.read_bytes())
    out = root.parent / f"{root.name}-run"
    run = sidetune.fit(root, out=out, recipe=toy_recipe("losa"), store=out.parent / "store-messy", quiet=True)
    return run, twins


def test_leaks_are_named_with_both_pictures_and_the_score_without_them(messy):
    run, twins = messy
    leaks = findings_of(run)["leaks"]
    assert (leaks["count"], leaks["images"]) == (2, 2)
    assert leaks["compared"] == {"train": 37, "others": 26}
    assert [pair["path"] for pair in leaks["pairs"]] == [f"test/class2/copy-{twin.name}" for twin in twins]
    assert [pair["train_path"] for pair in leaks["pairs"]] == [f"train/class2/{twin.name}" for twin in twins]
    for pair in leaks["pairs"]:
        assert (pair["split"], pair["label"], pair["train_label"]) == ("test", "class2", "class2")
        assert (pair["identical"], pair["similarity"]) == (True, 1.0)
        assert picture(pair["thumbnail"]).size == picture(pair["train_thumbnail"]).size == (48, 48)
    lines = [
        line
        for line in read_csv(run.folder / "predictions.csv")
        if line["split"] == "test" and "copy-" not in line["path"]
    ]
    recalls = [
        np.mean([line["predicted"] == name for line in lines if line["label"] == name])
        for name in ("class0", "class1", "class2")
    ]
    assert leaks["without"]["num_samples"] == len(lines) == 12
    assert leaks["without"]["score"] == pytest.approx(np.mean(recalls))


def test_a_wrong_label_is_a_suspect(messy):
    suspects = findings_of(messy[0])["suspects"]
    assert suspects["checked"] == 37 and suspects["count"] == len(suspects["rows"]) >= 1
    [found] = [row for row in suspects["rows"] if row["path"].endswith("wrong.png")]
    assert (found["label"], found["suggested"]) == ("class1", "class0")
    assert found["p_label"] < found["p_suggested"]
    assert picture(found["thumbnail"]).format == "JPEG"


def test_suspects_past_the_pictured_ones_are_listed_too(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sidetune.findings.SUSPECTS", 0)
    images = shutil.copytree(image_folder, tmp_path / "images")
    for k in (0, 3, 6, 9, 12):
        (images / "class0" / f"{k:04d}.png").rename(images / "class1" / f"wrong{k}.png")
    run = sidetune.fit(images, out=tmp_path / "run", recipe=toy_recipe("ridge"), store=tmp_path / "store")
    suspects = findings_of(run)["suspects"]
    assert suspects["count"] == len(suspects["rows"]) >= 1
    assert {row["thumbnail"] for row in suspects["rows"]} == {None}


def test_mistakes_are_the_most_confident_and_show_where_the_side_looked(messy):
    run, _ = messy
    findings = findings_of(run)
    lines = [line for line in read_csv(run.folder / "predictions.csv") if line["split"] == "test"]
    wrong = [line for line in lines if line["label"] != line["predicted"]]
    mistakes = findings["mistakes"]
    assert (mistakes["split"], mistakes["count"]) == ("test", len(wrong))
    surest = sorted(wrong, key=lambda line: -float(line[f"p_{line['predicted']}"]))
    assert [row["path"] for row in mistakes["rows"]] == [line["path"] for line in surest[:12]]
    assert all(row["label"] != row["predicted"] for row in mistakes["rows"])
    right = findings["right"]["rows"]
    assert len(right) == 6 and all(row["label"] == row["predicted"] for row in right)
    for row in mistakes["rows"] + right:
        assert picture(row["thumbnail"]).size == (128, 128)
        assert picture(row["evidence"]).size == (4, 4), "the toy's grid"


def test_closed_forms_have_mistakes_without_evidence(runs):
    findings = findings_of(runs("ridge"))
    assert {row["evidence"] for row in findings["right"]["rows"]} == {None}


def test_nobody_looks_where_nobody_asked(image_folder, tmp_path):
    run = sidetune.fit(
        image_folder,
        out=tmp_path / "run",
        recipe=toy_recipe("ridge"),
        store=tmp_path / "s",
        leak_check=False,
        quiet=True,
    )
    assert findings_of(run)["leaks"] is None


@pytest.mark.parametrize("task", ["multilabel", "regress"])
def test_labels_and_numbers_are_told_in_words(tmp_path, task):
    labels = {"multilabel": "coloured,right", "regress": "x,y"}[task]
    recipe = toy_recipe("losa", f"data.task={task}", f"data.labels=[{labels}]")
    table = make_csv(tmp_path / "data", task, 60)
    run = sidetune.fit(table, out=tmp_path / "run", recipe=recipe, store=tmp_path / "s", quiet=True)
    findings = findings_of(run)
    rows, count = findings["mistakes"]["rows"], findings["mistakes"]["count"]
    assert findings["right"]["rows"] == []
    assert 0 < len(rows) <= 12
    if task == "regress":
        assert count == 24, "every scored value"
        assert all(row["label"].partition(" = ")[0] in ("x", "y") for row in rows)
        assert {row["confidence"] for row in rows} == {None}
        return
    assert all(row["label"].split(": ")[1] != row["predicted"].split(": ")[1] for row in rows)
    confidences = [row["confidence"] for row in rows]
    assert confidences == sorted(confidences, reverse=True) and min(confidences) >= 0.5


def test_errors_are_measured_by_the_spread_of_training(tmp_path):
    """A column that is constant in test would otherwise hold all the largest errors."""
    table = make_csv(tmp_path / "data", "regress", 60)
    rows = read_csv(table)
    with table.open("w") as stream:
        stream.write("path,split,x,y\n")
        for number, row in enumerate(rows):
            split = ("train", "train", "val", "test")[number % 4]
            y = "0.5" if split == "test" else row["y"]
            stream.write(f"{row['path']},{split},{row['x']},{y}\n")
    recipe = toy_recipe("ridge", "data.task=regress", "data.labels=[x,y]")
    run = sidetune.fit(table, out=tmp_path / "run", recipe=recipe, store=tmp_path / "s", quiet=True)
    names = {row["label"].partition(" ")[0] for row in findings_of(run)["mistakes"]["rows"]}
    assert "x" in names
