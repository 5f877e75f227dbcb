"""Spoiled requests to the server, files of its kept replies, and calls in the manner of transformers.

Requests go through the whole application, guard included, without a socket.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import importlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from safetensors.torch import load_file, save_file

from fuzz.cases import ALIENS, Bench, Case, anything, flipped, is_number, shortened
from fuzz.documents import spoil_tree, spoiled_json
from fuzz.folders import metadata_of, spoil_bytes, spoil_metadata, spoil_tensors
from starflow2.core.images import to_pil
from starflow2.errors import StarFlowError
from starflow2.serving.app import build_app
from starflow2.serving.limits import ServeLimits
from starflow2.serving.service import Service

__all__ = ["RequestRefused", "auto_classes", "kept_replies", "requests"]

WORDS, QUESTION = "a red circle", "what color is the circle?"
IMAGES, CHAT, RESPONSES = "/v1/images/generations", "/v1/chat/completions", "/v1/responses"
OPEN = ("content", "input", "query", "items", "metadata", "url", "image_url")  # fields that take several kinds of value
NEEDED = {IMAGES: "prompt", CHAT: "messages", RESPONSES: "input", "/v1/score": "items"}


class RequestRefused(StarFlowError):
    """A request that was answered with a status from 400 to 499, and the message in its error object."""


class _Door:
    """The application over a small model, and a loop that requests run in."""

    def __init__(self, bench: Bench) -> None:
        self.folder = bench.home / "kept"
        limits = ServeLimits(body_bytes=2**20, pixels=2**20, pictures=4, images=2, tokens=8, tries=2, deadline_s=15.0)
        self.service = Service(bench.model, limits, self.folder).start()
        self.app = build_app(self.service)
        self.runner = asyncio.Runner()

    def __call__(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
        """The body of an answer. Raises RequestRefused for the client's faults, RuntimeError for the server's."""
        status, answer = self.runner.run(self._answer(method, path, body, kind))
        if 400 <= status < 500:
            raise RequestRefused(json.loads(answer)["error"]["message"])
        if status >= 500:
            raise RuntimeError(f"status {status}: {answer[:200]!r}")
        return answer

    async def _answer(self, method: str, path: str, body: bytes, kind: str) -> tuple[int, bytes]:
        sent, parts = [], [{"type": "http.request", "body": body, "more_body": False}]
        headers = [(b"host", b"127.0.0.1"), (b"content-type", kind.encode("latin-1", "replace"))]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode("utf-8", "replace"),
            "root_path": "",
            "query_string": b"",
            "headers": [*headers, (b"content-length", str(len(body)).encode())],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8000),
        }

        async def receive() -> Any:
            return parts.pop() if parts else await asyncio.Event().wait()  # the client stays until it is answered

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@cache
def _door(bench: Bench) -> _Door:
    return _Door(bench)


@cache
def _data_url(bench: Bench) -> str:
    out = io.BytesIO()
    to_pil(bench.image).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _bodies(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Right requests, each with the path that it belongs to."""
    image = {"type": "image_url", "image_url": {"url": _data_url(bench)}}
    words = {"type": "text", "text": QUESTION}
    yield IMAGES, {"prompt": WORDS, "seed": 1, "n": 1, "guidance": 0.0, "tries": 1, "output_format": "png"}
    yield CHAT, {"messages": [{"role": "user", "content": WORDS}], "modalities": ["text"], "max_tokens": 2}
    yield CHAT, {"messages": [{"role": "user", "content": [image, words]}], "temperature": 0.0, "max_tokens": 2}
    turns = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "a circle"}, {"role": "user"}]
    yield CHAT, {"messages": [*turns[:2], turns[2] | {"content": QUESTION}], "seed": 3, "max_tokens": 2}
    yield RESPONSES, {"input": WORDS, "max_output_tokens": 2, "store": False, "tool_choice": "none"}
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
    yield RESPONSES, {"input": [item], "max_output_tokens": 2, "store": False, "previous_response_id": None}
    yield "/v1/score", {"query": WORDS, "items": [QUESTION, [image]], "noise_level": 0.1}


# -- requests -----------------------------------------------------------------------------------------------------


def requests(rng: random.Random, bench: Bench) -> Case:
    """One request with something wrong in it: a value, a field, the bytes, the form, the method, the path."""
    path, right = rng.choice(list(_bodies(bench)))
    kind = rng.choice(["value"] * 6 + ["missing", "extra", "extra", "bytes", "bytes", "place", "form", "form", "right"])
    if kind == "place":
        return _elsewhere(rng, bench)
    if kind == "form":
        return _form(rng, bench)
    tree = copy.deepcopy(right)
    judge: Callable[[Any], bool] | None = anything
    what = f"{path} {kind}"
    if kind in ("value", "missing"):
        before = copy.deepcopy(tree)
        spoil_tree(tree, rng, drops=kind == "missing")
        judge = None if _is_wrong(before, tree, path) else anything
    elif kind == "extra":
        holder = rng.choice([tree, *(m for m in tree.get("messages", []) if isinstance(m, dict))])
        holder[rng.choice(["promt", "\x1b[2J", "", "__class__", "max_token", "a" * 5000])] = 1
        judge = None
    text = json.dumps(tree, default=str).encode()
    if kind == "bytes":
        text, judge = spoiled_json(text, rng), None
    return Case(what, lambda: _door(bench)("POST", path, text), judge)


def _is_wrong(right: Any, spoilt: Any, path: str) -> bool:
    """True where a value was replaced by one of another kind, or the one field that a request needs is gone."""
    if NEEDED[path] not in spoilt or spoilt[NEEDED[path]] is None:
        return True
    for key, value in spoilt.items():
        old = right[key]
        if value == old or value is None or old is None or key in OPEN:
            continue
        if isinstance(old, dict | list) and isinstance(value, dict | list):
            continue  # what is wrong in it is not told from here
        if _kind(value) != _kind(old):
            return True
    return False


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def _elsewhere(rng: random.Random, bench: Bench) -> Case:
    """Another method, or a path that leads nowhere."""
    wrong: Sequence[tuple[str, str]] = [
        *((method, path) for method in ("GET", "PUT", "PATCH", "TRACE", "\x00") for path in (IMAGES, CHAT)),
        ("GET", "/"),
        ("GET", "/v1/models/x"),
        ("GET", "/v1/models/%00"),
        ("GET", "/v1/../../etc/passwd"),
        ("GET", "/v1/%2e%2e/%2e%2e/etc/passwd"),
        ("POST", "/health"),
        ("DELETE", "/v1/responses/x"),
        ("DELETE", "/v1/responses/..%2f..%2fx"),
        ("DELETE", "/v1/responses/resp_" + 32 * "0"),
        ("DELETE", "/v1/responses/" + 5000 * "a"),
        ("POST", "/v1/%1b%5b2J"),
    ]
    method, path = rng.choice(wrong)
    return Case(f"{method!a} elsewhere", lambda: _door(bench)(method, path, b"{}"))


def _form(rng: random.Random, bench: Bench) -> Case:
    """A form of an edit, with a field or its bytes spoiled."""
    image = bench.image_file.read_bytes()
    fields: list[tuple[str, str | bytes]] = [("image", image), ("prompt", "make the circle blue")]
    kind = rng.choice(["right", "image", "image", "prompt", "number", "extra", "twice", "cut", "kind", "boundary"])
    judge: Callable[[Any], bool] | None = anything if kind in ("right", "cut", "prompt", "kind", "image") else None
    header = "multipart/form-data; boundary=x"
    match kind:
        case "image":
            spoiled = [b"", b"x", flipped(image, rng), shortened(image, rng), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
            fields[0] = ("image", rng.choice(spoiled))
        case "prompt":
            fields[1] = ("prompt", rng.choice(["", "\x00", "\x1b[2J", "zebra", "a" * 200_000, "\u202e", "make it red"]))
        case "number":
            fields.append((rng.choice(["n", "seed", "guidance"]), rng.choice(["x", "", "-1", "nan", "1e999", "{}"])))
        case "extra":
            fields.append((rng.choice(["strength", "mask", "\x1b", "image[x]"]), "1"))
        case "twice":
            fields.append(fields[1])
        case "boundary":
            header = rng.choice(
                ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=y"]
            )
        case "kind":
            header = rng.choice(["text/plain", "application/json", "application/x-www-form-urlencoded", "\xff", ""])
    body = _multipart(fields)
    body = shortened(body, rng) if kind == "cut" else body
    return Case(f"edit form {kind}", lambda: _door(bench)("POST", "/v1/images/edits", body, header), judge)


def _multipart(fields: Sequence[tuple[str, str | bytes]]) -> bytes:
    parts = []
    for name, value in fields:
        file = '; filename="a.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else ""
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        parts.append(head + (value if isinstance(value, bytes) else value.encode()) + b"\r\n")
    return b"".join(parts) + b"--x--\r\n"


# -- kept replies -------------------------------------------------------------------------------------------------


@cache
def _kept(bench: Bench) -> Path:
    """The file of a reply that the server has stored."""
    door = _door(bench)
    answer = json.loads(door("POST", RESPONSES, json.dumps({"input": WORDS, "max_output_tokens": 2}).encode()))
    return door.folder / f"{answer['id']}.session"


def kept_replies(rng: random.Random, bench: Bench) -> Case:
    """A stored reply whose file was changed, and that a request wants to go on from."""
    source = _kept(bench)
    name = f"resp_{rng.getrandbits(128):032x}"
    path = source.with_name(f"{name}.session")
    shutil.copy(source, path)
    kind = rng.choice(["right", "meta", "meta", "tensor", "tensor", "tensor", "bytes"])
    if kind == "meta":
        tensors, meta = load_file(path), dict(metadata_of(path) or {})
        what = spoil_metadata(meta, rng)
        save_file(tensors, path, meta)
    else:
        what = "right"
        if kind != "right":
            what = spoil_tensors(path, rng) if kind == "tensor" else spoil_bytes(path, rng)
    body = json.dumps({"input": QUESTION, "max_output_tokens": 2, "store": False, "previous_response_id": name})

    def call() -> bytes:
        try:
            return _door(bench)("POST", RESPONSES, body.encode())
        finally:
            path.unlink(missing_ok=True)

    return Case(f"kept reply {what}", call, anything if kind == "right" else None)


# -- transformers -------------------------------------------------------------------------------------------------


@cache
def _auto(bench: Bench) -> tuple[Any, Any, Any]:
    """The module, a processor and a model over the small model's folder."""
    hf: Any = importlib.import_module("starflow2.hf")
    folder = str(bench.folder)
    return hf, hf.StarFlow2Processor.from_pretrained(folder), hf.StarFlow2ForMultimodalLM.from_pretrained(folder)


def auto_classes(rng: random.Random, bench: Bench) -> Case:
    """Conversations, options and tensors in the manner of transformers, with one thing wrong."""
    makers = (_conversation, _conversation, _options, _options, _tensors, _loaded)
    return rng.choice(makers)(rng, bench)


def _talk(bench: Bench) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": bench.image}, {"type": "text", "text": QUESTION}]
    return [
        {"role": "user", "content": WORDS},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": parts},
    ]


def _conversation(rng: random.Random, bench: Bench) -> Case:
    _, processor, _ = _auto(bench)
    talk: Any = [dict(message) for message in _talk(bench)]
    kind = rng.choice(["whole", "role", "content", "part", "extra"])
    alien: Any = rng.choice([a for a in ALIENS if not isinstance(a, torch.Tensor)])
    match kind:
        case "whole":
            talk = rng.choice([alien, [alien], [[alien]], [talk, alien], [[]]])
        case "role":
            talk[0]["role"] = rng.choice([alien, "system", "tool", ""])
        case "content":
            talk[0]["content"] = rng.choice([a for a in ALIENS if not isinstance(a, str)])
        case "part":
            wrong = [
                alien,
                {"type": "video"},
                {"type": "text"},
                {"type": "image"},
                {"type": "image", "image": alien},
                {},
            ]
            talk[2]["content"] = [rng.choice(wrong)]
        case _:
            talk[0][rng.choice(["name", "\x1b[2J"])] = 1
    may_be = (kind == "whole" and isinstance(talk, list)) or kind in ("content", "extra")
    return Case(f"conversation {kind}", lambda: processor.apply_chat_template(talk), anything if may_be else None)


def _options(rng: random.Random, bench: Bench) -> Case:
    _, processor, model = _auto(bench)
    right = {"generation_mode": "text", "max_new_tokens": 2, "do_sample": False, "temperature": 1.0}
    right |= {"guidance_scale": 0.0, "num_return_sequences": 1, "seed": 0}
    name, value = rng.choice([*right, "num_beams"]), rng.choice(ALIENS)
    value = 2 if name in ("max_new_tokens", "num_return_sequences") and is_number(value) and float(value) > 2 else value  # type: ignore[arg-type]
    inputs = processor.apply_chat_template(_talk(bench))
    is_right = (is_number(value) and name in right) or (value is None and name in ("seed", "guidance_scale"))
    is_right = is_right or (isinstance(value, bool) and name == "do_sample")
    judge = anything if is_right else None
    return Case(
        f"generate {name} {type(value).__name__}", lambda: model.generate(**inputs, **(right | {name: value})), judge
    )


def _tensors(rng: random.Random, bench: Bench) -> Case:
    hf, processor, model = _auto(bench)
    inputs = dict(processor.apply_chat_template(_talk(bench)))
    name = rng.choice(["input_ids", "pixel_values", "attention_mask"])
    x = inputs[name]
    wrong: list[Any] = [x[0], x[None], x.double() * 1e30, x[..., :-1], x[:0], -x - 1, x + 10**6, "x", 5, x.tolist()]
    wrong += [torch.full(x.shape, float("nan")), x.to(torch.complex64), x.to("meta"), None]
    value = rng.choice(wrong)
    inputs[name] = value
    if rng.random() < 0.2:
        odd = rng.choice([value, hf.MultimodalOutput(sequences=value), torch.full((1, 3, 8, 8), 9.0)])
        mode = rng.choice(["text", "image", "x"])
        return Case(
            "post-processing", lambda: processor.post_process_multimodal_output(odd, generation_mode=mode), anything
        )
    may_be = name == "attention_mask" or (value is None and name == "pixel_values")
    return Case(f"generate {name}", lambda: model.generate(**inputs, max_new_tokens=2), anything if may_be else None)


def _loaded(rng: random.Random, bench: Bench) -> Case:
    hf, _, _ = _auto(bench)
    option, value = rng.choice(["dtype", "device_map", "revision", "wrods"]), rng.choice(ALIENS)
    if option == "device_map" and (is_number(value) or not value):
        value = "x"
    name: Any = rng.choice([str(bench.folder), *ALIENS])
    is_right = isinstance(name, str) and name == str(bench.folder) and (value is None or option == "revision")
    loaders = (hf.StarFlow2ForMultimodalLM, hf.StarFlow2Processor)
    loader = rng.choice(loaders) if option == "revision" else loaders[0]
    return Case(
        f"from_pretrained {option}",
        lambda: loader.from_pretrained(name, **{option: value}),
        anything if is_right else None,
    )
