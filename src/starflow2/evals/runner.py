"""Every suite of the drawn world, run on a model by name. Models speak tensors, suites bytes; here they meet.

It knows no model class: a `Talker` is whatever has these members, as `StarFlow2` does.
Letters: B pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from starflow2.core.images import to_bytes, to_floats
from starflow2.errors import ConfigError, nearest
from starflow2.evals.dpg import evaluate_dpg, roundtrip_ceiling
from starflow2.evals.edit import evaluate_edit, evaluate_edit_sessions
from starflow2.evals.gqa import evaluate_gqa
from starflow2.evals.mcq import evaluate_mcq
from starflow2.evals.mme import evaluate_mme
from starflow2.evals.story import evaluate_story, story_ceiling
from starflow2.evals.world import Drawer, score_geneval
from starflow2.world.scene import Split
from starflow2.world.stories import Story

__all__ = ["Suite", "Talker", "score_suite"]

Suite = Literal["geneval", "dpg", "mme", "gqa", "mcq", "edit", "sessions", "story"]
Images = NDArray[np.uint8]
Progress = Callable[[int, int], None]
Report = dict[str, Any]


class Conversation(Protocol):
    """What a session with one user offers, as `Session` does."""

    def add(self, *parts: Any) -> Conversation: ...

    def draw(self) -> Any:
        """Something whose `picture.image` is (3, 64, 64) in [-1, 1]."""
        ...

    def mark(self) -> Any: ...

    def rewind(self, mark: Any) -> None: ...


class Talker(Drawer, Protocol):
    """What can be scored on all of them. Pictures are (3, 64, 64) in [-1, 1]."""

    def answers(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> list[str]:
        """One answer per (pictures, question)."""
        ...

    def answers_after(
        self, pasts: Sequence[Sequence[tuple[Sequence[str | Tensor], Sequence[str | Tensor]]]], questions: Sequence[str]
    ) -> list[str]:
        """One answer per question, each after turns that are over: (what the user said, what was replied)."""
        ...

    def tower_answers(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        """The same of one picture each, from the language model alone, through its own vision tower."""
        ...

    def edits(self, images: Tensor, instructions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Every picture changed as told."""
        ...

    def session(self, *, seed: int = 0) -> Any:
        """A new `Conversation`."""
        ...

    def tell(self, talks: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[list[list[str | Tensor]]]:
        """What is replied to every turn of every talk: words and pictures in order."""
        ...


@dataclass(frozen=True, slots=True)
class _Run:
    """One suite run on one model."""

    model: Talker
    split: Split
    quick: bool
    progress: Progress | None
    noises: Iterator[int] = field(default_factory=count)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Images:
        return to_bytes(self.model.draw(prompts, seeds))

    def codec(self, images: Images) -> Images:
        return to_bytes(self.model.roundtrip(to_floats(images)))

    def noisy_codec(self, images: Images) -> Images:
        """With noise of its own in every call."""
        return to_bytes(self.model.roundtrip(to_floats(images), self.model.sampling_noise, next(self.noises)))

    def one_each(self, images: Images, questions: Sequence[str]) -> list[str]:
        return self.model.answers([[image] for image in to_floats(images)], questions)

    def tower(self, images: Images, questions: Sequence[str]) -> list[str]:
        return self.model.tower_answers(to_floats(images), questions)

    def any_number(self, images: Sequence[Sequence[Images]], questions: Sequence[str]) -> list[str]:
        shown = [list(to_floats(np.stack(list(some)))) if len(some) else [] for some in images]
        return self.model.answers(shown, questions)

    def edit(self, images: Images, instructions: Sequence[str], seeds: Sequence[int]) -> Images:
        return to_bytes(self.model.edits(to_floats(images), instructions, seeds))

    def tell(self, talks: list[list[str]], seeds: list[int]) -> list[list[list[Any]]]:
        told = self.model.tell(talks, seeds)
        return [[[_block(block) for block in turn] for turn in talk] for talk in told]

    def ask(self, stories: Sequence[Story], pictures: Images | None) -> list[str]:
        """The question after the story as it should have gone, its pictures left out where there are none."""
        pasts: list[list[tuple[list[str | Tensor], list[str | Tensor]]]] = []
        for i, story in enumerate(stories):
            shown: list[list[Tensor]] = [[] for _ in story.steps]
            if pictures is not None:
                shown = [[image] for image in to_floats(pictures[i])]
            told = zip(story.steps, shown, strict=True)
            pasts.append([([step.instruction], [step.sentence, *images]) for step, images in told])
        return self.model.answers_after(pasts, [story.question for story in stories])


def _block(block: str | Tensor) -> tuple[str, Any]:
    return ("text", block) if isinstance(block, str) else ("image", to_bytes(block[None])[0])


class _Editing:
    """A picture edited in one conversation; going back rewinds it."""

    def __init__(self, conversation: Conversation, source: Images) -> None:
        self.conversation, self.pictures = conversation, [source]
        self.marks: list[Any] = []  # before each edit

    def edit(self, instruction: str) -> Images:
        self.marks.append(self.conversation.mark())
        shown = [] if len(self.marks) > 1 else [to_floats(self.pictures[0][None])[0]]
        made = self.conversation.add(*shown, instruction).draw()
        self.pictures.append(to_bytes(made.picture.image[None])[0])
        return self.pictures[-1]

    def undo(self, turns: int) -> Images:
        self.conversation.rewind(self.marks[-turns])
        del self.marks[-turns:], self.pictures[-turns:]
        return self.pictures[-1]


def _geneval(run: _Run) -> Report:
    return score_geneval(run.model, run.split, quick=run.quick, progress=run.progress)


def _dpg(run: _Run) -> Report:
    report = evaluate_dpg(run.draw, run.split, quick=run.quick, progress=run.progress)
    report["ceiling"] = {
        "clean": roundtrip_ceiling(run.codec, run.split, quick=run.quick),
        "noise": roundtrip_ceiling(run.noisy_codec, run.split, quick=run.quick),
    }
    return report


def _mme(run: _Run) -> Report:
    report = evaluate_mme(run.one_each, run.split, quick=run.quick, progress=run.progress)
    return report | {"vlm": evaluate_mme(run.tower, run.split, quick=run.quick)["parts"]}


def _gqa(run: _Run) -> Report:
    report = evaluate_gqa(run.one_each, run.split, quick=run.quick, progress=run.progress)
    return report | {"vlm": evaluate_gqa(run.tower, run.split, quick=run.quick)["parts"]}


def _mcq(run: _Run) -> Report:
    return evaluate_mcq(run.any_number, run.split, quick=run.quick, progress=run.progress)


def _edit(run: _Run) -> Report:
    return evaluate_edit(
        run.edit,
        run.split,
        quick=run.quick,
        codec=run.codec,
        draw=None if run.quick else run.draw,
        progress=run.progress,
    )


def _edit_sessions(run: _Run) -> Report:
    def start(source: Images, seed: int) -> _Editing:
        return _Editing(run.model.session(seed=seed), source)

    return evaluate_edit_sessions(start, run.split, quick=run.quick, codec=run.codec, progress=run.progress)


def _story(run: _Run) -> Report:
    report = evaluate_story(run.tell, run.split, quick=run.quick, ask=run.ask, progress=run.progress)
    return report | {"ceiling": story_ceiling(run.split, quick=run.quick, roundtrip=run.noisy_codec)}


_SUITES: Mapping[str, Callable[[_Run], Report]] = {
    "geneval": _geneval,
    "dpg": _dpg,
    "mme": _mme,
    "gqa": _gqa,
    "mcq": _mcq,
    "edit": _edit,
    "sessions": _edit_sessions,
    "story": _story,
}


def score_suite(
    model: Talker, suite: str, split: Split, *, quick: bool = False, progress: Progress | None = None
) -> Report:
    """The report of one suite, floors and ceilings included; `progress` is called with (items done, items in all).

    mme and gqa hold in "vlm" what the language model scores through its own vision tower, which the joined model is
    to keep. Raises ConfigError for an unknown suite or split.
    """
    if suite not in _SUITES:
        raise ConfigError(f"suite is {suite!r}; expected one of {', '.join(get_args(Suite))}.{nearest(suite, _SUITES)}")
    return _SUITES[suite](_Run(model, split, quick, progress))
