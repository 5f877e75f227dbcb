"""Published schemas become the right documents; broken samples get their reasons and never stop a run."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from corpora_cases import (
    LAYOUT,
    PUBLISHED,
    SIDE,
    Letters,
    captioned,
    encoded,
    image_of,
    numbered,
    pixels,
    write_lines,
    write_rows,
    write_tar,
)
from starflow2.data.corpora import CORPORA, to_dialogue
from starflow2.data.mixture import Spelling
from starflow2.data.records import REASONS, Broken, Photo, decode
from starflow2.data.shards import PICTURES, Sample, Samples
from starflow2.errors import DataError

NUMBERS = {encoded(i): i for i in range(10)}
SPELLING = Spelling(Letters(), LAYOUT, SIDE)


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_a_corpus_in_its_published_schema_becomes_exactly_these_documents(corpus, tmp_path):
    url, expected = PUBLISHED[corpus](tmp_path)
    pictures = str(tmp_path / "imgs") if corpus == "journeydb" else ""
    found = [to_dialogue(corpus, sample, pictures) for sample in Samples(url)]
    turns = [[(numbered(t.user, NUMBERS), numbered(t.assistant, NUMBERS)) for t in c.turns] for c in found]
    assert list(zip([c.kind for c in found], turns, strict=True)) == expected


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_its_documents_predict_replies_only_and_carry_their_pictures_in_order(corpus, tmp_path):
    url, expected = PUBLISHED[corpus](tmp_path)
    pictures = str(tmp_path / "imgs") if corpus == "journeydb" else ""
    items = [SPELLING.item(to_dialogue(corpus, sample, pictures)) for sample in Samples(url)]
    for item, (_, turns) in zip(items, expected, strict=True):
        numbers = [part for user, reply in turns for part in (*user, *reply) if isinstance(part, int)]
        assert all(torch.equal(image, image_of(i)) for image, i in zip(item.images, numbers, strict=True))
        drawn = [part for _, reply in turns for part in reply if isinstance(part, int)]
        targets = [s for s in item.document if not hasattr(s, "ids") and s.is_target]
        assert len(targets) == len(drawn)
        words = [part for user, reply in turns for part in (*user, *reply) if isinstance(part, str)]
        assert item.length == sum(map(len, words)) + 6 * len(numbers) + 3 * len(turns)


def test_every_named_corpus_but_the_generic_ones_has_a_published_fixture():
    assert set(CORPORA) - set(PUBLISHED) == {"captions", "dialogue"}


def test_a_folder_of_pictures_with_words_beside_them_is_a_corpus(tmp_path):
    for i in (1, 2, 3):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.json").write_text(json.dumps({"caption": "two"}))
    found = {s.key: s for s in Samples(str(tmp_path))}
    assert [to_dialogue("captions", found[k]).turns[0].user for k in "12"] == [("one",), ("two",)]
    with pytest.raises(Broken, match="missing text"):
        to_dialogue("captions", found["3"])


def test_a_folder_may_list_its_pictures_in_metadata_jsonl(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(encoded(1))
    lines = [{"file_name": "sub/a.png", "text": "one"}, {"file_name": "gone.png", "text": "x"}]
    write_lines(tmp_path / "metadata.jsonl", [*lines, {"file_name": "../../etc/passwd.png", "text": "x"}])
    good, gone, outside = Samples(str(tmp_path))
    assert to_dialogue("captions", good).turns[0].assistant == (Photo(encoded(1)),)
    for sample in (gone, outside):
        with pytest.raises(Broken, match="missing picture"):
            to_dialogue("captions", sample)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "https://example.org/a.png", "..", "a/../../b.png"]
)
def test_a_record_cannot_name_a_file_outside_its_folder(name, tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(1))
    (tmp_path / "data").mkdir()
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "."}]
    path = write_lines(tmp_path / "data" / "x.jsonl", [{"image": name, "conversations": turns}])
    (sample,) = Samples(str(path))
    with pytest.raises(Broken, match="missing picture"):
        to_dialogue("cambrian", sample)


def test_the_wording_of_an_edit_is_picked_by_its_id_and_every_wording_is_used():
    image = {"bytes": encoded(1), "path": None}
    wordings = ["a", "b", "c"]
    rows = [
        {"omni_edit_id": f"task_{i}", "src_img": image, "edited_img": image, "edited_prompt_list": wordings}
        for i in (*range(60), "\ud800")  # half of a surrogate pair, as JSON may hold it
    ]
    picked = [to_dialogue("omniedit", Sample("f", str(i), row)).turns[0].user[1] for i, row in enumerate(rows)]
    assert picked == [to_dialogue("omniedit", Sample("f", "", row)).turns[0].user[1] for row in rows]
    assert set(picked) == set(wordings)


def _turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": words} for who, words in pairs]}


@pytest.mark.parametrize(
    ("corpus", "record", "reason"),
    [
        ("cambrian", _turns(("gpt", "x"), ("human", "y")), "wrong order"),
        ("cambrian", _turns(("human", "x")), "wrong order"),
        ("cambrian", _turns(("human", "<image> x"), ("gpt", "y")), "wrong order"),
        ("cambrian", _turns(("human", "x"), ("gpt", 3)), "wrong type"),
        ("cambrian", _turns(("human", "x"), ("gpt", " ")), "empty text"),
        ("cambrian", {"conversations": []}, "wrong order"),
        ("cambrian", {"conversations": {}}, "wrong type"),
        ("cambrian", {}, "missing text"),
        ("journeydb", {"prompt": "--v 4", "img_path": "a.png"}, "empty text"),
        ("journeydb", {"prompt": "a fox", "img_path": "gone.png"}, "missing picture"),
        ("journeydb", {"prompt": "a fox", "img_path": None}, "wrong type"),
        ("comm", {"title": "x", "step_info": [[{"type": "video"}]]}, "wrong type"),
        ("comm", {"title": "x", "step_info": []}, "empty text"),
        ("comm", {"title": "x", "step_info": [[{"type": "image", "image_path": None}]]}, "missing picture"),
        ("pico-banana", {"text": "x", "open_image_input_url": "u/a.png"}, "missing picture"),
        ("pico-banana", {"files": [], "metadata_edit_turn_prompts": []}, "empty text"),
    ],
)
def test_a_record_that_breaks_its_schema_gets_its_reason(corpus, record, reason, tmp_path):
    (sample,) = Samples(str(write_lines(tmp_path / "x.jsonl", [record])))
    with pytest.raises(Broken) as found:
        to_dialogue(corpus, sample)
    assert found.value.reason == reason


def test_a_trace_whose_marks_and_pictures_do_not_match_gets_its_reason():
    image = {"bytes": encoded(1), "path": None}
    row = {"Question": "?", "Text Reasoning Trace": "[reasoning_image_1]", "Final Answer": "x"}
    cases: list[tuple[dict[str, Any], str]] = [
        (row, "missing picture"),
        ({**row, "Text Reasoning Trace": "none", "reasoning_image_1": image}, "wrong order"),
        ({**row, "reasoning_image_1": {"bytes": b"x", "path": None}, "Final Answer": None}, "missing text"),
    ]
    for fields, reason in cases:
        with pytest.raises(Broken) as found:
            to_dialogue("zebra-cot", Sample("f", "row 0", fields))
        assert found.value.reason == reason


# -- broken bytes -----------------------------------------------------------------------------------------------------


def _huge_png() -> bytes:
    """A few bytes that claim to be 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def _animated() -> bytes:
    frames = [Image.fromarray(pixels(i)) for i in range(3)]
    return _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _noise(rng: np.random.Generator) -> bytes:
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return _saved(image, "JPEG")


WORDS = b"a good caption"
BREAK: dict[str, tuple[str, Callable[[bytes, np.random.Generator], dict[str, bytes]]]] = {  # kind: (reason, members)
    "truncated jpeg": (
        "damaged picture",
        lambda good, rng: {"jpg": good[: rng.integers(len(good) // 2, len(good) - 40)], "txt": WORDS},
    ),
    "zero bytes": ("empty picture", lambda good, rng: {"jpg": b"", "txt": WORDS}),
    "not an image": ("not a picture", lambda good, rng: {"jpg": b"<html>" + rng.bytes(99), "txt": WORDS}),
    "missing caption": ("missing text", lambda good, rng: {"jpg": good}),
    "empty caption": ("empty text", lambda good, rng: {"jpg": good, "txt": b" \n" * int(rng.integers(4))}),
    "missing picture": ("missing picture", lambda good, rng: {"txt": WORDS}),
    "huge dimensions": ("huge picture", lambda good, rng: {"png": _huge_png(), "txt": WORDS}),
    "bad UTF-8": ("bad UTF-8", lambda good, rng: {"jpg": good, "txt": b"caf\xe9 " + rng.bytes(3) + b"\xff"}),
    "bad JSON": ("bad JSON", lambda good, rng: {"jpg": good, "json": b'{"caption": "' + rng.bytes(5).hex().encode()}),
    "wrong type": ("wrong type", lambda good, rng: {"jpg": good, "json": b'{"caption": [7]}'}),
    "hidden signs": (
        "hidden signs",
        lambda good, rng: {"jpg": good, "txt": b"red \x1b[31m"},
    ),
    "animated": ("unfit picture", lambda good, rng: {"gif": _animated(), "txt": WORDS}),
    "CMYK": ("unfit picture", lambda good, rng: {"jpg": _saved(Image.new("CMYK", (32, 32)), "JPEG"), "txt": WORDS}),
}


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    mark = b"\xef\xbb\xbf"
    records = (
        {"png": encoded(1), "txt": mark + WORDS},
        {"png": encoded(1), "json": mark + b'{"text": "a good caption"}'},
    )
    for fields in records:
        (turn,) = to_dialogue("captions", Sample("a.tar", "a", fields)).turns
        assert turn.user == (WORDS.decode(),)


def test_a_folder_whose_name_holds_signs_of_patterns_is_that_folder(tmp_path):
    for name in ("dir [x]", "a*b", "what?"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.png").write_bytes(encoded(1))
        (folder / "a.txt").write_bytes(WORDS)
        assert len(list(Samples(str(folder)))) == 1
    for url in ("", "  "):
        with pytest.raises(DataError, match="url is empty"):
            Samples(url)


def test_a_thousand_broken_samples_stop_nothing_and_are_counted_each_under_its_reason(tmp_path):
    rng = np.random.default_rng(0)
    kinds = [list(BREAK)[i % len(BREAK)] for i in range(1000)]
    members = []
    for i, kind in enumerate(kinds):
        broken = BREAK[kind][1](_noise(rng), rng)
        members += [(f"{i:04d}.{field}", data) for field, data in broken.items()]
        if i % 100 == 0:
            members += [(f"good{i}.png", encoded(1)), (f"good{i}.txt", b"fine")]
    write_tar(tmp_path / "a.tar", members)
    reasons, good = dict[str, str](), 0
    for sample in Samples(str(tmp_path)):
        try:
            SPELLING.item(to_dialogue("captions", sample))
            good += 1
        except Broken as error:
            reasons[sample.key] = error.reason
    assert good == 10
    assert reasons == {f"{i:04d}": BREAK[kind][0] for i, kind in enumerate(kinds)}
    assert {reason for reason, _ in BREAK.values()} <= set(REASONS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, about what stands in them
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_flipped_bytes_give_a_picture_or_a_reason_and_never_another_error(format):
    rng = np.random.default_rng(1)
    whole = _saved(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), format)
    counts = Counter[str]()
    for _ in range(80):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 6):
            data[at] = rng.integers(256)
        data = data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.5 else data
        try:
            counts["decoded" if decode(Photo(bytes(data)), SIDE).isfinite().all() else "wrong"] += 1
        except Broken as error:
            counts[error.reason] += 1
    assert counts["wrong"] == 0 and sum(counts.values()) == 80 and len(counts) > 1


@pytest.mark.parametrize("cut", [0, 100, 511])  # 0: between a member and the next, where tarfile sees nothing wrong
def test_a_file_that_breaks_off_loses_its_rest_and_not_the_next_file(cut, tmp_path):
    whole = captioned(tmp_path / "a.tar", 20).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"000011.png") + cut])
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    captioned(tmp_path / "c.tar", 3, first=50)
    samples = list(Samples(str(tmp_path)))
    broken = [s for s in samples if s.damage]
    assert [Path(s.source).name for s in broken] == ["a.tar", "b.tar"]
    for sample in broken:
        with pytest.raises(Broken, match="unreadable file"):
            to_dialogue("captions", sample)
    assert [s.key for s in samples][-3:] == ["000050", "000051", "000052"]
    assert len(samples) == 11 + 1 + 1 + 3 and [s.key for s in samples[:11]] == [f"{i:06d}" for i in range(11)]


def test_broken_lines_and_rows_cost_one_sample_each(tmp_path):
    good = {"img_path": "a.png", "prompt": "a fox"}
    (tmp_path / "a.png").write_bytes(encoded(1))
    lines = [json.dumps(good).encode(), b'{"img_path": ', b"\xff\xfe", b"[1, 2]", b"", json.dumps(good).encode()]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    reasons = []
    for sample in Samples(str(tmp_path / "x.jsonl")):
        try:
            to_dialogue("journeydb", sample)
            reasons.append((sample.key, ""))
        except Broken as error:
            reasons.append((sample.key, error.reason))
    assert reasons == [
        ("line 1", ""), ("line 2", "bad JSON"), ("line 3", "bad UTF-8"), ("line 4", "wrong type"), ("line 6", "")
    ]  # fmt: skip


def test_a_row_with_bad_utf_8_costs_one_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = pa.array([b"one", b"caf\xe9", b"three"]).cast(pa.binary())
    column = pa.StringArray.from_buffers(3, words.buffers()[1], words.buffers()[2])
    pq.write_table(
        pa.table({"text": column, "image": [{"bytes": encoded(1), "path": None}] * 3}), tmp_path / "x.parquet"
    )
    one, two, three = Samples(str(tmp_path / "x.parquet"))
    assert to_dialogue("captions", one).turns[0].user == ("one",)
    assert to_dialogue("captions", three).turns[0].user == ("three",)
    with pytest.raises(Broken, match="bad UTF-8"):
        to_dialogue("captions", two)


def test_a_document_longer_than_a_row_gets_its_reason(tmp_path):
    conversation = to_dialogue("captions", Sample("f", "k", {"png": encoded(1), "txt": b"x" * 50}))
    assert SPELLING.item(conversation, 59).length == 59
    with pytest.raises(Broken, match="too long: 59 positions, a row has 58"):
        SPELLING.item(conversation, 58)


def test_broken_is_an_error_of_ours_and_every_extension_is_lower_case():
    assert issubclass(Broken, DataError) and all(e == e.lower() for e in PICTURES)


def test_rows_may_hold_a_path_in_place_of_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    write_rows(tmp_path / "x.parquet", [{"image": {"bytes": None, "path": "a.png"}, "text": "one"}])
    (sample,) = Samples(str(tmp_path / "x.parquet"))
    assert to_dialogue("captions", sample).pictures == (Photo(encoded(1)),)


# -- sizes and names


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound of 100 kB instead of 256 MB."""
    monkeypatch.setattr("starflow2.data.shards.MEMBER", 100_000)


def test_a_member_that_is_too_large_is_one_broken_sample_and_is_never_read(tmp_path, small):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("0.png", encoded(1)),
            ("0.txt", b"x" * 200_000),
            ("1.png", encoded(1)),
            ("1.txt", b"a fox"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    large, fine = Samples(str(tmp_path / "a.tar"))
    assert "0.txt has more than" in large.damage and not large.fields["txt"]
    assert not fine.damage and fine.fields["txt"] == b"a fox"


def test_a_header_that_is_too_large_is_not_read(tmp_path):
    import tarfile

    info = tarfile.TarInfo("x")
    info.type, info.size = b"x", 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    (sample,) = Samples(str(tmp_path / "a.tar"))
    assert "a header has" in sample.damage


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_line_that_is_too_large_is_one_broken_sample(tmp_path, small, ending):
    import gzip

    lines = b'{"a": 1}\n' + b"x" * 3_000_000 + b'\n{"b": 2}'
    (tmp_path / f"x.{ending}").write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
    first, large, last = Samples(str(tmp_path / f"x.{ending}"))
    assert (first.fields["json"], last.fields["json"]) == (b'{"a": 1}', b'{"b": 2}')
    assert (large.key, last.key) == ("line 2", "line 3") and "more than" in large.damage


def test_a_file_of_a_folder_that_is_too_large_is_one_broken_sample(tmp_path, small):
    for name, size in (("a", 10), ("b", 200_000)):
        (tmp_path / f"{name}.png").write_bytes(encoded(1))
        (tmp_path / f"{name}.txt").write_text("x" * size)
    fine, large = Samples(str(tmp_path))
    assert not fine.damage and "more than" in large.damage


def test_a_folder_whose_name_has_brackets_is_found(tmp_path):
    folder = tmp_path / "dir [x]"
    folder.mkdir()
    captioned(folder / "a.tar", 2)
    assert len(list(Samples(str(folder)))) == 2
    (folder / "a.tar").unlink()
    (folder / "a.png").write_bytes(encoded(1))
    (folder / "a.txt").write_text("a fox")
    (sample,) = Samples(str(folder))
    assert sample.fields["txt"] == b"a fox"


def test_an_empty_name_does_not_read_the_whole_disk_and_a_quoted_tilde_not_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    captioned(tmp_path / "a.tar", 2)
    for name, said in (("", "url is empty"), (" ", "url is empty"), ("~", "no file"), ("~/*.tar", "no file")):
        with pytest.raises(DataError, match=said):
            Samples(name)


def test_a_compressed_tar_under_the_name_of_a_plain_one_has_an_end(tmp_path):
    import gzip

    whole = captioned(tmp_path / "a.tar", 3).read_bytes()
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole))
    assert [s.damage for s in Samples(str(tmp_path / "a.tar"))] == ["", "", ""]


def test_a_file_that_no_reader_knows_is_refused_with_the_endings_that_are_read(tmp_path):
    (tmp_path / "a.tar.xz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"Files end in \.tar,"):
        Samples(str(tmp_path / "a.tar.xz"))
