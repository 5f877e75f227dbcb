"""Files of results: JSON, and rows of long measurements, saved as they come."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starflow2.core.files import replacing
from starflow2.core.json_reader import JsonObject, parse_record
from starflow2.core.serialize import read_json
from starflow2.errors import ConfigError

__all__ = ["KeptRows", "commit", "write_json"]


def write_json(data: Mapping[str, object], path: str | Path) -> None:
    """Write a JSON file; an earlier file survives a failure. Raises OutputError."""
    with replacing(path) as temp:
        temp.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class KeptRows:
    """A JSON file with the rows of a long measurement, written after every row, so that a stopped one can continue.

    config: everything that the rows depend on, as JSON can hold it; a file with another config is never overwritten.
    """

    path: Path
    config: Mapping[str, object]

    def read(self) -> list[JsonObject]:
        """The rows of an earlier call, [] if there is no file. Raises ConfigError for a file with another config."""
        if not self.path.is_file():
            return []
        saved = read_json(self.path)
        if not isinstance(saved, dict) or saved.get("config") != parse_record(json.dumps(self.config)):
            raise ConfigError(
                f"{self.path} holds a comparison of another budget or model: give another --output, or move it away."
            )
        rows = saved.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ConfigError(f"{self.path} has no list of rows; expected what a comparison wrote: move it away.")
        return rows

    def write(self, rows: Iterable[Mapping[str, Any]], **more: object) -> None:
        """Write all rows so far, and more about them. Raises OutputError."""
        write_json({"config": dict(self.config), "rows": list(rows)} | more, self.path)


def commit() -> str:
    """The commit that this package runs from, with "+" if files were changed; "unknown" outside a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():  # installed: a checkout further up is someone else's
        return "unknown"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
