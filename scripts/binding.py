"""How well a model knows which object an edit means, long before its pictures show it.

    PYTHONPATH=src python scripts/binding.py runs/nano/model --items 40

Edits of the dev split that name one of several objects. The edited picture is predicted without sight of its own
latents, and the prediction is projected on the way from the source to the source with one object changed as told: 1 if
that object is changed in the prediction, 0 if it is left alone. Told for the object that was named and for the others,
with the share of pairs in which the named one is ahead (AUC; 0.5 = it is not known which one is meant).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from starflow2.flow.noise import add_noise
from starflow2.models.checkpoint import load_components
from starflow2.models.components import Components
from starflow2.models.joint_stream import read_documents
from starflow2.models.sequence import pack
from starflow2.training.datasets import to_images
from starflow2.world.edits import Edit, edit_dialogue, suite_edits
from starflow2.world.scene import Scene

OPERATIONS = ("remove", "recolor", "reshape")  # a change of one object that could be done to any other
MOVED = 0.25  # mean square over channels of a latent that an object's change concerns
LEVEL, CLEAN, BATCH = 0.3, 0.01, 16


def changed(edit: Edit, index: int) -> Scene:
    """The source with object `index` changed as the edit changes the one that it names."""
    things = list(edit.source.objects)
    if edit.operation == "remove":
        del things[index]
    else:
        assert edit.after is not None
        name, goal = "color" if edit.operation == "recolor" else "shape", edit.target.objects[edit.after]
        things[index] = replace(things[index], **{name: getattr(goal, name)})
    return replace(edit.source, objects=tuple(things))


def encode(components: Components, scenes: Sequence[Scene]) -> Tensor:
    return components.codec.encode(to_images(list(scenes))).float()


def predicted(components: Components, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Latents (B, N, D) of the sources, and of what comes of them without sight of what came."""
    batch = pack([components.tokenizer.document(edit_dialogue(e).turns) for e in edits], components.layout)
    latents = encode(components, [scene for e in edits for scene in (e.source, e.target)])
    blind = batch.pictures.is_target
    level = torch.where(blind, torch.tensor(LEVEL), torch.tensor(CLEAN))
    noisy = add_noise(latents, level, torch.Generator().manual_seed(0))
    mean = read_documents(components.pretzel, batch, noisy, level, blind).affine.mu[blind]
    return latents[~blind], components.flow.shallow.inverse(mean, level[blind])


def ways(components: Components, edits: Sequence[Edit]) -> Iterator[tuple[bool, float]]:
    """Of every object of every edit: whether it was named, and how far the prediction went to change it."""
    for first in range(0, len(edits), BATCH):
        some = edits[first : first + BATCH]
        for edit, source, found in zip(some, *predicted(components, some), strict=True):
            for index in range(len(edit.source.objects)):
                way = encode(components, [changed(edit, index)])[0] - source
                way = way * (way.square().mean(-1, keepdim=True) > MOVED)
                if way.any():
                    yield index == edit.before, float(((found - source) * way).sum() / way.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--items", type=int, default=40, help="edits of each operation, those of a single object left out"
    )
    asked = parser.parse_args()
    components = load_components(asked.model, "cpu")
    every = [e for e in suite_edits("dev", "id", asked.items) if len(e.source.objects) > 1]
    with torch.no_grad():
        for operation in OPERATIONS:
            told = list(ways(components, [e for e in every if e.operation == operation]))
            named, others = ([way for is_named, way in told if is_named == which] for which in (True, False))
            ahead = np.mean([a > b for a in named for b in others])
            print(f"{operation}: named {np.mean(named):.3f}, others {np.mean(others):.3f}, AUC {ahead:.3f}")


if __name__ == "__main__":
    main()
