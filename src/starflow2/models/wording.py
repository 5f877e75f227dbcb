"""English for a model with a small vocabulary: other spellings and synonyms become words that it knows.

A word that the model knows is never touched. `respelled` is applied to every text before it is tokenized (prompts);
`hint` says which words of the same class the model does know. Our choice: docs/choices.md#wording.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

from starflow2.errors import nearest

__all__ = ["classes_of", "contradiction", "hint", "kinds_of_words", "plural_of", "respelled", "words_of"]


def plural_of(shape: str) -> str:
    """The plural of a shape's name.

    >>> plural_of("star"), plural_of("cross")
    ('stars', 'crosses')
    """
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


_NUMBERS: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white", "gray", "brown")
_OTHER_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {str(i): word for i, word in enumerate(_NUMBERS)}
    | {"colour": "color", "colours": "colors", "grey": "gray", "coloured": "", "colored": ""}
    | {"big": "large", "huge": "large", "giant": "large", "bigger": "larger", "little": "small", "tiny": "small"}
    | {"disc": "circle", "disk": "circle", "dot": "circle", "ball": "circle", "plus": "cross", "rhombus": "diamond"}
    | {"discs": "circles", "disks": "circles", "dots": "circles", "balls": "circles", "pluses": "crosses"}
    | {"photograph": "photo", "drawing": "picture", "sketch": "picture", "pic": "picture", "canvas": "picture"}
    | {"thing": "object", "things": "objects", "item": "object", "items": "objects", "shapes": "objects"}
    | {"create": "make", "insert": "add", "push": "move", "shift": "move", "recolor": "paint", "transform": "turn"}
    | {"painting": "picture", "showing": "with", "beside": "next to", "you'd": "you", "i'd": "i would"}
    | {"another": "a", "single": "one", "underneath": "below", "atop": "above", "center": "middle", "centre": "middle"}
    | {"top-left": "upper left", "top-right": "upper right", "bottom-left": "lower left", "bottom-right": "lower right"}
    | {"what's": "what is", "where's": "where is", "there's": "there is", "it's": "it is", "how's": "how is"}
)
_AFTER_PLUS: Final = f"a|an|the|large|big|small|{'|'.join(_NUMBERS)}|[0-9]+|{'|'.join(_COLORS)}"
_PHRASES: Final = tuple(  # in this order: what is written, and what it means
    (re.compile(rf"(?<![^\s]){pattern}(?![^\s.,;:!?])"), meaning)
    for pattern, meaning in (
        (rf"plus(?= (?:{_AFTER_PLUS})(?![^\s]))", "and"),  # elsewhere a shape
        (r"as well as", "and"),
        (r"as well", ""),
        (r"(?:can|could|would|will) you(?: please)?", "please"),
        (r"i(?:'d| would)? (?:want|need|like|love) you to", "please"),
        (r"i(?:'d| would)? (?:want|need|like|love)(?: to (?:see|have|get))?", "show"),
        (r"let me see", "show"),
        (r"(?:get rid of|throw (?:away|out)|do away with)", "remove"),
        (r"(?<=left )corner|(?<=right )corner", ""),
        (r"(?:replace|swap) ([^.,;]+?) (?:with|by|for) ([^.,;]+)", r"turn \1 into \2"),
    )
)
_FILLERS: Final = frozenset(
    {"me", "us", "just", "really", "very", "nice", "pretty", "kindly", "hey", "hello", "hi"}
    | {"also", "then", "only", "simply", "instead"}
)
_MARKS: Final = str.maketrans(dict.fromkeys('"“”„«»()[]{}*_`', " ") | {"’": "'", "‘": "'"})

_CLASSES: Final[Mapping[str, str]] = MappingProxyType(  # common English, most of which a model does not know
    {
        "colours": f"{' '.join(_COLORS)} violet cyan magenta turquoise teal "
        "gold golden silver beige maroon navy indigo lime olive coral crimson scarlet salmon lavender mint cream amber",
        "shapes": "circle square triangle star heart ring cross diamond rectangle oval ellipse hexagon pentagon "
        "octagon line arrow moon crescent cube sphere cylinder cone pyramid trapezoid spiral clover flower sun cloud",
        "sizes": "large small medium enormous gigantic miniature wide tall narrow",
        "numbers": f"{' '.join(_NUMBERS)} dozen twenty hundred thousand many several few",
        "places": "left right above below top bottom middle upper lower between inside outside behind near beside",
    }
)
_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {word: f"<{name}>" for name in ("colours", "shapes", "sizes", "numbers") for word in _CLASSES[name].split()}
    | {plural_of(word): "<shapes>s" for word in _CLASSES["shapes"].split()}
    | {"one": "one", "an": "a", "sky": "<colours>"}
)
_LIKENESS: Final = 0.8  # of a word to one that it is offered for; below, spelling alone misleads ("violet", "let")


def words_of(text: str) -> list[str]:
    """The lower-case words of a text, without punctuation."""
    return re.findall(r"[^\s.,;:!?]+", text.lower())


def _pieces(text: str) -> list[str]:
    """The words and the punctuation of a text."""
    return re.findall(r"[^\s.,;:!?]+|[.,;:!?]", text)


def respelled(text: str, vocabulary: Collection[str]) -> str:
    """The text in lower case, with unknown words replaced by known ones that mean the same.

    Quotes and brackets go, hyphens part words, digits become words, phrases such as "could you" become one known word,
    and fillers such as "me" fall away.

    >>> respelled('Draw me "2 big grey hearts".', {"draw", "two", "large", "gray", "hearts"})
    'draw two large gray hearts.'
    """
    text = text.lower().translate(_MARKS)
    for pattern, meaning in _PHRASES:
        text = pattern.sub(partial(_meant, meaning=meaning, vocabulary=vocabulary), text)
    pieces = _pieces(text)
    words: list[str] = []
    for piece in pieces:
        if re.fullmatch(r"[.,;:!?]", piece):
            words[-1:] = [words[-1] + piece] if words else []
        else:
            words += _known(piece, vocabulary)
    return " ".join(words)


def _meant(phrase: re.Match[str], meaning: str, vocabulary: Collection[str]) -> str:
    """A phrase in known words; as it is where all its words are known, or those of its meaning are not."""
    kept = words_of(" ".join(phrase.groups()))
    has_unknown = any(word not in vocabulary and word not in kept for word in words_of(phrase[0]))
    is_known = all(word in vocabulary for word in words_of(re.sub(r"\\\d", "", meaning)))
    return phrase.expand(meaning) if has_unknown and is_known else phrase[0]


def _known(word: str, vocabulary: Collection[str]) -> list[str]:
    """Known words for one word; the word itself where there are none."""
    if word in vocabulary:
        return [word]
    bare = word.strip("'")
    if bare in _FILLERS:
        return []
    other = _OTHER_WORDS.get(bare)
    if other is not None and all(part in vocabulary for part in other.split()):
        return other.split()
    if bare in vocabulary:
        return [bare]
    parts = [part for part in re.split("[-/–—]", bare) if part]
    return [known for part in parts for known in _known(part, vocabulary)] if len(parts) > 1 else [word]


def classes_of(vocabulary: Collection[str]) -> dict[str, list[str]]:
    """The known words of each class, such as colours.

    >>> classes_of({"red", "star", "two", "let"})
    {'colours': ['red'], 'shapes': ['star'], 'numbers': ['two']}
    """
    known = {name: [word for word in members.split() if word in vocabulary] for name, members in _CLASSES.items()}
    return {name: words for name, words in known.items() if words}


def kinds_of_words(text: str) -> list[str]:
    """The words of a text, with colours, shapes, sizes and numbers above one as their kinds.

    >>> kinds_of_words("Two red hearts and an odd star.")
    ['<numbers>', '<colours>', '<shapes>s', 'and', 'a', 'odd', '<shapes>']
    """
    return [_KINDS.get(word, word) for word in words_of(text)]


def contradiction(text: str) -> str:
    """The first words of a text that give one object two colours, sizes or numbers; "" where none do.

    Only words that stand directly before a shape are looked at, without a comma between them.

    >>> contradiction("a star and a small red blue circle"), contradiction("a blue star, red background")
    ('red blue circle', '')
    """
    pieces = _pieces(text.lower())
    described: dict[str, list[str]] = {}  # by kind, the words since the last one that does not describe an object
    for piece in pieces:
        kind = "<numbers>" if piece == "one" else _KINDS.get(piece, "")
        if kind in ("<colours>", "<sizes>", "<numbers>"):
            described.setdefault(kind, []).append(piece)
            continue
        apart = [words for words in described.values() if len(set(words)) > 1]
        if apart and kind.startswith("<shapes>"):
            return " ".join([*dict.fromkeys(apart[0]), piece])
        described = {}
    return ""


def hint(word: str, vocabulary: Collection[str]) -> str:
    """A sentence about an unknown word, with a space before it: known words of its class, or one spelt much like it.

    >>> hint("violet", {"red", "blue", "let"})
    ' Colours it knows: red, blue.'
    """
    for name, known in classes_of(vocabulary).items():
        is_member = {word, word.removesuffix("s")} & {*_CLASSES[name].split()} or (name == "numbers" and word.isdigit())
        if is_member:
            return f" {name.capitalize()} it knows: {', '.join(known)}."
    return nearest(word, vocabulary, cutoff=_LIKENESS) if len(word) > 3 else ""  # short words resemble any
