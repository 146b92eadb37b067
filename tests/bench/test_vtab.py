import json
from dataclasses import replace

import numpy as np
import pytest

from sidetune import build_backbone, cli
from sidetune.bench import vtab
from sidetune.bench.accuracy.claims import Outcome
from sidetune.bench.accuracy.table import Report
from sidetune.bench.vtab import OTHERS, PUBLISHED, SUITE, TASKS, checkpoint, own_rows, published_lines, survey
from sidetune.errors import DataError, RequestError
from vtab_tasks import make_task


def test_the_nineteen_tasks_are_those_of_the_benchmark():
    groups = [sum(task.group == name for task in TASKS) for name in ("Natural", "Specialized", "Structured")]
    assert groups == [7, 4, 8] and len({task.name for task in TASKS}) == 19
    assert sum(task.test for task in TASKS) == 387_904


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """One of the 19 (made small), a folder of such a name that is another task, and a task of its own."""
    small = [replace(task, classes=3, test=24) if task.name == "eurosat" else task for task in TASKS]
    monkeypatch.setattr(vtab, "TASKS", tuple(small))
    make_task(tmp_path / "suite" / "eurosat", group="wrong", seed=0)
    make_task(tmp_path / "suite" / "cifar", group="Natural", seed=1)
    make_task(tmp_path / "suite" / "discs", group="Structured", seed=2)
    return tmp_path / "suite"


def test_what_is_missing_is_said_with_where_it_comes_from(mixed):
    found = survey(mixed)
    assert [(task.name, task.group, task.suite) for task in found.tasks] == [
        ("eurosat", "Specialized", SUITE),
        ("cifar", "Natural", OTHERS),
        ("discs", "Structured", OTHERS),
    ]
    assert len(found.missing) == 18 and "eurosat" not in {task.name for task in found.missing}
    assert found.unlike == {"cifar": "3 classes and not 100, 24 test images and not 10,000"}
    text = list(found.lines())
    assert text[0] == "1 of the 19 tasks of VTAB-1K are here, and 2 others"
    assert text[1].endswith("are another:") and text[2].startswith("  cifar: 3 classes")
    line = next(line for line in text if "patch_camelyon" in line)
    assert line.split() == ["patch_camelyon", "Specialized", "2", "32,768", "PatchCamelyon"]
    assert max(map(len, text)) <= 80


def test_a_subset_may_be_asked_for(mixed):
    assert [task.name for task in survey(mixed, ["discs"]).tasks] == ["discs"]
    with pytest.raises(RequestError, match="no task 'disc'"):
        survey(mixed, ["disc"])


def test_a_folder_without_tasks_is_refused(pictures):
    with pytest.raises(DataError, match=r"no folder with train800val200\.txt.*cifar.*bench accuracy"):
        survey(pictures)


def scored(task, method, share, suite=SUITE, seeds=3):
    rng = np.random.default_rng(len(task.name))
    right = rng.random((seeds, 50)) < share
    where = (task.name, task.group, method)
    return Outcome(*where, "", {}, None, tuple(range(seeds)), 3, (), {}, right_SN=right, suite=suite)


def report(outcomes):
    identity = build_backbone("toy").identity
    about = {"setting": {"backbone": identity.to_json()}}
    return Report({"grid": tuple(outcomes), "time": (), "shots": ()}, (), about)


def test_our_row_stands_beside_those_in_print_only_with_all_tasks():
    every = [scored(task, "losa", 0.8) for task in TASKS] + [scored(task, "last", 0.7) for task in TASKS[1:]]
    rows = own_rows(every)
    assert set(rows) == {"losa"}
    groups, tasks, seeds = rows["losa"]
    means = {
        name: np.mean([one.score for one in every if one.method == "losa" and one.group == name])
        for name in ("Natural", "Specialized", "Structured")
    }
    assert groups == pytest.approx(np.mean(list(means.values())))
    assert tasks == pytest.approx(np.mean([one.score for one in every[:19]]))
    assert seeds == 3 and groups != tasks
    text = "\n".join(published_lines(report(every)))
    assert f"losa{100 * groups:>24.1f}{100 * tasks:>8.1f}  here" in text
    assert "last   " not in text and "LAST" in text and "74.2" in text


def test_before_all_tasks_are_scored_there_is_no_row_of_ours():
    text = "\n".join(published_lines(report([scored(TASKS[0], "losa", 0.8)])))
    assert "no row" in text
    assert all(row.method in text for row in PUBLISHED)


def test_a_row_says_checkpoint_and_normalisation():
    identity = build_backbone("toy").identity
    assert checkpoint(identity).startswith(identity.architecture)
    half = {**identity.preprocess, "mean": [0.5] * 3, "std": [0.5] * 3}
    for tag, word in (("augreg_in21k", "AugReg"), ("orig_in21k", "original")):
        named = replace(identity, architecture=f"vit_base_patch16_224.{tag}", preprocess=half)
        assert checkpoint(named) == f"ViT-B/16 IN-21k {word}, mean 0.5, std 0.5"


def test_the_command_has_means_of_the_two_suites_apart(mixed, tmp_path, monkeypatch, capsys):
    make_task(mixed / "svhn", seed=3)
    tasks = [replace(task, classes=3, test=24) if task.name == "svhn" else task for task in vtab.TASKS]
    monkeypatch.setattr(vtab, "TASKS", tuple(tasks))
    words = ["bench", "vtab", mixed, "--methods", "ridge,ridge-last", "--backbone", "toy", "--reveal"]
    words += ["--out", tmp_path / "out", "--looks", tmp_path / "looks.jsonl", "--stores", tmp_path / "stores"]
    for more in ([], ["--json", "--quiet"]):
        monkeypatch.setattr("sys.argv", ["sidetune", *map(str, words + more)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        found = capsys.readouterr()
        if not more:
            assert "VTAB-1K: 2 tasks" in found.out and "others: 2 tasks" in found.out
            assert "in print, ViT-B/16 IN-21k" in found.out and "smallnorb_azi" in found.err
    fields = json.loads(found.out.splitlines()[-1])
    where = {one["where"] for one in fields["comparisons"]}
    assert {"mean of groups, VTAB-1K", "mean of tasks, others"} <= where
    assert len(fields["missing"]) == 17 and len(fields["published"]) == len(PUBLISHED)
