"""`/health`, `/metrics` and `/v1/models`: what a server is and how it is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from starflow2.core.json_reader import JsonObject
from starflow2.serving.server import Server, server_of
from starflow2.serving.wire import ERRORS, StrictRoute

__all__ = ["router"]

router = APIRouter(tags=["state"], responses=ERRORS, route_class=StrictRoute)


@router.get("/health")
async def health(request: Request) -> Response:
    """Status 200 while requests are taken, 503 while the server shuts down."""
    stats = server_of(request).service.stats()
    state = {"status": "draining" if stats.is_closing else "ok", "waiting": stats.waiting, "replying": stats.replying}
    return JSONResponse(state, 503 if stats.is_closing else 200)


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(request: Request) -> Response:
    """Counts and gauges, as Prometheus reads them."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model that is served."""
    return JSONResponse({"object": "list", "data": [_model(server_of(request))]})


@router.get("/v1/models/{model}")
async def model(request: Request, model: Annotated[str, Path(max_length=256)]) -> Response:
    """The model, if it has that name."""
    server = server_of(request)
    server.check_model(model)
    return JSONResponse(_model(server))


def _model(server: Server) -> JsonObject:
    cfg = server.service.model.components.cfg
    return {
        "id": server.name,
        "object": "model",
        "created": server.created,
        "owned_by": "starflow2",
        "input_modalities": ["text", "image"],
        "output_modalities": ["text", "image"],
        "image_size": server.size,
        "context_length": cfg.max_positions,
        "tokens_per_image": server.service.sampler.layout.num_latents,
    }
