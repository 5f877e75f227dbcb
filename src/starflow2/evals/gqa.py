"""W-MME-p and W-GQA: how well questions about pictures of the drawn world are answered.

MME's parser and arithmetic are the official ones, as pure functions over answer records, so one scorer serves real
answers and the world's. The runners are handed an `answer` function and know nothing of models. Every score comes
with its floor: who always says yes, who throws a coin, and who knows the training questions but sees no picture.
Both suites have "id" items (unseen scenes, seen combinations) and "cg" items (MME: a held-out colour-shape pair is in
the picture; GQA: the question's chain of operators was never asked in training), and "all" of them together.

Letters: M images, K columns of marks.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Final, get_args

import numpy as np

from starflow2.evals.asking import (
    _GQA,
    PARTS,
    Answer,
    Part,
    Progress,
    _ask,
    _checked,
    _Item,
    _picks,
    _quick,
    _scene,
    _where,
)
from starflow2.evals.mme import MME_IMAGES, mme_items
from starflow2.evals.statistics import (
    Grades,
    Report,
    bootstrap,
    check_lock,
    digest,
    interval,
    lock_text,
)
from starflow2.world.questions import SUBTASKS, YES_NO, Question, questions, understanding_task
from starflow2.world.scene import COLORS, SHAPES, SIZES, Scene, Split, stream
from starflow2.world.splits import scene_key
from starflow2.world.words import NUMBERS, PLURALS

__all__ = [
    "evaluate_gqa",
    "lock_spec",
    "question_prior",
    "verify_lock",
]

GQA_SCENES: Final[Mapping[Part, int]] = MappingProxyType({"id": 192, "cg": 64})
GQA_QUESTIONS: Final = 4  # per scene
PRIOR_ITEMS: Final = 5000  # training items whose questions the question-only prior has read
PRIOR_SEEN: Final = 5  # fewer sightings of a pattern than this, and a vaguer one is asked


# ---------------------------------------------------------------------------------------------------------------- W-GQA


def evaluate_gqa(answer: Answer, split: Split, *, quick: bool = False, progress: Progress | None = None) -> Report:
    """Asks and grades W-GQA: four questions about each of 256 scenes, one word each, exact match.

    split: "dev" (for every choice) or "test". quick: one scene in eight. Returns a JSON-able report: in
    `report["parts"]["id" | "cg" | "all"]`, `accuracy` is in [0, 1], `prior` that of the question-only prior on the same
    questions, `valid` the share of answers of the right sort (a colour for a colour). The gap is taken over the kinds
    of question that "id" and "cg" share. Raises as `evaluate_mme` does.
    """
    items: Sequence[_Item] = gqa_items(_checked(split))
    items = _quick(items, lambda item: item.part) if quick else items
    said = _ask(answer, items, progress)
    marks = np.array([_marks(item.question, text) for item, text in zip(items, said, strict=True)], np.float64)
    rng = np.random.default_rng(0)
    parts, resamples = {}, {}
    for name, picks in _picks(items).items():
        parts[name], resamples[name] = _gqa_part([items[i] for i in picks], marks[picks], rng)
    report: Report = {"suite": "gqa", "split": split, "quick": quick, "n": len(items), "prior_items": PRIOR_ITEMS}
    return report | {"parts": parts, "gap": _gap(parts, resamples)}


def _marks(question: Question, said: str) -> tuple[bool, bool, bool]:
    """Right; of the right sort; whether the question-only prior is right."""
    words = " ".join(re.findall(r"[a-z]+", said.lower()))
    is_valid = _SORT.get(words) == _SORT[question.answer]
    return words == question.answer, is_valid, question_prior(question.text) == question.answer


def _gqa_part(items: list[_Item], marks: Grades, rng: np.random.Generator) -> tuple[Report, dict[str, Grades]]:
    """Scores of a part, and the resampled accuracies of its kinds. marks: (questions, 3)."""

    def scored(picks: list[int]) -> tuple[Report, Grades]:
        images = [items[i].image for i in picks]
        accuracies = bootstrap(images, marks[picks], rng)[:, 0]
        right, valid, prior = marks[picks].mean(0).tolist()
        row = {"n": len(picks), "scenes": len(set(images)), "accuracy": interval(right, accuracies)}
        return row | {"valid": valid, "prior": prior}, accuracies

    report, _ = scored(list(range(len(items))))
    report["by_kind"], resamples = {}, {}
    for kind in sorted({item.kind for item in items}):
        picks = [i for i, item in enumerate(items) if item.kind == kind]
        report["by_kind"][kind], resamples[kind] = scored(picks)
    return report, resamples


def _gap(parts: Mapping[str, Report], resamples: Mapping[str, Mapping[str, Grades]]) -> Report:
    """ID minus CG for each kind of question that both have, and the mean of these."""
    seen, unseen = resamples["id"], resamples["cg"]
    kinds = [kind for kind in unseen if kind in seen]
    have, want = ({kind: parts[part]["by_kind"][kind]["accuracy"]["score"] for kind in kinds} for part in ("cg", "id"))
    scores = [want[kind] - have[kind] for kind in kinds]
    changes = [seen[kind] - unseen[kind] for kind in kinds]
    by_kind = {kind: interval(s, r) for kind, s, r in zip(kinds, scores, changes, strict=True)}
    overall = {"overall": interval(float(np.mean(scores)), np.mean(changes, axis=0))} if kinds else {}
    return overall | {"by_kind": by_kind}


_SORTS: Final = (COLORS, SHAPES, SIZES, NUMBERS, ("yes", "no"), ("left", "right"), ("above", "below"))
_SORT: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({word: sort for sort in _SORTS for word in sort})


@cache
def gqa_items(split: Split) -> tuple[_Item, ...]:
    """Scene by scene, of the questions that each allows those whose answers are still the rarest of their kind."""
    items: list[_Item] = []
    shown: set[tuple[int, ...]] = set()
    for part, scenes in GQA_SCENES.items():
        taken: Counter[tuple[str, str]] = Counter()
        for index in range(scenes):
            rng = stream(*_where(split, _GQA), PARTS.index(part), index)
            pool: list[Question] = []
            while len(pool) < GQA_QUESTIONS:
                scene = _scene(rng, split, shown)
                pool = _programs(scene, rng, split, part)
            for _ in range(GQA_QUESTIONS):
                question = min(pool, key=lambda q: taken[q.kind, q.answer] * len(_SORT[q.answer]))
                pool.remove(question)
                taken[question.kind, question.answer] += 1
                image = len(items) // GQA_QUESTIONS
                items.append(_Item(question=question, scene=scene, image=image, part=part, kind=question.kind))
    return tuple(items)


def _programs(scene: Scene, rng: np.random.Generator, split: Split, part: Part) -> list[Question]:
    """Different questions with one-word answers about a scene, in random order, without MME's."""
    if part == "cg":
        return questions(scene, rng, split=split, most=2 * GQA_QUESTIONS)
    asked = [question for _ in range(2) for question in questions(scene, rng, most=20)]
    programs = [q for q in asked if q.kind not in SUBTASKS or q.program[-1] == "count"]
    return list({q.text: q for q in programs if q.kind != "list"}.values())


# ----------------------------------------------------------------------------------------- who never sees the picture


def question_prior(text: str) -> str:
    """The answer that training most often gave to such a question, whatever the picture.

    Such a question: the same words; if these were hardly ever asked, the same with other shapes, then with other
    objects, then with other values, then any.
    """
    counts = _prior_counts()
    seen = next(pattern for pattern in _patterns(text) if not pattern or counts[pattern].total() >= PRIOR_SEEN)
    return counts[seen].most_common(1)[0][0]


@cache
def _prior_counts() -> Mapping[str, Counter[str]]:
    """Pattern -> answers, over the one-word questions of the first training items."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(PRIOR_ITEMS):
        for text, answer in understanding_task(0, index)[1]:
            if answer in _SORT:
                for pattern in set(_patterns(text)):
                    counts[pattern][answer] += 1
    return counts


def _any(*words: str) -> str:
    return f"(?:{'|'.join(words)})"


_SHAPE: Final = re.compile(rf"\b{_any(*SHAPES, *PLURALS)}\b")
_OBJECT: Final = re.compile(rf"\bthe (?:{_any(*SIZES, *COLORS)} )*{_any(*SHAPES, 'object')}\b")
_VALUE: Final = tuple(re.compile(rf"\b{_any(*words)}\b") for words in ((*SHAPES, *PLURALS), COLORS, SIZES, NUMBERS))


def _patterns(text: str) -> tuple[str, ...]:
    """What the question has in common with ever more others."""
    plain = text.removesuffix(f" {YES_NO}")
    vague = same = _OBJECT.sub("it", plain)
    for number, words in enumerate(_VALUE):
        vague = words.sub(str(number), vague)
    return plain, _SHAPE.sub("shape", plain), same, vague, ""


# ------------------------------------------------------------------------------------------------------------- the lock


def lock_spec() -> Report:
    """The frozen suites, made afresh: their settings, and count and hash of each split's scene keys and words."""
    suites = {"mme": mme_items, "gqa": gqa_items}
    made = {name: {split: _digest(items(split)) for split in get_args(Split)} for name, items in suites.items()}
    return {
        "mme": {"subtasks": list(SUBTASKS), "images": MME_IMAGES, "items": made["mme"]},
        "gqa": {"scenes": dict(GQA_SCENES), "questions": GQA_QUESTIONS, "items": made["gqa"]},
    }


def _digest(items: Iterable[_Item]) -> Report:
    return digest(
        (item.part, item.question.text, item.question.answer, item.scene.background, *scene_key(item.scene))
        for item in items
    )


def verify_lock() -> None:
    """Raises DataError if the suites made by this code are not the frozen ones that scores are published for."""
    check_lock(json.loads(lock_text()), lock_spec())
