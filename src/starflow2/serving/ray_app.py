"""Several replicas of a server behind one address, by Ray Serve: `serve run starflow2.serving.ray_app:build`.

One process is the door: it checks keys and bodies, and passes a request on to the replica that keeps its conversation,
or to the one with least to do. Every replica is a whole server in a process of its own, alone in a deployment, so that
it can be addressed; Ray starts it again when it dies. What dies with it is refused by name, unless replicas share a
folder of sessions: then any of them goes on.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from starflow2.core.serialize import from_dict
from starflow2.errors import ConfigError
from starflow2.serving.app import build_app
from starflow2.serving.guard import Guard, Policy
from starflow2.serving.keys import Keys
from starflow2.serving.limits import ServeLimits
from starflow2.serving.refusals import Refusal
from starflow2.serving.routing import Choice, choose
from starflow2.serving.wire import error_response

__all__ = ["Door", "Replica", "build"]

AVOIDED_S = 30.0  # for which nothing new is asked of a replica that died: so long it takes to begin again
PASSED_ON = ("type", "method", "path", "raw_path", "query_string", "headers", "http_version", "scheme", "asgi")


class Replica:
    """A whole server; requests come as calls, and its answer as ASGI messages. number: of this replica, from 0."""

    def __init__(self, number: int, model: str, folder: str | None, limits: ServeLimits) -> None:
        from starflow2.pipeline import StarFlow2
        from starflow2.serving.service import Service

        kept = None if folder is None else Path(folder)
        service = Service(StarFlow2.from_pretrained(model), limits, kept, number=number)
        self.app = build_app(service)
        service.start()
        self.service = service

    async def process(self) -> int:
        """Number of the process that this replica is, for who looks after it."""
        return os.getpid()

    async def answer(self, scope: dict[str, object], body: bytes, owner: str) -> AsyncIterator[Message]:
        """Messages of the answer to a request; leaving the loop over them is a client that leaves."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def serve() -> None:
            try:
                await self.app({**scope, "state": {"owner": owner}, "trusted_owner": owner}, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.ensure_future(serve())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()
            await asyncio.wait({task}, timeout=5)


class _Passed(Response):
    """A response that a whole application gives."""

    def __init__(self, app: Guard) -> None:
        self._app = app
        super().__init__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class Door:
    """The one address of all replicas; replicas: handles of their deployments."""

    def __init__(self, keys: list[str], limits: ServeLimits, is_shared: bool, *replicas: Any) -> None:
        self._replicas = [handle.options(stream=True).answer for handle in replicas]
        self._loads, self._is_shared = [0] * len(replicas), is_shared
        self._down_until = [0.0] * len(replicas)
        self._guard = Guard(self._pass_on, Policy(keys=Keys(keys)), limits, lambda *_: None)

    async def __call__(self, request: Request) -> Response:
        return _Passed(self._guard)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")
        for number in self._order(choose(scope["path"], body, self._loads)):
            if await self._answered(number, scope, body, receive, send):
                return
            self._down_until[number] = time.monotonic() + AVOIDED_S
        await error_response(_gone())(scope, receive, send)

    def _order(self, choice: Choice) -> list[int]:
        """Replicas to ask in turn, those that have just died last; none where what is asked for died with one."""
        now = time.monotonic()
        is_down = [until > now for until in self._down_until]
        if choice.is_pinned and not self._is_shared:
            return [] if is_down[choice.number] else [choice.number]
        numbers = [choice.number, *(i for i in range(len(is_down)) if i != choice.number)]
        return sorted(numbers, key=is_down.__getitem__)

    async def _answered(self, number: int, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Let a replica answer; False if it died before it began to."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RequestCancelledError

        passed = {name: scope[name] for name in PASSED_ON if name in scope}
        messages = self._replicas[number].remote(passed, body, scope["state"]["owner"])
        leaving = asyncio.ensure_future(_until_gone(receive))
        self._loads[number] += 1
        has_begun, start = False, list[Message]()  # the start is held back until something follows it
        try:
            leaving.add_done_callback(lambda task: None if task.cancelled() else messages.cancel())
            async for message in messages:
                if message["type"] == "http.response.start":
                    start = [message]
                    continue
                if not message.get("more_body", False):
                    leaving.cancel()  # a client that has all of it may go
                has_begun = True
                for each in (*start, message):
                    await send(each)
                start = []
        except (RequestCancelledError, asyncio.CancelledError):
            if not leaving.done():
                raise
        except RayError:
            if has_begun:  # what was sent stands; the connection ends without its end
                raise
            return False
        finally:
            self._loads[number] -= 1
            leaving.cancel()
        return True


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _gone() -> Refusal:
    text = "the replica that kept this conversation is gone, and its memory with it; begin a new conversation."
    return Refusal(text, status=503, code="replica_gone", retry_after=10)


def build(arguments: Mapping[str, str]) -> Any:
    """A Ray Serve application: replicas=2 model=nano sessions=FOLDER keys=FILE, and fields of `ServeLimits`."""
    from ray import serve

    given = dict(arguments)
    count, model = int(given.pop("replicas", "2")), given.pop("model", "nano")
    folder, keys = given.pop("sessions", None), given.pop("keys", None)
    limits = _limits(given)
    listed = [] if keys is None else [line for line in Path(keys).read_text(encoding="utf-8").split() if line]
    if count < 1:
        raise ConfigError(f"replicas is {count}; expected at least 1.")
    replicas = [
        serve.deployment(Replica, name=f"replica-{i}", max_ongoing_requests=1024).bind(i, model, folder, limits)
        for i in range(count)
    ]
    door = serve.deployment(Door, name="door", max_ongoing_requests=4096)
    return door.bind(listed, limits, folder is not None, *replicas)


def _limits(given: Mapping[str, str]) -> ServeLimits:
    """Limits with some numbers given as text. Raises ConfigError for an unknown name."""
    own = asdict(ServeLimits())
    numbers = {name: float(text) if isinstance(own.get(name), float) else int(text) for name, text in given.items()}
    return from_dict(ServeLimits, {**own, **numbers})
