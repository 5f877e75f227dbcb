"""`/v1/chat/completions`: a conversation that the client sends whole every time, words and images in and out.

A reply is sent as text (`content`), images (`images`) and their order (`content_parts`); or, in the dialect of
vLLM-Omni, as one choice of words and one of images; or as one ordered list (`content_format`: parts). What a client
sends back of it is found again, so that nothing is read twice.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import APIRouter, Body, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from starflow2.core.json_reader import JsonObject
from starflow2.inference.config import ReplyLimits
from starflow2.inference.session import Said
from starflow2.serving.jobs import Accepted, Ask, Done, Draft, ImageDone, Mode, Part, PastTurn, TextDelta, Usage
from starflow2.serving.pictures import Fetch, ImageFile, data_url, from_url
from starflow2.serving.refusals import Refusal
from starflow2.serving.replies import Reply
from starflow2.serving.schemas_chat import AssistantMessage, ChatRequest, Message, TextPart, UserMessage
from starflow2.serving.schemas_chat import Part as SentPart
from starflow2.serving.server import Made, Server, collected, server_of, spoken
from starflow2.serving.sse import DONE, EventStream, event, while_connected
from starflow2.serving.wire import ERRORS, StrictRoute

__all__ = ["DEFAULT_TOKENS", "MAX_IMAGES_OF_REPLY", "read_parts", "router"]

router = APIRouter(tags=["chat"], responses=ERRORS, route_class=StrictRoute)
DEFAULT_TOKENS = 64
MAX_IMAGES_OF_REPLY = 4
FILE = ImageFile()


@router.post("/v1/chat/completions")
async def complete(request: Request, fields: Annotated[ChatRequest, Body()]) -> Response:
    """Reply to a conversation."""
    server = server_of(request)
    ask = replace(server.ask(fields, request), keep="memory")
    ask = await _with_turns(server, ask, fields.messages)
    ask = replace(ask, mode=_mode(fields.modalities), limits=_limits(server, fields))
    if fields.stream:
        ask = replace(ask, drafts=fields.partial_images or 0)
    replies = await server.submit([ask])
    answer = _Answer(server, fields, f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), ask.mode)
    if fields.stream:
        events = answer.events(replies[0])
        return await EventStream.begun(request, events, replies, server.service.limits.send_s)
    made = await while_connected(request, collected(replies[0]), replies)
    return JSONResponse(await answer.whole(made))


def _mode(modalities: Sequence[str] | None) -> Mode:
    wanted = set(modalities or ("text", "image"))
    return "auto" if len(wanted) == 2 else ("image" if "image" in wanted else "text")


def _limits(server: Server, fields: ChatRequest) -> ReplyLimits:
    given = fields.max_completion_tokens or fields.max_tokens or DEFAULT_TOKENS
    tokens = min(given, server.service.limits.tokens)
    return ReplyLimits(tokens=tokens, pictures=MAX_IMAGES_OF_REPLY, temperature=fields.temperature or 0.0)


# -- messages


async def _with_turns(server: Server, ask: Ask, messages: Sequence[Message]) -> Ask:
    """The past and the open turn of messages, checked. Raises Refusal, PromptError, DataError."""
    if len(messages) > 2 * server.service.limits.turns:
        text = f"messages has {len(messages)}; expected at most {2 * server.service.limits.turns}."
        raise Refusal(text, status=400, code="invalid_value", param="messages")
    past: list[tuple[list[Part], list[Part]]] = []
    user: list[Part] = []
    images = 0
    for number, message in enumerate(messages):
        sent = await run_in_threadpool(_shown, message, f"messages[{number}]", server.fetch)
        images += sum(not isinstance(part, str) for part in sent)
        server.check_count(images, "messages")
        if isinstance(message, UserMessage):
            user += await server.checked(sent)
            continue
        if not user and (not past or number == 0):
            raise _misplaced(number, "the first message is the assistant's")
        if user:
            past.append((user, []))
            user = []
        past[-1][1].extend(await server.checked(sent, is_reply=True))
    if not user:
        raise _misplaced(len(messages) - 1, "the last message is the assistant's, or empty")
    turns: Sequence[PastTurn] = past
    return replace(ask, parts=user, past=turns)


def _misplaced(number: int, reason: str) -> Refusal:
    text = f"messages[{number}]: {reason}; expected turns of user and assistant, the user's first and last."
    return Refusal(text, status=400, code="invalid_value", param=f"messages[{number}]")


def _shown(message: Message, param: str, fetch: Fetch | None) -> list[Said]:
    """Words and images of a message, in order."""
    if isinstance(message, UserMessage):
        return read_parts(message.content, f"{param}.content", fetch)
    if message.content_parts is not None:
        return _ordered(message, param, fetch)
    sent = read_parts(message.content or "", f"{param}.content", fetch)
    images = message.images or []
    return [*sent, *(from_url(each.image_url.url, f"{param}.images[{i}]", fetch) for i, each in enumerate(images))]


def read_parts(content: str | Sequence[SentPart], param: str, fetch: Fetch | None) -> list[Said]:
    """Words and images of a content; empty words are none."""
    if isinstance(content, str):
        return [content] if content.strip() else []
    sent: list[Said] = []
    for i, part in enumerate(content):
        if not isinstance(part, TextPart):
            sent.append(from_url(part.image_url.url, f"{param}[{i}].image_url.url", fetch))
        elif part.text.strip():
            sent.append(part.text)
    return sent


def _ordered(message: AssistantMessage, param: str, fetch: Fetch | None) -> list[Said]:
    """Parts of a reply in the order in which it was given out."""
    images = {each.id: each.image_url.url for each in message.images or []}
    sent: list[Said] = []
    for i, part in enumerate(message.content_parts or []):
        at = f"{param}.content_parts[{i}]"
        if isinstance(part, TextPart):
            sent += [part.text] if part.text.strip() else []
        elif part.image_id in images:
            sent.append(from_url(images[part.image_id], at, fetch))
        else:
            text = f"{at} names the image {part.image_id!r}, which is not among images of its message."
            raise Refusal(text, status=400, code="invalid_value", param=at)
    return sent


# -- answers


@dataclass(frozen=True, slots=True)
class _Answer:
    """The form in which a reply is sent."""

    server: Server
    fields: ChatRequest
    id: str
    created: int
    mode: Mode

    def _about(self, kind: str) -> JsonObject:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.name}

    def _reason(self, done: Done) -> str:
        return "length" if done.reason == "limit" and self.mode != "image" else "stop"

    async def _image(self, done: ImageDone) -> JsonObject:
        text = await run_in_threadpool(FILE.base64, done.image)
        return {
            "type": "image_url",
            "image_url": {"url": data_url(FILE.form, text)},
            "id": f"{self.id}-{done.index}",
            "index": done.index,
        }

    def _ordered(self, parts: Sequence[str | ImageDone]) -> list[JsonObject]:
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_ref", "image_id": f"{self.id}-{part.index}"}
            for part in parts
        ]

    async def whole(self, made: Made) -> JsonObject:
        """A whole completion."""
        images = [await self._image(each) for each in made.images]
        if self.fields.content_format == "parts":
            choices = [_choice(0, {"content": self._list(made, images)}, self._reason(made.done))]
        elif self._is_omni:
            choices = self._omni(made, images)
        else:
            words = spoken(made.parts)
            message = {"content": words, "images": images, "content_parts": self._ordered(made.parts)}
            choices = [_choice(0, message, self._reason(made.done))]
        about = self._about("chat.completion")
        return {**about, "choices": choices, "usage": _usage(made.usage), "seed": made.done.seed}

    def _list(self, made: Made, images: Sequence[JsonObject]) -> list[JsonObject]:
        """Words and images as one ordered list."""
        left = iter(images)
        parts = made.parts
        return [{"type": "text", "text": part} if isinstance(part, str) else _plain(next(left)) for part in parts]

    def _omni(self, made: Made, images: Sequence[JsonObject]) -> list[JsonObject]:
        """One choice of words, one of images."""
        reason, words = self._reason(made.done), spoken(made.parts)
        found = [_choice(0, {"content": words}, reason)] if words or not images else []
        return found + [_choice(len(found), {"content": [_plain(each) for each in images]}, reason)] * bool(images)

    # -- streams

    def _chunk(self, delta: JsonObject, reason: str | None = None, **more: object) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event({**self._about("chat.completion.chunk"), "choices": [choice], **more})

    async def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """Chunks of a completion as they are made, then what a client needs to send it back."""
        parts: list[str | ImageDone] = []
        async for each in reply:
            match each:
                case Accepted():
                    yield self._chunk({"role": "assistant", "content": ""})
                case TextDelta():
                    yield self._words(each.text, parts)
                case Draft():
                    yield await self._draft(each)
                case ImageDone():
                    yield await self._drawn(each, parts)
                case Done():
                    for data in self._end(each, parts):
                        yield data

    def _words(self, text: str, parts: list[str | ImageDone]) -> bytes:
        """More words; a blank parts them from words before an image, as in `spoken`."""
        follows = bool(parts) and not isinstance(parts[-1], str) and any(isinstance(part, str) for part in parts)
        before = parts.pop() if parts and isinstance(parts[-1], str) else ""
        parts.append(f"{before}{text}")
        return self._chunk({"content": f" {text}" if follows else text}, **self._modality("text"))

    async def _draft(self, draft: Draft) -> bytes:
        text = data_url(FILE.form, await run_in_threadpool(FILE.base64, draft.image))
        image = {"index": draft.index, "partial_image_index": draft.number, "image_url": {"url": text}}
        return self._chunk({"partial_images": [image]}, **self._modality("image"))

    async def _drawn(self, done: ImageDone, parts: list[str | ImageDone]) -> bytes:
        parts.append(done)
        image = await self._image(done)
        delta = {"content": [_plain(image)]} if self._is_omni else {"images": [image]}
        return self._chunk(delta, **self._modality("image"))

    def _end(self, done: Done, parts: Sequence[str | ImageDone]) -> Iterator[bytes]:
        delta = {} if self._is_omni else {"content_parts": self._ordered(parts)}
        yield self._chunk(delta, self._reason(done), seed=done.seed)
        options = self.fields.stream_options
        if options is not None and options.include_usage:
            yield event({**self._about("chat.completion.chunk"), "choices": [], "usage": _usage(done.usage)})
        yield DONE

    @property
    def _is_omni(self) -> bool:
        return self.server.dialect == "vllm-omni" and self.fields.content_format is None

    def _modality(self, name: str) -> JsonObject:
        return {"modality": name} if self._is_omni else {}


def _choice(index: int, message: JsonObject, reason: str) -> JsonObject:
    whole = {"role": "assistant", "refusal": None, **message}
    return {"index": index, "message": whole, "finish_reason": reason, "logprobs": None}


def _plain(image: JsonObject) -> JsonObject:
    return {"type": "image_url", "image_url": image["image_url"]}


def _usage(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "image_tokens": usage.input_images},
        "completion_tokens_details": {"image_tokens": usage.output_images, "reasoning_tokens": 0},
    }
