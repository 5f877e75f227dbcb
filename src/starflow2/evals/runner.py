"""Every suite of the drawn world, run on a model by name.

Suites take uint8 images and know no model; models take and return tensors. `ByteModel` stands between them. It knows no
model class: a `Talker` is whatever has these members, as `StarFlow2` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor

from starflow2.core.images import to_bytes, to_floats
from starflow2.errors import ConfigError, nearest
from starflow2.evals.dpg import DpgSuite
from starflow2.evals.edit import EditSuite
from starflow2.evals.geneval import Drawer, roundtrips, score_geneval
from starflow2.evals.gqa import GqaSuite
from starflow2.evals.mcq import McqSuite
from starflow2.evals.mme import MmeSuite
from starflow2.evals.sessions import SessionsSuite
from starflow2.evals.story import Replies, StorySuite
from starflow2.evals.suite import Images, Part, Progress, Report, Suite, ceiling, evaluate
from starflow2.world.scene import Split
from starflow2.world.stories import Story

__all__ = ["ByteModel", "EditedImage", "Scorer", "SuiteName", "Talker", "score_suite"]

SuiteName = Literal["geneval", "dpg", "mme", "gqa", "mcq", "edit", "sessions", "story"]
_Call = TypeVar("_Call")
_Item = TypeVar("_Item")
_Output = TypeVar("_Output")
Words = Sequence[str | Tensor]  # of one side of a turn: text, and images (3, 64, 64)


class Conversation(Protocol):
    """A session with one user."""

    def add(self, *parts: Any) -> Conversation: ...

    def draw(self) -> Any:
        """Something whose `picture.image` is (3, 64, 64) in [-1, 1]."""
        ...

    def mark(self) -> Any: ...

    def rewind(self, mark: Any) -> None: ...


class Talker(Drawer, Protocol):
    """A model that every suite can score. Images are (3, 64, 64) in [-1, 1]."""

    def answers(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> list[str]:
        """One answer per (images, question)."""
        ...

    def answers_after(self, pasts: Sequence[Sequence[tuple[Words, Words]]], questions: Sequence[str]) -> list[str]:
        """One answer per question, each after past turns of user and assistant."""
        ...

    def tower_answers(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        """One answer per image, by the language model alone through its own vision tower."""
        ...

    def edits(self, images: Tensor, instructions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Every image, changed as instructed."""
        ...

    def session(self, *, seed: int = 0) -> Any:
        """A new `Conversation`."""
        ...

    def tell(self, talks: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[list[list[str | Tensor]]]:
        """The replies to every turn of every conversation: words and images in order."""
        ...


@dataclass(frozen=True, slots=True)
class ByteModel:
    """A model with uint8 images (n, 64, 64, 3) in place of tensors, as the suites call it."""

    model: Talker

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Images:
        """One image per prompt."""
        return to_bytes(self.model.draw(prompts, seeds))

    def answer_one(self, images: Images, questions: Sequence[str]) -> list[str]:
        """Answers to questions about one image each."""
        return self.model.answers([[image] for image in to_floats(images)], questions)

    def answer_tower(self, images: Images, questions: Sequence[str]) -> list[str]:
        """Answers of the language model through its own vision tower."""
        return self.model.tower_answers(to_floats(images), questions)

    def answer_many(self, images: Sequence[Sequence[Images]], questions: Sequence[str]) -> list[str]:
        """Answers to questions about any number of images each."""
        tensors = [list(to_floats(np.stack(list(some)))) if len(some) else [] for some in images]
        return self.model.answers(tensors, questions)

    def edit(self, images: Images, instructions: Sequence[str], seeds: Sequence[int]) -> Images:
        """Edited images."""
        return to_bytes(self.model.edits(to_floats(images), instructions, seeds))

    def reply(self, talks: list[list[str]], seeds: list[int]) -> list[Replies]:
        """The replies to every turn of several conversations."""
        replies = self.model.tell(talks, seeds)
        return [
            [[block if isinstance(block, str) else to_bytes(block[None])[0] for block in turn] for turn in turns]
            for turns in replies
        ]

    def answer_story(self, stories: Sequence[Story], images: Images | None) -> list[str]:
        """The answer to each story's question, after its true sentences and its true images, if there are any."""
        pasts: list[list[tuple[Words, Words]]] = []
        for i, story in enumerate(stories):
            shown: list[list[Tensor]] = [[] for _ in story.steps]
            if images is not None:
                shown = [[image] for image in to_floats(images[i])]
            turns = zip(story.steps, shown, strict=True)
            pasts.append([([step.instruction], [step.sentence, *some]) for step, some in turns])
        return self.model.answers_after(pasts, [story.question for story in stories])

    def start(self, source: Images, seed: int) -> EditedImage:
        """A new session about an image."""
        return EditedImage(self.model.session(seed=seed), source)


class EditedImage:
    """An image edited in one conversation; undo rewinds the conversation."""

    def __init__(self, conversation: Conversation, source: Images) -> None:
        self.conversation, self.images = conversation, [source]
        self.marks: list[Any] = []  # before each edit

    def edit(self, instruction: str) -> Images:
        """The current image, changed as instructed."""
        self.marks.append(self.conversation.mark())
        shown = [] if len(self.marks) > 1 else [to_floats(self.images[0][None])[0]]
        made = self.conversation.add(*shown, instruction).draw()
        self.images.append(to_bytes(made.picture.image[None])[0])
        return self.images[-1]

    def undo(self, turns: int) -> Images:
        """Go back by so many edits."""
        self.conversation.rewind(self.marks[-turns])
        del self.marks[-turns:], self.images[-turns:]
        return self.images[-1]


@dataclass(frozen=True, slots=True)
class Scorer:
    """One model, scored suite by suite; each method returns a report with floors and ceilings.

    quick, progress: as in `evaluate`. parts: of W-Edit and W-Story. suite: options other than the published ones.
    """

    model: Talker
    split: Split
    quick: bool = False
    progress: Progress | None = None
    parts: tuple[Part, ...] = ("id", "cg")

    def geneval(self) -> Report:
        return score_geneval(self.model, self.split, quick=self.quick, progress=self.progress)

    def dpg(self) -> Report:
        report = self._run(DpgSuite(), ByteModel(self.model).draw)
        for name, codec in roundtrips(self.model).items():
            report = report.with_bound(name, ceiling(DpgSuite(samples=1), self.split, codec, quick=self.quick))
        return report

    def mme(self, suite: MmeSuite | None = None) -> Report:
        return self._beside_tower(suite or MmeSuite())

    def gqa(self, suite: GqaSuite | None = None) -> Report:
        return self._beside_tower(suite or GqaSuite())

    def mcq(self) -> Report:
        return self._run(McqSuite(), ByteModel(self.model).answer_many)

    def edit(self, suite: EditSuite | None = None) -> Report:
        """A quick run leaves out the costly control that draws every target anew."""
        model, codec = ByteModel(self.model), roundtrips(self.model)["clean"]
        suite = replace(suite or EditSuite(parts=self.parts), codec=codec, draw=None if self.quick else model.draw)
        return self._run(suite, model.edit)

    def sessions(self) -> Report:
        return self._run(SessionsSuite(codec=roundtrips(self.model)["clean"]), ByteModel(self.model).start)

    def story(self, suite: StorySuite | None = None) -> Report:
        model, codec = ByteModel(self.model), roundtrips(self.model)["noise"]
        suite = suite or StorySuite(parts=self.parts)
        report = self._run(replace(suite, ask=model.answer_story), model.reply)
        return report.with_bound("ceiling", ceiling(replace(suite, parts=("id",)), self.split, codec, quick=self.quick))

    def _run(self, suite: Suite[_Call, _Item, _Output], call: _Call) -> Report:
        return evaluate(suite, call, self.split, quick=self.quick, progress=self.progress)

    def _beside_tower(self, suite: MmeSuite | GqaSuite) -> Report:
        """With the scores of the language model alone as bound "vlm": the joint model is to keep them."""
        model = ByteModel(self.model)
        report = evaluate(suite, model.answer_one, self.split, quick=self.quick, progress=self.progress)
        return report.with_bound("vlm", evaluate(suite, model.answer_tower, self.split, quick=self.quick).parts)


_SCORES: Mapping[str, Callable[[Scorer], Report]] = {
    "geneval": Scorer.geneval,
    "dpg": Scorer.dpg,
    "mme": Scorer.mme,
    "gqa": Scorer.gqa,
    "mcq": Scorer.mcq,
    "edit": Scorer.edit,
    "sessions": Scorer.sessions,
    "story": Scorer.story,
}


def score_suite(
    model: Talker,
    suite: str,
    split: Split,
    *,
    quick: bool = False,
    parts: Sequence[Part] = ("id", "cg"),
    progress: Progress | None = None,
) -> Report:
    """The report on one suite, by the name that `starflow2 eval --suite` takes.

    Options as in `evaluate`; parts: of W-Edit and W-Story. Raises ConfigError for an unknown suite, split or part.
    """
    if suite not in _SCORES:
        raise ConfigError(f"suite is {suite!r}; expected one of {', '.join(_SCORES)}.{nearest(suite, _SCORES)}")
    return _SCORES[suite](Scorer(model, split, quick, progress, tuple(parts)))
