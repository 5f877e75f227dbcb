"""`starflow2 chat`: the options of a conversation in the terminal. The conversation itself is in repl."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow2.cli.options import Device, Guidance, Model, PriorScale, check_seed, load_joint, refuse
from starflow2.cli.parsing import Option
from starflow2.errors import UsageError

if TYPE_CHECKING:
    from starflow2.inference.session import Session

__all__ = ["Chat"]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk with the model in the terminal, in text and images; /help lists the commands.

    A line is your turn, unless it begins with "/". Images are saved in --save-dir and shown where the terminal can.
    """

    verb: ClassVar[str] = "chat"

    save_dir: Annotated[Path, Option("where its images go", metavar="FOLDER")] = Path("out") / "chat"
    load: Annotated[Path | None, Option("continue a conversation that /save wrote", metavar="FILE")] = None
    seed: Annotated[int | None, Option("the same seed and words give the same conversation", default="0")] = None
    guidance: Guidance = None
    prior_scale: PriorScale = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_seed(self.seed or 0)
        if self.load is not None and self.seed is not None:
            raise UsageError("--seed and --load are both given; a saved conversation keeps its seed. Leave one out.")
        if self.load is not None and (self.guidance is not None or self.prior_scale is not None):
            raise UsageError("--load continues with the saved guidance and prior scale; leave out both options.")
        from starflow2.cli import repl

        session = self._session()
        sampler = session.sampler
        album = repl.Album(self.save_dir, sampler.config.recorded() | {"model": sampler.components.cfg.name})
        album.check()
        screen = repl.Screen(sys.stdout, sys.stderr, repl.graphics_of(sys.stdout, os.environ))
        chat = repl.Chat(session, screen, album)
        if self.load is not None:
            chat.load(str(self.load))
        is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if is_interactive:
            screen.note("a conversation; /help lists the commands, /quit leaves.")
        chat.run(repl.lines_of(sys.stdin, "> " if is_interactive else ""))
        return 0

    def _session(self) -> Session:
        from starflow2.inference.config import DrawConfig

        model = load_joint(self.model, self.device, self.verb)
        config = DrawConfig.for_model(model.components, guidance=self.guidance, prior_scale=self.prior_scale)
        return model.session(seed=self.seed or 0, config=config)
