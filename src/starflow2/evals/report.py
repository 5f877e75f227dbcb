"""Files of results: JSON, the ledger of test runs, and rows of long measurements, saved as they come."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starflow2.core.files import replacing
from starflow2.core.serialize import JsonObject, read_json
from starflow2.errors import ConfigError, OutputError

__all__ = ["KeptRows", "append_ledger", "commit", "write_json"]


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
        if not isinstance(saved, dict) or saved.get("config") != json.loads(json.dumps(self.config)):
            raise ConfigError(
                f"{self.path} holds a comparison of another budget or model: give another --output, or move it away."
            )
        return list(saved["rows"])

    def write(self, rows: Iterable[Mapping[str, Any]], **more: object) -> None:
        """Write all rows so far, and more about them. Raises OutputError."""
        write_json({"config": dict(self.config), "rows": list(rows)} | more, self.path)


def append_ledger(path: str | Path, record: Mapping[str, object]) -> None:
    """Add one line of JSON to a ledger. Raises OutputError."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise OutputError(f"cannot append to {path}: {error.strerror or error}.") from error


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
