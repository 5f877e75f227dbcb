"""Write docs/api.md: what every public module exports, with the first line of each docstring.

Reads the source without importing it, so it runs where nothing is installed. `make docs`.
"""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["api_page"]

DOCS = Path(__file__).resolve().parent
SRC = DOCS.parent / "src" / "starflow2"


def _exports(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _first_line(node: ast.AST) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    lines = (ast.get_docstring(node) or "").splitlines() if isinstance(node, documented) else []
    return lines[0].replace("|", "\\|") if lines else ""


def api_page() -> str:
    """The page as Markdown."""
    page = ["# API", "", "Written by `make docs` from the source; the docstrings there say more.", ""]
    for path in sorted(SRC.rglob("*.py")):
        if path.name.startswith("_"):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        named = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        module = ".".join(path.relative_to(SRC.parent).with_suffix("").parts)
        page += [f"## `{module}`", "", _first_line(tree), ""]
        rows = [f"| `{name}` | {_first_line(named[name])} |" for name in _exports(tree) if name in named]
        page += ["| name | what you get |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(page)


if __name__ == "__main__":
    (DOCS / "api.md").write_text(api_page(), encoding="utf-8")
