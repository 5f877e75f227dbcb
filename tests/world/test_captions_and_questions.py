"""Words of the drawn world: nothing held out reaches training, suites hold what they promise, answers are true."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable

import pytest

from starflow2.errors import ConfigError
from starflow2.world import captions
from starflow2.world import questions as tasks
from starflow2.world.captions import FAMILIES, caption_task
from starflow2.world.questions import known_words, understanding_task
from starflow2.world.scene import COLORS, SHAPES, Scene, relations, stream
from starflow2.world.splits import bucket, held_out, scene_key

RULES = {
    "pair": lambda s, c: (c + 3 * s) % 8 in (0, 4),
    "count": lambda s, n: n >= 2 and (s + 3 * n) % 8 in (0, 4),
    "shapes": lambda a, b: {a, b} in ({0, 4}, {1, 5}, {2, 6}, {3, 7}),
    "left of": lambda a, b: (a + 3 * b + 2) % 8 == 0,  # even a test, odd a dev
    "above": lambda a, b: (a + 3 * b + 6) % 8 == 0,
}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text)


def stands_left(a, b) -> bool:
    """GenEval's rule along x, from boxes of centre +- radius."""
    distance = ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5
    return b[0] - a[0] - 0.1 * (2 * a[2] + 2 * b[2]) > 0.5 * distance


def leaks(scene: Scene) -> set[str]:
    """What no training picture may show, by the rules above and not by the package's own tables."""
    rows = [(t.shape, t.color, (t.x, t.y, (8.0, 11.0)[t.size])) for t in scene.objects]
    counts = Counter(shape for shape, *_ in rows)
    found = {"pair" for shape, color, _ in rows if RULES["pair"](shape, color)}
    found |= {"count" for shape, n in counts.items() if RULES["count"](shape, n)}
    found |= {"shapes" for a, b in itertools.combinations(counts, 2) if RULES["shapes"](a, b)}
    for (a, _, p), (b, _, q) in itertools.permutations(rows, 2):
        if a != b:
            over = stands_left((p[1], p[0], p[2]), (q[1], q[0], q[2]))
            left = stands_left(p, q)
            found |= {"fact"} if (left and RULES["left of"](a, b)) or (over and RULES["above"](a, b)) else set()
    return found


def text_leaks(text: str) -> set[str]:
    """Held-out pairs and counts named outright: "red circle", "two triangles", "two small blue triangles"."""
    found = set()
    singular = dict(zip(captions.PLURALS, SHAPES, strict=True))
    tokens = words(text)
    for place, token in enumerate(tokens):
        noun = singular.get(token, token)
        if noun in SHAPES:
            before = tokens[max(place - 3, 0) : place]
            if before and before[-1] in COLORS and RULES["pair"](SHAPES.index(noun), COLORS.index(before[-1])):
                found.add(f"{before[-1]} {noun}")
            if token in singular:
                for n in set(before) & {"two", "three", "four"}:
                    if RULES["count"](SHAPES.index(noun), captions.NUMBERS.index(n)):
                        found.add(f"{n} {token}")
    return found


def told_facts(prompt: str) -> Iterable[tuple[str, str, str]]:
    """(subject, canonical relation, reference) read from a position prompt by its words alone."""
    sides = {"left": 0, "right": 1, "above": 2, "top": 2, "over": 2, "below": 3, "under": 3, "beneath": 3}
    tokens = words(prompt)
    mentioned = [(place, t) for place, t in enumerate(tokens) if t in SHAPES]
    (where,) = (place for place, t in enumerate(tokens) if t in sides)
    after = [t for place, t in mentioned if place > where]
    before = [t for place, t in mentioned if place < where]
    if not before:  # "left of a ring there is a star"
        reference, subject = after
    elif not after:  # "a ring with a star left of it"
        reference, subject = before[-2:]
    else:
        subject, reference = before[-1], after[0]
    side = sides[tokens[where]]
    a, b = (subject, reference) if side in (0, 2) else (reference, subject)
    yield a, ("left of", "above")[side // 2], b


@pytest.mark.timeout(900)  # 45 s of one core, but the core may be shared
@pytest.mark.parametrize("thousands", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_no_training_item_in_a_hundred_thousand_shows_or_says_anything_held_out(thousands):
    for index in range(900 * thousands):
        item = caption_task(11, index)
        assert not leaks(item.scene) and not text_leaks(item.prompt), item
    for index in range(100 * thousands):
        scene, pairs = understanding_task(11, index)
        assert not leaks(scene), scene
        assert not any(text_leaks(question) or text_leaks(answer) for question, answer in pairs), pairs


def test_this_file_would_notice_a_leak():
    shown = [leaks(d.scene) for d in captions.suite_drawings("geneval", "test", "cg", 2)]
    assert all(shown) and set().union(*shown) == {"pair", "count", "shapes", "fact"}
    assert text_leaks("two small triangles") and text_leaks("draw a red circle") and not text_leaks("a green circle")


def test_training_items_are_pure_functions_of_seed_and_index():
    assert [caption_task(3, i) for i in range(50)] == [caption_task(3, i) for i in reversed(range(50))][::-1]
    assert [understanding_task(3, i) for i in range(50)] == [understanding_task(3, i) for i in range(50)]
    assert len({caption_task(seed, 0).scene for seed in range(20)}) == 20


def test_training_scenes_lie_in_the_train_bucket():
    assert all(bucket(caption_task(4, i).scene) == bucket(understanding_task(4, i)[0]) == "train" for i in range(500))


def test_position_captions_say_what_the_picture_shows_and_no_wording_smuggles_a_held_out_fact():
    weights, seen = {"position": 1.0}, Counter()
    for index in range(4000):
        item = caption_task(5, index, weights=weights)
        for a, relation, b in told_facts(item.prompt):
            assert not RULES[relation](SHAPES.index(a), SHAPES.index(b)), item.prompt
            by_name = {SHAPES[t.shape]: t for t in item.scene.objects}
            assert relation in relations(by_name[a], by_name[b]), item.prompt
        reference, subject = item.metadata["include"]
        relation = subject["position"][0]
        assert relation in relations(by_name[subject["class"]], by_name[reference["class"]])
        seen[relation] += 1
    assert min(seen.values()) > 800, "all four relations are asked for"


def test_captions_mention_every_object_and_metadata_agrees_with_the_scene():
    for index in range(3000):
        item = caption_task(6, index)
        if item.family == "dense":
            continue
        nouns = [w for w in words(item.prompt) if w in SHAPES or w in captions.PLURALS]
        kinds = {SHAPES[t.shape] for t in item.scene.objects}
        assert {SHAPES[captions.PLURALS.index(n)] if n in captions.PLURALS else n for n in nouns} == kinds
        assert sum(entry["count"] for entry in item.metadata["include"]) == len(item.scene.objects)
        for entry in item.metadata["include"]:
            there = [t for t in item.scene.objects if SHAPES[t.shape] == entry["class"]]
            assert len(there) == entry["count"]
            assert all(COLORS[t.color] == entry.get("color", COLORS[t.color]) for t in there)
        if item.family == "counting":
            n = len(item.scene.objects)
            assert captions.NUMBERS[n] in words(item.prompt) and item.metadata["exclude"][0]["count"] == n + 1


def test_colours_and_sizes_in_a_caption_are_those_of_the_objects():
    for index in range(2000):
        item = caption_task(7, index, weights={"color_attr": 1, "colors": 1, "dense": 1, "counting": 1})
        tokens = [SHAPES[captions.PLURALS.index(w)] if w in captions.PLURALS else w for w in words(item.prompt)]
        said = {(a, b) for a, b in itertools.pairwise(tokens) if a in COLORS and b in SHAPES}
        assert said <= {(COLORS[t.color], SHAPES[t.shape]) for t in item.scene.objects}, item.prompt


def test_dense_captions_have_three_to_six_sentences_about_three_or_four_objects():
    for index in range(500):
        item = caption_task(8, index, weights={"dense": 1.0})
        assert 3 <= item.prompt.count(".") <= 6 and len(item.scene.objects) in (3, 4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("items", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_lexicon_covers_captions_and_answers_and_stays_small(items):
    assert len(known_words()) <= 200
    for index in range(items):
        prompt = caption_task(9, index).prompt
        assert known_words().issuperset(words(prompt))
        assert re.fullmatch(r"[a-z ,.?]+", prompt), "lower case, no numerals"
    for index in range(items // 10):
        assert all(known_words().issuperset(words(q + " " + a)) for q, a in understanding_task(9, index)[1])


def skeleton(form: str) -> re.Pattern[str]:
    """A sentence form as a pattern over whole captions, with an optional background phrase."""
    holes = {"{rel}": r"(?:[a-z]+ ){0,4}[a-z]+", "{is}": "(?:is|are)"}
    parts = (holes.get(part, r".+?") if part[:1] == "{" else re.escape(part) for part in re.split(r"(\{\w+\})", form))
    return re.compile("".join(parts))


def test_held_out_sentence_forms_never_occur_in_training_captions():
    forms = {family: (w, [skeleton(f) for f in (*w.dev, *w.test)]) for family, w in captions.WORDINGS.items()}
    for index in range(5000):
        item = caption_task(10, index)
        sentences = re.findall(r"[^.]+\.", item.prompt) if item.family == "dense" else [item.prompt]
        for sentence, pattern in itertools.product(sentences, forms[item.family][1]):
            if "objects" not in sentence:  # "the picture shows four objects" is about the whole
                assert not pattern.fullmatch(sentence.strip()), item.prompt


@pytest.fixture(scope="module")
def trained_words() -> set[str]:
    return {w for index in range(3000) for w in words(caption_task(12, index).prompt)}


@pytest.mark.parametrize("family", captions.WORDINGS)
def test_wordings_are_disjoint_and_use_only_words_known_from_training(family, trained_words):
    wording = captions.WORDINGS[family]
    assert not set(wording.train) & {*wording.dev, *wording.test} and not set(wording.dev) & set(wording.test)
    plain = re.sub(r"\{\w+\}", " ", " ".join((*wording.dev, *wording.test)))
    assert trained_words.issuperset(words(plain))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_id_suites_hold_unseen_scenes_with_nothing_held_out(split):
    drawings = captions.suite_drawings("geneval", split, "id", 8)
    assert [d.family for d in drawings] == [f for f in FAMILIES for _ in range(8)]
    assert all(bucket(d.scene) == split and not leaks(d.scene) and not text_leaks(d.prompt) for d in drawings)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_cg_suites_hold_exactly_their_own_combination_in_every_item(split):
    other = {"dev": "test", "test": "dev"}[split]
    row = {"colors": "pair", "color_attr": "pair", "position": "fact", "counting": "count", "two_object": "shapes"}
    drawings = captions.suite_drawings("geneval", split, "cg", 8)
    assert {d.family for d in drawings} == set(row)
    for item in drawings:
        assert held_out(item.scene, split) == {row[item.family]} and not held_out(item.scene, other)
        if item.family in ("colors", "counting"):
            assert text_leaks(item.prompt), "the prompt itself must name the combination"


def test_suites_are_frozen_varied_and_grow_without_changing():
    drawings = captions.suite_drawings("geneval", "test", "id", 16)
    for family in FAMILIES:
        mine = [d for d in drawings if d.family == family]
        assert len({d.prompt for d in mine}) == 16
    few = captions.suite_drawings("geneval", "test", "id", 4)
    assert few == [d for place, d in enumerate(drawings) if place % 16 < 4]


def test_paraphrases_show_the_same_scenes_in_the_held_out_forms():
    plain, other = captions.suite_drawings("geneval", "test", "id", 4), captions.paraphrase_drawings("test", 4)
    assert [scene_key(d.scene) for d in plain] == [scene_key(d.scene) for d in other]
    assert [d.metadata["include"] for d in plain] == [d.metadata["include"] for d in other]
    for item in other:
        assert any(skeleton(form).match(item.prompt) for form in captions.WORDINGS[item.family].test), item.prompt


def test_training_never_asks_a_held_out_chain_and_cg_asks_nothing_else():
    def has(program: tuple[str, ...], split: str) -> bool:
        found = tasks.chain(program)
        return any(
            found[start : start + len(part)] == part
            for part in tasks.HELD_OUT_CHAINS[split]
            for start in range(len(found))
        )

    made: Counter[str] = Counter()
    for index in range(200):
        scene, _ = understanding_task(13, index)
        for question in tasks.questions(scene, stream(index), most=20):
            assert not has(question.program, "dev") and not has(question.program, "test")
        for split in ("dev", "test"):
            for question in tasks.questions(scene, stream(index), split=split):
                assert has(question.program, split)
                made[split] += 1
    assert min(made.values()) > 200


def test_yes_and_no_are_balanced_in_every_kind_of_question():
    answers: dict[str, Counter[str]] = {}
    for index in range(1000):
        scene, _ = understanding_task(14, index)
        for question in tasks.questions(scene, stream(index), most=20):
            if question.answer in ("yes", "no"):
                answers.setdefault(question.kind, Counter())[question.answer] += 1
    assert set(answers) >= {*tasks.SUBTASKS, "logical", "compare"}
    for kind, counts in answers.items():
        assert 0.4 < counts["yes"] / counts.total() < 0.6, (kind, counts)


def test_one_word_answers_are_one_known_word_and_lists_name_every_object():
    for index in range(300):
        scene, pairs = understanding_task(15, index)
        (_, described), (_, listed), *asked = pairs
        for obj in scene.objects:
            assert str(obj) in described and str(obj) in listed
        assert listed.count(",") == len(scene.objects) - 1 and len(asked) + 1 >= 3
        assert all(len(words(answer)) == 1 for _, answer in asked)


def true_answer(scene: Scene, question: str) -> str | None:
    """An independent reading of the plainest questions; None for the others."""
    objects = [(t, str(t).split()) for t in scene.objects]
    if match := re.fullmatch(r"how many (\w+ )?(\w+) are (?:there|in the picture)\?", question):
        color, noun = (match[1] or "").strip(), match[2]
        shape = None if noun == "objects" else SHAPES[captions.PLURALS.index(noun)]
        return captions.NUMBERS[sum((not color or color in w) and shape in (None, w[2]) for _, w in objects)]
    if match := re.match(r"is there an? (?:(\w+) )?(\w+)(?: in the picture)?\?", question):
        return "yes" if any(match[2] == w[2] and match[1] in (None, w[1]) for _, w in objects) else "no"
    if match := re.fullmatch(r"what (color|shape|size) is the (.+)\?", question):
        named = [w for _, w in objects if set(match[2].split()) - {"object"} <= set(w)]
        return named[0][("size", "color", "shape").index(match[1])] if len(named) == 1 else None
    if match := re.match(r"is the (.+?) (left of|right of|above|below) the ([a-z ]+)\?", question):
        a, b = ([t for t, w in objects if set(m.split()) - {"object"} <= set(w)] for m in (match[1], match[3]))
        return ("no", "yes")[match[2] in relations(a[0], b[0])] if len(a) == len(b) == 1 else None
    return None


def test_answers_agree_with_an_independent_reading_of_the_picture():
    checked: Counter[str] = Counter()
    for index in range(800):
        scene, _ = understanding_task(16, index)
        for question in tasks.questions(scene, stream(index), most=20):
            answer = true_answer(scene, question.text)
            if answer is not None:
                assert answer == question.answer, (scene, question)
                checked[question.kind] += 1
    assert all(checked[kind] > 100 for kind in ("count", "existence", "query", "position")), checked


@pytest.mark.parametrize("subtask", tasks.SUBTASKS)
def test_a_no_question_is_a_minimal_change_of_the_yes_question(subtask):
    made = 0
    for index in range(300):
        scene, _ = understanding_task(17, index)
        pair = tasks.yes_no_pair(scene, stream(index), subtask, split="test")
        if pair is not None:
            yes, no = pair
            made += 1
            assert (yes.answer, no.answer) == ("yes", "no") and yes.program == no.program
            changed = set(words(yes.text)) ^ set(words(no.text))
            assert 0 < len(changed - {"a", "an", "is", "are", "of", "to", "the", "on", "side"}) <= 4
    assert made > 100


def test_bad_requests_name_the_argument():
    with pytest.raises(ConfigError, match="weights"):
        caption_task(0, 0, weights={"colour": 1.0})
    with pytest.raises(ConfigError, match="suite"):
        captions.suite_drawings("dpg", "test", "id")
    with pytest.raises(ConfigError, match="subtask"):
        tasks.yes_no_pair(caption_task(0, 0).scene, stream(0), "colour")
