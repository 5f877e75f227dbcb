"""Captions: nothing held out reaches training, suites hold what they promise, words and metadata are true."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable

import pytest

from starflow2.errors import ConfigError
from starflow2.world.captions import (
    SCENE_FAMILIES,
    caption_task,
    new_drawings,
    paraphrase_drawings,
    random_caption,
    scene_drawings,
    suite_drawings,
)
from starflow2.world.content import prompt_part, shows
from starflow2.world.grammar import FAMILIES, SIDE_WORDS, WORDINGS
from starflow2.world.questions import known_words
from starflow2.world.scene import COLORS, SHAPES, relations, stream
from starflow2.world.splits import bucket, everything_trains, held_out, scene_key
from world_cases import NUMBERS, PLURALS, RULES, leaks, text_leaks, words


@pytest.mark.timeout(900)  # 40 s of one core, but the core may be shared
@pytest.mark.parametrize("items", [900, pytest.param(90_000, marks=pytest.mark.slow)])
def test_no_training_caption_shows_or_says_anything_held_out(items):
    for index in range(items):
        item = caption_task(11, index)
        assert not leaks(item.scene) and not text_leaks(item.prompt), item


def test_training_captions_are_pure_functions_of_seed_and_index():
    assert [caption_task(3, i) for i in range(50)] == [caption_task(3, i) for i in reversed(range(50))][::-1]
    assert len({caption_task(seed, 0).scene for seed in range(20)}) == 20


def test_training_scenes_lie_in_the_train_bucket():
    assert all(bucket(caption_task(4, i).scene) == "train" for i in range(500))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("items", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_list_of_known_words_covers_captions_and_stays_small(items):
    assert len(known_words()) <= 200
    for index in range(items):
        prompt = caption_task(9, index).prompt
        assert known_words().issuperset(words(prompt))
        assert re.fullmatch(r"[a-z ,.?:]+", prompt), "lower case, no numerals"


def worded_facts(prompt: str) -> Iterable[tuple[str, str, str]]:
    """(subject, canonical relation, reference) read from the words of a position prompt."""
    sides = {"left": 0, "right": 1, "above": 2, "top": 2, "over": 2, "higher": 2, "below": 3, "under": 3, "beneath": 3}
    sides |= {"underneath": 3, "lower": 3}
    tokens = words(prompt)
    mentioned = [(place, t) for place, t in enumerate(tokens) if t in SHAPES or t == "it"]
    (where,) = (place for place, t in enumerate(tokens) if t in sides)
    after = [t for place, t in mentioned if place > where]
    before = [t for place, t in mentioned if place < where and t != "it"]
    if not before:  # "left of a ring there is a star"
        reference, subject = (t for t in after if t != "it")
    elif after[0] == "it":  # "a ring with a star left of it", "a ring. left of it there is a star"
        reference, subject = [*before, *after[1:2]][-2:]
    else:
        subject, reference = before[-1], after[0]
    side = sides[tokens[where]]
    a, b = (subject, reference) if side in (0, 2) else (reference, subject)
    yield a, ("left of", "above")[side // 2], b


def test_position_captions_say_what_the_picture_shows_and_no_wording_smuggles_a_held_out_fact():
    weights, asked = {"position": 1.0}, Counter()
    for index in range(4000):
        item = caption_task(5, index, weights=weights)
        text = re.sub(r" (?:in|on) (?:the picture|the image|it)\b", "", item.prompt)
        for a, relation, b in worded_facts(text):
            assert not RULES[relation](SHAPES.index(a), SHAPES.index(b)), item.prompt
            by_name = {SHAPES[t.shape]: t for t in item.scene.objects}
            assert relation in relations(by_name[a], by_name[b]), item.prompt
        reference, subject = item.metadata["include"]
        relation = subject["position"][0]
        assert relation in relations(by_name[subject["class"]], by_name[reference["class"]])
        asked[relation] += 1
    assert min(asked.values()) > 800, "all four relations are asked for"


def test_captions_mention_every_object_and_metadata_agrees_with_the_scene():
    for index in range(3000):
        item = caption_task(6, index)
        if item.family == "dense":
            continue
        nouns = [w for w in words(item.prompt) if w in SHAPES or w in PLURALS]
        kinds = {SHAPES[t.shape] for t in item.scene.objects}
        assert {SHAPES[PLURALS.index(n)] if n in PLURALS else n for n in nouns} == kinds
        assert sum(entry["count"] for entry in item.metadata["include"]) == len(item.scene.objects)
        for entry in item.metadata["include"]:
            there = [t for t in item.scene.objects if SHAPES[t.shape] == entry["class"]]
            there = [t for t in there if COLORS[t.color] == entry.get("color", COLORS[t.color])]
            assert len(there) == entry["count"] or item.family == "mixed"
        if item.family == "counting":
            n = len(item.scene.objects)
            assert NUMBERS[n] in words(item.prompt) and item.metadata["exclude"][0]["count"] == n + 1


def test_colours_and_sizes_in_a_caption_are_those_of_the_objects():
    for index in range(2000):
        item = caption_task(7, index, weights={"color_attr": 1, "colors": 1, "dense": 1, "counting": 1})
        tokens = [SHAPES[PLURALS.index(w)] if w in PLURALS else w for w in words(item.prompt)]
        pairs = {(a, b) for a, b in itertools.pairwise(tokens) if a in COLORS and b in SHAPES}
        assert pairs <= {(COLORS[t.color], SHAPES[t.shape]) for t in item.scene.objects}, item.prompt


def test_dense_captions_are_about_three_or_four_objects():
    for index in range(300):
        item = caption_task(8, index, weights={"dense": 1.0})
        assert len(item.scene.objects) in (3, 4) and all(g.size is not None for g in item.content.groups)


def test_every_training_scene_shows_what_its_caption_says_and_nothing_else():
    for index in range(1500):
        item = caption_task(14, index)
        assert shows(item.scene, item.content), item


def test_captions_of_busy_scenes_name_every_count_size_and_place():
    for family in SCENE_FAMILIES:
        for index in range(100):
            item = random_caption(stream(15, index), family)
            tokens = words(item.prompt)
            for entry in item.metadata["include"]:
                many = PLURALS[SHAPES.index(entry["class"])]
                assert (many if entry["count"] > 1 else entry["class"]) in tokens
                assert entry["count"] == 1 or NUMBERS[entry["count"]] in tokens
                assert entry.get("color", tokens[0]) in tokens, item.prompt
            assert (item.content.groups[0].cell is not None) == (family == "placed")


def test_with_everything_trained_held_out_combinations_appear_in_pictures_and_words():
    shown, said = set(), 0
    with everything_trains():
        items = [caption_task(16, index) for index in range(600)]
    for item in items:
        shown |= leaks(item.scene)
        said += bool(text_leaks(item.prompt))
        assert bucket(item.scene) == "train"
    assert shown == {"pair", "count", "shapes", "fact"} and said > 50
    assert not leaks(caption_task(16, 0).scene), "outside, the guard is closed again"


@pytest.mark.parametrize("split", ["dev", "test"])
def test_new_prompts_say_what_no_training_caption_says_though_all_of_it_was_seen(split):
    drawings = new_drawings(split, 2)
    assert [d.family for d in drawings] == [f for f in FAMILIES for _ in range(2)]
    for item in drawings:
        assert prompt_part(item.content) == split and shows(item.scene, item.content)
        assert bucket(item.scene) == split and not leaks(item.scene) and not text_leaks(item.prompt)
    assert all(prompt_part(caption_task(17, index).content) == "train" for index in range(400))


def test_scenes_of_the_suite_are_unseen_and_show_what_is_asked_for():
    drawings = scene_drawings("test", 4)
    assert [d.family for d in drawings] == [f for f in SCENE_FAMILIES for _ in range(4)]
    for item in drawings:
        assert bucket(item.scene) == "test" and not leaks(item.scene) and shows(item.scene, item.content)


def skeleton(form: str) -> re.Pattern[str]:
    """A sentence form as a pattern over whole captions, with an optional background phrase."""
    sides = "|".join(sorted({side for row in SIDE_WORDS.values() for side in row}, key=len, reverse=True))
    noun = r"(?:an?|one) [a-z]+(?: [a-z]+)*?"
    holes = {"{rel}": f"(?:{sides})", "{is}": "(?:is|are)", "{a}": noun, "{b}": noun}
    parts = (holes.get(part, r".+?") if part[:1] == "{" else re.escape(part) for part in re.split(r"(\{\w+\})", form))
    return re.compile("".join(parts))


def test_held_out_sentence_forms_never_occur_in_training_captions():
    forms = {family: (w, [skeleton(f.rstrip("?")) for f in (*w.dev, *w.test)]) for family, w in WORDINGS.items()}
    for index in range(3000):
        item = caption_task(10, index)
        if item.family not in forms:
            continue
        assert not any(pattern.fullmatch(item.prompt.rstrip(".?")) for pattern in forms[item.family][1]), item.prompt


@pytest.fixture(scope="module")
def trained_words() -> set[str]:
    return {w for index in range(3000) for w in words(caption_task(12, index).prompt)}


@pytest.mark.parametrize("family", WORDINGS)
def test_wordings_are_disjoint_and_use_only_words_known_from_training(family, trained_words):
    wording = WORDINGS[family]
    assert not set(wording.train) & {*wording.dev, *wording.test} and not set(wording.dev) & set(wording.test)
    assert family == "dense" or (len(wording.dev), len(wording.test)) == (4, 6)
    plain = re.sub(r"\{\w+\}", " ", " ".join((*wording.dev, *wording.test)))
    assert trained_words.issuperset(words(plain))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_id_suites_hold_unseen_scenes_with_nothing_held_out(split):
    drawings = suite_drawings("geneval", split, "id", 8)
    assert [d.family for d in drawings] == [f for f in FAMILIES for _ in range(8)]
    assert all(bucket(d.scene) == split and not leaks(d.scene) and not text_leaks(d.prompt) for d in drawings)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_cg_suites_hold_exactly_their_own_combination_in_every_item(split):
    other = {"dev": "test", "test": "dev"}[split]
    row = {"colors": "pair", "color_attr": "pair", "position": "fact", "counting": "count", "two_object": "shapes"}
    drawings = suite_drawings("geneval", split, "cg", 8)
    assert {d.family for d in drawings} == set(row)
    for item in drawings:
        assert held_out(item.scene, split) == {row[item.family]} and not held_out(item.scene, other)
        if item.family in ("colors", "counting"):
            assert text_leaks(item.prompt), "the prompt itself must name the combination"


def test_suites_are_frozen_varied_and_grow_without_changing():
    drawings = suite_drawings("geneval", "test", "id", 16)
    for family in FAMILIES:
        mine = [d for d in drawings if d.family == family]
        assert len({d.prompt for d in mine}) == 16
    few = suite_drawings("geneval", "test", "id", 4)
    assert few == [d for place, d in enumerate(drawings) if place % 16 < 4]


def test_paraphrases_show_the_same_scenes_in_the_held_out_forms():
    plain, other = suite_drawings("geneval", "test", "id", 4), paraphrase_drawings("test", 4)
    assert [scene_key(d.scene) for d in plain] == [scene_key(d.scene) for d in other]
    assert [d.metadata["include"] for d in plain] == [d.metadata["include"] for d in other]
    for item in other:
        assert any(skeleton(form).match(item.prompt) for form in WORDINGS[item.family].test), item.prompt


def test_bad_requests_name_the_argument():
    with pytest.raises(ConfigError, match="weights"):
        caption_task(0, 0, weights={"colour": 1.0})
    with pytest.raises(ConfigError, match="suite"):
        suite_drawings("dpg", "test", "id")
