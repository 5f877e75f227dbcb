"""Conversations: nothing is read twice, rewinding and forking leave the rest alone, half a reply leaves no trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from model_cases import STAGES, tiny_components
from starflow2.core.images import read_picture
from starflow2.errors import CheckpointError, ConfigError, DataError, OutputError, PromptError, ShapeError, StateError
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Drew, Event, Finished, Made, Started, Wrote
from starflow2.inference.lean import LeanBackend
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.inference.streams import StreamBackend
from starflow2.models.components import Components
from starflow2.models.fae import Fae
from starflow2.models.joint_stream import read_documents
from starflow2.models.sequence import Image as Slot
from starflow2.models.sequence import Text, pack
from stream_cases import Failing, Recording

SIDE, SIZE = 2, 16  # latents and pixels a side
COUNT = SIDE * SIDE
SLOTS = COUNT + 2  # of a picture


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return sampler_of(tiny_components(STAGES, side=SIDE))


def sampler_of(components: Components, guidance: float = 1.0) -> Sampler:
    return Sampler(components, DrawConfig(guidance=guidance, prior_scale=0.8, precision="float64"))


def photo(seed: int = 0) -> Tensor:
    return torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def state(session: Session) -> dict[str, Tensor]:
    """Every number that what comes next depends on."""
    row = session._engine.save(session._row)
    counts = [session.length, session._replies, session._is_open, row.cursor.mrope, row.cursor.step]
    previous = {} if row.previous is None else {"previous": row.previous}
    return row.lane | previous | {"counts": torch.tensor(counts)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def told(session: Session) -> list[tuple[str, str | None, float | None]]:
    """Pieces in a form that can be compared."""
    return [(p.who, p.text, None if p.picture is None else float(p.picture.u.sum())) for p in session.pieces]


def goes_on(session: Session) -> tuple[dict[str, Tensor], list[tuple[str, str | None, float | None]]]:
    """What becomes of a session that goes on in a certain way."""
    session.add("a blue star").draw()
    session.add("two red hearts").write(tokens=6, temperature=1.0)
    return state(session), told(session)


def equal_future(a: Session, b: Session) -> bool:
    (one, pieces), (other, other_pieces) = goes_on(a), goes_on(b)
    return same(one, other) and pieces == other_pieces


def begun(sampler: Sampler, seed: int = 0) -> Session:
    """A session in which something of every kind has happened."""
    session = Session(sampler, seed).add("a red circle", photo())
    session.write(tokens=4)
    session.add("a green ring").draw()
    return session


@pytest.fixture(scope="module")
def past(sampler: Sampler) -> Session:
    """A session to fork: it is never changed itself."""
    return begun(sampler)


# -- what is said and made


def test_a_conversation_is_one_document_that_grows_by_what_each_part_takes(sampler):
    session, words = Session(sampler), len(sampler.components.tokenizer.encode("a red circle"))
    assert session.length == 0 and session.room == 4096
    session.add("a red circle")
    assert session.length == 1 + words
    session.add(photo())
    assert session.length == 1 + words + SLOTS, "one turn of the user, whatever the number of calls"
    session.draw()
    assert session.length == 1 + words + SLOTS + 1 + SLOTS + 1
    session.add("a red circle")
    assert session.length == 2 * (1 + words) + 2 * SLOTS + 2


def test_pieces_tell_who_said_what_as_the_model_heard_it(sampler):
    session = Session(sampler).add("A red  circle", photo(), "a blue star")
    made = session.draw()
    assert [(p.who, p.text, p.picture is None) for p in session.pieces] == [
        ("user", "a red circle", True), ("user", None, False), ("user", "a blue star", True), ("model", None, False),
    ]  # fmt: skip
    assert session.pieces[-1].picture is made.picture
    assert torch.equal(session.pieces[1].picture.image, photo())
    assert made.image.size == (SIZE, SIZE) and made.modality == "image"
    assert session.pieces[1].picture.noise_level == 0.01 and made.picture.noise_level == 0.5


def test_capitals_and_spaces_make_no_difference_to_what_the_model_reads(sampler):
    assert same(state(Session(sampler).add("a red circle")), state(Session(sampler).add("  A  RED\ncircle ")))


def test_events_of_a_drawn_reply_come_in_order_and_count_every_latent(sampler):
    events = list(Session(forced(sampler, [sampler.layout.begin])).add("a red circle").run(tokens=3))
    names = [type(e).__name__ for e in events]
    assert names[:2] == ["Started", "Drew"] and names[COUNT + 1] == "Made" and names[-1] == "Finished"
    assert [(e.done, e.total) for e in events if isinstance(e, Drew)] == [(i, COUNT) for i in range(1, COUNT + 1)]
    assert events[-1] == Finished("limit")


def over(sampler: Sampler, stream: Any) -> Sampler:
    """A sampler of the same model that reads through another stream."""
    twin = copy.copy(sampler)
    twin.pretzel = stream
    return twin


def forced(sampler: Sampler, ids: list[int]) -> Sampler:
    """A sampler whose likeliest tokens are `ids`, one after the other, as long as they last."""
    left = list(ids)

    def change(logits: Tensor) -> Tensor:
        if left:
            logits[:, left.pop(0)] += 1e3
        return logits

    return adjusted(sampler, change)


def adjusted(sampler: Sampler, change: Callable[[Tensor], Tensor]) -> Sampler:
    """A sampler whose logits are changed before a token is chosen."""
    twin = copy.copy(sampler)
    twin.adjust_logits = change
    return twin


@contextmanager
def through(session: Session, sampler: Sampler) -> Iterator[None]:
    """Inside, a session that has begun goes on with another sampler of the same model."""
    before = session.sampler
    session.sampler = session._engine.sampler = sampler
    try:
        yield
    finally:
        session.sampler = session._engine.sampler = before


def test_words_are_yielded_as_they_come_and_only_whole_characters(sampler):
    tokenizer = sampler.components.tokenizer
    ids = [*tokenizer.encode("red größe"), sampler.components.cfg.vlm.special.end]
    assert len(ids) > 6, "some characters are to take two tokens"
    session = Session(forced(sampler, ids)).add("a red circle")
    pieces = [e.text for e in session.run() if isinstance(e, Wrote)]
    assert "".join(pieces) == "red größe" and len(pieces) < len(ids) - 1
    assert session.pieces[-1].text == "red größe"


def test_a_reply_of_words_a_picture_and_words_keeps_their_order(sampler):
    tokenizer, end = sampler.components.tokenizer, sampler.components.cfg.vlm.special.end
    ids = [*tokenizer.encode("red"), sampler.layout.begin, *tokenizer.encode("blue"), end]
    session = Session(forced(sampler, ids)).add("a red circle")
    events = [type(e) for e in session.run() if not isinstance(e, Drew)]
    assert [e for i, e in enumerate(events) if i == 0 or e != events[i - 1]] == [Wrote, Started, Made, Wrote, Finished]
    assert [(p.who, p.text) for p in session.pieces[1:]] == [("model", "red"), ("model", None), ("model", "blue")]


def test_limits_of_words_and_pictures_are_kept(sampler):
    sampler = forced(sampler, [sampler.layout.begin] * 9)
    events = list(Session(sampler).add("a red circle").run(tokens=2, pictures=2))
    assert sum(isinstance(e, Made) for e in events) == 2 and events[-1] == Finished("limit")
    assert not any(isinstance(e, Started) for e in Session(sampler).add("a red circle").run(tokens=2, pictures=0))


def test_write_gives_what_run_would_tell(sampler):
    ids = [*sampler.components.tokenizer.encode("two red hearts"), sampler.components.cfg.vlm.special.end]
    session = Session(forced(sampler, ids + ids)).add("a red circle")
    fork = session.fork()
    written = session.write()
    assert written == "two red hearts" == "".join(e.text for e in fork.run(pictures=0) if isinstance(e, Wrote))
    assert same(state(session), state(fork))


def test_the_same_seed_gives_the_same_conversation_and_another_seed_another(sampler):
    assert same(state(begun(sampler, 3)), state(begun(sampler, 3)))
    one, other = (Session(sampler, seed).add("a red circle").draw().picture.u for seed in (3, 4))
    assert not torch.equal(one, other)


def test_every_reply_has_noise_of_its_own(sampler):
    session = Session(sampler).add("a red circle")
    start = session.mark()
    first = session.draw().picture.u
    session.rewind(start)
    assert torch.equal(session.draw().picture.u, first)
    session.rewind(start)
    session._replies += 1
    second = session.draw().picture.u
    assert not torch.equal(second, first), "the second reply to the same words is another picture"


def test_what_a_picture_was_drawn_with_is_the_likelihood_that_scoring_finds(sampler):
    """Sampled step by step with guidance, scored in one pass without: two ways to one number."""
    made = Session(sampler).add("a red circle").draw().picture
    tokenizer, s = sampler.components.tokenizer, sampler.components.cfg.vlm.special
    document = [Text((s.user, *tokenizer.encode("a red circle"), s.assistant)), Slot(is_target=True)]
    level = torch.tensor([made.noise_level], dtype=torch.float64)
    with torch.no_grad():
        out = read_documents(sampler.pretzel, pack([document], sampler.layout), made.x[None], level)
        blank = [Text((s.user, s.assistant)), Slot(is_target=True)]
        less = read_documents(sampler.pretzel, pack([blank], sampler.layout), made.x[None], level)
    assert (out.u[0] - made.u).abs().max() <= 1e-8
    assert made.log_prob == pytest.approx(float(out.affine.log_prob(out.u).sum()), abs=1e-6)
    assert made.unconditional_log_prob == pytest.approx(float(less.affine.log_prob(less.u).sum()), abs=1e-6)
    assert abs(made.log_prob - made.unconditional_log_prob) > 1e-3


def test_without_guidance_there_is_no_unconditional_branch_and_nothing_said_about_it():
    made = Session(sampler_of(tiny_components(STAGES, side=SIDE), guidance=0.0)).add("a red circle").draw().picture
    assert made.log_prob is not None and made.unconditional_log_prob is None


# -- nothing is read twice


def test_pictures_are_encoded_once_if_they_come_from_outside_and_never_if_the_model_drew_them(sampler, monkeypatch):
    calls: list[int] = []
    right = Fae.encode_features

    def counted(self: Fae, feats: Tensor) -> Tensor:
        calls.append(len(feats))
        return right(self, feats)

    monkeypatch.setattr(Fae, "encode_features", counted)
    session = Session(sampler).add("a red circle")
    session.draw()
    session.add("a blue star").draw()
    session.add("a green ring").write(tokens=3)
    assert calls == [] and session.encode_calls == 0
    session.add(photo(1), "a blue star", photo(2)).draw()
    assert calls == [1, 1] and session.encode_calls == 2
    session.add("a red circle").draw()
    assert calls == [1, 1] and session.encode_calls == 2


def test_every_slot_goes_through_the_streams_once(sampler):
    """The cache only grows: what a turn feeds is what it adds, however long the conversation was before."""
    stream = Recording(sampler.pretzel)
    session = Session(over(sampler, stream))
    backend = session._engine.backend
    assert isinstance(backend, StreamBackend)
    (lane,) = backend._lanes
    for _ in range(2):
        session.add("a red circle", photo()).draw()
        session.add("a blue star").write(tokens=3)
        fed = sum(states.h.shape[1] for states in stream.states(backend._lanes[lane].cache))
        assert fed == backend.length(lane) >= session.length - 4


def test_a_picture_is_edited_from_the_latents_that_were_sampled(sampler):
    """What stands before a second picture as its reference is u of the first, bit for bit."""
    session = Session(sampler).add("a red circle")
    u = session.draw().picture.u
    previous = session._engine.previous(session._row)
    assert previous is not None and torch.equal(previous, u)


# -- time


def test_a_rewound_session_goes_on_bit_for_bit_as_if_nothing_had_been(sampler, past):
    session, twin = begun(sampler), past.fork()
    mark = session.mark()
    goes_on(session)
    session.rewind(mark)
    assert same(state(session), state(twin)) and told(session) == told(twin)
    assert equal_future(session, twin)


def test_a_session_can_be_rewound_to_one_mark_many_times_and_to_its_very_start(sampler):
    session = Session(sampler, 5)
    start = session.mark()
    ends = []
    for _ in range(2):
        ends.append(goes_on(session))
        session.rewind(start)
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    assert session.length == 0 and not session.pieces and equal_future(session, Session(sampler, 5))


def test_a_mark_between_the_parts_of_one_turn_holds_too(sampler):
    session = Session(sampler).add("a red circle")
    mark = session.mark()
    session.add(photo())
    session.rewind(mark)
    assert equal_future(session, Session(sampler).add("a red circle"))


def test_what_a_fork_does_leaves_the_other_branch_bit_equal_and_both_ways(sampler, past):
    session, twin = begun(sampler), past
    before = state(session)
    fork = session.fork()
    assert same(state(fork), before)
    fork.add("a small black diamond", photo(7)).draw()
    assert same(state(session), before) and told(session) == told(twin)
    kept = state(fork)
    session.add("two red hearts").draw()
    assert same(state(fork), kept) and not same(state(session), kept)


def test_forks_have_the_same_future_if_they_are_told_the_same(past):
    assert equal_future(past.fork(), past.fork())


def test_rewinding_a_fork_leaves_its_origin_alone_and_marks_of_their_common_past_hold_in_both(sampler):
    session = Session(sampler).add("a red circle")
    mark = session.mark()
    session.draw()
    before, fork = state(session), session.fork()
    fork.rewind(mark)
    assert same(state(session), before)
    assert same(state(fork), state(Session(sampler).add("a red circle")))
    session.rewind(mark)
    assert same(state(session), state(fork))


def stale(sampler: Sampler) -> Iterator[tuple[str, Callable[[], None]]]:
    def taken_back(session: Session) -> Any:
        start = session.mark()
        session.add("a red circle")
        late = session.mark()
        session.rewind(start)
        return late

    session = Session(sampler)
    late = taken_back(session)
    yield "taken back", lambda: session.rewind(late)
    longer = Session(sampler)
    other = taken_back(longer)
    longer.add("a small black diamond and two red hearts")
    yield "taken back, and the session is longer again", lambda: longer.rewind(other)
    one, two = Session(sampler).add("a red circle"), Session(sampler).add("a red circle")
    yield "of another session", lambda: one.rewind(two.mark())
    origin = Session(sampler).add("a red circle")
    fork = origin.fork()
    origin.add("a blue star")
    fork.add("a blue star")
    yield "of the other branch behind the fork", lambda: fork.rewind(origin.mark())
    yield "of the fork", lambda: origin.rewind(fork.mark())


def test_stale_marks_and_marks_of_other_sessions_are_refused(sampler):
    for name, rewind in stale(sampler):
        with pytest.raises(StateError, match="mark of another session, or of something that was taken back"):
            rewind()
            pytest.fail(name)


# -- half a reply


def leave(session: Session, after: type[Event]) -> None:  # type: ignore[valid-type]
    for event in session.run(tokens=5):
        if isinstance(event, after):
            break


@pytest.mark.parametrize("after", [Started, Drew, Made, Wrote, Finished], ids=lambda e: e.__name__)
def test_leaving_the_loop_takes_the_whole_reply_back(sampler, past, after):
    session, twin = past.fork(), past.fork()
    tokenizer, end = sampler.components.tokenizer, sampler.components.cfg.vlm.special.end
    ids = [*tokenizer.encode("red"), sampler.layout.begin, *tokenizer.encode("blue"), end]
    with through(session, forced(sampler, ids)):
        session.add("a blue star")
        twin.add("a blue star")
        leave(session, after)
    assert same(state(session), state(twin)) and told(session) == told(twin)
    assert equal_future(session, twin)


@pytest.mark.parametrize(
    ("call", "error"),
    [(1, KeyboardInterrupt()), (2, RuntimeError()), (3, KeyboardInterrupt()), (4, RuntimeError()), (8, RuntimeError())],
    ids=["begin", "the empty prompt", "a latent", "a latent without words", "the last latent that is read"],
)
def test_an_error_in_the_middle_takes_the_whole_reply_back(sampler, call, error):
    failing = Failing(sampler.pretzel, 0, error)
    session, twin = (begun(over(sampler, failing)).add("a blue star") for _ in range(2))
    fork = session.fork()  # which has not read the empty prompt
    failing.left = call
    with pytest.raises(type(error)):
        fork.draw()
    assert same(state(fork), state(twin)) and told(fork) == told(twin)
    assert equal_future(fork, twin)


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_while_something_is_added_takes_all_of_it_back(sampler, call):
    failing = Failing(sampler.pretzel, 0, RuntimeError("out of memory"))
    session, twin = (Session(over(sampler, failing)).add("a red circle") for _ in range(2))
    failing.left = call
    with pytest.raises(RuntimeError):
        session.add("a blue star", photo(), "a red circle", photo(1))
    assert same(state(session), state(twin)) and told(session) == told(twin)
    assert equal_future(session, twin)


def test_a_latent_that_is_not_finite_is_an_error_and_the_session_goes_on():
    sampler = sampler_of(tiny_components(STAGES, side=SIDE))
    session, twin = Session(sampler).add("a blue star"), Session(sampler).add("a blue star")
    backend = session._engine.backend
    assert isinstance(backend, LeanBackend)
    head = backend.weights.deep.head_bias
    kept = head.clone()
    head.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite; try a lower guidance"):
        session.draw()
    head.copy_(kept)
    assert same(state(session), state(twin)) and equal_future(session, twin)


# -- what is refused, before anything is changed


def refused(session: Session, *parts: Any) -> str:
    before, pieces = state(session), told(session)
    with pytest.raises((PromptError, DataError, ShapeError)) as caught:
        session.add(*parts)
    assert same(state(session), before) and told(session) == pieces and session.encode_calls == 0
    return str(caught.value)


def test_an_empty_add_is_refused(sampler):
    assert "nothing to add" in refused(Session(sampler))
    for words in ("", "  ", "..."):
        assert "empty" in refused(Session(sampler), words)


def test_unknown_words_are_refused_before_the_known_ones_beside_them_are_read(sampler):
    assert "'unicorn'" in refused(Session(sampler), "a red circle", "a unicorn")
    assert "'<|end|>'" in refused(Session(sampler), photo(), "a red circle <|end|>")


def test_pictures_that_cannot_be_read_are_refused_before_anything_beside_them_is(sampler, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    assert "a.png" in refused(Session(sampler), "a red circle", photo(), tmp_path / "a.png")
    assert "transparent" in refused(Session(sampler), photo(), Image.new("RGBA", (32, 32)))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, SIZE, SIZE), (1, 3, SIZE, SIZE), (SIZE, SIZE, 3)], ids=str)
def test_tensors_of_another_shape_are_refused_before_the_words_beside_them_are_read(sampler, shape):
    assert str(shape) in refused(Session(sampler), "a red circle", torch.zeros(shape))


def test_a_picture_that_is_not_finite_is_refused(sampler):
    assert "finite" in refused(Session(sampler), "a red circle", photo() * torch.nan)


def test_a_file_a_pil_image_and_a_tensor_are_the_same_picture(sampler, tmp_path):
    picture = Image.effect_noise((40, SIZE), 90).convert("RGB")
    picture.save(tmp_path / "a.png")
    read = read_picture(picture, SIZE)
    states = [state(Session(sampler).add(shown)) for shown in (tmp_path / "a.png", picture, read)]
    assert same(states[0], states[1]) and same(states[1], states[2])


def short(sampler: Sampler, positions: int) -> Sampler:
    """The same model with room for fewer positions."""
    components = tiny_components(STAGES, side=SIDE)
    components.cfg = replace(components.cfg, max_positions=positions)
    return sampler_of(components, guidance=0.0)


def test_a_conversation_longer_than_the_model_reads_is_refused_before_anything_is_changed(sampler):
    words = len(sampler.components.tokenizer.encode("a red circle"))
    tight = short(sampler, words + SLOTS + 6)
    session = Session(tight).add("a red circle")
    message = refused(session, "a red circle", photo())
    assert f"{1 + words} positions" in message and str(words + SLOTS + 6) in message and "rewind" in message
    session.draw()
    before, pieces = state(session), told(session)
    for reply in (session.draw, session.write, lambda: list(session.run())):
        with pytest.raises(PromptError, match="new session"):
            reply()
        assert same(state(session), before) and told(session) == pieces


@pytest.mark.parametrize("left", range(0, 8))
def test_whatever_room_is_left_a_reply_keeps_within_it_or_is_refused(sampler, left):
    words = len(sampler.components.tokenizer.encode("a red circle"))
    session = Session(short(sampler, 5 + words + left)).add("a red circle")
    before = state(session)
    try:
        session.write(tokens=64)
    except PromptError:
        assert same(state(session), before)
    assert session.room >= 0


def test_a_reply_takes_fewer_words_or_no_picture_where_there_is_no_room_for_more(sampler):
    words = len(sampler.components.tokenizer.encode("a red circle"))
    session = Session(short(sampler, words + 12)).add("a red circle")
    assert not any(isinstance(e, Made) for e in session.run(tokens=64, pictures=1))
    assert session.room >= 0


@pytest.mark.parametrize("stages", [STAGES[:4], STAGES[:5]], ids=["t2i", "adapter"])
def test_a_model_whose_streams_were_not_trained_together_holds_no_conversation(stages):
    needed = STAGES[len(stages)]
    with pytest.raises(StateError, match=f"{stages[-1]}; a session needs {needed}"):
        Session(sampler_of(tiny_components(stages, side=SIDE)))


def test_a_sampler_does_not_clean_up_what_its_cache_holds(sampler):
    with pytest.raises(ConfigError, match="cleanup is 'tweedie'"):
        Sampler(sampler.components, DrawConfig(cleanup="tweedie"))


# -- files


def test_a_saved_session_goes_on_bit_for_bit(sampler, tmp_path):
    session = begun(sampler, 6).add("a blue star")
    session.save(tmp_path / "talk.safetensors")
    again = Session.load(tmp_path / "talk.safetensors", sampler)
    assert same(state(again), state(session)) and told(again) == told(session)
    assert (again.seed, again.encode_calls, again.length) == (6, 1, session.length)
    old, new = (s.pieces[-2].picture for s in (session, again))
    assert (old.log_prob, old.unconditional_log_prob, old.noise_level) == (
        new.log_prob,
        new.unconditional_log_prob,
        new.noise_level,
    )
    assert torch.equal(old.x, new.x) and torch.equal(old.image, new.image)
    assert equal_future(again, session)


def test_a_saved_session_keeps_its_guidance_and_prior_scale(sampler, tmp_path):
    config = DrawConfig(
        guidance=0.0, edit_guidance=3.0, prior_scale=0.3, schedule="linear", rule="tarflow", precision="float64"
    )
    session = begun(Sampler(sampler.components, config), 6)
    session.save(tmp_path / "talk")
    again = Session.load(tmp_path / "talk", sampler)
    assert again.sampler.config == replace(config, batch=sampler.config.batch) and sampler.config != config
    assert equal_future(again, session)


def test_a_model_of_the_same_weights_loads_it_too(past, tmp_path):
    session = past.fork()
    session.save(tmp_path / "talk")
    again = Session.load(tmp_path / "talk", sampler_of(tiny_components(STAGES, side=SIDE)))
    assert equal_future(again, session)


def test_a_session_in_which_nothing_has_happened_can_be_saved_and_one_that_was_rewound_to_its_start(sampler, tmp_path):
    session = Session(sampler, 2)
    start = session.mark()
    for _ in range(2):
        session.save(tmp_path / "talk")
        assert equal_future(Session.load(tmp_path / "talk", sampler), Session(sampler, 2))
        session.add("a red circle")
        session.rewind(start)


def test_marks_from_before_the_file_do_not_hold_in_the_loaded_session(sampler, tmp_path):
    session = Session(sampler).add("a red circle")
    mark = session.mark()
    session.save(tmp_path / "talk")
    with pytest.raises(StateError, match="another session"):
        Session.load(tmp_path / "talk", sampler).rewind(mark)


@pytest.fixture
def file(sampler: Sampler, tmp_path: Path) -> Path:
    Session(sampler).add("a red circle").save(tmp_path / "talk")
    return tmp_path / "talk"


def test_a_session_of_another_model_or_precision_is_refused(sampler, file):
    other = sampler_of(tiny_components(STAGES, scale=0.051, side=SIDE))
    single = Sampler(sampler.components, DrawConfig(precision="float32"))
    for wrong in (other, single):
        with pytest.raises(CheckpointError, match="another model or precision"):
            Session.load(file, wrong)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.001, 0.0])
def test_a_truncated_file_is_refused(sampler, file, keep):
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CheckpointError, match="talk is not a whole session file"):
        Session.load(file, sampler)


def test_a_pickle_is_refused_and_never_opened(sampler, tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "talk").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="talk is not a whole session file"):
        Session.load(tmp_path / "talk", sampler)
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_is_not_there_or_is_no_session_is_refused(sampler, tmp_path):
    with pytest.raises(CheckpointError, match="nothing"):
        Session.load(tmp_path / "nothing", sampler)
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="weights is no saved session"):
        Session.load(tmp_path / "weights", sampler)


def test_a_place_that_cannot_be_written_is_an_output_error_and_leaves_the_session_alone(sampler, tmp_path):
    session = Session(sampler).add("a red circle")
    before = state(session)
    (tmp_path / "file").write_text("hello")
    with pytest.raises(OutputError):
        session.save(tmp_path / "file" / "talk")
    assert same(state(session), before)


# -- one row is one session


def test_a_session_is_a_row(sampler):
    """Rows read by hand give the states of a session: the layout of turns is the one of training."""
    s, tokenizer = sampler.components.cfg.vlm.special, sampler.components.tokenizer
    engine = Engine(sampler)
    row = engine.open()
    engine.feed(row, [s.user, *tokenizer.encode("a red circle")])
    session = Session(sampler).add("a red circle")
    mine, theirs = session._engine.states(session._row), engine.states(row)
    assert all((a - b).abs().max() <= 1e-9 for a, b in zip(mine, theirs, strict=True))


def test_while_a_reply_is_being_made_nothing_else_can_happen_to_the_session(sampler, tmp_path):
    session = Session(sampler)
    session.add("a red circle")
    events = session.run()
    next(events)
    save = lambda: session.save(tmp_path / "s")  # noqa: E731
    for forbidden in (lambda: session.add("a star"), session.write, session.fork, session.mark, save):
        with pytest.raises(StateError, match="still being made"):
            forbidden()
    events.close()
    assert [piece.text for piece in session.pieces] == ["a red circle"]
    session.add("a star").write(tokens=1)


def test_without_words_the_model_draws_or_ends_as_it_finds_likelier(sampler):
    session = begun(sampler, 3).add("a blue star")
    layout, end = sampler.layout, sampler.components.cfg.vlm.special.end
    probe = session.fork()
    probe._open()
    probe._engine.feed(probe._row, probe._tokenizer.opens_reply())
    h, g = probe._engine.states(probe._row)
    scores = sampler.pretzel.logits(h[None], g[None])[0]
    lead = float((scores[layout.begin] - scores[end]).detach())

    def by(shift: float) -> Any:
        def favours(logits: Any) -> Any:
            logits = logits.clone()
            logits[:, layout.begin] += shift - lead
            return logits

        return favours

    for shift, draws in ((1.0, True), (-1.0, False)):
        twin = session.fork()
        twin.sampler = twin._engine.sampler = adjusted(sampler, by(shift))
        events = list(twin.run(tokens=0))
        assert any(isinstance(event, Made) for event in events) is draws
        assert isinstance(events[-1], Finished)


def test_room_for_a_picture_alone_leaves_a_word_where_words_are_asked_for(sampler):
    session = Session(sampler).add("a red circle")
    per_picture = sampler.layout.num_latents + 2
    kept: list[tuple[int, int]] = []

    def begin(row: int, limits: ReplyLimits, seed: int, *, draws: bool = False, decodes: bool = True) -> None:
        kept.append((limits.tokens, limits.pictures))

    session._engine.begin = begin  # type: ignore[method-assign,assignment]
    room = session._overhead + per_picture
    cfg = sampler.components.cfg
    for tokens in (64, 0):
        twin = copy.copy(session)
        twin.sampler = copy.copy(sampler)
        twin.sampler.components = copy.copy(sampler.components)
        twin.sampler.components.cfg = replace(cfg, max_positions=session.length + room)
        list(twin.run(tokens=tokens))
    assert kept == [(per_picture, 0), (0, 1)]
