"""`/v1/images/generations` and `/v1/images/edits`: one turn, one image, `n` times with consecutive seeds."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from fastapi import APIRouter, Body, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from starflow2.core.json_reader import JsonObject
from starflow2.serving.jobs import Ask, Done, Draft, ImageDone, Part, Usage
from starflow2.serving.pictures import ImageFile, data_url
from starflow2.serving.refusals import Refusal
from starflow2.serving.replies import Reply
from starflow2.serving.schemas_images import EditRequest, ImageRequest
from starflow2.serving.server import Made, Server, collected, server_of
from starflow2.serving.sse import EventStream, event, while_connected
from starflow2.serving.wire import ERRORS, StrictRoute

__all__ = ["router"]

router = APIRouter(tags=["images"], responses=ERRORS, route_class=StrictRoute)
Kind = Literal["image_generation", "image_edit"]


@dataclass(frozen=True, slots=True)
class _Order:
    """Images to be drawn, and the form in which they are wanted."""

    kind: Kind
    fields: ImageRequest | EditRequest
    server: Server
    file: ImageFile

    def about(self) -> JsonObject:
        """Fields that answers and events share."""
        return {
            "background": "opaque",
            "output_format": self.file.form,
            "quality": "high",
            "size": self.server.size,
        }

    async def image(self, done: ImageDone, seed: int) -> JsonObject:
        text = await run_in_threadpool(self.file.base64, done.image)
        is_url = self.fields.response_format == "url"
        return {
            "b64_json": None if is_url else text,
            "url": data_url(self.file.form, text) if is_url else None,
            "revised_prompt": None,
            "seed": seed,
            "gain": done.gain,
            "confidence": done.confidence,
        }


@router.post("/v1/images/generations")
async def generate(request: Request, fields: Annotated[ImageRequest, Body()]) -> Response:
    """Draw images of a prompt."""
    server = server_of(request)
    ask = server.ask(fields, request)
    return await _answer(request, "image_generation", fields, ask, await server.checked([fields.prompt]))


_EDIT_FORM: JsonObject = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1},
                        **EditRequest.model_json_schema()["properties"],
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post("/v1/images/edits", openapi_extra=_EDIT_FORM)
async def edit(request: Request) -> Response:
    """Draw images anew as an instruction says. A mask is refused: the instruction says what changes."""
    server = server_of(request)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refusal("the body is no form; send multipart/form-data.", status=415, code="unsupported_media_type")
    async with request.form(max_files=server.service.limits.pictures + 1, max_fields=64) as form:
        uploads = _uploads(form)
        fields, images = _of_form(form), [await upload.read() for upload in uploads]
    server.check_count(len(images), "image")
    ask = server.ask(fields, request)
    parts = await server.checked([*images, fields.prompt])
    return await _answer(request, "image_edit", fields, ask, parts)


def _uploads(form: FormData) -> list[UploadFile]:
    """The images of a form. Raises Refusal for a mask, for none, and for text in place of a file."""
    for name, value in form.multi_items():
        if name in ("mask", "markup"):
            text = f"{name} is not taken by this model: say in the prompt what to change, and what to leave."
            raise Refusal(text, status=400, code="unsupported_field", param=name)
        if (name in ("image", "image[]")) != isinstance(value, UploadFile):
            text = f"{name} is {'a file' if isinstance(value, UploadFile) else 'no file'}; only image is one."
            raise Refusal(text, status=400, code="invalid_value", param=name)
    found = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not found:
        raise Refusal("image is missing; send the file to edit.", status=400, code="missing_field", param="image")
    return found


def _of_form(form: FormData) -> EditRequest:
    """The text fields of a form. Raises Refusal for one that is given twice, RequestValidationError."""
    texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str) and name != "mask"]
    names = [name for name, _ in texts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        text = f"{twice[0]} is given {names.count(twice[0])} times; give it once."
        raise Refusal(text, status=400, code="invalid_value", param=twice[0])
    try:
        return EditRequest.model_validate(dict(texts))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_context=False)) from error


async def _answer(
    request: Request, kind: Kind, fields: ImageRequest | EditRequest, ask: Ask, parts: Sequence[Part]
) -> Response:
    """Draw, and send all at once or as events."""
    server, count = server_of(request), fields.n or 1
    server.check_size(fields.size)
    if count > server.service.limits.images:
        text = f"n is {count}; expected at most {server.service.limits.images}."
        raise Refusal(text, status=400, code="invalid_value", param="n")
    drafts = (fields.partial_images or 0) if fields.stream else 0
    asks = [replace(ask, parts=parts, mode="image", seed=ask.seed + i, drafts=drafts) for i in range(count)]
    order = _Order(kind, fields, server, ImageFile.of(fields.output_format, fields.output_compression))
    replies = await server.submit(asks)
    if fields.stream:
        return await EventStream.begun(request, _events(order, replies), replies, server.service.limits.send_s)
    return JSONResponse(await while_connected(request, _whole(order, replies), replies))


async def _whole(order: _Order, replies: Sequence[Reply]) -> JsonObject:
    made = [await collected(reply) for reply in replies]
    images = [await order.image(each.images[0], each.done.seed) for each in made]
    return {"created": int(time.time()), "data": images, **order.about(), "usage": _usage(_sum(made))}


async def _events(order: _Order, replies: Sequence[Reply]) -> AsyncIterator[bytes]:
    """Partial images and the whole one, image by image."""
    for reply in replies:
        image: ImageDone | None = None
        async for each in reply:
            if isinstance(each, Draft):
                text = await run_in_threadpool(order.file.base64, each.image)
                yield _event(order, "partial_image", {"b64_json": text, "partial_image_index": each.number})
            elif isinstance(each, ImageDone):
                image = each
            elif isinstance(each, Done) and image is not None:
                data = await order.image(image, each.seed)
                data["b64_json"] = data["b64_json"] or data["url"].partition(",")[2]
                yield _event(order, "completed", {**data, "usage": _usage(each.usage)})


def _event(order: _Order, name: str, data: JsonObject) -> bytes:
    kind = f"{order.kind}.{name}"
    return event({"type": kind, "created_at": int(time.time()), **order.about(), **data}, kind)


def _sum(made: Sequence[Made]) -> Usage:
    names = ("input_text", "input_images", "cached", "output_text", "output_images")
    return Usage(**{name: sum(getattr(each.usage, name) for each in made) for name in names})


def _usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.input,
        "input_tokens_details": {"text_tokens": usage.input_text, "image_tokens": usage.input_images},
        "output_tokens": usage.output,
        "output_tokens_details": {"text_tokens": usage.output_text, "image_tokens": usage.output_images},
        "total_tokens": usage.input + usage.output,
    }
