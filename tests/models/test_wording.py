"""Other spellings and synonyms become words of the model; what is left unknown gets a hint of its own class."""

from types import SimpleNamespace

import pytest

from starflow2.errors import PromptError
from starflow2.models.prompts import check_words, normalized
from starflow2.models.wording import contradiction, hint, respelled
from starflow2.pipeline import StarFlow2


@pytest.fixture(scope="module")
def nano():
    return StarFlow2.from_pretrained("nano").components


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("2 red hearts", "two red hearts"),
        ('"two red hearts"', "two red hearts"),
        ("two (red) hearts", "two red hearts"),
        ("Two red-hearts !", "two red hearts!"),
        ("draw me a big grey star", "draw a large gray star"),
        ("what colour is the little circle ?", "what color is the small circle?"),
        ("what’s in the picture?", "what is in the picture?"),
        ("a star in the top-left", "a star in the upper left"),
        ("add another green dot.", "add a green circle."),
        ("a red coloured star", "a red star"),
        ("a red circle plus a blue square", "a red circle and a blue square"),
        ("a red circle plus blue square", "a red circle and blue square"),
        ("a big red plus, left of 1 ring", "a large red cross, left of one ring"),
        ("a star as well as a heart", "a star and a heart"),
        ("Could you please draw two hearts?", "please draw two hearts?"),
        ("i'd like to see a black star in the upper left corner", "show a black star in the upper left"),
        ("I want you to also create a picture of a star", "please make a picture of a star"),
        ("replace the red circle with a blue star.", "turn the red circle into a blue star."),
        ("get rid of the ring then recolor the star red", "remove the ring paint the star red"),
    ],
)
def test_everyday_wording_is_read_in_words_that_nano_knows(nano, text, read):
    assert normalized(nano, text) == read
    check_words(nano, text)


def test_a_known_text_is_read_as_it_is(nano):
    for text in ("a red circle left of a blue square", "is there a star? please answer yes or no.", "two red hearts"):
        assert normalized(nano, text) == text


def test_a_known_word_is_never_replaced():
    assert respelled("a big ball", {"a", "big", "ball", "large", "circle"}) == "a big ball"
    assert respelled("a big ball", {"a", "big", "circle"}) == "a big circle"
    known = {"could", "you", "swap", "a", "star", "for", "plus", "turn", "into", "please", "and", "two"}
    assert respelled("could you swap a star for two plus a star", known) == "could you swap a star for two plus a star"


def test_a_phrase_stays_where_its_meaning_is_not_known_either():
    assert respelled("swap a star for a ring", {"a", "star", "ring"}) == "swap a star for a ring"


def test_a_model_without_a_fixed_vocabulary_reads_the_text_unchanged():
    qwen = SimpleNamespace(vocabulary=frozenset())
    assert normalized(qwen, 'Draw me "2" (big) Hearts') == 'Draw me "2" (big) Hearts'


@pytest.mark.parametrize(
    ("word", "known", "misleading"),
    [("violet", "purple", "let"), ("hexagon", "diamond", "exactly"), ("ten", "three", "the"), ("99", "two", "first")],
)
def test_an_unknown_word_is_answered_with_words_of_its_class(nano, word, known, misleading):
    said = hint(word, nano.vocabulary)
    assert known in said and f"{misleading}," not in said and f'"{misleading}"' not in said


def test_a_misspelling_is_answered_with_the_word_it_resembles(nano):
    assert hint("cirlce", nano.vocabulary) == ' Did you mean "circle"?'
    assert hint("dos", nano.vocabulary) == "" and hint("elephant", nano.vocabulary) == ""


def test_signs_that_do_not_print_are_shown_by_their_code(nano):
    with pytest.raises(PromptError, match=r"heart\\u015b"):  # composed to one sign
        check_words(nano, "two hearts\u0301")


@pytest.mark.parametrize("text", ["", "   ", "me", '""', "()", "?!"])
def test_a_text_without_words_is_empty(nano, text):
    with pytest.raises(PromptError, match="empty"):
        check_words(nano, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red blue circle", "red blue circle"),
        ("a star and two big tiny green hearts", "large small hearts"),
        ("show two three crosses", "two three crosses"),
        ("make the circle a yellow small green square", "yellow green square"),
        ("is there a Red-Blue star?", "red blue star"),
    ],
)
def test_two_things_that_one_object_cannot_be_are_refused(nano, text, words):
    with pytest.raises(PromptError, match=f"'{words}' says two things of one object"):
        check_words(nano, text)


@pytest.mark.parametrize(
    "text",
    [
        "a red red circle",
        "is the red, blue or green circle larger?",
        "a star that is purple as well as a circle in yellow, gray background",
        "a red circle and a blue square",
        "two circles, three stars",
        "turn the red star blue",
    ],
)
def test_words_about_several_objects_exclude_nothing(nano, text):
    assert contradiction(text) == ""
    check_words(nano, text)
