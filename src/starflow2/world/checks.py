"""Questions by which a model checks pictures: does one show a caption, was a request done and nothing else changed.

Half of the pictures are wrong in one point: as drawings go wrong (the second shape like the first, a colour or a side
exchanged, one object too many), or because an edit did nothing, something else, or too much. The picture stands where
the model's own drawing would stand, as the reply to the prompt, or is shown by the user; no drawing is trained here.
What `truth` says is exact. Nothing that is shown or said combines what `splits` withholds.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.core.dialogue import Dialogue, Turn
from starflow2.world.captions import random_caption
from starflow2.world.content import Content, scene_of, shows, wrong_content
from starflow2.world.edit_operations import OPERATIONS, EditStep, Operation, propose_steps
from starflow2.world.edits import may_train, random_edit
from starflow2.world.grammar import say
from starflow2.world.scene import Scene, SceneDialogue, SceneTurn, chance, pick, relations, stream
from starflow2.world.stories import random_story
from starflow2.world.words import words_in, yes_or_no

__all__ = ["check_dialogue", "check_words", "done_question", "is_done", "shows_question"]

_CHECK: Final = 50  # third number of a stream, so that no other task repeats its draws
_SHOWS: Final = "does the picture show {caption}?"
_DONE: Final = "was {request} done, and nothing else changed?"
_KINDS: Final[Mapping[str, float]] = MappingProxyType({"drawing": 0.6, "edit": 0.28, "story": 0.12})
_FAMILIES: Final[Mapping[str, float]] = MappingProxyType(
    {
        "single_object": 0.03,
        "two_object": 0.2,
        "counting": 0.16,
        "colors": 0.06,
        "position": 0.17,
        "color_attr": 0.16,
        "mixed": 0.07,
        "many": 0.05,
        "placed": 0.07,
        "sized": 0.03,
    }
)
_SPOILING: Final[tuple[Operation, ...]] = ("recolor", "reshape", "add", "remove")  # a move or a size may be open
_IN_PLACE: Final = 0.65  # share of pictures that stand where the model's own would stand
_TRIES: Final = 12  # wrong pictures tried for one right one


def shows_question(prompt: str) -> str:
    """Question whether a picture shows what a prompt asks for.

    >>> shows_question("Draw a red star.".lower())
    'does the picture show draw a red star?'
    """
    return _SHOWS.format(caption=_without_stop(prompt))


def done_question(request: str) -> str:
    """Question whether a picture is the last one with a request done and nothing else changed.

    >>> done_question("make it blue.")
    'was make it blue done, and nothing else changed?'
    """
    return _DONE.format(request=_without_stop(request))


def _without_stop(text: str) -> str:
    return text.rstrip(" .?!")


# ------------------------------------------------------------------------------------------------ drawings


def _drawing(rng: np.random.Generator) -> SceneDialogue:
    """A prompt, a picture that is right or nearly so, and whether it shows this and other captions."""
    family = str(rng.choice(list(_FAMILIES), p=list(_FAMILIES.values())))
    item = random_caption(rng, family)
    truth, scene = item.content, item.scene
    if chance(rng, 0.5):
        truth, scene = _nearly(item.content, rng) or (truth, scene)
    asked = [(item.prompt, item.content)]
    for _ in range(int(rng.integers(1, 4))):
        content = truth if chance(rng, 0.5) else _caption_beside(truth, scene, rng)
        if content is not None and _is_natural(content):
            asked.append((say(content, rng), content))
    questions = [(shows_question(text), yes_or_no(shows(scene, content))) for text, content in asked]
    if chance(rng, _IN_PLACE):
        return _conversation([Turn((item.prompt,), (scene,), learns=False)], questions)
    (first, answer), *more = questions
    return _conversation([Turn((scene, first), (answer,))], more)


def _nearly(content: Content, rng: np.random.Generator) -> tuple[Content, Scene] | None:
    """Another content with a scene of it that does not show this one."""
    for _ in range(_TRIES):
        found = wrong_content(content, rng)
        scene = scene_of(found[1], rng) if found else None
        if found and scene is not None and not shows(scene, content):
            return found[1], scene
    return None


def _caption_beside(truth: Content, scene: Scene, rng: np.random.Generator) -> Content | None:
    """A content that is nearly true of a scene."""
    for _ in range(_TRIES):
        found = wrong_content(truth, rng)
        if found and _is_natural(found[1]) and not shows(scene, found[1]):
            return found[1]
    return None


def _is_natural(content: Content) -> bool:
    """True if no two groups are called the same: people say "two stars", not "a star and a star"."""
    looks = [(group.shape, group.color, group.size) for group in content.groups]
    return len(set(looks)) == len(looks)


def _conversation(shown: list[SceneTurn], asked: list[tuple[str, str]]) -> SceneDialogue:
    return Dialogue((*shown, *(Turn((question,), (answer,)) for question, answer in asked)), "check")


# ------------------------------------------------------------------------------------------------ edits


def is_done(step: EditStep, result: Scene) -> bool:
    """True if a scene is the step's source with the step done and nothing else changed.

    Where the place of an added object is open, any is right that fits what was asked for.

    >>> step = random_edit(stream(0)).step
    >>> is_done(step, step.target), is_done(step, step.source)
    (True, False)
    """
    if not step.is_free:
        return set(result.objects) == set(step.target.objects) and result.background == step.target.background
    new = [obj for obj in result.objects if obj not in step.source.objects]
    is_kept = len(result.objects) == len(step.source.objects) + 1 and result.background == step.source.background
    if len(new) != 1 or not is_kept:
        return False
    asked, names = step.target.objects[-1], ("shape", "color", *["size"] * step.names_size)
    fits = all(getattr(new[0], name) == getattr(asked, name) for name in names)
    return fits and (step.beside is None or step.beside[0] in relations(new[0], step.source.objects[step.beside[1]]))


def _edit(rng: np.random.Generator) -> SceneDialogue:
    """A source, a request, and a result that is right, or wrong in one point."""
    edit = random_edit(rng)
    result = _wrong_result(edit.step, rng) if chance(rng, 0.5) else edit.target
    question, answer = done_question(edit.instruction), yes_or_no(is_done(edit.step, result))
    if chance(rng, _IN_PLACE):
        return _conversation([Turn((edit.source, edit.instruction), (result,), learns=False)], [(question, answer)])
    return _conversation([Turn((edit.source, result, question), (answer,))], [])


def _wrong_result(step: EditStep, rng: np.random.Generator) -> Scene:
    """The source as it was, another edit of the same kind, or the right result with something else changed."""
    kind = rng.random()
    start, operations = (step.source, (step.operation,)) if kind < 0.5 else (step.target, OPERATIONS)
    if kind > 0.15:
        for _ in range(3):
            scene = _changed(start, pick(rng, operations), rng)
            if scene is not None and not is_done(step, scene):
                return scene
    return step.source


def _changed(scene: Scene, operation: Operation, rng: np.random.Generator) -> Scene | None:
    """The scene after a random edit that training may show."""
    steps = itertools.islice(propose_steps(rng, scene, operation, "train"), 4)
    return next((step.target for step in steps if may_train(step)), None)


# ------------------------------------------------------------------------------------------------ stories


def _story(rng: np.random.Generator) -> SceneDialogue:
    """The first steps of a story, the last picture of which is right or not."""
    steps = random_story(rng).steps[: int(rng.integers(2, 5))]
    last, right = steps[-1], steps[-1].scene
    wrong = None
    if chance(rng, 0.5):
        wrong = steps[-2].scene if chance(rng, 0.2) else _changed(right, pick(rng, _SPOILING), rng)
    shown = [Turn((step.instruction,), (step.sentence, step.scene), learns=False) for step in steps[:-1]]
    turn = Turn((last.instruction,), (last.sentence, wrong or right), learns=False)
    return _conversation([*shown, turn], [(done_question(last.instruction), yes_or_no(wrong is None))])


_MAKE: Final[Mapping[str, Callable[[np.random.Generator], SceneDialogue]]] = MappingProxyType(
    {"drawing": _drawing, "edit": _edit, "story": _story}
)


def check_dialogue(seed: int, index: int) -> SceneDialogue:
    """Training conversation number `index` of questions about what a picture shows or what was changed.

    >>> check_dialogue(0, 3).turns[-1].assistant[0] in ("yes", "no")
    True
    """
    rng = stream(seed, index, _CHECK)
    return _MAKE[str(rng.choice(list(_KINDS), p=list(_KINDS.values())))](rng)


def check_words() -> frozenset[str]:
    """Every word of these questions beside the captions and requests in them."""
    return words_in([_SHOWS, _DONE, "yes no"])
