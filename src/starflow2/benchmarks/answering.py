"""Answers for evaluation harnesses: messages of words and images in, words or log probabilities out.

It knows no harness. A model with a small vocabulary does not read what a harness puts behind questions ("Answer the
question using a single word or phrase."): rules, by task, take such sentences away or say them in its own words, and
count what they did, as do words that it never learnt.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from starflow2.core.images import Fit, ImageForm, PILImage, read_picture, read_upright
from starflow2.core.json_reader import JsonObject
from starflow2.errors import ConfigError, StateError
from starflow2.evals.report import write_json
from starflow2.inference.session import Said
from starflow2.inference.tower_reply import TowerView, tower_reply
from starflow2.models.prompts import unknown_words
from starflow2.pipeline import StarFlow2
from starflow2.world.multiple_choice import HINT
from starflow2.world.questions import YES_NO

__all__ = ["RULES", "Answerer", "Frozen", "Part", "PromptRule", "reworded", "without_controls"]

Frozen = Literal["no", "native", "256"]  # the language model alone: not, at the image's size, at 256 pixels a side
Part = str | PILImage
Message = Sequence[Part]


@dataclass(frozen=True, slots=True)
class PromptRule:
    """A sentence that a harness adds, and what a model with a small vocabulary is told instead. tasks: () for all."""

    sentence: str
    instead: str = ""
    tasks: tuple[str, ...] = ()  # names that the task's begins with


RULES: Final = (
    PromptRule("Answer the question using a single word or phrase.", YES_NO, ("mme",)),
    PromptRule("Answer the question using a single word or phrase."),
    PromptRule("Please answer yes or no.", YES_NO),
    PromptRule("Answer with the option's letter from the given choices directly.", HINT),
    PromptRule("There are several options:"),
)


def reworded(text: str, task: str) -> tuple[str, list[str]]:
    """A question with the harness's sentences taken away or replaced, and those sentences.

    >>> reworded("is it red? Answer the question using a single word or phrase.", "gqa")
    ('is it red?', ['Answer the question using a single word or phrase.'])
    """
    met: list[str] = []
    for rule in RULES:
        if rule.sentence in text and (not rule.tasks or task.startswith(rule.tasks)):
            text = text.replace(rule.sentence, rule.instead)
            met.append(rule.sentence)
    return " ".join(text.split()) if met else text, met


def without_controls(reply: str) -> str:
    r"""A reply without control characters, of which one is enough to end a harness that writes it into a spreadsheet.

    >>> without_controls("a\x16 star\nand a\x00 ring")
    'a star\nand a ring'
    """
    return "".join(c for c in reply if c in "\n\t" or not unicodedata.category(c).startswith("C"))


@dataclass(slots=True)
class Notes:
    """Counts of the questions of a run, and of words that were changed or not known."""

    questions: int = 0
    sentences: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> JsonObject:
        """The counts as JSON can hold them."""
        words = sum(self.unknown.values())
        more = {"reworded sentences": dict(self.sentences), "unknown words": dict(self.unknown.most_common())}
        return {"questions": self.questions, "unknown words in all": words, **more}


class Answerer:
    """A model that answers a harness's requests. frozen: as its language model alone, through its own tower.

    fit: how images become the square that the joint model reads; by default all of an image is kept. notes: a file for
    the counts. Raises StateError for a model that has not finished stage joint, unless it is asked as `frozen`.
    """

    def __init__(self, model: StarFlow2, *, frozen: str = "no", fit: Fit = "stretch", notes: str = "") -> None:
        for name, value, known in (("frozen", frozen, get_args(Frozen)), ("fit", fit, get_args(Fit))):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
        if frozen == "no" and not model.is_joint:
            done = ", ".join(model.components.finished_stages) or "none"
            raise StateError(f"answering needs a model that has finished stage joint; this one has finished {done}.")
        self.model, self.frozen, self.form = model, frozen, ImageForm(fit=fit, flatten="white")
        self.notes, self.notes_file = Notes(), notes

    def answer(self, talks: Sequence[Sequence[Message]], task: str, tokens: int) -> list[str]:
        """One greedy reply per conversation, whose messages are the user's and the model's in turn."""
        read = [[self._read(message, task) for message in talk] for talk in talks]
        if self.frozen != "no":
            replies = [self._tower(talk, tokens) for talk in read]
        else:
            replies = self.model.replies([[self._squares(message) for message in talk] for talk in read], tokens=tokens)
        self._write_notes()
        return replies

    def log_prob(self, message: Message, continuation: str, task: str) -> tuple[float, bool]:
        """Log probability of a reply in nats, its end included, as `StarFlow2.score` has it; is it the greedy one?

        Raises ConfigError for the language model alone, which gives no score here.
        """
        if self.frozen != "no":
            raise ConfigError("log probabilities are the joint model's; the frozen language model answers in words.")
        read = self._squares(self._read(message, task))
        reply = continuation.strip()
        found = self.model.score(read, [reply])
        self._write_notes()
        return found.log_prob, self.model.replies([[read]], tokens=max(1, len(found.tokens)))[0] == reply

    def _read(self, message: Message, task: str) -> list[Part]:
        """A message in words that the model knows, as far as rules go."""
        components = self.model.components
        parts: list[Part] = []
        for part in message:
            if isinstance(part, str) and components.vocabulary:
                part, met = reworded(part, task)
                self.notes.sentences.update(met)
                self.notes.unknown.update(unknown_words(components, part))
            if part != "":
                parts.append(part)
        self.notes.questions += 1
        return parts

    def _squares(self, message: Message) -> list[Said]:
        size = self.model.components.cfg.fae.image_size
        return [part if isinstance(part, str) else read_picture(part, size, self.form) for part in message]

    def _tower(self, talk: Sequence[Message], tokens: int) -> str:
        """The language model's own reply to the last message, behind all that was said before."""
        parts = [part if isinstance(part, str) else read_upright(part) for message in talk for part in message]
        view = TowerView(square=256 if self.frozen == "256" else 0)
        return tower_reply(self.model.components, parts, max_tokens=tokens, view=view)

    def _write_notes(self) -> None:
        if self.notes_file:
            write_json(self.notes.to_json(), Path(self.notes_file))
