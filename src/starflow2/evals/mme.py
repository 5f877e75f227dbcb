"""W-MME-p: yes-or-no questions about images in pairs, with MME's parser and score.

Parser and arithmetic are MME's own, as pure functions over answer records, so one scorer serves real answers and the
world's. In "cg" a held-out colour-shape pair is in the image. Floors: always yes, and a coin.

Letters: M images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Final, Literal

import numpy as np

from starflow2.evals.asking import ASK_CHUNK, Answer, AskedQuestion, ask, digests, new_scene, stream_of
from starflow2.evals.statistics import Row, Score, Scored, Scores, by_part, quick_share, score_rows
from starflow2.evals.suite import Graded, Runs, Section, graded
from starflow2.world.questions import SUBTASKS, YES_NO, yes_no_pair
from starflow2.world.scene import Split, stream

__all__ = ["COIN", "MmeSuite", "parse_yes_no", "score_mme"]

IMAGES: Final = 64  # per subtask, half of them "cg"
COIN: Final = 75.0  # MME score of a coin: half of the questions, a quarter of the pairs


# ---------------------------------------------------------------------------------------------------------- MME's rules


def parse_yes_no(text: str) -> Literal["yes", "no", "other"]:
    """The answer as MME's official parser reads it: "yes" or "no" must be within its first four characters.

    >>> [parse_yes_no(text) for text in ("Yes.", "n", "not sure", "I think no")]
    ['yes', 'no', 'no', 'other']
    """
    words = text.lower().strip().replace(".", "")
    if words in ("y", "n"):
        return "yes" if words == "y" else "no"
    start = words[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_mme(records: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """MME's score by category: 100 times the share of right answers plus 100 times that of all-right images.

    records: `category`, `question_id` (the same for both questions about an image), `answer` (yes or no), `pred`. MME's
    total is the sum of categories.
    """
    marks: dict[str, list[float]] = {}
    for (category, _), image in _by_image(records).items():
        marks.setdefault(category, []).append(_mark(image)[0])
    return {category: float(np.mean(scores)) for category, scores in marks.items()}


def _by_image(records: Iterable[Mapping[str, str]]) -> dict[tuple[str, str], list[Mapping[str, str]]]:
    images: dict[tuple[str, str], list[Mapping[str, str]]] = defaultdict(list)
    for record in records:
        images[record["category"], record["question_id"]].append(record)
    return images


def _mark(records: Sequence[Mapping[str, str]]) -> tuple[float, ...]:
    """COLUMNS of one image: its score, shares of right, all right, parsed and "yes" answers, its part in the total."""
    parsed = [parse_yes_no(record["pred"]) for record in records]
    right = [word == record["answer"].lower() for word, record in zip(parsed, records, strict=True)]
    acc, acc_plus = sum(right) / len(right), float(all(right))
    unread, yes = parsed.count("other") / len(right), parsed.count("yes") / len(right)
    score = 100 * (acc + acc_plus)
    return score, acc, acc_plus, 1 - unread, yes, score * len(SUBTASKS)


# ------------------------------------------------------------------------------------------------------------ the suite

COLUMNS: Final = ("score", "acc", "acc_plus", "parse_rate", "yes_share", "total")


@dataclass(frozen=True, slots=True, kw_only=True)
class MmeSuite:
    """Six subtasks, and about each image a question and its minimal change. Scores an `Answer`.

    Columns are means over images and then over subtasks; score is of 200; total is the sum of subtasks, of
    1,200, and of_2000 is the same on MME's usual scale.
    images: number per subtask.
    """

    images: int = IMAGES
    name: ClassVar[str] = "mme"
    chunk: ClassVar[int] = ASK_CHUNK

    def items(self, split: Split) -> Mapping[str, Sequence[AskedQuestion]]:
        return {"all": _items(split, self.images)}

    def quick(self, items: Sequence[AskedQuestion]) -> Sequence[AskedQuestion]:
        return quick_share(items, stratum=lambda item: (item.part, item.kind), unit=lambda item: item.image)

    def run(self, answer: Answer, items: Sequence[AskedQuestion]) -> list[str]:
        return ask(answer, items)

    def grade(self, runs: Runs[AskedQuestion, str]) -> Graded:
        """Scores by MME's rules."""
        rng = np.random.default_rng(0)
        scored, floor = dict[str, Scored](), dict[str, Scores]()
        for part, pairs in by_part(runs["all"], lambda pair: pair[0].part).items():
            records = [_record(*pair) for pair in pairs]
            rows = [Row(kind, image, _mark(own)) for (kind, image), own in _by_image(records).items()]
            scored[part] = _with_of_2000(score_rows(rows, COLUMNS, rng, "averaged"))
            always_yes = score_mme({**record, "pred": "yes"} for record in records)
            levels = {"always_yes": sum(always_yes.values()), "coin": COIN * len(always_yes)}
            floor[part] = Scores(len(rows), len(rows), {}).with_columns(**levels)
        return graded(scored, {"floor": floor})

    def lock(self) -> Section:
        items = digests(lambda split: _items(split, self.images))
        return {"mme": {"subtasks": list(SUBTASKS), "images": self.images, "items": items}}


def _record(item: AskedQuestion, pred: str) -> dict[str, str]:
    answer = item.question.answer
    return {"category": item.kind, "question_id": str(item.image), "answer": answer, "pred": pred}


def _with_of_2000(scored: Scored) -> Scored:
    """Scores with the total on MME's usual scale."""
    total = scored.scores["total"]
    values = [
        value * 2000 / (200 * len(SUBTASKS)) for value in (total.score, total.low, total.high) if value is not None
    ]
    return replace(scored, scores=scored.scores.with_columns(of_2000=Score(*values)))


@cache
def _items(split: Split, images: int) -> tuple[AskedQuestion, ...]:
    """Subtask by subtask, its "id" images first; the question with answer yes comes before that with answer no."""
    items: list[AskedQuestion] = []
    for subtask in SUBTASKS:
        shown: set[tuple[int, ...]] = set()
        for index in range(images):
            part: Literal["id", "cg"] = "id" if index < images // 2 else "cg"
            rng = stream(*stream_of(split, "mme"), SUBTASKS.index(subtask), index)
            pair = None
            while pair is None:
                scene = new_scene(rng, split, shown, shows_pair=part == "cg")
                pair = yes_no_pair(scene, rng, subtask, split="train" if part == "id" else split)
            for question in pair:
                hinted = replace(question, text=f"{question.text} {YES_NO}")
                image = len(items) // 2
                items.append(AskedQuestion(question=hinted, scene=scene, image=image, part=part, kind=subtask))
    return tuple(items)
