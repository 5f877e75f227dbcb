"""What the package shows to the outside, and what looking at it costs."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import starflow2

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "numpy", "PIL", "rich")
SLOW = ("transformers", "huggingface_hub", "datasets", "torch._dynamo", "sympy")
USE = f"""
import sys
from starflow2 import StarFlow2
model = StarFlow2.from_pretrained("nano", device="cpu")
drawing = model.generate("two pink hearts", tries=1)[0]
model.ask(drawing.image, "how many hearts are there?")
print([name for name in {SLOW} if name in sys.modules])
"""
LOOK = f"import sys, starflow2; print([name for name in {HEAVY} if name in sys.modules])"


def test_the_export_list_is_what_we_promised():
    events = ["Drew", "Event", "Finished", "Made", "Started", "Wrote"]
    assert sorted(starflow2.__all__) == sorted(["StarFlow2", "Session", *events, "StarFlowError", "__version__"])
    assert starflow2.__version__ == "0.1.0"
    assert set(starflow2.__all__) <= set(dir(starflow2))


def test_importing_the_package_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nano_draws_and_answers_without_the_libraries_that_take_longest_to_import():
    """transformers takes twice as long as torch, the Hub's client half as long, torch's compiler as long as torch."""
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_is_found_where_it_lives():
    from starflow2 import Session, StarFlow2, Wrote
    from starflow2.inference import events, session
    from starflow2.pipeline import StarFlow2 as Pipeline

    assert (Session, Wrote, StarFlow2) == (session.Session, events.Wrote, Pipeline)
    assert all(getattr(starflow2, name) is not None for name in starflow2.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="StarFlow3"):
        _ = starflow2.StarFlow3


def test_what_is_installed_never_asks_for_torchvision():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    pinned = (ROOT / "constraints.txt").read_text().split()
    assert not [name for name in (*wanted, *pinned) if name.startswith(("torchvision", "timm", "lpips", "torch-fid"))]
    assert not [line for line in pinned if "+" in line], "a local build number would bind everybody to this machine"


def test_every_extra_has_code_that_imports_it():
    """Apart from `dev`, which the tests use, and `docs`, which builds the site.

    datasets reads the web with fsspec, FastAPI reads forms with python-multipart.
    """
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = {re.split(r"[\[>=]", need)[0] for name in set(extras) - {"dev", "docs"} for need in extras[name]}
    modules = {name.replace("-", "_") for name in named - {"fsspec", "python-multipart"}}
    assert not [name for name in modules if not re.search(rf"\b(import|from) [\w.]*{name}|\"{name}", source)]
