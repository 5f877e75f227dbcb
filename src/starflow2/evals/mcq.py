"""W-MCQ: questions with lettered options, and questions that need a stated rule or several pictures.

Three suites, stand-ins for SEED, MMBench and MMMU. W-SEED: six dimensions, four options, only the first letter of the
answer counts. W-MMB: two to four options, asked once for every rotation of the options; all must be right. W-MMMU: a
rule in the text or two or three pictures; three in ten have no options and a number for an answer; what cannot be read
is wrong, never guessed. Half of each is "id" (unseen scenes, seen combinations), half "cg" (a colour-shape pair in the
pictures was held out). There is no W-AI2D: a marker dot would have to be a thing of the scene, and the smallest thing
is as large as an object. The runner is handed an `answer` function and knows nothing of models.

Letters: M questions, K columns of marks.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from starflow2.world.multiple_choice import DIMENSIONS, LETTERS, Choice, choice_about
from starflow2.world.riddles import OPEN_RIDDLES, RIDDLES, riddle
from starflow2.world.sampling import sample_split_scene
from starflow2.world.scene import Scene, Split, render, stream
from starflow2.world.splits import scene_key
from starflow2.world.words import POINTS

__all__ = ["SUITES", "evaluate_mcq", "first_letter", "leading_letter", "lock_spec", "text_prior", "verify_lock"]

Part = Literal["id", "cg"]
Suite = Literal["seed", "mmb", "mmmu"]
PARTS: tuple[Part, ...] = get_args(Part)
SUITES: Final[Mapping[Suite, int]] = MappingProxyType({"seed": 512, "mmb": 256, "mmmu": 128})  # base questions
OPEN_SHARE: Final = 0.3  # of W-MMMU
PRIOR_ITEMS: Final = 200  # training questions of each kind that the question-only prior has read
ASK_CHUNK: Final = 64  # questions asked of `answer` at a time

_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark
_MCQ, _PRIOR = 21, 22  # second number of a stream

Images = NDArray[np.uint8]
Answer = Callable[[list[list[Images]], list[str]], list[str]]  # n lists of (64, 64, 3), n questions -> n answers
Progress = Callable[[int, int], None]  # questions done, questions in all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    choice: Choice
    base: int  # number in its suite; the rotations of a question share it and are resampled together
    part: Part

    @property
    def chance(self) -> float:
        """How often a guess is right: one option in two to four; a number is guessed among those it can be."""
        return 1 / (len(self.choice.options) or len(POINTS))


# ------------------------------------------------------------------------------------------------- reading answers


def first_letter(text: str) -> str:
    """The first character if it is an option's letter, else '': SEED's rule.

    >>> [first_letter(text) for text in ("B.", "apple", "the letter c")]
    ['b', 'a', '']
    """
    start = text.strip().lower()[:1]
    return start if start in LETTERS else ""


def leading_letter(text: str) -> str:
    """The letter that an answer begins with, standing alone or before a mark, else ''.

    >>> [leading_letter(text) for text in ("(B)", "a", "c: red", "apple")]
    ['b', 'a', 'c', '']
    """
    match = re.match(r"\W*([a-d])(?![a-z])", text.strip().lower())
    return match[1] if match else ""


def _read(suite: Suite, choice: Choice, said: str) -> str:
    """What an answer is taken for; '' if it cannot be read."""
    if choice.options:
        return first_letter(said) if suite == "seed" else leading_letter(said)
    found = re.findall(r"[a-z]+", said.lower())
    return found[0] if len(found) == 1 and found[0] in POINTS else ""


# --------------------------------------------------------------------------------------------------------- the run


def evaluate_mcq(answer: Answer, split: Split, *, quick: bool = False, progress: Progress | None = None) -> Report:
    """Asks and grades W-SEED, W-MMB (every rotation) and W-MMMU; accuracies in [0, 1].

    answer: a list of pictures (64, 64, 3) uint8 for each question, in order, and the questions -> one text each.
    split: "dev" (for every choice) or "test". quick: one base question in eight. Returns a JSON-able report: in
    `report["suites"]["seed" | "mmb" | "mmmu"]["parts"]["id" | "cg" | "all"]`, `accuracy` with its interval, for mmb
    that of the unrotated questions, and `circular` where all rotations must be right; `parsed` the share of answers
    that could be read; in `floor`, what guessing and the question-only prior get. `gap` is "id" minus "cg".
    Raises ConfigError for an unknown split, DataError if `answer` returns anything but one text per question.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
    asked = {suite: _share(_items(suite, split), quick) for suite in SUITES}
    total = sum(map(len, asked.values()))
    report: Report = {"suite": "mcq", "split": split, "quick": quick, "n": total, "suites": {}}
    rng, done = np.random.default_rng(0), 0
    for suite, items in asked.items():
        said: list[str] = []
        for chunk in chunks(items, ASK_CHUNK):
            said += _answers(answer, chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
        report["suites"][suite] = _graded(suite, items, said, rng)
    return report


def _answers(answer: Answer, items: Sequence[_Item]) -> list[str]:
    images = [[render(scene) for scene in item.choice.scenes] for item in items]
    found = list(answer(images, [item.choice.text for item in items]))
    if len(found) != len(items) or not all(isinstance(text, str) for text in found):
        raise DataError(f"answers: expected {len(items)} texts, got {len(found)} of {set(map(type, found))}")
    return found


def _graded(suite: Suite, items: Sequence[_Item], said: Sequence[str], rng: np.random.Generator) -> Report:
    read = [_read(suite, item.choice, text) for item, text in zip(items, said, strict=True)]
    rows = _by_base(items, read)
    parts, resamples = {}, {}
    for name in (*PARTS, "all"):
        picks = [row for row in rows if name in (row.item.part, "all")]
        parts[name], resamples[name] = _scored(suite, picks, rng)
    key = "circular" if suite == "mmb" else "accuracy"
    gap = parts["id"][key]["score"] - parts["cg"][key]["score"]
    return {"n": len(items), "parts": parts, "gap": interval(gap, resamples["id"] - resamples["cg"])}


@dataclass(frozen=True, slots=True)
class _Row:
    """A base question and how all its rotations went."""

    item: _Item  # the unrotated one
    right: tuple[bool, ...]
    parsed: float
    prior: tuple[bool, ...]  # whether the question-only prior is right


def _by_base(items: Sequence[_Item], read: Sequence[str]) -> list[_Row]:
    groups: dict[int, list[tuple[_Item, str]]] = defaultdict(list)
    for item, text in zip(items, read, strict=True):
        groups[item.base].append((item, text))
    return [
        _Row(
            group[0][0],
            tuple(text == item.choice.reply for item, text in group),
            sum(text != "" for _, text in group) / len(group),
            tuple(text_prior(item.choice) == item.choice.answer for item, _ in group),
        )
        for group in groups.values()
    ]


def _scored(suite: Suite, rows: Sequence[_Row], rng: np.random.Generator) -> tuple[Report, Grades]:
    """Scores of a part and the resamples of its headline, circular for mmb and accuracy else."""
    marks = np.array([(row.right[0], all(row.right)) for row in rows], np.float64)  # (M, 2)
    resamples = bootstrap([row.item.base for row in rows], marks, rng)
    names = ("accuracy", "circular") if suite == "mmb" else ("accuracy",)
    report: Report = {"n": len(rows), "parsed": float(np.mean([row.parsed for row in rows]))}
    report |= {name: interval(marks[:, i].mean(), resamples[:, i]) for i, name in enumerate(names)}
    report["by_kind"] = {}
    for kind in sorted({row.item.choice.kind for row in rows}):
        picks = [i for i, row in enumerate(rows) if row.item.choice.kind == kind]
        scores = {name: float(marks[picks, i].mean()) for i, name in enumerate(names)}
        report["by_kind"][kind] = {"n": len(picks)} | scores
    return report | {"floor": _floor(suite, rows)}, resamples[:, len(names) - 1]


def _floor(suite: Suite, rows: Sequence[_Row]) -> Report:
    """What a guess and the question-only prior get. A guess is right in all n rotations once in n to the n times."""
    chance = [row.item.chance for row in rows]
    floor = {"chance": float(np.mean(chance)), "prior": float(np.mean([row.prior[0] for row in rows]))}
    if suite == "mmb":
        floor["circular_chance"] = float(np.mean([c ** (1 / c) for c in chance]))
        floor["circular_prior"] = float(np.mean([all(row.prior) for row in rows]))
    return floor


def _share(items: Sequence[_Item], quick: bool) -> list[_Item]:
    """All items, or all rotations of one base question in eight of each kind and part."""
    if not quick:
        return list(items)
    strata: dict[object, dict[int, None]] = defaultdict(dict)
    for item in items:
        strata[item.part, item.choice.kind][item.base] = None
    rng = np.random.default_rng(0)
    kept = {base for bases in strata.values() for base in quick_share(list(bases), rng)}
    return [item for item in items if item.base in kept]


# -------------------------------------------------------------------------------------------- who never sees a picture


def text_prior(choice: Choice) -> str:
    """The option (or number) that training questions of the kind would most often have had for an answer.

    Two things are read from them: how often these words were right where they were offered, and how often the option
    was that shares as many words with the others as this one does. Neither the pictures nor the order are seen.
    """
    counts = _prior_counts()[choice.kind]
    options = choice.options or POINTS
    return max(options, key=lambda o: (_rate(counts, o) * _rate(counts, _standing(o, options)), o))


def _rate(counts: Mapping[str, Counter[bool]], option: str) -> float:
    seen = counts.get(option, Counter())
    return (seen[True] + 1) / (seen.total() + 4)


def _standing(option: str, options: Sequence[str]) -> str:
    """How many options share more words with the rest than this one."""
    shared = {o: sum(len(set(o.split()) & set(p.split())) for p in options) for o in options}
    return f"{sum(n > shared[option] for n in shared.values())} of {len(options)}"


@cache
def _prior_counts() -> Mapping[str, Mapping[str, Counter[bool]]]:
    """Kind -> option or standing -> how often it was right and wrong, over training questions."""
    counts: dict[str, dict[str, Counter[bool]]] = defaultdict(lambda: defaultdict(Counter))
    for number, kind in enumerate((*DIMENSIONS, *RIDDLES, *OPEN_RIDDLES)):
        for index in range(PRIOR_ITEMS):
            choice = _made(kind, stream(0, _PRIOR, number, index))
            options = choice.options or POINTS
            for option in options:
                for key in (option, _standing(option, options)):
                    counts[kind][key][option == choice.answer] += 1
    return counts


# ----------------------------------------------------------------------------------------------------------- items


def _made(
    kind: str, rng: np.random.Generator, split: Split | None = None, *, part: Part = "id", num_options: int = 4
) -> Choice:
    """A question of a kind, about a picture (or pictures) of the split; None is training."""
    bucket, novel = split or "train", part == "cg"
    if kind not in DIMENSIONS:
        return riddle(rng, kind, split=bucket, novel=novel)
    while True:
        scene = sample_split_scene(rng, bucket, novel=novel)
        choice = choice_about(scene, rng, kind, split=bucket if novel else "train", num_options=num_options)
        if choice is not None:
            return choice


@cache
def _items(suite: Suite, split: Split) -> tuple[_Item, ...]:
    """Base questions in turn over the kinds, the "id" half first; no two with the same pictures. mmb: all rotations of
    one stand together, the unrotated one first."""
    items: list[_Item] = []
    shown: set[tuple[tuple[int, ...], ...]] = set()
    total = SUITES[suite]
    for base in range(total):
        part: Part = "id" if base < total // 2 else "cg"
        rng = stream(_SUITE_SEED, _MCQ, tuple(SUITES).index(suite), get_args(Split).index(split), base)
        kind, size = _kind_and_size(suite, base % (total // 2))
        choice = _made(kind, rng, split, part=part, num_options=size)
        while _keys(choice.scenes) in shown:
            choice = _made(kind, rng, split, part=part, num_options=size)
        shown.add(_keys(choice.scenes))
        turns = size if suite == "mmb" else 1
        items += [_Item(choice=choice.rotated(steps), base=base, part=part) for steps in range(turns)]
    return tuple(items)


def _kind_and_size(suite: Suite, place: int) -> tuple[str, int]:
    """The kind of a question and its number of options, by its place in its part."""
    if suite == "mmmu":
        is_open = int((place + 1) * OPEN_SHARE) > int(place * OPEN_SHARE)
        kinds = OPEN_RIDDLES if is_open else RIDDLES
        nth = int(place * OPEN_SHARE) if is_open else place - int(place * OPEN_SHARE)
        return kinds[nth % len(kinds)], 4
    size = 4 if suite == "seed" else (2, 3, 4)[place // len(DIMENSIONS) % 3]
    return DIMENSIONS[place % len(DIMENSIONS)], size


def _keys(scenes: Sequence[Scene]) -> tuple[tuple[int, ...], ...]:
    return tuple((scene.background, *scene_key(scene)) for scene in scenes)


# ------------------------------------------------------------------------------------------------------------- the lock


def lock_spec() -> Report:
    """The frozen suites, made afresh: their settings, and count and hash of each split's scene keys and words."""
    made = {
        suite: {split: digest(_told(item) for item in _items(suite, split)) for split in get_args(Split)}
        for suite in SUITES
    }
    return {"mcq": {"questions": dict(SUITES), "open_share": OPEN_SHARE, "items": made}}


def _told(item: _Item) -> tuple[object, ...]:
    return (item.part, item.base, item.choice.text, item.choice.reply, *_keys(item.choice.scenes))


def verify_lock() -> None:
    """Raises DataError if the suites made by this code are not the frozen ones that scores are published for."""
    check_lock(json.loads(lock_text()), lock_spec())
