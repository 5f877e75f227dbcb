"""Requests that no image can fulfil or no question can check are answered in words, and leave everything as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model_cases import STAGES, tiny_components
from starflow2.core.memory import free_bytes
from starflow2.errors import ConfigError, PromptError, StateError
from starflow2.inference.self_check import MAX_TRIES, check_memory, check_of
from starflow2.models.config import SelfCheckConfig
from starflow2.pipeline import StarFlow2

ASKED = SelfCheckConfig(shows="is there {}?", done="is {} there now?", tries=2)
IMAGE = torch.zeros(3, 24, 24)


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    components = tiny_components(STAGES, side=3)
    components.cfg = replace(components.cfg, self_check=ASKED)
    return StarFlow2(components)


@pytest.mark.parametrize("tries", [0, -3, 2.5, MAX_TRIES + 1, 10**12])
def test_a_number_of_tries_that_is_none_is_refused_at_every_door(model, tries):
    calls = (
        lambda: model.generate("a red star", tries=tries),
        lambda: model.edit(IMAGE, "make it blue", tries=tries),
        lambda: model.tried([["a red star"]], [0], tries),
        lambda: model.tell_confirmed([["a red star"]], [0], tries),
        lambda: model.session().add("a red star").draw(tries=tries),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="tries"):
            call()


def test_more_tries_than_memory_holds_are_refused_before_anything_is_drawn(model, monkeypatch):
    session = model.session().add("a red star")
    before = session.length
    monkeypatch.setattr("starflow2.inference.session.free_bytes", lambda device: 10_000_000)
    with pytest.raises(StateError, match=r"tries=1024 needs .* expected at most \d+"):
        session.draw(tries=1024)
    assert session.length == before and len(session.pieces) == 1
    assert session.draw(tries=2).confidence is not None


def test_memory_that_the_system_does_not_tell_refuses_nothing():
    check_memory(10**15, None, 4)
    assert free_bytes(torch.device("meta")) is None
    assert (free_bytes(torch.device("cpu")) or 1) > 0


@pytest.mark.parametrize("text", ["", "  ", "...", "?!"])
def test_an_empty_request_is_refused_whether_it_draws_or_edits(model, text):
    for call in (lambda: model.generate(text), lambda: model.edit(IMAGE, text), lambda: model.ask(IMAGE, text)):
        with pytest.raises(PromptError, match="the prompt is empty"):
            call()
    with pytest.raises(PromptError, match="no words to check an image against"):
        check_of(model.components.cfg, text, follows=False)


def test_an_image_without_words_is_answered_once_and_several_tries_of_it_are_refused(model):
    session = model.session().add(IMAGE)
    length = session.length
    with pytest.raises(PromptError, match="no words to check an image against"):
        session.draw(tries=3)
    assert session.length == length
    assert session.draw().confidence is None, "the model's own number is 1 where there is nothing to ask about"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("ein roter Kreis", "roter"),
        ("a red Kreis", "kreis"),
        ("un cercle rouge", "cercle"),
        ("a красный star", "u0440"),
    ],
)
def test_other_languages_are_refused_by_the_word_even_beside_english(model, text, word):
    for call in (lambda: model.generate(text), lambda: model.edit(IMAGE, text), lambda: model.session().add(text)):
        with pytest.raises(PromptError, match=f"never learnt .*{word}"):
            call()
