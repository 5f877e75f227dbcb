"""Every suite of the drawn world, run on a model by name.

Suites take uint8 images and know no model; models take and return tensors. `ByteModel` stands between them. It knows no
model class: a `Talker` is whatever has these members, as `StarFlow2` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor

from starflow2.core.images import to_bytes, to_floats
from starflow2.errors import ConfigError, PromptError, nearest
from starflow2.evals.dpg import DpgSuite
from starflow2.evals.edit import EditSuite
from starflow2.evals.geneval import Drawer, roundtrips, score_geneval
from starflow2.evals.gqa import GqaSuite
from starflow2.evals.mcq import McqSuite
from starflow2.evals.mme import MmeSuite
from starflow2.evals.newcomers import NewcomersSuite
from starflow2.evals.sessions import SessionsSuite
from starflow2.evals.statistics import Grades
from starflow2.evals.story import Replies, StorySuite
from starflow2.evals.suite import Images, Part, Progress, Report, Suite, ceiling, check_choice, evaluate
from starflow2.evals.tries import CHECKED, Choice, evaluate_tries
from starflow2.world.scene import IMAGE_SIZE, Split
from starflow2.world.stories import Story

__all__ = ["TRIED", "ByteModel", "EditedImage", "Scorer", "SuiteName", "Talker", "drawing_choice", "score_suite"]

SuiteName = Literal["geneval", "dpg", "mme", "gqa", "mcq", "edit", "sessions", "story", "newcomers"]
TRIED: Final[tuple[SuiteName, ...]] = (
    "geneval",
    "edit",
    "sessions",
    "story",
    "newcomers",
)  # which also score chosen tries
_Call = TypeVar("_Call")
_Item = TypeVar("_Item")
_Output = TypeVar("_Output")
Words = Sequence[str | Tensor]  # of one side of a turn: text, and images (3, 64, 64)


class Conversation(Protocol):
    """A session with one user."""

    def add(self, *parts: Any) -> Conversation: ...

    def draw(self, *, tries: int | None = None) -> Any:
        """Something whose `picture.image` is (3, 64, 64) in [-1, 1]."""
        ...

    def mark(self) -> Any: ...

    def rewind(self, mark: Any) -> None: ...


class Talker(Drawer, Protocol):
    """A model that every suite can score. Images are (3, 64, 64) in [-1, 1]."""

    def check_prompt(self, prompt: str) -> None:
        """Raise PromptError for a prompt that the model refuses."""
        ...

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

    def tried(self, turns: Sequence[Sequence[str | Tensor]], seeds: Sequence[int], tries: int) -> tuple[Tensor, Tensor]:
        """`tries` images (B, T, 3, 64, 64) of each user turn, and the confidence (B, T) with which it holds them."""
        ...

    def session(self, *, seed: int = 0) -> Any:
        """A new `Conversation`."""
        ...

    def tell(self, talks: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[list[list[str | Tensor]]]:
        """The replies to every turn of every conversation: words and images in order."""
        ...

    def tell_confirmed(
        self, talks: Sequence[Sequence[str]], seeds: Sequence[int], tries: int
    ) -> list[list[list[str | Tensor]]]:
        """Such replies, each the one of `tries` whose image the model confirms."""
        ...


@dataclass(frozen=True, slots=True)
class ByteModel:
    """A model with uint8 images (n, 64, 64, 3) in place of tensors, as the suites call it."""

    model: Talker
    tries: int = 1  # of replies and edits in sessions, and of `draw_tries` and `edit_tries`

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

    def draw_tries(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Images, Grades]:
        """All tries of each prompt (n, T, ...), with the confidence in each (n, T)."""
        return self._tried([[prompt] for prompt in prompts], seeds)

    def draw_known(self, prompts: Sequence[str], seeds: Sequence[int]) -> Images:
        """One image per prompt, plain white where the model refuses the prompt."""
        known = self._known(prompts)
        images = np.full((len(prompts), IMAGE_SIZE, IMAGE_SIZE, 3), 255, np.uint8)
        if known:
            images[known] = self.draw([prompts[i] for i in known], [seeds[i] for i in known])
        return images

    def draw_known_tries(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Images, Grades]:
        """All tries of each prompt, plain white and of confidence 0 where the model refuses the prompt."""
        known = self._known(prompts)
        images = np.full((len(prompts), self.tries, IMAGE_SIZE, IMAGE_SIZE, 3), 255, np.uint8)
        sure = np.zeros(images.shape[:2])
        if known:
            images[known], sure[known] = self.draw_tries([prompts[i] for i in known], [seeds[i] for i in known])
        return images, sure

    def _known(self, prompts: Sequence[str]) -> list[int]:
        """Indices of the prompts that the model does not refuse."""
        return [i for i, prompt in enumerate(prompts) if not self._refuses(prompt)]

    def _refuses(self, prompt: str) -> bool:
        try:
            self.model.check_prompt(prompt)
        except PromptError:
            return True
        return False

    def edit_tries(self, images: Images, instructions: Sequence[str], seeds: Sequence[int]) -> tuple[Images, Grades]:
        """All tries of each edit."""
        return self._tried([list(turn) for turn in zip(to_floats(images), instructions, strict=True)], seeds)

    def _tried(self, turns: Sequence[Sequence[str | Tensor]], seeds: Sequence[int]) -> tuple[Images, Grades]:
        images, sure = self.model.tried(turns, seeds, self.tries)
        return to_bytes(images.flatten(0, 1)).reshape(*images.shape[:2], IMAGE_SIZE, IMAGE_SIZE, 3), sure.numpy()

    def reply(self, talks: list[list[str]], seeds: list[int]) -> list[Replies]:
        """The replies to every turn of several conversations."""
        model = self.model
        replies = model.tell(talks, seeds) if self.tries == 1 else model.tell_confirmed(talks, seeds, self.tries)
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
        return EditedImage(self.model.session(seed=seed), source, self.tries)


class EditedImage:
    """An image edited in one conversation; undo rewinds the conversation."""

    def __init__(self, conversation: Conversation, source: Images, tries: int = 1) -> None:
        self.conversation, self.images, self.tries = conversation, [source], tries
        self.marks: list[Any] = []  # before each edit

    def edit(self, instruction: str) -> Images:
        """The current image, changed as instructed."""
        self.marks.append(self.conversation.mark())
        shown = [] if len(self.marks) > 1 else [to_floats(self.images[0][None])[0]]
        made = self.conversation.add(*shown, instruction).draw(tries=self.tries)
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

    quick, progress: as in `evaluate`. parts: of suites that have a choice. tries: how many images of each request are
    drawn; with more than one, reports also have the scores of those that the model confirms. suite: options other than
    the published ones.
    """

    model: Talker
    split: Split
    quick: bool = False
    progress: Progress | None = None
    parts: tuple[Part, ...] = ("id", "cg")
    tries: int = 1

    @property
    def _several(self) -> ByteModel:
        """The model with several tries."""
        return ByteModel(self.model, self.tries)

    def geneval(self) -> Report:
        return score_geneval(
            self.model,
            self.split,
            quick=self.quick,
            parts=self.parts,
            progress=self.progress,
            choice=drawing_choice(self.model, self.tries),
        )

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
        if self.tries == 1:
            return self._run(suite, model.edit)
        choice = Choice(self._several.edit_tries, self.tries)
        return evaluate_tries(suite, choice, self.split, quick=self.quick, progress=self.progress)

    def newcomers(self, suite: NewcomersSuite | None = None) -> Report:
        suite = suite or NewcomersSuite()
        if self.tries == 1:
            return self._run(suite, ByteModel(self.model).draw_known)
        choice = Choice(self._several.draw_known_tries, self.tries)
        return evaluate_tries(suite, choice, self.split, quick=self.quick, progress=self.progress)

    def sessions(self) -> Report:
        suite = SessionsSuite(codec=roundtrips(self.model)["clean"])
        return self._run_twice(suite, ByteModel(self.model).start, self._several.start)

    def story(self, suite: StorySuite | None = None) -> Report:
        model, codec = ByteModel(self.model), roundtrips(self.model)["noise"]
        suite = suite or StorySuite(parts=self.parts)
        report = self._run_twice(replace(suite, ask=model.answer_story), model.reply, self._several.reply)
        return report.with_bound("ceiling", ceiling(replace(suite, parts=("id",)), self.split, codec, quick=self.quick))

    def _run(self, suite: Suite[_Call, _Item, _Output], call: _Call) -> Report:
        return evaluate(suite, call, self.split, quick=self.quick, progress=self.progress)

    def _run_twice(self, suite: Suite[_Call, _Item, _Output], one: _Call, several: _Call) -> Report:
        """The report on replies of one try, and where there are more, the scores of confirmed ones.

        Every turn goes on from the image that was kept, so these are two runs, and no judge can choose afterwards.
        """
        report = self._run(suite, one)
        if self.tries == 1:
            return report
        report = replace(report, settings=report.settings | {"tries": self.tries})
        return report.with_bound(CHECKED, self._run(suite, several).parts)

    def _beside_tower(self, suite: MmeSuite | GqaSuite) -> Report:
        """With the scores of the language model alone as bound "vlm": the joint model is to keep them."""
        model = ByteModel(self.model)
        report = evaluate(suite, model.answer_one, self.split, quick=self.quick, progress=self.progress)
        return report.with_bound("vlm", evaluate(suite, model.answer_tower, self.split, quick=self.quick).parts)


def drawing_choice(model: Talker, tries: int) -> Choice | None:
    """How a model makes several tries of a prompt and checks them; None for one try."""
    return Choice(ByteModel(model, tries).draw_tries, tries) if tries != 1 else None


_SCORES: Mapping[str, Callable[[Scorer], Report]] = {
    "geneval": Scorer.geneval,
    "dpg": Scorer.dpg,
    "mme": Scorer.mme,
    "gqa": Scorer.gqa,
    "mcq": Scorer.mcq,
    "edit": Scorer.edit,
    "sessions": Scorer.sessions,
    "story": Scorer.story,
    "newcomers": Scorer.newcomers,
}


def score_suite(
    model: Talker,
    suite: str,
    split: Split,
    *,
    quick: bool = False,
    parts: Sequence[Part] = ("id", "cg"),
    tries: int = 1,
    progress: Progress | None = None,
) -> Report:
    """The report on one suite, by the name that `starflow2 eval --suite` takes.

    Options as in `evaluate` and `Scorer`. Raises ConfigError for an unknown suite, split or part, and for tries of a
    suite that draws nothing or whose rules know no single right image.
    """
    if suite not in _SCORES:
        raise ConfigError(f"suite is {suite!r}; expected one of {', '.join(_SCORES)}.{nearest(suite, _SCORES)}")
    if tries != 1:
        check_choice("suite with several tries", suite, TRIED)
    return _SCORES[suite](Scorer(model, split, quick, progress, tuple(parts), tries))
