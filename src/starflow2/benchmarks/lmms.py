"""The plug-in for lmms-eval, in its own environment (`make lmms`): `--model starflow2` without a change to its source.

It registers by an entry point (`lmms_manifest`). The chat class answers, also in several rounds; the simple
class (`--force_simple`) also gives log probabilities, which the harness asks of no chat class. Arguments arrive as
text: pretrained, device, batch_size, frozen (no, native, 256), fit (stretch, pad, crop), notes (a file), likelihood
(log_prob, loss).
Results are in the JSON that the harness writes; its exit status is 0 even after an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, cast, get_args

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from starflow2.benchmarks.answering import Answerer, Part, without_controls
from starflow2.core.fields import Range
from starflow2.core.images import Fit
from starflow2.errors import ConfigError, DataError, nearest
from starflow2.evals.statistics import chunks
from starflow2.pipeline import StarFlow2

__all__ = ["ChatModel", "SimpleModel"]

TOKENS: Final = 64  # of an answer where a task sets no limit
MOST_TOKENS: Final = 1024
PLACE: Final = "<image>"  # of an image within a simple task's text

Settings = Mapping[str, Any]  # generation settings of a task, as its file has them
Likelihood = Literal["log_prob", "loss"]  # nats, as the harness's interface says; or their negative, which it ranks by


class SimpleModel(lmms):  # type: ignore[misc]  # not installed where types are checked
    """Answers requests of a text and a list of images, and gives log probabilities."""

    is_simple = True
    settings_at = 1  # of a request's values, the generation settings

    def __init__(
        self,
        pretrained: str = "nano",
        device: str = "auto",
        batch_size: int | str = 16,
        frozen: str = "no",
        fit: str = "stretch",
        notes: str = "",
        likelihood: str = "log_prob",
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            known = ["pretrained", "device", "batch_size", "frozen", "fit", "notes", "likelihood"]
            name = next(iter(unknown))
            raise ConfigError(f"model_args has no {name}; expected {', '.join(known)}.{nearest(name, known)}")
        if likelihood not in get_args(Likelihood):
            raise ConfigError(f"likelihood is {likelihood!r}; expected one of {', '.join(get_args(Likelihood))}.")
        self.sign = -1.0 if likelihood == "loss" else 1.0
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; expected a whole number {Range(least=1)}.")
        self.batch_size = int(batch_size)
        model = StarFlow2.from_pretrained(str(pretrained), device=device)
        self.answerer = Answerer(model, frozen=str(frozen), fit=cast(Fit, fit), notes=notes)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One greedy answer per request, in their order; requests of equal settings are answered together."""
        answers: dict[int, str] = {}
        for group in self._groups(requests):
            settings, task = self._about(requests[group[0]])
            talks = [self._talk(requests[i]) for i in group]
            replies = self.answerer.answer(talks, task, _tokens(settings))
            answers |= {i: _cut(reply, settings) for i, reply in zip(group, replies, strict=True)}
        return [answers[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request; a task's text function says what comes next, and when it ends."""
        return [list(self._rounds(request)) for request in requests]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Log probability in nats of each continuation, and is it the greedy one?

        With `likelihood=loss` its negative: multiple-choice tasks of version 0.7.3 take the option with the smallest
        number (docs/choices.md#published-benchmarks). The pair comes in the harness's own envelope: any other pair
        becomes text there.
        """
        pairs = []
        for request in requests:
            context, target, to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(doc)
            message = _message(context, to_visual(doc) or [])
            log_prob, is_greedy = self.answerer.log_prob(message, continuation, task)
            pairs.append(GenerationResult((self.sign * log_prob, is_greedy)))
        return pairs

    def _groups(self, requests: Sequence[Instance]) -> Iterator[Sequence[int]]:
        """Indices of requests that can be answered together: one task and equal settings, at most a batch."""
        same: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            settings, task = self._about(request)
            same[task, repr(sorted(settings.items(), key=str))].append(i)
        for indices in same.values():
            yield from chunks(indices, self.batch_size)

    def _about(self, request: Instance) -> tuple[Settings, str]:
        """Generation settings and task of a request."""
        return request.args[self.settings_at], request.args[4]

    def _talk(self, request: Instance) -> list[list[Part]]:
        """The conversation of a request: one message of its text and images."""
        context, _, to_visual, doc_id, task, split = request.args
        return [_message(context, to_visual(self.task_dict[task][split][doc_id]) or [])]

    def _rounds(self, request: Instance) -> Iterator[str]:
        context, settings, to_visual, to_text, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        talk, replies, info, ends = [_message(context, to_visual(doc) or [])], list[str](), None, False
        while not ends:
            (reply,) = self.answerer.answer([talk], task, _tokens(settings))
            replies.append(_cut(reply, settings))
            yield replies[-1]
            visuals, context, ends, _, info = to_text(
                doc, previous_output=list(replies), round_idx=len(replies), previous_round_info=info
            )
            if not ends:
                talk += [[replies[-1]], _message(context, visuals or [])]


class ChatModel(SimpleModel):
    """Answers requests that come as messages, whose words and images keep their order."""

    is_simple = False
    settings_at = 2

    def _talk(self, request: Instance) -> list[list[Part]]:
        _, to_messages, _, doc_id, task, split = request.args
        talk = [_parts(message["content"]) for message in _said(to_messages(self.task_dict[task][split][doc_id]))]
        if len(talk) % 2 == 0:
            raise DataError(f"{task} has a conversation of {len(talk)} messages; expected the last to be the user's.")
        return talk


def _said(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages of the user and of the model; a system prompt is the model's own."""
    return [message for message in messages if message["role"] != "system"]


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[Part]:
    """Words and images of a message. Raises DataError for what is neither, such as video."""
    if isinstance(content, str):
        return [content]
    parts: list[Part] = []
    for item in content:
        if item["type"] not in ("text", "image"):
            raise DataError(f"a message holds {item['type']}; this model reads text and images.")
        parts.append(item["text"] if item["type"] == "text" else item["url"])
    return parts


def _message(text: str, images: Sequence[Part]) -> list[Part]:
    """Words and images: each image where the text has a place for it, else in front."""
    if images and text.count(PLACE) == len(images):
        pieces = text.split(PLACE)
        mixed = [part for pair in zip(pieces, [*images, ""], strict=True) for part in pair]
        return [part for part in mixed if not isinstance(part, str) or part.strip()]
    if any(isinstance(image, str) for image in images):
        raise DataError(f"a request holds the file {images[0]!r}; this model reads text and images.")
    return [*images, text]


def _tokens(settings: Settings) -> int:
    """Tokens of an answer at most. Raises ConfigError for a task that samples: answers here are greedy."""
    if settings.get("do_sample") and float(settings.get("temperature") or 0):
        raise ConfigError(f"temperature is {settings['temperature']}; expected 0: answers are greedy.")
    return min(int(settings.get("max_new_tokens", TOKENS)), MOST_TOKENS)


def _cut(reply: str, settings: Settings) -> str:
    """A reply up to the first of the strings at which the task ends it, in signs that a spreadsheet takes."""
    until = settings.get("until") or []
    for end in [until] if isinstance(until, str) else until:
        reply = reply.split(end)[0] if end else reply
    return without_controls(reply)
