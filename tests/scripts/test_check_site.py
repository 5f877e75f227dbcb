"""The check of the documentation site finds what leads nowhere and what comes from elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from check_site import faults, main

ROOT = Path(__file__).resolve().parent.parent.parent


def page(folder: Path, body: str, name: str = "index.html") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(f"<html><body>{body}</body></html>", encoding="utf-8")


def test_a_sound_site_has_no_faults(tmp_path: Path) -> None:
    page(tmp_path, '<a href="a/#top">a</a><a href="https://example.org">out</a><a href="#here">here</a><p id="here">')
    page(tmp_path, '<h1 id="top">a</h1><img src="../dot.png"><a href="..">back</a>', "a/index.html")
    (tmp_path / "dot.png").touch()
    assert list(faults(tmp_path)) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="b/">b</a>', "links to b/"),
        ('<a href="#gone">x</a>', "no such heading"),
        ('<img src="gone.png">', "gone.png"),
        ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn"),
        ('<link rel="stylesheet" href="//fonts.example.org/x.css">', "loads //fonts"),
    ],
)
def test_every_kind_of_fault_is_found(tmp_path: Path, body: str, fault: str) -> None:
    page(tmp_path, body)
    assert any(fault in line for line in faults(tmp_path))


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"index\.html"):
        main(str(tmp_path))


def test_doctests_become_blocks_without_flags() -> None:
    pytest.importorskip("griffe", reason="griffe is not installed; it comes with the docs extra")
    spec = importlib.util.spec_from_file_location("site_doctests", ROOT / "docs" / "site_doctests.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (
        module.fenced("Sum.\n\n>>> 1 + 1  # doctest: +SKIP\n2\n\nEnd.") == "Sum.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nEnd."
    )
