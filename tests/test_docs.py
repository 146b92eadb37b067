"""What the documents say is what the code does."""

import json
import os
import re
import runpy
from pathlib import Path

import pytest

from docs_blocks import FIXTURES, Page, blocks, needs, real_leaves, with_toy

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
# The pages whose blocks a reader types; reference and explanation have none.
RUN = ["README.md", *(page for page in PAGES if re.match(r"docs/(tutorial|howto/)", page))]


@pytest.mark.parametrize("name", ["api", "cli", "errors", "folders", "recipe", "reliability"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    pages = runpy.run_path(str(ROOT / "scripts" / "reference.py"))["PAGES"]
    assert len(pages) == 6
    assert text_of(f"docs/reference/{name}.md") == pages[name](), "type: python scripts/reference.py"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to stand in, with its own stores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIDETUNE_STORES", str(tmp_path / ".sidetune" / "stores"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_every_block_of_a_page_runs(
    page: str, sandbox: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    text = text_of(page)
    for name in needs(text) or ["photos"]:
        FIXTURES[name](sandbox, image_folder)
    assert sum(1 for file in sandbox.rglob("*.jpg")) <= 60
    reader = Page(monkeypatch)
    assert reader.run(text, page) > 1
    if page == "README.md":
        assert "photos/class0/0000.png class" in reader.said[-1]


@pytest.mark.slow
def test_the_tutorial_runs_on_2000_photographs(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "SIDETUNE_TEST_DATA" not in os.environ:
        pytest.skip("SIDETUNE_TEST_DATA does not name the folder of real data")
    real_leaves(sandbox, Path(os.environ["SIDETUNE_TEST_DATA"]) / "vtab-mini" / "elpv")
    Page(monkeypatch, toy=False).run(text_of("docs/tutorial.md"), "docs/tutorial.md")
    metrics = json.loads((sandbox / "runs/leaves/metrics.json").read_text())
    counts = [metrics["data"][f"num_{name}"] for name in ("train", "val", "test")]
    assert sum(counts) == 2024
    ridge = next(row for row in metrics["rows"] if row["method"] == "ridge")
    assert ridge["test"]["scores"]["balanced_accuracy"] > 0.6, "the demo's own split gives 0.68 at 112 px"


@pytest.mark.parametrize("page", RUN)
def test_a_page_says_why_a_block_does_not_run(page: str) -> None:
    text = text_of(page)
    reasons = [block.not_run for block in blocks(text) if block.not_run]
    assert all(len(reason) > 10 for reason in reasons)
    assert text.count("<!-- not run") == len(reasons), "such a comment stands right above a block"


def test_blocks_are_found() -> None:
    page = (
        "# A\n\n    sidetune fit a \\\n      --out b\n\n    src/\n      tree\n\n```text\nsidetune no\n```\n"
        "1. one\n\n   ```sh\n   sidetune ls  # here\n   ```\n\n<!-- not run: it is a test -->\n"
        "```python\nx = 1\n```\n"
    )
    found = list(blocks(page))
    assert [(block.language, block.not_run) for block in found] == [
        ("sh", ""), ("sh", ""), ("python", "it is a test")
    ]  # fmt: skip
    assert [block.line for block in found] == [3, 14, 18]
    assert found[1].text == "sidetune ls  # here\n"
    assert with_toy(["extract", "a", "--size", "112"]) == [
        "extract",
        "a",
        "--size",
        "32",
        "--backbone",
        "toy",
    ]
    few = ["--set", "train.epochs=2"]
    assert with_toy(["fit", "--backbone", "demo"]) == ["fit", "--backbone", "toy", *few]
    own = ["fit", "a", "--backbone", "timm:x", "--weights", "w", "--set", "train.epochs=3"]
    assert with_toy(list(own)) == own
    assert with_toy(["predict", "a", "--size"]) == ["predict", "a", "--size"]
    with pytest.raises(AssertionError, match="say sh, python or text behind the fence"):
        list(blocks("```bash\nls\n```\n"))


def test_commands_that_documents_name_exist() -> None:
    from typer.main import get_command

    from sidetune.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"^(?: {4}|```sh\n)sidetune ([a-z]+)", page.read_text(encoding="utf-8"), re.M):
            assert name in known, (page, name)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", text_of("docs/README.md")))
    assert linked == {page.removeprefix("docs/") for page in PAGES} - {"README.md"}


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


def test_the_table_of_speed_is_what_the_result_lines_say() -> None:
    table = runpy.run_path(str(ROOT / "scripts" / "speed_results.py"))["table"]()
    assert table in (ROOT / "docs/explanation/speed.md").read_text(encoding="utf-8")


def test_the_table_of_cost_is_what_the_result_lines_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    table = runpy.run_path(str(ROOT / "scripts" / "cost_results.py"))["table"]()
    assert table in text_of("README.md")


def test_the_table_of_accuracy_is_what_the_result_lines_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = runpy.run_path(str(ROOT / "scripts" / "accuracy_results.py"))
    timed = script["read"](ROOT / "results" / "accuracy-time-112.jsonl")
    assert script["timed_table"](timed) in text_of("README.md")
    rows = script["read"](ROOT / script["OUT"])
    assert script["table"](rows) in text_of("README.md")


RESULTS = sorted(path for path in (ROOT / "results").glob("*.jsonl") if path.stem != "looks")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_line_says_where_it_comes_from(path: Path) -> None:
    fields = {"method", "task", "seed", "metric", "value", "command", "commit", "hardware", "recipe"}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        assert fields <= line.keys()
        assert len(line["commit"]) == 40 and len(line["recipe"]) == 64
        assert line["command"].startswith(
            ("sidetune fit ", "sidetune sweep ", "sidetune bench ", "python scripts/")
        )


def test_a_look_says_at_what_it_was() -> None:
    for line in map(json.loads, text_of("results/looks.jsonl").splitlines()):
        assert {"task", "test", "methods", "frozen"} <= line.keys()
        assert len(line["test"]) == 64 and line["methods"]
