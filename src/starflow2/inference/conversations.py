"""Many conversations on one engine, each at its own pace, for suites and everything that has a queue.

Conversation i depends on its own words, images and seed alone. As soon as one is over, the next takes its place. Not
here: one conversation that goes on (session).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import ConfigError, DataError
from starflow2.inference.config import ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed, DecodedImage, Ended, Failed, RowEvent, Token
from starflow2.inference.reading import Part, PastTurn, read_past, read_user_turn
from starflow2.inference.sampler import Sampler

__all__ = ["ReplyPart", "UserTurns", "generate_replies", "reply_after"]

UserTurns = Sequence[Sequence[Part]]  # parts of each user turn of one conversation
ReplyPart = str | DecodedImage  # words or an image of the model's
Watch = Callable[[RowEvent], None]
AtEnd = Callable[[Engine, int, int], None]  # engine, row, number of the conversation


@inference_defaults()
def generate_replies(
    sampler: Sampler,
    conversations: Sequence[UserTurns],
    seeds: Sequence[int],
    limits: ReplyLimits,
    *,
    draws: bool = False,
    watch: Watch | None = None,
    ended: AtEnd | None = None,
) -> list[list[list[ReplyPart]]]:
    """Parts of the model's replies, by conversation, user turn and order within the reply.

    draws: every reply is an image; else the model decides, within `limits`. `watch` is called with every event, whose
    row is the number of the conversation; `ended` with every conversation that is over, before its row is given back.
    Raises ConfigError unless there is one seed per conversation, PromptError
    for one that is too long, DataError for an image that is not finite.
    """
    if len(conversations) != len(seeds):
        raise ConfigError(f"{len(conversations)} conversations and {len(seeds)} seeds; expected equally many.")
    talks = [_Talk(i, turns, seed) for i, (turns, seed) in enumerate(zip(conversations, seeds, strict=True))]
    return _converse(sampler, talks, _ReplyMode(limits, draws, watch, ended))


@inference_defaults()
def reply_after(
    sampler: Sampler, pasts: Sequence[Sequence[PastTurn]], questions: Sequence[Sequence[Part]], limits: ReplyLimits
) -> list[list[ReplyPart]]:
    """Parts of the reply to each question after past turns that the model did not make itself.

    Images of the past, those in replies included, enter as uploads do.
    """
    if len(pasts) != len(questions):
        raise ConfigError(f"{len(pasts)} pasts and {len(questions)} questions; expected equally many.")
    talks = [_Talk(i, [q], 0, past) for i, (past, q) in enumerate(zip(pasts, questions, strict=True))]
    replies = _converse(sampler, talks, _ReplyMode(limits, draws=False))
    return [turn for (turn,) in replies]


@dataclass(frozen=True, slots=True)
class _ReplyMode:
    """Limits of every reply, whether it is an image, and callbacks for its events and for the end of a conversation."""

    limits: ReplyLimits
    draws: bool
    watch: Watch | None = None
    ended: AtEnd | None = None


@dataclass(slots=True)
class _Talk:
    """A conversation that is being held: user turns to come, and the parts of each reply so far."""

    number: int
    turns: UserTurns
    seed: int
    past: Sequence[PastTurn] = ()
    replies: list[list[list[int] | DecodedImage]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"conversation {self.number}"

    @property
    def is_over(self) -> bool:
        return len(self.replies) == len(self.turns)


def _converse(sampler: Sampler, talks: Sequence[_Talk], mode: _ReplyMode) -> list[list[list[ReplyPart]]]:
    """Hold all conversations, as many at a time as the sampler's batch says."""
    engine, waiting = Engine(sampler), deque(talk for talk in talks if not talk.is_over)
    live: dict[int, _Talk] = {}
    failed: list[int] = []
    _fill(engine, live, waiting, mode)
    while live:
        for event in engine.step():
            talk = live[event.row]
            if mode.watch is not None:
                mode.watch(replace(event, row=talk.number))
            if isinstance(event, Failed):
                failed.append(_failure(engine, live, event))
            elif _note(talk, event):
                _go_on(engine, live, event.row, mode)
        _fill(engine, live, waiting, mode)
    if failed:
        raise DataError(f"latents of seeds {sorted(failed)} are not finite; try a lower guidance.")
    return [[_parts(sampler, reply) for reply in talk.replies] for talk in talks]


def _fill(engine: Engine, live: dict[int, _Talk], waiting: deque[_Talk], mode: _ReplyMode) -> None:
    """Begin conversations that wait while there is room."""
    count = min(engine.sampler.config.batch - len(live), len(waiting))
    engine.expect(count)
    for talk in (waiting.popleft() for _ in range(count)):
        row = engine.open()
        live[row] = talk
        read_past(engine, row, talk.past, talk.name)
        _ask(engine, row, talk, mode)


def _go_on(engine: Engine, live: dict[int, _Talk], row: int, mode: _ReplyMode) -> None:
    """The next turn of a conversation, or its end."""
    if live[row].is_over:
        if mode.ended is not None:
            mode.ended(engine, row, live[row].number)
        engine.release(row)
        del live[row]
    else:
        _ask(engine, row, live[row], mode)


def _failure(engine: Engine, live: dict[int, _Talk], event: Failed) -> int:
    """End a conversation whose image is not finite; returns its seed. Raises any other error."""
    if not isinstance(event.error, DataError):
        raise event.error
    talk = live.pop(event.row)
    engine.release(event.row)
    return talk.seed + len(talk.replies) - 1


def _note(talk: _Talk, event: RowEvent) -> bool:
    """Add what an event tells to the current reply; True if the reply is over."""
    if isinstance(event, Token):
        last = talk.replies[-1][-1] if talk.replies[-1] else None
        if not isinstance(last, list):
            last = []
            talk.replies[-1].append(last)
        last.append(event.id)
    elif isinstance(event, Completed):
        talk.replies[-1].append(event.picture)
    return isinstance(event, Ended)


# -- reading


def _ask(engine: Engine, row: int, talk: _Talk, mode: _ReplyMode) -> None:
    """Let a row read its next user turn and begin to reply."""
    turn = len(talk.replies)
    read_user_turn(engine, row, talk.turns[turn], talk.name)
    engine.begin(row, mode.limits, talk.seed + turn, draws=mode.draws)
    talk.replies.append([])


def _parts(sampler: Sampler, reply: Sequence[list[int] | DecodedImage]) -> list[ReplyPart]:
    """Parts of a reply, runs of tokens as text."""
    parts = [part if isinstance(part, DecodedImage) else _text(sampler, part) for part in reply]
    return [part for part in parts if isinstance(part, DecodedImage) or part]


def _text(sampler: Sampler, ids: Sequence[int]) -> str:
    """Tokens as text, without characters at the end that were never finished, as in a session."""
    return sampler.components.tokenizer.decode(ids).rstrip("\ufffd \n")
