import json

import pytest
import torch

from fitted_runs import read_csv, snapshot, toy_recipe
from sidetune import Run, build_backbone
from sidetune.data import load_dataset
from sidetune.errors import ArtifactError, RequestError
from sidetune.files import write_json
from sidetune.runs import begin_run, default_store, environment, find_run, write_skipped


def asked(folder):
    """What a folder's run was asked for, as `find_run` takes it."""
    found = json.loads((folder / "recipe.json").read_text())
    return Run.open(folder).artifact().recipe, found["data"], found["backbone"]


def test_open_reads_what_fit_returned(runs):
    run = runs()
    opened = Run.open(run.folder)
    assert opened == run
    assert opened.row == opened.metrics["rows"][-1]
    assert opened.recipe_hash == toy_recipe("losa", "features.dtype=fp16").hash
    assert opened.artifact().recipe.train.epochs == 2


@pytest.mark.parametrize("text", ["{", "[]", "\xff", None])
@pytest.mark.parametrize("name", ["metrics.json", "recipe.json"])
def test_a_damaged_run_is_refused(runs, tmp_path, name, text):
    folder = runs.copy(tmp_path / "run")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError) as error:
        Run.open(folder)
    assert str(error.value).startswith(f"{folder / name} is damaged: ")
    assert str(error.value).endswith("Type: the fit command with a new --out")


def test_what_is_not_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError) as error:
        Run.open(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is not a finished run: it has no artifact.json. "
        f"Type: sidetune fit DATA --out {tmp_path}, or the path of a finished run"
    )


def test_find_run_writes_nothing_and_begin_run_claims(tmp_path):
    folder, recipe = tmp_path / "run", toy_recipe()
    assert find_run(folder, recipe, "d", "b") is None
    assert not folder.exists()
    folder.mkdir()
    assert not begin_run(folder, recipe, "d", "b")
    claim = json.loads((folder / "recipe.json").read_text())
    assert claim == {
        "recipe": recipe.model_dump(mode="json"),
        "hash": recipe.hash,
        "data": "d",
        "backbone": "b",
    }
    before = snapshot(folder)
    assert find_run(folder, recipe, "d", "b") is None
    assert snapshot(folder) == before
    assert not begin_run(folder, toy_recipe("last"), "d", "b"), "nothing was computed: it is free"
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["side"]["name"] == "last"


def test_a_checkpoint_keeps_a_folder_for_its_recipe(tmp_path):
    begin_run(tmp_path, toy_recipe(), "d", "b")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    assert not begin_run(tmp_path, toy_recipe(), "d", "b")
    with pytest.raises(ArtifactError) as error:
        begin_run(tmp_path, toy_recipe("losa", "side.rank=2"), "e", "c")
    assert str(error.value) == (
        f"{tmp_path} holds another run: side.rank is 8 there and 2 here; its data are others (images, labels "
        "or splits); its backbone is another (weights, architecture or preprocessing). "
        "Type: --out with a new folder"
    )


def test_where_the_weights_are_and_the_form_are_no_difference(runs):
    folder = runs().folder
    recipe, data, backbone = asked(folder)
    others = {
        "backbone": recipe.backbone.model_copy(update={"weights": "a.pth"}),
        "side": recipe.side.model_copy(update={"form": "textbook"}),
    }
    moved = recipe.model_copy(update=others)
    assert find_run(folder, moved, data, backbone) == runs()
    with pytest.raises(ArtifactError, match=r"another run: train\.lr is 0\.001 there and 0\.1 here\. Type"):
        lr = moved.model_copy(update={"train": moved.train.model_copy(update={"lr": 0.1})})
        find_run(folder, lr, data, backbone)


def test_a_folder_of_something_else_is_not_taken(tmp_path):
    for name in "abcd":
        (tmp_path / name).touch()
    with pytest.raises(RequestError) as error:
        begin_run(tmp_path, toy_recipe(), "d", "b")
    assert str(error.value) == (
        f"{tmp_path} holds no run but a, b, c ..; expected an empty or a new folder. "
        "Type: --out with a new folder"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_hidden_files_do_not_fill_a_folder(tmp_path):
    (tmp_path / ".lock").touch()
    assert find_run(tmp_path, toy_recipe(), "d", "b") is None


def test_skipped_images_are_written_by_path(image_folder, tmp_path):
    dataset = load_dataset(image_folder)
    write_skipped(tmp_path, dataset, {2: 'a "bad" one, so', 0: "empty"})
    assert read_csv(tmp_path / "skipped.csv") == [
        {"path": dataset.paths[0].as_posix(), "reason": "empty"},
        {"path": dataset.paths[2].as_posix(), "reason": 'a "bad" one, so'},
    ]
    write_skipped(tmp_path, dataset, {})
    assert (tmp_path / "skipped.csv").read_text() == "path,reason\n"


def test_the_default_store_is_one_a_backbone_and_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDETUNE_STORES", str(tmp_path))
    toy, other, half = (
        build_backbone("toy", **arguments) for arguments in ({}, {"seed": 1}, {"precision": "bf16"})
    )
    name = toy.identity.digest[:16]
    assert default_store(toy, "fp16") == tmp_path / f"{name}-fp32-fp16"
    assert default_store(toy, "fp32") == tmp_path / f"{name}-fp32-fp32"
    assert default_store(half, "fp16") == tmp_path / f"{name}-bf16-fp16"
    assert default_store(other, "fp16").name[:16] == other.identity.digest[:16] != name


def test_environment_is_plain_json(tmp_path):
    found = environment(torch.device("cpu"))
    write_json(tmp_path / "environment.json", found)
    assert found["threads"] == torch.get_num_threads()
    assert found["device"].endswith("CPU cores")
    assert {"sidetune", "python", "torch", "platform"} <= found.keys()
