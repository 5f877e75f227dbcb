"""Training conversations about several images: comparisons, riddles, and questions that name the image they ask about.

Nothing that is shown or said combines what `splits.WITHHELD` reserves for dev and test.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from starflow2.core.dialogue import Dialogue, Turn
from starflow2.world.multiple_choice import NAMINGS
from starflow2.world.riddles import riddle
from starflow2.world.sampling import sample_split_scene
from starflow2.world.scene import (
    BACKGROUND_NAMES,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    Scene,
    SceneDialogue,
    SceneTurn,
    chance,
    pick,
    shuffled,
)
from starflow2.world.splits import is_trainable, may_recolor, withheld
from starflow2.world.words import (
    NUMBERS,
    ORDINALS,
    PLURALS,
    Namer,
    article,
    kind_of,
    value_of,
    words_in,
    yes_or_no,
)

__all__ = ["several_images_dialogue", "several_images_words"]


def several_images_dialogue(rng: np.random.Generator) -> SceneDialogue:
    """A training conversation about two or three images, shown together or one by one.

    >>> len(several_images_dialogue(np.random.default_rng(0)).pictures) in (2, 3)
    True
    """
    make = pick(rng, (_conversation, _conversation, _comparison, _puzzle))
    return make(rng)


def _puzzle(rng: np.random.Generator) -> SceneDialogue:
    asked = riddle(rng, pick(rng, ("odd", "turns", "together", "next")))
    return Dialogue(turns=(Turn((*asked.scenes, asked.text), (asked.reply,)),), kind="pictures")


def _comparison(rng: np.random.Generator) -> SceneDialogue:
    """Two images that differ in one object or not at all."""
    before, after, change = _changed(rng)
    if is_same := chance(rng, 0.4):
        after, change = before, "nothing."
    same = ("are the two pictures the same?", yes_or_no(is_same))
    changed = ("what changed?", change)
    first, *more = shuffled(rng, [same, changed])
    return Dialogue(turns=(*_shown(rng, (before, after), first), *_later(more)), kind="pictures")


def _changed(rng: np.random.Generator) -> tuple[Scene, Scene, str]:
    """A scene, that scene with one object recoloured, removed or added, and a sentence that tells the change."""
    operation = pick(rng, ("recolor", "recolor", "remove", "add"))
    while True:
        scene = sample_split_scene(rng, num_objects=int(rng.integers(1 + (operation != "recolor"), MAX_OBJECTS + 1)))
        index = int(rng.integers(len(scene.objects)))
        obj = scene.objects[index]
        if sum(kind_of(other) == kind_of(obj) for other in scene.objects) > 1:
            continue
        if operation == "recolor":
            color = int(rng.integers(len(COLORS)))
            objects = [replace(other, color=color) if other is obj else other for other in scene.objects]
            change = f"the {kind_of(obj)} is {COLORS[color]} now."
            is_allowed = may_recolor(obj.color, color) and withheld().allows_pair(obj.shape, color)
        else:
            objects, is_allowed = [other for other in scene.objects if other is not obj], True
            change = f"the {kind_of(obj)} is gone." if operation == "remove" else f"there is a new {kind_of(obj)}."
        changed = replace(scene, objects=tuple(objects))
        if is_allowed and is_trainable(changed):
            return (changed, scene, change) if operation == "add" else (scene, changed, change)


def _conversation(rng: np.random.Generator) -> SceneDialogue:
    """Two or three images, and questions about one or two of them."""
    scenes = tuple(sample_split_scene(rng) for _ in range(2 + chance(rng, 0.3)))
    asked = [_about_images(rng, scenes) for _ in range(3 + chance(rng, 0.5))]
    first, *more = dict(asked).items()
    return Dialogue(turns=(*_shown(rng, scenes, first), *_later(more)), kind="pictures")


def _later(asked: Sequence[tuple[str, str]]) -> list[SceneTurn]:
    return [Turn((question,), (answer,)) for question, answer in asked]


def _shown(rng: np.random.Generator, scenes: Sequence[Scene], asked: tuple[str, str]) -> list[SceneTurn]:
    """Turns that show the images and ask the question: all images at once, or one by one with a question about each."""
    question, answer = asked
    if chance(rng, 0.5):
        parts: tuple[str | Scene, ...] = (*scenes, question)
        return [Turn(parts, (answer,))]
    turns = []
    for scene in scenes:
        counts = "how many objects are in the picture?", NUMBERS[len(scene.objects)]
        tint = "what color is the background?", BACKGROUND_NAMES[scene.background]
        own_question, own_answer = pick(rng, (counts, tint))
        turns.append(Turn((scene, own_question), (own_answer,)))
    return [*turns, Turn((question,), (answer,))]


def _about_images(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str]:
    while True:
        asked = pick(rng, (_ask_more, _ask_there, _ask_value, _ask_count))(rng, scenes)
        if asked is not None:
            return asked


def _which_image(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[int, str]:
    """Index of a random image and the ordinal that names it; the last one is called "last" half of the time."""
    index = int(rng.integers(len(scenes)))
    return index, "last" if index == len(scenes) - 1 and chance(rng, 0.5) else ORDINALS[index]


def _ask_more(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    a, b = sorted(rng.permutation(len(scenes))[:2].tolist())
    objects = [t for scene in (scenes[a], scenes[b]) for t in scene.objects]
    obj = pick(rng, objects)
    words, attribute = pick(
        rng, (("objects", None), (PLURALS[obj.shape], "shape"), (f"{COLORS[obj.color]} objects", "color"))
    )
    counts = [
        len(scenes[i].objects)
        if attribute is None
        else sum(value_of(t, attribute) == value_of(obj, attribute) for t in scenes[i].objects)
        for i in (a, b)
    ]
    if counts[0] == counts[1]:
        return None
    answer = ORDINALS[a if counts[0] > counts[1] else b]
    return f"which picture has more {words}, the {ORDINALS[a]} or the {ORDINALS[b]}?", answer


def _ask_there(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    """A question whether something is in one image; if the answer is "no", it is in another."""
    index, name = _which_image(rng, scenes)
    is_yes = chance(rng, 0.5)
    has_color = chance(rng, 0.5)
    words = [{kind_of(t) if has_color else SHAPES[t.shape] for t in scene.objects} for scene in scenes]
    here = words.pop(index)
    elsewhere = set().union(*words) - here
    pool = sorted(here if is_yes else elsewhere)
    if not pool:
        return None
    return f"is there {article(pick(rng, pool))} in the {name} picture?", yes_or_no(is_yes)


def _ask_value(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    index, name = _which_image(rng, scenes)
    attribute = pick(rng, ("color", "color", "shape", "size"))
    found = Namer(scenes[index], rng, NAMINGS).named_object(hide=attribute)
    if found is None:
        return None
    return f"what {attribute} is {found[1]} in the {name} picture?", value_of(found[0], attribute)


def _ask_count(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    index, name = _which_image(rng, scenes)
    objects = scenes[index].objects
    if chance(rng, 0.5):
        return f"how many objects are in the {name} picture?", NUMBERS[len(objects)]
    shape = pick(rng, [t.shape for scene in scenes for t in scene.objects])
    count = sum(t.shape == shape for t in objects)
    if count == 1 and chance(rng, 0.6):  # the commonest count by far
        return None
    return f"how many {PLURALS[shape]} are in the {name} picture?", NUMBERS[count]


@functools.cache
def several_images_words() -> frozenset[str]:
    """Every word of the questions and answers here beside `questions.known_words` and `riddles.riddle_words`."""
    return words_in(["are the two pictures same what changed nothing is gone there a new now first second third last"])
