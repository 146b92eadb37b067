"""Views from the store to the answer: extract, train, average, predict."""

import numpy as np
import pytest
import torch

import sidetune
from fitted_runs import toy_recipe
from sidetune import load_dataset
from sidetune.backbones import build_backbone
from sidetune.data.preprocess import open_image
from sidetune.data.reading import Reading
from sidetune.data.views import View, views
from sidetune.errors import RequestError, SidetuneError
from sidetune.extract import extract, sample_keys
from sidetune.keyed import Draws
from sidetune.rescore import evaluate_run
from sidetune.sources import LiveSource, StoredSource


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """Fitted on three more views of each image, which also average its scores."""
    root = tmp_path_factory.mktemp("views")
    recipe = toy_recipe("losa", "features.views=3", "features.average_views=true")
    return sidetune.fit(image_folder, out=root / "run", recipe=recipe, store=root / "store", quiet=True)


def test_stored_views_are_the_live_ones(pictures, tmp_path):
    dataset, backbone, chosen = load_dataset(pictures), build_backbone("toy"), views(3)
    keys = sample_keys(dataset)
    store = extract(dataset, backbone, tmp_path / "s", dtype="fp32", views=chosen, quiet=True)
    assert store.num_records == 4 * len(dataset)
    stored = StoredSource(store, keys, reading=Reading.of_images(chosen))
    live = LiveSource(dataset, backbone, keys=keys, reading=Reading.of_images(chosen), quiet=True)
    rows, which = [3, 0, 7, 7], [0, 1, 2, 3]
    for source in (stored, live):
        mixed = source.features(rows, views=which)["block.4"]
        for at, (row, view) in enumerate(zip(rows, which, strict=True)):
            alone = source.features([row], views=view)["block.4"][0]
            assert torch.allclose(mixed[at], alone, rtol=0, atol=1e-5)
    assert torch.allclose(
        stored.features(rows, views=which)["block.4"], live.features(rows, views=which)["block.4"], atol=1e-5
    )
    assert not torch.allclose(mixed[2], mixed[3], atol=1e-2), "two views of one image are two"
    for view in range(4):
        assert torch.allclose(stored.summary(view).mean[-1], live.summary(view).mean[-1], atol=1e-5)


def test_more_views_extend_a_store_and_fewer_read_it(pictures, tmp_path):
    dataset, backbone = load_dataset(pictures), build_backbone("toy")
    extract(dataset, backbone, tmp_path / "s", quiet=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s/shards").iterdir()}
    extract(dataset, backbone, tmp_path / "s", views=views(2), quiet=True)
    store = extract(dataset, backbone, tmp_path / "s", views=views(1), quiet=True)
    assert store.num_records == 3 * len(dataset)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_image_that_cannot_be_read_is_skipped_once(own, tmp_path):
    (own / "class0/0000.png").write_bytes(b"")
    dataset = load_dataset(own)
    store = extract(dataset, build_backbone("toy"), tmp_path / "s", views=views(2), quiet=True)
    source = StoredSource(store, sample_keys(dataset), reading=Reading.of_images(views(2)))
    assert source.skipped == {0: "the file is empty"}
    assert np.flatnonzero(~source.valid).tolist() == [0]


def test_a_view_is_drawn_anew_at_every_step_and_every_view_comes():
    first, second = (Draws([7, 8], 0, step).views(4, 400) for step in (0, 1))
    assert first != second and first == Draws([7, 9], 0, 0).views(4, 400)
    assert np.bincount(first, minlength=4).min() > 60


def test_training_reads_the_views_that_the_draws_name(image_folder, tmp_path, monkeypatch):
    asked = []
    read = StoredSource.features

    def features(source, rows, spec=None, views=0):
        asked.append(views)
        return read(source, rows, spec, views)

    monkeypatch.setattr(StoredSource, "features", features)
    recipe = toy_recipe("losa", "features.views=3")
    sidetune.fit(image_folder, out=tmp_path / "run", recipe=recipe, store=tmp_path / "store", quiet=True)
    drawn = [views for views in asked if views != 0]
    assert drawn[0] == Draws([0], 0, 0).views(4, len(drawn[0]))
    assert {view for views in drawn for view in views} == {0, 1, 2, 3}
    assert 0 in asked, "validation looks at the images themselves unless asked for more"


def test_answers_are_averages_of_outputs_over_the_views(run, image_folder):
    predictor = sidetune.load(run.folder)
    path = image_folder / "class1/0001.png"
    key = f"x@{sample_keys(load_dataset(image_folder))[20].rpartition('@')[2]}"
    assert predictor.reading == Reading.of_images(views(3), averaged=True)
    outputs = []
    with torch.inference_mode():
        for view in views(3):
            image = view(open_image(path), key.rpartition("@")[2])
            features = predictor.backbone(predictor.backbone.preprocess(image)[None])
            outputs.append(predictor.committee.outputs(features)[0, 0])
    expected = (torch.stack(outputs).mean(0) / predictor.artifact.temperature).softmax(0)
    found = predictor.predict([path])[0]
    assert found.path.endswith("0001.png")
    assert list(found.values.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    alone = sidetune.load(run.folder, num_views=0).predict([path])[0]
    assert alone.values != found.values


def test_tiles_of_an_image_are_trained_on_and_averaged(image_folder, tmp_path):
    recipe = toy_recipe("losa", "features.tiles=2", "features.views=1", "features.average_views=true")
    run = sidetune.fit(image_folder, out=tmp_path / "run", recipe=recipe, store=tmp_path / "s", quiet=True)
    predictor, path = sidetune.load(run.folder), image_folder / "class1/0001.png"
    names = ["", *(f"tile{number}of4" for number in range(1, 5)), "mirror"]
    assert [view.name for view in predictor.reading.stored] == names
    own = evaluate_run(run.folder, image_folder)
    assert own.evaluation.scores["log_loss"] == pytest.approx(run.row["test"]["scores"]["log_loss"], abs=2e-3)
    alone = sidetune.load(run.folder, num_views=0)
    assert [view.name for view in alone.reading.stored] == [""]
    assert alone.predict([path])[0].values != predictor.predict([path])[0].values
    assert [view.name for view in sidetune.load(run.folder, num_views=1).reading.stored] == names


def test_a_run_is_evaluated_as_it_was_scored(run, image_folder):
    own = evaluate_run(run.folder, image_folder)
    assert own.split == "test"
    assert own.evaluation.scores["log_loss"] == pytest.approx(run.row["test"]["scores"]["log_loss"], abs=2e-3)
    plain = evaluate_run(run.folder, image_folder, num_views=0)
    assert plain.evaluation.scores["log_loss"] != own.evaluation.scores["log_loss"]


def test_probes_are_averaged_too(run):
    assert all("temperature" in row["detail"] for row in run.metrics["rows"])
    assert [row["method"] for row in run.metrics["rows"]] == ["ridge-last", "ridge", "linear", "losa"]


def test_unreadable_files_among_views_are_named(run, image_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no")
    good = image_folder / "class0/0000.png"
    first, second, third = sidetune.load(run.folder).predict(
        [good, tmp_path / "bad.png", tmp_path / "none.png"]
    )
    assert first.error is None and first.values
    assert (second.error, third.error) == ("not an image that Pillow reads", "No such file or directory")


def test_fewer_than_no_views_are_refused(run):
    with pytest.raises(RequestError, match=r"^got --views -1, expected 0 or more\. Type: --views 4$"):
        sidetune.load(run.folder, num_views=-1)


def test_a_shard_with_views_is_mended_by_those_who_ask_for_none(pictures, tmp_path, small_shards):
    dataset, backbone = load_dataset(pictures), build_backbone("toy")
    extract(dataset, backbone, tmp_path / "s", views=views(2), quiet=True)
    shards = {path: path.read_bytes() for path in sorted((tmp_path / "s/shards").glob("*.safetensors"))}
    spoilt = next(iter(shards))
    spoilt.write_bytes(shards[spoilt][:-1] + bytes([shards[spoilt][-1] ^ 1]))
    extract(dataset, backbone, tmp_path / "s", quiet=True)
    assert {path: path.read_bytes() for path in shards} == shards


def test_names_of_views_are_read_back_and_others_are_none():
    for view in views(6) + views(3, flip=False) + views(1, tiles=8):
        assert View.parse(view.name) == view
    for name in ("crop0", "crop01", "mirror+crop1", "crop1mirror", "zoom", "+mirror", "tile5of4", "tile1of3"):
        assert View.parse(name) is None


def test_a_row_is_valid_only_if_all_its_views_are(pictures, tmp_path):
    dataset = load_dataset(pictures)
    store = extract(dataset, build_backbone("toy"), tmp_path / "s", views=views(1), quiet=True)
    keys = sample_keys(dataset)
    store.skipped[f"{keys[3]}#mirror"] = "needs more memory than there is"
    source = StoredSource(store, keys, reading=Reading.of_images(views(1)))
    assert source.skipped == {3: "needs more memory than there is"}
    assert np.flatnonzero(~source.valid).tolist() == [3]


def test_a_live_image_that_goes_away_is_an_error_and_no_black_image(own):
    dataset = load_dataset(own)
    source = LiveSource(dataset, build_backbone("toy"), quiet=True)
    dataset.file(5).unlink()
    with pytest.raises(SidetuneError) as error:
        source.features([4, 5])
    assert str(error.value) == (
        f"{dataset.file(5)}: No such file or directory; it could be read when the run began. Put it back, "
        "then type the same command: it resumes"
    )
