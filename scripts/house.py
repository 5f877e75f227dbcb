"""Figures of the package's structure: rooms, floors, arrows, sizes of files and functions, words that say nothing.

A room is a module or package directly under src/starflow2; an arrow is an import from one room into another, inside
functions too; a floor is one step of the longest chain of arrows. Reads source as text and runs nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

DIALECT = ("told", "taken", "heard", "said")
OPENINGS = ("The same", "What", "As", "Of")


def figures(root: Path) -> dict[str, int | float | str]:
    """All figures of the checkout at `root`, by name."""
    src, tests = root / "src" / "starflow2", root / "tests"
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(src.rglob("*.py"))}
    sizes = sorted(_lengths(trees.values()))
    text = "\n".join(path.read_text("utf-8") for path in trees)
    rooms = {_room(path, src) for path in trees} - {"__init__"}
    arrows = {(a, b) for path, tree in trees.items() for a, b in _arrows(path, tree, src, rooms)}
    return {
        "modules at top level": sum(path.parent == src for path in trees),
        "rooms": len(rooms),
        "arrows": len(arrows),
        "floors": _floors(rooms, arrows),
        "rooms in circles": len(_circles(rooms, arrows)),
        "files over 650 lines": sum(len(path.read_text("utf-8").splitlines()) > 650 for path in trees),
        "lines": text.count("\n"),
        "functions": len(sizes),
        "function lines, median": sizes[len(sizes) // 2],
        "function lines, 90th percentile": sizes[int(0.9 * len(sizes))],
        "functions over 60 lines": sum(size > 60 for size in sizes),
        "dict[str, Any]": text.count("dict[str, Any]"),
        "assert ... is not None": len(re.findall(r"^\s*assert .*is not None", text, re.M)),
        "dialect as names": sum(name in DIALECT for tree in trees.values() for name in _bound(tree)),
        "docstrings that open with " + ", ".join(OPENINGS): sum(map(_opens_badly, trees.values())),
        "monkeypatch.setattr": sum(p.read_text("utf-8").count("monkeypatch.setattr") for p in tests.rglob("*.py")),
    }


def _room(path: Path, src: Path) -> str:
    return path.relative_to(src).parts[0].removesuffix(".py")


def _arrows(path: Path, tree: ast.Module, src: Path, rooms: set[str]) -> Iterator[tuple[str, str]]:
    home = _room(path, src)
    if home == "__init__":
        return
    for name in _imported(tree):
        target = name.split(".")[1] if name.startswith("starflow2.") else ""
        if target in rooms and target != home:
            yield home, target


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _floors(rooms: set[str], arrows: set[tuple[str, str]]) -> int:
    """Rooms on the longest chain of imports; rooms of a circle are not counted twice."""
    height = dict.fromkeys(rooms, 1)
    for _ in rooms:
        for a, b in arrows:
            height[a] = max(height[a], min(len(rooms), height[b] + 1))
    return max(height.values())


def _circles(rooms: set[str], arrows: set[tuple[str, str]]) -> set[str]:
    """Rooms that reach themselves."""
    reach = {room: {b for a, b in arrows if a == room} for room in rooms}
    for _ in rooms:
        reach = {room: seen | {far for near in seen for far in reach[near]} for room, seen in reach.items()}
    return {room for room in rooms if room in reach[room]}


def _lengths(trees: object) -> Iterator[int]:
    for tree in trees:  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1


def _bound(tree: ast.Module) -> Iterator[str]:
    """Every name that a module binds: assignments, arguments, functions, fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def _opens_badly(tree: ast.Module) -> int:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return sum(any(re.match(rf"{word}\b", doc) for word in OPENINGS) for doc in docs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("roots", type=Path, nargs="*", default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--json", action="store_true", help="one object a checkout instead of a table")
    args = parser.parse_args()
    found = [figures(root) for root in args.roots]
    if args.json:
        print("\n".join(map(json.dumps, found)))
        return
    for name in found[0]:
        print(f"{name:60}", *(f"{figure[name]:>8}" for figure in found))


if __name__ == "__main__":
    main()
