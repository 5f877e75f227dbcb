"""Contact sheets of drawings, edits and stories: the first items of the dev suites, none selected.

Those of edits and stories are laid out like the paper's figure 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from starflow2.core.images import PILImage, contact_sheet, save_png, to_pil
from starflow2.pipeline import StarFlow2
from starflow2.training.datasets import to_images
from starflow2.world.captions import suite_drawings
from starflow2.world.edits import suite_edits
from starflow2.world.stories import suite_stories

__all__ = ["drawing_sheet", "edit_sheet", "story_sheet"]

SPLIT: Final = "dev"
BLANK = torch.ones(3, 64, 64)


def drawing_sheet(model: StarFlow2, path: str | Path, per_category: int = 4) -> None:
    """Write a PNG of the first prompts of every category, one try each."""
    prompts = [drawing.prompt for drawing in suite_drawings("geneval", SPLIT, "id", per_category)]
    images = [model.generate(prompt, seed=i, tries=1)[0].image for i, prompt in enumerate(prompts)]
    save_png(contact_sheet(images, prompts, columns=6), path, {"model": model.components.cfg.name, "split": SPLIT})


def edit_sheet(model: StarFlow2, path: str | Path, per_operation: int = 2) -> None:
    """Write a PNG of the first edits of every operation: source, result and target side by side."""
    edits = suite_edits(SPLIT, "id", per_operation)
    sources, targets = (to_images([getattr(e, name) for e in edits]) for name in ("source", "target"))
    results = model.edits(sources, [e.instruction for e in edits], list(range(len(edits))))
    images: list[PILImage] = []
    labels: list[str] = []
    for i, edit in enumerate(edits):
        images += [to_pil(t[i]) for t in (sources, results, targets)]
        labels += [f"{edit.operation}: the source", edit.instruction, "what was meant"]
    save_png(contact_sheet(images, labels, columns=6), path, {"model": model.components.cfg.name, "split": SPLIT})


def story_sheet(model: StarFlow2, path: str | Path, stories: int = 4) -> None:
    """Write a PNG of the first stories, one per row: each step's image with request and reply, then the question."""
    suite = suite_stories(SPLIT, "id", stories)
    talks = [[*(step.instruction for step in story.steps), story.question] for story in suite]
    stories_replies = model.tell(talks, list(range(len(suite))))
    images: list[PILImage | None] = []
    labels: list[str] = []
    for story, requests, replies in zip(suite, talks, stories_replies, strict=True):
        for request, blocks in zip(requests[:-1], replies[:-1], strict=True):
            images.append(to_pil(_picture(blocks)))
            labels.append(f"{request} / {_words(blocks)}")
        images.append(None)
        labels.append(f"{requests[-1]} / {_words(replies[-1])} (right: {story.answer})")
    save_png(contact_sheet(images, labels, columns=5), path, {"model": model.components.cfg.name, "split": SPLIT})


def _picture(blocks: list[str | Tensor]) -> Tensor:
    """The first image of a reply, a white one if there is none."""
    return next((b for b in blocks if isinstance(b, Tensor)), BLANK)


def _words(blocks: list[str | Tensor]) -> str:
    return " ".join(b for b in blocks if isinstance(b, str)) or "(nothing said)"
