"""Spoiled images: bytes of files, tensors, arrays, and the doors that take them."""

from __future__ import annotations

import io
import math
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fuzz.cases import ALIENS, Bench, Case, flipped, shortened
from starflow2.core.images import read_picture

__all__ = ["pictures", "tensors"]

LOSSLESS = ("PNG", "BMP", "TIFF")
FORMATS = (*LOSSLESS, "JPEG", "WEBP", "GIF")
RARE = ("EPS", "PCX", "TGA", "ICO", "PPM", "SGI", "PDF", "IM", "MSP", "XBM", "DIB", "SPIDER")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect width="64" height="64"/></svg>'
JUNK = (
    b"",
    b"\x00",
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"RIFF\x00\x00\x00\x00WEBP",
    b"BM",
    EPS,
    SVG,
    b"%PDF-1.4\n%%EOF",
    b"II*\x00",
    b"MM\x00*",
    b"P6 64 64 255 ",
    b"\x00\x00\x01\x00",
    b"a" * 4096,
)


def _pixels(rng: random.Random, size: int) -> np.ndarray:
    ramp = np.linspace(0, 1, size)
    colour = np.array([rng.uniform(60, 255) for _ in range(3)])
    return (ramp[:, None, None] * ramp[None, :, None] * colour).astype(np.uint8)


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=format, **options)
    return out.getvalue()


def _as(reference: Tensor, within: float) -> Callable[[Any], bool]:
    """Judge: the tensor that was returned is the reference."""

    def judge(got: Any) -> bool:
        return (
            isinstance(got, Tensor) and got.shape == reference.shape and bool((got - reference).abs().max() <= within)
        )

    return judge


def _sane(size: int) -> Callable[[Any], bool]:
    """Judge of bytes whose damage cannot be seen: some image, in range."""
    return lambda got: tuple(got.shape) == (3, size, size) and bool((got.abs() <= 1).all())


def pictures(rng: random.Random, bench: Bench) -> Case:
    """One file of an image, whole or spoiled, read by `read_picture` or shown to a model."""
    kinds = (_spoiled_file, _spoiled_file, _spoiled_file, _odd_mode, _rare_format, _junk, _huge, _frames, _odd_source)
    return rng.choice(kinds)(rng, bench)


def _spoiled_file(rng: random.Random, bench: Bench) -> Case:
    size, format = 32, rng.choice(FORMATS)
    pixels = _pixels(rng, size)
    image = Image.fromarray(pixels)
    data = _encoded(image, format, **({"quality": 95} if format in ("JPEG", "WEBP") else {}))
    whole = read_picture(data, size)
    how = rng.choice(["whole", "cut", "flipped", "flipped", "padded", "doubled", "swapped"])
    spoiled = {
        "whole": data,
        "cut": shortened(data, rng),
        "flipped": flipped(data, rng),
        "padded": data + rng.randbytes(20),
        "doubled": data + data,
        "swapped": data[: len(data) // 2] + data[len(data) // 2 :][::-1],
    }[how]
    # a PNG says with checksums whether its pixels are right, so they are, or it is refused
    judge = _as(whole, 1e-6) if how in ("whole", "padded", "doubled") or format == "PNG" else _sane(size)
    return Case(f"{format} {how}", lambda: read_picture(spoiled, size), judge)


def _odd_mode(rng: random.Random, bench: Bench) -> Case:
    mode = rng.choice(["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F", "I", "YCbCr", "LAB", "HSV"])
    pixels = Image.fromarray(_pixels(rng, 32))
    image = Image.new(mode, (32, 32)) if mode in ("I;16", "F", "I", "LAB") else pixels.convert(mode)
    return Case(f"mode {mode}", lambda: read_picture(image, 32), _sane(32))


def _rare_format(rng: random.Random, bench: Bench) -> Case:
    format, image = rng.choice(RARE), Image.fromarray(_pixels(rng, 32))
    try:
        data = _encoded(image.convert("1") if format in ("MSP", "XBM") else image, format)
    except (OSError, KeyError, ValueError):
        data = EPS
    name = rng.choice(["x.png", "x.jpg", "x"])
    if rng.random() < 0.5:
        return Case(f"{format} as bytes", lambda: read_picture(data, 32), _sane(32))
    return Case(f"{format} as {name}", lambda: read_picture(bench.file(name, data), 32), _sane(32))


def _junk(rng: random.Random, bench: Bench) -> Case:
    data = rng.choice(JUNK) + (rng.randbytes(rng.randrange(200)) if rng.random() < 0.5 else b"")
    if rng.random() < 0.5:
        return Case("junk as bytes", lambda: read_picture(data, 32))
    return Case("junk as a file", lambda: read_picture(bench.file("junk.png", data), 32))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _huge(rng: random.Random, bench: Bench) -> Case:
    """A PNG that says it has more pixels than a machine has memory."""
    side = rng.choice([20_000, 65_535, 2**31 - 1])
    head = struct.pack(">IIBBBBB", side, rng.choice([side, 64, 1]), 8, 2, 0, 0, 0)
    body = zlib.compress(b"\x00" * 1000)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    return Case("PNG of absurd size", lambda: read_picture(data, 32))


def _frames(rng: random.Random, bench: Bench) -> Case:
    format = rng.choice(["GIF", "PNG", "WEBP", "TIFF"])
    frames = [Image.fromarray(_pixels(rng, 32)) for _ in range(3)]
    data = _encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **({"duration": 80} if format != "TIFF" else {})
    )
    judge = _sane(32) if format == "TIFF" else None  # pages of a scan are no film
    return Case(f"{format} of three frames", lambda: read_picture(data, 32), judge)


def _odd_source(rng: random.Random, bench: Bench) -> Case:
    source: Any = rng.choice(
        [None, 3, 1.5, "", "nowhere.png", "\x00", "/", ".", [], "https://example.org/a.png", {}, "\ud800"]
    )
    size: Any = 32
    if rng.random() < 0.5:
        source, size = (
            _encoded(Image.fromarray(_pixels(rng, 32)), "PNG"),
            rng.choice([0, -1, "64", None, 1.5, math.nan, 10**7]),
        )
    return Case(f"source {type(source).__name__} size {size}", lambda: read_picture(source, size))


# -- tensors ------------------------------------------------------------------------------------------------------


def tensors(rng: random.Random, bench: Bench) -> Case:
    """One image as a tensor or an array, shown to a door of the model."""
    what, shown, reference = _shown(rng, bench)
    doors: dict[str, Callable[[], object]] = {
        "add": lambda: bench.model.session().add(shown).pieces[-1].picture,
        "score": lambda: bench.model.score(["a red circle"], [shown]),
        "invert": lambda: bench.model.invert(shown, "a red circle"),
        "ask": lambda: bench.model.ask(shown, "what color is the circle?"),
        "edit": lambda: bench.model.edit(shown, "make the circle blue"),
        "answers": lambda: bench.model.answers([[shown]], ["what color is the circle?"], 2),
        "roundtrip": lambda: bench.model.roundtrip(shown[None]),
        "tower_answers": lambda: bench.model.tower_answers(shown[None], ["what color is the circle?"]),
        "edits": lambda: bench.model.edits(shown[None], ["make the circle blue"], [0]),
    }
    if reference is None:
        batched = ("roundtrip", "tower_answers", "edits")  # take tensors alone
        door = rng.choice([name for name in doors if isinstance(shown, Tensor) or name not in batched])
        return Case(f"{door}: {what}", doors[door])
    return Case(f"add: {what}", doors["add"], lambda picture: _as(reference, 0.02)(picture.image))


def _shown(rng: random.Random, bench: Bench) -> tuple[str, Any, Tensor | None]:
    """A source, and the image that it is if it may be taken."""
    x, size = bench.image, bench.size
    unit = (x + 1) / 2
    whole = (unit * 255).round()
    array = whole.permute(1, 2, 0).numpy()
    right: list[tuple[str, Any]] = [
        ("float32", x),
        ("float64", x.double()),
        ("float16", x.half()),
        ("bfloat16", x.bfloat16()),
        ("strided", x.flip(2).flip(2).transpose(1, 2).contiguous().transpose(1, 2)),
        ("with gradient", x.clone().requires_grad_()),
        ("uint8 as 0..255", whole.to(torch.uint8)),
        ("uint8 array", array.astype(np.uint8)),
    ]
    nan, far = x.clone(), x.clone()
    nan.view(-1)[rng.randrange(x.numel())] = rng.choice([math.nan, math.inf, -math.inf])
    far.view(-1)[rng.randrange(x.numel())] = rng.choice([1.5, -3.0, 1e30])
    wrong: list[tuple[str, Any]] = [
        ("NaN or inf", nan),
        ("one value out of range", far),
        ("float 0..255", whole),
        ("int64", whole.long()),
        ("int8", whole.to(torch.int8)),
        ("bool", unit > 0.5),
        ("complex", x.to(torch.complex64)),
        ("no channels", x[0]),
        ("four channels", x[[0, 1, 2, 0]]),
        ("batch", x[None]),
        ("wrong size", x[:, : size - 1]),
        ("empty", x[:, :0]),
        ("channels last", x.permute(1, 2, 0)),
        ("meta device", x.to("meta")),
        ("sparse", x.to_sparse()),
        ("float array", array.astype(np.float32)),
        ("int array", array.astype(np.int64)),
        ("object array", array.astype(object)),
        ("list", x.tolist()),
        *((f"alien {type(a).__name__}", a) for a in ALIENS if not isinstance(a, str)),
    ]
    if rng.random() < 0.15:
        return (*rng.choice(right), x)
    return (*rng.choice(wrong), None)
