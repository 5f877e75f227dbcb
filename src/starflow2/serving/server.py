"""The server as its routes know it: a service, its model's name, and how fields of a request become an `Ask`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from starflow2.inference.config import DrawConfig
from starflow2.inference.session import Said
from starflow2.serving.fetch import fetch_image
from starflow2.serving.jobs import Ask, Done, ImageDone, Part, ScoreAsk, TextDelta, Usage
from starflow2.serving.pictures import Fetch
from starflow2.serving.refusals import Refusal
from starflow2.serving.replies import Reply
from starflow2.serving.schemas import ReplyFields
from starflow2.serving.service import Service

__all__ = ["Dialect", "Made", "Server", "collected", "owner_of", "server_of", "spoken"]

Dialect = Literal["openai", "vllm-omni"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A service as its routes see it. fetches: images of other servers, at URLs, are taken, too."""

    service: Service
    name: str  # of the model
    created: int
    dialect: Dialect = "openai"
    fetches: bool = False

    @property
    def fetch(self) -> Fetch | None:
        """A function that reads an image from another server, if that is allowed."""
        most = self.service.limits.body_bytes
        return (lambda url: fetch_image(url, most)) if self.fetches else None

    @property
    def size(self) -> str:
        """Width and height of images, such as 64x64."""
        side = self.service.model.components.cfg.fae.image_size
        return f"{side}x{side}"

    def check_model(self, name: str | None) -> None:
        """Raise Refusal for another model than the one that is served."""
        if name not in (None, self.name):
            text = f"there is no model {name[:64]!r} here; this server has {self.name!r}."
            raise Refusal(text, status=404, code="model_not_found", param="model")

    def check_size(self, size: str | None, param: str = "size") -> None:
        """Raise Refusal for a size in which the model does not draw."""
        if size not in (None, "auto", self.size):
            text = f"{param} is {size[:32]!r}; this model draws images of {self.size}: give that, or auto."
            raise Refusal(text, status=400, code="invalid_value", param=param)

    def check_count(self, count: int, param: str) -> None:
        """Raise Refusal for more images than one request may hold."""
        most = self.service.limits.pictures
        if count > most:
            text = f"{param} has {count} images; expected at most {most} in a request."
            raise Refusal(text, status=400, code="too_many_images", param=param)

    def ask(self, fields: ReplyFields, request: Request) -> Ask:
        """Settings that all requests for a reply share, without words yet."""
        self.check_model(fields.model)
        for name, value, most in (
            ("guidance", fields.guidance, self.service.limits.guidance),
            ("tries", fields.tries, self.service.limits.tries),
        ):
            if value is not None and value > most:
                text = f"{name} is {value}; expected at most {most:g}."
                raise Refusal(text, status=400, code="invalid_value", param=name)
        seed = secrets.randbelow(2**31) if fields.seed is None else fields.seed
        config = self._config(fields.guidance)
        owner, tries = owner_of(request), fields.tries
        return Ask(parts=(), owner=owner, seed=seed, config=config, tries=tries, timeout_s=fields.timeout_s)

    def _config(self, guidance: float | None) -> DrawConfig | None:
        """Settings with another guidance, of edits, too."""
        own = self.service.sampler.config
        return None if guidance is None else replace(own, guidance=guidance, edit_guidance=None)

    async def checked(self, parts: Sequence[Said], *, is_reply: bool = False) -> list[Part]:
        """Parts as the model reads them; images are decoded in another thread."""
        return await run_in_threadpool(self.service.checked, parts, is_reply=is_reply)

    async def submit(self, asks: Sequence[Ask | ScoreAsk]) -> list[Reply]:
        """Let requests wait for their turn; a session may be read from a file meanwhile."""
        return await run_in_threadpool(self.service.submit_all, asks)


def server_of(request: Request) -> Server:
    """The server that a request is for."""
    found: Server = request.app.state.server
    return found


def owner_of(request: Request) -> str:
    """Whose a request is, as the guard found."""
    found: str = request.state.owner
    return found


@dataclass(frozen=True, slots=True)
class Made:
    """A whole reply: words and images in order, and its end."""

    parts: Sequence[str | ImageDone]
    done: Done

    @property
    def images(self) -> list[ImageDone]:
        return [part for part in self.parts if isinstance(part, ImageDone)]

    @property
    def usage(self) -> Usage:
        return self.done.usage


async def collected(reply: Reply) -> Made:
    """Wait for a whole reply. Raises what it is refused for."""
    parts: list[str | ImageDone] = []
    async for event in reply:
        if isinstance(event, TextDelta):
            before = parts.pop() if parts and isinstance(parts[-1], str) else ""
            parts.append(f"{before}{event.text}")
        elif isinstance(event, ImageDone):
            parts.append(event)
        elif isinstance(event, Done):
            return Made(parts, event)
    raise AssertionError("a reply ends with Done, or raises")


def spoken(parts: Sequence[str | ImageDone]) -> str:
    """Words of a reply, without its images."""
    return " ".join(part for part in parts if isinstance(part, str))
