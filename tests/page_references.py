"""References in Markdown pages: code that they name, and command lines that they show."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from starflow2.cli.app import COMMANDS, command, split_verb
from starflow2.cli.parsing import flags, parse
from starflow2.errors import ConfigError, UsageError
from starflow2.training.recipes import nano

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "starflow2"
FOLDERS = (ROOT, SRC, ROOT / "tests", ROOT / "docs")  # that paths in pages start from

# Names that pages use for objects, and their classes.
OBJECTS = {
    "batch": "starflow2.models.sequence.Batch",
    "batches": "starflow2.data.mixture.Batches",
    "block": "starflow2.flow.AffineBlock",
    "components": "starflow2.models.components.Components",
    "drawing": "starflow2.pipeline.Drawing",
    "flow": "starflow2.flow.Flow",
    "made": "starflow2.inference.events.Made",
    "model": "starflow2.pipeline.StarFlow2",
    "session": "starflow2.inference.session.Session",
}
# What pages name of other packages: everything of some, and single names.
FOREIGN = {"json", "sklearn", "torch", "torchao", "transformers"}
FOREIGN_NAMES = {"Any", "Path", "nn.Module", "Task2.Caption"}
FOREIGN_NAMES |= {"datasets/download_images.py", "models/MiniGPT-5/dataloader.py", "map_openimage_url_to_local.py"}
SUFFIXES = (".bin", ".html", ".json", ".jsonl", ".jpg", ".lock", ".md", ".npz", ".png", ".pth", ".safetensors", ".tar")
SUFFIXES += (".csv", ".txt", ".toml", ".yml", ".parquet", ".xml", ".ipynb", ".cff")
OTHER_OPTIONS = {"--options", "--nproc-per-node", "--nnodes", "--torch-backend"}  # of other programs


# -- code -------------------------------------------------------------------------------------------------------------


def inline_code(page: str) -> list[str]:
    """What stands between backticks in the running text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))


def fenced_lines(page: str, *languages: str) -> Iterator[str]:
    """Lines of code blocks in one of the languages."""
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language in languages:
            yield from code.splitlines()


def broken_references(page: str) -> list[str]:
    """Code references of a page that lead nowhere: files, file.py:names, dotted names and names of classes."""
    names = {name for name in re.findall(r"\bstarflow2(?:\.\w+)+", page) if not name.endswith((".cli", ".md"))}
    broken = [name for name in names if not name.endswith(SUFFIXES) and not _resolves(name)]
    for code in inline_code(page):
        if (reference := _without_call(code)) is not None and not _leads_somewhere(reference):
            broken.append(code)
    broken += [name for name in _names_in_examples(page) if not _leads_somewhere(name)]
    return sorted(broken)


def _names_in_examples(page: str) -> Iterator[str]:
    """Dotted names in the page's Python: what it imports of ours, and attributes of the objects named above."""
    for node in ast.walk(ast.parse("\n".join(fenced_lines(page, "python")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("starflow2"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and re.fullmatch(rf"({'|'.join(OBJECTS)})(\.\w+)+", ast.unparse(node)):
            yield ast.unparse(node)


def _without_call(code: str) -> str | None:
    """A reference without its arguments; None for anything that is no path, no dotted name and no class."""
    name = re.sub(r"\(.*\)$", "", code.strip())
    is_reference = re.fullmatch(r"[\w/.-]+\.py(:[\w.]+)?|\w+(\.\w+)+|[A-Z]\w*[a-z]\w*", name)
    return name if is_reference and not re.fullmatch(r"[\d.]+\w*", name) else None


def _leads_somewhere(name: str) -> bool:
    if name in FOREIGN_NAMES:
        return True
    path, _, inside = name.partition(":")
    if path.endswith(".py"):
        tests = list((ROOT / "tests").rglob(path)) if path.startswith("test_") else []
        return any(_in_file(file, inside) for file in (*tests, *(folder / path for folder in FOLDERS)))
    first, _, rest = name.partition(".")
    if not rest:
        return name in _classes() or hasattr(builtins, name)
    if name.endswith(SUFFIXES) or first in FOREIGN:
        return True
    starts = [OBJECTS[first]] if first in OBJECTS else []
    starts += [
        *(["starflow2"] if first == "starflow2" else []),
        f"starflow2.{first}",
        *_modules().get(first, ()),
        *_classes().get(first, ()),
    ]
    return any(_resolves(f"{start}.{rest}") for start in starts)


def _in_file(path: Path, inside: str) -> bool:
    """True if the file is there and defines `inside`, such as Class.method."""
    if not path.is_file():
        return False
    scope: Any = ast.parse(path.read_text("utf-8"))
    for name in filter(None, inside.split(".")):
        scope = next((node for node in scope.body if name in _bound(node)), None)
        if scope is None:
            return False
    return True


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _resolves(dotted: str) -> bool:
    """True if a dotted name leads to a module, an object in it, or a field of a class in it."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return _has(found, parts[cut:])
    return False


def _has(found: Any, names: list[str]) -> bool:
    for name in names:
        fields = {field.name for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
        if name in fields or name in getattr(found, "__slots__", ()):
            return True
        if isinstance(found, type) and not hasattr(found, name):
            return name in _attributes(found)
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def _attributes(kind: type[Any]) -> set[str]:
    """Attributes that the source of a class gives to self."""
    module = importlib.import_module(kind.__module__)
    source = Path(str(module.__file__)).read_text("utf-8")
    body = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == kind.__name__)
    return {n.attr for n in ast.walk(body) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"}


@cache
def _modules() -> dict[str, list[str]]:
    """Dotted names of modules by their last word: "losses" -> starflow2.training.losses."""
    found: dict[str, list[str]] = {}
    for path in SRC.rglob("*.py"):
        parts = path.relative_to(SRC.parent).with_suffix("").parts
        found.setdefault(parts[-1], []).append(".".join(parts))
    return found


@cache
def _classes() -> dict[str, list[str]]:
    """Dotted names of classes, type aliases and constants by their name."""
    found: dict[str, list[str]] = {}
    for path in SRC.rglob("*.py"):
        module = ".".join(path.relative_to(SRC.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text("utf-8")).body:
            for name in _bound(node):
                found.setdefault(name, []).append(f"{module}.{name}")
    return found


# -- command lines ----------------------------------------------------------------------------------------------------


def broken_commands(page: str) -> list[str]:
    """Command lines of a page that the program would refuse, or that name options it does not have."""
    shown = [line for line in fenced_lines(page, "", "bash", "sh", "console") if _arguments(line) is not None]
    broken = [line for line in shown if not _is_accepted(_arguments(line) or [])]
    inline = [code for code in inline_code(page) if _arguments(code) is not None]
    broken += [code for code in inline if not _has_known_options(_arguments(code) or [])]
    options = {option for code in inline_code(page) for option in re.findall(r"(?:^|\s)(--[a-z][\w.-]*)", code)}
    return broken + sorted(options - OTHER_OPTIONS - _all_options())


def _arguments(line: str) -> list[str] | None:
    """What follows the program in a command line, None if it calls another program."""
    match = re.match(r"(?:\w+=\S+ +)*(?:.*\| *|torchrun .*-m +|python -m +|time +)?starflow2 +(\S.*)", line.strip())
    if match is None or line.strip().startswith(("import", "from")):
        return None
    return shlex.split(re.split(r" [|>] ", match[1])[0], comments=True)


def _is_accepted(arguments: list[str]) -> bool:
    if "..." in arguments or arguments[0].startswith("-"):
        return True
    if not _has_known_options(arguments):
        return False
    verb, rest = split_verb(arguments)
    words = [word for word in rest if word not in ("-h", "--help")]
    if words != rest and verb != "train":
        return True
    try:
        _, unknown = parse(command(verb), words, "starflow2")
        if verb == "train" and unknown:
            _, unknown = parse(type(_stage()), unknown, "starflow2", _stage(), ("name",))
    except ConfigError:  # a setting that only the recipe on the page can have
        return True
    except UsageError:
        return False
    return not unknown


def _has_known_options(arguments: list[str]) -> bool:
    verb, rest = split_verb(arguments)
    if verb in ("--help", "--version", "COMMAND"):
        return True
    if verb not in COMMANDS:
        return False
    known = {*flags(command(verb)), "--help", *(_stage_options() if verb == "train" else ())}
    return all(word.split("=")[0].replace("_", "-") in known for word in rest if word.startswith("--"))


def _all_options() -> set[str]:
    """Options of any verb and of the stages, and those of the test suite and the scripts."""
    own = {flag for verb in COMMANDS for flag in flags(command(verb))}
    sources = [*ROOT.glob("scripts/*.py"), ROOT / "tests" / "conftest.py"]
    others = {name for path in sources for name in re.findall(r'"(--[a-z-]+)"', path.read_text("utf-8"))}
    return own | _stage_options() | others | {"--help", "--version"}


def _stage_options() -> set[str]:
    return set(flags(type(_stage()), _stage(), ("name",)))


@cache
def _stage() -> Any:
    """A stage whose settings `train --stage` makes options."""
    return nano().stage("joint")
