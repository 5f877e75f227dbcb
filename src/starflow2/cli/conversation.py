"""`starflow2 ask`, `edit` and `chat`: conversations with a model whose two streams were trained together.

Like all of cli, importing this file imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional, arg

from starflow2.cli.options import (
    Device,
    Guidance,
    JsonFile,
    Model,
    PriorScale,
    check_json,
    check_png,
    check_seed,
    console,
    own,
    png_text,
    printable,
    refuse,
    write_json,
)
from starflow2.errors import ConfigError

if TYPE_CHECKING:
    from starflow2.inference.session import Session
    from starflow2.pipeline import StarFlow2

__all__ = [
    "Ask",
    "Chat",
    "Edit",
    "ImageFile",
    "PngFile",
    "conversing",
]


ImageFile = Annotated[Path, arg(metavar="IMAGE", help="a picture file; its middle square is looked at")]
PngFile = Annotated[Path, arg(aliases=("-o",), metavar="FILE", help="a .png file")]
Seed = Annotated[int, arg(help="the same seed draws the same picture")]


def conversing(name: str, device: str, verb: str) -> StarFlow2:
    """The model of that name. Raises ConfigError if its streams were not trained together, CheckpointError."""
    from starflow2.pipeline import StarFlow2

    with console(stderr=True).status("loading"):
        model = StarFlow2.from_pretrained(name, device=device)
    if not model.is_joint:
        done = ", ".join(model.components.finished_stages) or "none"
        raise ConfigError(f"this model has finished stages {done}; {verb} needs joint, too: train it, or use another.")
    return model


# -- ask and edit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Answer a question about a picture."""

    verb: ClassVar[str] = "ask"

    image: Positional[ImageFile]
    question: Positional[Annotated[str, arg(metavar="QUESTION", help="what to ask, in quotes")]]
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        model = conversing(self.model, self.device, self.verb)
        answer = model.ask(self.image, self.question)
        print(printable(answer))
        told = {"image": str(self.image), "question": self.question, "answer": answer}
        write_json(told | {"model": model.components.cfg.name}, self.json)
        return 0


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Change a picture as told."""

    verb: ClassVar[str] = "edit"

    image: Positional[ImageFile]
    instruction: Positional[Annotated[str, arg(metavar="INSTRUCTION", help="what to change, in quotes")]]
    output: PngFile = Path("out.png")
    seed: Seed = 0
    guidance: Guidance = None
    prior_scale: PriorScale = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_seed(self.seed)
        check_png(self.output)
        check_json(self.json)
        from starflow2.core.images import save_png
        from starflow2.inference.config import DrawConfig

        model = conversing(self.model, self.device, self.verb)
        config = DrawConfig.for_model(model.components, guidance=self.guidance, prior_scale=self.prior_scale)
        with console(stderr=True).status("drawing"):
            made = model.edit(self.image, self.instruction, seed=self.seed, config=config)
        about = png_text(self.instruction, self.seed, made.settings)
        save_png(made.image, self.output, about | {"source": str(self.image)})
        print(self.output)
        told = {"file": str(self.output), "image": str(self.image), "instruction": self.instruction}
        write_json(told | {"seed": self.seed, "settings": made.settings, "gain": made.gain}, self.json)
        return 0


# -- chat -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk with the model in the terminal, in words and pictures; /help lists what else a line can do."""

    verb: ClassVar[str] = "chat"

    save_dir: Annotated[Path, arg(metavar="FOLDER", help="where its pictures go")] = Path("out") / "chat"
    load: Annotated[Path | None, own("FILE", "go on with a conversation that /save kept", "")] = None
    seed: Annotated[int | None, own("INT", "the same seed and words give the same conversation", "0")] = None
    guidance: Guidance = None
    prior_scale: PriorScale = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_seed(self.seed or 0)
        if self.load is not None and self.seed is not None:
            raise ConfigError("--seed and --load are both given; a kept conversation goes on with its own seed.")
        if self.load is not None and (self.guidance is not None or self.prior_scale is not None):
            raise ConfigError("--load goes on with the guidance and prior scale of what it loads; leave both out.")
        from starflow2.cli import repl as chat

        session = self._session()
        sampler = session.sampler
        album = chat.Album(self.save_dir, sampler.config.told() | {"model": sampler.components.cfg.name})
        album.check()
        screen = chat.Screen(sys.stdout, sys.stderr, chat.graphics_of(sys.stdout, os.environ))
        talk = chat.Chat(session, screen, album)
        if self.load is not None:
            talk.load(str(self.load))
        asks = sys.stdin.isatty() and sys.stdout.isatty()
        if asks:
            screen.note("a conversation; /help tells what lines can do, /quit leaves.")
        talk.run(chat.lines_of(sys.stdin, "> " if asks else ""))
        return 0

    def _session(self) -> Session:
        from starflow2.inference.config import DrawConfig

        model = conversing(self.model, self.device, self.verb)
        config = DrawConfig.for_model(model.components, guidance=self.guidance, prior_scale=self.prior_scale)
        return model.session(seed=self.seed or 0, config=config)
