"""What is read from outside is read, or refused with a sidetune error: no crash, no hang, no memory bomb, no
code run, nothing written. `make fuzz` reads 2,000 mutated files; this is it in small, and by hypothesis.
"""

import io
import json
import os
import shutil
import signal
import string
import struct
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from extracting import seal_again
from fuzzing import ODD, attempt, build, mutate
from sidetune import Recipe, fit
from sidetune.artifact import Artifact
from sidetune.data import load_dataset
from sidetune.errors import ArtifactError, DataError, RecipeError, SidetuneError, StoreError
from sidetune.files import parse_json, sha256_file
from sidetune.progress import printable
from sidetune.report import write_report
from sidetune.rescore import evaluate_run
from sidetune.runs import Run, read_skipped
from sidetune.store import Store
from sidetune.tables import print_scores

FILES = 60
QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CHARACTERS = st.characters(exclude_categories=["Cs"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ODD),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=6), below, max_size=3),
    max_leaves=6,
)


def read_or_refused(read, *arguments):
    """A value, or None where it is refused; an error's text is short enough to be read."""
    try:
        return read(*arguments)
    except SidetuneError as error:
        assert 0 < len(str(error)) < 5000
        return None


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One file of every kind, and what reads it."""
    root = tmp_path_factory.mktemp("fuzz") / "files"
    root.mkdir()
    return root, build(root)


def test_every_original_is_valid_and_its_mutations_are_read_or_refused(originals):
    root, targets = originals
    for number, target in enumerate([*targets, *targets][:FILES]):
        content = (root / target.file).read_bytes()
        if number >= len(targets):
            content = mutate(content, target.file, np.random.default_rng(number))
        outcome = attempt(target, root, content)
        assert outcome.end == "valid" or (number >= len(targets) and outcome.end == "refused"), outcome
        assert outcome.written == []


def test_what_is_not_read_or_refused_is_seen(originals, monkeypatch):
    """A crash, a hang, a memory bomb, an interpreter that dies, and a file that is written."""
    root, targets = originals
    monkeypatch.setattr("fuzzing.SECONDS", 2)
    monkeypatch.setattr("fuzzing.GROWTH", 2**26)

    def end(read):
        target = type(targets[0])("image", targets[0].file, read)
        outcome = attempt(target, root, b"x")
        return outcome.end, bool(outcome.written)

    assert end(lambda root: 1 / 0) == ("crashed", False)
    assert end(lambda root: os.kill(os.getpid(), signal.SIGKILL)) == ("crashed", False)
    assert end(lambda root: [0 for _ in iter(int, 1)]) == ("hung", False)
    assert end(lambda root: b"x" * 2**27) == ("memory", False)
    assert end(lambda root: (root.parent / "outside").write_text("x")) == ("valid", True)
    (root.parent / "outside").unlink()


# tables, lists, recipes


@QUICK
@given(
    cells=st.lists(st.lists(st.text(CHARACTERS, max_size=6), max_size=5), max_size=6),
    separator=st.sampled_from(",;\t"),
    header=st.sampled_from(["path,label", "Path;LABEL", "path\tlabel\tsplit", "path,label,fold,group", ""]),
)
def test_any_text_is_a_table_or_refused(tmp_path, cells, separator, header):
    rows = [separator.join(row) for row in cells]
    (tmp_path / "table.csv").write_text("\n".join([header, *rows]), newline="")
    read_or_refused(load_dataset, tmp_path / "table.csv")


@QUICK
@given(content=st.binary(max_size=60), name=st.sampled_from(["train800.txt", "info.json", "test.txt"]))
def test_any_bytes_are_a_list_or_refused(tmp_path, content, name):
    for part in ("train800", "val200", "test", "train800val200"):
        (tmp_path / f"{part}.txt").write_text(f"{part}.jpg 1\n")
        (tmp_path / f"{part}.jpg").touch()
    (tmp_path / "train800val200.txt").write_text("train800.jpg 1\nval200.jpg 1\n")
    (tmp_path / "info.json").unlink(missing_ok=True)
    (tmp_path / name).write_bytes(content)
    read_or_refused(load_dataset, tmp_path)


@QUICK
@given(part=st.sampled_from(list(Recipe.model_fields)), fields=JSON, key=st.text(max_size=8))
def test_any_value_is_a_recipe_or_refused(part, fields, key):
    names = list(Recipe.model_fields[part].default.model_dump())
    for value in (fields, {names[len(key) % len(names)]: fields}, {key: fields}):
        recipe = read_or_refused(Recipe.build, {part: value})
        if recipe is not None:
            assert len(recipe.hash) == 64
            assert Recipe.build(recipe.model_dump(mode="json")).hash == recipe.hash


@QUICK
@given(text=st.text(st.sampled_from(string.printable + "é\u202e\x00"), max_size=20))
def test_any_setting_is_taken_or_refused(text):
    for setting in (text, f"train.lr={text}", f"side.{text}=1", f"data.labels=[{text}]"):
        recipe = read_or_refused(Recipe.build, {}, [setting])
        assert recipe is None or len(recipe.hash) == 64


BILLION = "[&a [x,x,x,x,x,x,x,x,x], " + ", ".join(
    f"&{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (BILLION + "]", "an alias, *name, is not taken"),
        ("[" * 100_000, "recursion depth"),
        ("9" * 5000, "Exceeds the limit (4300 digits)"),
        ("2001-99-99", "month must be in 1..12"),
        ("!!python/object/apply:os.system ['touch was-run']", "could not determine a constructor"),
        ("{[]: 1}", "found unhashable key"),
    ],
)
def test_a_setting_that_is_a_bomb_or_a_program(value, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        Recipe.build({}, [f"side.taps={value}"])
    assert said in str(caught.value)
    assert str(caught.value).endswith("Type: --set side.rank=16")
    assert len(str(caught.value)) < 600
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_recipe_that_is_none():
    with pytest.raises(RecipeError, match=r"side is \['x'\], expected settings\. Type: --set side.rank=16"):
        Recipe.build({"side": ["x"]})
    with pytest.raises(RecipeError, match=r"no side named \['losa'\]"):
        Recipe.build({"side": {"name": ["losa"]}})


# JSON


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested more than 50 deep"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ('{"a": NaN}', "got NaN, which is not JSON"),
        ("[-Infinity]", "got -Infinity, which is not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands there twice"),
        ("9" * 5000, "Exceeds the limit (4300 digits)"),
        ("", "Expecting value"),
        ('{"a": "\\ud800"}', "a text holds half a character"),
        ('{"\\uDFFF": 1}', "a text holds half a character"),
    ],
)
def test_json_that_is_not_ours(text, said):
    with pytest.raises(ValueError, match=r".*") as caught:
        parse_json(text)
    assert said in str(caught.value)
    assert parse_json("[" * 50 + "]" * 50) is not None
    assert parse_json('["\\ud83d\\ude00"]') == ["\U0001f600"]
    assert parse_json("[NaN]", nan=True)[0] != parse_json("[1]")[0]


# stores


def edit(path, *keys, value):
    """Exchange one value of a JSON file."""
    fields = holder = json.loads(path.read_text())
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    path.write_text(json.dumps(fields))


@pytest.fixture
def store(originals, tmp_path):
    shutil.copytree(originals[0] / "store", tmp_path / "store")
    return tmp_path / "store"


def all_of(folder):
    opened = Store.open(folder)
    keys = [key for shard in opened.plan.shards for key in shard]
    return opened.features(keys), opened.summary(keys), opened.final_norm


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("spec", 0, "width"), 2**40, "expected shape (18, 17, 1099511627776)"),
        (("spec", 0, "grid"), [1, 2**20, 2**20], "expected shape (18, "),
        (("spec", 0, "width"), "wide", "spec.taps.0.width is 'wide': Input should be a valid integer"),
        (("spec",), [], "a spec needs at least one tap"),
        (("dtype",), "int3", "dtype is 'int3': Input should be 'fp16', 'bf16' or 'fp32'"),
        (("norm_eps",), "much", "norm_eps is 'much'"),
        (("shards",), [["a", 1]], "shards.0.1 is 1: Input should be a valid string"),
        (("identity",), 7, "identity is 7"),
        (("variant", "taps"), 3, "variant.taps is 3"),
    ],
)
def test_a_plan_that_claims_what_the_shards_do_not_hold(store, keys, value, said):
    edit(store / "plan.json", *keys, value=value)
    seal_again(store)
    with pytest.raises(StoreError) as caught:
        all_of(store)
    assert said in str(caught.value)
    assert " Type" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("skipped",), {"-1": "no"}, "it names slot -1 of 18"),
        (("skipped",), {"18": "no"}, "it names slot 18 of 18"),
        (("animated",), [99], "it names slot 99 of 18"),
        (("skipped",), ["no"], "skipped is ['no']: Input should be a valid dictionary"),
        (("bytes",), None, "bytes is None: Input should be a valid integer"),
    ],
)
def test_a_checksum_file_that_does_not_fit(store, keys, value, said):
    edit(store / "shards" / "00000.json", *keys, value=value)
    seal_again(store)
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert said in str(caught.value)
    assert str(caught.value).endswith("Type the same extract or fit command again: it writes this shard anew")


def header_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [18, 1, 32]}, "a tensor of shape [18, 1, 32] has "),  # it would have been broadcast
        ({"shape": [18, 17, 64], "dtype": "F16"}, "a tensor of shape [18, 17, 64] has "),
        ({"shape": [2**60], "data_offsets": [0, 0]}, "a tensor of shape [1152921504606846976] has 0 bytes"),
        ({"data_offsets": [-8, 0]}, "data_offsets.0 is -8: Input should be greater than or equal to 0"),
        ({"shape": [-1]}, "shape.0 is -1"),
        ({"shape": None}, "shape is None"),
        ({"dtype": "F128"}, "dtype is 'F128'"),
        ({"dtype": ["F16"]}, "dtype is ['F16']"),
    ],
)
def test_a_shard_whose_header_lies(store, entry, said):
    path = store / "shards" / "00000.safetensors"
    header, data = header_of(path)
    header["block.1"] |= entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns it
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    edit(path.with_suffix(".json"), "bytes", value=path.stat().st_size)
    seal_again(store)
    with pytest.raises(StoreError) as caught:
        all_of(store)
    assert said in str(caught.value)
    assert str(caught.value).endswith("Type the same extract or fit command again: it writes this shard anew")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (struct.pack("<Q", 2**60), "is damaged"),
        (struct.pack("<Q", 2) + b"[]", "is damaged"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "nested more than 50 deep"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "it is 1: Input should be"),
        (b"", "is damaged"),
    ],
)
def test_a_shard_that_begins_with_nonsense(store, start, said):
    path = store / "shards" / "00000.safetensors"
    path.write_bytes(start + path.read_bytes()[8:] if start else b"")
    edit(path.with_suffix(".json"), "bytes", value=path.stat().st_size)
    seal_again(store)
    with pytest.raises(StoreError, match=r"shard .*00000\.safetensors is damaged") as caught:
        all_of(store)
    assert said in str(caught.value)


def test_a_shard_of_another_shape_is_not_broadcast(store):
    """A whole safetensors file, with records of one token where the plan has seventeen."""
    path = store / "shards" / "00000.safetensors"
    tensors = {name: tensor.clone() for name, tensor in _tensors(path).items()}
    tensors["block.1"] = tensors["block.1"][:, :1].contiguous()
    save_file(tensors, path)
    edit(path.with_suffix(".json"), "bytes", value=path.stat().st_size)
    seal_again(store)
    with pytest.raises(StoreError, match=r"'block\.1' has shape \(18, 1, 32\), expected shape \(18, 17"):
        all_of(store)
    del tensors["block.1"]
    save_file(tensors, path)
    edit(path.with_suffix(".json"), "bytes", value=path.stat().st_size)
    seal_again(store)
    with pytest.raises(StoreError, match=r"'block\.1' has no such tensor, expected shape"):
        all_of(store)


def _tensors(path):
    header, data = header_of(path)
    kinds = {"F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(data[first:end]) or bytearray(8), dtype=kinds[entry["dtype"]])
            found[name] = flat[: int(np.prod(entry["shape"]))].view(entry["shape"])
    return found


# runs


@pytest.fixture
def run(originals, tmp_path):
    shutil.copytree(originals[0] / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("recipe", "side", "rank"), 2**40, "side.safetensors has shape (1, 32, 8) for"),
        (("spec", 1, "width"), 2**40, "artifact.json is damaged"),
        (("task", "outputs"), ["a"], "the task has 3 shares, expected 1"),
        (("task", "shares"), ["x", 1, 2], "the task's shares.0 is 'x'"),
        (("task", "outputs"), 5, "the task's outputs is 5"),
        (("recipe", "side"), "losa", "side is 'losa', expected settings"),
        (("recipe",), [["side"]], "damaged"),
        (("identity", "arguments"), [], "identity.arguments is []"),
        (("norm_eps",), "1e-6x", "norm_eps is '1e-6x'"),
        (("check_values",), {}, "check_values lack block.1"),
        (("check_values", "block.1"), [1], "check_values.block.1"),
        (("weights",), 3, "weights is 3"),
        (("format",), [0] * 1000, "has format [0, 0, 0"),
    ],
)
def test_an_artifact_that_claims_what_its_weights_do_not_hold(run, keys, value, said):
    edit(run / "artifact.json", *keys, value=value)
    with pytest.raises(ArtifactError) as caught:
        Artifact.read(run)
    assert said in str(caught.value)
    assert str(run / "artifact.json") in str(caught.value)
    assert "Type: " in str(caught.value)


def test_weights_that_are_exchanged_with_their_checksum(run):
    for content in (struct.pack("<Q", 2**60) + b"{}", b"", b"\x02\0\0\0\0\0\0\0{}"):
        (run / "side.safetensors").write_bytes(content)
        edit(run / "artifact.json", "weights", value=sha256_file(run / "side.safetensors"))
        with pytest.raises(ArtifactError, match=r"side\.safetensors'? ?is damaged|for 'side\.|nothing for"):
            Artifact.read(run)


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("rows",), [], "rows is []: List should have at least 1 item"),
        (("rows", 0, "method"), {"a": 1}, "rows.0.method is {'a': 1}"),
        (("rows", 0, "val", "scores", "balanced_accuracy"), {}, "rows.0.val.scores.balanced_accuracy is {}"),
        (("rows", 0, "val", "scores"), {}, "'balanced_accuracy' is no score of ridge-last"),
        (("data", "num_skipped"), "none", "data.num_skipped is 'none'"),
        (("headline",), None, "headline is None"),
    ],
)
def test_metrics_that_cannot_be_shown(run, keys, value, said):
    edit(run / "metrics.json", *keys, value=value)
    with pytest.raises(ArtifactError) as caught:
        Run.open(run)
    assert said in str(caught.value)
    assert str(caught.value).endswith("Type: the fit command with a new --out")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("history.jsonl", '{"epoch": "one", "loss": 1, "val": {}}', "the JSON files of .* are damaged"),
        ("history.jsonl", "[" * 100_000, "is not JSON lines: objects and lists are nested more than 50 deep"),
        ("recipe.json", "[]", "recipe.json holds a list, expected an object"),
        ("metrics.json", '{"a": 1, "a": 2}', "is not JSON: the key 'a' stands there twice"),
    ],
)
def test_a_report_of_a_damaged_run(run, name, content, said):
    (run / name).write_text(content)
    with pytest.raises(ArtifactError, match=said) as caught:
        write_report(run)
    assert str(caught.value).endswith("Fit the run again with: sidetune fit") or "Fit it again" in str(
        caught.value
    )


@pytest.mark.parametrize("content", [None, "path\nx\n", "path,reason\nx\n", 'path,reason\n"x', "\x00"])
def test_a_damaged_list_of_skipped_images(run, content):
    (run / "skipped.csv").unlink()
    if content is not None:
        (run / "skipped.csv").write_text(content)
    with pytest.raises(ArtifactError, match=r"skipped\.csv is damaged: .* Type: the fit command with a new"):
        read_skipped(run)


# hostile names


def test_names_that_mean_harm_stay_text(tmp_path, capsys):
    """HTML, a newline, a terminal's commands, a formula, quotes: in class names and in file names."""
    rng = np.random.default_rng(0)
    classes = ['<script>alert("1")</script>', "\x1b[2J\x07 red", "a\nb,c", "=1+1", "..", "{{ 7*7 }}"]
    names = ["<img src=x onerror=alert(1)>.png", "new\nline.png", "\x1b]0;title\x07.png", "'\"`$(id).png"]
    rows = [["path", "label"]]
    (tmp_path / "data").mkdir()
    for i in range(36):
        name = f"{i}{names[i % 4]}".replace("/", "")
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / "data" / name)
        rows.append([name, classes[i % 6]])
    (tmp_path / "data" / rows[1][0]).write_text("no image")
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    (tmp_path / "data" / "table.csv").write_text("\n".join(quoted), newline="")
    before = set(tmp_path.rglob("*"))
    recipe = Recipe.build({"backbone": {"name": "toy"}, "side": {"name": "ridge"}})
    made = fit(tmp_path / "data" / "table.csv", out=tmp_path / "run", recipe=recipe, store=tmp_path / "store")
    out = io.StringIO()
    with redirect_stdout(out):
        print_scores(made.metrics)
    found = evaluate_run(tmp_path / "run", tmp_path / "data" / "table.csv", split="all")
    assert list(found.skipped) == [rows[1][0]]
    new = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert new == {"run", "store"}, "nothing is written elsewhere"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<img src=x" not in page
    assert "49" not in page.split("{{ 7*7 }}")[0][-5:]
    dataset = load_dataset(tmp_path / "data" / "table.csv")
    assert set(dataset.outputs) == set(classes)
    assert read_skipped(tmp_path / "run") == [f"{rows[1][0]}: not an image that Pillow reads"]
    assert "\x1b" not in capsys.readouterr().err
    assert printable("\x1b[2J é\n\x07\udcff") == "\\x1b[2J é\n\\x07\\udcff"


def test_a_name_that_is_no_text_is_named(tmp_path):
    for name in (b"a/1.png", b"a/2.png", b"b/\xff.png"):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(DataError, match=r"holds b'\\xff\.png', whose name is not UTF-8 text\. Rename it"):
        load_dataset(tmp_path)


def test_class_names_that_no_file_can_hold(tmp_path):
    for part in ("train800", "val200", "test"):
        (tmp_path / f"{part}.txt").write_text(f"{part}.jpg 0\n")
        (tmp_path / f"{part}.jpg").touch()
    (tmp_path / "train800val200.txt").write_text("train800.jpg 0\nval200.jpg 0\n")
    (tmp_path / "info.json").write_text('{"classes": ["\\ud800"]}')
    with pytest.raises(DataError, match="is not JSON: a text holds half a character"):
        load_dataset(tmp_path)
    for names in ("5", '[["a"]]', '"abc"'):
        (tmp_path / "info.json").write_text(f'{{"classes": {names}}}')
        with pytest.raises(DataError, match="'classes' is no list of names; expected 1 texts"):
            load_dataset(tmp_path)
    (tmp_path / "info.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"is not JSON: .* nested more than 50 deep\. Mend it, or remove it"):
        load_dataset(tmp_path)
    (tmp_path / "info.json").unlink()
    (tmp_path / "test.txt").write_text("test.jpg 999999\n")
    with pytest.raises(DataError, match=r"with a label 0, 1, 2, \.\. of at most 5 digits"):
        load_dataset(tmp_path)
    (tmp_path / "test.txt").write_bytes(b"ok.jpg 0\n\xff.jpg 0\n")
    with pytest.raises(DataError, match=r"test\.txt, line 2: is not UTF-8 text: got byte 0xff"):
        load_dataset(tmp_path)
    for path in ("x/..", "."):
        (tmp_path / "test.txt").write_text(f"{path} 0\n")
        with pytest.raises(DataError, match=r"is not in .* \(1 of 3 images are missing\)"):
            load_dataset(tmp_path)


# images


def test_a_header_that_claims_the_sky_takes_no_memory(originals):
    """Widths and heights of every format, claimed and not delivered; in a process that is measured."""
    root, targets = originals
    jpeg = next(one for one in targets if one.file.endswith("plain.jpg"))
    for name, at, packed in (
        ("plain.bmp", 18, struct.pack("<ii", 13_000, 13_000)),
        ("plain.ppm", 3, b"13000 13000\n"),
        ("deep.png", 16, struct.pack(">II", 13_000, 13_000)),
        ("moving.gif", 6, struct.pack("<HH", 20_000, 20_000)),
    ):
        content = (root / "image" / name).read_bytes()
        content = content[:at] + packed + content[at + len(packed) :]
        outcome = attempt(jpeg, root, content)
        assert outcome.end == "refused", (name, outcome)
