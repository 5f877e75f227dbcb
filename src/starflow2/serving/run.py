"""An application run by uvicorn: where it listens, what it says, and how it stops.

SIGTERM and Ctrl-C let replies that are being made finish, within the limits' `drain_s`; a second one does not wait.
"""

from __future__ import annotations

import logging
import math
import socket

import uvicorn
from fastapi import FastAPI

from starflow2.errors import OutputError
from starflow2.serving.limits import ServeLimits

__all__ = ["run_app", "server_config"]


def server_config(app: FastAPI, limits: ServeLimits, log_level: str = "info") -> uvicorn.Config:
    """Settings of uvicorn: our own log of requests, no header that names us, a bounded time to stop in."""
    return uvicorn.Config(
        app,
        access_log=False,
        log_level=log_level,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(limits.drain_s) + 1,
        h11_max_incomplete_event_size=65536,
        ws="none",
    )


def run_app(app: FastAPI, host: str, port: int, limits: ServeLimits) -> int:
    """Serve until a signal, and return the exit status. Raises OutputError for an address that cannot be had."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    listening = _listen(host, port)
    name, found = listening.getsockname()[:2]
    shown = f"[{name}]" if ":" in name else name
    print(f"serving at http://{shown}:{found}/v1 until Ctrl-C; see http://{shown}:{found}/openapi.json", flush=True)
    server = uvicorn.Server(server_config(app, limits, "warning"))
    server.run(sockets=[listening])
    return 0 if server.started else 2


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
    except OSError as error:
        raise OutputError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another.") from error
    return listening
