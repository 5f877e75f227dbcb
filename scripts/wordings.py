"""Write src/starflow2/assets/wordings.json: how the sentences of nano's training run, by task.

    python scripts/wordings.py            # about two minutes
    python scripts/wordings.py --check    # also: how many sentences of other seeds would be noted

Sentences are read as the shipped model reads them, and as they are. Of those whose kinds of words differ, the first
EXAMPLES are kept whole.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice

from starflow2.core.dialogue import Turn, pictures
from starflow2.models.checkpoint import load_words
from starflow2.models.hub import NANO
from starflow2.models.prompts import normalized
from starflow2.models.trained_wordings import WORDINGS_FILE, Form, Wordings, pairs_of
from starflow2.models.wording import kinds_of_words
from starflow2.training.nano_mixes import NANO_DRAWINGS, NANO_TALK
from starflow2.world.captions import caption_task
from starflow2.world.conversations import understanding_dialogue
from starflow2.world.edits import edit_task
from starflow2.world.scene import Scene
from starflow2.world.stories import story_dialogue, story_task

COUNT, CHECKED, EXAMPLES = 16_000, 1_000, 160  # sentences of a task; of other seeds; kept whole


def drawings(seed: int) -> Iterator[str]:
    """Captions of stage joint."""
    shares = asdict(NANO_DRAWINGS)
    return (caption_task(seed, index, weights=shares).prompt for index in range(10**9))


def edits(seed: int) -> Iterator[str]:
    """Edits, and every fourth time the requests of a story."""
    for index in range(10**9):
        yield edit_task(seed, index).instruction
        if index % 4 == 0:
            turns = story_dialogue(story_task(seed, index)).turns
            yield from _said(turn for turn in turns if pictures(turn.assistant))


def questions(seed: int) -> Iterator[str]:
    """The user's words of conversations about images."""
    for index in range(10**9):
        yield from _said(understanding_dialogue(seed, index, weights=asdict(NANO_TALK)).turns)


def _said(turns: Iterable[Turn[Scene]]) -> Iterator[str]:
    return (part for turn in turns for part in turn.user if isinstance(part, str))


TASKS: dict[Form, Callable[[int], Iterator[str]]] = {"draw": drawings, "edit": edits, "ask": questions}


def collect(sentences: Iterator[str], count: int = COUNT) -> Wordings:
    """Pairs and examples of the first `count` sentences."""
    components = load_words(NANO)
    pairs, examples = set[str](), dict[tuple[str, ...], str]()
    for sentence in islice(sentences, count):
        read = normalized(components, sentence)
        pairs |= pairs_of(sentence) | pairs_of(read)
        if len(examples) < EXAMPLES and components.vocabulary.issuperset(read.strip(".?!").replace(",", "").split()):
            examples.setdefault(tuple(kinds_of_words(read)), read)
    return Wordings(frozenset(pairs), tuple(sorted(examples.values(), key=len)))


def main() -> None:
    """Write the file; with --check print the share of unseen training sentences that it would note."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure the share of false notes, too")
    is_checked = parser.parse_args().check
    found = {task: collect(sentences(0)) for task, sentences in TASKS.items()}
    rows = {task: {"pairs": sorted(of.pairs), "examples": list(of.examples)} for task, of in found.items()}
    WORDINGS_FILE.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    for task, of in found.items():
        print(f"{task}: {len(of.pairs)} pairs, {len(of.examples)} examples")
        if is_checked:
            noted = [bool(of.nearest(text)) for text in islice(TASKS[task](1), CHECKED)]
            print(f"{task}: {sum(noted)} of {len(noted)} unseen sentences of training are noted")


if __name__ == "__main__":
    main()
