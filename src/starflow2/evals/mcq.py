"""W-SEED, W-MMB and W-MMMU: multiple choice about images, and riddles about a rule or several images.

Stand-ins for SEED, MMBench and MMMU. W-SEED: six dimensions, four options, only the first letter of the answer counts.
W-MMB: two to four options, asked once for every rotation of the options; all must be right. W-MMMU: a rule in the text,
or two or three images; three in ten have no options and a number for an answer; an answer that cannot be read is
wrong, never guessed. Half of each is "id" (unseen scenes, seen combinations), half "cg" (a colour-shape pair in the
images was held out). There is no W-AI2D: a marker dot would have to be an object of the scene, and the smallest object
is much larger than a dot.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import ClassVar, Final, Literal, get_args

import numpy as np

from starflow2.evals.statistics import Row, Score, Scored, Scores, by_part, indices_by, quick_share, score_rows
from starflow2.evals.suite import Graded, Images, Runs, Section, checked_texts, digest, graded
from starflow2.world.multiple_choice import DIMENSIONS, LETTERS, Choice, choice_about
from starflow2.world.riddles import OPEN_RIDDLES, RIDDLES, riddle
from starflow2.world.sampling import sample_split_scene
from starflow2.world.scene import Scene, Split, render, stream
from starflow2.world.splits import scene_key
from starflow2.world.words import POINTS

__all__ = ["BENCHMARKS", "AskedChoice", "McqSuite", "choice_items", "first_letter", "leading_letter", "text_prior"]

Part = Literal["id", "cg"]
PARTS: Final = ("id", "cg", "all")
Benchmark = Literal["seed", "mmb", "mmmu"]
BENCHMARKS: Final[Mapping[Benchmark, int]] = MappingProxyType({"seed": 512, "mmb": 256, "mmmu": 128})  # base questions
OPEN_SHARE: Final = 0.3  # of W-MMMU
PRIOR_ITEMS: Final = 200  # training questions of each kind that the question-only prior has read

_SUITE_SEED: Final = 2026  # frozen: changing it, or the order of draws below, makes another benchmark
_MCQ, _PRIOR = 21, 22  # second number of a stream

Answer = Callable[[list[list[Images]], list[str]], list[str]]  # n lists of (64, 64, 3), n questions -> n answers


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedChoice:
    """One item: a question with its options in one order."""

    benchmark: Benchmark
    choice: Choice
    base: int  # number in its benchmark; the rotations of a question share it and are resampled together
    part: Part

    @property
    def chance(self) -> float:
        """How often a guess is right: one option in two to four; a number is guessed among those it can be."""
        return 1 / (len(self.choice.options) or len(POINTS))

    def read(self, answer: str) -> str:
        """The letter or number that an answer gives by the rules of its benchmark, '' if it cannot be read."""
        if self.choice.options:
            return first_letter(answer) if self.benchmark == "seed" else leading_letter(answer)
        words = re.findall(r"[a-z]+", answer.lower())
        return words[0] if len(words) == 1 and words[0] in POINTS else ""


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


# ------------------------------------------------------------------------------------------------------- the suite


@dataclass(frozen=True, slots=True, kw_only=True)
class McqSuite:
    """Three benchmarks, one set each. Scores an `Answer`.

    In a report the benchmarks are kinds of a part, and their columns: accuracy, of the unrotated questions; circular,
    of mmb, where all rotations must be right; parsed, the share of answers that could be read.
    """

    name: ClassVar[str] = "mcq"
    chunk: ClassVar[int] = 64

    def items(self, split: Split) -> Mapping[str, Sequence[AskedChoice]]:
        return {benchmark: choice_items(benchmark, split) for benchmark in BENCHMARKS}

    def quick(self, items: Sequence[AskedChoice]) -> Sequence[AskedChoice]:
        return quick_share(items, stratum=lambda item: (item.part, item.choice.kind), unit=lambda item: item.base)

    def run(self, answer: Answer, items: Sequence[AskedChoice]) -> list[str]:
        images = [[render(scene) for scene in item.choice.scenes] for item in items]
        return checked_texts(answer(images, [item.choice.text for item in items]), len(items))

    def grade(self, runs: Runs[AskedChoice, str]) -> Graded:
        """Scores by the rules of each benchmark. The floor is a guess, and the question-only prior."""
        rng = np.random.default_rng(0)
        found = {name: _grade(pairs, rng) for name, pairs in runs.items()}
        parts = {part: _join({name: scores.parts[part] for name, scores in found.items()}) for part in PARTS}
        floor = {part: _join({name: scores.bounds["floor"][part] for name, scores in found.items()}) for part in PARTS}
        gaps = {name: scores.gap for name, scores in found.items() if scores.gap is not None}
        return Graded(parts, _join(gaps), {"floor": floor})

    def lock(self) -> Section:
        items = {
            benchmark: {split: digest(map(_locked, choice_items(benchmark, split))) for split in get_args(Split)}
            for benchmark in BENCHMARKS
        }
        return {"mcq": {"questions": dict(BENCHMARKS), "open_share": OPEN_SHARE, "items": items}}


def _locked(item: AskedChoice) -> tuple[object, ...]:
    return (item.part, item.base, item.choice.text, item.choice.reply, *_keys(item.choice.scenes))


def _join(benchmarks: dict[str, Scores]) -> Scores:
    """Scores of several benchmarks as kinds of one part."""
    n, units = (sum(getattr(scores, name) for scores in benchmarks.values()) for name in ("n", "units"))
    return Scores(n, units, {}, benchmarks)


def _grade(pairs: Sequence[tuple[AskedChoice, str]], rng: np.random.Generator) -> Graded:
    """Scores of one benchmark, by base question."""
    bases = [[pairs[i] for i in own] for own in indices_by(pairs, lambda pair: pair[0].base).values()]
    is_rotated = pairs[0][0].benchmark == "mmb"
    names = ("accuracy", "circular", "parsed") if is_rotated else ("accuracy", "parsed")
    scored, floor = dict[str, Scored](), dict[str, Scores]()
    for part, own in by_part(bases, lambda base: base[0][0].part).items():
        rows = [_row(base, is_rotated) for base in own]
        scored[part] = score_rows(rows, names, rng, "plain")
        floor[part] = _floor([[item for item, _ in base] for base in own], is_rotated)
    return graded(scored, {"floor": floor})


def _row(base: Sequence[tuple[AskedChoice, str]], is_rotated: bool) -> Row:
    """A question's marks over its rotations, the unrotated one first."""
    letters = [item.read(answer) for item, answer in base]
    right = [letter == item.choice.reply for letter, (item, _) in zip(letters, base, strict=True)]
    parsed, item = sum(letter != "" for letter in letters) / len(letters), base[0][0]
    marks = (right[0], all(right), parsed) if is_rotated else (right[0], parsed)
    return Row(item.choice.kind, item.base, marks)


def _floor(bases: Sequence[Sequence[AskedChoice]], is_rotated: bool) -> Scores:
    """Scores of a guess and of the question-only prior.

    A guess is right in all n rotations once in n to the n times.
    """
    chance = [base[0].chance for base in bases]
    prior = [[text_prior(item.choice) == item.choice.answer for item in base] for base in bases]
    marks = {"chance": np.mean(chance), "prior": np.mean([row[0] for row in prior])}
    if is_rotated:
        circular = [c ** (1 / c) for c in chance]
        marks |= {"circular_chance": np.mean(circular), "circular_prior": np.mean([all(row) for row in prior])}
    return Scores(len(bases), len(bases), {name: Score(float(mark)) for name, mark in marks.items()})


# -------------------------------------------------------------------------------------------- who never sees an image


def text_prior(choice: Choice) -> str:
    """The option (or number) that was most often right in training questions of the kind.

    Two rates count: how often these words were right where they were offered, and how often that option was right which
    shares as many words with the others as this one does. Neither images nor the order of options play a part.
    """
    counts = _prior_counts()[choice.kind]
    options = choice.options or POINTS
    return max(options, key=lambda o: (_rate(counts, o) * _rate(counts, _standing(o, options)), o))


def _rate(counts: Mapping[str, Counter[bool]], option: str) -> float:
    offered = counts.get(option, Counter())
    return (offered[True] + 1) / (offered.total() + 4)


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
            choice = _make(kind, stream(0, _PRIOR, number, index))
            options = choice.options or POINTS
            for option in options:
                for key in (option, _standing(option, options)):
                    counts[kind][key][option == choice.answer] += 1
    return counts


# ----------------------------------------------------------------------------------------------------------- items


def _make(
    kind: str, rng: np.random.Generator, split: Split | None = None, *, part: Part = "id", num_options: int = 4
) -> Choice:
    """A question of a kind, about an image (or images) of the split; None is training."""
    bucket, novel = split or "train", part == "cg"
    if kind not in DIMENSIONS:
        return riddle(rng, kind, split=bucket, novel=novel)
    while True:
        scene = sample_split_scene(rng, bucket, novel=novel)
        choice = choice_about(scene, rng, kind, split=bucket if novel else "train", num_options=num_options)
        if choice is not None:
            return choice


@cache
def choice_items(benchmark: Benchmark, split: Split) -> tuple[AskedChoice, ...]:
    """Base questions in turn over the kinds, the "id" half first; no two with the same images.

    mmb: all rotations of one question together, the unrotated one first.
    """
    items: list[AskedChoice] = []
    shown: set[tuple[tuple[int, ...], ...]] = set()
    total = BENCHMARKS[benchmark]
    for base in range(total):
        part: Part = "id" if base < total // 2 else "cg"
        rng = stream(_SUITE_SEED, _MCQ, tuple(BENCHMARKS).index(benchmark), get_args(Split).index(split), base)
        kind, size = _kind_and_size(benchmark, base % (total // 2))
        choice = _make(kind, rng, split, part=part, num_options=size)
        while _keys(choice.scenes) in shown:
            choice = _make(kind, rng, split, part=part, num_options=size)
        shown.add(_keys(choice.scenes))
        turns = size if benchmark == "mmb" else 1
        items += [
            AskedChoice(benchmark=benchmark, choice=choice.rotated(steps), base=base, part=part)
            for steps in range(turns)
        ]
    return tuple(items)


def _kind_and_size(benchmark: Benchmark, place: int) -> tuple[str, int]:
    """The kind of a question and its number of options, by its place in its part."""
    if benchmark == "mmmu":
        is_open = int((place + 1) * OPEN_SHARE) > int(place * OPEN_SHARE)
        kinds = OPEN_RIDDLES if is_open else RIDDLES
        nth = int(place * OPEN_SHARE) if is_open else place - int(place * OPEN_SHARE)
        return kinds[nth % len(kinds)], 4
    size = 4 if benchmark == "seed" else (2, 3, 4)[place // len(DIMENSIONS) % 3]
    return DIMENSIONS[place % len(DIMENSIONS)], size


def _keys(scenes: Sequence[Scene]) -> tuple[tuple[int, ...], ...]:
    return tuple((scene.background, *scene_key(scene)) for scene in scenes)
