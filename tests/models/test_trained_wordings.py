"""Sentences outside the trained forms are found, and those of training, in any seed, are left alone."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from wordings import EXAMPLES, TASKS, collect

from starflow2.models.checkpoint import load_words
from starflow2.models.hub import NANO
from starflow2.models.trained_wordings import nearest_trained, pairs_of, wordings
from starflow2.world.newcomers import FIRST_PROMPTS


@pytest.fixture(scope="module")
def nano():
    return load_words(NANO)


@pytest.mark.parametrize("task", list(TASKS))
def test_of_unseen_training_sentences_fewer_than_three_in_a_hundred_are_noted(task):
    noted = [text for text in islice(TASKS[task](77), 200) if wordings()[task].nearest(text)]
    assert len(noted) < 6, noted


def test_of_a_newcomers_first_prompts_only_the_one_that_no_caption_has_is_noted(nano):
    assert [p.text for p in FIRST_PROMPTS if nearest_trained(nano, p.text, "draw")] == ["red heart"]  # no article


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("draw", "red is the circle"),
        ("draw", "no circles"),
        ("draw", "is there a star?"),
        ("edit", "two pink hearts"),
        ("edit", "is there a star?"),
        ("ask", "star color"),
        ("ask", "red is the circle"),
    ],
)
def test_a_sentence_outside_the_forms_of_its_task_is_answered_with_one_inside(nano, task, text):
    example = nearest_trained(nano, text, task)
    assert example and nearest_trained(nano, example, task) == ""


def test_a_sentence_of_another_task_is_not_noted_there(nano):
    assert nearest_trained(nano, "two pink hearts", "draw") == ""
    assert nearest_trained(nano, "make the big star blue", "edit") == ""
    assert nearest_trained(nano, "what colour is the star?", "ask") == ""


def test_words_of_an_album_and_models_that_read_any_text_are_left_alone(nano):
    assert nearest_trained(nano, "a zebra the of", "draw") == ""
    reads_any: Any = SimpleNamespace(vocabulary=frozenset())
    assert nearest_trained(reads_any, "circle red the", "draw") == ""


def test_the_file_is_what_the_script_collects():
    of = collect(TASKS["draw"](0), 300)
    assert of.pairs <= wordings()["draw"].pairs and set(of.examples) & set(wordings()["draw"].examples)
    assert all(len(found.examples) == EXAMPLES for found in wordings().values())


def test_pairs_do_not_depend_on_which_colour_or_number_is_named():
    assert pairs_of("two red stars") == pairs_of("Three blue hearts.") != pairs_of("red two stars")
