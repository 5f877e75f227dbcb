"""A conversation in the terminal: lines in, text and images out, through one Session.

A line is the user's turn, or a command that begins with "/". Replies and the names of image files go to the output,
notes and errors to the error stream, so that a conversation can be piped. Not here: the conversation itself
(inference.session), the options of `starflow2 chat` (cli.chat).
"""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from starflow2.cli.notes import FAR, unlike
from starflow2.cli.options import check_text, png_text, printable
from starflow2.core.files import check_writable
from starflow2.core.images import PILImage, read_picture, save_png
from starflow2.errors import OutputError, PromptError, StarFlowError, StateError, UsageError, nearest
from starflow2.inference.events import Drew, Event, Finished, Made, Wrote
from starflow2.inference.likelihood import image_nats
from starflow2.inference.self_check import CONFIRMED
from starflow2.inference.session import Mark, Session

__all__ = ["Album", "Chat", "Graphics", "Screen", "graphics_of", "inline", "lines_of"]

Graphics = Literal["none", "blocks", "iterm2", "kitty"]
COLUMNS = 64  # width of an image, at most
CHUNK = 4096  # base64 characters per escape code of kitty
SESSION_SUFFIX = ".safetensors"
HELP = """A line is your turn; the model replies with text, an image, or both.
  /show FILE     add an image to your turn, then say something
  /draw [WORDS]  answer the turn with an image
  /undo          take the last turn back
  /save FILE     save the conversation (.safetensors)
  /load FILE     continue a saved one
  /help          this list
  /quit          leave; so does the end of the input"""


# -- images in a terminal ---------------------------------------------------------------------------------------------


def graphics_of(stream: TextIO, environ: Mapping[str, str]) -> Graphics:
    """How `stream` can show images; "none" for anything but a terminal, so that no escape code gets into a pipe."""
    term = environ.get("TERM", "")
    if not stream.isatty() or term in ("", "dumb") or environ.get("NO_COLOR"):
        return "none"
    in_between = "TMUX" in environ or term.startswith(("screen", "tmux"))  # passes colours on, but not images
    program = environ.get("TERM_PROGRAM", "")
    if not in_between and ("KITTY_WINDOW_ID" in environ or term == "xterm-kitty" or program == "ghostty"):
        return "kitty"
    if not in_between and (program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2"):
        return "iterm2"
    return "blocks" if "utf" in (stream.encoding or "").lower() else "none"


def inline(image: PILImage, graphics: Graphics, columns: int = COLUMNS) -> str:
    """Text that makes a terminal show the image, at most `columns` characters wide; "" for "none"."""
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
    """The image in upper half blocks: a character shows one pixel in its colour and the one below in its background."""
    height = max(2, 2 * round(image.height * width / image.width / 2))
    pixels = np.asarray(image.convert("RGB").resize((width, height)))  # (height, width, 3)
    rows = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = [f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower, strict=True)]
        rows.append("".join(cells) + "\x1b[0m\n")
    return "".join(rows)


# -- screen and album --------------------------------------------------------------------------------------------------


class Screen:
    """Output of a conversation: replies on `out`, notes and errors on `err`."""

    def __init__(self, out: TextIO, err: TextIO, graphics: Graphics = "none") -> None:
        self.out, self.err, self.graphics = out, err, graphics
        self._in_line = False  # the cursor is in the middle of a line
        self._in_bar = False

    def write(self, text: str) -> None:
        """Write a piece of a reply as it arrives."""
        self.end_bar()
        text = printable(text) if self._in_line else printable(text).lstrip()
        self.out.write(text)
        self.out.flush()
        self._in_line = (self._in_line or bool(text)) and not text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line of output, unless the cursor is at the start of one."""
        self.end_bar()
        if self._in_line:
            self.out.write("\n")
        self.out.flush()
        self._in_line = False

    def line(self, text: str) -> None:
        """Write a whole line of output."""
        self.end_line()
        self.out.write(printable(text) + "\n")
        self.out.flush()

    def image(self, image: PILImage, path: Path) -> None:
        """Show the image if the terminal can, and the name of its file."""
        self.end_line()
        self.out.write(inline(image, self.graphics, shutil.get_terminal_size().columns))
        self.line(f"[{path}]")

    def bar(self, done: int, total: int) -> None:
        """Show how many latents of an image are drawn, on a terminal only."""
        if self.err.isatty():
            self.err.write(f"\rdrawing {done}/{total}")
            self.err.flush()
            self._in_bar = True

    def end_bar(self) -> None:
        """Clear the progress bar."""
        if self._in_bar:
            self.err.write("\r" + " " * 40 + "\r")
            self.err.flush()
        self._in_bar = False

    def note(self, text: str) -> None:
        """Write one line to the error stream."""
        self.end_line()
        self.err.write(" ".join(printable(text).split()) + "\n")
        self.err.flush()


@dataclass(frozen=True, slots=True)
class Album:
    """A folder of numbered images; existing files are kept."""

    folder: Path
    settings: Mapping[str, Any]  # written into every PNG

    def check(self) -> None:
        """Raise OutputError if no image can be written to the folder."""
        check_writable(self.next)

    @property
    def next(self) -> Path:
        """The first file name that is still free."""
        names = {path.name for path in self.folder.glob("picture-*.png")}
        number = next(i for i in range(1, len(names) + 2) if f"picture-{i:03}.png" not in names)
        return self.folder / f"picture-{number:03}.png"

    def add(self, image: PILImage, prompt: str, seed: int) -> Path:
        """Write an image and return its file."""
        path = self.next
        save_png(image, path, png_text(prompt, seed, self.settings))
        return path


def lines_of(stream: TextIO, prompt: str = "", ask: Callable[[str], str] = input) -> Iterator[str]:
    """Lines of a file or pipe; or of a terminal, where `ask` requests each with `prompt` and an editable history.

    Raises PromptError for bytes that are not text.
    """
    try:
        if not stream.isatty():
            yield from stream
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys work from here on
        while True:
            try:
                line = ask(prompt)
            except EOFError:
                print()
                return
            yield line
    except UnicodeDecodeError as error:
        raise PromptError(f"the input is not text: {error}.") from error


# -- the conversation -------------------------------------------------------------------------------------------------


class Chat:
    """A conversation driven by lines: `take` acts on one of them, `run` on all."""

    def __init__(self, session: Session, screen: Screen, album: Album) -> None:
        self.session, self.screen, self.album = session, screen, album
        self._marks: list[Mark] = []  # one before every turn, to undo it
        self._commands: dict[str, Callable[[str], None]] = {
            "show": self._show,
            "draw": self._draw,
            "undo": self._undo,
            "save": self._save,
            "load": self.load,
            "help": self._help,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Act on every line, up to /quit or the end."""
        for line in lines:
            if not self.take(line):
                return

    def take(self, line: str) -> bool:
        """Act on one line; False if it ends the conversation. An error costs one note, and the session continues."""
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
            raise UsageError(f"there is no /{name}; expected /{', /'.join(known)}.{nearest(name, known)}")
        return self._commands[name]

    # -- turns

    def _say(self, words: str) -> None:
        with self._turn():
            self.session.add(words)
            self._print(self.session.run(tries=None), words)
        if form := unlike(self.session.sampler.components, words, "edit", "draw", "ask"):
            self.screen.note(form)

    def _show(self, file: str) -> None:
        path = _file(file, "/show picture.png")
        before = self.session.mark()
        self.session.add(path)
        self._count(before)
        self.screen.note(f"{path} is now part of your turn; say something.")
        self._note_far(path)

    def _note_far(self, path: Path) -> None:
        """Say that an image is unlike all that the model was trained on."""
        sampler = self.session.sampler
        limit = sampler.components.cfg.far_nats
        if limit is not None:
            (nats,) = image_nats(sampler, [read_picture(path, sampler.components.cfg.fae.image_size)])
            if nats > limit:
                self.screen.note(FAR)

    def _draw(self, words: str) -> None:
        if not words and not self.session.mark().is_open:
            raise PromptError("/draw needs words: /draw two pink hearts.")
        with self._turn():
            if words:
                self.session.add(words)
            made = self.session.draw()
            self._show_made(made, words)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside the block a turn is completed and answered; an error or Ctrl-C undoes that, but keeps images shown."""
        before = self.session.mark()
        try:
            yield
        except BaseException as error:
            self.session.rewind(before)
            if not isinstance(error, KeyboardInterrupt):
                raise
            self.screen.note("stopped; the turn is taken back.")
            return
        self._count(before)

    def _count(self, before: Mark) -> None:
        """Record that a turn began at `before`, unless images had begun it earlier."""
        if not before.is_open or not self._marks:
            self._marks.append(before)

    def _print(self, events: Generator[Event], words: str) -> None:
        before = len(self.session.pieces)
        with contextlib.closing(events):  # leaving the loop early takes the reply back at once
            for event in events:
                match event:
                    case Wrote():
                        self.screen.write(event.text)
                    case Drew():
                        self.screen.bar(event.done, event.total)
                    case Made():
                        self._show_made(event, words)
                    case Finished(reason="limit"):
                        self.screen.note("the reply reached its limit and ends here.")
        self.screen.end_line()
        if len(self.session.pieces) == before:
            self.screen.note("the model says nothing.")

    def _show_made(self, made: Made, words: str) -> None:
        self.screen.image(made.image, self.album.add(made.image, words, self.session.seed))
        if made.confidence is not None and made.confidence <= CONFIRMED:
            self.screen.note(f"it confirms none of its tries; the likeliest is shown ({made.confidence:.0%}).")

    # -- time and files

    def _undo(self, _: str) -> None:
        if not self._marks:
            raise StateError("there is no turn to take back.")
        self.session.rewind(self._marks.pop())
        self.screen.note("the last turn is taken back.")

    def _save(self, file: str) -> None:
        path = _file(file, f"/save chat{SESSION_SUFFIX}")
        if path.suffix != SESSION_SUFFIX:
            raise OutputError(f"cannot write {path}: expected a name that ends in {SESSION_SUFFIX}.")
        self.session.save(path)
        self.screen.note(f"saved as {path}.")

    def load(self, file: str) -> None:
        """Continue a saved conversation, and print what was said in it."""
        path = _file(file, f"/load chat{SESSION_SUFFIX}")
        self.session = Session.load(path, self.session.sampler)
        self._marks = []
        for piece in self.session.pieces:
            words = "[an image]" if piece.text is None else piece.text
            self.screen.line(f"> {words}" if piece.who == "user" else words)

    def _help(self, _: str) -> None:
        self.screen.line(HELP)


def _file(name: str, example: str) -> Path:
    if not name:
        raise UsageError(f"the name of a file is missing: {example}.")
    return Path(name).expanduser()
