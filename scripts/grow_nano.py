"""Make the folder that recipe nano-grown or nano-final starts in: the shipped weights, with stages that are finished.

    python scripts/grow_nano.py runs/grown && starflow2 train nano-grown -o runs/grown
    python scripts/grow_nano.py runs/final nano-final && starflow2 train nano-final -o runs/final

The model of nano-grown learns the sentences of its self-check from stage vlm on, so they are written into its config.
For nano-final the shipped weights are kept as FOLDER/nano-heldout as well: after them nothing is held out any more.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from starflow2.core.serialize import to_dict
from starflow2.models.hub import NANO
from starflow2.training.recipes import find

KEPT = {  # stages that are not trained again, by recipe
    "nano-grown": ["features", "fae", "t2i"],
    "nano-final": ["features", "fae", "vlm", "t2i", "adapter", "joint"],
}


def main(folder: str, recipe: str = "nano-grown") -> None:
    """Write `folder`/model. Exits where there is one, and for another recipe."""
    target = Path(folder) / "model"
    if recipe not in KEPT:
        sys.exit(f"no way to start recipe {recipe!r}; expected {' or '.join(KEPT)}.")
    if target.exists():
        sys.exit(f"{target} exists; give the folder of a new run.")
    shutil.copytree(NANO, target)
    if recipe == "nano-final":
        _rename(shutil.copytree(NANO, target.parent / "nano-heldout"), "nano-heldout")
    config = json.loads((target / "config.json").read_text("utf-8"))
    config["stages"] = KEPT[recipe]
    config["model"]["far_nats"] = None  # measured anew when the run is over
    asked = find(recipe).model.self_check
    config["model"]["self_check"] = None if asked is None else to_dict(asked)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _rename(model: Path, name: str) -> None:
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["model"]["name"] = name
    (model / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
