"""core/places, core/imports: what holds no data is neither listed nor read, and foreign code cannot end a command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from starflow2.core.files import check_regular
from starflow2.core.images import read_picture
from starflow2.core.imports import find_object
from starflow2.core.places import check_walk, is_of_the_system
from starflow2.core.text import read_text
from starflow2.data.shards import Samples
from starflow2.errors import ConfigError, DataError

linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="this system shows nothing of itself there")


@pytest.mark.parametrize(
    "place",
    [
        "/proc",
        "/proc/",
        "/proc/**",
        "/proc/*/status",
        "/proc/self/status",
        "/sys/**/*.tar",
        "/dev",
        "/dev/zero",
        "/",
        "/**",
        "/*/**/x.tar",
        "/*/*/*.png",
        "//proc/**",
        "/tmp/../proc/**",
        "/dev/[sn]*",
        "/**/[[]x]",
    ],
)
def test_the_system_and_the_whole_disk_are_refused_before_anything_is_listed(place: str) -> None:
    with pytest.raises(DataError, match=r"url is '.*(itself|whole disk); expected the folder or the files"):
        check_walk(place, "url", DataError)
    with pytest.raises(DataError, match=r"url is '.*(itself|whole disk); expected the folder or the files"):
        Samples(place)


@pytest.mark.parametrize("place", ["file:///proc/**", "local:///sys/*/x.tar", "simplecache::file:///**"])
def test_an_address_of_the_own_disk_is_refused_as_its_name_would_be(place: str) -> None:
    with pytest.raises(DataError, match="expected the folder or the files"):
        Samples(place)


def test_a_link_is_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    (tmp_path / "root").symlink_to("/")
    for place in (tmp_path / "link", tmp_path / "link" / "*", tmp_path / "root", tmp_path / "root" / "**"):
        with pytest.raises(DataError, match="expected the folder or the files"):
            check_walk(place, "url", DataError)


@pytest.mark.parametrize("place", ["/dev/shm/**", "/data/**", "/*.tar", "/data[0-3]/*.tar", "/process/**", "a\0b", ""])
def test_other_places_may_be_listed(place: str) -> None:
    check_walk(place, "url", DataError)


def test_a_folder_whose_escaped_name_has_signs_of_patterns_is_that_folder(tmp_path: Path) -> None:
    check_walk(f"{tmp_path}/dir [[]x]/**", "url", DataError)
    check_walk("/dir [[]x]/**", "url", DataError)


@linux
def test_what_looks_like_a_file_of_the_system_is_read_by_no_door(tmp_path: Path) -> None:
    name = "/proc/self/status"
    (tmp_path / "a.png").symlink_to(name)
    assert is_of_the_system(name) and is_of_the_system(tmp_path / "a.png")
    with pytest.raises(OSError, match="file of the system"):
        check_regular(name)
    for read in (read_text, lambda path: read_picture(path, 32)):
        with pytest.raises(DataError, match="no regular file"):
            read(tmp_path / "a.png")
    (sample,) = Samples(str(tmp_path))
    assert "file of the system" in sample.damage


# -- modules of users


MODULES = {
    "import sys\nsys.exit(3)": r"calls sys\.exit\(3\) at .*mine\.py:2; let it return or raise",
    "raise SystemExit": r"calls sys\.exit\(None\) at .*mine\.py:1",
    "import os\nos.abort_now()": r"has no attribute 'abort_now' at .*mine\.py:2\.",
    "1 / 0": r"ZeroDivisionError: division by zero at .*mine\.py:1\.",
    "def (": r"SyntaxError: .*mine\.py",
    "import no_such_package": r"No module named 'no_such_package' at .*mine\.py:1\.",
    "pass": r"cannot use 'mine:thing' as a recipe: module 'mine' has no attribute 'thing'\.",
}


@pytest.mark.parametrize("source", MODULES)
def test_a_module_that_fails_or_exits_is_refused_by_file_and_line(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(source, encoding="utf-8")
    sys.modules.pop("mine", None)
    with pytest.raises(ConfigError, match=MODULES[source]) as caught:
        find_object("mine:thing", "a recipe")
    assert "\n" not in str(caught.value) and os.getcwd() not in sys.path


@pytest.mark.parametrize("name", ["", ":", "mine", ".:x", "..:x", "\0:x", "a b:c", "mine:\ud800"])
def test_a_name_of_no_object_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot use"):
        find_object(name, "a recipe")
