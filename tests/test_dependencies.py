"""Dependencies of pyproject.toml: everything that is imported, each with a floor, each met by the pinned versions."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = ["", *PROJECT["optional-dependencies"]]
# Used where somebody has installed them: two pull torchvision in, which has to match torch, one is our own weights, one
# needs an environment of its own, and one is a peer that a bench measures.
NEVER_REQUIRED = {"lpips", "torch_fidelity", "starflow2_nano", "lmms_eval", "normflows"}


@cache
def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line.strip() and not line.startswith(("#", " "))]
    return {canonicalize_name(name): Version(version.split()[0]) for name, version in pairs}


def requirements(extra: str) -> list[Requirement]:
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return [Requirement(line) for line in lines]


def needed(found: list[Requirement], seen: set[str]) -> Iterator[Requirement]:
    """Requirements and all that they require in turn, of the installed packages."""
    for requirement in found:
        yield requirement
        name = canonicalize_name(requirement.name)
        key = f"{name}{sorted(requirement.extras)}"
        if key in seen:
            continue
        seen.add(key)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform, or an extra that nobody has to install
        below = [Requirement(line) for line in lines]
        yield from needed([r for r in below if applies(r, requirement.extras)], seen)


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_requirement_has_a_floor(extra):
    for requirement in requirements(extra):
        assert any(part.operator in (">=", "==") for part in requirement.specifier), f"{requirement} has no floor"


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_pinned_versions_meet_all_that_an_extra_requires(extra):
    wrong = []
    for requirement in needed([*requirements(""), *requirements(extra)], set()):
        version = pinned().get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement}, pinned {version}")
    assert not wrong


def test_every_pinned_package_has_its_hashes_but_the_builds_of_torch():
    text = (ROOT / "hashes.txt").read_text("utf-8")
    hashed = dict(re.findall(r"^([\w.-]+)==(\S+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", text, flags=re.MULTILINE))
    versions = {canonicalize_name(name): Version(version) for name, version in hashed.items()}
    tools = {"pip", "uv"}  # which install the others
    assert set(pinned()) - set(versions) == {"torch", *tools}
    assert all(versions[name] == version for name, version in pinned().items() if name in versions)


def imported() -> set[str]:
    """Packages that our source imports, other than the standard library's."""
    names = set()
    for path in (ROOT / "src").rglob("*.py"):
        source = path.read_text("utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
        names |= {name.split(".")[0] for name in re.findall(r'(?:needs|import_module|find_spec)\("([\w.]+)"\)', source)}
    return names - set(sys.stdlib_module_names) - {"starflow2"}


def test_every_package_that_is_imported_is_asked_for():
    asked = {canonicalize_name(r.name).replace("-", "_") for extra in EXTRAS for r in requirements(extra)}
    names = {{"PIL": "pillow"}.get(name, name) for name in imported()}
    assert names - asked == NEVER_REQUIRED & names


def test_what_is_pinned_is_installed_here():
    """Else these tests would look at other packages than a set-up gets."""
    installed = {canonicalize_name(name): metadata.version(name) for name in ("torch", "transformers", "pillow")}
    assert all(Version(version).public == pinned()[name].public for name, version in installed.items())
