"""Images of other servers, fetched only where the operator allows it, and never from inside.

The name is looked up once; every address it has must be public, and the connection goes to the address that was looked
at, so that a second lookup cannot lead elsewhere. Redirects are not followed. Size and time are bounded.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

from starflow2.serving.refusals import Refusal

__all__ = ["fetch_image", "public_address"]

TIMEOUT_S = 10.0
CHUNK = 2**16


def fetch_image(url: str, most_bytes: int) -> bytes:
    """The bytes at an http or https URL of a public server. Raises Refusal."""
    parts, until = _split(url), time.monotonic() + TIMEOUT_S
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = _connection(parts, public_address(str(parts.hostname), port), port)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "starflow2"})
        response = connection.getresponse()
        if response.status != 200:
            _refuse(f"that server answered with status {response.status}; redirects are not followed")
        return _body(response, most_bytes, until)
    except (OSError, http.client.HTTPException, ValueError) as error:
        _refuse(f"that server could not be read ({type(error).__name__})")
    finally:
        connection.close()


def public_address(host: str, port: int) -> str:
    """The first address of a name, all of which have to be public. Raises Refusal."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        _refuse("there is no server of that name")
    if not found or not all(_is_public(address) for address in found):
        _refuse("it is not a public address")
    return sorted(found)[0]


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if inner is not None and not _is_public(str(inner)):
        return False
    return found.is_global and not found.is_multicast


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.username is None and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or any(ord(sign) < 33 or ord(sign) > 126 for sign in url):
        _refuse("it is no plain http or https URL")
    return parts


def _connection(parts: SplitResult, address: str, port: int) -> http.client.HTTPConnection:
    """A connection to an address that presents itself with the name of the URL."""
    host = parts.hostname or ""
    raw = socket.create_connection((address, port), TIMEOUT_S)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    is_secure = parts.scheme == "https"
    connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if is_secure else raw
    return connection


def _body(response: http.client.HTTPResponse, most_bytes: int, until: float) -> bytes:
    data = bytearray()
    while chunk := response.read(CHUNK):
        data += chunk
        if len(data) > most_bytes:
            _refuse(f"it has more than {most_bytes} bytes")
        if time.monotonic() > until:
            _refuse(f"it took more than {TIMEOUT_S:g} s")
    return bytes(data)


def _refuse(reason: str) -> NoReturn:
    text = f"the image's URL cannot be fetched: {reason}. Send the image as a data URL."
    raise Refusal(text, status=400, code="invalid_image_url")
