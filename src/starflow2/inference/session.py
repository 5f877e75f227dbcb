"""A conversation with the model: words and images go in, words and images come out, all through one cache.

Nothing is encoded twice: the cache only grows, and `rewind` cuts it. Commands, servers and tests consume the same
stream of events. Not here: many conversations at once (conversations), files of models (checkpoint).
Letters: N latents, D latent dim.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from starflow2.core.fields import SEEDS, of_kind, whole
from starflow2.core.files import named_place
from starflow2.core.images import PictureSource, read_picture, to_pil
from starflow2.core.memory import free_bytes
from starflow2.core.text import shown
from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import CheckpointError, OutputError, PromptError, StateError
from starflow2.inference.config import ReplyLimits
from starflow2.inference.doors import InUse, exclusive, exclusive_events
from starflow2.inference.engine import Engine, RowMark, RowState
from starflow2.inference.events import (
    Begun,
    Completed,
    DecodedImage,
    Drew,
    Ended,
    Event,
    Failed,
    Finished,
    Made,
    RowEvent,
    Sampled,
    Started,
    Stepped,
    Token,
    Wrote,
)
from starflow2.inference.reading import read_image
from starflow2.inference.sampler import Sampler
from starflow2.inference.self_check import Check, check_memory, choice_of, confidences, seed_of
from starflow2.inference.session_file import (
    SavedPiece,
    SavedSampling,
    SavedSession,
    SavedState,
    load_session,
    save_session,
)
from starflow2.models.components import Components
from starflow2.models.prompts import check_words, normalized
from starflow2.models.sequence import Cursor
from starflow2.models.tokenizer import ChatTokenizer

__all__ = [
    "Mark",
    "Piece",
    "Said",
    "Session",
    "checked_part",
]

Said = PictureSource  # a str is words; anything else an image, see `core.images.read_picture`

_BRANCHES = itertools.count()


# -- the conversation -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of a conversation; exactly one of text and picture is set."""

    who: Literal["user", "model"]
    text: str | None = None
    picture: DecodedImage | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A state of a session to rewind to."""

    branch: int
    row: RowMark
    pieces: int
    replies: int
    is_open: bool


class Session:
    """One conversation.

    >>> session = Session(sampler)  # doctest: +SKIP
    >>> session.add("a red star").draw().image.save("star.png")  # doctest: +SKIP
    >>> session.add("make the star blue").draw()  # doctest: +SKIP
    """

    @inference_defaults()
    def __init__(self, sampler: Sampler, seed: int = 0) -> None:
        of_kind(sampler, Sampler, "sampler", "model.sampler() makes that of a model")
        missing = [stage for stage in ("t2i", "adapter", "joint") if stage not in sampler.components.finished_stages]
        if missing:
            done = ", ".join(sampler.components.finished_stages) or "none"
            raise StateError(f"this model has finished stages {done}; a session needs {missing[0]}, too.")
        self.sampler, self.seed = sampler, whole(seed, "seed", SEEDS)
        self.in_use = InUse()
        self.pieces: list[Piece] = []
        self.encode_calls = 0  # how often an image from outside was encoded
        self._engine = Engine(sampler)
        self._row = self._engine.open()
        self._is_open = False  # a user's turn
        self._is_replying = False
        self._replies = 0
        self._branch = next(_BRANCHES)
        self._valid: dict[int, float] = {
            self._branch: math.inf
        }  # up to which length marks of each earlier branch are valid

    # -- input

    @exclusive
    def add(self, *parts: Said) -> Session:
        """Add words (str) or images: a Path, bytes, a PIL image, an array, or a tensor (3, s, s) in [-1, 1].

        An image is encoded once, here; `core.images.read_picture` says how each kind is read, and its range.

        All parts are checked before any of them is added. Raises PromptError for words the model cannot take or a
        conversation longer than it reads, DataError and ShapeError for images it cannot.
        """
        self._check_idle()
        if not parts:
            raise PromptError("there is nothing to add: add() got no parts; give words or an image.")
        ready = [checked_part(self.sampler.components, part) for part in parts]
        self._check_room(sum(self._slots_of(part) for part in ready) + self._overhead)
        start = self.mark()
        try:
            self._open()
            for part in ready:
                if isinstance(part, str):
                    self._engine.feed(self._row, self._encoded(part))
                    self.pieces.append(Piece("user", text=part))
                else:
                    self._show(part)
        except BaseException:  # half a turn is none
            self.rewind(start)
            raise
        return self

    def _slots_of(self, part: str | Tensor) -> int:
        return len(self._encoded(part)) if isinstance(part, str) else self.sampler.layout.num_latents + 2

    @property
    def _tokenizer(self) -> ChatTokenizer:
        return self.sampler.components.tokenizer

    @property
    def _overhead(self) -> int:
        """Slots of a turn beside its content: those that open it and the reply, and those that end both."""
        return len(self._tokenizer.opens_user()) + len(self._tokenizer.opens_reply()) + 2

    def _encoded(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _open(self) -> None:
        if not self._is_open:
            self._engine.feed(self._row, self._tokenizer.opens_user(is_first=not self.length))
            self._is_open = True

    def _show(self, image: Tensor) -> None:
        """Append an uploaded image."""
        self.encode_calls += 1
        x, u = read_image(self._engine, self._row, image)
        picture = DecodedImage(x, u, self.sampler.upload_level, image)
        self.pieces.append(Piece("user", picture=picture))

    # -- output

    @exclusive_events
    def run(
        self, *, tokens: int = 64, pictures: int = 1, temperature: float = 0.0, tries: int | None = 1
    ) -> Iterator[Event]:
        """Let the model reply, deciding itself what comes next: words, an image, or both.

        tries: how many replies it makes, to go on with the one whose last image it confirms, as in `draw`; their events
        come when all are made. Stopping early, by an error or by leaving the loop, takes the whole reply back.
        """
        yield from self._reply(ReplyLimits(tokens=tokens, pictures=pictures, temperature=temperature), tries=tries)

    @exclusive
    def write(self, *, tokens: int = 64, temperature: float = 0.0) -> str:
        """Let the model reply in words, and return them."""
        events = self._reply(ReplyLimits(tokens=tokens, pictures=0, temperature=temperature))
        return "".join(e.text for e in events if isinstance(e, Wrote)).strip()

    @exclusive
    def draw(self, *, tries: int | None = None) -> Made:
        """Let the model reply with an image and nothing else, and return it.

        tries: how many images it draws, to keep the one that it confirms (`self_check`); None: the model's own number.
        Raises ConfigError, and StateError for a model that has not learnt to check itself.
        """
        events = list(self._reply(ReplyLimits(tokens=0, pictures=1), draws=True, tries=tries))
        return next(event for event in events if isinstance(event, Made))

    def _reply(self, limits: ReplyLimits, *, draws: bool = False, tries: int | None = 1) -> Iterator[Event]:
        self._check_idle()
        count, check = self._choice(tries)
        per_picture = self.sampler.layout.num_latents + 2
        self._check_room(self._overhead + (per_picture if draws or not limits.tokens else 1))
        room = self.room - self._overhead
        pictures = min(limits.pictures, (room - min(limits.tokens, 1)) // per_picture)
        limits = replace(limits, pictures=pictures, tokens=min(limits.tokens, room - pictures * per_picture))
        self._check_memory(count, self.length + self._overhead + limits.tokens + pictures * per_picture)
        start, rows = self.mark(), [self._row]
        self._is_replying = True
        try:
            self._open()
            self._engine.feed(self._row, self._tokenizer.opens_reply())
            self._is_open = False
            if count > 1:
                self._engine.expect(count - 1)
                rows += [self._engine.fork(self._row) for _ in range(count - 1)]
            for number, row in enumerate(rows):
                seed = seed_of(self.seed + self._replies, number)
                self._engine.begin(row, limits, seed, draws=draws, decodes=count == 1)
            yield from self._events(self._engine.run()) if count == 1 else self._best(rows, check)
        except BaseException:  # also of a consumer that leaves: half a reply would confuse all that follows
            self._keep_row(rows, rows[0])
            self._engine.cancel(self._row)
            self._is_replying = False
            self.rewind(start)
            raise
        self._is_replying = False
        self._replies += 1

    def _choice(self, tries: int | None) -> tuple[int, Check]:
        """The number of replies, and the questions that choose among them; see `choice_of`."""
        follows = any(piece.picture is not None for piece in self.pieces)
        return choice_of(self.sampler.components.cfg, self._turn_words(), tries, follows=follows)

    def _check_memory(self, tries: int, positions: int) -> None:
        """Raise StateError for more tries than there is memory for; each has two lanes if guidance has a branch."""
        if tries > 1:
            needed = self._engine.backend.bytes_for(2 * tries, positions)
            check_memory(needed, free_bytes(self.sampler.components.device), tries)

    def _turn_words(self) -> str:
        """Words of the user's open turn."""
        turn = itertools.takewhile(lambda piece: piece.who == "user", reversed(self.pieces))
        return " ".join(reversed([piece.text for piece in turn if piece.text]))

    def _best(self, rows: list[int], check: Check) -> Iterator[Event]:
        """Replies of all rows; the conversation goes on with the one whose image the model confirms most.

        Only that one is left in `rows`.
        """
        made: dict[int, list[RowEvent]] = {row: [] for row in rows}
        done = 0
        for event in self._engine.run():
            if isinstance(event, Stepped):
                done += 1
                yield Drew(done, len(rows) * event.total)
            else:
                made[event.row].append(event)
        whole = [row for row in rows if not any(isinstance(event, Failed) for event in made[row])]
        drawn = [row for row in whole if any(isinstance(event, Sampled) for event in made[row])]
        sure = dict(zip(drawn, confidences(self._engine, drawn, [check] * len(drawn)), strict=True))
        chosen = max(sure, key=lambda row: sure[row]) if sure else (whole or rows)[0]
        seed = seed_of(self.seed + self._replies, rows.index(chosen))
        self._keep_row(rows, chosen)
        rows[:] = [chosen]
        for part in self._events(iter(self._engine.with_pixels(made[chosen]))):
            yield replace(part, confidence=sure[chosen], seed=seed) if isinstance(part, Made) else part

    def _keep_row(self, rows: Sequence[int], kept: int) -> None:
        """Go on with one of the rows, which have the same past, and give the others back."""
        for row in rows:
            if row != kept:
                self._engine.release(row)
        self._row = kept

    def _events(self, events: Iterator[RowEvent]) -> Iterator[Event]:
        """Translate events of the row to those of a conversation; text is yielded once its characters are whole."""
        ids: list[int] = []
        written = ""
        for event in events:
            match event:
                case Token():
                    ids.append(event.id)
                    text = self._tokenizer.decode(ids)
                    if not text.endswith("\ufffd") and text != written:
                        piece, written = text[len(written) :], text
                        yield Wrote(piece)
                case Begun():
                    self._keep_text(written)
                    ids, written = [], ""
                    yield Started("image")
                case Stepped():
                    yield Drew(event.done, event.total)
                case Completed():
                    self.pieces.append(Piece("model", picture=event.picture))
                    yield Made("image", to_pil(event.picture.image), event.picture)
                case Ended():
                    self._keep_text(written)
                    yield Finished(event.reason)
                case Failed():
                    raise event.error

    def _keep_text(self, text: str) -> None:
        if text:
            self.pieces.append(Piece("model", text=text))

    # -- time

    @property
    def length(self) -> int:
        """Positions of the conversation."""
        return self._engine.length(self._row)

    @property
    def room(self) -> int:
        """Free positions: how many more the model can read."""
        return self.sampler.components.cfg.max_positions - self.length

    @exclusive
    def read(self) -> None:
        """Read now what was added; a reply would do it first."""
        self._check_idle()
        self._engine.states(self._row)

    def _check_idle(self) -> None:
        if self._is_replying:
            raise StateError("a reply is still being made; take its events to the end, or close the loop over them.")

    def _check_room(self, wanted: int) -> None:
        if wanted > self.room:
            raise PromptError(
                f"the conversation has {self.length} positions and this needs {wanted} more; this model reads up to "
                f"{self.sampler.components.cfg.max_positions}: rewind, or start a new session."
            )

    @exclusive
    def mark(self) -> Mark:
        """The current state, to `rewind` to."""
        self._check_idle()
        return Mark(
            branch=self._branch,
            row=self._engine.mark(self._row),
            pieces=len(self.pieces),
            replies=self._replies,
            is_open=self._is_open,
        )

    @exclusive
    def rewind(self, mark: Mark) -> None:
        """Forget everything since `mark`; what came before stays bit-equal.

        Raises StateError for a mark of another session, or of something that was taken back since.
        """
        self._check_idle()
        if not isinstance(mark, Mark):
            raise StateError(f"mark is {shown(mark)} ({type(mark).__name__}); expected what mark() gave.")
        if mark.row.length > self._valid.get(mark.branch, -1):
            raise StateError("rewind got a mark of another session, or of something that was taken back since.")
        self._engine.rewind(self._row, mark.row)
        del self.pieces[mark.pieces :]
        self._is_open, self._replies = mark.is_open, mark.replies
        self._start_branch(mark.row.length)

    def _start_branch(self, length: int) -> None:
        """Share the past up to `length` only: later marks of it are no longer valid."""
        self._valid = {branch: min(end, length) for branch, end in self._valid.items()}
        self._branch = next(_BRANCHES)
        self._valid[self._branch] = math.inf

    @exclusive
    def fork(self) -> Session:
        """A second session with the same past; the two never share memory."""
        self._check_idle()
        twin = copy.copy(self)
        twin.in_use = InUse()
        twin.pieces = list(self.pieces)
        twin._engine = Engine(self.sampler)
        twin._row = twin._engine.load(self._engine.save(self._row))
        for branch in (self, twin):
            branch._start_branch(self.length)
        return twin

    # -- files

    @exclusive
    def save(self, path: str | Path) -> None:
        """Write the whole state as one safetensors file. Raises OutputError, and StateError while a reply is made."""
        self._check_idle()
        path = named_place(path, "path", OutputError)
        row = self._engine.save(self._row)
        saved = SavedSession(
            pieces=tuple(_saved(piece) for piece in self.pieces),
            sampling=SavedSampling.of(self.sampler.config),
            state=self._state(row),
            tensors=self._tensors(row),
        )
        save_session(saved, self.sampler.fingerprint, path)

    def _state(self, row: RowState) -> SavedState:
        return SavedState(
            mrope=row.cursor.mrope,
            step=row.cursor.step,
            seed=self.seed,
            replies=self._replies,
            is_open=self._is_open,
            encode_calls=self.encode_calls,
        )

    def _tensors(self, row: RowState) -> dict[str, Tensor]:
        """Every tensor of the session by its name in a file."""
        deep = self.sampler.components.cfg.flow.deep
        none = torch.zeros(deep.num_latents + 1, deep.dim, dtype=self.sampler.dtype)
        tensors = {name: x[None] if name in ("h", "g") else x for name, x in row.lane.items()}
        tensors["previous"] = (none if row.previous is None else row.previous)[None]
        tensors["has_previous"] = torch.tensor([row.previous is not None])
        for i, piece in enumerate(self.pieces):
            if piece.picture is not None:
                p = piece.picture
                tensors |= {f"picture.{i}.x": p.x, f"picture.{i}.u": p.u, f"picture.{i}.image": p.image}
        return tensors

    @classmethod
    @inference_defaults()
    def load(cls, path: str | Path, sampler: Sampler) -> Session:
        """Load a saved session; it goes on exactly where it was, with the guidance and prior scale that it had.

        Raises CheckpointError for a file that is not whole, was changed, or is of another model or precision.
        """
        path, probe = named_place(path, "path", CheckpointError), cls(sampler)
        probe._engine.feed(probe._row, probe._tokenizer.opens_user()[:1])
        saved = load_session(path, sampler, probe._tensors(probe._engine.save(probe._row)))
        session = cls(sampler.changed(**saved.sampling.settings()))
        session._restore(saved)
        return session

    def _restore(self, saved: SavedSession) -> None:
        device, state = self.sampler.components.device, saved.state
        tensors = {name: value.to(device) for name, value in saved.tensors.items()}
        lane = {name: x for name, x in tensors.items() if name.startswith(("vlm.", "flow."))}
        lane |= {name: tensors[name][0] for name in ("h", "g")}
        previous = tensors["previous"][0] if bool(tensors["has_previous"]) else None
        self._engine.release(self._row)
        row = RowState(lane, previous, Cursor(self.sampler.layout.grid, state.mrope, state.step))
        self._row = self._engine.load(row)
        self.seed, self._replies, self._is_open = state.seed, state.replies, state.is_open
        self.encode_calls = state.encode_calls
        for i, piece in enumerate(saved.pieces):
            picture = None
            if piece.noise_level is not None:
                x, u, image = (tensors[f"picture.{i}.{name}"] for name in ("x", "u", "image"))
                picture = DecodedImage(x, u, piece.noise_level, image, *piece.nats)
            self.pieces.append(Piece(piece.who, piece.text, picture))


def checked_part(components: Components, part: Said) -> str | Tensor:
    """Words as the model reads them, or a picture (3, s, s) in [-1, 1].

    Raises PromptError for words it does not know, DataError and ShapeError for pictures it cannot take.
    """
    if isinstance(part, str):
        check_words(components, part)
        return normalized(components, part)
    return read_picture(part, components.cfg.fae.image_size)


def _saved(piece: Piece) -> SavedPiece:
    p = piece.picture
    level, nats = (None, (None, None)) if p is None else (p.noise_level, (p.log_prob, p.unconditional_log_prob))
    return SavedPiece(who=piece.who, text=piece.text, noise_level=level, nats=nats)
