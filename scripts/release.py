"""Build both wheels, check them, install them where nothing else is, and draw there what the checkout draws.

    python scripts/release.py dist        # `make release`; a minute, and the packages of constraints.txt from the index

The code is one wheel, the weights of nano another (packaging/nano). Both are checked by twine and check-wheel-contents,
installed into a fresh environment, and drawn with from a folder outside the checkout: the picture must have the same
pixels as the checkout's. Prints each wheel's size. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["build", "main"]

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 1_000_000  # of the wheel of code
DRAW = """
import hashlib, starflow2
from starflow2 import StarFlow2
drawing = StarFlow2.from_pretrained("nano").generate("two pink hearts", seed=0)[0]
print(starflow2.__file__)
print(hashlib.sha256(drawing.image.tobytes()).hexdigest())
"""


def build(source: Path, folder: Path) -> Path:
    """Build the wheel of the project in `source` and return its file in `folder`."""
    before = set(folder.glob("*.whl"))
    _run("uv", "build", "--wheel", "--out-dir", str(folder), str(source))
    (made,) = set(folder.glob("*.whl")) - before
    return made


def drawn(python: Path, folder: Path) -> tuple[str, str]:
    """Where that interpreter finds starflow2, and a digest of the picture it draws, started in `folder`."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    where, digest = _run(str(python), "-c", DRAW, cwd=folder, env=clean).split()
    return where, digest


def _run(*command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Output of a command. Raises SystemExit with what it printed if it fails."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _install(wheels: list[Path], folder: Path) -> Path:
    """Interpreter of a fresh environment in `folder` that holds the wheels and what they need."""
    _run(sys.executable, "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    pins = ["-c", str(ROOT / "constraints.txt")]
    _run("uv", "pip", "install", "--python", str(python), *pins, *map(str, wheels))
    return python


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go; must not hold any")
    folder = parser.parse_args(argv).folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.whl")):
        raise SystemExit(f"{folder} holds wheels; give an empty folder, so that none of them is from another commit.")
    code, weights = build(ROOT, folder), build(ROOT / "packaging" / "nano", folder)
    for wheel in (code, weights):
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")
    if code.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{code.name} has more than {MOST_BYTES:,} bytes; weights belong into packaging/nano.")
    _run("uvx", "twine", "check", "--strict", str(code), str(weights))
    _run("uvx", "check-wheel-contents", str(code), str(weights))
    with tempfile.TemporaryDirectory() as temp:
        python = _install([code, weights], Path(temp) / "venv")
        where, there = drawn(python, Path(temp))
        _, here = drawn(Path(sys.executable), ROOT)
    if not where.startswith(temp) or there != here:
        raise SystemExit(f"the installed package ({where}) drew {there}, the checkout {here}.")
    print(f"installed from both wheels elsewhere, it draws what the checkout draws: {here[:16]}")


if __name__ == "__main__":
    main()
