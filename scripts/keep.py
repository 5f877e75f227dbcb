"""Weights that must outlive a machine before they are shipped: kept in half precision, put back into a model folder.

    python scripts/keep.py keep runs/n2/model weights/nano-understanding.safetensors
    python scripts/keep.py restore weights/nano-understanding.safetensors runs/next/model

Keeps the language model and the joints (stages vlm and adapter); FAE, features and flow come from the shipped nano,
whose flow then has to learn to read the new language model (stage t2i).
"""

from __future__ import annotations

import sys
from pathlib import Path

from starflow2.checkpoint import load_parts, load_tensors, save_parts, save_tensors
from starflow2.data.edits import edit_words
from starflow2.data.stories import story_words
from starflow2.data.understanding import understanding_words
from starflow2.model import NANO

KEPT = ("vlm.", "joints.")


def keep(folder: Path, file: Path) -> None:
    """Write the kept part of a model folder, float16."""
    state = load_parts(folder).state_dict()
    tensors = {name: value.half() for name, value in state.items() if name.startswith(KEPT)}
    save_tensors(tensors, file, {"stages": "features fae vlm adapter"})


def restore(file: Path, folder: Path) -> None:
    """A model folder of the shipped nano with the kept part in place of its own."""
    parts = load_parts(NANO)
    missing, unknown = parts.load_state_dict({k: v.float() for k, v in load_tensors(file).items()}, strict=False)
    wrong = [name for name in missing if name.startswith(KEPT) and "lm_head" not in name] + list(unknown)
    if wrong:
        sys.exit(f"{file} does not fit: {wrong[:3]}")
    parts.lexicon = understanding_words() | edit_words() | story_words()
    parts.stages = ("features", "fae", "vlm")
    save_parts(parts, folder)


if __name__ == "__main__":
    job, source, target = sys.argv[1:]
    {"keep": keep, "restore": restore}[job](Path(source), Path(target))
