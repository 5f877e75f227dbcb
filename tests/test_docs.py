"""The pages tell the truth: their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from page_references import broken_commands, broken_references

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# the log tells what was called how when it was written; api.md is there after `make docs`, which copies docstrings
TRUE_TODAY = [page for page in PAGES if page.name not in ("LOG.md", "api.md")]


def test_the_example_of_the_flow_page_runs_in_twelve_lines():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed; it comes with the dev extra")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "flows.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("steps=800", "steps=3"), names)
    assert tuple(names["samples"].shape) == (20, 8, 8) and tuple(names["nats"].shape) == (10, 360)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 12


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page is called."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text("utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


def test_every_page_stands_in_the_menu_of_the_site():
    menu = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]["nav"]
    listed = set(re.findall(r"'([\w-]+\.md)'", repr(menu)))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"api.md"} | {"reference.md"}


@pytest.mark.parametrize("page", TRUE_TODAY, ids=lambda page: page.name)
def test_every_file_function_and_class_that_a_page_names_exists(page):
    assert broken_references(page.read_text("utf-8")) == []


@pytest.mark.parametrize("page", TRUE_TODAY, ids=lambda page: page.name)
def test_every_command_line_on_a_page_is_one_that_the_program_takes(page):
    assert broken_commands(page.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "reference",
    [
        "`starflow2.models.modality`",
        "`stages.dropped`",
        "`flow/affine.py:Affine.guided`",
        "`losses.py:ngp_loss`",
        "`Affine.guided`",
        "`session.redo()`",
        "`Parts`",
        "\n```python\nfrom starflow2.data.shards import Share\n```\n",
        "\n```python\nprint(model.parts)\n```\n",
        "`tests/test_flow_exact.py`",
    ],
)
def test_a_name_that_does_not_exist_is_found(reference):
    assert broken_references(f"see {reference}") and not broken_commands(f"see {reference}")


@pytest.mark.parametrize(
    "reference",
    [
        "`starflow2.flow.Flow`",
        "`flow/affine.py:Affine.guide`",
        "`training/losses.py:ngp_loss`",
        "`losses.ngp_loss`",
        "`Affine.guide(unconditional, 2)`",
        "`session.draw()`",
        "`StageConfig.text_weight`",
        "`flow.deep`",
        "`model/config.json`",
        "`torch.load(path)`",
    ],
)
def test_a_name_that_exists_is_not_complained_about(reference):
    assert broken_references(f"see {reference}") == []


@pytest.mark.parametrize(
    ("page", "is_true"),
    [
        ("```bash\nstarflow2 train nano --stage joint --optim.lr 3e-4  # a comment\n```", True),
        ("```bash\nstarflow2 train nano --stage joint --optim.rate 3e-4\n```", False),
        ("```bash\nOMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m starflow2 train nano\n```", True),
        ("```\nstarflow2 draw x\n```", False),
        ("```bash\nstarflow2 generate x -n three\n```", False),
        ("`starflow2 info RECIPE --gpus N` plans it", True),
        ("`starflow2 info RECIPE --gpu N` plans it", False),
        ("`--optim.states 8bit`", False),
    ],
)
def test_command_lines_are_checked_with_their_options(page, is_true):
    assert (broken_commands(page) == []) == is_true


def test_every_choice_that_the_source_points_at_is_written_down():
    """`docs/choices.md#skips` in a docstring is a promise that the page has a heading "Skips"."""
    there = anchors(ROOT / "docs" / "choices.md")
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py")]
    asked = {name for path in sources for name in re.findall(r"choices\.md#([\w-]+)", path.read_text("utf-8"))}
    assert asked <= there


def test_the_example_in_the_readme_is_the_one_that_runs() -> None:
    page, readme = ((ROOT / name).read_text("utf-8") for name in ("docs/flows.md", "README.md"))
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code in readme


def test_every_make_target_on_a_page_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in TRUE_TODAY:
        named = re.findall(r"(?:^|`)make ([a-z]+)\b", page.read_text("utf-8"), re.MULTILINE)
        assert set(named) <= targets, page.name


def test_the_tree_of_the_package_is_the_same_on_both_pages_and_names_every_wing() -> None:
    (tree,) = re.findall(
        r"```text\n(src/starflow2/\n.*?)```", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.DOTALL
    )
    assert tree in (ROOT / "README.md").read_text("utf-8")
    wings = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:]}
    folders = {path.parent.name for path in ROOT.glob("src/starflow2/*/__init__.py")}
    assert wings == (folders - {"core"}) | {"pipeline.py"}, "core and the single modules stand in the text below"


def test_the_readme_shows_how_it_works_before_how_good_it_is() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert (
        readme.index("```python")
        < readme.index("architecture.svg")
        < readme.index("src/starflow2/\n")
        < readme.index("| W-")
    )


def test_the_page_for_users_of_other_libraries_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "coming-from.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and (tmp_path / "hearts.png").exists()
    assert "two" in names["answer"] and any(not isinstance(part, str) for part in names["parts"])
    assert {type(event).__name__ for event in names["made"]} == {"Token", "Completed"}
