"""Stories: nothing held out reaches training, what is not asked for stays, sentences and answers are true."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest

from starflow2.errors import ConfigError
from starflow2.world.scene import COLORS, SHAPES, SIZES, Scene, coverage, relations, stream
from starflow2.world.splits import bucket, held_out, is_trainable
from starflow2.world.stories import (
    CG_ROWS,
    KINDS,
    REQUEST_KINDS,
    random_story,
    story_dialogue,
    story_task,
    suite_stories,
)
from starflow2.world.story_text import STORY_WORDINGS, Claim, Look, agrees, answer_question, parse_sentence, story_words
from starflow2.world.words import NUMBERS, PLURALS
from world_cases import words

SIDES = {"left": "left of", "right": "right of", "above": "above", "over": "above", "below": "below", "under": "below"}
SIDES |= {"top": "above", "higher": "above", "beneath": "below", "underneath": "below", "lower": "below"}
EDITS = {"test": 3, "dev": 5}
THE = rf"the (?:(?:{'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
IS_IT = re.compile(rf"is {THE} (.+) {THE}\?")

pytestmark = pytest.mark.timeout(600)  # seconds of one core, but the core may be shared


@pytest.fixture(scope="module")
def trained():
    return [story_task(21, index) for index in range(2000)]


@pytest.fixture(scope="module")
def suites():
    parts = itertools.product(("dev", "test"), ("id", "cg", "paraphrase"))
    return {(split, part): suite_stories(split, part, 10) for split, part in parts}


def texts(story):
    for step in story.steps:
        yield from (step.instruction, step.sentence)
    yield from (story.question, story.answer)


def edits(story):
    """Steps of colour, modulo 8, of all recolourings, from the scenes alone."""
    for old, new in itertools.pairwise(step.scene for step in story.steps):
        if len(old.objects) == len(new.objects):
            yield from (
                (b.color - a.color) % 8 for a, b in zip(old.objects, new.objects, strict=True) if a.color != b.color
            )


def named_pairs(text):
    """(shape, colour) named outright."""
    return {
        (SHAPES.index(b), COLORS.index(a)) for a, b in itertools.pairwise(words(text)) if a in COLORS and b in SHAPES
    }


# ------------------------------------------------------------------------------------------------- the split


def test_no_training_story_shows_or_names_anything_held_out(trained):
    for story in trained:
        assert all(is_trainable(step.scene) for step in story.steps), story
        assert not set(edits(story)) & {3, 5}
        assert all((c + 3 * s) % 8 not in (0, 4) for text in texts(story) for s, c in named_pairs(text)), story
        if match := IS_IT.fullmatch(story.question):
            a, b = SHAPES.index(match[1]), SHAPES.index(match[3])
            for side in {SIDES[w] for w in words(match[2]) if w in SIDES}:
                (p, q), n = ((a, b) if side in ("left of", "above") else (b, a)), (2 if "f" in side else 6)
                assert a == b or (p + 3 * q + n) % 8, story.question


@pytest.mark.parametrize("split", ["dev", "test"])
def test_suites_hold_what_they_promise(suites, split):
    other = {"dev": "test", "test": "dev"}[split]
    for part, novel in (("id", False), ("cg", True)):
        for item, story in enumerate(suites[split, part]):
            shown = set().union(*(held_out(step.scene, split) for step in story.steps))
            row = CG_ROWS[item % len(CG_ROWS)] if novel else ""
            assert shown == {row} - {"", "edit"}
            assert set(edits(story)) & {3, 5} == ({EDITS[split]} if row == "edit" else set())
            assert not any(held_out(step.scene, other) for step in story.steps)
            assert bucket(story.steps[-1].scene) == split


def test_suites_grow_without_changing_and_refuse_what_they_do_not_know(suites):
    assert suite_stories("test", "cg", 3) == suites["test", "cg"][:3]
    assert len({story.steps[-1].scene for rows in suites.values() for story in rows}) == 40
    with pytest.raises(ConfigError, match="split='train'"):
        suite_stories("train")
    with pytest.raises(ConfigError, match="part='all'"):
        suite_stories("dev", "all")


def test_stories_are_pure_functions_of_seed_and_index(trained):
    assert [story_task(21, index) for index in (7, 3)] == [trained[7], trained[3]]
    assert len({story_task(seed, 0) for seed in range(9)}) == 9


# ------------------------------------------------------------------------------------------------- the steps


def test_a_step_does_what_it_asks_and_all_else_stays_exactly(trained, suites):
    counts_by_op, several = Counter(), Counter()
    for story in [*trained, *itertools.chain(*suites.values())]:
        scenes = [step.scene for step in story.steps]
        assert len(scenes) == 4 and len(scenes[0].objects) == 1 and len({scene.background for scene in scenes}) == 1
        for before, step in zip([Scene(objects=(), background=0), *scenes], story.steps, strict=False):
            old, new, change = set(before.objects), set(step.scene.objects), step.change
            counts_by_op[change.op] += 1
            assert 1 <= len(new) <= 4
            assert len({(t.shape, t.color) for t in new}) == len(new), "words must tell all objects apart"
            gone, come = old - new, new - old
            for one in change.all:
                assert sum(one.before.fits(obj) for obj in gone) == 1 if one.before else not gone
                assert sum(one.after.fits(obj) for obj in come) == 1 if one.after else not come
            counts = {"start": (0, 1), "add": (0, 1), "remove": (1, 0), "recolor": (1, 1)}[change.op]
            assert (len(gone), len(come)) == tuple(len(change.all) * count for count in counts)
            if change.op == "recolor":
                assert {replace(obj, color=change.after.color) for obj in gone} == come
            several[change.op] += bool(change.also)
            if change.op == "add" and change.reference is not None:
                (other,) = (obj for obj in old if change.reference.fits(obj))
                assert change.relation in relations(come.pop(), other)
                assert change.relation in {SIDES[w] for w in words(step.instruction) if w in SIDES}
    assert min(counts_by_op.values()) > 300 and set(several) == {"start", "add", "remove", "recolor"}
    assert min(several["remove"], several["recolor"]) > 10 and several["start"] == several["add"] == 0


def test_pictures_of_a_story_never_overlap(trained):
    for story in trained[:40]:
        for step in story.steps:
            assert sum((coverage(obj) > 0).astype(int) for obj in step.scene.objects).max() == 1


def test_it_means_the_only_object_that_the_request_before_named(trained):
    found = 0
    for story in trained:
        for before, step in itertools.pairwise(story.steps):
            if {"it", "its"} & set(words(step.instruction)):
                found += 1
                assert before.change.op in ("start", "recolor")
                assert before.change.after == (step.change.reference or step.change.before)
            elif not step.change.also and (step.change.reference is not None or step.change.before is not None):
                meant = step.change.reference or step.change.before
                shape, color = SHAPES[meant.shape], COLORS[meant.color]
                assert re.search(f"the ({color} )?{shape}", step.instruction)
    assert found > 1000


def test_requests_about_several_objects_name_them_all_and_leave_others_alone(trained):
    found = Counter()
    for story in trained:
        for before, step in itertools.pairwise(story.steps):
            if not step.change.also:
                continue
            shapes, said = {c.before.shape for c in step.change.all}, step.instruction
            found[step.change.op] += 1
            if step.change.op == "remove":
                (shape,) = shapes
                assert re.search(f"{PLURALS[shape]}|(every|each) {SHAPES[shape]}", said)
                assert len(step.change.all) == sum(obj.shape == shape for obj in before.scene.objects)
            else:
                assert len(step.change.all) == len(before.scene.objects) > 1
                assert re.search("everything|all objects|all the objects|every object|all of them", said)
    assert min(found.values()) > 10


def test_stories_that_checks_are_made_from_are_about_one_object_at_a_time():
    """The data of stage vlm, whose conversations have such checks, does not depend on requests about several."""
    made = [random_story(stream(9, index)) for index in range(150)]
    assert not any(step.change.also for story in made for step in story.steps)


def test_suite_stories_in_plain_words_have_some_requests_about_several_objects():
    made = [step for story in suite_stories("dev", "plain", 64) for step in story.steps]
    assert 3 <= sum(bool(step.change.also) for step in made) < 40


def test_names_in_requests_fit_one_object_only(trained):
    for story in trained:
        for before, step in itertools.pairwise(story.steps):
            for match in re.finditer(r"the (?:(\w+) )?(\w+)", step.instruction):
                if match[2] in SHAPES:
                    fits = [t for t in before.scene.objects if SHAPES[t.shape] == match[2]]
                    fits = [t for t in fits if match[1] not in COLORS or COLORS[t.color] == match[1]]
                    assert len(fits) == 1, step.instruction


# -------------------------------------------------------------------------------------------- words and questions


def test_sentences_parse_to_what_is_to_be_seen_and_agree_with_no_other_picture(trained):
    for story in trained[:500]:
        claims = [parse_sentence(step.sentence) for step in story.steps]
        for claim, step in zip(claims, story.steps, strict=True):
            assert agrees(claim, step.scene.objects)
            assert len(claim.relations) == (step.change.relation is not None)
            assert [(look.shape, look.color) for look in claim.objects] == [
                (t.shape, t.color) for t in step.scene.objects
            ]
        for claim, before in zip(claims[1:], story.steps[:-1], strict=True):
            assert not agrees(claim, before.scene.objects)
        for claim, step in zip(claims, story.steps, strict=True):
            swapped = [replace(t, x=64 - t.x, y=64 - t.y) for t in step.scene.objects]
            assert agrees(claim, swapped) == (not claim.relations), "relations are looked at"


def test_the_grammar_takes_its_own_sentences_and_nothing_else():
    assert parse_sentence("there is a small red star .") == Claim((Look(3, 0, 0),))
    assert parse_sentence("There are a red star and a blue star, the blue star is above the red star.").relations == (
        (1, "above", 0),
    )
    for bad in (
        "",
        "there is a star.",
        "there are a red star.",
        "there is a red star and a blue heart.",
        "there are a red star and a blue star, the star is above the red star.",
        "there are a red star and a blue heart, the star is above the star.",
        "there are a red star and a blue heart, the ring is above the star.",
        "there is a red star. there is a red star.",
        "there are a red star, a red star, a red star, a red star and a red star.",
    ):
        assert parse_sentence(bad) is None, bad


def test_two_alike_must_both_be_there_and_sizes_count_where_they_are_named(trained):
    scene = next(s.steps[-1].scene for s in trained if len(s.steps[-1].scene.objects) == 1)
    (obj,) = scene.objects
    assert agrees(Claim((Look(obj.shape, obj.color, obj.size),)), [obj])
    assert not agrees(Claim((Look(obj.shape, obj.color, 1 - obj.size),)), [obj])
    assert not agrees(Claim((Look(obj.shape, obj.color),) * 2), [obj])
    assert not agrees(Claim((Look(obj.shape, obj.color),)), [replace(obj, color=-1)])


def true_answer(story):
    """A second reading of the questions, from the last picture."""
    rows = [(str(t).split(), t) for t in story.steps[-1].scene.objects]
    tokens = words(story.question)
    if tokens[:2] == ["how", "many"]:
        return NUMBERS[len(rows)]
    if tokens[1] == "there":
        return "yes" if any(set(tokens[3:]) <= set(name) for name, _ in rows) else "no"
    cut = tokens.index("the")
    ends = [i for i, token in enumerate(tokens) if token in SHAPES]
    (a,) = (row for row in rows if set(tokens[cut + 1 : ends[0] + 1]) <= set(row[0]))
    if tokens[0] == "what":
        return a[0][("size", "color").index(tokens[1])]
    last = len(tokens) - 1 - tokens[::-1].index("the")
    (b,) = (row for row in rows if set(tokens[last + 1 :]) <= set(row[0]))
    sides = [token for token in tokens[ends[0] + 1 : last] if token in SIDES]
    true = [side for side in sides if SIDES[side] in relations(a[1], b[1])]
    return (true[0] if true else None) if len(sides) == 2 else ("yes" if true else "no")


def test_answers_are_one_true_word_by_a_second_reading(trained, suites):
    for story in [*trained, *itertools.chain(*suites.values())]:
        assert story.answer == true_answer(story) == answer_question(story.question, story.steps[-1].scene.objects)
        assert len(words(story.answer)) == 1


def test_kinds_have_their_shares_and_no_answer_gives_itself_away(trained):
    kinds = Counter(story.kind for story in trained)
    assert all(abs(kinds[kind] / len(trained) - share) < 0.04 for kind, share in KINDS.items())
    assert 0.3 < sum(kinds[kind] for kind in REQUEST_KINDS) / len(trained) < 0.42
    for kind in KINDS:
        answers = Counter(story.answer for story in trained if story.kind == kind)
        assert max(answers.values()) / answers.total() < 0.6, (kind, answers)


def is_named(change, shape: str) -> bool:
    return SHAPES[change.before.shape] == shape


def test_pictures_alone_settle_what_no_request_named(trained):
    for story in trained:
        objects = {SHAPES[t.shape]: t for t in story.steps[-1].scene.objects}
        shapes = [token for token in words(story.question) if token in SHAPES]
        if story.kind == "size" and len(objects) == len(story.steps[-1].scene.objects):
            size = SIZES[objects[shapes[0]].size]
            gone = [i for i, s in enumerate(story.steps) if s.change.op == "remove" and is_named(s.change, shapes[0])]
            requests = " ".join(step.instruction for step in story.steps[max(gone, default=0) :])
            # the size of a removed object may have been named
            assert f"{size} {COLORS[objects[shapes[0]].color]} {shapes[0]}" not in requests
        if story.kind in ("position", "left_right", "above_below"):
            here = story.steps[-1].scene.objects
            for change in (step.change for step in story.steps if step.change.reference is not None):
                both = {change.after.shape, change.reference.shape}
                assert both != set(shapes) or len({t.shape for t in here}) < len(here)


def test_unsettled_questions_have_no_answer_and_others_are_refused(trained):
    assert answer_question("what size is the star?", []) is None
    assert answer_question("is the star above or below the ring?", []) is None
    assert answer_question("is there a star?", []) == "no"
    with pytest.raises(ConfigError, match="why"):
        answer_question("why?", [])


def test_every_word_is_in_the_list_and_held_out_wordings_need_no_new_one(trained, suites):
    used = {word for story in trained for text in texts(story) for word in words(text)}
    assert used <= story_words() and len(story_words()) < 140
    for wording in STORY_WORDINGS.values():
        assert len(wording.dev) == 2 and len(wording.test) == 3
        assert len({*wording.train, *wording.dev, *wording.test}) == len(wording.train) + 5
        assert set(words(re.sub(r"\{\w+\}", " ", " ".join((*wording.dev, *wording.test))))) <= used
    for story in (*trained, *itertools.chain(*suites.values())):
        assert all(re.fullmatch(r"[a-z ,.?]+", text) for text in texts(story))


def pattern(form):
    nouns = {
        "{a}": r"an? [a-z ]+",
        "{b}": r"(?:the .+|it)",
        "{color}": r"\w+",
        "{rel}": r"[a-z ]*\b(?:it|its|the)\b[a-z ]*",
    }
    return re.compile("".join(nouns.get(piece, re.escape(piece)) for piece in re.split(r"(\{\w+\})", form)))


def test_held_out_wordings_never_occur_in_training_and_always_in_paraphrases(trained, suites):
    reserved = {
        (op, split): [pattern(f) for f in wording.forms(split)]
        for op, wording in STORY_WORDINGS.items()
        for split in ("dev", "test")
    }
    for step in (step for story in trained for step in story.steps):
        for split in ("dev", "test"):
            assert not any(p.fullmatch(step.instruction) for p in reserved[step.change.op, split]), step.instruction
    for split in ("dev", "test"):
        plain, other = suites[split, "id"], suites[split, "paraphrase"]
        assert [[s.scene for s in story.steps] for story in plain] == [
            [s.scene for s in story.steps] for story in other
        ]
        for step in (step for story in other for step in story.steps):
            assert any(p.fullmatch(step.instruction) for p in reserved[step.change.op, split]), step.instruction


def test_a_story_is_a_conversation_of_five_turns(trained):
    story = trained[0]
    dialogue = story_dialogue(story)
    assert dialogue.kind == "story" and dialogue.pictures == tuple(step.scene for step in story.steps)
    assert [len(turn.assistant) for turn in dialogue.turns] == [2, 2, 2, 2, 1]
    assert dialogue.turns[2].user == (story.steps[2].instruction,) and dialogue.turns[2].assistant[0].startswith(
        "there "
    )
    assert dialogue.turns[4].user == (story.question,) and dialogue.turns[4].assistant == (story.answer,)


def test_training_stories_leave_room_around_what_comes_first(trained, suites):
    def off_centre(stories):
        firsts = [story.steps[0].scene.objects[0] for story in stories]
        return sorted(max(abs(obj.x - 32), abs(obj.y - 32)) for obj in firsts)

    def is_large(stories, is_named_size):
        comers = [step for story in stories for step in story.steps if step.change.op in ("start", "add")]
        comers = [step for step in comers if (step.change.after.size is not None) == is_named_size]
        return sum(step.scene.objects[-1].size for step in comers) / len(comers)

    places = off_centre(trained)
    assert places[len(places) // 2] < 8 and places[-len(places) // 20] < 12
    assert is_large(trained, is_named_size=False) < 0.2 and 0.35 < is_large(trained, is_named_size=True) < 0.65
    frozen = [story for part in suites.values() for story in part]
    assert off_centre(frozen)[len(frozen) // 2] > 15 and is_large(frozen, is_named_size=False) > 0.3, "as they were"
