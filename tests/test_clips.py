"""Clips as samples, from files to answers."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import sidetune
from clips import make_clips, picture, write_video
from fitted_runs import read_csv
from sidetune.backbones import build_backbone
from sidetune.cli import app
from sidetune.data import load_dataset, pictures
from sidetune.data.clips import frames_at
from sidetune.data.reading import Reading
from sidetune.errors import DataError, RecipeError, RequestError
from sidetune.extract import extract, sample_keys
from sidetune.recipe import Recipe
from sidetune.sources import LiveSource, StoredSource
from sidetune.summary import summarise
from sidetune.upkeep import collect_garbage, wanted_keys

READING = Reading.of_clips(2, 4, drawn=3)
SETTINGS = ("clips.frames=2", "clips.stored=4", "train.epochs=4", "features.dtype=fp32")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    own = tmp_path_factory.mktemp("clip runs")
    recipe = Recipe.build({"backbone": {"name": "toy"}}, SETTINGS)
    return sidetune.fit(clips, out=own / "run", recipe=recipe, store=own / "store", quiet=True)


def test_features_of_a_clip_are_those_of_its_frames(clips, tmp_path):
    dataset, backbone = load_dataset(clips, clips=True), build_backbone("toy")
    keys = sample_keys(dataset)
    store = extract(
        dataset, backbone, tmp_path / "s", dtype="fp32", keys=keys, views=READING.stored, quiet=True
    )
    source = StoredSource(store, keys, reading=READING)
    live = LiveSource(dataset, backbone, keys=keys, reading=READING, quiet=True)
    rows, chosen = [3, 0, 17], [0, 2, 1]
    found = source.features(rows, views=chosen)
    assert found.spec == live.spec == backbone.spec.of_clips(2)
    for at, (row, view) in enumerate(zip(rows, chosen, strict=True)):
        instants = [READING.stored[number].instant for number in READING.views[view]]
        shown = torch.stack([backbone.preprocess(one) for one in frames_at(dataset.file(row), instants)])
        expected = backbone(shown).of_clips(2)
        for name in found.spec.names:
            torch.testing.assert_close(found[name][at], expected[name][0], rtol=1e-5, atol=1e-5)
    lived = live.features(rows, views=chosen)
    for name in found.spec.names:
        torch.testing.assert_close(lived[name], found[name], rtol=1e-5, atol=1e-5)
    whole = summarise(source.features(range(len(dataset)), views=1))
    for summary in (source.summary(1), live.summary(1)):
        assert summary.spec == whole.spec
        for one, other in zip(summary._columns(), whole._columns(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_clip_is_decoded_once_for_all_its_frames(clips, tmp_path, monkeypatch):
    opened, decode = [], pictures.frames_at
    monkeypatch.setattr(pictures, "frames_at", lambda file, at: opened.append(file) or decode(file, at))
    dataset = load_dataset(clips, clips=True)
    reading = Reading.of_clips(2, 6, drawn=0)  # 32 is no multiple of six
    store = extract(dataset, build_backbone("toy"), tmp_path / "s", views=reading.stored, quiet=True)
    assert sorted(opened) == sorted(dataset.file(row) for row in range(len(dataset)))
    assert store.num_records == 6 * len(dataset)


def test_a_run_answers_for_clips_as_it_was_tested(run, clips):
    predictor = sidetune.load(run.folder)
    assert predictor.clips and predictor.reading.views == READING.views[:1]
    tested = read_csv(run.folder / "predictions.csv")
    found = predictor.predict([clips / row["path"] for row in tested])
    for row, one in zip(tested, found, strict=True):
        assert one.error is None
        for name, value in one.values.items():
            assert float(row[f"p_{name}"]) == pytest.approx(value, abs=2e-3)


def test_three_squares_are_stored_and_averaged(clips, tmp_path):
    recipe = Recipe.build({"backbone": {"name": "toy"}}, [*SETTINGS, "clips.crops=3", "train.epochs=2"])
    run = sidetune.fit(clips, out=tmp_path / "run", recipe=recipe, store=tmp_path / "store", quiet=True)
    predictor = sidetune.load(run.folder)
    squares = [[predictor.reading.stored[at].square for at in view] for view in predictor.reading.views]
    assert squares == [[square] * 2 for square in ("middle", "first", "last")]
    assert sidetune.Store.open(tmp_path / "store").num_records == 12 * len(load_dataset(clips, clips=True))
    tested = read_csv(run.folder / "predictions.csv")
    for row, one in zip(tested, predictor.predict([clips / row["path"] for row in tested]), strict=True):
        for name, value in one.values.items():
            assert float(row[f"p_{name}"]) == pytest.approx(value, abs=2e-3)


def test_live_training_is_as_from_the_store(run, clips, tmp_path):
    recipe = Recipe.build({"backbone": {"name": "toy"}}, [*SETTINGS, "features.mode=live"])
    live = sidetune.fit(clips, out=tmp_path / "live", recipe=recipe, quiet=True)
    stored, lived = (read_csv(one.folder / "predictions.csv") for one in (run, live))
    for row, other in zip(stored, lived, strict=True):
        assert row["path"] == other["path"]
        assert float(row["p_left"]) == pytest.approx(float(other["p_left"]), abs=1e-3)


def test_the_commands_take_clips(clips, tmp_path):
    def typed(*words):
        found = CliRunner().invoke(app, [str(word) for word in words])
        assert found.exit_code == 0, found.output
        return found

    where = ["--backbone", "toy", "--frames", 2, "--frames-stored", 4, "--quiet"]
    typed("extract", clips, *where, "--out", tmp_path / "store")
    out = tmp_path / "run"
    typed("fit", clips, *where, "--set", "train.epochs=2", "--store", tmp_path / "store", "--out", out)
    said = typed("predict", out, clips / "left", "--json").stdout.splitlines()[-1]
    answers = json.loads(said)["predictions"]
    assert [one["path"] for one in answers] == [str(one) for one in sorted((clips / "left").iterdir())]
    typed("eval", out, clips, "--json")
    assert " clips of test" in typed("eval", out, clips).stdout
    findings = json.loads((out / "findings.json").read_text("utf-8"))
    shown = findings["suspects"]["rows"] + findings.get("mistakes", {}).get("rows", [])
    assert any(row["thumbnail"] for row in shown), "the picture in the middle of a clip"
    page = (out / "report.html").read_text("utf-8")
    body = re.sub(r"<[^>]+>|data:image/[^\"]+", " ", page.partition("<main")[2].partition("recipe-title")[0])
    assert "training clips" in body and not re.search(r"\bimages?\b", body, re.IGNORECASE)


def test_a_clip_that_cannot_be_decoded_is_left_out_and_named(tmp_path):
    root = make_clips(tmp_path / "clips")
    bad = root / "left/02.mp4"
    bad.write_bytes(bad.read_bytes()[:300])
    (root / "right/05/003.png").write_bytes(b"")
    recipe = Recipe.build({"backbone": {"name": "toy"}}, SETTINGS)
    for mode in ("stored", "live"):
        own = recipe.model_copy(update={"features": recipe.features.model_copy(update={"mode": mode})})
        store = tmp_path / "store" if mode == "stored" else None
        run = sidetune.fit(root, out=tmp_path / mode, recipe=own, store=store, quiet=True)
        skipped = (run.folder / "skipped.csv").read_text("utf-8")
        assert "left/02.mp4" in skipped and "003.png" in skipped, "what is drawn later, too"
        assert run.metrics["data"]["num_skipped"] == 2
    with pytest.raises(DataError, match=r"clips? cannot be read"):
        sidetune.fit(
            root, out=tmp_path / "strict", recipe=recipe, store=tmp_path / "s2", strict=True, quiet=True
        )
    found = sidetune.load(run.folder).predict([bad, root / "left/03.mkv"])
    assert "not a video that is read" in found[0].error and found[1].error is None


def test_extract_names_the_clips_that_it_left_out(tmp_path):
    root = make_clips(tmp_path / "clips")
    (root / "right/05/003.png").write_bytes(b"")
    words = ["extract", str(root), "--backbone", "toy", "--frames", "2", "--frames-stored", "4"]
    words += ["--out", str(tmp_path / "s"), "--quiet"]
    found = CliRunner().invoke(app, [*words, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["skipped"] == {"right/05": "003.png: the file is empty"}
    strict = CliRunner().invoke(app, [*words, "--strict"])
    assert strict.exit_code != 0 and "the first right/05: 003.png: the file is" in str(strict.exception)


def test_a_table_of_clips_with_folds(clips, tmp_path):
    files = sorted(path for path in clips.glob("*/*"))
    lines = [f"{file},{file.parent.name},{number % 3}" for number, file in enumerate(files)]
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(["path,label,fold", *lines]) + "\n")
    recipe = Recipe.build({"backbone": {"name": "toy"}}, [*SETTINGS, "fleet.folds=column"])
    run = sidetune.fit(table, out=tmp_path / "run", recipe=recipe, store=tmp_path / "store", quiet=True)
    assert len((run.folder / "members.csv").read_text("utf-8").splitlines()) > 3
    table.write_text("path,label\n" + f"{clips / 'left/01'},a\n{clips / 'left/01/000.png'},b\n")
    with pytest.raises(
        DataError, match=r"line 3: .*000.png' is no clip, expected a folder of frames alone or a file"
    ):
        load_dataset(table, clips=True)


def test_what_does_not_go_together_is_refused(run, clips, image_folder, tmp_path):
    with pytest.raises(
        DataError, match=r"class 'left' is empty: no image .* and \d+ clips. For clips type: --f"
    ):
        load_dataset(make_videos(tmp_path / "videos"))
    with pytest.raises(DataError, match=r"class 'class0' is empty: no clip .* For images leave --frames out"):
        load_dataset(image_folder, clips=True)
    for settings, said in {
        ("clips.frames=20",): "clips.frames is 20 and clips.stored 16, expected as many or more",
        ("clips.stored=8",): "clips.frames is not given. Type: --frames 8",
        ("clips.frames=0",): "clips.frames is 0, expected a whole number, 1 or more. Type: --frames 8",
        ("clips.frames=2", "features.views=2"): "features.views is 2 .* views are of images",
        ("clips.frames=2", "features.tiles=2"): "features.tiles is 2 .* views are of images",
        ("clips.frames=2", "features.average_views=true"): "features.average_views is true .* are of images",
        ("clips.frames=2", "clips.crops=2"): "clips.crops is 2, expected 1 or 3. Type: --set clips.crops=3",
    }.items():
        with pytest.raises(RecipeError, match=said):
            Recipe.build({}, settings)
    with pytest.raises(RequestError, match="the run is of clips: views are of images"):
        sidetune.load(run.folder, num_views=2)


def make_videos(root):
    for name in ("left", "right"):
        write_video(root / name / "a.mp4", [picture(0, 0, time) for time in range(3)])
    return root


def test_garbage_is_what_no_clip_needs(clips, tmp_path):
    store = tmp_path / "store"
    extract(load_dataset(clips, clips=True), build_backbone("toy"), store, views=READING.stored, quiet=True)
    assert collect_garbage(store, wanted=wanted_keys([clips], "classify", None)).samples == 0
    others = wanted_keys([make_videos(tmp_path / "videos")], "classify", None)
    with pytest.raises(RequestError, match="none of the 96 samples"):
        collect_garbage(store, wanted=others)
    with pytest.raises(DataError, match="nothing there"):
        wanted_keys([tmp_path / "none"], "classify", None)
