"""Text chunks by which an image file says how it was made.

Not here: writing the file (`images.save_png`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import starflow2

__all__ = ["png_text"]


def png_text(prompt: str, seed: int, settings: Mapping[str, Any]) -> dict[str, str]:
    """Text chunks that every PNG file carries; `settings` includes the model's name."""
    about = {"settings": json.dumps(settings), "model": str(settings["model"]), "version": starflow2.__version__}
    return {"prompt": prompt, "seed": str(seed), **about}
