"""An application run by uvicorn: where it listens, what it says, and how it stops.

SIGTERM and Ctrl-C let replies that are being made finish, within the limits' `drain_s`; a second one does not wait.
"""

from __future__ import annotations

import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from starflow2.errors import OutputError
from starflow2.serving.limits import ServeLimits
from starflow2.serving.service import Service

__all__ = ["PAGE", "run_app", "server_config", "with_page"]

PAGE = "/page"


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


def with_page(service: Service) -> Callable[[FastAPI], FastAPI]:
    """A function that adds the page to an application; it needs Gradio."""

    def extend(app: FastAPI) -> FastAPI:
        from starflow2.serving.page import mount_page

        return mount_page(app, service, PAGE)

    return extend


def run_app(
    app: FastAPI,
    host: str,
    port: int,
    limits: ServeLimits,
    page: str = "",
    opens: Callable[[str], object] | None = None,
) -> int:
    """Serve until a signal, and return the exit status. Raises OutputError for an address that cannot be had.

    page: path of the page, if there is one. opens: called with its address as soon as it is there.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    listening = _listen(host, port)
    name, found = listening.getsockname()[:2]
    shown = f"[{name}]" if ":" in name else name
    print(f"serving at http://{shown}:{found}/v1 until Ctrl-C; see http://{shown}:{found}/openapi.json", flush=True)
    server = uvicorn.Server(server_config(app, limits, "warning"))
    if page:
        print(f"the page: http://{shown}:{found}{page}/", flush=True)
    if opens is not None:
        address = f"http://{shown}:{found}{page}/"
        threading.Thread(target=_open, args=(server, address, opens), daemon=True).start()
    with _sigterm_only_stops():
        server.run(sockets=[listening])
    return 0 if server.started else 2


@contextmanager
def _sigterm_only_stops() -> Iterator[None]:
    """Context in which SIGTERM does not end the process.

    uvicorn stops at it and then raises it once more, which would end the process before the service has closed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open(server: uvicorn.Server, address: str, opens: Callable[[str], object]) -> None:
    """Wait for the server, then show an address."""
    while not server.started:
        time.sleep(0.05)
    opens(address)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
    except OSError as error:
        raise OutputError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another.") from error
    return listening
