"""Self-check: of several images of one request, the one that the model's own answer confirms.

Each image is asked about in the cache in which it was drawn, so nothing is encoded, and the question is taken back
afterwards. The flow's own density cannot choose: it holds an image with the wrong second object as likely as the right
one (docs/choices.md#self-check). Our addition, not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow2.core.fields import SEEDS, Range, whole
from starflow2.core.text import shown
from starflow2.errors import PromptError, StateError
from starflow2.inference.check_questions import Question, questions_about
from starflow2.inference.config import ReplyLimits
from starflow2.inference.conversations import generate_replies
from starflow2.inference.engine import Engine
from starflow2.inference.events import DecodedImage, RowEvent
from starflow2.inference.reading import Part
from starflow2.inference.sampler import Sampler
from starflow2.models.config import ModelConfig, SelfCheckConfig
from starflow2.models.wording import words_of

__all__ = [
    "CONFIRMED",
    "MAX_TRIES",
    "UNSURE",
    "Attempt",
    "Check",
    "Request",
    "attempts",
    "best",
    "check_memory",
    "check_of",
    "checked_tries",
    "choice_of",
    "confidence",
    "confidences",
    "has_room",
    "seed_of",
]

Check = tuple[Question, ...]
CONFIRMED = 0.5  # confidence above which the model holds an image for what was asked for
UNSURE = 0.5  # confidence where there is nothing to ask
MAX_TRIES = 1024  # images of one request
# Between the seeds of tries: more than any number of consecutive seeds of a call, and with MAX_TRIES below 2^32, since
# torch's generator on the CPU looks at the low 32 bits of a seed alone.
_STRIDE = 2**21


@dataclass(frozen=True, slots=True)
class Request:
    """One request for an image: the parts of the user's turn, and the words that the image has to fulfil."""

    parts: Sequence[Part]
    words: str

    def check(self, cfg: ModelConfig) -> Check:
        """The questions by which the model checks an image of this request."""
        has_image = any(isinstance(part, Tensor) for part in self.parts)
        return check_of(cfg, self.words, follows=has_image)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One image of a request, the seed that draws it again, and the confidence with which the model confirms it."""

    picture: DecodedImage
    seed: int
    confidence: float  # probability of the right answers, each among the answers that there are

    @property
    def is_confirmed(self) -> bool:
        return self.confidence > CONFIRMED


def check_of(cfg: ModelConfig, words: str, *, follows: bool) -> Check:
    """Questions whether an image shows what words say or, if it follows another, whether they were done to it.

    None for a model that is asked about objects one by one, where the words name none or the image follows another.
    Raises StateError for a model that cannot check itself, PromptError where there are no words.
    """
    asked, plain = _asked_by(cfg), words.strip().rstrip(" .,;:!?")
    if not plain:
        raise PromptError("there are no words to check an image against; say what to draw, or use tries=1.")
    whole_question = asked.done if follows else asked.shows
    if whole_question:
        return (Question(whole_question.format(plain)),)
    return () if follows else questions_about(plain)


def _asked_by(cfg: ModelConfig) -> SelfCheckConfig:
    if cfg.self_check is None:
        raise StateError(f"{cfg.name} has not learnt to check its images; use tries=1, or a model that has.")
    return cfg.self_check


def checked_tries(cfg: ModelConfig, tries: int | None) -> int:
    """The number of tries, by default the model's own. Raises ConfigError, StateError."""
    if tries is None:
        return 1 if cfg.self_check is None else cfg.self_check.tries
    count = whole(tries, "tries", Range(least=1, most=MAX_TRIES))
    if count > 1:
        _asked_by(cfg)
    return count


def choice_of(cfg: ModelConfig, words: str, tries: int | None, *, follows: bool) -> tuple[int, Check]:
    """The number of images made of a request, and the questions that choose among them.

    Without `tries` it is the model's own number, and 1 where nothing can be asked.

    Raises as `checked_tries` and `check_of` do, and PromptError where several are wanted and there is nothing to ask.
    """
    count = checked_tries(cfg, tries)
    if count == 1 or (tries is None and not words_of(words)):
        return 1, ()
    check = check_of(cfg, words, follows=follows)
    if not check and tries is not None:
        what = "whether an edit was done" if follows else f"about anything that {shown(words)} names"
        raise PromptError(f"{cfg.name} cannot ask itself {what}; use tries=1.")
    return (count, check) if check else (1, ())


def check_memory(needed: int, free: int | None, tries: int) -> None:
    """Raise StateError for tries whose caches need more bytes than are free; None: unknown.

    >>> check_memory(4_000_000_000, 1_000_000_000, 256)
    Traceback (most recent call last):
        ...
    starflow2.errors.StateError: tries=256 needs 4.0 GB for its caches, of 1.0 GB that are free; ... at most 64.
    """
    if free is not None and needed > free:
        most = max(1, tries * free // needed)
        raise StateError(
            f"tries={tries} needs {needed / 1e9:.1f} GB for its caches, of {free / 1e9:.1f} GB that are free; expected "
            f"at most {most}."
        )


def seed_of(seed: int, number: int) -> int:
    """The seed of try `number`; that of the first is the seed itself. Raises ConfigError where there is none."""
    return whole(seed + number * _STRIDE, "the seed of the last try", SEEDS)


def best(tried: Sequence[Attempt]) -> Attempt:
    """The attempt with the highest confidence, the first of equal ones."""
    return max(tried, key=lambda attempt: attempt.confidence)


def attempts(
    sampler: Sampler,
    requests: Sequence[Request],
    seeds: Sequence[int],
    tries: int,
    watch: Callable[[RowEvent], None] | None = None,
) -> list[list[Attempt]]:
    """`tries` images of each request, checked; attempt j of a request has `seed_of` its seed and j.

    Where there is nothing to ask, no try is better than another, and the first is the best.

    Raises as `generate_replies` does, and StateError for a model that has not learnt to check itself.
    """
    checks = [request.check(sampler.components.cfg) for request in requests]
    talks = [[request.parts] for request in requests for _ in range(tries)]
    numbered = [seed_of(seed, number) for seed in seeds for number in range(tries)]
    sure: dict[int, float] = {}

    def ask(engine: Engine, row: int, number: int) -> None:
        sure[number] = confidence(engine, row, checks[number // tries])

    limits = ReplyLimits(tokens=0, pictures=1)
    replies = generate_replies(sampler, talks, numbered, limits, draws=True, watch=watch, ended=ask)
    pictures = [part for ((part,),) in replies if isinstance(part, DecodedImage)]
    tried = [Attempt(p, s, sure[i]) for i, (p, s) in enumerate(zip(pictures, numbered, strict=True))]
    return [tried[first : first + tries] for first in range(0, len(tried), tries)]


def confidence(engine: Engine, row: int, check: Check) -> float:
    """Probability of a row's right answers, each among the answers that there are; UNSURE without a question.

    The row is as before afterwards.
    """
    return confidences(engine, [row], [check])[0]


def confidences(engine: Engine, rows: Sequence[int], checks: Sequence[Check]) -> list[float]:
    """The `confidence` of each row in its own questions; the first of all are read in one pass, then the second."""
    sure = [1.0 if check else UNSURE for check in checks]
    for number in range(max(map(len, checks), default=0)):
        asked = [i for i, check in enumerate(checks) if number < len(check)]
        found = _probabilities(engine, [rows[i] for i in asked], [checks[i][number] for i in asked])
        for i, value in zip(asked, found, strict=True):
            sure[i] *= value
    return sure


def _probabilities(engine: Engine, rows: Sequence[int], questions: Sequence[Question]) -> list[float]:
    """Probability of the right answer of each row to its own question."""
    marks = [engine.mark(row) for row in rows]
    try:
        for row, question in zip(rows, questions, strict=True):
            engine.feed(row, _asked(engine, row, question.text))
        engine.read(rows)
        logits = [engine.next_logits(row).double() for row in rows]
    finally:
        for row, mark in zip(rows, marks, strict=True):
            engine.rewind(row, mark)
    return [_share(engine.sampler, each, question) for each, question in zip(logits, questions, strict=True)]


def _share(sampler: Sampler, logits: Tensor, question: Question) -> float:
    """Probability of the right answer, among all answers to a question, of logits (vocabulary,)."""
    answers = (question.answer, *question.others)
    scores = torch.stack([logits[_first_tokens(sampler, word)].logsumexp(0) for word in answers])
    return float(scores.softmax(0)[0])


def _asked(engine: Engine, row: int, question: str) -> list[int]:
    """Tokens of a user's turn that asks a row a question, and of what opens the answer."""
    tokenizer = engine.sampler.components.tokenizer
    opening = tokenizer.opens_user(is_first=not engine.length(row))
    return [*opening, *tokenizer.encode(question), *tokenizer.opens_reply()]


def has_room(engine: Engine, row: int, check: Check) -> bool:
    """True if a row can be asked: its conversation and each question are no longer than the model reads."""
    longest = max((len(_asked(engine, row, question.text)) for question in check), default=0)
    return engine.length(row) + longest <= engine.sampler.components.cfg.max_positions


def _first_tokens(sampler: Sampler, word: str) -> list[int]:
    """Tokens with which an answer begins that is this word, in lower case or with a capital."""
    encode = sampler.components.tokenizer.encode
    return sorted({encode(word)[0], *(ids[0] for ids in [encode(word.capitalize())] if len(ids) == 1)})
