"""A server on a free port of this machine, for tests that speak HTTP.

A module that imports this one is skipped where a package of the extra serve, or the client, is missing.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from starflow2.serving.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

for _name in ("fastapi", "python_multipart", "prometheus_client"):
    pytest.importorskip(_name, reason=f"{_name} is not installed; it comes with the extra serve")
openai = pytest.importorskip("openai", reason="openai is not installed; it comes with the dev extra")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed; it comes with the extra serve")


@dataclass(frozen=True)
class Live:
    """A server that listens."""

    app: FastAPI
    service: Service
    url: str


@contextmanager
def listening(app: FastAPI, service: Service) -> Iterator[Live]:
    """Run an application on a free port of this machine."""
    from starflow2.serving.run import server_config

    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app, service.limits, "error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield Live(app, service, f"http://127.0.0.1:{door.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
