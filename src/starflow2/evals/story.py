"""W-Story: words and pictures told in turn, by the ladder of ISG: structure, block, image, consistency, answer.

The runner is handed a `tell` function and knows nothing of models. Pictures are read by the judge. An image is held
against the request, consistency against the picture *drawn* before it, a sentence against the picture beside it.
Every score comes with its floors (another story's truth told; the answer guessed from the kind of question) and its
ceiling (the truth told). What a codec allows is `story_ceiling` with its round trip.

Letters: M stories, S steps of a story, K rungs.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from starflow2.errors import DataError
from starflow2.evals.statistics import (
    QUICK_SHARE,
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
from starflow2.world.detector import Scan, detect
from starflow2.world.scene import IMAGE_SIZE, SceneObject, Split, relations, render
from starflow2.world.splits import scene_key
from starflow2.world.stories import CG_ROWS, REQUEST_KINDS, STEPS, Part, Story, story_task, suite_stories
from starflow2.world.story_text import Change, Look, agrees, answer_question, parse_sentence

__all__ = ["Ask", "Block", "Tell", "evaluate_story", "lock_spec", "story_ceiling", "verify_lock"]

STORIES: Final = 64  # per split and part
SEED_BASE: Final = 3_000_000  # story i is told from seed SEED_BASE + i
TELL_CHUNK: Final = 16  # stories asked of `tell` at a time
PRIOR_STORIES: Final = 10_000  # training stories whose answers the guesser has read
MAX_DRIFT: Final = 4.0  # pixels by which an object that stays may move
RUNGS: Final = ("block", "image", "consistency")  # of one step
TURN: Final = ("text", "image")

Images = NDArray[np.uint8]
Block = tuple[Literal["text"], str] | tuple[Literal["image"], Images]  # (64, 64, 3) uint8
Told = list[list[Block]]  # by user turn: four requests, then the question
Tell = Callable[[list[list[str]], list[int]], list[Told]]  # the user's words by story and turn, seeds -> blocks
Ask = Callable[[list[Story], Images | None], list[str]]  # stories without answers, true pictures (M, S, 64, 64, 3)
Progress = Callable[[int, int], None]  # stories done, stories in all
Roundtrip = Callable[[Images], Images]  # (n, 64, 64, 3) -> the same through a codec


@dataclass(frozen=True, slots=True)
class _Item:
    index: int  # in the full suite, so that a quick run tells the same stories from the same seeds
    story: Story


@dataclass(frozen=True, slots=True)
class _Picture:
    """What the judge saw. `unknown` blobs are things that have no name."""

    objects: tuple[SceneObject, ...]
    unknown: int


@dataclass(frozen=True, slots=True)
class _Reading:
    """One told story, pictures read: by step the first text and picture, "" and None where there is none."""

    is_sound: bool  # blocks are exactly (text, picture) x 4, then one text
    texts: tuple[str, ...]
    pictures: tuple[_Picture | None, ...]
    answer: str


def evaluate_story(
    tell: Tell,
    split: Split,
    *,
    quick: bool = False,
    parts: Sequence[Part] = ("id", "cg"),
    ask: Ask | None = None,
    progress: Progress | None = None,
) -> Report:
    """Has the suite told, and grades it; shares in [0, 1], the prefix in steps of 4.

    split: "dev" (for every choice) or "test". quick: one story in eight. ask: answers the questions alone, once with
    the true pictures and once with None, to be set beside the answers after one's own pictures.
    Returns a JSON-able report; in `report["parts"][part]`, each rung has its mean and `by_step`, the mean of
    consistency being over steps 2 to 4; `prefix` is the number of first steps without any fault; `answer` has the
    accuracy by the truth ("true"; only for `told` kinds do the requests settle it), and by what the last picture shows
    ("drawn", over the stories whose picture settles it). Raises ConfigError for an unknown split or part, DataError if
    `tell` or `ask` returns anything but what its type says.
    """
    sets = {part: _items(split, part, quick) for part in parts}
    total = sum(map(len, sets.values()))
    report: Report = {"suite": "story", "split": split, "quick": quick, "n": total, "seed_base": SEED_BASE}
    report |= {"prior_stories": PRIOR_STORIES, "parts": {}}
    rng, done, resampled = np.random.default_rng(0), 0, dict[str, dict[str, Grades]]()
    for part, items in sets.items():
        readings: list[_Reading] = []
        for chunk in chunks(items, TELL_CHUNK):
            readings += read_told(_asked_to_tell(tell, chunk))
            done += len(chunk)
            if progress:
                progress(done, total)
        report["parts"][part], resampled[part] = _summary(items, readings, rng)
        report["parts"][part] |= _bounds(split, part, quick)
        if ask is not None:
            report["parts"][part]["asked"] = _asked(ask, items, rng)
    if "id" in sets and "cg" in sets:
        report["gap"] = _gap(report["parts"], resampled)
    return report


def story_ceiling(
    split: Split, *, quick: bool = False, part: Part = "id", roundtrip: Roundtrip | None = None
) -> Report:
    """The part of a report when the truth is told, its pictures after a codec's round trip if there is one."""
    items = _items(split, part, quick)
    readings = [row for chunk in chunks(items, TELL_CHUNK) for row in read_told(_truth(chunk, roundtrip))]
    return _summary(items, readings, np.random.default_rng(0))[0]


def _items(split: Split, part: Part, quick: bool) -> list[_Item]:
    items = [_Item(i, story) for i, story in enumerate(_suite(split, part))]
    return quick_share(items, np.random.default_rng(0)) if quick else items


@cache
def _suite(split: Split, part: Part) -> tuple[Story, ...]:
    return tuple(suite_stories(split, part, STORIES))


# ------------------------------------------------------------------------------------------------ telling and reading


def _asked_to_tell(tell: Tell, items: Sequence[_Item]) -> list[Told]:
    words = [[*(step.instruction for step in item.story.steps), item.story.question] for item in items]
    told = list(tell(words, [SEED_BASE + item.index for item in items]))
    if len(told) != len(items) or any(len(turns) != STEPS + 1 for turns in told):
        lengths = sorted({len(turns) for turns in told})
        raise DataError(
            f"told: expected {len(items)} stories of {STEPS + 1} turns, got {len(told)} of {lengths}; return one list "
            "of blocks for each of the user's turns, empty if nothing was told"
        )
    for block in (block for turns in told for blocks in turns for block in blocks):
        _check(block)
    return told


def _check(block: object) -> None:
    """Raises DataError unless it is ("text", str) or ("image", uint8 (64, 64, 3))."""
    match block:
        case ("text", str()):
            return
        case ("image", np.ndarray() as image) if image.dtype == np.uint8:
            if image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3):
                return
    raise DataError(f'block: expected ("text", str) or ("image", uint8 ({IMAGE_SIZE}, {IMAGE_SIZE}, 3)), got {block!r}')


def _truth(items: Sequence[_Item], roundtrip: Roundtrip | None) -> list[Told]:
    """What a perfect teller tells."""
    pictures = _true_pictures(items)  # (M, S, 64, 64, 3)
    if roundtrip is not None:
        pictures = np.asarray(roundtrip(pictures.reshape(-1, *pictures.shape[2:]))).reshape(pictures.shape)
    told: list[Told] = []
    for item, images in zip(items, pictures, strict=True):
        steps = zip(item.story.steps, images, strict=True)
        turns: Told = [[("text", step.sentence), ("image", image)] for step, image in steps]
        told.append([*turns, [("text", item.story.answer)]])
    return told


def _true_pictures(items: Sequence[_Item]) -> Images:
    """(M, S, 64, 64, 3)."""
    return np.stack([[render(step.scene) for step in item.story.steps] for item in items])


def read_told(told: Sequence[Told]) -> list[_Reading]:
    """All pictures through the judge at once, blocks put in their places."""
    shown = [[_first(blocks, "image") for blocks in turns[:STEPS]] for turns in told]
    images = [image for row in shown for image in row if image is not None]
    seen = iter(map(_picture, detect(np.stack(images))) if images else ())
    readings = []
    for turns, row in zip(told, shown, strict=True):
        kinds = [tuple(kind for kind, _ in blocks) for blocks in turns]
        texts = [str(_first(blocks, "text") or "") for blocks in turns]
        pictures = tuple(None if image is None else next(seen) for image in row)
        is_sound = kinds == [TURN] * STEPS + [("text",)]
        readings.append(_Reading(is_sound, tuple(texts[:STEPS]), pictures, texts[STEPS]))
    return readings


def _first(blocks: Sequence[Block], kind: str) -> Any:
    return next((value for name, value in blocks if name == kind), None)


def _picture(scan: Scan) -> _Picture:
    things = tuple(
        SceneObject(
            shape=found.shape,
            color=-1 if found.color is None else found.color,
            size=found.size,
            x=found.center[0],
            y=found.center[1],
            angle=0.0,
        )
        for found in scan.detections
    )
    return _Picture(things, scan.unknown)


# ----------------------------------------------------------------------------------------------------------- the ladder

_BLANK: Final = _Picture((), 0)  # before the first step


def step_grades(story: Story, reading: _Reading) -> list[tuple[bool, bool, bool]]:
    """By step: the sentence agrees with the picture, the change is in it, the rest stayed."""
    grades, before = [], cast("_Picture | None", _BLANK)
    for index, (step, text, now) in enumerate(zip(story.steps, reading.texts, reading.pictures, strict=True)):
        if now is None or before is None:
            grades.append((now is not None and _agree(text, now), False, False))
        else:
            num_before = len(story.steps[index - 1].scene.objects) if index else 0
            stays = num_before - (step.change.before is not None)
            changed, kept = _is_changed(step.change, before, now), _is_kept(step.change, stays, before, now)
            grades.append((_agree(text, now), changed, kept))
        before = now
    return grades


def _agree(text: str, picture: _Picture) -> bool:
    claim = parse_sentence(text)
    return claim is not None and not picture.unknown and agrees(claim, picture.objects)


def _is_changed(change: Change, before: _Picture, now: _Picture) -> bool:
    """Whether what goes was there and is not, and what comes was not there, is there once, and stands as asked."""
    if change.before is not None and (not _all(change.before, before) or _all(change.before, now)):
        return False
    if change.after is None:
        return True
    found = _all(change.after, now)
    if len(found) != 1 or _all(change.after, before):
        return False
    if change.relation is None or change.reference is None:
        return True
    return any(change.relation in relations(found[0], other) for other in _all(change.reference, now))


def _all(look: Look, picture: _Picture) -> list[SceneObject]:
    return [thing for thing in picture.objects if look.fits(thing)]


def _is_kept(change: Change, stays: int, before: _Picture, now: _Picture) -> bool:
    """Whether all that the request leaves alone is as it was drawn before, and nothing else is there but what comes.

    stays: how many objects the request leaves alone; a picture that had fewer cannot keep them. An object recoloured
    must keep its shape, size and place.
    """
    rest, target = list(before.objects), None
    if change.before is not None:
        target = next(iter(_all(change.before, before)), None)
        rest = [thing for thing in rest if thing is not target]
    if len(rest) < stays:
        return False
    left = list(now.objects)
    for thing in rest:
        twin = _twin(thing, left)
        if twin is None:
            return False
        left.remove(twin)
    if change.before is not None and change.after is not None:  # recoloured
        turned = target is not None and _twin(replace(target, color=change.after.color), left) is not None
        return turned and len(left) == 1 and not now.unknown
    return len(left) + now.unknown <= (change.after is not None)


def _twin(thing: SceneObject, things: Sequence[SceneObject]) -> SceneObject | None:
    """The nearest one of the same shape, colour and size that stands where the thing stood."""
    same = [t for t in things if (t.shape, t.color, t.size) == (thing.shape, thing.color, thing.size)]
    near = min(same, key=lambda t: np.hypot(t.x - thing.x, t.y - thing.y), default=None)
    return near if near is not None and np.hypot(near.x - thing.x, near.y - thing.y) <= MAX_DRIFT else None


def _word(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _shown_answer(story: Story, reading: _Reading) -> str | None:
    """What the last picture answers; None if it does not settle the question."""
    last = reading.pictures[-1]
    return None if last is None or last.unknown else answer_question(story.question, last.objects)


# ---------------------------------------------------------------------------------------------------- scores, intervals


def _summary(
    items: Sequence[_Item], readings: Sequence[_Reading], rng: np.random.Generator
) -> tuple[Report, dict[str, Grades]]:
    """Scores of a part, and the resampled means that a gap is taken of."""
    stories = [item.story for item in items]
    pairs = list(zip(stories, readings, strict=True))
    steps = np.array([step_grades(story, reading) for story, reading in pairs], np.float64)  # (M, S, K)
    columns = {"structure": np.array([reading.is_sound for reading in readings], np.float64)}
    columns |= {rung: steps[:, int(rung == "consistency") :, k].mean(1) for k, rung in enumerate(RUNGS)}
    columns["prefix"] = np.cumprod(steps.prod(-1), axis=1).sum(1)
    columns["answer"] = np.array([_word(reading.answer) == story.answer for story, reading in pairs], np.float64)
    resamples = dict(zip(columns, _bootstrap(np.stack(list(columns.values()), axis=1), rng).T, strict=True))
    report: Report = {"n": len(items)}
    report |= {name: interval(float(column.mean()), resamples[name]) for name, column in columns.items()}
    for k, rung in enumerate(RUNGS):
        report[rung]["by_step"] = steps[..., k].mean(0).tolist()
    report["answer"] = {"true": report["answer"]} | _answers(pairs, columns["answer"], rng)
    return report, resamples


def _answers(pairs: Sequence[tuple[Story, _Reading]], right: Grades, rng: np.random.Generator) -> Report:
    """The rows about answers besides "true". right: (M,) by the truth."""
    shown = [_shown_answer(story, reading) for story, reading in pairs]
    drawn = np.array([_word(reading.answer) == word for (_, reading), word in zip(pairs, shown, strict=True)], float)
    is_settled = np.array([word is not None for word in shown])
    kinds = np.array([story.kind for story, _ in pairs])
    report = {"told": _row(right[np.isin(kinds, list(REQUEST_KINDS))], rng), "drawn": _row(drawn[is_settled], rng)}
    guesses = [_guesses().get(story.kind) for story, _ in pairs]
    guessed = np.array([guess == word for guess, word in zip(guesses, shown, strict=True)], float)
    report["drawn"]["guess"] = float(guessed[is_settled].mean()) if is_settled.any() else None
    by_kind = {
        kind: {"true": _row(right[kinds == kind], rng), "drawn": _row(drawn[(kinds == kind) & is_settled], rng)}
        for kind in sorted(set(kinds.tolist()))
    }
    return {**report, "by_kind": by_kind}


def _row(marks: Grades, rng: np.random.Generator) -> Report:
    """Mean of marks (n,), its interval, n; no score where there is nothing to score."""
    if not len(marks):
        return {"score": None, "low": None, "high": None, "n": 0}
    return interval(float(marks.mean()), _bootstrap(marks[:, None], rng)[:, 0]) | {"n": len(marks)}


def _bootstrap(columns: Grades, rng: np.random.Generator) -> Grades:
    return bootstrap(range(len(columns)), columns, rng)


def _gap(parts: Mapping[str, Report], resampled: Mapping[str, Mapping[str, Grades]]) -> Report:
    """ID minus CG, rung by rung; of answers by the truth."""

    def score(part: str, name: str) -> float:
        row = parts[part][name]
        return float(row["true"]["score"] if name == "answer" else row["score"])

    return {
        name: interval(score("id", name) - score("cg", name), resampled["id"][name] - resampled["cg"][name])
        for name in resampled["id"]
    }


# ------------------------------------------------------------------------------------------------- floors and ceilings


@cache
def _bounds(split: Split, part: Part, quick: bool) -> Report:
    """`ceiling`: the truth told. `floor`: each story answered by the truth of the next one; `guess`, by the answer that
    training gave most often to that kind of question; `words`, the same where the requests do not settle it, and right
    where they do."""
    items = _items(split, part, quick)
    readings = [row for chunk in chunks(items, TELL_CHUNK) for row in read_told(_truth(chunk, None))]
    truth, _ = _summary(items, readings, np.random.default_rng(0))
    other, _ = _summary(items, readings[1:] + readings[:1], np.random.default_rng(0))
    guesses = _guesses()
    right = np.array([item.story.answer == guesses.get(item.story.kind) for item in items])
    told = np.array([item.story.kind in REQUEST_KINDS for item in items])
    floors = {"guess": float(right.mean()), "words": float((right | told).mean())}
    return {"ceiling": _plain(truth), "floor": _plain(other) | floors}


def _plain(report: Report) -> Report:
    """Scores without intervals."""
    rungs = {name: report[name]["score"] for name in ("structure", *RUNGS, "prefix")}
    return rungs | {"answer": report["answer"]["true"]["score"]}


@cache
def _guesses() -> Mapping[str, str]:
    """Kind of question -> its most frequent answer in training."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(PRIOR_STORIES):
        story = story_task(0, index)
        counts[story.kind][story.answer] += 1
    return {kind: found.most_common(1)[0][0] for kind, found in counts.items()}


def _asked(ask: Ask, items: Sequence[_Item], rng: np.random.Generator) -> Report:
    """Accuracy by the truth with the true pictures, and with none."""
    stories = [replace(item.story, answer="") for item in items]
    report: Report = {}
    for name, pictures in (("true_pictures", _true_pictures(items)), ("no_pictures", None)):
        said = list(ask(stories, pictures))
        if len(said) != len(items) or not all(isinstance(text, str) for text in said):
            raise DataError(f"answers: expected {len(items)} texts, got {len(said)} of {set(map(type, said))}")
        right = [_word(text) == item.story.answer for text, item in zip(said, items, strict=True)]
        report[name] = _row(np.array(right, np.float64), rng)
    return report


# ------------------------------------------------------------------------------------------------------------- the lock


def lock_spec() -> Report:
    """The frozen suite, made afresh: its settings, and count and hash of each part's words and scene keys."""
    items = {f"{split}/{part}": _digest(_suite(split, part)) for split in get_args(Split) for part in get_args(Part)}
    settings = {"stories": STORIES, "steps": STEPS, "cg_rows": list(CG_ROWS), "seed_base": SEED_BASE}
    return {"story": {**settings, "quick_share": QUICK_SHARE, "items": items}}


def _digest(stories: Sequence[Story]) -> Report:
    return digest(
        (story.question, story.answer, step.instruction, step.sentence, step.scene.background, *scene_key(step.scene))
        for story in stories
        for step in story.steps
    )


def verify_lock() -> None:
    """Raises DataError if the suite made by this code is not the frozen one that scores are published for."""
    check_lock(json.loads(lock_text()), lock_spec())
