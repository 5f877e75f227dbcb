"""Sheets of edits and stories as the paper's figure 5 shows them: what was asked, what came, nothing picked.

Not here: scores (evals) and the demo's page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from starflow2.core.images import PILImage, contact_sheet, save_png, to_pil
from starflow2.pipeline import StarFlow2
from starflow2.training.datasets import to_images
from starflow2.world.edits import suite_edits
from starflow2.world.stories import suite_stories

__all__ = ["edit_sheet", "story_sheet"]

SPLIT: Final = "dev"
BLANK = torch.ones(3, 64, 64)


def edit_sheet(model: StarFlow2, path: str | Path, per_operation: int = 2) -> None:
    """The first edits of every operation: source, result and what was meant, side by side."""
    edits = suite_edits(SPLIT, "id", per_operation)
    sources, targets = (to_images([getattr(e, name) for e in edits]) for name in ("source", "target"))
    made = model.edits(sources, [e.instruction for e in edits], list(range(len(edits))))
    images: list[PILImage] = []
    labels: list[str] = []
    for i, edit in enumerate(edits):
        images += [to_pil(t[i]) for t in (sources, made, targets)]
        labels += [edit.operation, edit.instruction, "what was meant"]
    save_png(contact_sheet(images, labels, columns=6), path, {"model": model.components.cfg.name, "split": SPLIT})


def story_sheet(model: StarFlow2, path: str | Path, stories: int = 4) -> None:
    """The first stories, one per row: every step's picture with what was asked and told, then question and answer."""
    suite = suite_stories(SPLIT, "id", stories)
    talks = [[*(step.instruction for step in story.steps), story.question] for story in suite]
    told = model.tell(talks, list(range(len(suite))))
    images: list[PILImage] = []
    labels: list[str] = []
    for story, asked, replies in zip(suite, talks, told, strict=True):
        for words, blocks in zip(asked[:-1], replies[:-1], strict=True):
            images.append(to_pil(_picture(blocks)))
            labels.append(f"{words} / {_words(blocks)}")
        images.append(to_pil(BLANK))
        labels.append(f"{asked[-1]} / {_words(replies[-1])} (right: {story.answer})")
    save_png(contact_sheet(images, labels, columns=5), path, {"model": model.components.cfg.name, "split": SPLIT})


def _picture(blocks: list[str | Tensor]) -> Tensor:
    """The first picture of a reply, a blank page where there is none."""
    return next((b for b in blocks if isinstance(b, Tensor)), BLANK)


def _words(blocks: list[str | Tensor]) -> str:
    return " ".join(b for b in blocks if isinstance(b, str)) or "(nothing said)"
