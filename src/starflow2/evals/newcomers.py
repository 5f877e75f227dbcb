"""A newcomer's first prompts at the default settings: how often the image is exactly what was said.

Unlike W-GenEval this has no held-out part, as nobody who types holds anything out, and one rule: the asked objects, as
asked, on the asked background, and nothing else. A prompt that the model refuses counts as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from starflow2.evals.statistics import Row, Scored, quick_share, score_rows
from starflow2.evals.suite import (
    IMAGES_AT_ONCE,
    Graded,
    Images,
    Job,
    Runs,
    Section,
    checked_images,
    digest,
    graded,
    jobs,
)
from starflow2.evals.twins import twins_of_100
from starflow2.world.content import shows
from starflow2.world.detector import Scan, detect
from starflow2.world.newcomers import FIRST_PROMPTS, FirstPrompt
from starflow2.world.scene import BACKGROUNDS, Scene, Split

__all__ = ["SAMPLES", "NewcomersSuite", "is_right"]

SAMPLES: Final = 8  # images of each prompt, from the seeds that users start with: 0, 1, ...
DEV_SEED: Final = 1000  # first seed of split "dev", which no one who types begins with
TINT: Final = 0.04  # distance of a background's colour, on [0, 1]
Known = Callable[[list[str], list[int]], Images]  # prompts, seeds -> (n, 64, 64, 3); plain white where it is refused

_Items = Sequence[Job[FirstPrompt]]


def is_right(prompt: FirstPrompt, scan: Scan) -> bool:
    """True if an image shows exactly what a prompt says."""
    content = prompt.content
    objects = tuple(found.as_object for found in scan.detections)
    scene = Scene(objects=objects, background=content.background or 0)
    has_tint = content.background is None or _tint_gap(content.background, scan) < TINT
    return not scan.unknown and has_tint and bool(objects) and shows(scene, content)


def _tint_gap(background: int, scan: Scan) -> float:
    """Distance of an image's background from one of the world's, on [0, 1]."""
    return float(np.linalg.norm(BACKGROUNDS[background] / 255 - np.array(scan.background)))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewcomersSuite:
    """FIRST_PROMPTS, each with several seeds. Scores a `Known`. samples: images of each prompt.

    Column: right, the share of right images; also twins (`twins`). Kinds are the prompts.
    """

    samples: int = SAMPLES
    name: ClassVar[str] = "newcomers"
    chunk: ClassVar[int] = IMAGES_AT_ONCE

    def items(self, split: Split) -> Mapping[str, _Items]:
        first = 0 if split == "test" else DEV_SEED
        made = jobs(FIRST_PROMPTS, first, self.samples, stride=0)
        return {"id": made}

    def quick(self, items: _Items) -> _Items:
        """One image of each prompt."""
        return quick_share(items, stratum=lambda job: job.index, unit=lambda job: (job.index, job.seed))

    def run(self, known: Known, items: _Items) -> list[Scan]:
        images = known([job.task.text for job in items], [job.seed for job in items])
        return detect(checked_images(images, len(items)))

    def grade(self, runs: Runs[Job[FirstPrompt], Scan]) -> Graded:
        """The share of right images, resampled over prompts."""
        return graded({part: _score(pairs) for part, pairs in runs.items()}, settings={"samples": self.samples})

    def are_right(self, items: _Items, outputs: Sequence[Scan]) -> list[bool]:
        return [is_right(job.task, scan) for job, scan in zip(items, outputs, strict=True)]

    def unit(self, item: Job[FirstPrompt]) -> tuple[str, str]:
        return item.task.text, item.task.text

    def without_controls(self) -> NewcomersSuite:
        return self

    def lock(self) -> Section:
        items = digest((prompt.text, repr(prompt.content)) for prompt in FIRST_PROMPTS)
        return {"newcomers": {"samples": SAMPLES, "items": items}}


def _score(pairs: Sequence[tuple[Job[FirstPrompt], Scan]]) -> Scored:
    rows = [Row(job.task.text, job.task.text, (is_right(job.task, scan),)) for job, scan in pairs]
    scored = score_rows(rows, ("right",), np.random.default_rng(0), "plain")
    asked = [([group.shape for group in job.task.content.slots], scan) for job, scan in pairs]
    return replace(scored, scores=scored.scores.with_columns(twins=twins_of_100(asked)))
