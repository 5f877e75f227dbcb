"""W-GQA: questions about scenes with one-word answers, exact match, beside a prior that never sees the image.

In "cg" the question's chain of operators was never asked in training. The floor is `question_prior`, which knows the
training questions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import ClassVar, Final

import numpy as np

from starflow2.evals.asking import ASK_CHUNK, PARTS, Answer, AskedQuestion, Part, ask, digests, new_scene, stream_of
from starflow2.evals.statistics import Row, by_part, quick_share, score_rows
from starflow2.evals.suite import Graded, Runs, Section, graded
from starflow2.world.questions import SUBTASKS, YES_NO, Question, questions, understanding_task
from starflow2.world.scene import COLORS, SHAPES, SIZES, Scene, Split, stream
from starflow2.world.words import NUMBERS, PLURALS

__all__ = ["SORT_OF", "GqaSuite", "question_prior"]

SCENES: Final = (("id", 192), ("cg", 64))  # per part
QUESTIONS: Final = 4  # per scene
PRIOR_ITEMS: Final = 5000  # training items whose questions the question-only prior has read
PRIOR_SEEN: Final = 5  # a pattern seen less often than this is replaced by a vaguer one

COLUMNS: Final = ("accuracy", "valid", "prior")


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaSuite:
    """Four questions about each scene. Scores an `Answer`.

    valid: share of answers of the right sort (a colour for a colour). prior: accuracy of the question-only prior on the
    same questions. scenes: number per part. prior_items: training items that the prior has read.
    """

    scenes: tuple[tuple[Part, int], ...] = SCENES
    prior_items: int = PRIOR_ITEMS
    name: ClassVar[str] = "gqa"
    chunk: ClassVar[int] = ASK_CHUNK

    def items(self, split: Split) -> Mapping[str, Sequence[AskedQuestion]]:
        return {"all": _items(split, self.scenes)}

    def quick(self, items: Sequence[AskedQuestion]) -> Sequence[AskedQuestion]:
        return quick_share(items, stratum=lambda item: item.part, unit=lambda item: item.image)

    def run(self, answer: Answer, items: Sequence[AskedQuestion]) -> list[str]:
        return ask(answer, items)

    def grade(self, runs: Runs[AskedQuestion, str]) -> Graded:
        """Exact match; the gap is over kinds of question that both parts have."""
        rng = np.random.default_rng(0)
        parts = by_part(runs["all"], lambda pair: pair[0].part)
        rows = {part: [self._row(*pair) for pair in pairs] for part, pairs in parts.items()}
        scored = {part: score_rows(own, COLUMNS, rng, "resampled") for part, own in rows.items()}
        return graded(scored, settings={"prior_items": self.prior_items})

    def lock(self) -> Section:
        items = digests(lambda split: _items(split, self.scenes))
        return {"gqa": {"scenes": dict(self.scenes), "questions": QUESTIONS, "items": items}}

    def _row(self, item: AskedQuestion, text: str) -> Row:
        words, answer = " ".join(re.findall(r"[a-z]+", text.lower())), item.question.answer
        prior = question_prior(item.question.text, self.prior_items)
        return Row(item.kind, item.image, (words == answer, SORT_OF.get(words) == SORT_OF[answer], prior == answer))


_SORTS: Final = (COLORS, SHAPES, SIZES, NUMBERS, ("yes", "no"), ("left", "right"), ("above", "below"))
SORT_OF: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({word: sort for sort in _SORTS for word in sort})


@cache
def _items(split: Split, scenes: tuple[tuple[Part, int], ...]) -> tuple[AskedQuestion, ...]:
    """Scene by scene, the questions whose answers are still the rarest of their kind."""
    items: list[AskedQuestion] = []
    shown: set[tuple[int, ...]] = set()
    for part, count in scenes:
        asked: Counter[tuple[str, str]] = Counter()
        for index in range(count):
            rng = stream(*stream_of(split, "gqa"), PARTS.index(part), index)
            pool: list[Question] = []
            while len(pool) < QUESTIONS:
                scene = new_scene(rng, split, shown)
                pool = _programs(scene, rng, split, part)
            for _ in range(QUESTIONS):
                question = min(pool, key=lambda q: asked[q.kind, q.answer] * len(SORT_OF[q.answer]))
                pool.remove(question)
                asked[question.kind, question.answer] += 1
                image = len(items) // QUESTIONS
                items.append(AskedQuestion(question=question, scene=scene, image=image, part=part, kind=question.kind))
    return tuple(items)


def _programs(scene: Scene, rng: np.random.Generator, split: Split, part: Part) -> list[Question]:
    """Different questions with one-word answers about a scene, in random order, without MME's."""
    if part == "cg":
        return questions(scene, rng, split=split, most=2 * QUESTIONS)
    asked = [question for _ in range(2) for question in questions(scene, rng, most=20)]
    programs = [q for q in asked if q.kind not in SUBTASKS or q.program[-1] == "count"]
    return list({q.text: q for q in programs if q.kind != "list"}.values())


# -------------------------------------------------------------------------------- a reader who never sees the image


def question_prior(text: str, prior_items: int = PRIOR_ITEMS) -> str:
    """The most frequent answer to such a question in training, whatever the image shows.

    Such a question has the same words; where these were asked too rarely, the same words with other shapes, then with
    other objects, then with other values; in the end any question. prior_items: training items that are read.
    """
    counts = _prior_counts(prior_items)
    pattern = next(p for p in _patterns(text) if not p or counts[p].total() >= PRIOR_SEEN)
    return counts[pattern].most_common(1)[0][0]


@cache
def _prior_counts(items: int) -> Mapping[str, Counter[str]]:
    """Pattern -> answers, over the one-word questions of the first training items."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(items):
        for text, answer in understanding_task(0, index)[1]:
            if answer in SORT_OF:
                for pattern in set(_patterns(text)):
                    counts[pattern][answer] += 1
    return counts


def _any(*words: str) -> str:
    return f"(?:{'|'.join(words)})"


_SHAPE: Final = re.compile(rf"\b{_any(*SHAPES, *PLURALS)}\b")
_OBJECT: Final = re.compile(rf"\bthe (?:{_any(*SIZES, *COLORS)} )*{_any(*SHAPES, 'object')}\b")
_VALUE: Final = tuple(re.compile(rf"\b{_any(*words)}\b") for words in ((*SHAPES, *PLURALS), COLORS, SIZES, NUMBERS))


def _patterns(text: str) -> tuple[str, ...]:
    """Patterns of a question, each shared with more questions than the one before."""
    plain = text.removesuffix(f" {YES_NO}")
    vague = same = _OBJECT.sub("it", plain)
    for number, words in enumerate(_VALUE):
        vague = words.sub(str(number), vague)
    return plain, _SHAPE.sub("shape", plain), same, vague, ""
