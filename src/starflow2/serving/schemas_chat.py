"""Fields of requests for a chat completion, as in OpenAI's chat API, and of likelihoods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from starflow2.serving.schemas import MAX_TEXT, NEUTRAL_STRING, Fields, One, ReplyFields, Zero

__all__ = [
    "AssistantMessage",
    "ChatRequest",
    "ImagePart",
    "ImageRef",
    "Message",
    "Part",
    "ReplyImage",
    "ScoreRequest",
    "TextPart",
    "UserMessage",
]

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Url = Annotated[str, Field(max_length=2**26, description="a data URL")]


class TextPart(Fields):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageUrl(Fields):
    """An image as a URL; detail means nothing here."""

    url: Url
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Fields):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ImageRef(Fields):
    """An image of the same message, by its id."""

    type: Literal["image_ref"]
    image_id: Annotated[str, Field(max_length=128)]


class ReplyImage(ImagePart):
    """An image of a reply, as it was given out."""

    id: Annotated[str, Field(max_length=128)] | None = None
    index: Annotated[int, Field(ge=0)] | None = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
OrderedPart = Annotated[TextPart | ImageRef, Field(discriminator="type")]


class UserMessage(Fields):
    """A message of the user."""

    role: Literal["user"]
    content: Text | Annotated[list[Part], Field(max_length=256)]
    name: NEUTRAL_STRING | None = None


class AssistantMessage(Fields):
    """A message of the model, as it was given out or without what a client has dropped of it."""

    role: Literal["assistant"]
    content: Text | Annotated[list[Part], Field(max_length=256)] | None = None
    images: Annotated[list[ReplyImage], Field(max_length=256)] | None = None
    content_parts: Annotated[list[OrderedPart], Field(max_length=512)] | None = None
    name: NEUTRAL_STRING | None = None
    refusal: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


Message = Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Fields):
    """Plain text is all there is."""

    type: Literal["text"]


class ChatRequest(ReplyFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    content_format: Literal["openai", "parts"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    # what follows means nothing here, and is taken with values that change nothing
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    top_p: One | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None
    store: bool | None = None
    prompt_cache_key: NEUTRAL_STRING | None = None
    reasoning_effort: Literal["none", "minimal"] | None = None


Sent = Text | Annotated[list[Part], Field(max_length=64)]


class ScoreRequest(Fields):
    """POST /v1/score."""

    model: Annotated[str, Field(max_length=256)] | None = None
    query: Sent
    items: Annotated[list[Sent], Field(min_length=1, max_length=32)]
    noise_level: Annotated[float, Field(ge=0)] | None = None
    return_token_logprobs: bool | None = None
    return_patch_logprobs: bool | None = None
    timeout_s: Annotated[float, Field(gt=0, le=3600)] | None = None
    user: NEUTRAL_STRING | None = None
