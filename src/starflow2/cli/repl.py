"""A conversation in the terminal: lines go in, words and pictures come out, through one Session.

A line is the user's turn, or a command that begins with "/". Replies and names of picture files go to the output,
notes and errors to the error stream, so that a conversation can be piped. Not here: the conversation itself (session),
the options of the command (commands).
"""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import numpy as np

from starflow2.cli.options import check_text, png_text, printable
from starflow2.core.files import check_writable
from starflow2.core.images import PILImage, save_png
from starflow2.errors import ConfigError, OutputError, PromptError, StarFlowError, nearest
from starflow2.inference.events import Drew, Event, Finished, Made, Wrote
from starflow2.inference.session import Mark, Session

__all__ = ["Album", "Chat", "Graphics", "Screen", "graphics_of", "inline", "lines_of"]

Graphics = Literal["none", "blocks", "iterm2", "kitty"]
COLUMNS = 64  # of a picture, at most
CHUNK = 4096  # base64 characters that kitty takes at once
SESSION_SUFFIX = ".safetensors"
HELP = """A line is your turn; the model replies with words, a picture, or both.
  /show FILE     add a picture to your turn, then say something
  /draw [WORDS]  have the turn answered with a picture
  /undo          take the last turn back
  /save FILE     keep the conversation (.safetensors)
  /load FILE     go on with a kept one
  /help          this list
  /quit          leave; so does the end of the input"""


# -- pictures in a terminal -------------------------------------------------------------------------------------------


def graphics_of(stream: TextIO, environ: Mapping[str, str]) -> Graphics:
    """How `stream` can show pictures; "none" for all that is no terminal, so that no escape code gets into a pipe."""
    term = environ.get("TERM", "")
    if not stream.isatty() or term in ("", "dumb") or environ.get("NO_COLOR"):
        return "none"
    in_between = "TMUX" in environ or term.startswith(("screen", "tmux"))  # passes on colours, but no pictures
    program = environ.get("TERM_PROGRAM", "")
    if not in_between and ("KITTY_WINDOW_ID" in environ or term == "xterm-kitty" or program == "ghostty"):
        return "kitty"
    if not in_between and (program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2"):
        return "iterm2"
    return "blocks" if "utf" in (stream.encoding or "").lower() else "none"


def inline(image: PILImage, graphics: Graphics, columns: int = COLUMNS) -> str:
    """What to write to a terminal so that it shows the picture, at most `columns` characters wide; "" for "none"."""
    if graphics == "none":
        return ""
    if graphics == "blocks":
        return _blocks(image, min(columns, COLUMNS, image.width))
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    width = min(columns, COLUMNS) // 2
    if graphics == "iterm2":
        size = f"size={len(file.getvalue())};width={width};preserveAspectRatio=1"
        return f"\x1b]1337;File=inline=1;{size}:{data}\a\n"
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    keys = [f"a=T,f=100,c={width},m={int(len(chunks) > 1)}"] + [
        f"m={int(i < len(chunks) - 1)}" for i in range(1, len(chunks))
    ]
    return "".join(f"\x1b_G{key};{chunk}\x1b\\" for key, chunk in zip(keys, chunks, strict=True)) + "\n"


def _blocks(image: PILImage, width: int) -> str:
    """Upper half blocks, two pixels to a character: the upper one is its colour, the lower one its background."""
    height = max(2, 2 * round(image.height * width / image.width / 2))
    pixels = np.asarray(image.convert("RGB").resize((width, height)))  # (height, width, 3)
    rows = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = [f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower, strict=True)]
        rows.append("".join(cells) + "\x1b[0m\n")
    return "".join(rows)


# -- where it is seen and kept ----------------------------------------------------------------------------------------


class Screen:
    """Where a conversation is seen: replies on `out`, notes and errors on `err`."""

    def __init__(self, out: TextIO, err: TextIO, graphics: Graphics = "none") -> None:
        self.out, self.err, self.graphics = out, err, graphics
        self._in_line = False  # the output stands in the middle of a line
        self._in_bar = False

    def write(self, text: str) -> None:
        """A piece of a reply, as it comes."""
        self.end_bar()
        text = printable(text) if self._in_line else printable(text).lstrip()
        self.out.write(text)
        self.out.flush()
        self._in_line = (self._in_line or bool(text)) and not text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line of output, unless it stands at one."""
        self.end_bar()
        if self._in_line:
            self.out.write("\n")
        self.out.flush()
        self._in_line = False

    def line(self, text: str) -> None:
        """A whole line of output."""
        self.end_line()
        self.out.write(printable(text) + "\n")
        self.out.flush()

    def picture(self, image: PILImage, path: Path) -> None:
        """The picture where the terminal can show it, and the name of its file."""
        self.end_line()
        self.out.write(inline(image, self.graphics, shutil.get_terminal_size().columns))
        self.line(f"[{path}]")

    def bar(self, done: int, total: int) -> None:
        """How far a picture is, on a terminal only."""
        if self.err.isatty():
            self.err.write(f"\rdrawing {done}/{total}")
            self.err.flush()
            self._in_bar = True

    def end_bar(self) -> None:
        """Wipe it."""
        if self._in_bar:
            self.err.write("\r" + " " * 40 + "\r")
            self.err.flush()
        self._in_bar = False

    def note(self, text: str) -> None:
        """One line beside the conversation."""
        self.end_line()
        self.err.write(" ".join(printable(text).split()) + "\n")
        self.err.flush()


@dataclass(frozen=True, slots=True)
class Album:
    """A folder of numbered pictures; what is in it already is left alone."""

    folder: Path
    settings: Mapping[str, Any]  # go into every PNG

    def check(self) -> None:
        """Raise OutputError now if no picture can be written there."""
        check_writable(self.next)

    @property
    def next(self) -> Path:
        """The name of the next picture."""
        taken = {path.name for path in self.folder.glob("picture-*.png")}
        number = next(i for i in range(1, len(taken) + 2) if f"picture-{i:03}.png" not in taken)
        return self.folder / f"picture-{number:03}.png"

    def add(self, image: PILImage, prompt: str, seed: int) -> Path:
        """Write a picture and return its name."""
        path = self.next
        save_png(image, path, png_text(prompt, seed, self.settings))
        return path


def lines_of(stream: TextIO, prompt: str = "") -> Iterator[str]:
    """Lines of a terminal, asked for with `prompt` and with a history to edit, or of a file or pipe.

    Raises PromptError for bytes that are no text.
    """
    try:
        if not stream.isatty():
            yield from stream
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys work from here on
        while True:
            try:
                line = input(prompt)
            except EOFError:
                print()
                return
            yield line
    except UnicodeDecodeError as error:
        raise PromptError(f"the input is not text: {error}.") from error


# -- the conversation -------------------------------------------------------------------------------------------------


class Chat:
    """One conversation: `run` takes lines until there are no more, `take` one of them."""

    def __init__(self, session: Session, screen: Screen, album: Album) -> None:
        self.session, self.screen, self.album = session, screen, album
        self._marks: list[Mark] = []  # before every turn, to undo it
        self._commands: dict[str, Callable[[str], None]] = {
            "show": self._show,
            "draw": self._draw,
            "undo": self._undo,
            "save": self._save,
            "load": self.load,
            "help": self._help,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Take line after line, up to /quit or the end."""
        for line in lines:
            if not self.take(line):
                return

    def take(self, line: str) -> bool:
        """Act on one line; False if it asks to end. What goes wrong costs one note, and the session goes on."""
        words = line.strip()
        try:
            check_text(words)
            if words == "/quit":
                return False
            if words.startswith("/"):
                name, _, rest = words[1:].partition(" ")
                self._command(name)(rest.strip())
            elif words:
                self._say(words)
        except StarFlowError as error:
            self.screen.note(f"error: {error}")
        return True

    def _command(self, name: str) -> Callable[[str], None]:
        known = [*self._commands, "quit"]
        if name not in self._commands:
            raise ConfigError(f"there is no /{name}; expected /{', /'.join(known)}.{nearest(name, known)}")
        return self._commands[name]

    # -- turns

    def _say(self, words: str) -> None:
        with self._turn():
            self.session.add(words)
            self._tell(cast("Generator[Event]", self.session.run()), words)

    def _show(self, file: str) -> None:
        path = _file(file, "/show picture.png")
        before = self.session.mark()
        self.session.add(path)
        self._count(before)
        self.screen.note(f"{path} is part of your turn; now say something.")

    def _draw(self, words: str) -> None:
        if not words and not self.session.mark().is_open:
            raise PromptError("/draw needs words: /draw two red hearts.")
        with self._turn():
            if words:
                self.session.add(words)
            made = self.session.draw()
            self._keep(made, words)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Within, the turn is completed and replied to; an error or Ctrl-C takes that back, but no picture shown."""
        before = self.session.mark()
        try:
            yield
        except BaseException as error:
            self.session.rewind(before)
            if not isinstance(error, KeyboardInterrupt):
                raise
            self.screen.note("stopped; nothing of it is kept.")
            return
        self._count(before)

    def _count(self, before: Mark) -> None:
        """A turn has begun at that moment, unless pictures had begun it earlier."""
        if not before.is_open or not self._marks:
            self._marks.append(before)

    def _tell(self, events: Generator[Event], words: str) -> None:
        before = len(self.session.pieces)
        with contextlib.closing(events):  # leaving it early takes the reply back at once
            for event in events:
                match event:
                    case Wrote():
                        self.screen.write(event.text)
                    case Drew():
                        self.screen.bar(event.done, event.total)
                    case Made():
                        self._keep(event, words)
                    case Finished(reason="limit"):
                        self.screen.note("the reply ends here because it reached its limit.")
        self.screen.end_line()
        if len(self.session.pieces) == before:
            self.screen.note("the model says nothing.")

    def _keep(self, made: Made, words: str) -> None:
        self.screen.picture(made.image, self.album.add(made.image, words, self.session.seed))

    # -- time and files

    def _undo(self, _: str) -> None:
        if not self._marks:
            raise PromptError("there is no turn to take back.")
        self.session.rewind(self._marks.pop())
        self.screen.note("the last turn is taken back.")

    def _save(self, file: str) -> None:
        path = _file(file, f"/save talk{SESSION_SUFFIX}")
        if path.suffix != SESSION_SUFFIX:
            raise OutputError(f"cannot write {path}: expected a name that ends in {SESSION_SUFFIX}.")
        self.session.save(path)
        self.screen.note(f"kept as {path}.")

    def load(self, file: str) -> None:
        """Go on with a saved conversation, and tell what was said in it."""
        path = _file(file, f"/load talk{SESSION_SUFFIX}")
        self.session = Session.load(path, self.session.sampler)
        self._marks = []
        for piece in self.session.pieces:
            said = "[a picture]" if piece.text is None else piece.text
            self.screen.line(f"> {said}" if piece.who == "user" else said)

    def _help(self, _: str) -> None:
        self.screen.line(HELP)


def _file(name: str, example: str) -> Path:
    if not name:
        raise ConfigError(f"the name of a file is missing: {example}.")
    return Path(name).expanduser()
