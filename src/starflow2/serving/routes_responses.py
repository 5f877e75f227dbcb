"""`/v1/responses`: a conversation that the server keeps; each response is a state that any number may continue.

`previous_response_id` goes on from a kept response: two continuations of one are a fork. The output is a list of items
in the order in which the model made them; streamed, every item comes as it is made.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import APIRouter, Body, Path, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from starflow2.core.json_reader import JsonObject
from starflow2.inference.config import ReplyLimits
from starflow2.inference.session import Said
from starflow2.serving.jobs import (
    Accepted,
    Ask,
    Done,
    Draft,
    Event,
    ImageBegun,
    ImageDone,
    Mode,
    Part,
    TextDelta,
    Usage,
)
from starflow2.serving.pictures import ImageFile, from_base64, from_url
from starflow2.serving.refusals import Refusal
from starflow2.serving.replies import Reply
from starflow2.serving.routes_chat import DEFAULT_TOKENS, MAX_IMAGES_OF_REPLY
from starflow2.serving.schemas_responses import CallItem, InputItem, ResponseRequest, TextInput, ToolChoice
from starflow2.serving.server import Server, owner_of, server_of
from starflow2.serving.sse import EventStream, event, while_connected
from starflow2.serving.wire import ERRORS, StrictRoute

__all__ = ["router"]

router = APIRouter(tags=["responses"], responses=ERRORS, route_class=StrictRoute)


@router.post("/v1/responses")
async def respond(request: Request, fields: Annotated[ResponseRequest, Body()]) -> Response:
    """Reply to a turn after a kept response, or after none."""
    server = server_of(request)
    ask = await _with_turns(server, _settings(server, fields, request), fields)
    writer = _Writer(server, fields, ask.id or "", _file(fields))
    replies = await server.submit([ask])
    if fields.stream:
        events = _events(writer, replies[0])
        return await EventStream.begun(request, events, replies, server.service.limits.send_s)
    return JSONResponse(await while_connected(request, _whole(writer, replies[0]), replies))


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: Annotated[str, Path(max_length=128)]) -> Response:
    """Delete a kept response; those that continued it stay."""
    service = server_of(request).service
    await run_in_threadpool(service.drop, response_id, owner_of(request))
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


# -- the request


def _settings(server: Server, fields: ResponseRequest, request: Request) -> Ask:
    tool = fields.tools[0] if fields.tools else None
    server.check_size(None if tool is None else tool.size, "tools[0].size")
    ask = server.ask(fields, request)
    tokens = min(fields.max_output_tokens or DEFAULT_TOKENS, server.service.limits.tokens)
    drafts = (tool.partial_images or 0) if tool is not None and fields.stream else 0
    return replace(
        ask,
        mode=_mode(fields),
        limits=ReplyLimits(tokens=tokens, pictures=MAX_IMAGES_OF_REPLY, temperature=fields.temperature or 0.0),
        previous=fields.previous_response_id,
        keep="no" if fields.store is False else "stored",
        id=server.service.new_id(),
        drafts=drafts,
    )


def _mode(fields: ResponseRequest) -> Mode:
    if isinstance(fields.tool_choice, ToolChoice) or fields.tool_choice == "required":
        return "image"
    return "text" if fields.tool_choice == "none" or fields.tools == [] else "auto"


def _file(fields: ResponseRequest) -> ImageFile:
    tool = fields.tools[0] if fields.tools else None
    return ImageFile() if tool is None else ImageFile.of(tool.output_format, tool.output_compression)


async def _with_turns(server: Server, ask: Ask, fields: ResponseRequest) -> Ask:
    """The open turn of an input, and the turns before it that the input holds. Raises Refusal."""
    if isinstance(fields.input, str):
        return replace(ask, parts=await server.checked([fields.input]))
    past: list[tuple[list[Part], list[Part]]] = []
    user: list[Part] = []
    images = 0
    for number, item in enumerate(fields.input):
        is_reply = isinstance(item, CallItem) or item.role == "assistant"
        sent = await run_in_threadpool(_shown, item, f"input[{number}]", server)
        images += sum(not isinstance(part, str) for part in sent)
        server.check_count(images, "input")
        parts = await server.checked(sent, is_reply=is_reply)
        if not is_reply:
            user += parts
        elif user or past:
            if user:
                past.append((user, []))
                user = []
            past[-1][1].extend(parts)
        else:
            raise _misplaced(number, "the first item is the assistant's")
    if not user:
        raise _misplaced(len(fields.input) - 1, "the last item is the assistant's, or empty")
    if past and ask.previous is not None:
        text = "input holds earlier turns and previous_response_id is given, too; send one of them."
        raise Refusal(text, status=400, code="invalid_value", param="input")
    return replace(ask, parts=user, past=past)


def _misplaced(number: int, reason: str) -> Refusal:
    text = f"input[{number}]: {reason}; expected turns of user and assistant, the user's first and last."
    return Refusal(text, status=400, code="invalid_value", param=f"input[{number}]")


def _shown(item: InputItem, param: str, server: Server) -> list[Said]:
    """Words and images of an item."""
    if isinstance(item, CallItem):
        return [from_base64(item.result, f"{param}.result")]
    if isinstance(item.content, str):
        return [item.content] if item.content.strip() else []
    sent: list[Said] = []
    for i, part in enumerate(item.content):
        if not isinstance(part, TextInput):
            sent.append(from_url(part.image_url, f"{param}.content[{i}].image_url", server.fetch))
        elif part.text.strip():
            sent.append(part.text)
    return sent


# -- the response


@dataclass(slots=True)
class _Writer:
    """Turns the events of a reply into those of a response, and into its output."""

    server: Server
    fields: ResponseRequest
    id: str
    file: ImageFile
    created: int = field(default_factory=lambda: int(time.time()))
    output: list[JsonObject] = field(default_factory=list)
    words: str = ""  # of the message that is open
    number: int = 0  # of the next event

    @property
    def _is_open(self) -> bool:
        """True while a message is being written."""
        return bool(self.output) and self.output[-1].get("status") == "in_progress" and "content" in self.output[-1]

    def response(self, status: str, done: Done | None = None) -> JsonObject:
        """The response as it is now."""
        tool = [{"type": "image_generation"}] if self.fields.tool_choice != "none" else []
        given = self.fields.tool_choice
        is_limited = done is not None and done.reason == "limit" and _mode(self.fields) != "image"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "incomplete" if is_limited else status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_limited else None,
            "instructions": None,
            "metadata": self.fields.metadata or {},
            "model": self.server.name,
            "output": self.output,
            "parallel_tool_calls": False,
            "previous_response_id": self.fields.previous_response_id,
            "store": done is not None and done.id is not None,
            "temperature": self.fields.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": given.model_dump() if isinstance(given, ToolChoice) else given or "auto",
            "tools": tool,
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": None if done is None else _usage(done.usage),
            "seed": None if done is None else done.seed,
        }

    def event(self, kind: str, **data: object) -> bytes:
        found = {"type": kind, "sequence_number": self.number, **data}
        self.number += 1
        return event(found, kind)

    async def take(self, each: Event) -> list[bytes]:
        """Note an event of the reply; the events that tell of it."""
        match each:
            case Accepted():
                start = self.response("in_progress")
                return [self.event(f"response.{kind}", response=start) for kind in ("created", "in_progress")]
            case TextDelta():
                return [*self._open_message(), self._delta(each.text)]
            case ImageBegun():
                return [*self._close_message(), *self._begin_image()]
            case Draft():
                return [self._partial(each, await run_in_threadpool(self.file.base64, each.image))]
            case ImageDone():
                return self._end_image(each, await run_in_threadpool(self.file.base64, each.image))
            case Done():
                ended = self._close_message()
                whole = self.response("completed", each)
                return [*ended, self.event(f"response.{whole['status']}", response=whole)]
        return []

    # -- words

    def _open_message(self) -> Iterator[bytes]:
        if self._is_open:
            return
        item = {"type": "message", "id": _name("msg"), "role": "assistant", "status": "in_progress", "content": []}
        self.output.append(item)
        self.words = ""
        yield self.event("response.output_item.added", output_index=self._index, item=item)
        yield self.event("response.content_part.added", **self._place, part=_text(""))

    def _delta(self, text: str) -> bytes:
        self.words += text
        return self.event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def _close_message(self) -> list[bytes]:
        if not self._is_open:
            return []
        self.output[-1] |= {"status": "completed", "content": [_text(self.words)]}
        return [
            self.event("response.output_text.done", **self._place, text=self.words, logprobs=[]),
            self.event("response.content_part.done", **self._place, part=_text(self.words)),
            self.event("response.output_item.done", output_index=self._index, item=self.output[-1]),
        ]

    @property
    def _index(self) -> int:
        return len(self.output) - 1

    @property
    def _place(self) -> JsonObject:
        return {"item_id": self.output[-1]["id"], "output_index": self._index, "content_index": 0}

    # -- images

    def _begin_image(self) -> Iterator[bytes]:
        item = {"type": "image_generation_call", "id": _name("ig"), "status": "in_progress", "result": None}
        self.output.append(item)
        yield self.event("response.output_item.added", output_index=self._index, item=item)
        for kind in ("in_progress", "generating"):
            yield self.event(f"response.image_generation_call.{kind}", item_id=item["id"], output_index=self._index)

    def _about_image(self) -> JsonObject:
        return {"size": self.server.size, "output_format": self.file.form, "background": "opaque", "quality": "high"}

    def _partial(self, draft: Draft, text: str) -> bytes:
        return self.event(
            "response.image_generation_call.partial_image",
            item_id=self.output[-1]["id"],
            output_index=self._index,
            partial_image_index=draft.number,
            partial_image_b64=text,
            **self._about_image(),
        )

    def _end_image(self, done: ImageDone, text: str) -> list[bytes]:
        numbers = {"gain": done.gain, "confidence": done.confidence}
        self.output[-1] |= {"status": "completed", "result": text, **self._about_image(), **numbers}
        item = self.output[-1]
        kind = "response.image_generation_call.completed"
        return [
            self.event(kind, item_id=item["id"], output_index=self._index),
            self.event("response.output_item.done", output_index=self._index, item=item),
        ]


async def _whole(writer: _Writer, reply: Reply) -> JsonObject:
    async for each in reply:
        await writer.take(each)
        if isinstance(each, Done):
            return writer.response("completed", each)
    raise AssertionError("a reply ends with Done, or raises")


async def _events(writer: _Writer, reply: Reply) -> AsyncIterator[bytes]:
    async for each in reply:
        for data in await writer.take(each):
            yield data


def _text(words: str) -> JsonObject:
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": []}


def _name(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.input,
        "input_tokens_details": {
            "cached_tokens": usage.cached,
            "cache_write_tokens": 0,
            "image_tokens": usage.input_images,
        },
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": 0, "image_tokens": usage.output_images},
        "total_tokens": usage.input + usage.output,
    }
