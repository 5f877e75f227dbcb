"""Conversations of one visitor of the page: turns, the tries of each reply, undo, fork, other seeds, stop.

A try keeps the id by which the service knows its reply. So going back, forking and choosing another try compute
nothing: the next turn names another reply as the one that it follows. Not here: HTML (page_view), Gradio (page).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from starflow2.core.heatmap import heat_map
from starflow2.core.images import PILImage, to_pil
from starflow2.errors import PromptError, StateError
from starflow2.models.wording import words_of
from starflow2.serving.jobs import (
    Ask,
    Done,
    Draft,
    Event,
    ImageBegun,
    ImageDone,
    PastTurn,
    Progress,
    ScoreAsk,
    Scored,
    TextDelta,
)
from starflow2.world.examples import EXAMPLES, Example

if TYPE_CHECKING:
    from starflow2.serving.service import Service

__all__ = ["Choice", "Desk", "Heat", "Picture", "Talk", "Try", "Turn", "examples_of", "turn_of"]

DRAFTS = 3  # of a picture while it is drawn
MOST_TRIES = 16  # of one turn, so that a strip stays a strip
MOST_TALKS = 12  # of one visitor
NOT_HERE = {"remove the green circle"}  # done to an upload, but not yet to a picture that was drawn in the conversation


# -- what was said --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Picture:
    """A picture of a reply: its last draft while it is drawn, `pixels` (3, s, s) once it is complete."""

    image: PILImage | None = None
    share: float = 0.0  # of its latents that are drawn
    pixels: Tensor | None = None
    gain: float | None = None  # nats by which the conversation makes it likelier than none

    @property
    def is_draft(self) -> bool:
        return self.pixels is None


@dataclass(slots=True, eq=False)
class Try:
    """One reply to a turn, with its seed. id: by which the next turn names it, if the service could keep it."""

    seed: int
    id: str | None = None
    is_complete: bool = False
    pieces: list[str | Picture] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        return [piece for piece in self.pieces if isinstance(piece, Picture)]

    def take(self, event: Event) -> None:
        """Add what a service tells."""
        match event:
            case TextDelta(text=text):
                self._write(text)
            case ImageBegun():
                self.pieces.append(Picture())
            case Progress(done=done, total=total) if self.pictures:
                self.pictures[-1].share = done / total
            case Draft(image=image):
                self.pictures[-1].image = image
            case ImageDone(image=image):
                pixels = event.picture.image.detach().cpu().float()  # (3, s, s)
                self.pieces[self.pieces.index(self.pictures[-1])] = Picture(image, 1.0, pixels, event.gain)
            case Done(id=name):
                self.id, self.is_complete = name, True

    def _write(self, text: str) -> None:
        if self.pieces and isinstance(self.pieces[-1], str):
            self.pieces[-1] += text
        else:
            self.pieces.append(text)


@dataclass(frozen=True, slots=True)
class Heat:
    """A map of log probability over the picture that it is about.

    nats: -log p of the picture after the words, per latent dimension; lower is likelier.
    """

    image: PILImage
    nats: float


@dataclass(slots=True, eq=False)
class Turn:
    """A turn of the visitor, the tries of a reply, which of them goes on, and a map over its picture.

    shown: pictures of the visitor, (3, s, s) in [-1, 1]. read: the words as the model reads them.
    """

    words: str
    shown: tuple[Tensor, ...] = ()
    read: str = ""
    guidance: float | None = None
    tries: list[Try] = field(default_factory=list)
    chosen: int = 0
    heat: Heat | None = None

    @property
    def reply(self) -> Try:
        return self.tries[self.chosen]

    @property
    def parts(self) -> tuple[str | Tensor, ...]:
        return (*self.shown, *([self.read] if self.read else []))

    @property
    def past(self) -> PastTurn:
        """The turn and its reply, for a service that has forgotten it."""
        parts = [piece.pixels if isinstance(piece, Picture) else piece.strip() for piece in self.reply.pieces]
        return self.parts, [part for part in parts if part is not None]

    @property
    def next_seed(self) -> int:
        """The seed after all that were tried."""
        return max(one.seed for one in self.tries) + 1


@dataclass(slots=True, eq=False)
class Talk:
    """One conversation."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def title(self) -> str:
        words = next((turn.words for turn in self.turns if turn.words), "new")
        return words if len(words) <= 22 else words[:21].rstrip() + "…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Settings of the next reply; guidance None: the model's own. tries: how many, if it is a picture."""

    seed: int = 0
    tries: int = 1
    guidance: float | None = None


def turn_of(service: Service, words: str, pictures: Sequence[bytes] = (), guidance: float | None = None) -> Turn:
    """A turn of these words and pictures. Raises PromptError, DataError, ShapeError for what the model cannot take."""
    words = words.strip()
    shown = [part for part in service.checked(pictures) if isinstance(part, Tensor)]
    read = "".join(part for part in service.checked([words]) if isinstance(part, str)) if words else ""
    return Turn(words, tuple(shown), read, guidance)


def examples_of(service: Service) -> list[Example]:
    """Examples whose words the model knows and does in a conversation; none for a model without a fixed vocabulary."""
    known = service.model.components.vocabulary
    return [e for e in EXAMPLES if {*words_of(f"{e.text} {e.about}")} <= known and e.text not in NOT_HERE]


# -- what a visitor does --------------------------------------------------------------------------------------------


class Desk:
    """All conversations of one visitor, and which of them is open."""

    def __init__(self) -> None:
        self.talks = [Talk()]
        self.open = 0
        self.notice = ""  # for the visitor, until the next step
        self.owner = f"page-{secrets.token_hex(8)}"  # whose replies nobody else may continue
        self._stop: asyncio.Event | None = None  # of the reply that is being made

    @property
    def talk(self) -> Talk:
        return self.talks[self.open]

    @property
    def turn(self) -> Turn:
        """The last turn. Raises StateError where nothing was said yet."""
        if not self.talk.turns:
            raise StateError("nothing has been said yet; say what to draw.")
        return self.talk.turns[-1]

    @property
    def stages(self) -> tuple[str, ...]:
        """Blank, draft or final, of every picture in the tries of the last turn."""
        pictures = [picture for one in self.talk.turns[-1].tries for picture in one.pictures] if self.talk.turns else []
        return tuple("blank" if p.image is None else "draft" if p.is_draft else "final" for p in pictures)

    @property
    def is_busy(self) -> bool:
        return self._stop is not None

    def check_idle(self) -> None:
        """Forget the notice. Raises StateError while a reply is being made."""
        if self.is_busy:
            raise StateError("a reply is being made; wait for it, or stop it.")
        self.notice = ""

    # -- replies

    async def say(self, service: Service, turn: Turn, choice: Choice) -> AsyncGenerator[None]:
        """Add a turn and have it answered; yields at every visible change. What fails or is stopped leaves no turn."""
        self.check_idle()
        if not turn.parts:
            raise PromptError("the prompt is empty; say what to draw, for instance 'two pink hearts'.")
        talk = self.talk
        talk.turns.append(turn)
        try:
            async for _ in self._answer(service, talk, turn, choice):
                yield
        finally:
            if not turn.tries:
                talk.turns.remove(turn)
        yield

    async def play(self, service: Service, example: Example, tries: int) -> AsyncGenerator[None]:
        """An example in a conversation of its own: the picture that it is about, then its sentence; yields as `say`."""
        self.begin()
        if example.about:
            async for _ in self.say(service, turn_of(service, example.about), Choice(seed=example.seed)):
                yield
            if not self.talk.turns:  # it was stopped
                return
        async for _ in self.say(service, turn_of(service, example.text), Choice(seed=example.seed, tries=tries)):
            yield

    async def retry(self, service: Service, tries: int) -> AsyncGenerator[None]:
        """More tries of the last turn, with the seeds after those that it has; go on with the first of them."""
        self.check_idle()
        turn = self.turn
        room = min(tries, MOST_TRIES - len(turn.tries))
        if room < 1:
            raise StateError(f"the last turn has {len(turn.tries)} tries, and there is room for no more.")
        turn.heat = None
        choice = Choice(seed=turn.next_seed, tries=room, guidance=turn.guidance)
        async for _ in self._answer(service, self.talk, turn, choice):
            yield
        yield

    async def _answer(self, service: Service, talk: Talk, turn: Turn, choice: Choice) -> AsyncGenerator[None]:
        """Answer a turn, once for each seed if the first reply has a picture."""
        chosen, turn.chosen = turn.chosen, len(turn.tries)
        ask = self._ask(service, talk, turn)
        asks = [replace(ask, seed=choice.seed + i) for i in range(choice.tries)]
        self._stop = asyncio.Event()
        try:
            async for _ in _raced(service, turn, asks, self._stop):
                yield
        finally:
            self._stop = None
            turn.tries = [one for one in turn.tries if one.is_complete]
            if turn.chosen >= len(turn.tries):
                turn.chosen = chosen

    def _ask(self, service: Service, talk: Talk, turn: Turn) -> Ask:
        """The request for a reply to a turn, after the reply before it; after all that was said where that is lost."""
        past = talk.turns[: next(i for i, one in enumerate(talk.turns) if one is turn)]
        last = past[-1].reply.id if past else None
        own = service.sampler.config
        config = None if turn.guidance is None else replace(own, guidance=turn.guidance, edit_guidance=None)
        ask = Ask(parts=turn.parts, owner=self.owner, config=config, keep="memory", drafts=DRAFTS, reports=True)
        if last is not None and service.has(last, self.owner):
            return replace(ask, previous=last)
        return replace(ask, past=[one.past for one in past])

    def stop(self) -> None:
        """Leave the reply that is being made; without one, nothing."""
        if self._stop is not None:
            self._stop.set()

    async def map(self, service: Service) -> None:
        """Show where the last picture is likely, or hide it again. Raises StateError where there is no picture."""
        self.check_idle()
        turn = self.turn
        if turn.heat is not None:
            turn.heat = None
            return
        pixels = _last(turn)
        if pixels is None:
            raise StateError("the last reply has no picture; draw one first.")
        earlier = [found for one in self.talk.turns[:-1] if (found := _last(one)) is not None]
        ask = ScoreAsk(prompt=[*earlier[-1:], *turn.parts], reply=[pixels], owner=self.owner)
        async for event in service.submit(ask):
            if isinstance(event, Scored):
                (score,) = event.score.pictures
                turn.heat = Heat(to_pil(heat_map(pixels, score.patches)), score.nats_per_dim)

    # -- what computes nothing

    def choose(self, number: int) -> None:
        """Go on with another try of the last turn."""
        self.check_idle()
        turn = self.turn
        if not 0 <= number < len(turn.tries):
            raise StateError(f"there is no try {number}; the last reply has {len(turn.tries)}.")
        turn.chosen, turn.heat = number, None

    def undo(self) -> Turn:
        """Take the last turn back, and return it."""
        self.check_idle()
        turn = self.turn
        self.talk.turns.pop()
        return turn

    def fork(self) -> None:
        """A second conversation with the same past, which from now on is the open one."""
        self.check_idle()
        _ = self.turn
        self._add(Talk([replace(turn, tries=list(turn.tries)) for turn in self.talk.turns]))

    def begin(self) -> None:
        """A new conversation, unless the open one is still empty."""
        self.check_idle()
        if self.talk.turns:
            self._add(Talk())

    def _add(self, talk: Talk) -> None:
        if len(self.talks) >= MOST_TALKS:
            raise StateError(f"there are {MOST_TALKS} conversations and room for no more; reload the page.")
        self.talks.append(talk)
        self.open = len(self.talks) - 1

    def show(self, number: int) -> None:
        """Open another conversation."""
        self.check_idle()
        if not 0 <= number < len(self.talks):
            raise StateError(f"there is no conversation {number}; there are {len(self.talks)}.")
        self.open = number


def _last(turn: Turn) -> Tensor | None:
    """The last picture of a turn's reply."""
    pixels = [picture.pixels for picture in turn.reply.pictures if picture.pixels is not None]
    return pixels[-1] if pixels else None


async def _raced(service: Service, turn: Turn, asks: Sequence[Ask], stop: asyncio.Event) -> AsyncGenerator[None]:
    """Answer the first request and, as soon as it draws, the others beside it; yields whenever something has changed.

    Ends early once `stop` is set. Raises what the first reply raises; another one that fails is no try.
    """
    view = _View()
    tries = [Try(ask.seed) for ask in asks]
    turn.tries.append(tries[0])
    running = [asyncio.ensure_future(_follow(service, asks[0], tries[0], view))]
    halt = asyncio.ensure_future(stop.wait())
    halt.add_done_callback(lambda _: view.changed.set())
    try:
        while not (halt.done() or all(task.done() for task in running)):
            await view.changed.wait()
            view.changed.clear()
            if len(running) == 1 < len(asks) and tries[0].pictures:
                turn.tries += tries[1:]
                pairs = zip(asks[1:], tries[1:], strict=True)
                running += [asyncio.ensure_future(_follow(service, ask, one, view)) for ask, one in pairs]
            yield
            view.looked_at.set()
        if running[0].done():
            running[0].result()
    finally:
        for task in (*running, halt):
            task.cancel()
        await asyncio.gather(*running, halt, return_exceptions=True)


class _View:
    """A visitor's view: who changes it says so, and may wait until it was looked at."""

    def __init__(self) -> None:
        self.changed, self.looked_at = asyncio.Event(), asyncio.Event()


async def _follow(service: Service, ask: Ask, one: Try, view: _View) -> None:
    """Add the events of a reply to a try, and cancel the reply if nobody waits for it any more.

    What comes after a draft waits until that was looked at, however fast the model draws.
    """
    try:
        with service.submit(ask) as reply:
            async for event in reply:
                one.take(event)
                view.looked_at.clear()
                view.changed.set()
                if isinstance(event, Draft):
                    await view.looked_at.wait()
    finally:
        view.changed.set()
