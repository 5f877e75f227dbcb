"""Where images begin that are unlike all that a model was trained on, measured on its own world.

Drawn scenes of every kind, and what files do to them (compression, another size and back, a little noise), have
densities close together; photographs, noise, other drawings and contact sheets lie far away. The limit is three times
as far from the median as the farthest drawn image. Our choice: docs/choices.md#images-from-elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from starflow2.core.images import read_picture, to_bytes, to_floats, to_pil
from starflow2.core.serialize import read_json, to_dict
from starflow2.evals.report import write_json
from starflow2.evals.suite import Images
from starflow2.models.config_file import FORMAT
from starflow2.pipeline import StarFlow2
from starflow2.world.captions import caption_task
from starflow2.world.dense_prompts import suite_dense
from starflow2.world.scene import Scene, render, stream
from starflow2.world.stories import suite_stories

__all__ = ["COUNT", "FarLimit", "far_limit", "keep_far_limit", "world_images"]

COUNT: Final = 48  # images of each kind
FACTOR: Final = 3.0  # distance of the limit from the median, in those of the farthest drawn image
SIZE: Final = 64


class Measured(Protocol):
    """A model that says how unlike its training an image is. `StarFlow2` is one."""

    def nats_of(self, images: Sequence[Any]) -> list[float]:
        """-log density in nats per dim of uint8 images (64, 64, 3)."""
        ...


@dataclass(frozen=True, slots=True)
class FarLimit:
    """A limit, and the largest and the median density of each kind of drawn image that it was measured on."""

    limit: float
    largest: Mapping[str, float]
    median: Mapping[str, float]


def far_limit(model: Measured, count: int = COUNT) -> FarLimit:
    """The limit of a model in nats per dim, from `count` drawn images of each kind."""
    found = {name: np.array(model.nats_of(list(images))) for name, images in world_images(count)}
    largest = {name: float(nats.max()) for name, nats in found.items()}
    median = {name: float(np.median(nats)) for name, nats in found.items()}
    everything = np.concatenate(list(found.values()))
    middle = float(np.median(everything))
    return FarLimit(middle + FACTOR * (float(everything.max()) - middle), largest, median)


def keep_far_limit(folder: Path, count: int = COUNT) -> FarLimit:
    """Measure the limit of a model folder and write it into its config.json, in today's format. Raises OutputError."""
    model = StarFlow2.from_pretrained(folder)
    found = far_limit(model, count)
    path = folder / "config.json"
    config, today = read_json(path), to_dict(replace(model.components.cfg, far_nats=round(found.limit, 3)))
    write_json(config | {"format": FORMAT, "model": today}, path)
    return found


# ------------------------------------------------------------------------------------------- the world


def world_images(count: int, seed: int = 7) -> Iterator[tuple[str, Images]]:
    """Drawn images by kind: captions, dense prompts, stories; and captions' as files may return them."""
    drawn = _rendered(caption_task(seed, i).scene for i in range(4 * count))
    yield "captions", drawn[:count]
    yield "dense prompts", _rendered(prompt.scene for prompt in suite_dense("dev")[:count])
    stories = suite_stories("dev", "id", max(1, count // 4))
    yield "stories", _rendered(step.scene for story in stories for step in story.steps)
    rng = stream(seed, count)
    yield "jpeg", np.stack([_jpeg(image) for image in drawn[count : 2 * count]])
    yield "other size", np.stack([_resized(image) for image in drawn[2 * count : 3 * count]])
    noisy = drawn[3 * count :] + rng.normal(0, 3, drawn[3 * count :].shape)
    yield "noise of 3 of 255", np.clip(noisy, 0, 255).astype(np.uint8)


def _rendered(scenes: Iterator[Scene]) -> Images:
    return np.stack([render(scene) for scene in scenes])


def _jpeg(image: Images) -> Images:
    file = io.BytesIO()
    to_pil(to_floats(image[None])[0]).save(file, "JPEG", quality=80)
    return to_bytes(read_picture(file.getvalue(), SIZE)[None])[0]


def _resized(image: Images) -> Images:
    """An image enlarged and brought back, as by a screenshot."""
    large = to_pil(to_floats(image[None])[0]).resize((160, 160))
    return to_bytes(read_picture(large, SIZE)[None])[0]
