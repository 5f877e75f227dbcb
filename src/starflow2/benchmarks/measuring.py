"""All that can be measured of a model of the drawn world without a judge, a download or anybody's data.

Quick runs of the world's suites on the dev split, the codec's round trip, and the density of images, each into a file
of its own that a report reads. Not here: the page (`report`), and the suites' rules (`evals`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from starflow2.benchmarks.likelihood import score_density
from starflow2.core.json_reader import JsonObject
from starflow2.core.serialize import to_dict
from starflow2.errors import PromptError, StateError
from starflow2.evals.codec import codec_pictures, evaluate_codec
from starflow2.evals.report import write_json
from starflow2.evals.runner import score_suite
from starflow2.models.checkpoint import weights_digest
from starflow2.pipeline import StarFlow2
from starflow2.world.scene import IMAGE_SIZE

__all__ = ["DRAWING", "TALKING", "Measured", "measure"]

DRAWING: Final = ("geneval", "dpg", "newcomers")  # suites that need no more than stage t2i
TALKING: Final = ("mme", "gqa", "mcq", "edit", "sessions", "story")  # those that need stage joint
IMAGES: Final = 64  # of the codec and of the density

Measurement = Callable[[], JsonObject]


@dataclass(slots=True)
class Measured:
    """Files of results, and what was left out with the reason: suites in words that the model never learnt."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def measure(model: StarFlow2, folder: Path, watch: Callable[[str], None] | None = None) -> Measured:
    """Write results below folder/measured, a subfolder for each model's weights; those that are there are kept.

    Suites are run at one try, one item in eight. watch: called with the name of each measurement that begins. Raises
    StateError for a model that cannot draw, or whose images are not those of the drawn world; OutputError.
    """
    components = model.components
    size = components.cfg.fae.image_size
    if size != IMAGE_SIZE or "t2i" not in components.finished_stages:
        done = ", ".join(components.finished_stages) or "none"
        raise StateError(
            f"measuring needs stage t2i and images of {IMAGE_SIZE} pixels a side; {components.cfg.name} has finished "
            f"{done} and draws {size}. Give the files that eval --json writes for each benchmark."
        )
    found, place = Measured(), folder / "measured" / weights_digest(components)
    for name, run in _measurements(model):
        path = place / f"{name}.json"
        try:
            if not path.is_file():
                if watch is not None:
                    watch(name)
                write_json(run(), path)
            found.files.append(path)
        except PromptError as error:
            found.left_out[name] = str(error)
    return found


def _measurements(model: StarFlow2) -> Iterator[tuple[str, Measurement]]:
    """Names of what can be measured of a model, and functions that do it."""
    for suite in (*DRAWING, *(TALKING if model.is_joint else ())):
        yield f"world-{suite}", partial(_suite, model, suite)
    if find_spec("torchmetrics") is not None and model.components.codec.image_size == IMAGE_SIZE:
        yield "codec", partial(_codec, model)
    yield "likelihood", partial(_density, model)


def _suite(model: StarFlow2, suite: str) -> JsonObject:
    report = score_suite(model, suite, "dev", quick=True)
    components = model.components
    return replace(report, model=components.cfg.name, weights=weights_digest(components)).to_json()


def _codec(model: StarFlow2) -> JsonObject:
    components = model.components
    images = codec_pictures(None, IMAGE_SIZE, "dev", IMAGES).to(components.device)
    report = evaluate_codec(components.codec, components.codec.extractor, images)
    return to_dict(replace(report, model=components.cfg.name))


def _density(model: StarFlow2) -> JsonObject:
    return score_density(model, codec_pictures(None, IMAGE_SIZE, "dev", IMAGES)).to_json()
