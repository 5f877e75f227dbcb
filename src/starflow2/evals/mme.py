"""W-MME-p: yes-or-no questions in pairs, MME's parser and its score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Final, Literal

import numpy as np

from starflow2.evals.asking import _MME, Answer, Part, Progress, _ask, _checked, _Item, _picks, _quick, _scene, _where
from starflow2.evals.statistics import (
    Grades,
    Report,
    bootstrap,
    interval,
)
from starflow2.world.questions import SUBTASKS, YES_NO, yes_no_pair
from starflow2.world.scene import Split, stream

__all__ = [
    "COIN",
    "MME_IMAGES",
    "evaluate_mme",
    "mme_items",
    "parse_yes_no",
    "score_mme",
]


MME_IMAGES: Final = 64  # per subtask, half of them "cg"
COIN: Final = 75.0  # MME score of a coin: half of the questions, a quarter of the pairs


def parse_yes_no(text: str) -> Literal["yes", "no", "other"]:
    """What MME's official parser takes an answer for: "yes" or "no" must be within its first four characters.

    >>> [parse_yes_no(text) for text in ("Yes.", "n", "not sure", "I think no")]
    ['yes', 'no', 'no', 'other']
    """
    said = text.lower().strip().replace(".", "")
    if said in ("y", "n"):
        return "yes" if said == "y" else "no"
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_mme(records: Iterable[Mapping[str, str]]) -> Report:
    """MME's `total` and `by_category`: 100 times the share of right answers plus 100 times that of all-right images.

    records: `category`, `question_id` (the same for both questions about an image), `answer` (yes or no), `pred`.
    """
    scores = {category: float(_mme_score(marks.mean(0))) for category, (_, marks) in _mark(records).items()}
    return {"total": sum(scores.values()), "by_category": scores}


def _mark(records: Iterable[Mapping[str, str]]) -> dict[str, tuple[list[str], Grades]]:
    """By category: images, and per image the shares of right, all right, parsed and "yes" answers, (M, 4)."""
    told: dict[str, dict[str, list[tuple[bool, str]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        parsed = parse_yes_no(record["pred"])
        told[record["category"]][record["question_id"]].append((parsed == record["answer"].lower(), parsed))
    marked = {}
    for category, images in told.items():
        rows = []
        for answers in images.values():
            right, said = [is_right for is_right, _ in answers], [parsed for _, parsed in answers]
            share = 1 / len(answers)
            rows.append((share * sum(right), all(right), 1 - share * said.count("other"), share * said.count("yes")))
        marked[category] = (list(images), np.array(rows, np.float64))
    return marked


def _mme_score(marks: Grades) -> Grades:
    """Marks (..., 4) -> MME scores (...)."""
    return np.asarray(100 * (marks[..., 0] + marks[..., 1]))


def evaluate_mme(answer: Answer, split: Split, *, quick: bool = False, progress: Progress | None = None) -> Report:
    """Asks and grades W-MME-p: six subtasks, 64 images each, and about each image a question and its minimal change.

    split: "dev" (for every choice) or "test". quick: one image in eight. Returns a JSON-able report: in
    `report["parts"]["id" | "cg" | "all"]`, `total` is of 1,200 and `of_2000` is set on MME's usual scale.
    Raises ConfigError for an unknown split, DataError if `answer` returns anything but one text per question.
    """
    items: Sequence[_Item] = mme_items(_checked(split))
    items = _quick(items, lambda item: (item.part, item.kind)) if quick else items
    said = _ask(answer, items, progress)
    parts, resamples = {}, {}
    rng = np.random.default_rng(0)
    for name, picks in _picks(items).items():
        records = [_record(items[i], said[i]) for i in picks]
        parts[name], resamples[name] = _mme_part(records, rng)
    gap = parts["id"]["total"]["score"] - parts["cg"]["total"]["score"]
    report: Report = {"suite": "mme", "split": split, "quick": quick, "n": len(items), "parts": parts}
    return report | {"gap": interval(gap, resamples["id"] - resamples["cg"])}


def _record(item: _Item, pred: str) -> dict[str, str]:
    answer = item.question.answer
    return {"category": item.kind, "question_id": str(item.image), "answer": answer, "pred": pred}


def _mme_part(records: list[dict[str, str]], rng: np.random.Generator) -> tuple[Report, Grades]:
    """Scores of a part, and the resamples of its total."""
    marked = _mark(records)
    subtasks: Report = {}
    total = np.zeros(())
    for name, (images, marks) in marked.items():
        resamples = _mme_score(bootstrap(images, marks, rng))
        mean = marks.mean(0)
        acc, plus, parsed, yes = mean.tolist()
        subtasks[name] = {**interval(float(_mme_score(mean)), resamples), "acc": acc, "acc_plus": plus}
        subtasks[name] |= {"parse_rate": parsed, "yes_share": yes, "images": len(images)}
        total = total + resamples
    found = interval(sum(row["score"] for row in subtasks.values()), total)
    every = np.concatenate([marks for _, marks in marked.values()]).mean(0)  # (4,)
    always_yes = score_mme({**record, "pred": "yes"} for record in records)["total"]
    report: Report = {"n": len(records), "images": sum(row["images"] for row in subtasks.values()), "total": found}
    report |= {"of_2000": {name: value * 2000 / (200 * len(marked)) for name, value in found.items()}}
    report |= {"parse_rate": float(every[2]), "yes_share": float(every[3]), "by_subtask": subtasks}
    return report | {"floor": {"always_yes": always_yes, "coin": COIN * len(marked)}}, total


@cache
def mme_items(split: Split) -> tuple[_Item, ...]:
    """Subtask by subtask, its "id" images first; the yes question of an image stands before the no question."""
    items: list[_Item] = []
    for subtask in SUBTASKS:
        shown: set[tuple[int, ...]] = set()
        for index in range(MME_IMAGES):
            part: Part = "id" if index < MME_IMAGES // 2 else "cg"
            rng = stream(*_where(split, _MME), SUBTASKS.index(subtask), index)
            pair = None
            while pair is None:
                scene = _scene(rng, split, shown, shows_pair=part == "cg")
                pair = yes_no_pair(scene, rng, subtask, split="train" if part == "id" else split)
            for question in pair:
                hinted = replace(question, text=f"{question.text} {YES_NO}")
                items.append(_Item(question=hinted, scene=scene, image=len(items) // 2, part=part, kind=subtask))
    return tuple(items)
