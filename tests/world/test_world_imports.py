"""The drawn world is numpy and Pillow: only its detector may bring in torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from collections.abc import Iterable

from starflow2 import world


def loaded_by(modules: Iterable[str]) -> str:
    """Those of torch and transformers that a fresh interpreter has loaded after importing modules of the world."""
    lines = [f"import starflow2.world.{name}" for name in modules]
    lines += ["import sys", "print(*(name for name in ('torch', 'transformers') if name in sys.modules))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_only_the_detector_loads_torch_and_no_module_loads_transformers():
    modules = {module.name for module in pkgutil.iter_modules(world.__path__)}
    assert {"questions", "stories", "edits", "conversations", "multiple_choice", "detector"} <= modules
    assert loaded_by(sorted(modules - {"detector"})) == ""
    assert loaded_by(["detector"]) == "torch"
