"""Self-check: the image that the model's own answer confirms is kept, and nothing else about a conversation changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model_cases import STAGES, tiny_components
from starflow2.errors import ConfigError, StateError
from starflow2.inference.check_questions import Question
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.conversations import generate_replies
from starflow2.inference.engine import Engine
from starflow2.inference.events import Drew, Made
from starflow2.inference.sampler import Sampler
from starflow2.inference.self_check import (
    MAX_TRIES,
    Request,
    attempts,
    best,
    check_of,
    checked_tries,
    confidence,
    confidences,
    has_room,
    seed_of,
)
from starflow2.inference.session import Session
from starflow2.models.config import SelfCheckConfig
from starflow2.pipeline import MAX_IMAGES

QUESTIONS = SelfCheckConfig(shows="is there {}?", done="is {} there now?", tries=3)
DRAW = ReplyLimits(tokens=0, pictures=1)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    components = tiny_components(STAGES, side=3)
    components.cfg = replace(components.cfg, self_check=QUESTIONS)
    return Sampler(components, DrawConfig(guidance=1.0, prior_scale=0.7))


def answering(sampler: Sampler) -> tuple[Sampler, list[float]]:
    """A sampler whose answers to the questions of a test are yes more and more, and the list of their confidences."""
    encode = sampler.components.tokenizer.encode
    yes, no = encode("yes")[0], encode("no")[0]
    twin, told = copy.copy(sampler), [0.2, 0.9, 0.4, 0.1, 0.3, 0.8]
    left = iter(told)

    def change(logits: Tensor) -> Tensor:
        logits[:, no], logits[:, yes] = 0.0, torch.tensor(next(left)).logit()
        return logits

    twin.adjust_logits = change
    return twin, told


def test_a_question_in_the_own_cache_leaves_the_row_as_it_was(sampler):
    engine = Engine(sampler)
    row = engine.open()
    engine.feed(row, [1, 30, 31, 2])
    engine.begin(row, DRAW, 0, draws=True)
    list(engine.run())
    before, length = engine.next_logits(row), engine.length(row)
    sure = confidence(engine, row, (Question("is there a star?"),))
    assert 0 < sure < 1 and engine.length(row) == length
    assert torch.equal(engine.next_logits(row), before)
    assert confidence(engine, row, (Question("is there a star?"),)) == pytest.approx(sure, abs=1e-6)


def test_confidence_is_that_of_yes_among_yes_and_no(sampler):
    """A row that reads the question for good has the logits from which the confidence follows."""
    engine, tokenizer = Engine(sampler), sampler.components.tokenizer
    row, twin = engine.open(), engine.open()
    for one in (row, twin):
        engine.feed(one, [1, 30, 31, 2])
    engine.feed(
        twin, [*tokenizer.opens_user(is_first=False), *tokenizer.encode("is there a star?"), *tokenizer.opens_reply()]
    )
    logits = engine.next_logits(twin)
    yes, no = (logits[tokenizer.encode(word)[0]] for word in ("yes", "no"))
    assert confidence(engine, row, (Question("is there a star?"),)) == pytest.approx(
        float((yes - no).sigmoid()), abs=1e-5
    )


def test_questions_that_are_read_together_are_answered_as_each_alone(sampler):
    engine, star = Engine(sampler), Question("is there a star?")
    questions = [(star,), (Question("is there a ring there now?"), Question("how many?", "two", ("one",))), (star,)]
    rows = [engine.open() for _ in questions]
    for row, word in zip(rows, (30, 31, 32), strict=True):
        engine.feed(row, [1, word, 2])
    before = [engine.length(row) for row in rows]
    found = confidences(engine, rows, questions)
    assert [engine.length(row) for row in rows] == before
    alone = [confidence(engine, row, question) for row, question in zip(rows, questions, strict=True)]
    assert found == pytest.approx(alone, abs=1e-6) and len(set(found)) == 3


def test_there_is_room_for_a_question_as_long_as_the_model_can_read_it(sampler):
    engine = Engine(sampler)
    row, most = engine.open(), sampler.components.cfg.max_positions
    engine.feed(row, [1, 30, 2])
    assert has_room(engine, row, (Question("is there a star?"),))
    engine.feed(row, [30] * (most - 4))
    assert engine.length(row) == most - 1 and not has_room(engine, row, (Question("is there a star?"),))


def test_every_try_is_the_plain_sample_of_its_seed(sampler):
    requests = [Request(["a star"], "a star"), Request([torch.zeros(3, 24, 24), "a ring"], "a ring")]
    tried = attempts(sampler, requests, [5, 6], 2)
    seeds = [[5, seed_of(5, 1)], [6, seed_of(6, 1)]]
    assert [[attempt.seed for attempt in row] for row in tried] == seeds
    for request, row in zip(requests, tried, strict=True):
        plain = generate_replies(sampler, [[request.parts]] * 2, [a.seed for a in row], DRAW, draws=True)
        for attempt, ((picture,),) in zip(row, plain, strict=True):
            torch.testing.assert_close(attempt.picture.u, picture.u, rtol=1e-4, atol=1e-4)


def test_no_two_tries_start_from_the_same_noise():
    seeds = [seed_of(seed, number) for seed in (0, 1, MAX_IMAGES) for number in (0, 1, 2, MAX_TRIES - 1)]
    drawn = {tuple(torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in seeds}
    assert len(drawn) == len(seeds)


def test_tries_of_one_request_are_different_images(sampler):
    ((first, second),) = attempts(sampler, [Request(["a star"], "a star")], [5], 2)
    assert (first.picture.image - second.picture.image).abs().max() > 1e-3


def test_the_attempt_that_the_model_confirms_is_the_best(sampler):
    twin, told = answering(sampler)
    (tried,) = attempts(twin, [Request(["a star"], "a star")], [0], 3)
    assert [attempt.confidence for attempt in tried] == pytest.approx(told[:3])
    assert best(tried) is tried[1] and best(tried).is_confirmed and not tried[2].is_confirmed


def test_a_session_goes_on_with_the_confirmed_image(sampler):
    twin, told = answering(sampler)
    session = Session(twin, seed=7).add("a star")
    before = session.mark()
    made = session.draw(tries=3)
    assert made.confidence == pytest.approx(told[1]) and made.seed == seed_of(7, 1)
    alone = Session(sampler, seed=seed_of(7, 1)).add("a star").draw(tries=1)
    torch.testing.assert_close(made.picture.u, alone.picture.u, rtol=1e-4, atol=1e-4)
    assert [piece.picture is None for piece in session.pieces] == [False, True][::-1]
    assert session.encode_calls == 0
    session.rewind(before)  # a mark from before the choice
    assert len(session.pieces) == 1
    plain = session.draw(tries=1)
    assert plain.confidence is None
    torch.testing.assert_close(
        plain.picture.u, Session(sampler, seed=7).add("a star").draw(tries=1).picture.u, rtol=1e-4, atol=1e-4
    )


def test_a_session_with_a_choice_costs_the_memory_of_one(sampler):
    twin, _ = answering(sampler)
    session = Session(twin).add("a star")
    session.draw(tries=3)
    alone = Session(sampler).add("a star")
    alone.draw(tries=1)
    assert session.length == alone.length
    assert session._engine.is_busy is False and len(session._engine._rows) == 1


def test_an_image_after_another_is_asked_about_as_an_edit(sampler):
    assert check_of(sampler.components.cfg, "a star.", follows=False) == (Question("is there a star?"),)
    assert check_of(sampler.components.cfg, "make it red!", follows=True) == (Question("is make it red there now?"),)
    session = Session(sampler).add("a star")
    assert session._choice(None) == (3, (Question("is there a star?"),))
    session.draw(tries=1)
    assert session.add("a ring")._choice(2) == (2, (Question("is a ring there now?"),))


def test_leaving_in_the_middle_takes_every_try_back(sampler):
    session = Session(sampler).add("a star")
    length = session.length
    for event in session._reply(DRAW, draws=True, tries=3):
        if isinstance(event, Drew):
            break
    assert session.length == length and len(session._engine._rows) == 1
    assert isinstance(session.draw(tries=2), Made)


def test_leaving_after_the_choice_takes_the_chosen_try_back_as_well(sampler):
    twin, _ = answering(sampler)
    session = Session(twin).add("a star")
    length = session.length
    for event in session._reply(DRAW, draws=True, tries=3):
        if isinstance(event, Made):
            break
    assert session.length == length and len(session.pieces) == 1 and len(session._engine._rows) == 1
    assert isinstance(session.draw(tries=1), Made)


@pytest.mark.parametrize("tries", [0, -1, 1.5, "two", 2**20, True])
def test_a_number_of_tries_that_is_none_is_refused(sampler, tries):
    with pytest.raises(ConfigError, match="tries"):
        Session(sampler).add("a star").draw(tries=tries)


def test_a_model_that_cannot_check_itself_draws_once_and_refuses_more():
    sampler = Sampler(tiny_components(STAGES, side=3))
    assert checked_tries(sampler.components.cfg, None) == 1
    with pytest.raises(StateError, match=r"has not learnt to check its images; use tries=1"):
        Session(sampler).add("a star").draw(tries=2)


@pytest.mark.parametrize("form", ["is it there?", "{} and {}?"])
def test_a_question_has_one_place_for_the_words(form):
    with pytest.raises(ConfigError, match=r"expected a question with one \{\} for the words"):
        SelfCheckConfig(shows=form, done="{}?")


def test_the_seed_of_the_last_try_is_a_seed():
    with pytest.raises(ConfigError, match="the seed of the last try"):
        seed_of(2**63 - 1, 1)
