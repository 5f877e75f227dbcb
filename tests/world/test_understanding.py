"""Training conversations: nothing held out, every answer follows, no answer gives itself away."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict

import pytest

from starflow2.core.dialogue import Dialogue
from starflow2.errors import ConfigError
from starflow2.world.captions import caption_task
from starflow2.world.conversations import MIX, READ_MIX, understanding_dialogue, understanding_words
from starflow2.world.questions import known_words
from starflow2.world.scene import COLORS, SHAPES, Scene
from starflow2.world.splits import is_trainable
from starflow2.world.words import PLURALS, POINTS
from world_cases import text_leaks, texts, words

COUNT = 2000


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    return [understanding_dialogue(21, index) for index in range(COUNT)]


def asked(dialogue: Dialogue) -> list[tuple[str, str]]:
    return [(turn.user[-1], turn.assistant[0]) for turn in dialogue.turns if turn.learns]


def test_no_conversation_shows_or_says_anything_held_out(dialogues):
    for dialogue in dialogues:
        assert all(is_trainable(scene) for scene in dialogue.pictures), dialogue
        assert not [leak for text in texts(dialogue) for leak in text_leaks(text)], dialogue


def test_no_two_pictures_in_a_row_differ_by_a_held_out_change_of_colour(dialogues):
    steps = Counter()
    for dialogue in dialogues:
        for text, answer in asked(dialogue):
            match = re.fullmatch(r"the (\w+) \w+ is (\w+) now\.", answer)
            if text == "what changed?" and match:
                steps[(COLORS.index(match[2]) - COLORS.index(match[1])) % 8] += 1
    assert steps.total() > 10 and set(steps) <= {1, 2, 4, 6, 7}


def test_conversations_are_pure_functions_of_seed_and_index(dialogues):
    assert dialogues[:60] == [understanding_dialogue(21, index) for index in reversed(range(60))][::-1]
    assert len({understanding_dialogue(seed, 0) for seed in range(20)}) == 20


def test_kinds_come_in_the_promised_shares_with_the_promised_pictures(dialogues):
    counts = Counter(dialogue.kind for dialogue in dialogues)
    assert sum(MIX.values()) == pytest.approx(1.0)
    for kind, share in MIX.items():
        assert abs(counts[kind] / COUNT - share) < 0.035, kind
    pictures = {"pictures": {2, 3}, "reading": {0}, "game": {0}, "check": {1, 2, 3, 4}}
    for dialogue in dialogues:
        assert len(dialogue.pictures) in pictures.get(dialogue.kind, {1})
        learnt = [turn for turn in dialogue.turns if turn.learns]
        assert all(len(turn.assistant) == 1 and isinstance(turn.assistant[0], str) for turn in learnt)
        assert learnt == list(dialogue.turns) or dialogue.kind == "check"
        assert all(isinstance(turn.user[-1], str) for turn in dialogue.turns)
    together = [
        len(d.pictures) == sum(isinstance(p, Scene) for p in d.turns[0].user) for d in dialogues if d.kind == "pictures"
    ]
    assert 0.3 < sum(together) / len(together) < 0.85, "both all at once and one by one"


def test_the_words_are_known_and_few(dialogues):
    used = {word for dialogue in dialogues for text in texts(dialogue) for word in words(text)}
    assert used <= understanding_words() and known_words() < understanding_words() and len(understanding_words()) < 250
    assert all(re.fullmatch(r"[a-z ,.?:]+", text) for dialogue in dialogues for text in texts(dialogue))


def test_yes_and_no_counts_letters_and_ordinals_are_balanced(dialogues):
    replies: dict[str, Counter[str]] = defaultdict(Counter)
    games = [understanding_dialogue(25, index, weights={"game": 1.0, "reading": 1.0}) for index in range(200)]
    for dialogue in (*dialogues, *games):
        for _, answer in asked(dialogue):
            replies[dialogue.kind][answer] += 1
    for kind in ("picture", "places", "sides", "details", "pictures", "reading", "game"):
        yes, no = replies[kind]["yes"], replies[kind]["no"]
        assert yes + no > 20 and 0.36 < yes / (yes + no) < 0.64, (kind, yes, no)
        counts = [replies[kind][number] for number in POINTS if replies[kind][number]]
        assert max(counts, default=0) <= 0.55 * sum(counts), (kind, counts)
    letters = Counter(a for d in dialogues for text, a in asked(d) if d.kind == "choice" and " d: " in text)
    assert set(letters) == set("abcd") and min(letters.values()) > 0.6 * max(letters.values()), letters
    assert 0.5 < replies["pictures"]["first"] / replies["pictures"]["second"] < 2


def test_what_a_caption_says_is_read_from_its_words_alone():
    for index in range(300):
        groups = caption_task(22, index, weights=READ_MIX).content.groups
        (first, reply), *more = asked(understanding_dialogue(22, index, weights={"reading": 1.0}))
        question = re.search(r"[^.?]+[.?]$", first)[0].strip()
        for text, answer in [(question, reply), *more]:
            if match := re.fullmatch(r"what color is the (\w+)\?", text):
                named = [COLORS[g.color] for g in groups if SHAPES[g.shape] == match[1] and g.color is not None]
                assert match[1] == "background" or named == [answer], (first, text)
            elif match := re.fullmatch(r"how many (\w+) are there\?", text):
                same = [g.count for g in groups if match[1] in ("objects", PLURALS[g.shape])]
                assert POINTS[sum(same)] == answer, (first, text)
            elif text == "list every object.":
                assert answer.removesuffix(".").split(", ") == [group.words for group in groups]


def test_beaten_colours_lose_also_where_the_rule_says_so_only_by_way_of_a_third():
    through = 0
    for index in range(400):
        rows = asked(understanding_dialogue(23, index, weights={"game": 1.0}))
        beaten = set(re.findall(r"(\w+) beats (\w+)", rows[0][0]))
        for a, b in itertools.product(beaten, repeat=2):
            if a[1] == b[0]:
                beaten = beaten | {(a[0], b[1])}
        for text, answer in rows:
            if match := re.search(r"which wins, (\w+) or (\w+)\?", text):
                loser = match[1] if answer == match[2] else match[2]
                assert (answer, loser) in beaten
                through += f"{answer} beats {loser}" not in rows[0][0]
    assert through > 20


def test_questions_about_several_pictures_are_about_the_picture_they_name():
    checked = Counter()
    for index in range(250):
        dialogue = understanding_dialogue(24, index, weights={"pictures": 1.0})
        scenes = dict(zip(("first", "second", "third"), dialogue.pictures, strict=False)) | {
            "last": dialogue.pictures[-1]
        }
        for text, answer in asked(dialogue):
            if match := re.fullmatch(r"is there an? (.+) in the (\w+) picture\?", text):
                there = any(match[1] in f"{COLORS[t.color]} {SHAPES[t.shape]}" for t in scenes[match[2]].objects)
                assert answer == ("yes" if there else "no")
            elif match := re.fullmatch(r"which picture has more (\w+), the (\w+) or the (\w+)\?", text):
                nouns = {"objects": set(range(8))} | {word: {shape} for shape, word in enumerate(PLURALS)}
                counts = {n: sum(t.shape in nouns[match[1]] for t in scenes[n].objects) for n in match.groups()[1:]}
                assert answer == max(counts, key=lambda name: counts[name])
            elif text == "are the two pictures the same?":
                assert answer == ("yes" if dialogue.pictures[0] == dialogue.pictures[1] else "no")
            else:
                continue
            checked[text.split()[0]] += 1
    assert min(checked[word] for word in ("is", "which", "are")) > 20, checked


def test_unusable_weights_are_refused():
    for weights in ({}, {"picture": 0.0}, {"drawing": 1.0}, {"picture": -1.0, "game": 2.0}):
        with pytest.raises(ConfigError, match="weights"):
            understanding_dialogue(0, 0, weights=weights)
