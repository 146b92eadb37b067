import ast
import json
from pathlib import Path

import pytest
import torch

import sidetune
from fitted_runs import toy_recipe
from sidetune import SIDES, Artifact, build_backbone, load
from sidetune.artifact import build_model, find_device
from sidetune.errors import ArtifactError, BackboneError, RequestError
from sidetune.predict import Predictor
from sidetune.tasks import Classify

SOURCE = Path(sidetune.__file__).parent


@pytest.mark.parametrize("side", sorted(SIDES))
def test_saved_again_it_is_the_same(runs, tmp_path, side):
    folder = runs(side).folder
    first = Artifact.read(folder)
    first.save(tmp_path)
    for name in ("side.safetensors", "artifact.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    second = Artifact.read(tmp_path)
    assert not second.model.training
    state = first.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.model.state_dict().items())
    assert vars(second) | {"model": None} == vars(first) | {"model": None}


def test_it_holds_every_choice(runs):
    losa, linear, ridge = (runs(side).artifact() for side in ("losa", "linear", "ridge"))
    assert losa.recipe.train.epochs == 2
    assert losa.task == Classify(("class0", "class1", "class2"), (1 / 3, 1 / 3, 1 / 3))
    assert losa.spec == build_backbone("toy").spec
    assert linear.recipe.side.pool in ("cls", "mean", "cls+mean")
    assert linear.recipe.side.l2 is not None
    assert ridge.recipe.side.l2 is not None
    assert set(losa.scores) == {"val", "test"}
    assert losa.scores["test"] == runs().row["test"]["scores"]
    toy = build_backbone("toy")
    assert (losa.identity, losa.norm_eps) == (toy.identity, toy.norm.eps)
    for name, pair in toy.check_values().items():
        assert losa.check_values[name] == pytest.approx(pair)


def edited(folder, **fields):
    path = folder / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def error_of(folder):
    with pytest.raises(ArtifactError) as error:
        load(folder)
    assert "Type: " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("position", [9, 300, -1])
def test_a_changed_byte_of_the_weights_is_seen(runs, tmp_path, position):
    folder = runs.copy(tmp_path / "run")
    content = bytearray((folder / "side.safetensors").read_bytes())
    content[position] ^= 1
    (folder / "side.safetensors").write_bytes(content)
    message = error_of(folder)
    assert f"{folder / 'side.safetensors'} is damaged or was exchanged: its sha256 starts with " in message
    expected = json.loads((folder / "artifact.json").read_text())["weights"]
    assert (
        f", expected {expected[:12]}. Copy the whole run folder again, or fit anew. Type: the fit" in message
    )


def test_weights_cut_short_are_seen(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    content = (folder / "side.safetensors").read_bytes()
    (folder / "side.safetensors").write_bytes(content[: len(content) // 2])
    assert "is damaged or was exchanged" in error_of(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "side.safetensors",
            "side.safetensors is missing, expected the side's weights. Copy the whole run folder",
        ),
        (
            "artifact.json",
            "is not a finished run: it has no artifact.json. A fit was begun there and not ended. ",
        ),
    ],
)
def test_a_missing_file_is_named(runs, tmp_path, name, message):
    folder = runs.copy(tmp_path / "run")
    (folder / name).unlink()
    assert message in error_of(folder)


@pytest.mark.parametrize(
    ("version", "remedy"), [(99, "pip install -U sidetune"), (1, "the fit command with a new --out")]
)
def test_another_format_version_is_refused(runs, tmp_path, version, remedy):
    message = error_of(edited(runs.copy(tmp_path / "run"), format=version))
    assert message.endswith(f"artifact.json has format {version}, expected 2 or 3. Type: {remedy}")


@pytest.mark.parametrize("value", [0.0, -1.0, "warm", None])
def test_a_temperature_that_is_none_is_refused(runs, tmp_path, value):
    message = error_of(edited(runs.copy(tmp_path / "run"), temperature=value))
    assert (
        f"is damaged, or of another version of sidetune: temperature is {value!r}: Input should be" in message
    )


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_what_is_no_artifact_is_refused(runs, tmp_path, content):
    folder = runs.copy(tmp_path / "run")
    (folder / "artifact.json").write_bytes(content)
    assert str(folder / "artifact.json") in error_of(folder)


@pytest.mark.parametrize(
    "name", ["recipe", "task", "spec", "identity", "variant", "weights", "check_values", "temperature"]
)
def test_a_missing_field_is_named(runs, tmp_path, name):
    folder = runs.copy(tmp_path / "run")
    fields = json.loads((folder / "artifact.json").read_text())
    del fields[name]
    (folder / "artifact.json").write_text(json.dumps(fields))
    message = error_of(folder)
    assert f"artifact.json is damaged, or of another version of sidetune: '{name}'" in message
    assert message.endswith("Type: the fit command with a new --out")


def test_fields_that_do_not_fit_are_refused(runs, tmp_path):
    recipe = runs().artifact().recipe.model_dump(mode="json")
    newer = {**recipe, "side": {**recipe["side"], "gate": True}}
    message = error_of(edited(runs.copy(tmp_path / "newer"), recipe=newer))
    assert "no setting 'side.gate'" in message
    wider = {**recipe, "side": {**recipe["side"], "rank": 9}}
    message = error_of(edited(runs.copy(tmp_path / "wider"), recipe=wider))
    assert "has shape (1, 32, 8) for 'side.channel.0.down_MDR', expected (1, 32, 9)" in message
    assert "is damaged" in message


@pytest.mark.parametrize(
    ("arguments", "differing"),
    [
        ({"seed": 1}, "weights: "),
        ({"size": 40}, "arguments.size: 40 here, 32 there; preprocess.size: 40 here"),
    ],
)
def test_another_backbone_is_refused_with_the_difference(runs, arguments, differing):
    with pytest.raises(ArtifactError) as error:
        load(runs().folder, backbone=build_backbone("toy", **arguments))
    message = str(error.value)
    assert message.startswith("the backbone here is not the one that the run was trained on, there: ")
    assert differing in message
    assert message.endswith(
        "Type: --weights with the path of the weights that it was trained on, or, in Python, "
        "sidetune.load(RUN, backbone=...)"
    )


def test_a_backbone_without_the_taps_is_refused(runs):
    with pytest.raises(ArtifactError) as error:
        load(runs().folder, backbone=build_backbone("toy", taps=["block.4"]))
    assert str(error.value) == (
        "the backbone reads the taps block.4 and lacks embedding, block.1, block.2, block.3, which the run "
        "reads. Build it with taps=None"
    )


def test_a_backbone_with_more_taps_is_used(runs, image_folder):
    taps = ["embedding", *(f"{kind}.{n}" for n in range(1, 5) for kind in ("attention", "ffn", "block"))]
    files = [image_folder / "class0" / "0000.png"]
    more = load(runs().folder, backbone=build_backbone("toy", taps=taps)).predict(files)
    assert more == load(runs().folder).predict(files)


def test_a_backbone_that_computes_something_else_is_refused(runs):
    backbone = build_backbone("toy")
    with torch.no_grad():  # behind the identity, which was taken when it was built
        backbone.module.blocks[2].ffn[1].weight.mul_(1.5)
    with pytest.raises(ArtifactError) as error:
        load(runs().folder, backbone=backbone)
    message = str(error.value)
    assert message.startswith("tap 'block.3' has mean ")
    assert " on the built-in image, expected " in message
    assert (
        "within 0.002 std: the backbone has the right weights and computes something else. Type: " in message
    )


def test_a_backbone_that_computes_nan_is_refused(runs):
    backbone = build_backbone("toy")
    with torch.no_grad():
        backbone.module.blocks[0].ffn[1].weight.fill_(torch.nan)
    with pytest.raises(ArtifactError, match=r"tap 'block\.1' has mean nan and std nan"):
        load(runs().folder, backbone=backbone)


def test_another_precision_is_accepted_within_its_limit(runs, image_folder):
    files = sorted(image_folder.glob("*/*.png"))[:6]
    rounded = load(runs().folder, backbone=build_backbone("toy", precision="bf16")).predict(files)
    for ours, theirs in zip(rounded, load(runs().folder).predict(files), strict=True):
        assert ours.values == pytest.approx(theirs.values, abs=2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_was_trained_in_16_bits_is_served_in_32(image_folder, tmp_path, precision):
    recipe = toy_recipe("losa", f"backbone.precision={precision}", f"features.dtype={precision}")
    run = sidetune.fit(image_folder, out=tmp_path / "run", recipe=recipe, store=tmp_path / "s", quiet=True)
    files = sorted(image_folder.glob("*/*.png"))[:6]
    there = load(run.folder)
    here = load(run.folder, precision="fp32")
    assert (there.backbone.variant.precision, here.backbone.variant.precision) == (precision, "fp32")
    for ours, theirs in zip(here.predict(files), there.predict(files), strict=True):
        assert ours.values == pytest.approx(theirs.values, abs=2e-2)
    with pytest.raises(BackboneError, match=r"unknown precision 'fp8'\. Known: bf16, fp16, fp32"):
        load(run.folder, precision="fp8")


def test_the_side_can_be_put_on_its_backbone_by_hand(runs, image_folder):
    file = image_folder / "class0" / "0000.png"
    artifact = Artifact.read(runs().folder)
    assert Predictor(artifact, build_backbone("toy")).predict([file]) == load(runs().folder).predict([file])


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "CUDA", "cuda:x", "mps", ""):
        with pytest.raises(RequestError, match="no device named") as error:
            find_device(name)
        assert "Known: auto, cpu, cuda, cuda:0." in str(error.value)
    with pytest.raises(
        RequestError, match=r"got device 'cuda:99', and PyTorch finds \d+ GPUs here\. Type: --de"
    ):
        find_device("cuda:99")


def test_a_model_is_built_for_recipes_that_leave_the_pool_open():
    toy = build_backbone("toy")
    model = build_model(toy_recipe("linear"), toy.spec, 3, toy.norm)
    assert model.side.pool == "mean"


def test_nothing_is_ever_pickled():
    """No call of pickle, and torch.load, for users' checkpoints, takes tensors alone."""
    loads = 0
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), [ast.unparse(item) for item in node.keywords]
            assert not called.startswith(("pickle.", "joblib.")), f"{file}: {called}"
            assert called not in ("torch.save", "np.save"), f"{file}: {called}"
            assert "allow_pickle=True" not in keywords, f"{file}: {called}"
            if called == "torch.load":
                loads += 1
                assert "weights_only=True" in keywords, f"{file}: {called}"
    assert loads == 1
