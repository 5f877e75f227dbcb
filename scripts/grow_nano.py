"""Make the folder that recipe nano-grown starts in: the shipped weights, of which some stages count as finished.

    python scripts/grow_nano.py runs/nano && starflow2 train nano-grown -o runs/nano

The model learns the sentences of its self-check from stage vlm on, so they are written into its config, too.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from starflow2.core.serialize import to_dict
from starflow2.models.hub import NANO
from starflow2.training.recipes import nano

KEPT = ["features", "fae", "t2i"]  # stages that are not trained again


def main(folder: str) -> None:
    """Write `folder`/model. Exits where there is one."""
    target = Path(folder) / "model"
    if target.exists():
        sys.exit(f"{target} exists; give the folder of a new run.")
    shutil.copytree(NANO, target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    config["stages"] = KEPT
    config["model"]["far_nats"] = None  # measured anew when the run is over
    config["model"]["self_check"] = to_dict(nano().model.self_check)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
