"""`starflow2 serve`: the options of a server. The server itself is in the wing serving."""

from __future__ import annotations

import importlib.util
import os
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from starflow2.cli.options import Device, Model, load_joint, refuse
from starflow2.cli.parsing import Option
from starflow2.errors import UsageError

if TYPE_CHECKING:
    from starflow2.serving.guard import Policy
    from starflow2.serving.limits import ServeLimits

__all__ = ["Serve"]

Dialect = Literal["openai", "vllm-omni"]


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve the model over HTTP, as OpenAI's clients speak to theirs.

    It listens on this machine alone. Any other address needs keys: a file of them, one a line, or the environment
    variable STARFLOW2_API_KEYS.
    """

    verb: ClassVar[str] = "serve"

    host: Annotated[str, Option("address to listen on", metavar="ADDRESS")] = "127.0.0.1"
    port: Annotated[int, Option("port to listen on; 0: any that is free")] = 8000
    keys: Annotated[Path | None, Option("a file of keys, one a line", metavar="FILE")] = None
    sessions: Annotated[
        Path | None, Option("where conversations are kept over a restart", default="in memory only", metavar="FOLDER")
    ] = None
    number: Annotated[
        int, Option("of this process among those behind one address; ids of its responses begin with it")
    ] = 0
    rows: Annotated[int, Option("replies that are computed at once")] = 16
    queue: Annotated[int, Option("replies that may wait; more are told to come back")] = 128
    session_memory: Annotated[int, Option("MiB of memory for conversations")] = 512
    deadline: Annotated[float, Option("seconds after which a reply is given up")] = 120.0
    chat_dialect: Annotated[Dialect, Option("how images stand in chat replies", metavar="{openai,vllm-omni}")] = (
        "openai"
    )
    allow_urls: Annotated[bool, Option("fetch images of requests from public servers")] = False
    open: Annotated[bool, Option("show the page in a browser; it needs the extra ui")] = False
    allow_origin: Annotated[str | None, Option("let pages of this origin in", metavar="ORIGIN")] = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        if not 0 <= self.port < 65536:
            raise UsageError(f"--port is {self.port}; expected 0 to 65535.")
        if not 0 <= self.number < 2**16:
            raise UsageError(f"--number is {self.number}; expected 0 to {2**16 - 1}.")
        if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
            raise UsageError("serve needs packages that are not installed: pip install 'starflow2[serve]'.")
        has_page = importlib.util.find_spec("gradio") is not None
        if self.open and not has_page:
            raise UsageError("--open needs packages that are not installed: pip install 'starflow2[serve,ui]'.")
        policy, limits = self._policy(), self._limits()
        os.environ.setdefault(
            "GOMP_SPINCOUNT", "0"
        )  # read when torch is loaded: its idle threads leave the cores to us
        from starflow2.serving.app import build_app
        from starflow2.serving.run import PAGE, run_app, with_page
        from starflow2.serving.service import Service

        model = load_joint(self.model, self.device, self.verb)
        service = Service(model, limits, self.sessions, number=self.number)
        extend = with_page(service) if has_page else None
        app = build_app(service, policy=policy, dialect=self.chat_dialect, fetches=self.allow_urls, extend=extend)
        opens = webbrowser.open if self.open else None
        return run_app(app, self.host, self.port, limits, PAGE if has_page else "", opens)

    def _policy(self) -> Policy:
        from starflow2.serving.guard import Policy
        from starflow2.serving.keys import ENVIRONMENT, Keys, is_loopback

        keys = Keys.load(self.keys)
        if not len(keys) and not is_loopback(self.host):
            raise UsageError(
                f"--host is {self.host}, which others can reach; give --keys FILE, or keys in {ENVIRONMENT}."
            )
        names = frozenset({"127.0.0.1", "localhost", "::1", self.host.lower().strip("[]")})
        origins = frozenset() if self.allow_origin is None else frozenset({self.allow_origin})
        return Policy(keys=keys, hosts=None if len(keys) else names, origins=origins)

    def _limits(self) -> ServeLimits:
        from starflow2.serving.limits import ServeLimits

        return ServeLimits(
            rows=self.rows, queue=self.queue, deadline_s=self.deadline, memory_bytes=2**20 * self.session_memory
        )
