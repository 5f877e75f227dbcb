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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from starflow2.errors import ConfigError, DataError
from starflow2.evals.statistics import (
    Grades,
    Report,
    bootstrap,
    check_lock,
    chunks,
    digest,
    interval,
    lock_text,
    quick_share,
)
from starflow2.world.questions import (
    NUMBERS,
    PLURALS,
    SUBTASKS,
    YES_NO,
    Question,
    questions,
    understanding_task,
    yes_no_pair,
)
from starflow2.world.scene import (
    COLORS,
    HELD_OUT,
    SHAPES,
    SIZES,
    Scene,
    Split,
    bucket,
    held_out,
    render,
    sample_scene,
    scene_key,
    stream,
)

__all__ = ["evaluate_gqa", "evaluate_mme", "lock_spec", "parse_yes_no", "question_prior", "score_mme", "verify_lock"]

Part = Literal["id", "cg"]
PARTS: tuple[Part, ...] = get_args(Part)
MME_IMAGES: Final = 64  # per subtask, half of them "cg"
GQA_SCENES: Final[Mapping[Part, int]] = MappingProxyType({"id": 192, "cg": 64})
GQA_QUESTIONS: Final = 4  # per scene
THINGS: Final = (0.15, 0.3, 0.3, 0.25)  # shares of scenes with one to four objects, as in training
REPEATS: Final = 0.35  # share of scenes of several objects in which some have the same shape, as in training
PRIOR_ITEMS: Final = 5000  # training items whose questions the question-only prior has read
PRIOR_SEEN: Final = 5  # fewer sightings of a pattern than this, and a vaguer one is asked
ASK_CHUNK: Final = 128  # questions asked of `answer` at a time
COIN: Final = 75.0  # MME score of a coin: half of the questions, a quarter of the pairs

_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark
_MME, _GQA = 4, 5  # second number of a stream

Images = NDArray[np.uint8]
Answer = Callable[[Images, list[str]], list[str]]  # (n, 64, 64, 3), n questions -> n answers
Progress = Callable[[int, int], None]  # questions done, questions in all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    question: Question
    scene: Scene
    image: int  # number in its suite; questions about one image are resampled together
    part: Part
    kind: str  # the subtask of MME, the kind of GQA's question


# ----------------------------------------------------------------------------------------------- MME's parser, score


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


# -------------------------------------------------------------------------------------------------------------- W-MME-p


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


# ----------------------------------------------------------------------------------------------------- items, asking


def _checked(split: Split) -> Split:
    if split not in get_args(Split):
        raise ConfigError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
    return split


def _where(split: Split, suite: int) -> tuple[int, int, int]:
    """The numbers that a suite's streams begin with."""
    return (_SUITE_SEED, suite, get_args(Split).index(split))


def _scene(rng: np.random.Generator, split: Split, shown: set[tuple[int, ...]], *, shows_pair: bool = False) -> Scene:
    """A scene of the split, not among those shown, with nothing held out in it but colour-shape pairs if asked."""
    wanted = {"pair"} if shows_pair else set()
    others = [name for name in HELD_OUT if name != split]
    while True:
        shapes = _shapes(rng)
        scene = sample_scene(rng, shapes=shapes, colors=_colors(rng, shapes, split if shows_pair else None))
        if bucket(scene) != split or held_out(scene, split) != wanted or scene_key(scene) in shown:
            continue
        if not any(held_out(scene, other) for other in others):
            shown.add(scene_key(scene))
            return scene


def _shapes(rng: np.random.Generator) -> list[int]:
    """Shapes of one to four objects that may meet in training."""
    while True:
        count = int(rng.choice(len(THINGS), p=THINGS)) + 1
        shapes: list[int] = rng.permutation(len(SHAPES))[:count].tolist()
        if count > 1 and rng.random() < REPEATS:
            same = int(rng.integers(2, count + 1))
            shapes = [shapes[0]] * same + shapes[same:]
        counts = {(shape, shapes.count(shape)) for shape in shapes}
        if not any(counts & t.counts or any(pair.issubset(shapes) for pair in t.shapes) for t in HELD_OUT.values()):
            return shapes


def _colors(rng: np.random.Generator, shapes: Sequence[int], novel: Split | None) -> list[int]:
    """A colour per shape: one seen with it in training, or for the first and half of the rest one that `novel` holds
    out."""
    colors = []
    for index, shape in enumerate(shapes):
        kept = {name: {color for s, color in table.pairs if s == shape} for name, table in HELD_OUT.items()}
        options = [color for color in range(len(COLORS)) if not any(color in held for held in kept.values())]
        if novel is not None and (index == 0 or rng.random() < 0.5):
            options = sorted(kept[novel])
        colors.append(options[int(rng.integers(len(options)))])
    return colors


def _quick(items: Sequence[_Item], stratum: Callable[[_Item], object]) -> list[_Item]:
    """All questions about one image in eight of each stratum."""
    strata: dict[object, dict[int, None]] = defaultdict(dict)
    for item in items:
        strata[stratum(item)][item.image] = None
    rng = np.random.default_rng(0)
    kept = {image for images in strata.values() for image in quick_share(list(images), rng)}
    return [item for item in items if item.image in kept]


def _picks(items: Sequence[_Item]) -> dict[str, list[int]]:
    """Indices of the items of each part, and of all."""
    parts: dict[str, list[int]] = {p: [i for i, item in enumerate(items) if item.part == p] for p in PARTS}
    return parts | {"all": list(range(len(items)))}


def _ask(answer: Answer, items: Sequence[_Item], progress: Progress | None) -> list[str]:
    said: list[str] = []
    for chunk in chunks(items, ASK_CHUNK):
        images = np.stack([render(item.scene) for item in chunk])  # (n, 64, 64, 3)
        found = list(answer(images, [item.question.text for item in chunk]))
        if len(found) != len(chunk) or not all(isinstance(text, str) for text in found):
            raise DataError(f"answers: expected {len(chunk)} texts, got {len(found)} of {set(map(type, found))}")
        said += found
        if progress:
            progress(len(said), len(items))
    return said


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
