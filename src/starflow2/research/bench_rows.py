"""Benchmarks of conversations: many rows of one engine, what they leave behind, and turn after turn of one row.

Results are those of one row, so that they show whether it is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
from torch import Tensor

from starflow2.core.serialize import JsonObject
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed, DecodedImage, Ended, Failed
from starflow2.inference.lean import LeanBackend
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.components import Components
from starflow2.research.bench import Variant
from starflow2.research.bench_cases import LATENT, PROMPTS

__all__ = ["SLACK", "Crowd", "many", "turns"]

ROWS, TURNS = 16, 8
EARLY, REQUESTS = 100, 1000  # requests after which an engine is looked at
SLACK = 64  # positions that its caches may have beyond the longest conversation
DRAW = ReplyLimits(tokens=0, pictures=1)


def _words(sampler: Sampler, number: int) -> list[int]:
    """A request: its opening, words, the opening of the reply."""
    special = sampler.components.cfg.vlm.special
    return [special.user, *range(10 + number % 8, 21), special.assistant]


def _asked(sampler: Sampler, number: int) -> list[int]:
    """A prompt as a session reads it."""
    return sampler.components.tokenizer.drawing_prompt(PROMPTS[number % len(PROMPTS)])[:-1]


def _drawn(engine: Engine, row: int) -> DecodedImage:
    """The first image that a row completes; other rows go on beside it, and their images are forgotten."""
    return next(event.picture for event in engine.run() if isinstance(event, Completed) and event.row == row)


# -- many rows ----------------------------------------------------------------------------------------------------


class _Rows:
    """An engine in which one row draws, among others."""

    def __init__(self, sampler: Sampler, idle: int = 0) -> None:
        """idle: conversations that are open, have read something and wait."""
        self.engine = Engine(sampler)
        for number in range(idle):
            row = self.engine.open()
            self.engine.feed(row, _asked(sampler, number))
            self.engine.next_logits(row)

    def begin(self, number: int) -> int:
        row = self.engine.open()
        self.engine.feed(row, _asked(self.engine.sampler, number))
        self.engine.begin(row, DRAW, number, draws=True)
        return row

    def draw(self, rows: int, joining: int = 0) -> Tensor:
        """Pixels of the first of `rows` that begin at once, `joining` more of which begin at a step each."""
        live, found = [self.begin(number) for number in range(rows)], dict[int, Tensor]()
        while self.engine.is_busy:
            events = self.engine.step()
            found |= {event.row: event.picture.image for event in events if isinstance(event, Completed)}
            if joining:
                live.append(self.begin(len(live)))
                joining -= 1
        for row in live:
            self.engine.release(row)
        return found[live[0]]


def _in_a_session(sampler: Sampler) -> Tensor:
    return Session(sampler).add(PROMPTS[0]).draw(tries=1).picture.image


def many(components: Components) -> Iterator[list[Variant]]:
    """An image of one row: alone, beside rows that wait, beside 15 others, and while 15 others join one by one.

    Then what 1,000 mixed requests leave behind in an engine.
    """
    sampler = Sampler(components, DrawConfig.for_model(components))
    name = sampler.backend().name
    alone, among = _Rows(sampler), _Rows(sampler, idle=ROWS - 1)
    runs: dict[str, tuple[Callable[[], Tensor], int]] = {
        "one row": (lambda: alone.draw(1), 1),
        "a session": (lambda: _in_a_session(sampler), 1),
        f"one of {ROWS} rows, the others idle": (lambda: among.draw(1), 1),
        f"{ROWS} rows": (lambda: alone.draw(ROWS), ROWS),
        f"{ROWS} rows that join one by one": (lambda: alone.draw(1, joining=ROWS - 1), ROWS),
    }
    settings: JsonObject = {"shape": components.cfg.name, "guided": components.cfg.guidance > 0}
    yield [
        Variant(
            bench="many",
            name=f"{name}, {what}",
            run=run,
            units=rows,
            tolerance=1e-3,
            settings=settings | {"batch": rows},
            exact_group="rows" if name == "native" else "",
        )
        for what, (run, rows) in runs.items()
    ]
    yield [_growth(sampler, settings)]


# -- what is left behind ----------------------------------------------------------------------------------------------


class Crowd:
    """An engine that many requests pass through, `ROWS` at a time: each is a new row, which leaves with its reply.

    beyond: positions that the caches had at most beyond the longest conversation that was there, replies included.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.beyond = engine, 0
        self._numbers = count()
        self._live: dict[int, int] = {}  # rows, and the positions that each may come to

    def serve(self, requests: int) -> None:
        """Take this many requests more, and wait for all that are there."""
        for _ in range(requests):
            while len(self._live) >= ROWS:
                self._step()
            self._ask(next(self._numbers))
        while self._live:
            self._step()

    def _ask(self, number: int) -> None:
        """To draw, to write, to do both, to read an image and write; every tenth is cancelled after a step."""
        engine, row, kind = self.engine, self.engine.open(), number % 10
        tokens, pictures = (0, 1) if kind < 4 else (4 + number % 13, int(kind == 7))
        if kind == 8:
            deep = engine.sampler.components.cfg.flow.deep
            engine.see(row, torch.zeros(deep.num_latents, deep.dim), engine.sampler.upload_level)
        engine.feed(row, _words(engine.sampler, number))
        room = tokens + pictures * (engine.sampler.layout.num_latents + 2) + 1
        self._live[row] = engine.length(row) + room
        engine.begin(row, ReplyLimits(tokens=tokens, pictures=pictures), number, draws=kind < 4)
        if kind == 3:
            self._step()
            if row in self._live:
                engine.cancel(row)
                self._leave(row)

    def _step(self) -> None:
        for event in self.engine.step():
            if isinstance(event, Ended | Failed):
                self._leave(event.row)

    def _leave(self, row: int) -> None:
        self._look()
        self.engine.release(row)
        del self._live[row]
        self._look()

    def _look(self) -> None:
        if self._live and isinstance(self.engine.backend, LeanBackend):
            self.beyond = max(self.beyond, self.engine.backend.lanes.capacity - max(self._live.values()))


def _growth(sampler: Sampler, settings: JsonObject) -> Variant:
    """Bytes that an engine has more after 1,000 requests than after 100, and positions beyond what it may have."""
    found = {**settings, "requests": REQUESTS}

    def run() -> Tensor:
        crowd = Crowd(Engine(sampler))
        crowd.serve(EARLY)
        early = crowd.engine.backend.nbytes
        crowd.serve(REQUESTS - EARLY)
        kept = crowd.engine.backend.nbytes
        found.update(beyond=crowd.beyond, kept=kept, more=kept - early)
        return torch.tensor([float(kept - early), float(max(0, crowd.beyond - SLACK))])

    name = f"{sampler.backend().name}, {REQUESTS} mixed requests"
    return Variant(
        bench="many", name=name, run=run, units=REQUESTS, expected=torch.zeros(2), settings=found, is_timed=False
    )


# -- turn after turn ------------------------------------------------------------------------------------------------


class _Talk:
    """A conversation of requests and drawn images, with a row for the state before each of its turns."""

    def __init__(self, sampler: Sampler, turns: int) -> None:
        self.engine, self.pictures = Engine(sampler), list[DecodedImage]()
        row = self.engine.open()
        self._rows = [self.engine.load(self.engine.save(row))]
        for turn in range(turns):
            self.take(row, turn)
            self._rows.append(self.engine.load(self.engine.save(row)))
        self.lengths = [self.engine.length(row) for row in self._rows]
        self._marks = [self.engine.mark(row) for row in self._rows]

    def take(self, row: int, turn: int) -> Tensor:
        """A turn of the conversation; returns both streams' states before its image."""
        self.engine.feed(row, _words(self.engine.sampler, turn))
        states = torch.cat(self.engine.states(row))
        self.engine.begin(row, DRAW, turn, draws=True)
        picture = _drawn(self.engine, row)
        list(self.engine.run())
        if len(self.pictures) == turn:
            self.pictures.append(picture)
        return states

    def again(self, turn: int) -> Tensor:
        """The turn once more, after all that came before it."""
        self.engine.rewind(self._rows[turn], self._marks[turn])
        return self.take(self._rows[turn], turn)

    def anew(self, turn: int) -> Tensor:
        """The turn in a new row that reads all that came before it again."""
        engine, row = self.engine, self.engine.open()
        for before in range(turn):
            engine.feed(row, _words(engine.sampler, before))
            engine.see(row, self.pictures[before].x, self.pictures[before].noise_level)
            engine.feed(row, [engine.sampler.components.cfg.vlm.special.end])
        states = self.take(row, turn)
        engine.release(row)
        return states


def turns(components: Components) -> Iterator[list[Variant]]:
    """Each of eight turns that draw, after what came before it; and the last one where all of that is read again.

    Units are new positions. Every turn is compared with its first time, bit by bit where the code promises it.
    """
    sampler = Sampler(components, DrawConfig.for_model(components))
    name, last = sampler.backend().name, TURNS - 1
    talk = _Talk(sampler, TURNS)
    order = [1, 0, *range(2, TURNS)]  # the second turn is the baseline
    runs = [(f"turn {turn + 1}", partial(talk.again, turn), turn) for turn in order]
    runs.append((f"turn {TURNS}, all read anew", partial(talk.anew, last), last))
    settings: JsonObject = {"shape": components.cfg.name, "batch": 1, "guided": components.cfg.guidance > 0}
    yield [
        Variant(
            bench="turns",
            name=f"{name}, {what}",
            run=run,
            units=talk.lengths[turn + 1] - talk.lengths[turn],
            expected=talk.again(turn),
            tolerance=LATENT,
            settings=settings,
        )
        for what, run, turn in runs
    ]
