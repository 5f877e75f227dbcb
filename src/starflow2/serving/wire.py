"""The form of what goes over the wire: JSON read strictly, errors as OpenAI writes them and never with our insides."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from starflow2.core.json_reader import JsonObject, parse_json
from starflow2.errors import StarFlowError, nearest, printable_line
from starflow2.serving.refusals import Refusal, refusal_of

__all__ = ["ERRORS", "StrictRoute", "error_body", "error_response", "handle_errors"]

MAX_MESSAGE = 1000  # characters
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

_ERROR_SCHEMA: JsonObject = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUS = {
    400: "a field, words or an image that cannot be taken",
    401: "no key, or none of ours",
    403: "a host or origin that is not let in",
    404: "an unknown model or response, or another key's",
    405: "another method",
    408: "too slow, or not finished within its time",
    411: "a body of unknown length that is not chunked",
    413: "a body that is too large",
    415: "a body of another type",
    429: "too much is waiting; Retry-After says when to come back",
    500: "a failure of ours",
    503: "no memory, or shutting down",
}
# declared on every route
ERRORS: dict[int | str, JsonObject] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    for status, text in _STATUS.items()
}


class _StrictRequest(Request):
    """A request whose JSON is read by the package's one reader: no key twice, no NaN, no bottomless nesting."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body(), "the body")
        return self._json


class StrictRoute(APIRoute):
    """A route that reads its JSON strictly."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strictly


def error_body(refusal: Refusal) -> JsonObject:
    """An OpenAI error object."""
    status = refusal.status
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = printable_line(str(refusal))[:MAX_MESSAGE]
    return {"error": {"message": message, "type": kind, "param": refusal.param, "code": refusal.code}}


def error_response(refusal: Refusal, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response of a refusal."""
    found = dict(headers or {})
    if refusal.retry_after is not None:
        found["Retry-After"] = str(refusal.retry_after)
    return JSONResponse(error_body(refusal), refusal.status, found)


def handle_errors(app: FastAPI) -> None:
    """Let every error of an application leave it as an OpenAI error object."""
    app.add_exception_handler(StarFlowError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


async def _ours(_: Request, error: Exception) -> Response:
    return error_response(refusal_of(error))


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = error.__cause__
    if isinstance(cause, StarFlowError):  # of reading the body
        return error_response(refusal_of(cause))
    name = HTTPStatus(error.status_code).phrase.lower()
    text = f"{name}: see /openapi.json for what there is." if error.status_code in (404, 405) else f"{name}."
    if error.status_code == 400:  # of a form that cannot be taken apart
        text = str(error.detail)
    refusal = Refusal(text, status=error.status_code, code=name.replace(" ", "_"))
    return error_response(refusal, error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=lambda each: len(each["loc"]))  # of a union: of the branch that came furthest
    param = _path(first["loc"])
    return error_response(Refusal(_message(first, param), status=400, code="invalid_value", param=param or None))


def _path(parts: Sequence[object]) -> str:
    """messages[0].content of ("body", "messages", 0, "UserMessage", "content", "str"): names of types are left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch("[a-z_0-9]+", str(part)) and part not in ("body", "str", "user", "assistant"):
            text += f".{part}"
    return text.lstrip(".")[:200]


def _message(error: Mapping[str, Any], param: str) -> str:
    if error["type"] == "extra_forbidden":
        return f"{param} is no field that this server knows; leave it out.{nearest(param, _FIELDS)}"
    if error["type"] == "json_invalid":
        return "the body is not JSON."
    if error["type"] in ("model_attributes_type", "dict_type") and not param:
        return "the body is no JSON object; send one, with Content-Type: application/json."
    return f"{param or 'the body'}: {error['msg']}."


_FIELDS = (
    "guidance",
    "seed",
    "tries",
    "timeout_s",
    "partial_images",
    "max_tokens",
    "temperature",
    "prompt",
    "messages",
)
