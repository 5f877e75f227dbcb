"""Questions about the objects that a request names, for a model that is asked about them one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model_cases import STAGES, tiny_components
from starflow2.errors import ConfigError, PromptError
from starflow2.evals.newcomers import is_right
from starflow2.inference.check_questions import HOW_MANY, Named, questions_about, things_in
from starflow2.inference.engine import Engine
from starflow2.inference.self_check import UNSURE, Request, attempts, check_of, choice_of, confidences
from starflow2.models.config import SelfCheckConfig
from starflow2.models.wording import respelled
from starflow2.pipeline import StarFlow2
from starflow2.world.content import Group
from starflow2.world.detector import detect
from starflow2.world.newcomers import FIRST_PROMPTS
from starflow2.world.scene import COLORS, SHAPES, SIZES
from starflow2.world.words import PLURALS


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    components = tiny_components(STAGES, side=3)
    components.cfg = replace(components.cfg, self_check=SelfCheckConfig(tries=3))
    return StarFlow2(components)


@pytest.mark.parametrize(
    ("words", "things"),
    [
        ("a red circle", [Named("circle", 1, "red")]),
        ("two large red hearts", [Named("heart", 2, "red", "large")]),
        ("hearts", [Named("heart", 0)]),
        ("an orange ring under a green diamond", [Named("ring", 1, "orange"), Named("diamond", 1, "green")]),
        ("a black cross on a gray background", [Named("cross", 1, "black")]),
        ("a star and a red star", [Named("star"), Named("star", 1, "red")]),
        ("a red star and a heart, the star above the heart", [Named("star", 1, "red"), Named("heart")]),
        ("make the background gray", []),
    ],
)
def test_the_objects_that_words_name(words, things):
    assert things_in(words) == things


def named(group: Group) -> Named:
    color, size = ("" if i is None else names[i] for i, names in ((group.color, COLORS), (group.size, SIZES)))
    return Named(SHAPES[group.shape], group.count, color, size)


def test_every_first_prompt_of_a_newcomer_is_read_as_what_it_means():
    words = "draw show make a an the two three four one of and"
    vocabulary = {*words.split(), *SIZES, *COLORS, *SHAPES, *PLURALS}
    for prompt in FIRST_PROMPTS:
        assert things_in(respelled(prompt.text, vocabulary)) == [named(g) for g in prompt.content.groups], prompt.text


def test_each_kind_is_asked_about_once_and_then_how_many_there_are():
    asked = questions_about("an orange star and two small hearts, the star above the hearts")
    assert [q.text for q in asked] == ["is there an orange star?", "is there a small heart?", HOW_MANY]
    assert asked[-1].answer == "three" and set(asked[-1].others) == {"one", "two", "four", "five", "six"}
    assert [q.text for q in questions_about("stars and a heart")] == ["is there a star?", "is there a heart?"]
    assert questions_about("turn the background mint") == ()


def test_edits_and_words_without_objects_are_not_checked(model):
    cfg = model.components.cfg
    assert check_of(cfg, "make the star blue", follows=True) == () == check_of(cfg, "a mint background", follows=False)
    with pytest.raises(PromptError, match="cannot ask itself whether an edit was done; use tries=1"):
        choice_of(cfg, "make the star blue", 2, follows=True)
    with pytest.raises(PromptError, match="cannot ask itself about anything that 'a mint background' names"):
        model.generate("a mint background", tries=2)
    session = model.session(seed=0)
    session.add("a star").draw(tries=1)
    with pytest.raises(PromptError, match="whether an edit was done"):
        session.add("make the star blue").draw(tries=2)
    assert session.draw().confidence is None  # by default one image


def test_what_can_be_checked_is_and_what_cannot_is_drawn_once(model):
    star, plain, again = model.generate(["a star", "a mint background", "two hearts"], seed=4)
    assert plain.confidence is None and plain.seed == 4
    assert 0 < star.confidence < 1 and 0 < again.confidence < 1
    assert star.seed in {4 + j * 2**21 for j in range(3)}


def test_no_prompts_at_all_are_refused_whatever_the_tries(model):
    for tries in (None, 1, 3):
        with pytest.raises(ConfigError, match="0 prompts and 0 seeds; expected equally many, and at least one of each"):
            model.generate([], tries=tries)


def test_the_confidence_is_the_product_over_the_questions_and_half_without_any(model):
    engine = Engine(model.sampler())
    row = engine.open()
    engine.feed(row, [1, 30, 31, 2])
    check = questions_about("a star and two hearts")
    each = [confidences(engine, [row], [(question,)])[0] for question in check]
    whole, none = confidences(engine, [row], [check])[0], confidences(engine, [row], [()])[0]
    assert len(each) == 3 and whole == pytest.approx(each[0] * each[1] * each[2], rel=1e-4) and none == UNSURE
    (tried,) = attempts(model.sampler(), [Request(["a mint background"], "a mint background")], [0], 2)
    assert [attempt.confidence for attempt in tried] == [UNSURE, UNSURE]


def test_a_question_without_a_place_for_the_words_is_refused():
    assert SelfCheckConfig().shows == ""
    with pytest.raises(ConfigError, match=r"expected a question with one \{\} for the words"):
        SelfCheckConfig(shows="is it right?")


def test_nano_finds_the_right_one_of_four_tries_by_asking_itself():
    """On two prompts that it often draws wrong, the judge finds more right images among those that it confirms."""
    nano = StarFlow2.from_pretrained("nano-heldout")
    wanted = ("a red circle and a blue square", "a red circle left of a blue square")
    prompts = [p for p in FIRST_PROMPTS if p.text in wanted]
    right: dict[int, int] = {}
    for tries in (1, 4):
        drawn = nano.generate([p.text for p in prompts], n=4, seed=0, tries=tries)
        scans = detect(np.stack([np.asarray(d.image) for d in drawn]))
        right[tries] = sum(is_right(p, s) for p, s in zip([p for p in prompts for _ in range(4)], scans, strict=True))
        assert all((d.confidence is None) == (tries == 1) for d in drawn)
    assert right[4] >= right[1] + 2, right
