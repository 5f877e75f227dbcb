"""`/v1/score`: exact likelihoods of words and images, given others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Body, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from starflow2.core.json_reader import JsonObject
from starflow2.inference.likelihood import PictureScore, Score
from starflow2.serving.jobs import Part, ScoreAsk, Scored
from starflow2.serving.refusals import Refusal
from starflow2.serving.replies import Reply
from starflow2.serving.routes_chat import read_parts
from starflow2.serving.schemas_chat import Part as SentPart
from starflow2.serving.schemas_chat import ScoreRequest
from starflow2.serving.server import Server, owner_of, server_of
from starflow2.serving.sse import while_connected
from starflow2.serving.wire import ERRORS, StrictRoute

__all__ = ["router"]

router = APIRouter(tags=["likelihood"], responses=ERRORS, route_class=StrictRoute)


@router.post("/v1/score")
async def score(request: Request, fields: Annotated[ScoreRequest, Body()]) -> Response:
    """Log probability in nats of every item as the reply to the query.

    Densities of images are of latents at a named noise level: compare them within one model and level only.
    """
    server = server_of(request)
    server.check_model(fields.model)
    query = await _parts(server, fields.query, "query", is_reply=False)
    asks = []
    for i, item in enumerate(fields.items):
        reply = await _parts(server, item, f"items[{i}]", is_reply=True)
        if not reply:
            raise Refusal(f"items[{i}] is empty.", status=400, code="invalid_value", param=f"items[{i}]")
        owner, level, timeout = owner_of(request), fields.noise_level, fields.timeout_s
        ask = ScoreAsk(prompt=query, reply=reply, owner=owner, noise_level=level, timeout_s=timeout)
        asks.append(ask)
    server.check_count(sum(not isinstance(part, str) for ask in asks for part in ask.reply), "items")
    replies = await server.submit(asks)
    return JSONResponse(await while_connected(request, _whole(server, fields, replies), replies))


async def _parts(server: Server, sent: str | Sequence[SentPart], name: str, *, is_reply: bool) -> list[Part]:
    found = await run_in_threadpool(read_parts, sent, name, server.fetch)
    server.check_count(sum(not isinstance(part, str) for part in found), name)
    return await server.checked(found, is_reply=is_reply)


async def _whole(server: Server, fields: ScoreRequest, replies: Sequence[Reply]) -> JsonObject:
    found = [await _scored(reply) for reply in replies]
    tokens = sum(each.usage.input for each in found)
    return {
        "object": "scoring",
        "model": server.name,
        "scores": [each.score.log_prob for each in found],
        "data": [{"index": i, **_item(each.score, fields)} for i, each in enumerate(found)],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }


async def _scored(reply: Reply) -> Scored:
    async for event in reply:
        if isinstance(event, Scored):
            return event
    raise AssertionError("a score ends with Scored, or raises")


def _item(score: Score, fields: ScoreRequest) -> JsonObject:
    item: JsonObject = {
        "logprob": score.log_prob,
        "text_logprob": sum(token.log_prob for token in score.tokens),
        "images": [_image(image, with_patches=bool(fields.return_patch_logprobs)) for image in score.pictures],
    }
    if fields.return_token_logprobs:
        item["token_logprobs"] = [{"token": token.text, "logprob": token.log_prob} for token in score.tokens]
    return item


def _image(image: PictureScore, *, with_patches: bool) -> JsonObject:
    found: JsonObject = {
        "logprob": image.log_prob,
        "nats_per_dim": image.nats_per_dim,
        "shallow_logdet": image.shallow_logdet,
        "noise_level": image.noise_level,
    }
    return {**found, "patch_logprobs": image.patches.tolist()} if with_patches else found
