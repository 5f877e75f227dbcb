"""Rows of an engine: each is what it would be alone, whatever joins, leaves, fails or is cancelled beside it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine_cases import asked, begun, fed, steered, told
from model_cases import STAGES, tiny_components
from starflow2.errors import ConfigError, DataError, PromptError, StateError
from starflow2.inference.backend import NewImage
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.engine import Engine, _Reply
from starflow2.inference.events import Begun, Completed, DecodedImage, Ended, Failed, Sampled, Stepped, Token
from starflow2.inference.lean import LeanBackend
from starflow2.inference.sampler import Sampler
from starflow2.inference.streams import StreamBackend
from starflow2.models.joint_stream import read_documents
from starflow2.models.sequence import Image, Segment, Text, pack

SIDE, COUNT = 3, 9
PRECISIONS = ("float32", "float64")
DRAW = ReplyLimits(tokens=0, pictures=1)


def a_sampler(guidance: float = 1.0, precision: str = "float64", prior_scale: float = 0.7) -> Sampler:
    config = DrawConfig(guidance=guidance, prior_scale=prior_scale, precision=precision)  # type: ignore[arg-type]
    return Sampler(tiny_components(STAGES, side=SIDE), config)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return a_sampler()


def drawn(engine: Engine, row: int, seed: int, config: DrawConfig | None = None) -> DecodedImage:
    engine.begin(row, DRAW, seed, config, draws=True)
    return next(event.picture for event in list(engine.run()) if isinstance(event, Completed))


# -- against one pass over everything


def six_segments(engine: Engine, row: int) -> tuple[list[Segment], list[DecodedImage], Tensor]:
    """Words, an upload, words and drawn images in turn in one row: the document, the images and the upload."""
    x = torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(9))
    end = engine.sampler.components.cfg.vlm.special.end
    document: list[Segment] = []
    engine.feed(row, [1, 30, 31])
    engine.see(row, x, 0.2)
    document += [Text((1, 30, 31)), Image()]
    pictures = []
    for seed, words in ((5, (40, 41, 2)), (6, (1, 50, 2))):
        engine.feed(row, words)
        pictures.append(drawn(engine, row, seed))
        document += [Text(words), Image(is_target=True), Text((end,))]
    engine.feed(row, [33])
    return [*document, Text((33,))], pictures, x


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("reads_alone", [False, True], ids=["lean", "streams"])
def test_a_conversation_step_by_step_is_what_one_full_pass_makes_of_it(precision, guidance, reads_alone):
    sampler = a_sampler(guidance, precision)
    engine = Engine(sampler, StreamBackend(sampler.pretzel, sampler.dtype) if reads_alone else None)
    assert isinstance(engine.backend, StreamBackend if reads_alone else LeanBackend)
    row = engine.open()
    document, pictures, x = six_segments(engine, row)
    latents = torch.stack([x.to(sampler.dtype), *(p.x for p in pictures)])
    levels = torch.tensor([0.2, 0.5, 0.5], dtype=sampler.dtype)
    batch = pack([document], sampler.layout)
    with torch.no_grad():
        full = read_documents(sampler.pretzel, batch, latents, levels)
    assert engine.length(row) == batch.ids.shape[1]
    for picture, affine, u in zip(pictures, full.affine.log_prob(full.u)[1:], full.u[1:], strict=True):
        assert (picture.u - u).abs().max() <= 1e-4
        assert picture.log_prob == pytest.approx(float(affine.sum()), abs=1e-3)
        assert (picture.unconditional_log_prob is None) == (guidance == 0)
    label = Text((33, 34), is_target=True)
    with torch.no_grad():
        whole = read_documents(sampler.pretzel, pack([[*document[:-1], label]], sampler.layout), latents, levels)
    h, g = engine.states(row)
    assert (h - whole.h[-1]).abs().max() <= 1e-4 and (g - whole.g[-1]).abs().max() <= 1e-4


def test_the_unconditional_branch_is_that_of_an_image_alone_whatever_came_before():
    """Guidance of an edit compares with no prompt and no previous image: its branch is that of a first image."""
    sampler = a_sampler(guidance=1e-9)  # measures both branches and follows the conditional one
    engine = Engine(sampler)
    row = fed(engine, [1, 30, 2])
    engine.see(row, torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(9)), 0.2)
    engine.feed(row, [1, 31, 2])
    picture = drawn(engine, row, 5)
    document = [Text(tuple(sampler.components.tokenizer.drawing_prompt("")[:-1])), Image(is_target=True)]
    level = torch.tensor([sampler.noise_level], dtype=sampler.dtype)
    with torch.no_grad():
        alone = read_documents(sampler.pretzel, pack([document], sampler.layout), picture.x[None], level)
    expected = float(alone.affine.log_prob(alone.u).sum())
    assert picture.unconditional_log_prob == pytest.approx(expected, abs=1e-3)
    assert abs(picture.unconditional_log_prob - picture.log_prob) > 1e-2


# -- policy: temperature, prior scale


def chosen(temperature: float, count: int = 4000) -> Tensor:
    """How often each of four tokens is chosen from logits 0, 1, 2, 3 by seeds that count on: (4,) shares."""
    engine = Engine(a_sampler())
    row, found = engine.open(), torch.zeros(4)
    for seed in range(count):
        scores = torch.full((engine.sampler.components.cfg.vlm.vocab,), -torch.inf)
        scores[100:104] = torch.arange(4.0)
        limits, generator = ReplyLimits(temperature=temperature), torch.Generator().manual_seed(seed)
        reply = _Reply(seed, generator, limits, engine.sampler.config, engine.mark(row))
        found[engine._choose(row, scores, reply) - 100] += 1
    return found / count


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_chosen_with_the_probabilities_of_their_logits_over_the_temperature(temperature):
    expected = (torch.arange(4.0) / temperature).softmax(0)
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((chosen(temperature) - expected).abs() <= 5 * deviation).all())


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_images_start_from_the_prior_times_the_scale_of_their_row(sampler, scale):
    class Noting(StreamBackend):
        def start(self, lane: int, image: NewImage) -> None:
            starts.append(image.z)
            super().start(lane, image)

    starts: list[Tensor] = []
    engine = Engine(sampler, Noting(sampler.pretzel, sampler.dtype))
    drawn(engine, fed(engine, [1, 30, 2]), 5, DrawConfig(guidance=0.0, prior_scale=scale, precision="float64"))
    z = torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(starts[0], scale * z)


# -- rows beside rows


def assert_same(mine: Sequence[object], theirs: Sequence[object]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, DecodedImage):
            assert isinstance(b, DecodedImage)
            assert (a.u - b.u).abs().max() <= 1e-5 and (a.image - b.image).abs().max() <= 1e-5
            assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)
            assert a.unconditional_log_prob == pytest.approx(b.unconditional_log_prob, abs=1e-4)
        else:
            assert a == b


@pytest.fixture(scope="module")
def alone(sampler) -> list[list[object]]:
    """Events of each of eight rows in an engine of its own, by the plain backend."""
    found, many = [], steered(sampler)
    for number in range(8):
        engine = Engine(many, StreamBackend(sampler.pretzel, sampler.dtype))
        row = begun(engine, asked(number))
        found.append(told(list(engine.run()), row))
    kinds = {type(event) for events in found for event in events}
    assert {int, DecodedImage} <= kinds, "some rows are to draw and some to write"
    return found


def test_rows_in_different_modalities_and_settings_equal_the_same_rows_alone(sampler, alone):
    engine = Engine(steered(sampler))
    rows = [begun(engine, asked(number)) for number in range(8)]
    events = list(engine.run())
    for row, expected in zip(rows, alone, strict=True):
        assert_same(told(events, row), expected)
    assert {type(event) for event in events} == {Token, Begun, Stepped, Completed, Ended}


def test_images_that_get_their_pixels_later_are_those_that_get_them_at_once(sampler):
    engine = Engine(sampler)
    rows = [fed(engine, [1, 30, 2]), fed(engine, [1, 30, 2]), fed(engine, [1, 31, 2])]
    for row, decodes in zip(rows, (True, False, False), strict=True):
        engine.begin(row, DRAW, 4, draws=True, decodes=decodes)
    events = list(engine.run())
    assert sum(isinstance(event, Completed) for event in events) == 1
    assert [event.row for event in events if isinstance(event, Sampled)] == rows[1:]
    whole = engine.with_pixels(events)
    assert [type(a) for a, b in zip(events, whole, strict=True) if type(a) is type(b)].count(Sampled) == 0
    pictures = {event.row: event.picture for event in whole if isinstance(event, Completed)}
    assert_same([pictures[rows[1]]], [pictures[rows[0]]])
    assert_same([pictures[rows[0]]], [again(sampler)])
    assert (pictures[rows[2]].u - pictures[rows[0]].u).abs().max() > 1e-3


def test_rows_that_are_read_together_are_as_if_each_had_been_read_alone(sampler):
    engine, words = Engine(sampler), ([1, 30, 2], [1, 31], [1, 30, 31, 32, 2], [])
    together, alone = ([fed(engine, ids) for ids in words] for _ in range(2))
    engine.read(together)
    for row in alone:
        engine.read([row])
    for one, other in zip(together, alone, strict=True):
        assert engine.length(one) == engine.length(other) == engine.backend.length(engine._rows[one].lane)
        for mine, theirs in zip(engine.states(one), engine.states(other), strict=True):
            assert (mine - theirs).abs().max() <= 1e-5


def test_a_fork_has_the_past_of_its_row_and_a_future_of_its_own(sampler):
    engine = Engine(sampler)
    row = fed(engine, [1, 30, 2])
    twin = engine.fork(row)
    engine.begin(row, ReplyLimits(tokens=3, pictures=0), 0)
    list(engine.run())
    assert engine.length(twin) == 3
    assert_same([drawn(engine, twin, 4)], [again(sampler)])


def test_memory_depends_on_who_is_there_and_not_on_what_was_done(sampler):
    engine, sizes = Engine(steered(sampler)), []
    for turn in range(6):
        rows = [begun(engine, asked(number)) for number in range(4)]
        list(engine.run())
        for row in rows:
            engine.release(row)
        sizes.append(engine.backend.nbytes)
        assert not engine._rows, turn
    assert sizes[1:] == sizes[1:2] * 5


# -- bad rows


def test_a_row_that_is_not_finite_fails_alone_and_is_as_it_was_before(sampler, alone):
    engine = Engine(steered(sampler))
    rows = [begun(engine, asked(number)) for number in range(3)]
    bad = fed(engine, [1, 30, 2])
    before = engine.mark(bad)
    engine.begin(bad, DRAW, 0, draws=True)
    events = engine.step()
    assert isinstance(engine.backend, LeanBackend)
    lanes = engine.backend.lanes
    lanes.z[lanes.slot_of[engine._rows[bad].lane]] = torch.nan
    events += engine.run()
    for row, expected in zip(rows, alone, strict=False):
        assert_same(told(events, row), expected)
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.row == bad and isinstance(failed.error, DataError)
    assert "seed 0 are not finite; try a lower guidance" in str(failed.error)
    after = engine.mark(bad)
    assert (after.lane.length, after.pending, after.cursor) == (before.lane.length, before.pending, before.cursor)
    assert_same([drawn(engine, bad, 4)], [again(sampler)])


def again(sampler: Sampler) -> DecodedImage:
    engine = Engine(sampler)
    return drawn(engine, fed(engine, [1, 30, 2]), 4)


def test_a_cancelled_row_is_as_before_and_its_neighbour_goes_on(sampler):
    engine = Engine(sampler)
    row, other = fed(engine, [1, 30, 2]), fed(engine, [1, 31, 2])
    for number in (row, other):
        engine.begin(number, DRAW, 4, draws=True)
    engine.step()
    engine.cancel(row)
    engine.cancel(row)  # nothing to take back
    events = list(engine.run())
    assert {event.row for event in events} == {other}
    assert_same([drawn(engine, row, 4)], [again(sampler)])


def test_a_row_that_does_not_fit_the_budget_is_refused_and_others_are_not(sampler):
    engine = Engine(sampler)
    row = fed(engine, [1, 30, 2])
    engine.budget = 10 * engine.backend.bytes_for(3, 64)
    drawn(engine, row, 4)
    engine.budget = engine.backend.nbytes
    late = engine.open()
    engine.feed(late, [1, 30] * 100)
    with pytest.raises(StateError, match=r"row 1 needs room for \d+ positions, \d+ bytes .* release rows"):
        engine.begin(late, DRAW, 0, draws=True)
    engine.release(late)
    engine.feed(row, [1, 30, 2])
    engine.begin(row, ReplyLimits(tokens=2, pictures=0), 0)
    assert isinstance(list(engine.run())[-1], Ended)


def test_a_row_whose_unconditional_branch_no_longer_fits_the_budget_fails_alone(sampler):
    """Both rows were let in while the branches of neither were open."""
    engine = Engine(sampler)
    rows = [fed(engine, [1, 30, 2]) for _ in range(2)]
    before = engine.mark(rows[1])
    engine.budget = engine.backend.bytes_for(2, 64)  # for two lanes more than rows; both images need three
    for row in rows:
        engine.begin(row, DRAW, 4, draws=True)
    events = list(engine.run())
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.row == rows[1] and isinstance(failed.error, StateError) and "the budget is" in str(failed.error)
    assert engine.backend.nbytes <= engine.budget
    after = engine.mark(rows[1])
    assert (after.lane.length, after.pending, after.cursor) == (before.lane.length, before.pending, before.cursor)
    assert_same([event.picture for event in events if isinstance(event, Completed)], [again(sampler)])


def test_what_cannot_be_done_is_refused_by_name(sampler):
    engine = Engine(sampler)
    row = engine.open()
    with pytest.raises(StateError, match="row is 7; expected one that is open"):
        engine.feed(7, [1])
    with pytest.raises(PromptError, match="has 0 positions and this needs 5000 more"):
        engine.feed(row, [1] * 5000)
    with pytest.raises(ConfigError, match="pictures is 0"):
        engine.begin(row, ReplyLimits(pictures=0), 0, draws=True)
    with pytest.raises(ConfigError, match="precision is 'float32'"):
        engine.begin(row, DRAW, 0, DrawConfig(precision="float32"))
    engine.feed(row, [1, 30, 2])
    engine.begin(row, DRAW, 0, draws=True)
    with pytest.raises(StateError, match="row 0 is still replying"):
        engine.feed(row, [1])


def test_two_threads_on_one_engine_get_a_clear_error(sampler):
    engine, errors = Engine(sampler), list[Exception]()

    def late() -> None:
        try:
            engine.open()
        except StateError as error:
            errors.append(error)

    with engine.in_use.claimed():
        thread = threading.Thread(target=late)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "in use by another thread" in str(errors[0])
    assert engine.open() == 0
