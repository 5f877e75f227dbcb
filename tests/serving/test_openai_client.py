"""The official `openai` client, unchanged, on every route; what is streamed is what is sent whole."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from serving_cases import Live, listening, openai
from starflow2.serving.app import build_app
from starflow2.serving.service import Service

HEARTS = "two red hearts"


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def png(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def bytes_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def drawn(client) -> Any:
    return client.images.generate(model="nano", prompt=HEARTS, n=2, extra_body={"seed": 3})


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == "nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")


def test_images_are_drawn_as_the_library_draws_them(drawn, model):
    wanted = [bytes_of(each.image) for each in model.generate(HEARTS, n=2, seed=3)]
    assert [png(each.b64_json).tobytes() for each in drawn.data] == [
        Image.open(io.BytesIO(each)).tobytes() for each in wanted
    ]
    assert drawn.size == "64x64" and drawn.usage.output_tokens == 2 * 64
    assert drawn.usage.total_tokens == drawn.usage.input_tokens + 128


def test_streamed_images_are_those_sent_whole(client, drawn):
    events = list(
        client.images.generate(model="nano", prompt=HEARTS, stream=True, partial_images=2, extra_body={"seed": 3})
    )
    assert [each.type for each in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert events[-1].b64_json == drawn.data[0].b64_json and events[0].b64_json != events[1].b64_json
    assert png(events[0].b64_json).size == (64, 64)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_images_come_in_the_format_that_is_asked_for(client, form):
    found = client.images.generate(model="nano", prompt=HEARTS, output_format=form, extra_body={"seed": 3})
    assert png(found.data[0].b64_json).format == form.upper() and found.output_format == form


def test_edits_take_one_image_or_several(client, drawn):
    file = ("hearts.png", base64.b64decode(drawn.data[0].b64_json), "image/png")
    one = client.images.edit(model="nano", image=file, prompt="make the hearts blue", extra_body={"seed": 1})
    many = client.images.edit(model="nano", image=[file, file], prompt="make the hearts blue", n=2)
    events = list(
        client.images.edit(
            model="nano",
            image=file,
            prompt="make the hearts blue",
            stream=True,
            partial_images=1,
            extra_body={"seed": 1},
        )
    )
    assert one.usage.input_tokens_details.image_tokens == 64 and len(many.data) == 2
    assert [each.type for each in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert events[-1].b64_json == one.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="mask"):
        client.images.edit(model="nano", image=file, mask=file, prompt="make the hearts blue")


def chat(client, messages: list[Any], **more: Any) -> Any:
    return client.chat.completions.create(model="nano", messages=messages, **more)


def asked(text: str, *urls: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def test_chat_sees_images(client, drawn, model):
    url = f"data:image/png;base64,{drawn.data[0].b64_json}"
    found = chat(client, [asked("what color are the hearts?", url)], modalities=["text"])
    answer = model.ask(base64.b64decode(drawn.data[0].b64_json), "what color are the hearts?")
    assert found.choices[0].message.content == answer and found.choices[0].finish_reason == "stop"
    assert found.usage.prompt_tokens_details.image_tokens == 64


def test_chat_draws_and_its_client_may_send_the_reply_back(client, live):
    first = {"role": "user", "content": HEARTS}
    reply = chat(client, [first], seed=2, modalities=["image"]).choices[0].message
    assert reply.images[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert reply.content_parts == [{"type": "image_ref", "image_id": reply.images[0]["id"]}]
    encoded = live.service.counts.encoded
    follow = [first, reply.model_dump(), {"role": "user", "content": "what color are the hearts?"}]
    found = chat(client, follow, modalities=["text"])
    assert found.usage.prompt_tokens_details.cached_tokens > 64 and live.service.counts.encoded == encoded
    kept = client.responses.create(
        model="nano", input=HEARTS, tool_choice={"type": "image_generation"}, extra_body={"seed": 2}
    )
    same = client.responses.create(
        model="nano", input="what color are the hearts?", previous_response_id=kept.id, tool_choice="none"
    )
    assert found.choices[0].message.content == same.output_text


def test_streamed_chat_is_chat_sent_whole(client):
    messages = [{"role": "user", "content": "first draw a purple cross."}]
    whole = chat(client, messages, seed=1)
    chunks = list(chat(client, messages, seed=1, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    message = whole.choices[0].message
    assert "".join(delta.content or "" for delta in deltas) == message.content
    sent = [image for delta in deltas for image in getattr(delta, "images", None) or []]
    assert [each["image_url"] for each in sent] == [each["image_url"] for each in message.images]
    assert len(deltas[-1].content_parts) == len(message.content_parts)
    assert chunks[-1].usage == whole.usage


def test_a_reply_may_come_as_one_ordered_list(client):
    found = chat(
        client, [{"role": "user", "content": HEARTS}], modalities=["image"], extra_body={"content_format": "parts"}
    )
    assert [part["type"] for part in found.choices[0].message.content] == ["image_url"]


def test_the_dialect_of_vllm_omni_puts_images_into_a_choice_of_their_own(model):
    service = Service(model)
    with listening(build_app(service, dialect="vllm-omni"), service) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": HEARTS}]
        (choice,) = chat(client, messages, modalities=["image"]).choices
        assert choice.message.content[0]["type"] == "image_url"
        chunks = list(chat(client, messages, modalities=["image"], stream=True))
        assert [c.modality for c in chunks if getattr(c, "modality", None)] == ["image"]
        client.close()


def test_responses_keep_a_conversation_and_fork_it(client):
    first = client.responses.create(
        model="nano", input=HEARTS, tool_choice={"type": "image_generation"}, extra_body={"seed": 4}
    )
    assert [item.type for item in first.output] == ["image_generation_call"] and first.status == "completed"
    edits = [
        client.responses.create(
            model="nano",
            input=f"make the hearts {color}",
            previous_response_id=first.id,
            tool_choice={"type": "image_generation"},
            extra_body={"seed": 5},
        )
        for color in ("blue", "green", "blue")
    ]
    results = [edit.output[0].result for edit in edits]
    assert results[0] == results[2] != results[1]
    assert edits[0].usage.input_tokens_details.cached_tokens > 64
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nano", input=HEARTS, previous_response_id=first.id)
    later = client.responses.create(model="nano", input="how many objects are there?", previous_response_id=edits[0].id)
    assert later.output


def test_streamed_responses_are_responses_sent_whole(client):
    fields = {"model": "nano", "input": "first draw a purple cross.", "extra_body": {"seed": 1}}
    whole = client.responses.create(**fields)
    events = list(
        client.responses.create(**fields, stream=True, tools=[{"type": "image_generation", "partial_images": 1}])
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[0].response.id == events[-1].response.id
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage == whole.usage
    assert [item.type for item in last.output] == [item.type for item in whole.output]
    images = [item.result for item in whole.output if item.type == "image_generation_call"]
    assert [item.result for item in last.output if item.type == "image_generation_call"] == images
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text


def test_a_conversation_may_be_sent_whole_to_responses_too(client):
    first = client.responses.create(
        model="nano", input=HEARTS, tool_choice="required", store=False, extra_body={"seed": 4}
    )
    sent = [
        {"role": "user", "content": HEARTS},
        *(item.model_dump(exclude_none=True, exclude={"gain", "confidence"}) for item in first.output),
        {"role": "user", "content": [{"type": "input_text", "text": "what color are the hearts?"}]},
    ]
    assert client.responses.create(model="nano", input=sent, tool_choice="none").output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nano", input=HEARTS, previous_response_id=first.id)


def test_scores_are_those_of_the_model(client, drawn, model):
    image = base64.b64decode(drawn.data[0].b64_json)
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{drawn.data[0].b64_json}"}}
    body = {"query": HEARTS, "items": [[part], "a red star"], "return_patch_logprobs": True}
    found = client.post("/score", body=body, cast_to=object)
    assert found["scores"][0] == pytest.approx(model.score([HEARTS], [image]).log_prob)
    assert len(found["data"][0]["images"][0]["patch_logprobs"]) == 8


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        ("BadRequestError", {"prompt": "a zebra on a bicycle"}),
        ("BadRequestError", {"prompt": "  "}),
        ("BadRequestError", {"prompt": HEARTS, "size": "1024x1024"}),
        ("BadRequestError", {"prompt": HEARTS, "n": 11}),
        ("BadRequestError", {"prompt": HEARTS, "background": "transparent"}),
        ("BadRequestError", {"prompt": HEARTS, "extra_body": {"guidence": 1}}),
        ("BadRequestError", {"prompt": HEARTS, "extra_body": {"guidance": 1e9}}),
        ("NotFoundError", {"prompt": HEARTS, "model": "gpt-image-1"}),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(client, error, fields):
    with pytest.raises(getattr(openai, error)) as caught:
        client.images.generate(**{"model": "nano", **fields})
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["message"]


def test_an_unknown_field_is_named_with_the_one_that_was_meant(client):
    with pytest.raises(openai.BadRequestError, match=r"guidence is no field.*guidance"):
        client.images.generate(model="nano", prompt=HEARTS, extra_body={"guidence": 1})


def test_fields_may_be_nested_in_extra_body_but_not_stand_twice(client, drawn):
    body = {"prompt": HEARTS, "extra_body": {"seed": 3}}
    assert (
        client.post("/images/generations", body=body, cast_to=object)["data"][0]["b64_json"] == drawn.data[0].b64_json
    )
    with pytest.raises(openai.BadRequestError, match="seed stands both"):
        client.post("/images/generations", body={**body, "seed": 3}, cast_to=object)


def test_an_error_after_a_stream_has_begun_is_an_event(client, live):
    stream = client.images.generate(model="nano", prompt=HEARTS, n=10, stream=True, partial_images=3)
    next(iter(stream))
    for job in live.service._worker.jobs:
        job.deadline = 0.0
    with pytest.raises(openai.APIError, match="within its"):
        list(stream)
