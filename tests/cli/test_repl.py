"""Conversations in the terminal: what lines do, what is shown where, and that an error costs one line and no turn."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot

from model_cases import tiny_components
from starflow2.cli.repl import Album, Chat, Screen, graphics_of, inline, lines_of
from starflow2.core.images import read_metadata
from starflow2.errors import OutputError, PromptError
from starflow2.inference.session import Session
from starflow2.pipeline import StarFlow2

ESCAPE = "\x1b"
SETTINGS = {"guidance": 1.0, "prior_scale": 0.65, "model": "tiny"}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return StarFlow2(tiny_components(("features", "fae", "vlm", "t2i", "adapter", "joint")))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def a_picture(name: str = "shown.png") -> Path:
    Image.new("RGB", (80, 64), (200, 30, 40)).save(name)
    return Path(name)


def a_chat(model: StarFlow2, *blocks: str | None, screen: Screen | None = None) -> Chat:
    """A conversation whose replies are these words and images (None), or the model's own without any."""
    chat = Chat(model.session(), screen or Screen(io.StringIO(), io.StringIO()), Album(Path("made"), SETTINGS))
    return script(chat, *blocks) if blocks else chat


def script(chat: Chat, *blocks: str | None) -> Chat:
    """Let the model reply with these words and images (None), over and over."""
    sampler = chat.session.sampler
    layout, tokenizer = sampler.components.layout, sampler.components.tokenizer
    ids = [[layout.begin] if block is None else tokenizer.encode(block) for block in blocks]
    tokens = itertools.cycle([*itertools.chain(*ids), tokenizer.special.end])

    def scripted(logits: torch.Tensor) -> torch.Tensor:
        return one_hot(torch.tensor([next(tokens)] * len(logits)), logits.shape[-1]).double()

    sampler.adjust_logits = scripted
    return chat


def printed(chat: Chat) -> tuple[str, str]:
    """The text on both streams, which are then emptied."""
    texts = []
    for stream in (chat.screen.out, chat.screen.err):
        texts.append(stream.getvalue())  # type: ignore[attr-defined]
        stream.seek(0)
        stream.truncate()
    return texts[0], texts[1]


def typed(chat: Chat, *lines: str) -> tuple[str, str]:
    """Output and notes after these lines."""
    chat.run(lines)
    return printed(chat)


def kinds(session: Session) -> list[str]:
    return [f"{p.who}: {'picture' if p.text is None else p.text}" for p in session.pieces]


# -- turns ------------------------------------------------------------------------------------------------------------


def test_a_line_is_a_turn_and_its_reply_comes_in_order(model):
    chat = a_chat(model, "two red hearts", None, "a blue star")
    out, err = typed(chat, "", "  two red hearts\n", "   ")
    assert out == "two red hearts\n[made/picture-001.png]\na blue star\n" and err == ""
    assert kinds(chat.session) == [
        "user: two red hearts",
        "model: two red hearts",
        "model: picture",
        "model: a blue star",
    ]
    record = read_metadata("made/picture-001.png")
    assert (record["prompt"], record["seed"], record["model"]) == ("two red hearts", "0", "tiny")


def test_nothing_behind_quit_is_read(model):
    chat = a_chat(model, "a star")
    lines = iter(["two red hearts", "/quit", "a blue star"])
    chat.run(lines)
    assert printed(chat) == ("a star\n", "") and list(lines) == ["a blue star"]


def test_a_shown_picture_is_part_of_the_turn_that_is_then_said(model):
    chat = a_chat(model, "red")
    out, err = typed(chat, f"/show {a_picture()}", "is there a star?")
    assert out == "red\n" and err == "shown.png is now part of your turn; say something.\n"
    assert kinds(chat.session) == ["user: picture", "user: is there a star?", "model: red"]
    assert chat.session.encode_calls == 1


def test_draw_forces_a_picture_of_the_words_or_of_what_was_shown(model):
    chat = a_chat(model)
    out, _ = typed(chat, "/draw two red hearts", f"/show {a_picture()}", "/draw")
    assert out == "[made/picture-001.png]\n[made/picture-002.png]\n"
    assert kinds(chat.session) == ["user: two red hearts", "model: picture", "user: picture", "model: picture"]
    drawn = model.session().add("two red hearts").draw().image
    assert np.array_equal(np.asarray(Image.open("made/picture-001.png")), np.asarray(drawn))


def test_undo_takes_a_turn_back_with_the_picture_that_was_shown_in_it(model):
    chat = a_chat(model, "red")
    typed(chat, "two red hearts")
    length = chat.session.length
    typed(chat, f"/show {a_picture()}", "what color is it?", "/undo")
    assert chat.session.length == length and kinds(chat.session) == ["user: two red hearts", "model: red"]
    typed(chat, f"/show {a_picture()}", "/undo", "/undo")
    assert chat.session.length == 0 and chat.session.pieces == []
    assert typed(chat, "/undo") == ("", "error: there is no turn to take back.\n")


def test_pictures_that_are_there_already_are_left_alone(model):
    Path("made").mkdir()
    for number in (1, 2):
        Path(f"made/picture-00{number}.png").write_bytes(b"mine")
    out, _ = typed(a_chat(model), "/draw a star")
    assert out == "[made/picture-003.png]\n" and Path("made/picture-001.png").read_bytes() == b"mine"


def test_a_reply_that_was_cut_or_is_empty_says_so(model):
    assert "reached its limit" in typed(a_chat(model, " ".join(["red"] * 70)), "two red hearts")[1]
    assert typed(script(a_chat(model)), "two red hearts") == ("", "the model says nothing.\n")


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says_why"),
    [
        ("a zebra", "never learnt 'zebra'"),
        ("...", "the prompt is empty"),
        ("\udcff", "is not UTF-8 text"),
        (
            "/shw x.png",
            'there is no /shw; expected /show, /draw, /undo, /save, /load, /help, /quit. Did you mean "show"?',
        ),
        ("/show", "the name of a file is missing: /show picture.png"),
        ("/show none.png", "cannot read none.png as an image"),
        ("/show .", "cannot read . as an image"),
        ("/draw", "/draw needs words"),
        ("/draw a zebra", "never learnt 'zebra'"),
        ("/undo", "there is no turn"),
        ("/save talk.png", "ends in .safetensors"),
        ("/save file/talk.safetensors", "cannot write file/talk.safetensors"),
        ("/load", "the name of a file is missing"),
        ("/load none.safetensors", "none.safetensors is not a whole session file"),
        ("/load file", "file is not a whole session file"),
    ],
)
def test_an_error_costs_one_line_and_nothing_of_the_session(line, says_why, model):
    Path("file").write_text("nothing of use")
    chat = a_chat(model)
    before = sorted(Path.cwd().rglob("*"))
    out, err = typed(chat, line)
    assert out == "" and err.startswith("error: ") and says_why in err and err.count("\n") == 1
    assert chat.session.length == 0 and sorted(Path.cwd().rglob("*")) == before


def test_after_an_error_the_conversation_goes_on_as_if_it_had_not_happened(model):
    spoilt, clean = a_chat(model), a_chat(model)
    picture = a_picture()
    typed(spoilt, "a zebra", f"/show {picture}", "a unicorn", "/show none.png", "/draw two stars")
    typed(clean, f"/show {picture}", "/draw two stars")
    assert kinds(spoilt.session) == kinds(clean.session) == ["user: picture", "user: two stars", "model: picture"]
    pictures = [chat.session.pieces[-1].picture.u for chat in (spoilt, clean)]
    assert torch.equal(*pictures)


def test_a_picture_that_cannot_be_written_takes_its_turn_back_and_keeps_what_was_shown(model):
    chat = a_chat(model)
    Path("made").write_text("a file in its place")
    with pytest.raises(OutputError):
        chat.album.check()
    typed(chat, f"/show {a_picture()}")
    length = chat.session.length
    for line in ("/draw two stars", "two red hearts"):
        script(chat, None)
        assert "error: cannot write made/picture-001.png" in typed(chat, line)[1]
        assert chat.session.length == length and kinds(chat.session) == ["user: picture"]


class Interrupted(Screen):
    """A screen on which Ctrl-C is pressed at the fifth latent of the first image."""

    def bar(self, done: int, total: int) -> None:
        if done == 5 and not self.was_interrupted:
            self.was_interrupted = True
            raise KeyboardInterrupt

    was_interrupted = False


def test_control_c_stops_the_reply_and_not_the_conversation(model):
    chat = a_chat(model, "two red hearts", None, screen=Interrupted(io.StringIO(), io.StringIO()))
    assert "stopped; the turn is taken back" in typed(chat, "two red hearts")[1]
    assert chat.session.length == 0 and chat.session.pieces == []
    assert typed(script(chat, None), "two red hearts")[0].endswith("[made/picture-001.png]\n")


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_kept_conversation_is_told_and_goes_on_where_it_was(model):
    chat, later = a_chat(model, "red"), a_chat(model)
    typed(chat, f"/show {a_picture()}", "what color is it?", "/save talk.safetensors")
    out, _ = typed(later, "/load talk.safetensors")
    assert out == "> [an image]\n> what color is it?\nred\n"
    assert typed(later, "/undo")[1] == "error: there is no turn to take back.\n"
    for one in (chat, later):
        typed(one, "/draw two stars")
    drawn = [one.session.pieces[-1].picture.u for one in (chat, later)]
    assert torch.equal(*drawn)


def test_a_failed_load_keeps_the_conversation_there_is(model):
    chat = a_chat(model, "red")
    typed(chat, "two red hearts", "/save talk.safetensors")
    whole = Path("talk.safetensors").read_bytes()
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    before = chat.session
    assert "error: half.safetensors is not a whole session file" in typed(chat, "/load half.safetensors")[1]
    assert chat.session is before and typed(chat, "a star")[0] == "red\n"


# -- the screen -------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_no_escape_codes_whatever_the_terminal_around_it_is(model):
    kitty = {"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}
    out = io.StringIO()
    chat = a_chat(model, f"a{ESCAPE}[31m star", None, screen=Screen(out, io.StringIO(), graphics_of(out, kitty)))
    text, err = typed(chat, "two red hearts", "/help")
    assert ESCAPE not in text + err and "/undo" in text and "picture-001.png" in text


@pytest.mark.parametrize(
    ("environ", "graphics"),
    [
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "3"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "3", "TMUX": "/tmp/tmux,1,0"}, "blocks"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, "none"),
        ({"TERM": "dumb", "TERM_PROGRAM": "iTerm.app"}, "none"),
        ({}, "none"),
    ],
)
def test_the_terminal_is_known_by_its_environment(environ, graphics):
    assert graphics_of(Terminal(), environ) == graphics
    assert graphics_of(io.StringIO(), environ) == "none"


def two_by_two(scale: int = 1) -> Image.Image:
    pixels = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], dtype=np.uint8)
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def shown_again(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def test_kitty_gets_the_whole_picture_in_chunks():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    text = inline(Image.fromarray(noise), "kitty")
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert len(chunks) > 2 and all(len(data) <= 4096 for _, data in chunks)
    assert [re.search(r"m=(\d)", keys).group(1) for keys, _ in chunks] == ["1"] * (len(chunks) - 1) + ["0"]
    assert chunks[0][0].startswith("a=T,f=100,") and np.array_equal(shown_again("".join(d for _, d in chunks)), noise)
    (single,) = re.findall(r"\x1b_G([^;]*);", inline(two_by_two(), "kitty"))
    assert single.endswith("m=0")


def test_iterm2_gets_the_whole_picture_and_its_size():
    size, data = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=(\d+);[^:]*:(.*)\a\n", inline(two_by_two(), "iterm2")
    ).groups()
    assert len(base64.b64decode(data)) == int(size) and np.array_equal(shown_again(data), np.asarray(two_by_two()))


def test_half_blocks_hold_two_pixels_and_fit_the_terminal():
    (row, rest) = inline(two_by_two(), "blocks").split("\n")
    assert row == "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[38;2;0;255;0;48;2;9;9;9m▀\x1b[0m" and rest == ""
    rows = inline(two_by_two(100), "blocks", columns=20).splitlines()
    assert len(rows) == 10 and {line.count("▀") for line in rows} == {20}
    assert inline(two_by_two(), "none") == ""


def test_a_terminal_shows_the_picture_and_how_far_it_is(model):
    chat = a_chat(model, "a star", None, screen=Screen(Terminal(), Terminal(), "blocks"))
    out, err = typed(chat, "two red hearts")
    assert out.startswith("a star\n\x1b[38;2;") and out.endswith("\x1b[0m\n[made/picture-001.png]\n")
    assert "\rdrawing 64/64" in err and err.endswith("\r"), "the bar is wiped"


def test_lines_come_from_a_pipe_or_are_asked_for():
    assert list(lines_of(io.StringIO("one\ntwo"))) == ["one\n", "two"]
    with pytest.raises(PromptError, match="not text"):
        list(lines_of(io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")))
    typed: Iterable[str] = iter(["one"])

    def ask(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(typed)  # type: ignore[call-overload]
        except StopIteration:
            raise EOFError from None

    assert list(lines_of(Terminal(), "> ", ask)) == ["one"]
