"""The `dialogue` schema, schemas of one's own, and what a source makes of records: turned round, padded, flattened."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
import torch
from PIL import Image

from corpora_cases import (
    LAYOUT,
    SIDE,
    Letters,
    captioned,
    encoded,
    image_of,
    numbered,
    write_lines,
    write_rows,
    write_tar,
)
from starflow2.data.corpora import to_dialogue
from starflow2.data.mixture import BatchConfig, Batches, Source, Spelling, conversations
from starflow2.data.records import Broken
from starflow2.data.shards import Sample, Samples
from starflow2.errors import ConfigError, DataError

NUMBERS = {encoded(i): i for i in range(6)}
SPELLING = Spelling(Letters(), LAYOUT, SIDE)


def shown(*images: object) -> list[dict[str, Any]]:
    return [{"type": "image"} if image is None else {"type": "image", "image": image} for image in images]


def said(words: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": words}]


def talk(*contents: object) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def turns(sample: Sample, corpus: str = "dialogue", pictures: str = "") -> list[tuple[list[Any], list[Any]]]:
    found = to_dialogue(corpus, sample, pictures)
    return [(numbered(turn.user, NUMBERS), numbered(turn.assistant, NUMBERS)) for turn in found.turns]


# -- the schema -------------------------------------------------------------------------------------------------------


def test_lines_hold_turns_with_any_number_of_images_on_either_side(tmp_path):
    for i in (1, 2, 3):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    system = {"role": "system", "content": "Be brief."}
    two = [*shown("1.png"), *said(" Which is larger? "), *shown("2.png"), *said(" ")]
    line = {"messages": [system, *talk(two, "The second.", "Draw both.", [*said("Here:"), *shown("3.png")])]}
    (sample,) = Samples(str(write_lines(tmp_path / "x.jsonl", [line])))
    first, second = turns(sample)
    assert first == (["Be brief.", 1, "Which is larger?", 2], ["The second."])
    assert second == (["Draw both."], ["Here:", 3])


def test_images_may_be_members_of_a_tar_bytes_of_a_row_or_a_list_beside_the_messages(tmp_path):
    record = {"messages": talk([*shown("0.png", "1.png"), *said("Same?")], "No.")}
    write_tar(
        tmp_path / "a.tar",
        [("7.0.png", encoded(1)), ("7.1.png", encoded(2)), ("7.json", json.dumps(record).encode())],
    )
    (member,) = Samples(str(tmp_path / "a.tar"))
    assert turns(member) == [([1, 2, "Same?"], ["No."])]
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Same?"}, {"type": "image", "text": None}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    ]
    images = [{"bytes": encoded(i), "path": None} for i in (3, 4)]
    write_rows(tmp_path / "a.parquet", [{"messages": messages, "images": images}])
    (row,) = Samples(str(tmp_path / "a.parquet"))
    assert turns(row) == [([3, "Same?", 4], ["No."])]


def test_a_reply_may_open_a_conversation_and_its_kind_follows_what_is_drawn():
    record = {"messages": [{"role": "assistant", "content": shown(encoded(1))}]}
    opened = to_dialogue("dialogue", Sample("f", "", record))
    assert (turns(Sample("f", "", record)), opened.kind) == ([([], [1])], "draw")
    assert to_dialogue("dialogue", Sample("f", "", {"messages": talk(shown(encoded(1)), "a")})).kind == "understand"
    assert to_dialogue("dialogue", Sample("f", "", {"messages": talk("a", "b"), "kind": "story"})).kind == "story"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": talk("a")}, "wrong order"),
        ({"messages": talk("a", "b", "c")}, "wrong order"),
        ({"messages": [*talk("a", "b"), {"role": "assistant", "content": "c"}]}, "wrong order"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "wrong order"),
        ({"messages": []}, "wrong order"),
        ({"messages": talk("a", "b"), "images": [encoded(1)]}, "wrong order"),
        ({"messages": talk(shown(None), "b")}, "missing picture"),
        ({"messages": talk(shown("gone.png"), "b")}, "missing picture"),
        ({"messages": talk("a", " ")}, "empty text"),
        ({"messages": talk("a", said(" "))}, "empty text"),
        ({"messages": talk("a", [{"type": "text"}])}, "missing text"),
        ({"messages": talk("a", [{"type": "video"}])}, "wrong type"),
        ({"messages": talk("a", 3)}, "wrong type"),
        ({"messages": talk(shown(3), "b")}, "wrong type"),
        ({"messages": [{"content": "a"}]}, "missing text"),
        ({"conversations": []}, "missing text"),
    ],
)
def test_a_record_that_breaks_the_schema_gets_its_reason(record, reason, tmp_path):
    with pytest.raises(Broken) as found:
        to_dialogue("dialogue", Sample(str(tmp_path / "f"), "", record))
    assert found.value.reason == reason


# -- a schema of one's own ------------------------------------------------------------------------------------------


@pytest.fixture
def own_schema(tmp_path, monkeypatch) -> str:
    """A module in the current folder that turns {"q", "a"} into the `dialogue` schema."""
    (tmp_path / "my_corpus.py").write_text(
        "def pairs(fields):\n"
        "    line = fields['json']\n"
        "    user = {'role': 'user', 'content': line['q']}\n"
        "    return {'messages': [user, {'role': 'assistant', 'content': line['a']}]}\n"
        "def nothing(fields):\n"
        "    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_corpus", raising=False)
    return "my_corpus:pairs"


def test_a_function_of_ones_own_maps_fields_to_the_schema_and_its_errors_cost_one_sample(own_schema, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"q": "one?", "a": "two"}, {"q": "three?"}])
    good, bad = Samples(str(path))
    assert turns(good, own_schema) == [(["one?"], ["two"])]
    for corpus, reason in ((own_schema, "refused: KeyError: 'a'"), ("my_corpus:nothing", "wrong type: what my_corpus")):
        with pytest.raises(Broken, match=reason):
            to_dialogue(corpus, bad)


@pytest.mark.parametrize("name", ["my_corpus:gone", "no_such_module:x"])
def test_a_schema_that_is_not_there_is_refused_when_the_mixture_is_read(own_schema, name):
    with pytest.raises(ConfigError, match=f"cannot use '{name}' as a corpus"):
        Source(corpus=name, url="x", weight=1)


# -- options of a source ----------------------------------------------------------------------------------------------


def test_a_captioned_image_can_be_turned_round_and_nothing_else_can(tmp_path):
    captioned(tmp_path / "a.tar", 1)
    (sample,) = Samples(str(tmp_path / "a.tar"))
    source = Source(corpus="captions", url="x", weight=1, task="describe", question="What is it?")
    found = source.dialogue(sample)
    assert [(numbered(t.user, NUMBERS), t.assistant) for t in found.turns] == [([0, "What is it?"], ("picture 0",))]
    with pytest.raises(Broken, match="turned round"):
        Source(corpus="dialogue", url="x", weight=1, task="describe").dialogue(
            Sample("f", "", {"messages": talk("a", "b")})
        )


def wide(mode: str = "RGB", colour: tuple[int, ...] = (255, 0, 0)) -> bytes:
    """A picture of 48 x 24 pixels, blue but for its left quarter."""
    image = Image.new(mode, (48, 24), colour)
    image.paste((0, 0, 255), (12, 0, 48, 24))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read(source: Source, record: dict[str, Any]) -> torch.Tensor:
    conversation = source.dialogue(Sample("f", "", record))
    (image,) = SPELLING.item(conversation, form=source.form(conversation)).images
    return image


def test_images_that_are_asked_about_are_padded_and_drawn_ones_are_cropped_unless_the_source_says_otherwise():
    asked, drawn = {"messages": talk(shown(wide()), "b")}, {"messages": talk("a", shown(wide()))}
    grey, red, blue = (torch.tensor(c) for c in ((0.0, 0.0, 0.0), (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0)))

    def corners(image: torch.Tensor) -> torch.Tensor:
        return torch.stack([image[:, 1, 1], image[:, SIDE // 2, 1], image[:, SIDE // 2, -2]])

    auto = Source(corpus="dialogue", url="x", weight=1)
    assert (corners(read(auto, asked)) - torch.stack([grey, red, blue])).abs().max() < 0.02
    for fit, record, left in (("auto", drawn, blue), ("crop", asked, blue), ("stretch", asked, red)):
        found = read(Source(corpus="dialogue", url="x", weight=1, fit=fit), record)
        assert (corners(found) - torch.stack([left, left, blue])).abs().max() < 0.02


def test_a_transparent_image_is_broken_without_a_colour_behind_it(tmp_path):
    record = {"messages": talk("a", shown(wide("RGBA", (0, 0, 0, 0))))}
    with pytest.raises(Broken, match="transparent"):
        read(Source(corpus="dialogue", url="x", weight=1), record)
    image = read(Source(corpus="dialogue", url="x", weight=1, flatten="#00ff00", fit="stretch"), record)
    assert image[:, 5, 2].tolist() == [-1.0, 1.0, -1.0] and image[:, 5, -2].tolist() == [-1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("option", "says"),
    [({"flatten": "whiet"}, "flatten is 'whiet'"), ({"epochs": -1}, "epochs is -1"), ({"caption_drop": 2.0}, "share")],
)
def test_an_option_that_cannot_be_used_is_refused(option, says):
    with pytest.raises(ConfigError, match=says):
        Source(corpus="captions", url="x", weight=1, **option)


def stream(*sources: Source) -> Any:
    return conversations(Batches(sources, SPELLING, BatchConfig(rows=1, width=64, block=1, caption_drop=0.0)))


def test_a_source_leaves_the_mixture_after_its_passes_and_the_run_ends_with_the_last_of_them(tmp_path):
    for i, name in enumerate("ab"):
        captioned(tmp_path / f"{name}.tar", 4, first=10 * i)
    twice = Source(corpus="captions", url=str(tmp_path / "a.tar"), weight=1, epochs=2)
    both = stream(twice, Source(corpus="captions", url=str(tmp_path / "b.tar"), weight=1))
    words = [next(both).turns[0].user[0] for _ in range(60)]
    assert all(words.count(f"picture {i}") == 2 for i in range(4))
    alone = stream(twice)
    assert len([next(alone) for _ in range(8)]) == 8
    with pytest.raises(DataError, match="as many passes as its epochs say"):
        next(alone)


def test_a_source_may_drop_words_more_often_than_the_stage(tmp_path):
    captioned(tmp_path / "a.tar", 4)
    dropped = stream(Source(corpus="captions", url=str(tmp_path / "a.tar"), weight=1, caption_drop=1.0))
    assert all(next(dropped).turns[0].user == () for _ in range(8))


def test_conversations_of_a_mixture_come_with_their_images_as_tensors(tmp_path):
    captioned(tmp_path / "a.tar", 1)
    conversation = next(stream(Source(corpus="captions", url=str(tmp_path / "a.tar"), weight=1)))
    assert torch.equal(conversation.pictures[0], image_of(0))
