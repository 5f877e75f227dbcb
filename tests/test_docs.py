"""The pages tell the truth: their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_example_of_the_flow_page_runs_in_twelve_lines():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "flows.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace("range(400)", "range(2)").replace("range(1000)", "range(3)"), names)
    assert tuple(names["samples"].shape) == (3, 2, 1)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_choice_that_the_source_points_at_is_written_down():
    """`docs/choices.md#skips` in a docstring is a promise that the page has a heading "Skips"."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "choices.md").read_text("utf-8"), re.MULTILINE)
    there = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/*.py")]
    asked = {name for path in sources for name in re.findall(r"choices\.md#([\w-]+)", path.read_text("utf-8"))}
    assert asked <= there


def test_the_example_in_the_readme_is_the_one_that_runs() -> None:
    page, readme = ((ROOT / name).read_text("utf-8") for name in ("docs/flows.md", "README.md"))
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code in readme
