"""Edits of the drawn world: nothing held out reaches training, words single out one object, and no other changes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from starflow2.errors import ConfigError, DataError
from starflow2.world.edit_operations import OPERATIONS
from starflow2.world.edit_requests import EDIT_WORDINGS, edit_words, instruction
from starflow2.world.edits import (
    Edit,
    chain_steps,
    edit_chain_dialogue,
    edit_dialogue,
    edit_task,
    suite_edits,
    suite_sessions,
)
from starflow2.world.scene import BACKGROUND_NAMES, COLORS, SHAPES, SIZES, fits, relations, sample_scene, stream
from starflow2.world.splits import bucket, held_out, scene_key
from world_cases import leaks, text_leaks, words

NOUN = re.compile(rf"the ((?:(?:{'|'.join((*SIZES, *COLORS))}) )*(?:{'|'.join(SHAPES)}))")
ATTRIBUTE = {"recolor": "color", "reshape": "shape", "resize": "size"}
STEPS = {"test": 3, "dev": 5}


@pytest.fixture(scope="module")
def trained() -> list[Edit]:
    return [edit_task(21, index) for index in range(2000)]


@pytest.fixture(scope="module")
def plain() -> list[Edit]:
    """Edits of one object at named places, in the plain forms of suites."""
    edits = []
    for index in range(900):
        rng = stream(23, index)
        (step,) = chain_steps(rng, "train", [OPERATIONS[index % len(OPERATIONS)]])
        edits.append(Edit(step=step, instruction=instruction(step, rng, "train")))
    return edits


def color_step(edit: Edit) -> int | None:
    if edit.operation != "recolor":
        return None
    return (edit.target.objects[edit.after].color - edit.source.objects[edit.before].color) % 8


def test_no_training_edit_shows_says_or_does_anything_held_out(trained):
    for edit in trained:
        assert not leaks(edit.source) and not leaks(edit.target) and not text_leaks(edit.instruction), edit
        assert bucket(edit.source) == bucket(edit.target) == "train" and color_step(edit) not in STEPS.values()
    assert set(Counter(map(color_step, trained))) == {None, 1, 2, 4, 6, 7}
    asked = Counter(edit.operation for edit in trained)
    shares = {"recolor": 3, "reshape": 3, "move": 3, "resize": 2, "add": 2, "remove": 1, "background": 1}
    assert all(abs(asked[o] - len(trained) * shares[o] / 15) < 60 for o in OPERATIONS), "what is hard comes more often"
    assert set(Counter(len(edit.source.objects) for edit in trained)) == {1, 2, 3, 4}


def test_only_what_is_asked_changes_and_nothing_comes_to_overlap(trained):
    for edit in (edit for edit in trained if not edit.step.also):
        source, target = list(edit.source.objects), list(edit.target.objects)
        old = None if edit.before is None else source.pop(edit.before)
        new = None if edit.after is None else target.pop(edit.after)
        assert source == target and fits(edit.source) and fits(edit.target)
        assert (edit.source.background != edit.target.background) == (edit.operation == "background")
        assert (old is None) == (edit.operation in ("add", "background"))
        assert (new is None) == (edit.operation in ("remove", "background"))
        if name := ATTRIBUTE.get(edit.operation):
            assert getattr(old, name) != getattr(new, name) and replace(new, **{name: getattr(old, name)}) == old
        if edit.operation == "move":
            assert replace(new, x=old.x, y=old.y) == old and abs(new.x - old.x) + abs(new.y - old.y) >= 12


def test_several_objects_change_alike_and_all_others_stay(trained):
    several = [edit for edit in trained if edit.step.also]
    assert {edit.operation for edit in several} == {"recolor", "reshape", "resize", "remove"} and len(several) > 200
    for edit in several:
        changed = edit.step.changed
        stay = [obj for i, obj in enumerate(edit.source.objects) if i not in changed]
        assert all(obj in edit.target.objects for obj in stay) and fits(edit.target)
        if edit.operation == "remove":
            assert list(edit.target.objects) == stay
            continue
        name = ATTRIBUTE[edit.operation]
        for i in changed:
            old, new = edit.source.objects[i], edit.target.objects[i]
            assert getattr(new, name) == edit.step.value != getattr(old, name)
            assert replace(new, **{name: getattr(old, name)}) == old
        if edit.operation == "recolor":
            assert not {(edit.step.value - edit.source.objects[i].color) % 8 for i in changed} & set(STEPS.values())
        assert len(changed) == len(edit.source.objects) or len({edit.source.objects[i].shape for i in changed}) == 1


def test_requests_of_the_grammar_name_the_object_or_call_a_lone_one_it(trained):
    called_it = 0
    for edit in trained:
        if edit.before is None or edit.step.also:
            continue
        if "it" in words(edit.instruction):
            called_it += 1
            assert len(edit.source.objects) == 1
        else:
            shape = SHAPES[edit.source.objects[edit.before].shape]
            assert shape in words(edit.instruction), edit.instruction
    assert called_it > 40


def test_additions_leave_the_place_open_or_name_a_side_that_is_true(trained):
    added = [edit for edit in trained if edit.operation == "add"]
    sides = [edit for edit in added if edit.step.beside]
    assert len(sides) > 15 and sum(edit.step.is_free for edit in added) > 60
    for edit in sides:
        relation, index = edit.step.beside
        assert relation in relations(edit.target.objects[-1], edit.source.objects[index])
        assert SHAPES[edit.source.objects[index].shape] in words(edit.instruction)


def test_words_single_out_the_object_and_say_what_becomes_of_it(plain):
    for edit in plain:
        named = NOUN.findall(edit.instruction)
        assert len(named) == (edit.before is not None), edit.instruction
        if named:
            meant = [i for i, t in enumerate(edit.source.objects) if set(named[0].split()) <= set(str(t).split())]
            assert meant == [edit.before], edit
        rest = words(NOUN.sub("", edit.instruction))
        new = None if edit.after is None else edit.target.objects[edit.after]
        if edit.operation == "resize":
            assert {SIZES[new.size], ("smaller", "larger")[new.size]} & set(rest)
        elif edit.operation in ATTRIBUTE:
            table = {"color": COLORS, "shape": SHAPES}[ATTRIBUTE[edit.operation]]
            assert table[getattr(new, ATTRIBUTE[edit.operation])] in rest
        elif edit.operation == "add":
            assert str(new) in edit.instruction
        elif edit.operation == "background":
            assert BACKGROUND_NAMES[edit.target.background] in rest


def test_a_place_is_the_third_that_the_words_name_and_a_direction_goes_a_third_that_way(plain):
    places: Counter[str] = Counter()
    for edit in plain:
        if edit.operation not in ("move", "add"):
            continue
        tokens, new = set(words(edit.instruction)), edit.target.objects[edit.after]
        if "third" in tokens:
            old = edit.source.objects[edit.before]
            side = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
            ((dx, dy),) = (step for word, step in side.items() if word in tokens)
            assert (new.x - old.x, new.y - old.y) == pytest.approx((dx * 64 / 3, dy * 64 / 3))
            places["direction"] += 1
        else:
            column = 0 if "left" in tokens else 2 if "right" in tokens else 1
            row = 0 if tokens & {"upper", "top"} else 2 if tokens & {"lower", "bottom"} else 1
            for value, third in ((new.x, column), (new.y, row)):
                assert abs(value - (third + 0.5) * 64 / 3) < 3, edit  # moved inwards by no more than it takes
            places[f"{row}{column}"] += 1
    assert len(places) == 10 and min(places.values()) > 4


def test_an_edit_is_a_pure_function_of_seed_and_index():
    assert [edit_task(3, i) for i in range(20)] == [edit_task(3, i) for i in reversed(range(20))][::-1]
    assert [edit_chain_dialogue(3, i) for i in range(5)] == [edit_chain_dialogue(3, i) for i in range(5)]
    assert len({edit_task(seed, 0).source for seed in range(10)}) == 10


def test_whatever_the_world_draws_fits_and_what_touches_does_not():
    scenes = [sample_scene(stream(9, i), shapes=[i % 8, 3, 5]) for i in range(100)]
    assert all(map(fits, scenes))
    for scene in scenes:
        first, second, third = scene.objects
        near = replace(second, x=first.x, y=min(first.y + 12, 50))
        assert not fits(replace(scene, objects=(first, near, third)))
        assert not fits(replace(scene, objects=(replace(first, x=5.0), second, third)))


def test_dialogues_start_with_a_picture_and_answer_each_instruction_with_the_next():
    edit = edit_task(0, 0)
    (turn,) = edit_dialogue(edit).turns
    assert turn.user == (edit.source, edit.instruction) and turn.assistant == (edit.target,)
    lengths: Counter[int] = Counter()
    for index in range(150):
        dialogue = edit_chain_dialogue(22, index)
        first, *rest = dialogue.turns
        assert len(first.user) == 2 and all(len(turn.user) == len(turn.assistant) == 1 for turn in rest)
        assert all(bucket(scene) == "train" and not leaks(scene) for scene in dialogue.pictures)
        assert not any(text_leaks(turn.user[-1]) for turn in dialogue.turns)
        assert len(set(dialogue.pictures)) == len(dialogue.turns) + 1
        for a, b in zip(dialogue.pictures, dialogue.pictures[1:], strict=False):
            assert len(set(a.objects) ^ set(b.objects)) <= 2  # one edit apart
        lengths[len(dialogue.turns)] += 1
    assert set(lengths) == {2, 3}


# ------------------------------------------------------------------------------------------------------ suites


@pytest.mark.parametrize("split", ["dev", "test"])
def test_id_items_are_unseen_pictures_of_seen_combinations_in_training_wording(split):
    edits = suite_edits(split, "id", 3)
    assert [edit.operation for edit in edits] == [operation for operation in OPERATIONS for _ in range(3)]
    for edit in edits:
        assert bucket(edit.source) == bucket(edit.target) == split and 2 <= len(edit.source.objects) <= 4
        assert not leaks(edit.source) and not leaks(edit.target) and not text_leaks(edit.instruction)
        assert color_step(edit) not in STEPS.values() and fits(edit.target)
    assert suite_edits(split, "id", 2)[:2] == edits[:2] and len({scene_key(edit.source) for edit in edits}) > 18


@pytest.mark.parametrize(("split", "other"), [("dev", "test"), ("test", "dev")])
def test_cg_items_show_what_their_split_holds_out_and_nothing_else(split, other):
    edits = suite_edits(split, "cg", 4)
    for edit in edits:
        assert bucket(edit.source) == bucket(edit.target) == split and fits(edit.target)
        assert not held_out(edit.source, other) and not held_out(edit.target, other)
        shown = held_out(edit.target, split)
        if edit.operation == "recolor":
            assert color_step(edit) == STEPS[split] and not shown
        else:
            assert len(shown) == 1 and held_out(edit.source, split) <= shown
        if edit.operation in ("reshape", "move", "add", "recolor"):
            assert not held_out(edit.source, split)  # the edit makes it
    rows = {
        operation: {r for e in edits if e.operation == operation for r in held_out(e.target, split)}
        for operation in OPERATIONS
    }
    assert rows["recolor"] == set() and rows["move"] == {"fact"}
    assert all(rows[o] == {"pair", "fact", "shapes", "count"} for o in OPERATIONS if o not in ("recolor", "move"))


def test_no_wording_of_one_split_is_that_of_another_and_the_lexicon_has_every_word(trained):
    for operation, wording in EDIT_WORDINGS.items():
        forms = [*wording.train, *wording.dev, *wording.test]
        assert len(set(forms)) == len(forms) >= 10 and (len(wording.dev), len(wording.test)) == (2, 3), operation
    requests = [edit.instruction for edit in trained]
    for split in ("dev", "test"):
        plain, other = suite_edits(split, "id", 2), suite_edits(split, "paraphrase", 2)
        assert [(e.source, e.target) for e in plain] == [(e.source, e.target) for e in other]
        assert not {e.instruction for e in plain} & {e.instruction for e in other}
        requests += [e.instruction for e in other]
    assert {word for text in requests for word in words(text)} <= edit_words()
    assert all(text == text.lower() and "  " not in text and "{" not in text for text in requests)


def test_sessions_are_unseen_and_their_third_edit_starts_where_the_undo_goes():
    sessions = suite_sessions("dev", 4)
    assert [session.undo_to for session in sessions] == [0, 1, 0, 1]
    for session in sessions:
        first, second, third = session.edits
        assert first.target == second.source and session.source == first.source
        assert third.source == session.undone == (session.source, first.target)[session.undo_to]
        assert session.scenes == (first.target, second.target, third.target) and len(session.instructions) == 3
        for scene in (session.source, *session.scenes):
            assert bucket(scene) == "dev" and not leaks(scene)


def test_bad_requests_name_the_argument():
    with pytest.raises(ConfigError, match="split"):
        suite_edits("train", "id", 1)
    with pytest.raises(ConfigError, match="part"):
        suite_edits("dev", "ood", 1)
    with pytest.raises(ConfigError, match="split"):
        suite_sessions("train", 1)


def test_a_chain_of_nothing_but_removals_is_never_asked_for_and_impossible_chains_are_refused():
    assert len(edit_chain_dialogue(0, 699).turns) > 1  # first drew "remove" three times, which no picture allows
    with pytest.raises(DataError, match="one after another"):
        chain_steps(stream(0), "train", ["remove"] * 3)
