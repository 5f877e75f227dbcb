"""text.py: text has one form, hidden signs are refused by name, a file of any other encoding is refused by name."""

from __future__ import annotations

import unicodedata

import pytest

from starflow2.core.text import clean, read_text, shown
from starflow2.errors import DataError, PromptError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\ufefftwo red hearts", "two red hearts"),
        ("two\u200b red\u00ad hearts\u2060", "two red hearts"),
        ("one\r\ntwo\rthree\u2028four\x0cfive", "one\ntwo\nthree\nfour\nfive"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u2764\ufe0f", None),  # joiners and selectors are spelling
        ("w\u00fcrfel, \u5fc3, \U0001f469\u200d\U0001f680\tx\u00b2", None),
    ],
)
def test_text_has_one_form_and_keeps_what_can_be_read(text, wanted):
    assert clean(text) == (text if wanted is None else wanted)
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize(
    "sign",
    [
        "\x00",
        "\x1b",
        "\x7f",
        "\x9b",
        "\ud800",
        "\udcff",
        "\u202e",
        "\u2066",
        "\u3164",
        "\U000e0041",
        "\ufffe",
        "\ufdd0",
    ],
)
def test_signs_that_no_reader_sees_are_refused_by_name(sign):
    with pytest.raises(PromptError, match="the title") as caught:
        clean(f"two {sign}hearts", "the title")
    assert ascii(sign)[1:-1] in str(caught.value) and str(caught.value).isprintable()


def test_every_control_and_surrogate_is_refused_or_a_blank():
    kinds = {"Cc", "Cs"}
    passed = []
    for code in [*range(0x3000), *range(0xD800, 0xE000), *range(0xFFF0, 0x10000)]:
        try:
            text = clean(f"a{chr(code)}b")
        except PromptError:
            continue
        passed += [code for c in text if unicodedata.category(c) in kinds and c not in "\t\n"]
    assert not passed


@pytest.mark.parametrize("value", [None, b"two red hearts", 3, 1.5, ["two"], {"a": 1}, object()])
def test_what_is_no_text_is_refused_with_its_type(value):
    with pytest.raises(PromptError, match=f"\\({type(value).__name__}\\); expected text"):
        clean(value)


def test_a_file_reads_with_and_without_a_byte_order_mark(tmp_path):
    for number, data in enumerate((b"\xef\xbb\xbfw\xc3\xbcrfel", b"w\xc3\xbcrfel")):
        (tmp_path / f"{number}.txt").write_bytes(data)
        assert read_text(tmp_path / f"{number}.txt") == "w\u00fcrfel"


@pytest.mark.parametrize(
    ("data", "reason"),
    [("a".encode("utf-16"), "looks like UTF-16"), (b"caf\xe9", "byte 3 is not UTF-8"), (None, "No such file")],
)
def test_any_other_file_is_refused_with_the_reason(tmp_path, data, reason):
    if data is not None:
        (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt.*{reason}"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["", "a\0b", "/dev/zero", "x" * 5000])
def test_a_name_that_is_no_file_is_refused_and_never_waited_for(name):
    with pytest.raises(DataError, match="cannot read") as caught:
        read_text(name)
    assert str(caught.value).isprintable()


def test_messages_show_any_value_on_one_printable_line():
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert shown("he\u200barts\x1b\n") == r"'he\u200barts\x1b\n'"
    assert len(shown("x" * 10**6)) == 60 and shown(Rude()) == "<Rude>"


@pytest.mark.timeout(30)
def test_marks_without_end_on_one_letter_are_refused_before_they_are_sorted():
    with pytest.raises(PromptError, match="more than 30 marks on one letter"):
        clean("a" + "\u0300\u0323" * 200_000)
    few = "a" + "\u0300\u0323" * 15 + "b\u0301"
    assert clean(few) == unicodedata.normalize("NFC", few)
