import csv
import importlib
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sidetune.methods
import sidetune.side_fit
import sidetune.train
from fitted_runs import EPOCHS, conv_net, read_csv, snapshot, toy_recipe, wrapped_conv_net
from images import make_csv
from sidetune import SIDES, build_backbone, fit, load, wrap
from sidetune.backbones.base import weights_digest
from sidetune.backbones.toy import ToyBackbone
from sidetune.bucket import Bucket
from sidetune.data.preprocess import Preprocess
from sidetune.errors import ArtifactError, DataError, RequestError, SideError
from sidetune.rescore import evaluate_run
from sidetune.sides import SOLVED
from sidetune.sources import LiveSource
from sidetune.store import Store

MODULE = importlib.import_module("sidetune.fit")  # `sidetune.fit` is the function
OPENING = importlib.import_module("sidetune.opening")


def documented_files():
    """The files that the docstring's table lists for a finished run."""
    table = re.findall(r"^    RUN/(.*?)  ", MODULE.__doc__, re.MULTILINE)
    return {name for line in table for name in line.split(", ")}


@pytest.mark.parametrize("side", sorted(SIDES))
def test_a_run_has_the_documented_files_rows_and_costs(runs, side):
    run = runs(side)
    visible = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")}
    assert visible == documented_files() == {
        "recipe.json", "metrics.json", "history.jsonl", "side.safetensors", "artifact.json",
        "predictions.csv", "skipped.csv", "findings.json", "report.html",
    }  # fmt: skip
    opponents = [name for name in ("ridge-last", "ridge", "linear") if name != side]
    assert [row["method"] for row in run.metrics["rows"]] == [*opponents, side]
    assert run.row["method"] == run.metrics["side"] == side
    assert run.metrics["data"] == {
        "name": run.metrics["data"]["name"], "num_train": 36, "num_val": 12, "num_test": 12,
        "num_skipped": 0, "num_animated": 0,
    }  # fmt: skip
    assert (run.folder / "history.jsonl").read_text().count("\n") == (0 if side in SOLVED else EPOCHS)
    seconds = run.metrics["cost"]["seconds"]
    own = ["ridge-last", "ridge", "linear"] if side in SOLVED else ["ridge-last", "ridge", "linear", "train"]
    assert set(seconds) == {"features", *own, "evaluate", "findings"}
    assert all(value >= 0 for value in seconds.values())
    assert run.metrics["cost"]["store_bytes"] > 100_000
    assert run.metrics["cost"]["peak_memory_bytes"] > 10**7


@pytest.mark.parametrize("side", sorted(SIDES))
def test_the_parameters_are_those_of_the_side_and_of_the_head(runs, side):
    run = runs(side)
    model = run.artifact().model
    assert run.metrics["cost"]["parameters"] == run.row["parameters"] == model.side.num_parameters()
    assert run.metrics["cost"]["head_parameters"] == (model.side.width + 1) * 3


@pytest.mark.parametrize(
    ("side", "dtype", "tolerance"),
    [*((side, "fp16", 1e-4) for side in sorted(SIDES)), ("losa", "fp32", 1e-5), ("ridge", "fp32", 1e-5)],
)
def test_a_loaded_run_predicts_what_predictions_csv_says(runs, image_folder, side, dtype, tolerance):
    run = runs(side, dtype=dtype)
    table = read_csv(run.folder / "predictions.csv")
    assert [row["split"] for row in table] == ["val"] * 12 + ["test"] * 12
    predictions = load(run.folder).predict([image_folder / row["path"] for row in table])
    for row, prediction in zip(table, predictions, strict=True):
        assert row["label"] == row["path"].split("/")[0]
        written = {name: float(row[f"p_{name}"]) for name in prediction.values}
        assert written == pytest.approx(prediction.values, abs=tolerance)
        assert row["predicted"] == max(written, key=written.get)


@pytest.mark.parametrize("side", sorted(SIDES))
def test_evaluating_the_run_on_its_own_data_gives_its_test_scores(runs, image_folder, side):
    run = runs(side)
    found = evaluate_run(run.folder, image_folder)
    assert (found.split, found.skipped) == ("test", {})
    assert found.evaluation.scores == pytest.approx(run.row["test"]["scores"], abs=1e-3)
    assert found.evaluation.num_samples == run.row["test"]["num_samples"] == 12


@pytest.mark.parametrize("side", ["losa", "ridge"])
def test_stored_features_train_what_live_ones_do(runs, image_folder, side):
    stored, live = runs(side), runs(side, mode="live")
    ours, theirs = (load_file(run.folder / "side.safetensors") for run in (stored, live))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4)
    table, other = (read_csv(run.folder / "predictions.csv") for run in (stored, live))
    for row, twin in zip(table, other, strict=True):
        assert (row["path"], row["predicted"]) == (twin["path"], twin["predicted"])
        for name in ("p_class0", "p_class1", "p_class2"):
            assert float(row[name]) == pytest.approx(float(twin[name]), abs=1e-4)
    assert live.metrics["cost"]["store_bytes"] is None


def test_no_gradient_and_no_graph_enters_the_backbone(image_folder, tmp_path, monkeypatch):
    backbone = build_backbone("toy")
    parameters = list(backbone.module.parameters())
    before = weights_digest(backbone.module)
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    leaves, saved, runs_of_backbone = set(), [], []

    def keep_leaves(loss):
        """Every leaf that the loss's gradient would reach."""
        seen, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.add(node.variable)
            todo += [following for following, _ in node.next_functions]

    def loss_of(bucket, *arguments):
        losses, counts = loss(bucket, *arguments)
        keep_leaves(losses.sum())
        assert leaves <= {parameter for parameter in bucket.model.parameters() if parameter.requires_grad}
        return losses, counts

    def features(source, rows, spec=None, views=0):
        found = read(source, rows, spec, views)
        assert all(not layer.requires_grad and layer.grad_fn is None for layer in found.layers)
        assert not any(layer.is_inference() for layer in found.layers), "they must be fit to be saved"
        return found

    def pack(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    loss, read = Bucket._loss, LiveSource.features
    monkeypatch.setattr(Bucket, "_loss", loss_of)
    monkeypatch.setattr(LiveSource, "features", features)
    backbone.module.blocks[0].register_forward_hook(
        lambda *_: runs_of_backbone.append(torch.is_grad_enabled())
    )
    recipe = toy_recipe("last", "features.mode=live")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fit(image_folder, out=tmp_path / "run", recipe=recipe, backbone=backbone, quiet=True)

    assert leaves, "the side was trained"
    assert len(saved) > 100, "the side's own backward saves tensors"
    assert not storages.intersection(saved)
    assert runs_of_backbone, "the backbone ran"
    assert not any(runs_of_backbone)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)
    assert weights_digest(backbone.module) == before


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_weights_and_buffers_of_the_backbone_stay_the_same_bytes(image_folder, tmp_path, mode):
    net = conv_net()
    theirs = weights_digest(net)
    backbone = wrap(net, {"block.1": "0", "block.2": "1"}, preprocess=Preprocess(size=32))
    ours = weights_digest(backbone.module)
    assert any(name.endswith("running_mean") for name, _ in backbone.module.named_buffers())
    recipe = toy_recipe("attentive", "backbone.name=demo", f"features.mode={mode}")
    fit(image_folder, out=tmp_path / "r", recipe=recipe, backbone=backbone, store=stored_in(tmp_path, mode))
    assert weights_digest(backbone.module) == ours == theirs == weights_digest(net)
    assert not backbone.module.training
    assert net.training, "the caller's module is left as it was"


def stored_in(folder, mode):
    return None if mode == "live" else folder / "store"


def test_a_finished_run_is_found_and_nothing_is_computed_or_written(runs, image_folder, monkeypatch):
    run = runs()
    before = snapshot(run.folder)
    for name in ("open_jobs", "locked", "fit_methods"):
        monkeypatch.setattr(MODULE, name, lambda *_, **__: pytest.fail("it was computed again"))
    again = fit(image_folder, out=run.folder, recipe=run.artifact().recipe, quiet=True)
    assert again == run
    assert snapshot(run.folder) == before


@pytest.mark.parametrize(
    ("recipe", "differing"),
    [
        (toy_recipe("losa", "train.epochs=3"), "train.epochs is 2 there and 3 here"),
        (toy_recipe("last"), 'side.name is "losa" there and "last" here'),
        (toy_recipe("losa", "side.rank=4"), "side.rank is 8 there and 4 here"),
        (
            toy_recipe("losa", "backbone.size=40"),
            "backbone.size is null there and 40 here; its backbone is another "
            "(weights, architecture or preprocessing)",
        ),
    ],
)
def test_another_recipe_in_the_folder_of_a_run_is_refused(runs, image_folder, recipe, differing):
    folder = runs().folder
    before = snapshot(folder)
    with pytest.raises(ArtifactError) as error:
        fit(image_folder, out=folder, recipe=recipe, quiet=True)
    assert str(error.value) == f"{folder} holds another run: {differing}. Type: --out with a new folder"
    assert snapshot(folder) == before


def test_other_data_in_the_folder_of_a_run_are_refused(runs, image_folder, tmp_path):
    folder = runs().folder
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "class0" / "0000.png").unlink()
    with pytest.raises(ArtifactError, match=r"holds another run: its data are others \(images, labels or"):
        fit(tmp_path / "images", out=folder, recipe=toy_recipe(), quiet=True)


def test_an_interrupted_run_resumes_to_the_same_bytes(runs, image_folder, tmp_path, monkeypatch):
    whole, store = runs(), runs.root / "store-fp16"
    steps = []

    def interrupted_step(*arguments, **more):
        steps.append(len(steps))
        if len(steps) == 3:  # the first step of the second epoch
            raise KeyboardInterrupt
        return step(*arguments, **more)

    step = Bucket.step
    with monkeypatch.context() as patch:
        patch.setattr(sidetune.train, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(Bucket, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            fit(image_folder, out=tmp_path / "run", recipe=toy_recipe(), store=store, quiet=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"recipe.json", "checkpoint.safetensors"}
    with pytest.raises(ArtifactError, match=r"train\.epochs is 2 there and 3 here"):
        fit(image_folder, out=tmp_path / "run", recipe=toy_recipe("losa", "train.epochs=3"), store=store)
    resumed = fit(image_folder, out=tmp_path / "run", recipe=toy_recipe(), store=store, quiet=True)
    ours, theirs = ((run.folder / "side.safetensors").read_bytes() for run in (resumed, whole))
    assert ours == theirs
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_folder_without_a_checkpoint_is_free_for_another_recipe(runs, image_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(OPENING, "extract", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(image_folder, out=tmp_path / "run", recipe=toy_recipe("last"), quiet=True)
    assert [path.name for path in (tmp_path / "run").glob("[!.]*")] == ["recipe.json"]
    store = runs.root / "store-fp16"
    assert (
        fit(image_folder, out=tmp_path / "run", recipe=toy_recipe(), store=store, quiet=True).row["method"]
        == "losa"
    )


@pytest.mark.parametrize(("task", "labels"), [("multilabel", ["coloured", "right"]), ("regress", ["x", "y"])])
def test_tables_of_several_outputs(tmp_path, task, labels):
    table = make_csv(tmp_path / "data", task, 48)
    recipe = toy_recipe("losa", f"data.task={task}", f"data.labels=[{','.join(labels)}]")
    run = fit(table, out=tmp_path / "run", recipe=recipe, store=tmp_path / "store", quiet=True)
    assert (run.metrics["task"], run.metrics["outputs"]) == (task, labels)
    assert run.metrics["headline"] == {"multilabel": "auroc", "regress": "r2"}[task]
    rows = read_csv(run.folder / "predictions.csv")
    assert list(rows[0]) == ["path", "split", *(f"label_{n}" for n in labels), *(f"p_{n}" for n in labels)]
    predictions = load(run.folder).predict([table.parent / row["path"] for row in rows])
    assert all(prediction.label is None for prediction in predictions)
    for row, prediction in zip(rows, predictions, strict=True):
        assert [float(row[f"p_{name}"]) for name in labels] == pytest.approx(
            list(prediction.values.values()), abs=2e-4
        )
    found = evaluate_run(run.folder, table)
    assert found.evaluation.scores == pytest.approx(run.row["test"]["scores"], abs=2e-3)


def test_class_weights_smoothing_and_focus_reach_the_task(tmp_path):
    table = make_csv(tmp_path / "data", "classify", 40)
    rare = table.read_text().splitlines()
    kept = [line for i, line in enumerate(rare) if not line.endswith("class2") or i % 2]
    table.write_text("\n".join(kept) + "\n")
    recipe = toy_recipe(
        "ridge", "data.class_weights=balanced", "data.label_smoothing=0.1", "data.focal_gamma=2"
    )
    task = (
        fit(table, out=tmp_path / "run", recipe=recipe, store=tmp_path / "store", quiet=True).artifact().task
    )
    assert (task.label_smoothing, task.focal_gamma) == (0.1, 2.0)
    assert task.class_weights[2] > 1.2 * task.class_weights[0]
    assert np.dot(task.class_weights, task.shares) == pytest.approx(1)


def write_rows(table, rows):
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_table_without_a_test_split_reports_validation(tmp_path, capsys):
    table = make_csv(tmp_path / "data", "classify", 30)
    rows = read_csv(table)
    write_rows(table, [{**row, "split": "val" if i % 5 == 0 else "train"} for i, row in enumerate(rows)])
    run = fit(table, out=tmp_path / "run", recipe=toy_recipe(), store=tmp_path / "store")
    assert run.metrics["data"]["num_test"] == 0
    assert [row["test"] for row in run.metrics["rows"]] == [None] * 4
    assert {row["split"] for row in read_csv(run.folder / "predictions.csv")} == {"val"}
    assert run.artifact().scores["test"] is None
    page = (run.folder / "report.html").read_text()
    assert "Validation" in page
    assert ", test" not in capsys.readouterr().err
    with pytest.raises(DataError, match=r"the split 'test' of .* is empty. Type: --split train or val, or"):
        evaluate_run(run.folder, table)
    assert evaluate_run(run.folder, table, split="val").evaluation.num_samples == 6


def test_groups_reach_ridge(tmp_path, monkeypatch):
    table = make_csv(tmp_path / "data", "classify", 36)
    rows = read_csv(table)
    write_rows(table, [{**row, "group": f"g{i // 3}"} for i, row in enumerate(rows)])
    seen = []

    def keep(recipe, pooled, task):
        seen.append(pooled)
        return solve(recipe, pooled, task)

    solve = sidetune.methods.fit_ridge
    monkeypatch.setattr(sidetune.methods, "fit_ridge", keep)
    fit(table, out=tmp_path / "run", recipe=toy_recipe("ridge"), store=tmp_path / "store", quiet=True)
    assert [name for pooled in seen for name in pooled.groups] == [f"g{i // 3}" for i in range(36)] * 2
    train, val = (set(seen[0].groups[part]) for part in (seen[0].train, seen[0].val))
    assert not train & val


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_images_that_cannot_be_read_are_listed_and_the_others_train(image_folder, tmp_path, mode, capsys):
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "class0" / "0000.png").write_text("no image")
    (images / "class1" / "0001.png").write_bytes(b"")
    whole = (images / "class2" / "0002.png").read_bytes()
    (images / "class2" / "0002.png").write_bytes(whole[:200])
    recipe = toy_recipe("ridge", f"features.mode={mode}")
    run = fit(images, out=tmp_path / "run", recipe=recipe, store=stored_in(tmp_path, mode))
    assert read_csv(run.folder / "skipped.csv") == [
        {"path": "class0/0000.png", "reason": "not an image that Pillow reads"},
        {"path": "class1/0001.png", "reason": "the file is empty"},
        {"path": "class2/0002.png", "reason": "damaged or cut short"},
    ]
    data = run.metrics["data"]
    assert data["num_skipped"] == 3
    assert data["num_train"] + data["num_val"] + data["num_test"] == 57
    assert f"3 images could not be read: {run.folder / 'skipped.csv'}" in capsys.readouterr().err
    assert not {"class0/0000.png", "class1/0001.png", "class2/0002.png"} & {
        row["path"] for row in read_csv(run.folder / "predictions.csv")
    }


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("*/*.png", "no train image can be read, expected at least one; of 60 images 60 cannot"),
        (
            "class1/*.png",
            "no train image of class 'class1' can be read, expected at least one; of 60 images 20",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["stored", "live"])
def test_nothing_to_learn_from_is_an_error(image_folder, tmp_path, damaged, message, mode):
    images = shutil.copytree(image_folder, tmp_path / "images")
    for file in images.glob(damaged):
        file.write_text("no image")
    recipe = toy_recipe("losa", f"features.mode={mode}")
    with pytest.raises(DataError) as error:
        fit(images, out=tmp_path / "run", recipe=recipe, store=stored_in(tmp_path, mode), quiet=True)
    assert str(error.value).startswith(message)
    assert "0.png: not an image that Pillow reads)" in str(error.value).replace("0001.png", "0000.png")
    assert str(error.value).endswith(f"Mend or remove those that {tmp_path / 'run' / 'skipped.csv'} lists")
    assert len(read_csv(tmp_path / "run" / "skipped.csv")) in (20, 60)


@pytest.mark.parametrize("side", ["attentive", "linear", "ridge"])
def test_a_users_own_network_works_end_to_end(image_folder, tmp_path, side):
    recipe = toy_recipe(side, "backbone.name=demo")  # the default: it was not chosen
    given = {"out": tmp_path / "run", "recipe": recipe, "store": tmp_path / "store", "quiet": True}
    run = fit(image_folder, backbone=wrapped_conv_net(), **given)
    assert run.metrics["backbone"] == "wrapped:Sequential"
    assert fit(image_folder, backbone=wrapped_conv_net(), **given) == run
    predictor = load(run.folder, backbone=wrapped_conv_net())
    rows = read_csv(run.folder / "predictions.csv")
    for row, found in zip(rows, predictor.predict([image_folder / row["path"] for row in rows]), strict=True):
        written = {name: float(row[f"p_{name}"]) for name in found.values}
        assert found.values == pytest.approx(written, abs=1e-3)
    found = evaluate_run(run.folder, image_folder, backbone=wrapped_conv_net())
    assert found.evaluation.scores == pytest.approx(run.row["test"]["scores"], abs=5e-3)


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_ridge_on_more_statistics_predicts_what_it_scored(image_folder, tmp_path, mode):
    recipe = toy_recipe("ridge", "side.statistics=cls+mean+std+quadrants", f"features.mode={mode}")
    run = fit(image_folder, out=tmp_path / "run", recipe=recipe, store=stored_in(tmp_path, mode), quiet=True)
    assert run.row["method"] == "ridge"
    rows = read_csv(run.folder / "predictions.csv")
    predicted = load(run.folder).predict([image_folder / row["path"] for row in rows])
    for row, found in zip(rows, predicted, strict=True):
        written = {name: float(row[f"p_{name}"]) for name in found.values}
        assert found.values == pytest.approx(written, abs=5e-3)


def test_a_backbone_given_as_an_object_is_asked_for_again(image_folder, tmp_path):
    recipe = toy_recipe("ridge", "backbone.name=demo")
    run = fit(
        image_folder, out=tmp_path / "r", recipe=recipe, backbone=wrapped_conv_net(), store=tmp_path / "s"
    )
    with pytest.raises(ArtifactError) as error:
        load(run.folder)
    assert str(error.value) == (
        "the run was trained on 'wrapped:Sequential', a backbone that was given as an object: no name builds "
        "it. Type, in Python: sidetune.load(RUN, backbone=...)"
    )
    with pytest.raises(ArtifactError, match=r"weights: .* here, .* there"):
        load(run.folder, backbone=wrapped_conv_net(seed=1))


@pytest.mark.parametrize("side", ["losa", "last"])
def test_a_side_that_cannot_read_the_taps_is_refused_before_anything_is_done(image_folder, tmp_path, side):
    with pytest.raises(SideError) as error:
        fit(image_folder, out=tmp_path / "run", recipe=toy_recipe(side), backbone=wrapped_conv_net())
    assert "block.1 64x8, block.2 16x12" in str(error.value)
    assert "Type: --side ridge" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_requests_that_are_refused_before_anything_is_done(image_folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    live = toy_recipe("losa", "features.mode=live")
    wrong = [
        ({"out": file}, f"{file} is a file, expected a run folder. Type: --out with a new folder"),
        ({"out": tmp_path / "full"}, "holds no run but thesis.tex; expected an empty or a new folder"),
        ({"store": file}, f"{file} is a file, expected a store's folder. Type: --store with a new folder"),
        ({"store": tmp_path / "s", "recipe": live}, "and --live, which stores nothing. Type one of the two"),
        ({"device": "gpu"}, "no device named 'gpu'. Did you mean 'cuda'? Known: auto, cpu, cuda"),
        ({"device": "cuda:99"}, "got device 'cuda:99', and PyTorch finds"),
    ]
    for arguments, message in wrong:
        with pytest.raises(RequestError) as error:
            fit(image_folder, **{"out": tmp_path / "run", "recipe": toy_recipe(), "quiet": True, **arguments})
        assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.tex"]


def test_progress_says_what_is_done_and_quiet_says_nothing(runs, image_folder, tmp_path, capsys):
    store = runs.root / "store-fp16"
    runs("ridge")
    fit(image_folder, out=tmp_path / "a", recipe=toy_recipe(), store=store, quiet=True)
    assert capsys.readouterr() == ("", "")
    fit(image_folder, out=tmp_path / "b", recipe=toy_recipe(), store=store)
    out, err = capsys.readouterr()
    assert out == ""
    said = [re.sub(r"\d+(\.\d+)?", "0", line) for line in err.splitlines()]
    assert said == [
        re.sub(r"\d+(\.\d+)?", "0", f"features in {store} (fp16)"),
        *(
            f"{name}: Balanced accuracy, val 0 %, test 0 % (0 s)"
            for name in ("ridge-last", "ridge", "linear")
        ),
        "training losa, fast form: 0,0 parameters, 0 images, 0 epochs",
        "losa: Balanced accuracy, val 0 %, test 0 % (0 s)",
    ]


def test_a_backbone_object_beside_a_recipe_that_names_it_keeps_the_name(image_folder, tmp_path):
    recipe = toy_recipe("ridge", "backbone.size=40")
    run = fit(
        image_folder, out=tmp_path / "run", recipe=recipe, backbone=ToyBackbone(40), store=tmp_path / "s"
    )
    assert load(run.folder).backbone.preprocess.size == 40


def test_a_class_that_train_lacks_is_no_unreadable_image(image_folder, tmp_path):
    """VTAB's lists as published may lack a class in train800: fitted all the same."""
    root = tmp_path / "task"
    (root / "images").mkdir(parents=True)
    lines = []
    for path in sorted(image_folder.glob("*/*.png")):
        name = f"images/{path.name}"
        (root / name).write_bytes(path.read_bytes())
        lines.append((name, int(path.parent.name[-1])))
    parts = {
        "train800": [line for line in lines[:40] if line[1] < 2],
        "val200": lines[40:50],
        "test": lines[50:],
    }
    parts["train800val200"] = parts["train800"] + parts["val200"]
    for name, rows in parts.items():
        (root / f"{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
    run = fit(root, out=tmp_path / "run", recipe=toy_recipe("ridge"), store=tmp_path / "store", quiet=True)
    assert run.metrics["data"]["num_train"] == len(parts["train800"])
    assert len(run.metrics["outputs"]) == 3


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_strict_makes_an_unreadable_image_an_error_and_loses_nothing(image_folder, tmp_path, mode):
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "class1" / "0001.png").write_bytes(b"")
    (images / "class0" / "0000.png").write_text("no image")
    recipe = toy_recipe("ridge", f"features.mode={mode}")
    arguments = {"out": tmp_path / "run", "recipe": recipe, "store": stored_in(tmp_path, mode), "quiet": True}
    with pytest.raises(DataError) as error:
        fit(images, **arguments, strict=True)
    assert str(error.value) == (
        "2 images cannot be read, the first class0/0000.png: not an image that Pillow reads "
        f"({tmp_path / 'run' / 'skipped.csv'} lists all); --strict expects none. Mend or remove them, or "
        "type the same command without --strict, which leaves them out"
    )
    assert [row["reason"] for row in read_csv(tmp_path / "run" / "skipped.csv")] == [
        "not an image that Pillow reads",
        "the file is empty",
    ]
    if mode == "stored":
        assert Store.open(tmp_path / "store").num_records == 60
    assert fit(images, **arguments).metrics["data"]["num_skipped"] == 2, "without it the same command goes on"
    with pytest.raises(DataError, match="2 images cannot be read, the first class0"):
        fit(images, **arguments, strict=True)  # a finished run has left them out too
    for name in ("class0/0000.png", "class1/0001.png"):
        shutil.copy(image_folder / name, images / name)
    assert (
        fit(images, **{**arguments, "out": tmp_path / "again"}, strict=True).metrics["data"]["num_skipped"]
        == 0
    )


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_animations_and_files_that_are_left_out_are_said(image_folder, tmp_path, mode, capsys):
    images = shutil.copytree(image_folder, tmp_path / "images")
    for name in ("class0/a.gif", "class1/b.tif"):
        frames = [Image.open(images / "class0" / f"000{k}.png").copy() for k in (0, 3)]
        frames[0].save(images / name, save_all=True, append_images=frames[1:])
    (images / "class2" / "notes.heic").write_text("not read by its ending")
    recipe = toy_recipe("ridge", f"features.mode={mode}")
    said = "2 images are animations or have several pages; the first of each is used: class0/a.gif, class1/"
    for out in ("run", "again"):  # the second reads the store, and says it too
        run = fit(images, out=tmp_path / out, recipe=recipe, store=stored_in(tmp_path, mode))
        err = capsys.readouterr().err
        assert said in err
        left_out = "1 other file beside the images has no image's ending and is left out; photographs in HEIC"
        assert f"{left_out} have to be made JPEG first\n" in err
        assert run.metrics["data"]["num_animated"] == 2
        assert run.metrics["data"]["num_skipped"] == 0


@pytest.mark.parametrize(("out", "store"), [("run", "run"), ("run", "run/store"), ("link", "run/../run")])
def test_a_store_within_a_run_folder_is_refused(image_folder, tmp_path, monkeypatch, out, store):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RequestError) as caught:
        fit(image_folder, out=tmp_path / out, recipe=toy_recipe("ridge"), store=tmp_path / store)
    said = (
        "features would be kept in {} and the run in {}; expected a store outside the run's folder, because "
        "other runs read it, too. Type: --store or --out with another folder"
    )
    assert str(caught.value) == said.format(tmp_path / store, tmp_path / out)
    monkeypatch.setenv("SIDETUNE_STORES", str(tmp_path / "run/stores"))
    with pytest.raises(
        RequestError, match=r"features would be kept in .*run/stores/.* and the run in .*run; "
    ):
        fit(image_folder, out=tmp_path / "run", recipe=toy_recipe("ridge"))
    assert not (tmp_path / "run").exists()


def test_a_flipped_byte_of_a_store_is_mended_before_anything_is_computed_from_it(
    image_folder, tmp_path, capsys
):
    runs = {}
    for name in ("whole", "spoilt"):
        recipe = toy_recipe("losa")
        runs[name] = fit(image_folder, out=tmp_path / name, recipe=recipe, store=tmp_path / "store")
        (shard,) = (tmp_path / "store/shards").glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        whole, data[len(data) // 2] = bytes(data), data[len(data) // 2] ^ 1
        shard.write_bytes(data)
        capsys.readouterr()
    fit(image_folder, out=tmp_path / "third", recipe=toy_recipe("losa"), store=tmp_path / "store")
    said = capsys.readouterr().err
    assert f"shard {shard} is damaged or another: the sha256 of its " in said
    assert "; it is written anew" in said
    assert shard.read_bytes() == whole
    weights = [(tmp_path / name / "side.safetensors").read_bytes() for name in ("whole", "spoilt", "third")]
    assert weights[0] == weights[1] == weights[2]


def test_a_store_larger_than_memory_is_shuffled_by_windows_and_the_run_says_so(
    image_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.import_module("sidetune.extract"), "SHARD_RECORDS", 10)  # six shards
    shard = 10 * 5 * 17 * 32 * 2  # bytes of five taps
    arguments = {"store": tmp_path / "s", "leak_check": False}
    runs, scores = {}, {}
    for name, memory, settings in (
        ("enough", 12 * shard, ()),
        ("little", 8 * shard, ()),
        ("chosen", 12 * shard, ("train.shuffle_window=2",)),
    ):
        monkeypatch.setattr(sidetune.side_fit, "total_memory", lambda memory=memory: memory)
        recipe = toy_recipe("losa", *settings)
        runs[name] = fit(image_folder, out=tmp_path / name, recipe=recipe, **arguments)
        printed = capsys.readouterr().err
        said = "shuffling 2 of 6 shards at a time" in printed
        assert said == (name != "enough")
        assert "in the order of their paths" not in printed
        window = runs[name].metrics["rows"][-1]["detail"].get("shuffle_window")
        assert window == load(runs[name].folder).artifact.recipe.train.shuffle_window == (2 if said else None)
        scores[name] = load_file(runs[name].folder / "side.safetensors")
    assert all(torch.equal(scores["little"][key], scores["chosen"][key]) for key in scores["little"])
    assert not all(torch.equal(scores["little"][key], scores["enough"][key]) for key in scores["little"])


def test_a_window_on_a_store_in_the_order_of_paths_is_warned_of(image_folder, tmp_path, monkeypatch, capsys):
    extracting = importlib.import_module("sidetune.extract")
    monkeypatch.setattr(extracting, "SHARD_RECORDS", 10)
    monkeypatch.setattr(extracting, "place_by_hash", lambda key: key)  # as it was once
    recipe = toy_recipe("losa", "train.shuffle_window=2")
    fit(image_folder, out=tmp_path / "run", recipe=recipe, store=tmp_path / "s", leak_check=False)
    assert "the store holds samples in the order of their paths" in capsys.readouterr().err
