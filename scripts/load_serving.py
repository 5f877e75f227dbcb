"""Load a server of ours and watch it: `mixed` (many clients, honest requests), `generated` (hostile ones), `costs`.

    python scripts/load_serving.py mixed --requests 1000 --clients 64 -- --session-memory 64 --sessions /tmp/sessions
    python scripts/load_serving.py generated --requests 10000 --clients 16 -- --session-memory 64

A server is started on a free port in a process of its own, so that its CPU time and memory are apart from those of the
clients. `mixed` also sends requests one at a time and compares the CPU time of each; `costs` does so for each kind of
request apart. `generated` mixes requests that are good, whose words come from the model's lexicon, with ones that are
broken in every field of our own OpenAPI description, with live and dead ids, whole and damaged images, and clients that
leave. One JSON object is printed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from starflow2.models.hub import find_model

__all__ = ["Answer", "Order", "Server", "generated_order", "main", "mixed_order", "send"]

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COUNTS = ("two", "three", "four")
KINDS = ("image", "image stream", "edit", "question", "response", "score")
QUESTIONS = ("what color is the {shape}?", "how many objects are there?", "how many objects are there?")
FLAT = 0.05  # by which memory may move from request WARM on, up and down
WARM = 200
EVERY = 20  # requests between two looks at memory


# -- the server -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    @property
    def cpu_s(self) -> float:
        """CPU seconds that it has taken, all threads together."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def metrics(self) -> dict[str, float]:
        """Its own figures, by name."""
        text = send(self.port, Order("GET", "/metrics")).body.decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#" and "{" not in line]
        return {name.removeprefix("starflow2_").removeprefix("service_"): float(value) for name, value in lines}


@contextlib.contextmanager
def serving(*options: str) -> Iterator[Server]:
    """A server that listens on a free port, and is asked to stop at the end."""
    command = [sys.executable, "-m", "starflow2", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)/v1", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line!r}")
        server = Server(process, int(found[1]))
        _wait_until_healthy(server)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_healthy(server: Server) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if send(server.port, Order("GET", "/health")).status == 200:
                return
        time.sleep(0.05)
    raise SystemExit("the server is not healthy")


# -- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """A request. leaves_after: seconds after which its client leaves; streams: events are expected."""

    method: str
    path: str
    body: bytes = b""
    kind: str = "application/json"
    name: str = ""
    leaves_after: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Response to a request. status: of HTTP, 0 if the client left; first_s: seconds to the first byte of its body."""

    order: Order
    status: int
    body: bytes
    seconds: float
    first_s: float
    retry_after: int | None = None


def send(port: int, order: Order) -> Answer:
    """Send a request and wait for all of its answer, or leave early."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=order.leaves_after or 180)
    try:
        connection.request(order.method, order.path, order.body or None, {"Content-Type": order.kind})
        response = connection.getresponse()
        first = response.read(1)
        first_s = time.monotonic() - start
        body = first + response.read()
        retry = response.getheader("Retry-After")
        return Answer(order, response.status, body, time.monotonic() - start, first_s, int(retry) if retry else None)
    except TimeoutError:
        return Answer(order, 0, b"", time.monotonic() - start, 0.0)
    finally:
        connection.close()


def json_order(path: str, body: object, name: str, leaves_after: float | None = None) -> Order:
    return Order("POST", path, json.dumps(body).encode(), name=name, leaves_after=leaves_after)


def scene(rng: random.Random) -> tuple[str, str]:
    """A caption, and a shape in it."""
    shape, color = rng.choice(SHAPES), rng.choice(COLORS)
    return (
        f"a {color} {shape}"
        if rng.random() < 0.5
        else f"{rng.choice(COUNTS)} {color} {shape}{'es' if shape == 'cross' else 's'}"
    ), shape


def picture(rng: random.Random, side: int = 64) -> bytes:
    """The file of an image of one disc."""
    y, x = np.mgrid[:side, :side]
    pixels = np.full((side, side, 3), 255, np.uint8)
    disc = (x - rng.randrange(side)) ** 2 + (y - rng.randrange(side)) ** 2 < (side // 4) ** 2
    pixels[disc] = [rng.randrange(256) for _ in range(3)]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, rng.choice(("PNG", "JPEG", "WEBP")))
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def form(images: list[bytes], fields: dict[str, str]) -> tuple[bytes, str]:
    """A multipart body and its type."""
    body = b""
    for image in images:
        body += b'--bound\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + image + b"\r\n"
    for name, value in fields.items():
        body += f'--bound\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    return body + b"--bound--\r\n", "multipart/form-data; boundary=bound"


@dataclass(slots=True)
class Ids:
    """Ids of responses that are kept, for any thread."""

    known: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, answer: Answer) -> None:
        if answer.status == 200 and answer.order.path == "/v1/responses":
            found = re.search(rb'"id": ?"(resp_[0-9a-f]{32})"', answer.body)
            with self.lock:
                self.known += [found[1].decode()] if found else []

    def pick(self, rng: random.Random) -> str | None:
        with self.lock:
            return rng.choice(self.known[-200:]) if self.known else None


def mixed_order(rng: random.Random, ids: Ids) -> Order:
    """An honest request: images, streams, edits, chats, kept conversations, likelihoods."""
    caption, shape = scene(rng)
    seed, turn = rng.randrange(2**31), rng.random()
    question = rng.choice(QUESTIONS).format(shape=shape)
    if turn < 0.3:
        return json_order("/v1/images/generations", {"prompt": caption, "seed": seed}, "image")
    if turn < 0.4:
        body: dict[str, object] = {"prompt": caption, "seed": seed, "stream": True, "partial_images": 1}
        return json_order("/v1/images/generations", body, "image stream")
    if turn < 0.5:
        sent, kind = form([picture(rng)], {"prompt": f"make the {shape} {rng.choice(COLORS)}", "seed": str(seed)})
        return Order("POST", "/v1/images/edits", sent, kind, "edit")
    if turn < 0.75:
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(picture(rng))}},
            {"type": "text", "text": question},
        ]
        messages = [{"role": "user", "content": parts}]
        body = {"messages": messages, "modalities": ["text"], "stream": rng.random() < 0.5}
        return json_order("/v1/chat/completions", body, "question")
    previous = ids.pick(rng)
    if turn < 0.95:
        body = {"input": caption, "tool_choice": "required", "seed": seed}
        if previous is not None and rng.random() < 0.5:
            body = {"input": question, "previous_response_id": previous, "tool_choice": "none"}
        return json_order("/v1/responses", body, "response")
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture(rng))}}]
    return json_order("/v1/score", {"query": caption, "items": [parts]}, "score")


# -- requests that are broken -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Material:
    """Pieces of which hostile requests are made: words of the model, and our own description of every field."""

    words: list[str]
    described: dict[str, Any]


def generated_order(rng: random.Random, ids: Ids, material: Material) -> Order:
    """A request that is honest, broken in one place, random in every field, or abandoned."""
    turn = rng.random()
    if turn < 0.62:
        order = _of_lexicon(rng, ids, material)
        if rng.random() < 0.08:
            return Order(order.method, order.path, order.body, order.kind, "left", rng.uniform(0.005, 0.3))
        return order
    if turn < 0.8:
        return _broken(rng, _of_lexicon(rng, ids, material))
    return _of_description(rng, material.described)


def _of_lexicon(rng: random.Random, ids: Ids, material: Material) -> Order:
    """An honest request whose words are any that the model knows."""
    order = mixed_order(rng, ids)
    if order.kind != "application/json":
        return order
    body = json.loads(order.body)
    words = " ".join(rng.choices(material.words, k=rng.randint(1, 12)))
    for name in ("prompt", "input", "query"):
        if name in body and rng.random() < 0.7:
            body[name] = words
    return Order(order.method, order.path, json.dumps(body).encode(), name=order.name)


def _broken(rng: random.Random, order: Order) -> Order:
    """A request with something wrong in it."""
    body = bytearray(order.body)
    harm: Callable[[], bytes] = rng.choice(
        [
            lambda: bytes(body[: rng.randrange(len(body) + 1)]),
            lambda: bytes(body).replace(b"base64,", b"base64,!", 1),
            lambda: bytes(body).replace(b"iVBOR", b"iVBXX", 1).replace(b"/9j/", b"/9k/", 1),
            lambda: bytes(body).replace(b"two", b"zebra").replace(b"a ", b"zebra ", 1),
            lambda: re.sub(rb"resp_[0-9a-f]{32}", f"resp_{rng.getrandbits(128):032x}".encode(), bytes(body)),
            lambda: re.sub(rb'"seed": \d+', rb'"seed": -1', bytes(body)),
            lambda: bytes(body).replace(b"}", b', "zebra": 1}', 1),
            lambda: bytes(body).replace(b"data:image/png", b"http://127.0.0.1:1/", 1),
            lambda: b"".join(bytes([b ^ (1 << rng.randrange(8))]) if rng.random() < 0.01 else bytes([b]) for b in body),
        ]
    )
    kind = order.kind if rng.random() < 0.95 else rng.choice(("text/plain", "multipart/form-data", "x"))
    return Order(order.method, order.path, harm(), kind, "broken")


def _of_description(rng: random.Random, described: dict[str, Any]) -> Order:
    """A request that follows our own OpenAPI description, or nearly."""
    path, methods = rng.choice(list(described["paths"].items()))
    method, route = rng.choice(list(methods.items()))
    path = re.sub(
        r"{\w+}", lambda _: rng.choice(("nano", "x", "%00", "..%2f..", f"resp_{rng.getrandbits(128):032x}")), path
    )
    if rng.random() < 0.05:
        method = rng.choice(("get", "put", "delete", "patch", "options", "head"))
    content = route.get("requestBody", {}).get("content", {})
    if not content:
        return Order(method.upper(), path, name="described")
    kind, about = rng.choice(list(content.items()))
    value = _value(rng, about["schema"], described, 0)
    if kind == "application/json":
        return Order(method.upper(), path, json.dumps(value).encode(), kind, "described")
    fields = {k: str(v) for k, v in value.items() if k != "image"} if isinstance(value, dict) else {}
    body, kind = form([picture(rng)] * rng.randint(0, 2), fields)
    return Order(method.upper(), path, body, kind, "described")


def _value(rng: random.Random, schema: dict[str, Any], root: dict[str, Any], depth: int) -> Any:
    """A value of a schema; one in thirty is of another."""
    if rng.random() < 0.03 or depth > 8:
        return rng.choice([None, 0, -1, 1e300, "", "x" * 2000, [], {}, True, [[]], "\u202e", 2**63])
    if "$ref" in schema:
        found = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return _value(rng, found, root, depth)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return _value(rng, rng.choice(schema[name]), root, depth + 1)
    if "enum" in schema or "const" in schema:
        return rng.choice(schema.get("enum", [schema.get("const")]))
    return _of_type(rng, schema, root, depth)


def _of_type(rng: random.Random, schema: dict[str, Any], root: dict[str, Any], depth: int) -> Any:
    match schema.get("type"):
        case "object":
            needed, known = schema.get("required", []), schema.get("properties", {})
            names = [name for name in known if name in needed or rng.random() < 0.25]
            return {name: _value(rng, known[name], root, depth + 1) for name in names}
        case "array":
            count = rng.randint(schema.get("minItems", 0), min(3, schema.get("maxItems", 3)))
            return [_value(rng, schema.get("items", {}), root, depth + 1) for _ in range(count)]
        case "integer":
            return rng.randint(int(schema.get("minimum", 0)), min(int(schema.get("maximum", 8)), 8))
        case "number":
            return rng.uniform(float(schema.get("minimum", 0)), min(float(schema.get("maximum", 4)), 4))
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
    return rng.choice(
        ["two red hearts", "how many objects are there?", "a blue star", "nano", data_url(picture(rng)), "64x64"]
    )


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Sample:
    """A server's memory after so many requests. positions: for which each row of its engine has room."""

    done: int
    resident: float  # bytes
    engine: float  # bytes
    positions: float


@dataclass(slots=True)
class Run:
    """Answers to many requests, and how the server was meanwhile."""

    answers: list[Answer] = field(default_factory=list)
    busy: int = 0  # times that a client was told to come back
    samples: list[Sample] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def statuses(self) -> dict[str, int]:
        return dict(sorted(Counter(str(each.status) for each in self.answers).items()))


def run(
    server: Server, clients: int, requests: int, make: Callable[[random.Random], Order], ids: Ids, seed: int
) -> Run:
    """Send requests by as many clients at once; one that is told to come back does so."""
    done = Run()

    def one(number: int) -> None:
        order = make(random.Random(f"{seed} {number}"))
        answer = send(server.port, order)
        while answer.status == 429 and order.leaves_after is None:
            with done.lock:
                done.busy += 1
            if answer.retry_after is None:
                break  # not honest
            time.sleep(min(answer.retry_after, 2))
            answer = send(server.port, order)
        ids.note(answer)
        with done.lock:
            done.answers.append(answer)
            count = len(done.answers)
        if count % EVERY == 0:
            figures = server.metrics()
            sample = Sample(count, server.resident, figures["engine_bytes"], figures["engine_positions"])
            with done.lock:
                done.samples.append(sample)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    return done


def memory(run_: Run) -> dict[str, Any]:
    """Memory from request WARM on, in four quarters: the largest of each, and how far those move around their middle.

    The engine gives memory back while few rows reply, so single samples say less than the largest of many.
    """
    later = [each for each in sorted(run_.samples) if each.done >= WARM]
    size = len(later) // 4
    if size < 2:
        return {"note": f"fewer than {WARM + 8 * EVERY} requests: nothing can be said"}
    quarters = [later[i * size : (i + 1) * size] for i in range(4)]
    most = {
        "resident_mib": [max(s.resident for s in part) / 2**20 for part in quarters],
        "engine_mib": [max(s.engine for s in part) / 2**20 for part in quarters],
        "engine_positions": [max(s.positions for s in part) for part in quarters],
    }
    moves = {name: (max(values) - min(values)) / max(max(values) + min(values), 1e-9) for name, values in most.items()}
    return {"quarters": most, "moves": moves, "samples": len(later), "flat": all(m <= FLAT for m in moves.values())}


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def settled(server: Server) -> dict[str, float]:
    """The server's figures once nothing is left to do."""
    until = time.monotonic() + 30
    while (found := server.metrics())["replying"] or found["waiting"]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    return found


def mixed(clients: int, requests: int, seed: int, options: list[str]) -> dict[str, Any]:
    """Many clients at once, against one."""
    with serving(*options) as server:
        ids = Ids()
        make = lambda rng: mixed_order(rng, ids)  # noqa: E731
        first = [_first_event(server) for _ in range(5)]
        start = server.cpu_s
        alone = run(server, 1, max(20, requests // 10), make, ids, seed + 1)
        alone_cpu = (server.cpu_s - start) / len(alone.answers)
        start, began = server.cpu_s, time.monotonic()
        together = run(server, clients, requests, make, ids, seed)
        wall = time.monotonic() - began
        cpu = (server.cpu_s - start) / requests
        left = settled(server)
    took = [each.seconds for each in together.answers]
    return {
        "clients": clients,
        "requests": requests,
        "statuses": together.statuses(),
        "told_to_come_back": together.busy,
        "cpu_s_each": cpu,
        "cpu_s_each_alone": alone_cpu,
        "cpu_ratio": cpu / alone_cpu,
        "wall_s": wall,
        "requests_per_s": requests / wall,
        "p50_s": percentile(took, 0.5),
        "p95_s": percentile(took, 0.95),
        "by_kind": _by_kind(together),
        "first_event_s": statistics.median(first),
        "memory": memory(together),
        "rows_left": left["replying"],
        "ok": set(together.statuses()) <= {"200"} and not left["replying"],
    }


def costs(clients: int, requests: int, seed: int, options: list[str]) -> dict[str, Any]:
    """CPU seconds of each kind of honest request, `requests` of a kind one at a time and then by all clients."""
    found, ids = dict[str, dict[str, float]](), Ids()
    with serving(*options) as server:
        for kind in KINDS:
            make = lambda rng, kind=kind: _of_kind(kind, rng, ids)  # noqa: E731
            for who, number in (("warming up", 1), ("alone", 1), ("together", clients)):
                start, began = server.cpu_s, time.monotonic()
                done = run(server, number, 3 if who == "warming up" else requests, make, ids, seed + number)
                each = {f"cpu_s_{who}": (server.cpu_s - start) / len(done.answers)}
                rate = {f"per_s_{who}": len(done.answers) / (time.monotonic() - began)}
                found[kind] = {**found.get(kind, {}), **each, **rate} if who != "warming up" else {}
        left = settled(server)
        resident = server.resident / 2**20
    return {"clients": clients, "kinds": found, "resident_mib": resident, "ok": not left["replying"]}


def _of_kind(kind: str, rng: random.Random, ids: Ids) -> Order:
    """An honest request of one kind."""
    while (order := mixed_order(rng, ids)).name != kind:
        pass
    return order


def _first_event(server: Server) -> float:
    body = {"messages": [{"role": "user", "content": "two red hearts"}], "stream": True}
    return send(server.port, json_order("/v1/chat/completions", body, "first")).first_s


def _by_kind(run_: Run) -> dict[str, dict[str, float]]:
    kinds = sorted({each.order.name for each in run_.answers})
    times = {kind: [each.seconds for each in run_.answers if each.order.name == kind] for kind in kinds}
    return {k: {"count": len(t), "p50_s": percentile(t, 0.5), "p95_s": percentile(t, 0.95)} for k, t in times.items()}


def generated(clients: int, requests: int, seed: int, options: list[str]) -> dict[str, Any]:
    """Hostile requests: no failure of ours, and at least half reach the engine."""
    lexicon = (find_model("nano") / "lexicon.txt").read_text(encoding="utf-8").split()
    with serving(*options) as server:
        ids = Ids()
        described = json.loads(send(server.port, Order("GET", "/openapi.json")).body)
        material = Material(lexicon, described)
        before = server.metrics()
        start = time.monotonic()
        done = run(server, clients, requests, lambda rng: generated_order(rng, ids, material), ids, seed)
        wall = time.monotonic() - start
        after = settled(server)
        deleted, left = _deleted(server, ids)
        alive = send(server.port, Order("GET", "/health")).status == 200
    ours = [each for each in done.answers if each.status >= 500]
    joined = after["joined_total"] - before["joined_total"]
    return {
        "requests": requests,
        "statuses": done.statuses(),
        "failures_of_ours": len(ours),
        "first_failures": [
            f"{a.order.method} {a.order.path} {a.order.body[:300]!r} {a.body[:300]!r}" for a in ours[:5]
        ],
        "reached_the_engine": joined / requests,
        "cancelled": after["cancelled_total"],
        "rows_left": after["replying"],
        "waiting_left": after["waiting"],
        "sessions": {"in_memory": after["sessions_in_memory"], "deleted": deleted, "left": left},
        "sessions_mib": after["sessions_in_memory_bytes"] / 2**20,
        "memory": memory(done),
        "wall_s": wall,
        "ok": alive
        and not (ours or after["replying"] or after["waiting"])
        and joined >= requests / 2
        and (deleted == after["sessions_in_memory"] - left or after["sessions_on_disk"] > 0),
    }


def _deleted(server: Server, ids: Ids) -> tuple[int, float]:
    """Delete every response that a client knows: how many were still there, and the sessions left in memory.

    Those left are of chats, whose past is kept to be recognised, and of clients that left before they heard an id.
    """
    orders = [Order("DELETE", f"/v1/responses/{name}") for name in dict.fromkeys(ids.known)]
    found = sum(send(server.port, order).status == 200 for order in orders)
    return found, server.metrics()["sessions_in_memory"]


def main(arguments: list[str] | None = None) -> int:
    """Run one of them and print its figures; status 1 if something that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mixed", "generated", "costs"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)  # behind it: options of starflow2 serve
    args = parser.parse_args(given[:end])
    load = {"mixed": mixed, "generated": generated, "costs": costs}[args.what]
    found = load(args.clients, args.requests, args.seed, given[end + 1 :])
    print(json.dumps(found, indent=1))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
