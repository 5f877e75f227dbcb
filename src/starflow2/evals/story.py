"""W-Story: stories told in words and images turn by turn, graded by the ladder of ISG.

The rungs are structure, block, image, consistency and answer. Images are read by the world's detector. An image is
compared with the request, consistency with the image *drawn* before it, a sentence with the image beside it. Every
score comes with its floors (the true replies of another story; the answer guessed from the kind of question) and its
ceiling (the true replies). The ceiling of a codec is `story_ceiling` with its round trip.

Letters: M stories, S steps of a story, K rungs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Final, get_args

import numpy as np
from numpy.typing import NDArray

from starflow2.errors import DataError
from starflow2.evals.statistics import (
    QUICK_SHARE,
    Grades,
    Row,
    Score,
    Scored,
    Scores,
    bootstrap,
    quick_share,
    score_rows,
)
from starflow2.evals.suite import (
    Codec,
    Graded,
    Images,
    Job,
    Part,
    Runs,
    Section,
    check_choice,
    checked_texts,
    digest,
    graded,
    jobs,
    roundtrip_scenes,
)
from starflow2.evals.twins import is_twin
from starflow2.world.detector import Scan, detect
from starflow2.world.scene import IMAGE_SIZE, SceneObject, Split, relations
from starflow2.world.splits import scene_key
from starflow2.world.stories import CG_ROWS, PARTS, REQUEST_KINDS, STEPS, Step, Story, story_task, suite_stories
from starflow2.world.story_text import Change, Look, agrees, answer_question, parse_sentence

__all__ = [
    "RUNGS",
    "SEED_BASE",
    "Ask",
    "Block",
    "Replies",
    "Reply",
    "StoryReading",
    "StorySuite",
    "plain_words",
    "read_replies",
    "step_grades",
    "stories_of",
    "usual_answers",
]

STORIES: Final = 64  # per split and part
SEED_BASE: Final = 3_000_000  # story i is told from seed SEED_BASE + i
PRIOR_STORIES: Final = 10_000  # training stories whose answers the guesser has read
MAX_DRIFT: Final = 4.0  # pixels by which an object that stays may move
RUNGS: Final = ("block", "image", "consistency")  # of one step

Block = str | Images  # words, or an image (64, 64, 3) uint8
Replies = list[list[Block]]  # by user turn: four requests, then the question
Reply = Callable[[list[list[str]], list[int]], list[Replies]]  # the user's words by story and turn, seeds
Ask = Callable[[list[Story], Images | None], list[str]]  # stories without answers, true images (M, S, 64, 64, 3)


# --------------------------------------------------------------------------------------------------------- the suite


_Items = Sequence[Job[Story]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorySuite:
    """Stories of four requests and a question. Scores a `Reply`.

    Columns of a report: structure, the share of stories whose replies are (text, image) four times, then one text;
    block, image and consistency, shares of steps whose sentence agrees with the image, in which the requested change is
    there, and everything else stayed (steps 2 to 4); prefix, the number of first steps without any fault, of 4; answer,
    by the truth. answer_by_request: of kinds of questions that the requests alone settle. answer_drawn: by the last
    image where it settles the question, and guess_drawn: that of the usual answer there. twins: of 100 images of steps
    (`twins`). Kinds are the steps ("step 1") and the kinds of questions, with their answers.

    ask: answers the questions alone, once with the true images and once with None, for comparison with the answers
    after one's own images. prior_stories: training stories that the guesser has read.
    """

    parts: tuple[Part, ...] = ("id", "cg")
    stories: int = STORIES
    prior_stories: int = PRIOR_STORIES
    ask: Ask | None = None
    name: ClassVar[str] = "story"
    chunk: ClassVar[int] = 16

    def items(self, split: Split) -> Mapping[str, _Items]:
        return {part: jobs(stories_of(split, part, self.stories), SEED_BASE) for part in self.parts}

    def quick(self, items: _Items) -> _Items:
        return quick_share(items, stratum=lambda item: None, unit=lambda item: item.index)

    def run(self, reply: Reply, items: _Items) -> list[StoryReading]:
        words = [[*(step.instruction for step in item.task.steps), item.task.question] for item in items]
        replies = list(reply(words, [item.seed for item in items]))
        _check(replies, len(items))
        return read_replies(replies)

    def truth(self, items: _Items, codec: Codec | None) -> list[StoryReading]:
        return _true_readings(items, codec)

    def grade(self, runs: Runs[Job[Story], StoryReading]) -> Graded:
        """Scores by the ladder.

        The ceiling is the true replies; the floor is those of other stories, with `guess`, the accuracy of the usual
        answer, and `words`, likewise, but right where the requests settle it.
        """
        rng = np.random.default_rng(0)
        scored, bounds = dict[str, Scored](), defaultdict[str, dict[str, Scores]](dict)
        for part, pairs in runs.items():
            items = tuple(item for item, _ in pairs)
            scored[part] = _grade([(item.task, reading) for item, reading in pairs], self.prior_stories, rng)
            bounds["truth"][part], bounds["floor"][part] = _bounds(items, self.prior_stories)
            if self.ask is not None:
                bounds["asked"][part] = _ask(self.ask, items, rng)
        return graded(scored, dict(bounds), {"seed_base": SEED_BASE, "prior_stories": self.prior_stories})

    def lock(self) -> Section:
        items = {
            f"{split}/{part}": _digest(stories_of(split, part, self.stories))
            for split in get_args(Split)
            for part in PARTS
        }
        settings = {"stories": self.stories, "steps": STEPS, "cg_rows": list(CG_ROWS), "seed_base": SEED_BASE}
        return {"story": {**settings, "quick_share": QUICK_SHARE, "items": items}}


@cache
def stories_of(split: Split, part: Part, count: int) -> tuple[Story, ...]:
    """The first stories of a part. Raises ConfigError for one that stories do not have."""
    check_choice("part", part, PARTS)
    return tuple(suite_stories(split, part, count))  # type: ignore[arg-type]  # checked above


def _digest(stories: Sequence[Story]) -> Section:
    return digest(
        (story.question, story.answer, step.instruction, step.sentence, step.scene.background, *scene_key(step.scene))
        for story in stories
        for step in story.steps
    )


# ---------------------------------------------------------------------------------------------------- reading replies


@dataclass(frozen=True, slots=True)
class _ImageReading:
    """The objects of an image by the detector, and how many blobs there are that it could not name."""

    objects: tuple[SceneObject, ...]
    unknown: int


@dataclass(frozen=True, slots=True)
class StoryReading:
    """The replies to one story: by step the first text and image, "" and None where there is none."""

    is_sound: bool  # exactly (text, image) four times, then one text
    texts: tuple[str, ...]
    images: tuple[_ImageReading | None, ...]
    answer: str


def _check(replies: Sequence[Replies], count: int) -> None:
    """Raise DataError unless there are replies to `count` stories, with only text and uint8 images (64, 64, 3)."""
    if len(replies) != count or any(len(turns) != STEPS + 1 for turns in replies):
        lengths = sorted({len(turns) for turns in replies})
        raise DataError(
            f"replies: expected {count} stories of {STEPS + 1} turns, got {len(replies)} of {lengths}; return one list "
            "of blocks for each of the user's turns, empty if there is no reply"
        )
    size = (IMAGE_SIZE, IMAGE_SIZE, 3)
    for block in (block for turns in replies for blocks in turns for block in blocks):
        is_image = isinstance(block, np.ndarray) and block.dtype == np.uint8 and block.shape == size
        if not isinstance(block, str) and not is_image:
            raise DataError(f"block: expected text or an image uint8 {size}, got {block!r}")


def read_replies(replies: Sequence[Replies]) -> list[StoryReading]:
    """The replies to several stories, all images read by the detector at once."""
    images = [[_first_image(blocks) for blocks in turns[:STEPS]] for turns in replies]
    present = [image for row in images for image in row if image is not None]
    scans = iter(detect(np.stack(present)) if present else ())
    readings = []
    for turns, row in zip(replies, images, strict=True):
        texts = [next((block for block in blocks if isinstance(block, str)), "") for blocks in turns]
        is_text = [[isinstance(block, str) for block in blocks] for blocks in turns]
        is_sound = is_text == [[True, False]] * STEPS + [[True]]
        read = tuple(None if image is None else _read(next(scans)) for image in row)
        readings.append(StoryReading(is_sound, tuple(texts[:STEPS]), read, texts[STEPS]))
    return readings


def _first_image(blocks: Sequence[Block]) -> Images | None:
    return next((block for block in blocks if not isinstance(block, str)), None)


def _read(scan: Scan) -> _ImageReading:
    objects = tuple(found.as_object for found in scan.detections)
    return _ImageReading(objects, scan.unknown)


def _true_readings(items: _Items, codec: Codec | None) -> list[StoryReading]:
    """Readings of the true replies, with images after a codec's round trip if there is one."""
    replies: list[Replies] = []
    for item, images in zip(items, _true_images(items, codec), strict=True):
        steps = zip(item.task.steps, images, strict=True)
        replies.append([*([step.sentence, image] for step, image in steps), [item.task.answer]])
    return read_replies(replies)


def _true_images(items: _Items, codec: Codec | None = None) -> Images:
    """(M, S, 64, 64, 3)."""
    images = roundtrip_scenes(codec, [step.scene for item in items for step in item.task.steps])
    return images.reshape(len(items), STEPS, *images.shape[1:])


# ----------------------------------------------------------------------------------------------------------- the ladder

_BLANK: Final = _ImageReading((), 0)  # before the first step


def step_grades(story: Story, reading: StoryReading) -> list[tuple[bool, bool, bool]]:
    """By step: the sentence agrees with the image, the change is in it, the rest stayed."""
    grades: list[tuple[bool, bool, bool]] = []
    before: _ImageReading | None = _BLANK
    for index, (step, text, now) in enumerate(zip(story.steps, reading.texts, reading.images, strict=True)):
        if now is None or before is None:
            grades.append((now is not None and _agree(text, now), False, False))
        else:
            num_before = len(story.steps[index - 1].scene.objects) if index else 0
            num_stay = num_before - sum(change.before is not None for change in step.change.all)
            is_changed = all(_is_changed(change, before, now) for change in step.change.all)
            grades.append((_agree(text, now), is_changed, _is_rest_unchanged(step.change, num_stay, before, now)))
        before = now
    return grades


def _agree(text: str, image: _ImageReading) -> bool:
    claim = parse_sentence(text)
    return claim is not None and not image.unknown and agrees(claim, image.objects)


def _is_changed(change: Change, before: _ImageReading, now: _ImageReading) -> bool:
    """True if the removed object was there and is gone, and the added one is new, is there once, and in its place."""
    if change.before is not None and (not _all(change.before, before) or _all(change.before, now)):
        return False
    if change.after is None:
        return True
    new = _all(change.after, now)
    if len(new) != 1 or _all(change.after, before):
        return False
    if change.relation is None or change.reference is None:
        return True
    return any(change.relation in relations(new[0], other) for other in _all(change.reference, now))


def _all(look: Look, image: _ImageReading) -> list[SceneObject]:
    return [obj for obj in image.objects if look.fits(obj)]


def _is_rest_unchanged(change: Change, num_stay: int, before: _ImageReading, now: _ImageReading) -> bool:
    """True if the objects that the request leaves alone are as drawn before, and only the new object joins them.

    num_stay: how many objects these are; an image that had fewer cannot keep them. A recoloured object must keep its
    shape, size and place.
    """
    rest, turned = list(before.objects), list[SceneObject]()
    for one in change.all:
        target = next((obj for obj in rest if one.before is not None and one.before.fits(obj)), None)
        if target is not None:
            rest = [obj for obj in rest if obj is not target]
            turned += [replace(target, color=one.after.color)] if one.after is not None else []
    num_turned = sum(one.before is not None and one.after is not None for one in change.all)
    left = list(now.objects)
    for obj in [*rest, *turned]:
        twin = _twin(obj, left)
        if twin is None:
            return False
        left.remove(twin)
    has_all = len(rest) >= num_stay and len(turned) == num_turned
    return has_all and len(left) + now.unknown <= (change.op in ("start", "add"))


def _twin(obj: SceneObject, objects: Sequence[SceneObject]) -> SceneObject | None:
    """The nearest object of the same shape, colour and size, None if it is too far from where the object was."""
    same = [o for o in objects if (o.shape, o.color, o.size) == (obj.shape, obj.color, obj.size)]
    near = min(same, key=lambda o: np.hypot(o.x - obj.x, o.y - obj.y), default=None)
    return near if near is not None and np.hypot(near.x - obj.x, near.y - obj.y) <= MAX_DRIFT else None


def plain_words(text: str) -> str:
    """The words of an answer in lower case, without marks."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _shown_answer(story: Story, reading: StoryReading) -> str | None:
    """The answer by the last image; None if it does not settle the question."""
    last = reading.images[-1]
    return None if last is None or last.unknown else answer_question(story.question, last.objects)


# ---------------------------------------------------------------------------------------------------- scores, intervals

COLUMNS: Final = ("structure", *RUNGS, "prefix", "answer")
_Pairs = Sequence[tuple[Story, StoryReading]]


def _grade(pairs: _Pairs, prior_stories: int, rng: np.random.Generator) -> Scored:
    """Scores of a part."""
    steps = np.array([step_grades(story, reading) for story, reading in pairs], np.float64)  # (M, S, K)
    rungs = [steps[:, int(rung == "consistency") :, k].mean(1) for k, rung in enumerate(RUNGS)]  # K x (M,)
    prefix = np.cumprod(steps.prod(-1), axis=1).sum(1)  # (M,)
    rows = [
        Row("", i, (reading.is_sound, *(rung[i] for rung in rungs), prefix[i], _is_right(story, reading)))
        for i, (story, reading) in enumerate(pairs)
    ]
    scored = score_rows(rows, COLUMNS, rng, "plain")
    by_step = _open_additions(pairs, steps) | {
        f"step {number}": Scores(len(rows), len(rows), dict(zip(RUNGS, map(Score, means.tolist()), strict=True)))
        for number, means in enumerate(steps.mean(0), 1)
    }
    answers, by_question = _grade_answers(pairs, prior_stories, rng)
    scores = replace(scored.scores.with_columns(**answers, twins=_twins(pairs)), by_kind=by_step | by_question)
    return replace(scored, scores=scores)


def _open_additions(pairs: _Pairs, steps: NDArray[np.float64]) -> dict[str, Scores]:
    """RUNGS of the steps (M, S, K) that add an object without a place, if there are any, under "open addition"."""
    rows = [steps[i, j] for i, (story, _) in enumerate(pairs) for j, step in enumerate(story.steps) if _is_open(step)]
    if not rows:
        return {}
    means = dict(zip(RUNGS, map(Score, np.mean(rows, axis=0).tolist()), strict=True))
    return {"open addition": Scores(len(rows), len(rows), means)}


def _twins(pairs: _Pairs) -> float | None:
    """Twins per 100 images of steps whose true image has several shapes; None where there is no such image."""
    rows = [
        ([obj.shape for obj in step.scene.objects], image)
        for story, reading in pairs
        for step, image in zip(story.steps, reading.images, strict=True)
    ]
    found = [
        is_twin(asked, (obj.shape for obj in image.objects))
        for asked, image in rows
        if image is not None and len(set(asked)) > 1
    ]
    return 100 * sum(found) / len(found) if found else None


def _is_open(step: Step) -> bool:
    return step.change.op == "add" and step.change.relation is None


def _is_right(story: Story, reading: StoryReading) -> bool:
    return plain_words(reading.answer) == story.answer


def _grade_answers(
    pairs: _Pairs, prior_stories: int, rng: np.random.Generator
) -> tuple[dict[str, Score], dict[str, Scores]]:
    """Further columns about answers, and the answers to each kind of question."""
    right = np.array([_is_right(*pair) for pair in pairs], np.float64)
    shown = [_shown_answer(*pair) for pair in pairs]
    drawn = np.array([plain_words(r.answer) == word for (_, r), word in zip(pairs, shown, strict=True)], np.float64)
    usual = usual_answers(prior_stories)
    guessed = np.array([usual.get(story.kind) == word for (story, _), word in zip(pairs, shown, strict=True)], float)
    is_settled = np.array([word is not None for word in shown])
    kinds = np.array([story.kind for story, _ in pairs])
    columns = {
        "answer_by_request": _share(right[np.isin(kinds, list(REQUEST_KINDS))], rng),
        "answer_drawn": _share(drawn[is_settled], rng),
        "guess_drawn": Score(float(guessed[is_settled].mean()) if is_settled.any() else None),
        "n_drawn": Score(int(is_settled.sum())),
    }
    by_question = {}
    for kind in sorted(set(kinds.tolist())):
        is_kind = kinds == kind
        answers = {"answer": _share(right[is_kind], rng), "answer_drawn": _share(drawn[is_kind & is_settled], rng)}
        by_question[kind] = Scores(int(is_kind.sum()), int(is_kind.sum()), answers)
    return columns, by_question


def _share(marks: Grades, rng: np.random.Generator) -> Score:
    """Mean of marks (n,) with its interval; no score where there is nothing to score."""
    return bootstrap(range(len(marks)), marks[:, None], rng).columns(("",))[""] if len(marks) else Score(None)


# ------------------------------------------------------------------------------------------------- floors and ceilings


@cache
def _bounds(items: tuple[Job[Story], ...], prior_stories: int) -> tuple[Scores, Scores]:
    """Ceiling and floor of a part."""
    stories, readings = [item.task for item in items], _true_readings(items, None)
    truth, other = (
        _grade(list(zip(stories, rows, strict=True)), prior_stories, np.random.default_rng(0)).scores
        for rows in (readings, readings[1:] + readings[:1])
    )
    usual = usual_answers(prior_stories)
    right = np.array([story.answer == usual.get(story.kind) for story in stories])
    is_settled = np.array([story.kind in REQUEST_KINDS for story in stories])
    return truth, other.with_columns(guess=float(right.mean()), words=float((right | is_settled).mean()))


@cache
def usual_answers(count: int) -> Mapping[str, str]:
    """Kind of question -> its most frequent answer in the first training stories."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(count):
        story = story_task(0, index)
        answers[story.kind][story.answer] += 1
    return {kind: words.most_common(1)[0][0] for kind, words in answers.items()}


def _ask(ask: Ask, items: _Items, rng: np.random.Generator) -> Scores:
    """Accuracy by the truth after the true story, with its images and with none."""
    stories = [replace(item.task, answer="") for item in items]
    columns = {}
    for name, images in (("true_pictures", _true_images(items)), ("no_pictures", None)):
        answers = checked_texts(ask(stories, images), len(items))
        right = [plain_words(text) == item.task.answer for text, item in zip(answers, items, strict=True)]
        columns[name] = _share(np.array(right, np.float64), rng)
    return Scores(len(items), len(items), columns)
