"""Who may import whom. Reads the source as a syntax tree, so that imports inside functions count too."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src" / "starflow2"

# What each wing may import, beside itself. A wing is a module or package directly under src/starflow2.
BASE = ("errors", "core", "nn", "flow", "models")
MAY: dict[str, tuple[str, ...]] = {
    "errors": (),
    "core": ("errors",),
    "nn": ("errors", "core"),
    "flow": ("errors", "core", "nn"),  # the standalone library ends here
    "models": ("errors", "core", "nn", "flow"),
    "inference": BASE,
    "pipeline": (*BASE, "inference"),
    "hf": (*BASE, "inference", "pipeline"),  # imported by users only
    "data": BASE,
    "world": ("errors", "core", "data"),
    "evals": (*BASE, "data", "world"),
    "benchmarks": (*BASE, "inference", "pipeline", "data", "world", "evals"),
    "training": (*BASE, "data", "world"),  # never inference
    "selfcheck": (*BASE, "inference", "pipeline", "data", "world"),
    "research": (*BASE, "inference", "pipeline", "data", "world", "evals", "training"),
    "serving": (*BASE, "inference", "pipeline", "world"),
    "cli": (
        *(*BASE, "inference", "pipeline", "data", "world", "evals", "benchmarks", "training", "selfcheck"),
        *("research", "serving"),
    ),
    "__main__": ("cli",),
}

# What only some wings, or single modules of them, may import.
HOMES = {
    "torch": {*MAY, "world/detector"} - {"errors", "world", "__main__"},
    "transformers": {"models", "hf"},
    "PIL": {"core", "data", "world", "research/plots"},
    "torch.distributed": {"training"},
    "fastapi": {"serving"},
    "torchvision": set(),
}

# The standalone flow library: these and the standard library, nothing else.
FLOW_MAY = {
    "torch",
    "numpy",
    "starflow2.flow",
    "starflow2.nn",
    "starflow2.core.tiles",
    "starflow2.core.fields",
    "starflow2.core.serialize",
    "starflow2.errors",
}


@dataclass(frozen=True)
class Import:
    """One imported dotted name and where it stands."""

    home: str  # "flow" for src/starflow2/flow/block.py
    name: str  # "starflow2.nn.Cache" or "torch"
    where: str

    @property
    def target(self) -> str:
        """The part of this package it comes from: "nn" for starflow2.nn.Cache, "" for other packages."""
        parts = self.name.split(".")
        return parts[1] if parts[0] == "starflow2" and len(parts) > 1 else ""


@pytest.fixture(scope="module", autouse=True)
def _forget_the_trees() -> Iterator[None]:
    """Gives back the hundred megabytes that the syntax trees of the whole package take."""
    yield
    tree_of.cache_clear()
    all_imports.cache_clear()


@cache
def sources() -> tuple[Path, ...]:
    return tuple(sorted(path for path in SRC.rglob("*.py") if "assets" not in path.parts))


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file, parsed once for all tests."""
    return ast.parse(path.read_text("utf-8"))


def home_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports_in(tree: ast.AST, path: Path) -> Iterator[Import]:
    package = ("starflow2", *path.relative_to(SRC).parts[:-1])
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):  # torch.distributed.init_process_group() needs no import of its own
            names = [name for name in HOMES if name.endswith(f".{node.attr}") and ast.unparse(node) == name]
        for name in names:
            yield Import(home_of(path), name, f"{path.relative_to(SRC)}:{node.lineno} imports {name}")


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for path in sources() for found in imports_in(tree_of(path), path))


def wrong_direction(found: Import) -> bool:
    if not found.target or found.home in ("__init__", found.target):  # the package's face is lazy, tested elsewhere
        return False
    if found.target in ("__version__", "__init__"):
        return False
    return found.target not in MAY.get(found.home, ())


def away_from_home(found: Import) -> bool:
    places = {found.home, found.where.split(".py:")[0]}
    return any((found.name + ".").startswith(name + ".") and not places & homes for name, homes in HOMES.items())


def beyond_the_flow(found: Import) -> bool:
    if found.home != "flow" or found.name.split(".")[0] in sys.stdlib_module_names:
        return False
    return not any((found.name + ".").startswith(name + ".") for name in FLOW_MAY)


def test_every_module_has_a_wing():
    homes = {home_of(path) for path in sources()} - {"__init__"}
    assert homes == set(MAY), "the table above lists every wing and nothing else"


def test_the_wings_stand_in_an_order_without_circles():
    seen: set[str] = set()
    for wing, below in MAY.items():
        assert seen >= set(below), f"{wing} stands in the table before what it imports"
        seen.add(wing)


def test_wings_import_only_what_the_table_lets_them():
    assert not [found.where for found in all_imports() if wrong_direction(found)]


def test_big_dependencies_are_imported_at_home_only():
    assert not [found.where for found in all_imports() if away_from_home(found)]


def test_the_flow_library_stands_alone():
    assert not [found.where for found in all_imports() if beyond_the_flow(found)]


@pytest.mark.parametrize(
    ("path", "code", "rule"),
    [
        ("nn.py", "from starflow2.flow import Flow", wrong_direction),
        ("nn.py", "from starflow2 import flow", wrong_direction),
        ("nn.py", "from .models import fae", wrong_direction),
        ("flow/block.py", "def f():\n    from ..models.fae import Fae", wrong_direction),
        ("training/losses.py", "import starflow2.inference.session", wrong_direction),
        ("world/scene.py", "import torch", away_from_home),
        ("flow/model.py", "from transformers import AutoModel", away_from_home),
        ("cli/app.py", "from PIL import Image", away_from_home),
        ("nn.py", "from torch import distributed as dist", away_from_home),
        ("nn.py", "import torch\ntorch.distributed.barrier()", away_from_home),
        ("flow/solver.py", "import einops", beyond_the_flow),
        ("flow/solver.py", "from starflow2.core.images import to_pil", beyond_the_flow),
    ],
)
def test_the_rules_above_catch_what_they_are_for(path, code, rule):
    assert any(rule(found) for found in imports_in(ast.parse(code), SRC / path))


def test_the_rules_above_let_the_right_ones_pass():
    code = "import math\nimport torch\nfrom starflow2 import nn\nfrom .affine import Affine\nfrom ..errors import X"
    for found in imports_in(ast.parse(code), SRC / "flow" / "block.py"):
        assert not wrong_direction(found) and not away_from_home(found) and not beyond_the_flow(found)


def exports(path: Path) -> list[str] | None:
    """The names in a module's __all__, None if it has none."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            (target,) = node.targets if isinstance(node, ast.Assign) else [node.target]
            if ast.unparse(target) == "__all__":
                return list(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SRC)))
def test_every_public_module_says_what_it_is_and_what_it_exports(path):
    assert ast.get_docstring(tree_of(path)), "no module docstring"
    assert path.stem.startswith("_") or exports(path) is not None, "no __all__"


def test_a_name_that_another_module_imports_is_exported_and_has_no_underscore():
    wrong = []
    for path in sources():
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("starflow2"):
                continue
            base = SRC.parent.joinpath(*str(node.module).split("."))
            home = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            modules = {file.stem for file in base.glob("*")} if base.is_dir() else set()
            names = {alias.name for alias in node.names} - modules - set(exports(home) or ())
            wrong += [f"{path.relative_to(SRC)} imports {name} of {node.module}" for name in sorted(names)]
    assert wrong == []


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))


def called(call: ast.Call) -> str:
    """The name of the function that is called, "json.loads"; of a method of an expression its own name: ".strip"."""
    parts, node = [], call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id if isinstance(node, ast.Name) else ""]))


def test_json_is_read_by_one_reader():
    readers = {"json.loads", "json.load", "loads"}
    found = {path.relative_to(SRC).as_posix() for path in sources() for c in calls(path) if called(c) in readers}
    assert found == {"core/json_reader.py"}


def has_no_encoding(call: ast.Call) -> bool:
    """True for a call that reads or writes text in the encoding that the machine happens to have."""
    name = called(call).rpartition(".")[2]
    before = {"read_text": 0, "write_text": 1, "open": 3}.get(name)
    modes = [m.value for m in (*call.args, *(k.value for k in call.keywords)) if isinstance(m, ast.Constant)]
    is_binary = name == "open" and any(isinstance(mode, str) and "b" in mode for mode in modes)
    is_of_files = name != "open" or called(call) in ("open", "path.open", "log.open", "self.path.open")
    named = any(keyword.arg == "encoding" for keyword in call.keywords)
    return before is not None and is_of_files and not (is_binary or named or len(call.args) > before)


def test_text_is_read_and_written_in_utf_8():
    scripts = sorted((SRC.parents[1] / "scripts").glob("*.py"))
    found = [f"{path.name}:{c.lineno}" for path in (*sources(), *scripts) for c in calls(path) if has_no_encoding(c)]
    assert found == []


def test_torchvision_is_absent_or_works():
    """One that does not match torch makes transformers fail at import, with a message about something else."""
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("torchvision")


def test_words_and_openings_that_the_house_does_not_use():
    """The figures of `scripts/house.py` that have to stay 0, and those that have a bound."""
    root = Path(__file__).resolve().parent.parent
    path = root / "scripts" / "house.py"
    spec = importlib.util.spec_from_file_location("house", path)
    assert spec is not None and spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    found = house.figures(root)
    assert found["dialect as names"] == 0
    assert found["docstrings that open with The same, What, As, Of"] == 0
    assert (
        found["rooms in circles"] == 0 and found["files over 650 lines"] == 0 and found["functions over 60 lines"] == 0
    )
    assert found["modules at top level"] <= 7 and found["floors"] <= 10
    assert found["assert ... is not None"] <= 10 and found["dict[str, Any]"] <= 40
