"""Fields of requests for images, as in OpenAI's images API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from starflow2.serving.schemas import MAX_TEXT, ReplyFields

__all__ = ["EditRequest", "ImageRequest", "OutputFormat", "Quality"]

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
PROMPT = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


class _ImageFields(ReplyFields):
    prompt: PROMPT
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, Field(max_length=32, description="auto, or the model's own size")] | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    # what follows means nothing here
    quality: Quality | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None


class ImageRequest(_ImageFields):
    """POST /v1/images/generations."""


class EditRequest(_ImageFields):
    """Fields of POST /v1/images/edits beside its images; a form holds text, so numbers are read from it."""

    model_config = ConfigDict(extra="forbid", strict=False)
    input_fidelity: Literal["high", "low"] | None = None  # means nothing here
