"""Conversations of the served page, on a service with nano: tries, undo, fork, maps, and every example on it."""

import asyncio
import re

import pytest

from starflow2.core.images import is_same_image, to_pil
from starflow2.errors import PromptError, StateError
from starflow2.evals.examples import faults_of
from starflow2.serving import page_view as view
from starflow2.serving.service import Service
from starflow2.serving.talks import MOST_TALKS, Choice, Desk, Picture, Try, Turn, examples_of, turn_of
from starflow2.world.examples import Example, shown


@pytest.fixture(scope="module")
def service(model):
    with Service(model) as running:
        yield running


def spoken(service, desk, *turns, **choice):
    """Say several turns, one after the other."""

    async def run() -> None:
        for words in turns:
            async for _ in desk.say(service, turn_of(service, words), Choice(**choice)):
                pass

    asyncio.run(run())
    return desk


def last(desk):
    """The last picture of the last turn."""
    return desk.turn.reply.pictures[-1].pixels


def seen(desk, *shows):
    return faults_of(Example(task="draw", what="", text="", shows=shows), to_pil(last(desk)))


@pytest.fixture(scope="module")
def star(service):
    """A conversation of two turns: a red star, and three tries at making it blue."""
    desk = spoken(service, Desk(), "a red star")
    return spoken(service, desk, "make the star blue", tries=3)


def test_a_turn_has_as_many_tries_as_were_asked_for_each_with_its_own_seed(star):
    tries = star.turn.tries
    assert [one.seed for one in tries] == [0, 1, 2] and all(one.is_complete and one.id for one in tries)
    assert not seen(star, shown("a blue star"))


def test_the_next_turn_follows_the_try_that_was_chosen(service, star):
    desk = Desk()
    star.fork()
    desk.talks, star.open = [star.talks.pop()], 0
    desk.owner = star.owner
    desk.choose(2)
    chosen = last(desk)
    spoken(service, desk, "what color is the star?")
    assert desk.turn.reply.pieces == ["blue"] and len(desk.turn.tries) == 1, "words are not tried several times"
    assert desk.talk.turns[-2].reply.pictures[-1].pixels is chosen


def test_undo_and_the_same_words_give_the_same_picture(service, star):
    before = last(star)
    assert star.undo().words == "make the star blue" and len(star.talk.turns) == 1
    spoken(service, star, "make the star blue", tries=3)
    assert (last(star) - before).abs().max() < 1e-3


def test_a_fork_has_the_same_past_and_a_future_of_its_own(service):
    desk = spoken(service, Desk(), "a red star")
    desk.fork()
    spoken(service, desk, "make the background sky")
    assert desk.open == 1 and len(desk.talk.turns) == 2
    desk.show(0)
    assert len(desk.talk.turns) == 1
    spoken(service, desk, "make the star blue")
    assert not seen(desk, shown("a blue star"))


def test_retry_goes_on_with_the_seeds_after_those_that_were_tried(service):
    desk = spoken(service, Desk(), "two pink hearts", seed=5, tries=2)

    async def again() -> None:
        async for _ in desk.retry(service, 2):
            pass

    asyncio.run(again())
    assert [one.seed for one in desk.turn.tries] == [5, 6, 7, 8] and desk.turn.chosen == 2
    first, *others = (one.pictures[0].pixels for one in desk.turn.tries)
    assert not any(is_same_image(first, other) for other in others)


def test_drafts_come_before_the_picture(service):
    desk, states = Desk(), []

    async def watch() -> None:
        async for _ in desk.say(service, turn_of(service, "two pink hearts"), Choice()):
            states.extend("draft" if p.is_draft else "final" for p in desk.turn.reply.pictures if p.image)

    asyncio.run(watch())
    assert "draft" in states and states == sorted(states), "a picture is final at the end and stays so"


def test_a_reply_that_is_stopped_leaves_no_turn(service):
    desk = spoken(service, Desk(), "a red star")

    async def leave() -> None:
        async for _ in desk.say(service, turn_of(service, "make the star blue"), Choice(tries=4)):
            if desk.is_busy:
                with pytest.raises(StateError, match="being made"):
                    desk.undo()
                desk.stop()

    asyncio.run(leave())
    assert not desk.is_busy and [turn.words for turn in desk.talk.turns] == ["a red star"]


def test_a_visitor_that_leaves_in_the_middle_leaves_nothing_in_the_engine(service):
    async def leave() -> None:
        changes = Desk().say(service, turn_of(service, "a red star"), Choice(tries=4))
        await anext(changes)
        await changes.aclose()

    asyncio.run(leave())
    for _ in range(200):
        if not service.stats().replying + service.stats().waiting:
            break
        asyncio.run(asyncio.sleep(0.02))
    assert not service.stats().replying and not service.stats().waiting


def test_a_conversation_goes_on_when_the_service_has_forgotten_it(service):
    desk = spoken(service, Desk(), "a red star")
    service.drop(desk.turn.reply.id, desk.owner)
    spoken(service, desk, "what color is the star?")
    assert desk.turn.reply.pieces == ["red"]


def test_a_map_is_of_the_last_picture_and_goes_away_again(service, star):
    desk = spoken(service, Desk(), "two pink hearts")
    asyncio.run(desk.map(service))
    heat = desk.turn.heat
    score = service.model.score(["two pink hearts"], [last(desk)])
    assert heat and heat.image.size == (512, 512)
    assert heat.nats == pytest.approx(score.pictures[0].nats_per_dim, abs=1e-4)
    assert "sf-heat" in view.messages(desk)[-1]["content"]
    asyncio.run(desk.map(service))
    assert desk.turn.heat is None


def test_what_is_not_there_is_refused(service):
    desk = Desk()
    for step in (desk.undo, desk.fork, lambda: desk.choose(0), lambda: asyncio.run(desk.map(service))):
        with pytest.raises(StateError, match="nothing has been said"):
            step()
    with pytest.raises(PromptError, match="elephant"):
        turn_of(service, "a red elephant")
    with pytest.raises(PromptError, match="empty"):
        spoken(service, desk, " ")
    with pytest.raises(StateError, match="no conversation 3"):
        desk.show(3)
    assert not desk.talk.turns


def test_a_visitor_has_so_many_conversations_and_no_more():
    desk = Desk()
    for _ in range(MOST_TALKS - 1):
        desk.talk.turns.append(Turn("x", tries=[Try(0)]))
        desk.begin()
    desk.begin()  # the open one is empty
    desk.talk.turns.append(Turn("x", tries=[Try(0)]))
    with pytest.raises(StateError, match="room for no more"):
        desk.begin()


def test_a_picture_of_the_visitor_is_read(service, star):
    picture = to_pil(star.talk.turns[0].reply.pictures[0].pixels)
    desk = Desk()

    async def ask() -> None:
        turn = turn_of(service, "what color is the star?", [_png(picture)])
        async for _ in desk.say(service, turn, Choice()):
            pass

    asyncio.run(ask())
    assert desk.turn.reply.pieces == ["red"]
    assert view.messages(desk)[0]["content"].count("data:image/png;base64,") == 1


def _png(image) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_nothing_that_was_said_becomes_html():
    evil = '<img src=x onerror="alert(1)"> **bold** `code` [a](http://b) $x$\n# title'
    desk = Desk()
    desk.notice = evil
    desk.talk.turns.append(Turn(evil, tries=[Try(0, pieces=[evil, Picture()]), Try(1)]))
    desk.talks.append(desk.talk)
    for content in [m["content"] for m in view.messages(desk)] + [view.strip(desk), view.tabs(desk)]:
        assert "<img src=x" not in content and "\n" not in content
        text = re.sub(r"<[^>]*>", "", content)
        assert not set("*`[]$") & set(text)


def played(service, examples):
    """Every example as a click on it plays it, side by side."""

    async def play(example):
        desk = Desk()
        async for _ in desk.play(service, example, 1):
            pass
        return desk

    async def run():
        return await asyncio.gather(*map(play, examples))

    return asyncio.run(run())


def test_every_example_on_the_page_is_done_right(service):
    examples = examples_of(service)
    assert {example.task for example in examples} == {"draw", "edit", "ask"}
    wrong = {}
    for example, desk in zip(examples, played(service, examples), strict=True):
        if example.task == "ask":
            found = "" if desk.turn.reply.pieces == [example.answer] else str(desk.turn.reply.pieces)
        else:
            found = faults_of(example, to_pil(last(desk)))
        if found:
            wrong[example.about, example.text] = found
    assert not wrong
