"""Video transformers: a clip at once, from files to answers."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import sidetune
from clips import make_clips
from fitted_runs import read_csv
from sidetune.backbones import build_backbone
from sidetune.backbones.video_models import FAMILIES
from sidetune.bench.setting import require_images
from sidetune.data import load_dataset
from sidetune.data.clips import Frame, Span, frames_at
from sidetune.data.pictures import MICRO_BATCH, Picture, batch_size
from sidetune.data.reading import Reading
from sidetune.errors import BackboneError, RecipeError, RequestError
from sidetune.extract import extract, sample_keys
from sidetune.recipe import Recipe
from sidetune.sources import LiveSource, StoredSource
from tiny_videos import CONFIGS, FRAMES, SIZE, video_folder, video_model

NAME = "hf:a/model"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    return {family: video_folder(root / family, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_what_the_model_computes(folders, family):
    backbone = build_backbone(NAME, weights=folders[family])
    assert backbone.frames == FRAMES and backbone.preprocess.size == SIZE
    images = torch.randn(3, FRAMES, 3, SIZE, SIZE)
    features, model = backbone(images), video_model(family)
    heard = {}
    encoder = model.encoder if family == "vjepa2" else model
    blocks = {"vivit": "layers", "videomae": "encoder.layer", "vjepa2": "layer"}[family]
    for number, block in enumerate(encoder.get_submodule(blocks), start=1):
        block.register_forward_hook(
            lambda _, inputs, out, number=number: heard.update({number: (inputs[0], out)})
        )
    with torch.no_grad():
        last = encoder(images).last_hidden_state
    outputs = [out[0] if isinstance(out, tuple) else out for _, out in heard.values()]
    for name, expected in zip(backbone.spec.names, [heard[1][0], *outputs], strict=True):
        torch.testing.assert_close(features[name], expected, rtol=1e-4, atol=1e-5)
    normed = torch.nn.functional.layer_norm(
        features["block.3"], last.shape[-1:], backbone.norm.weight, backbone.norm.bias, backbone.norm.eps
    )
    torch.testing.assert_close(normed, last, rtol=1e-4, atol=1e-5)
    tap = backbone.spec.last
    prefix = int(family == "vivit")
    assert (tap.grid, tap.num_prefix, tap.cls_index) == ((2, 2, 2), prefix, 0 if prefix else None)
    assert backbone.spec.names == ("embedding", "block.1", "block.2", "block.3")
    assert set(backbone.check_values()) == set(backbone.spec.names)


def test_it_reads_clips_of_its_own_length_alone(folders):
    backbone = build_backbone(NAME, weights=folders["videomae"])
    with pytest.raises(BackboneError, match=r"got images \(1, 3, 16, 16\) .* expected \(B, 4, 3, 16, 16\)"):
        backbone(torch.zeros(1, 3, SIZE, SIZE))


def test_pixels_are_scaled_as_its_processor_says(folders, tmp_path):
    mean = [0.1, 0.2, 0.3]
    own = build_backbone(NAME, weights=video_folder(tmp_path / "own", "videomae", mean=mean))
    assert (own.preprocess.mean, own.preprocess.std) == (tuple(mean), (0.5,) * 3)
    means = {family: build_backbone(NAME, weights=folders[family]).preprocess.mean[0] for family in FAMILIES}
    assert means == {"vivit": 0.5, "videomae": 0.485, "vjepa2": 0.485}
    assert own.preprocess.interpolation == "bilinear"
    file = tmp_path / "own/preprocessor_config.json"
    for fields, pixel, value in (
        ({"rescale_factor": 1 / 127.5, "offset": True, "image_mean": 0.5, "image_std": 0.5}, 1.0, 1.0),
        ({"rescale_factor": 1 / 127.5, "offset": True, "image_mean": 0.5, "image_std": 0.5}, 0.0, -3.0),
        ({"rescale_factor": 1 / 127.5, "offset": True, "do_normalize": False}, 0.0, -1.0),
        ({"do_rescale": False, "do_normalize": False}, 1.0, 255.0),
        ({"do_normalize": False, "size": {"shortest_edge": 20}}, 0.25, 0.25),
    ):
        file.write_text(json.dumps(fields))
        found = build_backbone(NAME, weights=tmp_path / "own", resize="crop").preprocess
        assert (pixel - found.mean[1]) / found.std[1] == pytest.approx(value)
    assert found.crop_fraction == SIZE / 20


def test_a_whole_checkpoint_in_pieces_is_the_same_backbone(folders, tmp_path):
    """With its heads, the model's name before its keys, and several files: as on the hub."""
    whole = transformers.VideoMAEForVideoClassification(CONFIGS["videomae"]())
    whole.videomae.load_state_dict(video_model("videomae").state_dict())
    whole.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 1
    images = torch.randn(2, FRAMES, 3, SIZE, SIZE)
    ours, theirs = (
        build_backbone(NAME, weights=one)(images) for one in (folders["videomae"], tmp_path / "whole")
    )
    for name in ours.spec.names:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_the_model_in_memory_bit_for_bit(folders, family, precision, monkeypatch):
    images = torch.randn(3, FRAMES, 3, SIZE, SIZE)
    whole = build_backbone(NAME, weights=folders[family], precision=precision)
    streamed = build_backbone(NAME, weights=folders[family], precision=precision, runtime="streamed")
    assert streamed.identity == whole.identity and streamed.spec == whole.spec
    assert streamed.variant.runtime == "streamed" and streamed.norm.eps == whole.norm.eps
    for name in whole.spec.names:
        assert torch.equal(streamed(images)[name], whole(images)[name]), name
    monkeypatch.setattr("sidetune.backbones.video.TOKENS", 1)
    one_by_one = build_backbone(NAME, weights=folders[family], precision=precision, runtime="streamed")
    alone = torch.cat([whole(image[None])["block.2"] for image in images])
    assert torch.equal(one_by_one(images)["block.2"], alone), "a micro-batch of one clip"
    assert not list(streamed._stream.template.parameters()), "of blocks a slot alone is held"
    assert streamed.call_size > 1 and whole.call_size is None


def test_as_many_clips_go_into_a_batch_as_a_streamed_one_asks_for():
    spans = [Picture(Path(f"{number}.mp4"), Span(0, 1, FRAMES), "") for number in range(100)]
    assert batch_size(spans) == MICRO_BATCH // FRAMES
    assert batch_size(spans, 17) == 17


@pytest.mark.parametrize(
    ("stored", "together", "call_size", "expected"),
    [
        (16, 1, None, 32),  # two whole clips
        (6, 1, None, 36),  # of six frames as many as leave no clip half
        (16, 1, 64, 64),
        (16, 1, 40, 32),
        (16, 1, 8, 8),  # of a model whose taps are large no more, though a file is opened twice
        (8, 8, 5, 8),  # what is one sample stays together
        (8, 4, 5, 4),
        (1, 1, 5, 5),
    ],
)
def test_frames_of_a_clip_share_a_batch_where_a_call_has_room(stored, together, call_size, expected):
    frames = [Frame(number, stored) for number in range(stored)]
    shown = [Picture(Path(f"{clip}.mp4"), frame, "") for clip in range(9) for frame in frames]
    assert batch_size(shown, call_size, together) == expected


def test_what_fits_into_one_call_is_not_read_in_two():
    frames = [Picture(Path("a.mp4"), Frame(number, 11), "") for number in (8, 9, 10)]
    frames += [Picture(Path("b.mp4"), Frame(number, 11), "") for number in range(5)]
    assert batch_size(frames, 8) == 8 and batch_size(frames[:5], 8) == 5
    assert batch_size([], 8) > 0


def test_a_streamed_checkpoint_in_pieces_with_its_heads(folders, tmp_path):
    whole = transformers.VivitForVideoClassification(CONFIGS["vivit"]())
    whole.vivit.load_state_dict(video_model("vivit").state_dict())
    whole.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    images = torch.randn(2, FRAMES, 3, SIZE, SIZE)
    ours = build_backbone(NAME, weights=folders["vivit"])(images)
    theirs = build_backbone(NAME, weights=tmp_path / "whole", runtime="streamed")(images)
    for name in ours.spec.names:
        torch.testing.assert_close(ours[name], theirs[name])


def test_a_streamed_folder_that_lacks_something_says_so(folders, tmp_path):
    def refused(change, said):
        tensors = safetensors.torch.load_file(folders["vjepa2"] / "model.safetensors")
        change(tensors)
        (tmp_path / "config.json").write_bytes((folders["vjepa2"] / "config.json").read_bytes())
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(BackboneError, match=said):
            build_backbone(NAME, weights=tmp_path, runtime="streamed")

    refused(lambda t: t.pop("encoder.layernorm.bias"), r"lack encoder\.layernorm\.bias, expected")
    refused(
        lambda t: t.pop("encoder.layer.1.norm1.bias"), r"lack encoder\.layer\.1\.norm1\.bias, expected \(24"
    )
    refused(lambda t: t.update({"encoder.more": torch.ones(1)}), r"have encoder\.more")
    twice = {"vjepa2.encoder.layernorm.bias": torch.ones(24)}
    refused(lambda t: t.update(twice), r"have encoder\.layernorm\.bias twice")
    refused(
        lambda t: t.update({"encoder.layer.0.norm1.bias": torch.ones(5)}),
        r"have encoder\.layer\.0\.norm1\.bias \(5,\), and config\.json asks for \(24,\)",
    )
    refused(
        lambda t: [t.pop(key) for key in list(t) if key.startswith("encoder.layer.2")],
        r"have 2 blocks, and config\.json says 3",
    )
    with pytest.raises(BackboneError, match="unknown runtime 'steamed'"):
        build_backbone(NAME, weights=folders["vivit"], runtime="steamed")


def test_a_clip_is_stored_at_once_and_is_the_live_one(folders, clips, tmp_path):
    backbone, dataset = build_backbone(NAME, weights=folders["vjepa2"]), load_dataset(clips, clips=True)
    keys, reading = sample_keys(dataset), Reading.of_whole_clips(FRAMES, 2)
    assert reading.stored == (Span(0, 2, FRAMES), Span(1, 2, FRAMES)) and reading.scored == 2
    assert (reading.together, reading.pictures) == (1, FRAMES)
    store = extract(
        dataset, backbone, tmp_path / "s", dtype="fp32", keys=keys, views=reading.stored, quiet=True
    )
    assert store.num_records == 2 * len(dataset)
    stored = StoredSource(store, keys, reading=reading)
    live = LiveSource(dataset, backbone, keys=keys, reading=reading, quiet=True)
    rows, which = [3, 0, 7], [0, 1, 1]
    found, lived = (source.features(rows, views=which)["block.2"] for source in (stored, live))
    torch.testing.assert_close(found, lived, rtol=1e-4, atol=1e-5)
    instants = reading.stored[1].instants
    assert instants == (0.1875, 0.4375, 0.6875, 0.9375)
    shown = torch.stack([backbone.preprocess(image) for image in frames_at(dataset.file(0), instants)])
    torch.testing.assert_close(backbone(shown[None])["block.2"][0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "side"), [("videomae", "losa"), ("vjepa2", "last"), ("vivit", "losa")])
def test_a_run_on_clips(folders, clips, tmp_path, family, side):
    """ViViT's class token is of no frame, so its space and time are mixed at once."""
    backbone = {"name": NAME, "weights": str(folders[family])}
    settings = ["clips.frames=4", "clips.scored=2", "train.epochs=2", f"side.name={side}"]
    settings += ["side.time=joint"] * (family == "vivit")
    recipe = Recipe.build({"backbone": backbone}, settings)
    run = sidetune.fit(clips, out=tmp_path / "run", recipe=recipe, store=tmp_path / "store", quiet=True)
    predictor = sidetune.load(run.folder)
    tested = read_csv(run.folder / "predictions.csv")
    for row, one in zip(tested, predictor.predict([clips / row["path"] for row in tested]), strict=True):
        for name, value in one.values.items():
            assert float(row[f"p_{name}"]) == pytest.approx(value, abs=2e-3)


def test_what_it_does_not_read_is_refused(folders, clips, tmp_path):
    backbone = {"name": NAME, "weights": str(folders["videomae"])}
    for settings, said in (
        (["clips.frames=2"], "reads 4 frames of a clip at once, and clips.frames is 2. Type: --frames 4"),
        (["clips.frames=4", "clips.crops=3"], "clips.crops is 3, and the backbone reads whole frames"),
    ):
        recipe = Recipe.build({"backbone": backbone}, settings)
        with pytest.raises(RecipeError, match=said):
            sidetune.fit(clips, out=tmp_path / "run", recipe=recipe, store=tmp_path / "s", quiet=True)
    with pytest.raises(RecipeError, match=r"and no clips are asked for. Type: --frames 32$"):
        Recipe().reading(32)


def test_a_bench_of_images_refuses_it(folders):
    with pytest.raises(
        RequestError, match=r"reads 4 frames of a clip at once, and this bench is for backbones of im"
    ):
        require_images(build_backbone(NAME, weights=folders["vivit"]))
    with pytest.raises(
        BackboneError, match=r"size 32, and a/model reads frames of 16 px alone\. Leave --size out"
    ):
        build_backbone(NAME, weights=folders["vivit"], size=32)


def test_folders_that_are_none_say_what_to_type(folders, tmp_path):
    with pytest.raises(BackboneError, match=r"expected a folder with config.json and model\*.safetensors"):
        build_backbone(NAME, weights=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes((folders["vivit"] / "model.safetensors").read_bytes())
    with pytest.raises(BackboneError, match="of the family 'bert', expected vivit, videomae, vjepa2"):
        build_backbone(NAME, weights=tmp_path)
    (tmp_path / "config.json").write_bytes((folders["videomae"] / "config.json").read_bytes())
    with pytest.raises(
        BackboneError, match=r"the weights of a/model have embeddings.cls_token, and \d+ more"
    ):
        build_backbone(NAME, weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folders["vjepa2"] / "model.safetensors").read_bytes())
    with pytest.raises(BackboneError, match=r"the weights of a/model lack embeddings"):
        build_backbone(NAME, weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BackboneError, match=r"a/model cannot be loaded: .* Type: --weights FOLDER"):
        build_backbone(NAME, weights=tmp_path)
    other = video_folder(tmp_path / "other", "vivit")
    (other / "preprocessor_config.json").write_text("{")
    with pytest.raises(BackboneError, match=r"preprocessor_config\.json is no JSON"):
        build_backbone(NAME, weights=other)


def test_names_of_spans_are_read_back():
    span = Span(1, 3, 16)
    assert span.name == "span1of3x16" and Span.parse(span.name) == span
    assert [Span.parse(name) for name in ("span3of3x16", "span01of3x16", "frame1of4")] == [None] * 3
