"""Server-sent events, and replies that stop when nobody is there to hear them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from starflow2.core.json_reader import JsonObject
from starflow2.serving.refusals import Refusal, cancelled, refusal_of
from starflow2.serving.replies import Reply
from starflow2.serving.wire import error_body

__all__ = ["DONE", "EventStream", "event", "while_connected"]

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def event(data: JsonObject, name: str | None = None) -> bytes:
    """One event; its JSON stands on one line."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def while_connected(request: Request, work: Awaitable[T], replies: Sequence[Reply]) -> T:
    """Wait for a result; should the client leave before, cancel the replies and raise Refusal."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise cancelled()
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        for reply in replies:
            reply.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of events that ends, and cancels its replies, when the client leaves or takes nothing for `send_s`.

    An error on the way becomes an event of its own. The first event is awaited before anything is sent, so that what is
    wrong with a request has its own status.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], replies: Sequence[Reply], send_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._replies, self._send_s = events, replies, send_s
        self._first: bytes | None = None

    @classmethod
    async def begun(
        cls, request: Request, events: AsyncIterator[bytes], replies: Sequence[Reply], send_s: float
    ) -> EventStream:
        """A stream whose first event is there. Raises what the request is refused for."""
        stream = cls(events, replies, send_s)
        task = asyncio.ensure_future(anext(events))
        gone = asyncio.ensure_future(_gone(request.receive))
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        try:
            if not task.done():
                raise cancelled()
            stream._first = task.result()
        except BaseException:
            task.cancel()
            for reply in replies:
                reply.cancel()
            raise
        return stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            for reply in self._replies:
                reply.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            if self._first is not None:
                await self._send(send, self._first)
            async for data in self._events:
                await self._send(send, data)
        except Refusal as refusal:
            await self._send(send, event(error_body(refusal), "error"))
        except TimeoutError:
            return  # the client takes nothing
        except Exception as error:
            await self._send(send, event(error_body(refusal_of(error, of_request=False)), "error"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        message: Message = {"type": "http.response.body", "body": data, "more_body": True}
        await asyncio.wait_for(send(message), self._send_s)
