"""Does understanding improve drawing? The claim that the paper makes and nobody has tested.

Two ways in which it could, each measured on the same prompts and seeds. The model's answers choose among its own
images: the confirmed one of several tries against the first. And its states reach the flow through the skips: open
against closed, with the same weights. Wins and losses are counted by prompt, and an exact sign test tells whether they
could be chance.

Letters: M prompts, S seeds of each, T tries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from starflow2.core.images import to_bytes
from starflow2.evals.geneval import GenevalSuite
from starflow2.evals.runner import ByteModel
from starflow2.evals.statistics import chunks
from starflow2.evals.suite import Images, Job, Progress
from starflow2.pipeline import StarFlow2
from starflow2.world.captions import CaptionedScene
from starflow2.world.detector import detect
from starflow2.world.scene import Split

__all__ = ["Comparison", "compared", "sign_test", "understanding_and_drawing"]

SAMPLES: Final = 2  # seeds of each prompt
Marks = NDArray[np.float64]
_Jobs = Sequence[Job[CaptionedScene]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Shares of right images of two arms on the same prompts; prompts on which either is better; p of a sign test."""

    name: str
    arms: tuple[str, str]
    shares: tuple[float, float]
    prompts: int
    wins: int
    losses: int
    p: float

    def to_json(self) -> dict[str, object]:
        """The comparison as JSON can hold it."""
        arms = dict(zip(self.arms, self.shares, strict=True))
        return {"name": self.name, "arms": arms, "prompts": self.prompts} | {
            "wins": self.wins,
            "losses": self.losses,
            "p": self.p,
        }


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of so many wins and losses if both were equally likely; ties are left out.

    >>> sign_test(5, 0), sign_test(3, 3), sign_test(0, 0)
    (0.0625, 1.0, 1.0)
    """
    count, least = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, k) for k in range(least + 1)) / 2**count
    return min(1.0, 2 * tail)


def compared(name: str, arms: tuple[str, str], marks: tuple[Marks, Marks]) -> Comparison:
    """The comparison of two arms by marks (M, S) of the same images."""
    one, other = (np.asarray(m, np.float64).mean(axis=1) for m in marks)
    wins, losses = int((one > other).sum()), int((one < other).sum())
    shares = (float(one.mean()), float(other.mean()))
    return Comparison(name, arms, shares, len(one), wins, losses, sign_test(wins, losses))


def understanding_and_drawing(
    model: StarFlow2, split: Split = "dev", *, quick: bool = False, progress: Progress | None = None
) -> list[Comparison]:
    """Comparisons on W-GenEval's ID and CG prompts: skips open and closed, self-check on and off.

    The second is left out for a model that has not learnt to check itself. Raises StateError for one that holds no
    conversations.
    """
    suite = GenevalSuite(samples=SAMPLES)
    parts = {part: suite.quick(items) if quick else items for part, items in suite.items(split).items()}
    jobs = [job for items in parts.values() for job in items]
    closed = StarFlow2(model.components, replace(model.settings, skips=()))
    check, arms = model.components.cfg.self_check, dict[str, Marks]()
    drawn = {"open": model, "closed": closed}
    total, done = len(jobs) * (len(drawn) + (check is not None)), 0
    for name, one in drawn.items():
        arms[name] = _marks(suite, jobs, [to_bytes(one.draw(*_asked(chunk))) for chunk in chunks(jobs, suite.chunk)])
        done += len(jobs)
        if progress:
            progress(done, total)
    found = [compared("skips", ("open", "closed"), (arms["open"], arms["closed"]))]
    if check is not None:
        confirmed = [_confirmed(ByteModel(model, check.tries), chunk) for chunk in chunks(jobs, suite.chunk)]
        marks = (_marks(suite, jobs, confirmed), arms["open"])
        found.append(compared("self-check", (f"confirmed of {check.tries}", "one try"), marks))
    return found


def _asked(jobs: _Jobs) -> tuple[list[str], list[int]]:
    return [job.task.prompt for job in jobs], [job.seed for job in jobs]


def _confirmed(model: ByteModel, jobs: _Jobs) -> Images:
    """The confirmed try of every job."""
    images, sure = model.draw_tries(*_asked(jobs))
    return np.asarray(images[np.arange(len(jobs)), sure.argmax(axis=1)])


def _marks(suite: GenevalSuite, jobs: _Jobs, images: Sequence[Images]) -> Marks:
    """(M, S): which images of each prompt are right by GenEval's rules; jobs of one prompt stand together."""
    return np.array(suite.are_right(jobs, detect(np.concatenate(images))), np.float64).reshape(-1, suite.samples)
