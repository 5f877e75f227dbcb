"""Measure whether a model knows which object an edit means, which it does long before its images show it.

    PYTHONPATH=src python scripts/binding.py runs/nano/model --items 40

Edits of the dev split that name one of several objects. The edited image is predicted without sight of its own
latents. Each prediction is projected onto the change from the source to the source with one object edited: 1 if that
object is edited in the prediction, 0 if it is left alone. Printed for the object that was named and for the others,
with the share of pairs in which the named one has the larger value (AUC; 0.5: the model does not know which one is
meant).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
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
MOVED = 0.25  # mean square over channels above which an object's change affects a latent
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


Predict = Callable[[Components, Sequence[Edit]], tuple[Tensor, Tensor]]


def predicted(components: Components, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Latents (B, N, D) of the sources, and the predicted latents of the targets without sight of them."""
    batch = pack([components.tokenizer.document(edit_dialogue(e).turns) for e in edits], components.layout)
    latents = encode(components, [scene for e in edits for scene in (e.source, e.target)])
    blind = batch.pictures.is_target
    level = torch.where(blind, torch.tensor(LEVEL), torch.tensor(CLEAN))
    noisy = add_noise(latents, level, torch.Generator().manual_seed(0))
    mean = read_documents(components.pretzel, batch, noisy, level, blind).affine.mu[blind]
    return latents[~blind], components.flow.shallow.inverse(mean, level[blind])


def projections(
    components: Components, edits: Sequence[Edit], predict: Predict = predicted, moved: float = MOVED
) -> Iterator[tuple[bool, float]]:
    """For every object of every edit: whether it was named, and how much of its change the prediction contains."""
    for first in range(0, len(edits), BATCH):
        batch = edits[first : first + BATCH]
        for edit, source, found in zip(batch, *predict(components, batch), strict=True):
            for index in range(len(edit.source.objects)):
                change = encode(components, [changed(edit, index)])[0] - source
                change = change * (change.square().mean(-1, keepdim=True) > moved)
                if change.any():
                    yield index == edit.before, float(((found - source) * change).sum() / change.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--items", type=int, default=40, help="edits of each operation; those with a single object are left out"
    )
    args = parser.parse_args()
    components = load_components(args.model, "cpu")
    edits = [e for e in suite_edits("dev", "id", args.items) if len(e.source.objects) > 1]
    with torch.no_grad():
        for operation in OPERATIONS:
            values = list(projections(components, [e for e in edits if e.operation == operation]))
            named, others = ([value for is_named, value in values if is_named == which] for which in (True, False))
            ahead = np.mean([a > b for a in named for b in others])
            print(f"{operation}: named {np.mean(named):.3f}, others {np.mean(others):.3f}, AUC {ahead:.3f}")


if __name__ == "__main__":
    main()
