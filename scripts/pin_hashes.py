"""Write hashes.txt: the sha256 of all files of the packages that constraints.txt pins, as the package index has them.

`make pins` runs it after constraints.txt has changed. torch and what it brings for a GPU are left out: which of their
builds is installed depends on the machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_THE_MACHINE = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
HEAD = "# sha256 of the files of the packages in constraints.txt, written by `make pins`; `make setup` compares them.\n"


def compiled(uv: str) -> str:
    """All requirements of all extras with their hashes, as `uv pip compile` prints them."""
    wanted = ["pyproject.toml", "--all-extras", "-c", "constraints.txt"]
    how = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header", "-q"]
    return subprocess.run(
        [uv, "pip", "compile", *wanted, *how], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def packages(text: str) -> list[str]:
    """The blocks of the packages that are the same on every machine."""
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return [block for block in blocks if "==" in block and not OF_THE_MACHINE.match(block)]


def main(uv: str) -> None:
    (ROOT / "hashes.txt").write_text(HEAD + "".join(packages(compiled(uv))), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
