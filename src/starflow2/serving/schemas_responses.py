"""Fields of requests for a response, as in OpenAI's Responses API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from starflow2.serving.schemas import MAX_TEXT, NEUTRAL_STRING, Fields, One, ReplyFields
from starflow2.serving.schemas_images import OutputFormat, Quality

__all__ = ["CallItem", "ImageInput", "InputItem", "MessageItem", "ResponseRequest", "TextInput", "ToolChoice"]

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Id = Annotated[str, Field(max_length=128)]
Status = Literal["in_progress", "completed", "incomplete", "generating", "failed"]


class TextInput(Fields):
    """Words, of the user or of an earlier reply."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Annotated[list[None], Field(max_length=0)] | None = None
    logprobs: Annotated[list[None], Field(max_length=0)] | None = None


class ImageInput(Fields):
    """An image; detail means nothing here."""

    type: Literal["input_image"]
    image_url: Annotated[str, Field(max_length=2**26, description="a data URL")]
    detail: Literal["auto", "low", "high", "original"] | None = None


Content = Annotated[TextInput | ImageInput, Field(discriminator="type")]


class MessageItem(Fields):
    """A message of the user, or of an earlier reply that is sent back."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant"]
    content: Text | Annotated[list[Content], Field(max_length=256)]
    id: Id | None = None
    status: Status | None = None
    phase: NEUTRAL_STRING | None = None


class CallItem(Fields):
    """An image of an earlier reply that is sent back."""

    type: Literal["image_generation_call"]
    id: Id
    result: Annotated[str, Field(max_length=2**26, description="base64")]
    status: Status | None = None
    size: Annotated[str, Field(max_length=32)] | None = None
    output_format: OutputFormat | None = None
    quality: Quality | None = None
    background: Literal["auto", "opaque"] | None = None
    revised_prompt: NEUTRAL_STRING | None = None
    action: Literal["generate", "edit", "auto"] | None = None


InputItem = MessageItem | CallItem


class ImageTool(Fields):
    """The drawing of images, which this model does itself."""

    type: Literal["image_generation"]
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    size: Annotated[str, Field(max_length=32)] | None = None
    # what follows means nothing here
    model: NEUTRAL_STRING | None = None
    quality: Quality | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    action: Literal["generate", "edit", "auto"] | None = None
    input_fidelity: Literal["high", "low"] | None = None


class ToolChoice(Fields):
    """A choice of the one tool: the reply is an image."""

    type: Literal["image_generation"]


class TextFormat(Fields):
    """Plain text is all there is."""

    type: Literal["text"]


class TextConfig(Fields):
    """How words are written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(ReplyFields):
    """POST /v1/responses."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=512)]
    previous_response_id: Id | None = None
    store: bool | None = None
    stream: bool | None = None
    tools: Annotated[list[ImageTool], Field(max_length=1)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    # what follows means nothing here, and is taken with values that change nothing
    background: Literal[False] | None = None
    include: Annotated[list[None], Field(max_length=0)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: NEUTRAL_STRING | None = None
    text: TextConfig | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    top_p: One | None = None
    truncation: Literal["disabled"] | None = None
