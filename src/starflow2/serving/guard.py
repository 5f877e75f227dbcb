"""The guard in front of every route: host, origin, key, size and time of the body, security headers, a line in the log.

A browser may be made to send requests to a server on its own machine, so a request has to name a host that is ours, and
one that comes from a page has to come from a page of ours. The body is read here, whole and bounded, before any of it
is looked at. Nothing of a request is logged but method, path (printable), status and time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from starflow2.errors import printable_line
from starflow2.serving.keys import Keys
from starflow2.serving.limits import ServeLimits
from starflow2.serving.refusals import Refusal, refusal_of
from starflow2.serving.wire import error_response

__all__ = ["OPEN_PATHS", "Guard", "Policy"]

log = logging.getLogger("starflow2.access")
OPEN_PATHS = ("/health",)  # without a key
API = "/v1/"
# a page may run its own code and nothing else
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; font-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
}
Record = Callable[[str, int, float], None]  # route, status, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Who is let in. hosts: names by which the server may be called; None: any. origins: of foreign pages."""

    keys: Keys = field(default_factory=Keys)
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()

    def check(self, headers: Mapping[str, str], path: str) -> str:
        """Whose a request is. Raises Refusal."""
        host = headers.get("host", "").lower()
        name = urlsplit(f"//{host}").hostname if host else None
        if self.hosts is not None and name not in self.hosts:
            raise Refusal("this server is not called by that name.", status=403, code="unknown_host")
        origin = headers.get("origin", "")
        if origin and origin not in self.origins and urlsplit(origin).netloc.lower() != host:
            raise Refusal("pages of that origin are not let in.", status=403, code="unknown_origin")
        owner = self.keys.owner_of(headers)
        if owner is None and path not in OPEN_PATHS:
            text = "a key is needed: send it as Authorization: Bearer KEY."
            raise Refusal(text, status=401, code="invalid_api_key")
        return owner or ""


class Guard:
    """An application behind the guard."""

    def __init__(self, app: ASGIApp, policy: Policy, limits: ServeLimits, record: Record) -> None:
        self.app, self.policy, self.limits, self.record = app, policy, limits, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._guarded(scope, receive, send)
        else:  # nothing here speaks over a websocket
            await send({"type": "websocket.close", "code": 1008})

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status, path = time.monotonic(), 499, scope["path"]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": list(_with_ours(message["headers"], path))}
            await send(message)

        try:
            await self._let_in(scope, receive, answer)
        finally:
            seconds = time.monotonic() - start
            self.record(_route_of(scope), status, seconds)
            log.info("%s %s %d %.3f s", scope["method"], printable_line(path)[:200], status, seconds)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            owner = scope.get("trusted_owner") or self.policy.check(headers, scope["path"])  # of a door before us
            body = await self._body(headers, receive)
        except Refusal as refusal:
            await error_response(refusal, _asking_for_key(refusal, scope["path"]))(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        if body is not None:
            await self._answered(scope, _replayed(body, receive), send)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application; what it did not foresee becomes a response without a traceback."""
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception as error:
            log.exception("a request failed")
            if has_begun:
                raise
            await error_response(refusal_of(error, of_request=False))(scope, receive, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it came. Raises Refusal for too much, or too slowly."""
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.limits.body_bytes:
            raise self._too_large()
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.limits.body_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.limits.body_bytes:
                        raise self._too_large()
        except TimeoutError as error:
            text = f"the body did not come within {self.limits.body_s:g} s."
            raise Refusal(text, status=408, code="body_too_slow") from error
        return bytes(body)

    def _too_large(self) -> Refusal:
        text = f"the body is larger than {self.limits.body_bytes} bytes; send fewer or smaller images."
        return Refusal(text, status=413, code="body_too_large")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which was read, then goes on with what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return left.pop() if left else await receive()

    return next_message


def _with_ours(headers: Iterable[tuple[bytes, bytes]], path: str) -> Iterable[tuple[bytes, bytes]]:
    """Headers of a response, with those for safety."""
    kept = [(name, value) for name, value in headers if name.lower() not in HEADERS and name.lower() != b"server"]
    names = {name.lower() for name, _ in kept}
    yield from kept
    yield from HEADERS.items()
    is_api = path.startswith(API) or path in ("/health", "/metrics", "/openapi.json")
    if b"content-security-policy" not in names:
        yield b"content-security-policy", (b"default-src 'none'" if is_api else PAGE_POLICY.encode())
    if is_api and b"cache-control" not in names:
        yield b"cache-control", b"no-store"


def _asking_for_key(refusal: Refusal, path: str) -> dict[str, str]:
    """The header by which a browser asks for a key, on pages; programs get the other one."""
    if refusal.status != 401:
        return {}
    scheme = "Bearer" if path.startswith(API) else 'Basic realm="starflow2", charset="UTF-8"'
    return {"WWW-Authenticate": scheme}


def _route_of(scope: Scope) -> str:
    """The route of a request as it is declared: a label with a bounded number of values."""
    route = getattr(scope.get("route"), "path", None)
    return route if isinstance(route, str) else "other"
