"""The application: all routes of a service, behind its guard."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

import starflow2
from starflow2.serving import routes_chat, routes_images, routes_responses, routes_score, routes_state
from starflow2.serving.guard import Guard, Policy
from starflow2.serving.metrics import Metrics
from starflow2.serving.server import Dialect, Server
from starflow2.serving.service import Service
from starflow2.serving.wire import handle_errors

__all__ = ["build_app"]

ROUTERS = (routes_images, routes_chat, routes_responses, routes_score, routes_state)


def build_app(
    service: Service,
    *,
    policy: Policy | None = None,
    dialect: Dialect = "openai",
    fetches: bool = False,
    extend: Callable[[FastAPI], FastAPI] | None = None,
) -> FastAPI:
    """An application that starts the service with itself and drains it when it stops.

    policy: who is let in; without one, everybody. dialect: of chat replies. fetches: images at URLs of public servers
    are taken. extend: adds a page to the application.
    """
    metrics = Metrics(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="starflow2",
        version=starflow2.__version__,
        lifespan=lifespan,
        docs_url=None,  # that page would load its code from elsewhere
        redoc_url=None,
    )
    app.state.server = Server(
        service=service,
        name=service.model.components.cfg.name,
        created=int(time.time()),
        dialect=dialect,
        fetches=fetches,
    )
    app.state.metrics = metrics
    for module in ROUTERS:
        app.include_router(module.router)
    handle_errors(app)
    app.add_middleware(Guard, policy=policy or Policy(), limits=service.limits, record=metrics.record)
    return app if extend is None else extend(app)
