"""Requests for edits: the plain sentence forms of suites, and the grammar by which training words any edit.

The grammar calls an object by name or "it", several at once ("both hearts", "everything"), leaves places open, and
surrounds requests with fillers and questions; a form that `EDIT_WORDINGS` reserves for dev or test is never drawn.
Our choice: docs/choices.md#world.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from starflow2.world.edit_operations import EditStep, Operation, names_in
from starflow2.world.grammar import PLACE_WORDS, SIDE_WORDS, Requests, request_words, several_words, with_synonyms
from starflow2.world.scene import BACKGROUND_NAMES, COLORS, SHAPES, SIZES, Bucket, SceneObject, pick
from starflow2.world.words import NUMBERS, PLURALS, Wording, article, words_in

__all__ = ["EDIT_WORDINGS", "edit_words", "instruction", "plain_request"]

# -------------------------------------------------------------------------------------------- words

EDIT_WORDINGS: Final[Mapping[Operation, Wording]] = MappingProxyType(  # {a} the object, {v} its new value
    {
        "recolor": Wording(
            train=(
                "make {a} {v}",
                "turn {a} {v}",
                "paint {a} {v}",
                "change {a} to {v}",
                "change the color of {a} to {v}",
                "please make {a} {v}",
            ),
            dev=("let {a} be {v}", "give {a} a {v} color"),
            test=("{a} should be {v}", "please paint {a} in {v}", "draw {a} again in {v}"),
        ),
        "reshape": Wording(
            train=(
                "turn {a} into {v}",
                "change {a} into {v}",
                "make {a} into {v}",
                "make {a} {v}",
                "change the shape of {a} to {v}",
                "please turn {a} into {v}",
            ),
            dev=("let {a} become {v}", "give {a} the shape of {v}"),
            test=("{a} should be {v}", "please change {a} to {v}", "draw {a} again as {v}"),
        ),
        "resize": Wording(  # {more} is "larger" or "smaller"
            train=(
                "make {a} {v}",
                "make {a} {more}",
                "change {a} to {v}",
                "change the size of {a} to {v}",
                "please make {a} {v}",
            ),
            dev=("let {a} be {v}", "give {a} a {v} size"),
            test=("{a} should be {v}", "please paint {a} {v}", "draw {a} again but {v}"),
        ),
        "move": Wording(
            train=("move {a} {v}", "shift {a} {v}", "bring {a} {v}", "take {a} {v}", "please move {a} {v}"),
            dev=("let {a} go {v}", "change the place of {a}, move it {v}"),
            test=("{a} should move {v}", "please shift {a} {v}", "take {a} and move it {v}"),
        ),
        "add": Wording(  # {v} the new object, {at} its place
            train=("add {v} {at}", "put {v} {at}", "place {v} {at}", "{at} add {v}", "please add {v} {at}"),
            dev=("let there be {v} {at}", "{at} draw {v} too"),
            test=("there should be {v} {at}", "please put {v} {at}", "{at} there should be {v}"),
        ),
        "remove": Wording(
            train=(
                "remove {a}",
                "delete {a}",
                "erase {a}",
                "take away {a}",
                "remove {a} from the picture",
                "please remove {a}",
            ),
            dev=("let {a} go away", "make the picture without {a}"),
            test=("{a} should go", "please take {a} away", "take {a} out of the picture"),
        ),
        "background": Wording(
            train=(
                "change the background to {v}",
                "make the background {v}",
                "turn the background {v}",
                "paint the background {v}",
                "use a {v} background",
                "please make the background {v}",
            ),
            dev=("let the background be {v}", "give the picture a {v} background"),
            test=("the background should be {v}", "please use {v} for the background", "draw the background in {v}"),
        ),
    }
)
_REQUESTS: Final[Mapping[Operation, Requests]] = MappingProxyType(  # of training, besides the plain forms above
    {
        "recolor": Requests.of(
            EDIT_WORDINGS["recolor"],
            (
                "(make|turn|paint|color|recolor) {a} {v}",
                "(change|turn|set) {a} to {v}",
                "change the color of {a} [from {old}] to {v}",
                "(change|turn) {a} (into {v}|from {old} to {v})",
                "make {a} {v} instead [of {old}]",
                "make the color of {a} {v}",
                "give {a} the color {v}",
            ),
            ("i want {a} to be {v}", "i would like {a} in {v}", "{a} in {v}"),
        ),
        "reshape": Requests.of(
            EDIT_WORDINGS["reshape"],
            (
                "(turn|change|make|transform) {a} into {v}",
                "replace {a} (with|by) {v}",
                "swap {a} for {v}",
                "make {a} {v} [instead]",
                "put {v} in place of {a}",
                "change the shape of {a} to {v}",
            ),
            ("i want {v} instead of {a}", "{v} instead of {a}", "{one} becomes {v}"),
        ),
        "resize": Requests.of(
            EDIT_WORDINGS["resize"],
            (
                "make {a} [a bit|much] {more}",
                "make {a} {v}",
                "(change|set) {a} to {v}",
                "change the size of {a} to {v}",
                "turn {a} {v}",
                "draw {a} {more}",
            ),
            ("i want {a} {more}", "{a} {more}", "i would like {a} to be {v}"),
        ),
        "move": Requests.of(
            EDIT_WORDINGS["move"],
            ("(move|shift|bring|take|push|put|place) {a} {v}", "(move|put) {a} {v} [of the picture|in the picture]"),
            ("i want {a} {v}", "{one} goes {v}"),
        ),
        "add": Requests.of(  # with a place, without one, or beside an object
            EDIT_WORDINGS["add"],
            ("(add|put|place|draw|paint|insert|create) {v} {at}", "add {v} too, {at}"),
            (
                "{at} (add|put|place|draw) {v}",
                "i want {v} {at}",
                "there is {v} {at} now",
                "{v} {at} too",
                "and {v} {at}",
            ),
        ),
        "remove": Requests.of(
            EDIT_WORDINGS["remove"],
            (
                "(remove|delete|erase|drop) {a} [from the picture]",
                "take away {a}",
                "get rid of {a}",
                "(take|throw) {a} out",
                "make {a} go away",
                "leave out {a}",
            ),
            ("i do not want {a}", "no {bare}", "without {a}", "{one} has to go"),
        ),
        "background": Requests.of(
            EDIT_WORDINGS["background"],
            (
                "(make|turn|paint|color) the background {v}",
                "(change|set) the background [color] to {v}",
                "(use|make|put|add) a {v} background",
                "change the color of the background to {v}",
                "put (it|everything) on a {v} background",
            ),
            ("{v} background", "i want a {v} background", "on a {v} background"),
        ),
    }
)
_FREE_ADD: Final = Requests(
    (),
    ("add {v}", "please add {v}"),
    (
        "(add|draw|paint|put in|insert|create) {v} [too]",
        "add {v} to (the picture|it)",
        "put {v} in the picture [too]",
        "draw {v} as well",
        "add {v} somewhere",
    ),
    ("i want {v} too", "i also want {v}", "and {v}", "there should also be {v}", "now with {v}", "{v} as well"),
)
_GOALS: Final = (  # the nine places, row by row, then the four directions
    "to the upper left", "to the top", "to the upper right",
    "to the left side", "to the middle", "to the right side",
    "to the lower left", "to the bottom", "to the lower right",
    "left by a third", "right by a third", "up by a third", "down by a third",
)  # fmt: skip
_PLACES: Final = (
    "in the upper left", "at the top", "in the upper right",
    "on the left side", "in the middle", "on the right side",
    "in the lower left", "at the bottom", "in the lower right",
)  # fmt: skip
_GOAL_WORDS: Final = (  # of training, by place and direction
    ("to the upper left", "to the top left", "to the upper left corner", "into the top left corner"),
    ("to the top", "up to the top"),
    ("to the upper right", "to the top right", "to the upper right corner", "into the top right corner"),
    ("to the left side", "all the way to the left"),
    ("to the middle", "to the center", "into the middle"),
    ("to the right side", "all the way to the right"),
    ("to the lower left", "to the bottom left", "to the lower left corner", "into the bottom left corner"),
    ("to the bottom", "down to the bottom"),
    ("to the lower right", "to the bottom right", "to the lower right corner", "into the bottom right corner"),
    ("left by a third", "to the left", "left", "further left"),
    ("right by a third", "to the right", "right", "further right"),
    ("up by a third", "up", "further up", "higher"),
    ("down by a third", "down", "further down", "lower"),
)
_COMPARED: Final = ("smaller", "larger")


def edit_words() -> frozenset[str]:
    """Every word that any instruction can contain.

    >>> {"erase", "should", "mint", "third"} <= edit_words()
    True
    """
    forms = [form for w in EDIT_WORDINGS.values() for form in (*w.train, *w.dev, *w.test)]
    forms += [form for requests in (*_REQUESTS.values(), _FREE_ADD) for form in requests.forms]
    places = [
        words
        for table in (_GOAL_WORDS, *(tuple(t.values()) for t in (PLACE_WORDS, SIDE_WORDS)))
        for row in table
        for words in row
    ]
    values = (*_COMPARED, *SIZES, *COLORS, *SHAPES, *PLURALS, *BACKGROUND_NAMES, *NUMBERS)
    return words_in((*forms, *_GOALS, *_PLACES, *places, *values, "the a an it")) | request_words()


# ---------------------------------------------------------------------------------------- plain forms


def instruction(step: EditStep, rng: np.random.Generator, wording: Bucket) -> str:
    """The request for an edit of one object at a named place, by one of the plain sentence forms of that split."""
    form = pick(rng, EDIT_WORDINGS[step.operation].forms(wording))
    name = {} if step.before is None else {"a": pick(rng, names_in(step.source, step.before))}
    return form.format(**name, **_fields(step))


def _fields(step: EditStep) -> dict[str, str]:
    """Fields of a sentence form, without the name of the object."""
    value = step.value
    if step.operation == "add":
        return {"v": f"a {step.target.objects[-1]}", "at": _PLACES[value]}
    if step.operation == "resize":
        return {"v": SIZES[value], "more": _COMPARED[value]}
    words = {
        "recolor": COLORS,
        "reshape": tuple(article(shape) for shape in SHAPES),
        "move": _GOALS,
        "background": BACKGROUND_NAMES,
    }.get(step.operation)
    return {"v": words[value]} if words else {}


# ---------------------------------------------------------------------------------------- the grammar


def plain_request(step: EditStep, rng: np.random.Generator, *, is_it: bool = False) -> str:
    """The request for any edit in a random wording of training's grammar. is_it: the changed object is called "it"."""
    if step.operation == "add":
        return with_synonyms(_request_to_add(step, rng), rng)
    fields = _fields(step)
    if step.operation == "move":
        fields["v"] = pick(rng, _GOAL_WORDS[step.value])
    if step.also:
        fields["a"] = several_words([step.source.objects[i].shape for i in step.changed], rng)
        if step.operation == "reshape":
            fields["v"] = PLURALS[step.value]
    elif step.before is not None:
        name = "it" if is_it else pick(rng, names_in(step.source, step.before))
        fields |= {"a": name, "one": name}
        if not is_it:
            fields["bare"] = name.removeprefix("the ")
        if step.operation == "recolor":
            fields["old"] = COLORS[step.source.objects[step.before].color]
    return with_synonyms(_REQUESTS[step.operation].say(rng, fields), rng)


def _request_to_add(step: EditStep, rng: np.random.Generator) -> str:
    new = article(_looks(step.target.objects[-1], names_size=step.names_size))
    if step.beside is not None:
        relation, index = step.beside
        at = f"{pick(rng, SIDE_WORDS[relation])} {pick(rng, names_in(step.source, index))}"
    elif step.is_free:
        return _FREE_ADD.say(rng, {"v": new})
    else:
        row, column = divmod(step.value, 3)
        at = pick(rng, PLACE_WORDS[row, column])
    return _REQUESTS["add"].say(rng, {"v": new, "at": at})


def _looks(obj: SceneObject, *, names_size: bool) -> str:
    size = [SIZES[obj.size]] if names_size else []
    return " ".join([*size, COLORS[obj.color], SHAPES[obj.shape]])
