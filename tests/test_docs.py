"""What the documents say is what the code does."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_reference_is_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_blocks_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], image_folder: Path
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    shutil.copytree(image_folder, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        (tmp_path / "block.py").write_text(block)
        runpy.run_path(str(tmp_path / "block.py"))
    assert "photos/class0/0000.png class" in capsys.readouterr().out


def test_commands_that_documents_name_exist() -> None:
    from typer.main import get_command

    from sidetune.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"^ {4}sidetune ([a-z]+)", page.read_text(encoding="utf-8"), re.M):
            assert name in known, (page, name)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/explanation/design.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_files_that_the_map_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    drawn = re.search(r"^    src/sidetune/\n(.*?)\n\n", text, re.M | re.S)
    assert drawn
    for line in drawn[1].splitlines():
        inside = line.startswith("      ")
        for name in re.match(r"\s+((?:\S+ )*\S+)(?:  |$)", line)[1].split():  # type: ignore[index]
            assert (ROOT / "src/sidetune" / name if inside else ROOT / name).exists(), name


def test_the_readme_table_is_what_the_result_lines_say() -> None:
    table = runpy.run_path(str(ROOT / "scripts" / "results_table.py"))["table"]()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_a_result_line_says_where_it_comes_from(path: Path) -> None:
    fields = {"method", "task", "seed", "metric", "value", "command", "commit", "hardware", "recipe"}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        assert fields <= line.keys()
        assert len(line["commit"]) == 40 and len(line["recipe"]) == 64
        assert line["command"].startswith("sidetune fit ")
