"""Pictures, replies and losses of one commit, to compare with another's: did a change of structure change behaviour?

Writes 12 pictures of single prompts, 12 edits, 8 stories with their words, and the losses of 20 smoke steps of every
stage of nano, in float32, as one .npz file. With --against it names whatever differs from such a file in a single bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from starflow2 import StarFlow2
from starflow2.training.loop import fit
from starflow2.training.recipes import nano, smoke

PROMPTS = (
    "a red cross",
    "two red hearts",
    "a small blue star",
    "three green squares",
    "a yellow ring left of a purple triangle",
    "a red square above a green circle",
    "four orange stars",
    "a large pink cross",
    "a blue heart and a yellow star",
    "a green ring below a red triangle",
    "two purple crosses",
    "a black circle right of a blue square",
)
EDITS = (
    "change the color of the red cross to blue",
    "put a small yellow circle in the upper left",
    "make the blue star large",
    "turn the background sky",
    "turn the purple triangle orange",
    "turn the circle into a square",
    "use a mint background",
    "move the cross to the upper right",
    "erase the blue heart",
    "make the green ring yellow",
    "place a small orange heart in the lower left",
    "paint the background sky",
)
STORIES = (
    (
        "please start with a red cross.",
        "now add a large yellow diamond right of the cross.",
        "is the diamond left of the cross?",
    ),
    (
        "first draw a blue square.",
        "please make the square pink.",
        "to its right put a small green heart.",
        "is there a blue square?",
    ),
    (
        "first draw a small black cross.",
        "below it put a yellow square.",
    ),
    (
        "start with a small red star.",
        "now make the star blue.",
        "what color is the star?",
    ),
    (
        "please start with a large orange cross.",
        "put a small green circle to its left.",
    ),
    (
        "please start with a purple triangle.",
        "now make it orange.",
        "now put a pink ring right of the triangle.",
    ),
    (
        "please start with a red triangle.",
        "add a blue ring to its left.",
    ),
    (
        "please start with a green ring.",
        "above it put an orange diamond.",
        "how many objects are there now?",
    ),
)


def arrays(model: StarFlow2, folder: Path, steps: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Everything that is compared, by name."""
    singles = [model.generate(prompt, seed=i)[0].image for i, prompt in enumerate(PROMPTS)]
    for i, (image, instruction) in enumerate(zip(singles, EDITS, strict=True)):
        yield f"single-{i}", np.asarray(image)
        yield f"edit-{i}", np.asarray(model.edit(image, instruction, seed=i).image)
    for i, story in enumerate(STORIES):
        yield from _story(model, story, i)
    yield from _losses(folder, steps)


def _story(model: StarFlow2, story: tuple[str, ...], seed: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    session = model.session(seed=seed)
    for turn, request in enumerate(story):
        events = list(session.add(request).run())
        words = "".join(e.text for e in events if hasattr(e, "text"))
        yield f"story-{seed}-{turn}-words", np.array(words)
        for k, event in enumerate(e for e in events if hasattr(e, "image")):
            yield f"story-{seed}-{turn}-picture-{k}", np.asarray(event.image)


def _losses(folder: Path, steps: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    recipe = replace(smoke(nano()), precision="float32")
    stages = tuple(replace(stage, steps=steps, log_every=1, save_every=steps) for stage in recipe.stages)
    recipe = replace(recipe, stages=stages)
    for stage in recipe.stages:
        fit(recipe, stage.name, folder)
        lines = map(json.loads, (folder / f"metrics-{stage.name}.jsonl").read_text(encoding="utf-8").splitlines())
        yield f"loss-{stage.name}", np.array([line["loss"] for line in lines if "loss" in line])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help=".npz file to write")
    parser.add_argument("--against", type=Path, help="an earlier such file")
    parser.add_argument("--steps", type=int, default=20, help="of every stage")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = dict(arrays(StarFlow2.from_pretrained("nano"), Path(folder), args.steps))
    np.savez(args.output, **found)  # type: ignore[arg-type]
    print(f"{len(found)} arrays in {args.output}")
    if args.against:
        before = np.load(args.against)
        names = sorted({*before.files, *found})
        differ = [
            n for n in names if n not in found or n not in before.files or not np.array_equal(before[n], found[n])
        ]
        print(f"{len(names) - len(differ)} of {len(names)} equal to the bit; differ: {', '.join(differ) or 'none'}")


if __name__ == "__main__":
    main()
