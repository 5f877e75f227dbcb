"""The server's guard: which requests it lets in, and that hostile, slow and lost clients leave nothing behind."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import socket
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from serving_cases import Live, listening
from starflow2.errors import ConfigError, UsageError
from starflow2.serving.app import build_app
from starflow2.serving.fetch import fetch_image, public_address
from starflow2.serving.guard import Policy
from starflow2.serving.jobs import LOCAL
from starflow2.serving.keys import Keys, is_loopback
from starflow2.serving.limits import ServeLimits
from starflow2.serving.refusals import Refusal
from starflow2.serving.service import Service

ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789abc"
DRAW = {"prompt": "two red hearts", "seed": 1}


def call(
    live: Live, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of a request."""
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=30)
    sent = json.dumps(body) if isinstance(body, dict | list) else body
    kind = {"Content-Type": "application/json"} if isinstance(body, dict | list) else {}
    connection.request(method, path, sent, {**kind, **(headers or {})})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    found = {name.lower(): value for name, value in response.getheaders()}
    return response.status, found, json.loads(data) if "json" in found.get("content-type", "") else data


def post(live: Live, path: str, body: object, **headers: str) -> tuple[int, Any]:
    status, _, data = call(live, "POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return status, data


@pytest.fixture(scope="module")
def locked(model) -> Iterator[Live]:
    service = Service(model, ServeLimits(body_bytes=2**18, body_s=1.0))
    with listening(build_app(service, policy=Policy(keys=Keys([ALICE, BOB]))), service) as found:
        yield found


# -- keys, hosts, origins


def test_a_key_opens_what_it_owns_and_nothing_else(locked):
    assert post(locked, "/v1/images/generations", DRAW)[0] == 401
    assert post(locked, "/v1/images/generations", DRAW, Authorization="Bearer wrong")[0] == 401
    body = {"input": "two red hearts", "tool_choice": "required"}
    status, mine = post(locked, "/v1/responses", body, Authorization=f"Bearer {ALICE}")
    assert status == 200
    follow = {"input": "how many objects are there?", "previous_response_id": mine["id"]}
    assert post(locked, "/v1/responses", follow, Authorization=f"Bearer {BOB}")[0] == 404
    assert call(locked, "DELETE", f"/v1/responses/{mine['id']}", headers={"Authorization": f"Bearer {BOB}"})[0] == 404
    assert post(locked, "/v1/responses", follow, Authorization=f"Bearer {ALICE}")[0] == 200
    basic = base64.b64encode(f"anybody:{ALICE}".encode()).decode()
    assert call(locked, "GET", "/v1/models", headers={"Authorization": f"Basic {basic}"})[0] == 200
    assert call(locked, "GET", "/health")[0] == 200 and call(locked, "GET", "/metrics")[0] == 401


def test_no_log_and_no_error_holds_a_key_or_an_escape(locked, caplog):
    with caplog.at_level(logging.INFO, "starflow2.access"):
        status, found = post(locked, "/v1/%1b%5b2J%0aevil", DRAW, Authorization=f"Bearer {ALICE}")
        until = time.monotonic() + 5
        while "evil" not in caplog.text and time.monotonic() < until:  # it is written after the answer
            time.sleep(0.01)
    text = caplog.text + json.dumps(found)
    assert status == 404 and ALICE not in text and "\x1b" not in text and "evil" in caplog.text
    assert len([line for line in caplog.text.splitlines() if "evil" in line]) == 1


def test_keys_are_long_and_without_them_only_loopback_is_served():
    with pytest.raises(ConfigError, match="at least 16"):
        Keys(["short"])
    assert Keys().owner_of({}) == LOCAL
    assert is_loopback("127.0.0.5") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org") and not is_loopback("127.0.0.1.example.org")


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{ALICE}\n\n", encoding="utf-8")
    keys = Keys.load(file, {"STARFLOW2_API_KEYS": f"{BOB},"})
    owners = {keys.owner_of({"authorization": f"Bearer {key}"}) for key in (ALICE, BOB)}
    assert len(owners) == 2 and None not in owners and len(keys) == 2
    file.write_text("# none\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no key"):
        Keys.load(file, {})


def test_the_command_serves_others_only_behind_a_key(monkeypatch):
    from starflow2.cli.serve import Serve

    monkeypatch.delenv("STARFLOW2_API_KEYS", raising=False)
    with pytest.raises(UsageError, match="which others can reach"):
        Serve(host="0.0.0.0").run([])
    with pytest.raises(UsageError, match="--port"):
        Serve(port=70000).run([])


def test_pages_of_others_and_other_names_of_this_machine_are_kept_out(model):
    policy = Policy(hosts=frozenset({"127.0.0.1"}), origins=frozenset({"https://app.example"}))
    for host, origin, is_let_in in (
        ("127.0.0.1:8000", "", True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("127.0.0.1:8000", "https://app.example", True),
        ("evil.example", "", False),
        ("127.0.0.1:8000", "https://evil.example", False),
        ("127.0.0.1:8000", "null", False),
    ):
        headers = {"host": host, "origin": origin}
        if is_let_in:
            assert policy.check(headers, "/v1/models") == LOCAL
        else:
            with pytest.raises(Refusal) as caught:
                policy.check(headers, "/v1/models")
            assert caught.value.status == 403


def test_every_response_has_the_headers_for_safety(live):
    for path in ("/v1/models", "/nothing", "/openapi.json"):
        _, headers, _ = call(live, "GET", path)
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "server" not in headers and "content-security-policy" in headers


# -- bodies


def test_bodies_are_bounded_in_size_and_time(locked):
    key = {"Authorization": f"Bearer {ALICE}"}
    big = {"prompt": "x" * 2**19}
    assert call(locked, "POST", "/v1/images/generations", big, key)[0] == 413
    with socket.create_connection(locked.url.removeprefix("http://").split(":")) as slow:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
        slow.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        assert b" 408 " in slow.recv(1000)
    with socket.create_connection(locked.url.removeprefix("http://").split(":")) as chunked:
        chunked.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(5):
            chunked.sendall(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
        assert b" 413 " in chunked.recv(1000)


def url_of(image: Image.Image, form: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def bomb() -> str:
    """A PNG of a few kilobytes that says it has 30,000 x 30,000 pixels."""
    head = b"\x89PNG\r\n\x1a\n"
    data = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunk = (13).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    return "data:image/png;base64," + base64.b64encode(head + chunk + b"\0" * 2000).decode()


def seen(url: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "how many objects are there?"}]
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,!!!!",
        "data:image/png;base64,aGVsbG8=",
        "data:text/html,<script>",
        "http://127.0.0.1:1/a.png",
        "https://169.254.169.254/latest",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        bomb(),
        url_of(Image.new("RGB", (2000, 2000))),
        url_of(Image.new("RGB", (64, 64)), "PNG")[:-40],
        url_of(Image.new("CMYK", (64, 64)), "JPEG"),
    ],
    ids=lambda url: url[:40],
)
def test_images_that_cannot_be_taken_are_the_clients_fault(live, url):
    before = live.service.counts.joined
    status, found = post(live, "/v1/chat/completions", seen(url))
    assert status == 400 and found["error"]["message"] and "passwd" not in found["error"]["message"]
    assert live.service.counts.joined == before


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/images/generations", '{"prompt": "two red hearts", "prompt": "a red star"}', "twice"),
        ("/v1/images/generations", '{"prompt": "two red hearts", "guidance": NaN}', "finite"),
        ("/v1/images/generations", "[" * 100_000, "JSON"),
        ("/v1/images/generations", "not JSON", "JSON"),
        ("/v1/images/generations", "[]", "object"),
        ("/v1/images/generations", '{"prompt": 3}', "prompt"),
        ("/v1/images/generations", '{"prompt": "two red hearts", "n": "2"}', "n"),
        ("/v1/images/generations", '{"prompt": "two\\u202ered hearts"}', "hidden"),
        ("/v1/images/generations", '{"prompt": "two \\ud800 hearts"}', "unicode"),
        ("/v1/chat/completions", '{"messages": []}', "messages"),
        ("/v1/chat/completions", '{"messages": [{"role": "system", "content": "x"}]}', "role"),
        ("/v1/chat/completions", '{"messages": [{"role": "assistant", "content": "x"}]}', "first"),
        ("/v1/responses", '{"input": "how many objects are there?", "previous_response_id": "../../x"}', "no response"),
        ("/v1/score", '{"query": "two red hearts", "items": [""]}', "empty"),
        ("/v1/score", '{"query": "two red hearts", "items": ["x"], "noise_level": 7}', "noise_level"),
    ],
)
def test_requests_that_cannot_be_read_say_why(live, path, body, says):
    status, found = post(live, path, body, Content_Type="application/json")
    assert status in (400, 404) and says in found["error"]["message"]


def form(*fields: tuple[str, str | bytes]) -> tuple[bytes, str]:
    """A multipart body and its type."""
    body = b""
    for name, value in fields:
        is_file = isinstance(value, bytes)
        about = '; filename="a.png"\r\nContent-Type: image/png' if is_file else ""
        body += f'--x\r\nContent-Disposition: form-data; name="{name}"{about}\r\n\r\n'.encode()
        body += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return body + b"--x--\r\n", "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([("prompt", "make it blue")], "image is missing"),
        ([("image", b"nothing"), ("prompt", "make it blue")], "image"),
        ([("image", "/etc/passwd"), ("prompt", "make it blue")], "no file"),
        ([("image", b"x"), ("prompt", "make it blue"), ("prompt", "make it red")], "2 times"),
        ([("image", b"x"), ("prompt", "make it blue"), ("mask", b"x")], "mask"),
        ([("image", b"x"), ("prompt", "make it blue"), ("n", "many")], "n"),
        ([("image", b"x"), ("prompt", "make it blue"), ("strength", "1")], "strength"),
        ([("image", b"x")] * 9, "files"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_forms_that_cannot_be_read_say_why(live, fields, says):
    body, kind = form(*fields)
    status, found = post(live, "/v1/images/edits", body, Content_Type=kind)
    assert status == 400 and says in found["error"]["message"]


def test_another_method_is_told_which_there_are(live):
    for method in ("GET", "TRACE", "PUT"):
        status, headers, found = call(live, method, "/v1/images/generations")
        assert status == 405 and headers["allow"] == "POST" and found["error"]["code"] == "method_not_allowed"


# -- clients that leave


def test_a_client_that_leaves_takes_its_reply_along(live):
    body = json.dumps({"messages": [{"role": "user", "content": "two red hearts"}], "stream": True, "seed": 1})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    cancelled, door = live.service.counts.cancelled, live.url.removeprefix("http://").split(":")
    for is_stream in (True, False):
        text = body if is_stream else body.replace('"stream": true', '"stream": null')
        with socket.create_connection(door) as leaving:
            leaving.sendall(f"{head}{len(text)}\r\n\r\n{text}".encode())
            if is_stream:
                leaving.recv(10)
    until = time.monotonic() + 10
    while live.service.stats().replying or live.service.stats().waiting:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert live.service.counts.cancelled + live.service.counts.finished >= cancelled + 2


# -- other servers


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://[::1]/a.png",
        "http://localhost/a.png",
        "http://10.0.0.1/a.png",
        "http://192.168.1.1:8080/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://0.0.0.0/a.png",
        "http://2130706433/a.png",
        "http://user:password@example.org/a.png",
        "ftp://example.org/a.png",
        "http://exa mple.org/a.png",
        "http:///a.png",
    ],
)
def test_nothing_is_fetched_from_inside(url):
    with pytest.raises(Refusal) as caught:
        fetch_image(url, 1000)
    assert caught.value.status == 400 and "password" not in str(caught.value)


def test_a_public_address_is_one_that_the_world_can_reach():
    assert public_address("8.8.8.8", 80) == "8.8.8.8"


# -- what it says of itself


def test_the_api_declares_every_status_that_a_route_answers_with(live):
    _, _, described = call(live, "GET", "/openapi.json")
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            assert {"400", "401", "404", "405", "413", "429", "500", "503"} <= set(route["responses"]), (path, method)
    fields = described["components"]["schemas"]["ImageRequest"]
    assert fields["additionalProperties"] is False and {"prompt", "seed", "guidance"} <= set(fields["properties"])


def test_metrics_count_requests_and_what_the_service_does(live):
    assert post(live, "/v1/images/generations", DRAW)[0] == 200
    _, headers, text = call(live, "GET", "/metrics")
    lines = text.decode().splitlines()
    assert headers["content-type"].startswith("text/plain")
    assert any(
        line.startswith('starflow2_requests_total{route="/v1/images/generations",status="200"}') for line in lines
    )
    assert any(line.startswith("starflow2_service_joined_total") for line in lines)
