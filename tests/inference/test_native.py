"""The compiled streams against the lean form in float64, bit for bit among others, and where they cannot run."""

from __future__ import annotations

import os
import shutil
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_cases import tiny_components
from starflow2.core.images import to_bytes
from starflow2.errors import ShapeError
from starflow2.flow.affine import strengths
from starflow2.flow.solver import SEQUENTIAL, Jacobi
from starflow2.inference.backend import Backend, Begin, Chunk, Drawn, NewImage, Pair, Span
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.conversations import ReplyPart, generate_replies
from starflow2.inference.events import DecodedImage
from starflow2.inference.lean import LeanBackend
from starflow2.inference.native import NativeBackend, Unavailable, build, native_backend
from starflow2.inference.packed import pack
from starflow2.inference.sampler import Sampler
from starflow2.models.components import Components
from starflow2.models.components import build as build_components
from starflow2.models.sequence import Cursor
from starflow2.world.captions import caption_task
from starflow2.world.detector import detect

SOURCE = Path(build.__file__).parent
LEVEL = 0.5
CLOSE, CLOSE_PIXELS = 2e-3, 1e-3  # of a trained flow in float32
CAPTIONS = ("two red hearts", "a blue circle above a green square", "a small yellow star", "a red circle")


@pytest.fixture(scope="module")
def lean64(nano: Components) -> LeanBackend:
    return LeanBackend(pack(nano.pretzel.in_float64(), torch.float64))


Made = tuple[Drawn, Tensor]  # an image and its x


class Picture:
    """An image to draw after a caption, and perhaps after another image: its lanes, ready to draw."""

    def __init__(
        self, nano: Components, backend: Backend, seed: int, strength: Tensor | float, first: Tensor | None = None
    ):
        self.nano, self.backend = nano, backend
        z = 0.65 * torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
        ids = list(nano.tokenizer.drawing_prompt(CAPTIONS[seed % len(CAPTIONS)]))
        self.lane = self.ready(ids, z, strength, first)
        is_guided = isinstance(strength, Tensor) or strength > 0
        self.blank = self.ready(list(nano.tokenizer.drawing_prompt("")), z, 0.0, None) if is_guided else None

    def ready(self, ids: list[int], z: Tensor, strength: Tensor | float, first: Tensor | None) -> int:
        lane, cursor = self.backend.open(), Cursor((8, 8))
        self.backend.reserve(lane, 256)
        if first is not None:
            self.see(lane, cursor, first)
        begin = Begin(len(ids) - 1, LEVEL, first)
        self.backend.append(lane, Chunk(ids, *cursor.text(len(ids)), begin=begin))
        strength = torch.as_tensor(strength).expand(64)
        self.backend.start(lane, NewImage(z, LEVEL, strength, *cursor.latents(), first))
        return lane

    def see(self, lane: int, cursor: Cursor, u: Tensor) -> None:
        """An image from outside: its begin slot, latents and end in one pass."""
        pieces = [cursor.text(1), cursor.latents(), cursor.text(1)]
        mrope, places = torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces])
        layout = self.nano.layout
        ids = [layout.begin, *[layout.latent] * 64, layout.end]
        self.backend.append(lane, Chunk(ids, mrope, places, Span(1, 0, 64, u, 0.01, None), Begin(0, 0.01, None)))

    def pair(self, rule: str = "starflow") -> Pair:
        return Pair(self.lane, self.blank, LEVEL, rule)  # type: ignore[arg-type]

    def close(self) -> None:
        for lane in (self.lane, self.blank):
            if lane is not None:
                self.backend.close(lane)


def draw(pictures: Sequence[Picture], counts: Sequence[int] = (64,), rule: str = "starflow") -> list[Made]:
    """Drawn latents and their x, by picture, in steps of `counts` latents; the lanes are closed."""
    backend, pairs = pictures[0].backend, [p.pair(rule) for p in pictures]
    backend.arrange(pairs, [])
    for count in counts:
        backend.draw(pairs, count)
    found = [backend.drawn(pair) for pair in pairs]
    x = backend.unshallow(torch.stack([d.u for d in found]), LEVEL, SEQUENTIAL)
    for picture in pictures:
        picture.close()
    return list(zip(found, x, strict=True))


def values(drawn: Made) -> list[Tensor]:
    found, x = drawn
    affines = [a for a in (found.conditional, found.unconditional) if a is not None]
    return [found.u, x, *(t for a in affines for t in (a.mu, a.log_scale))]


# -- the same pictures as in float64 ----------------------------------------------------------------------------------


def first_image() -> Tensor:
    u = torch.randn(65, 16, generator=torch.Generator().manual_seed(7))
    u[64] = 0
    return u


CASES = {
    "guided": ({"strength": 2.0}, "starflow"),
    "unguided": ({"strength": 0.0}, "starflow"),
    "rising": ({"strength": strengths(torch.tensor(2.0), "linear", torch.arange(64), 64)}, "starflow"),
    "tarflow's rule": ({"strength": 0.5}, "tarflow"),
    "an edit": ({"strength": 1.0, "first": first_image()}, "starflow"),
}


@pytest.mark.parametrize(("case", "rule"), CASES.values(), ids=CASES)
def test_pictures_equal_those_of_the_lean_form_in_float64(nano, native, lean64, case, rule):
    mine, theirs = (draw([Picture(nano, backend, 3, **case)], rule=rule)[0] for backend in (native, lean64))
    for a, b in zip(values(mine), values(theirs), strict=True):
        assert (a - b).abs().max() <= CLOSE
    with torch.no_grad():
        pixels, wanted = (nano.codec.decode(x[None].float()) for x in (mine[1], theirs[1]))
    assert (pixels - wanted).abs().max() <= CLOSE_PIXELS


def test_words_equal_those_of_the_lean_form_in_float64(nano, native, lean64):
    found = []
    for backend in (native, lean64):
        picture = Picture(nano, backend, 0, 0.0)
        backend.append_each([picture.lane], [Chunk([9], torch.full((3, 1), 40), torch.full((1, 3), 4.0))])
        found.append(backend.logits([picture.lane]))
        picture.close()
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[1].abs().max()


# -- the same bits in any company -------------------------------------------------------------------------------------


def equal(one: Made, other: Made) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_a_picture_has_the_same_bits_alone_and_at_any_place_in_a_batch(nano, native, batch):
    together = draw([Picture(nano, native, seed, 2.0) for seed in range(batch)])
    for seed in (0, batch // 2, batch - 1):
        assert equal(draw([Picture(nano, native, seed, 2.0)])[0], together[seed])
    assert not equal(together[0], together[1])


def test_a_picture_has_the_same_bits_in_steps_beside_edits_and_on_any_number_of_threads(nano, native):
    alone = draw([Picture(nano, native, 1, 2.0)])[0]
    others = [Picture(nano, native, 2, 1.0, first_image()), Picture(nano, native, 5, 0.0)]
    assert equal(alone, draw([others[0], Picture(nano, native, 1, 2.0), others[1]], [1, 2, 61])[1])
    threaded = NativeBackend(pack(nano.pretzel), threads=3)
    assert equal(alone, draw([Picture(nano, threaded, seed, 2.0) for seed in range(5)])[1])


def test_an_image_that_is_not_finite_stays_so_and_leaves_its_neighbour_alone(nano, native):
    bad, good = Picture(nano, native, 0, 2.0), Picture(nano, native, 1, 2.0)
    native.lanes.z[native.lanes.slot_of[bad.lane], 5, 3] = torch.nan
    (spoilt, _), drawn = draw([bad, good])
    assert bool(spoilt.u[:5].isfinite().all()) and not bool(spoilt.u[5:].isfinite().all(1).any())
    assert equal(drawn, draw([Picture(nano, native, 1, 2.0)])[0])


def test_words_have_the_same_bits_whatever_is_read_beside_them_and_in_what_pieces(nano, native):
    ids = list(range(9, 49))
    chunk = Chunk(ids, *Cursor((8, 8)).text(40))
    lanes = [native.open() for _ in range(7)]
    for lane in lanes:
        native.reserve(lane, 64)
    native.append(lanes[0], chunk)
    for first in range(40):
        piece = slice(first, first + 1)
        part = Chunk(ids[piece], chunk.mrope[:, piece], chunk.places[piece])
        native.append_each(lanes[1:], [part] * 6)
    together, alone = native.logits(lanes), native.logits(lanes[:1])
    for lane in lanes:
        native.close(lane)
    assert torch.equal(together, alone.expand(7, -1))


def test_chunks_of_any_length_that_are_read_in_one_pass_have_the_bits_of_each_alone(nano, native):
    cursor, layout, u = Cursor((8, 8)), nano.layout, first_image()
    pieces = [cursor.text(1), cursor.latents(), cursor.text(1)]
    mrope, places = torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces])
    ids = [layout.begin, *[layout.latent] * 64, layout.end]
    image = Chunk(ids, mrope, places, Span(1, 0, 64, u, 0.01, None), Begin(0, 0.01, None))
    words = [list(range(9, 9 + count)) for count in (1, 12, 3)]
    chunks = [*(Chunk(each, *Cursor((8, 8)).text(len(each))) for each in words), image]
    together, alone = ([native.open() for _ in chunks] for _ in range(2))
    for lane in (*together, *alone):
        native.reserve(lane, 128)
    native.append_each(together[::-1], chunks[::-1])
    for lane, chunk in zip(alone, chunks, strict=True):
        native.append(lane, chunk)
    assert [native.length(lane) for lane in together] == [1, 12, 3, 66]
    assert torch.equal(native.logits(together), native.logits(alone))
    states = [[native.state(lane) for lane in lanes] for lanes in (together, alone)]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(*states, strict=True) for name in a)
    for lane in (*together, *alone):
        native.close(lane)


def test_a_lane_without_room_is_refused(nano, native):
    lane = native.open()
    native.reserve(lane, 64)
    ids = [9] * (native.lanes.capacity + 1)
    with pytest.raises(ShapeError, match="reserve more"):
        native.append(lane, Chunk(ids, *Cursor((8, 8)).text(len(ids))))
    native.close(lane)


def test_another_solver_of_the_shallow_blocks_is_the_lean_form_s(native, nano):
    u = torch.randn(1, 64, 16)
    mine = native.unshallow(u, LEVEL, Jacobi(tolerance=0.0))
    assert (mine - native.unshallow(u, LEVEL, SEQUENTIAL)).abs().max() <= 1e-4


# -- conversations through the engine ---------------------------------------------------------------------------------

TURNS = (
    [["two red hearts"], ["make the hearts blue"]],
    [["a blue circle"], ["what color is the circle?"], ["draw a green star"]],
    [["a small yellow star above a red square"]],
)
LIMITS = ReplyLimits(tokens=12, pictures=1)


def sampler(nano: Components, **settings: str) -> Sampler:
    return Sampler(nano, DrawConfig.for_model(nano, **settings))


def replies(using: Sampler, talks: Sequence[Sequence[Sequence[str]]], seeds: Sequence[int]) -> list[list[ReplyPart]]:
    """All parts of the model's turns of each conversation, in order."""
    found = generate_replies(using, talks, list(seeds), LIMITS)
    return [[part for turn in talk for part in turn] for talk in found]


def same_bits(one: Sequence[ReplyPart], other: Sequence[ReplyPart]) -> bool:
    def is_same(a: ReplyPart, b: ReplyPart) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return a == b
        same = all(torch.equal(x, y) for x, y in ((a.u, b.u), (a.x, b.x), (a.image, b.image)))
        return same and a.log_prob == b.log_prob and a.unconditional_log_prob == b.unconditional_log_prob

    return len(one) == len(other) and all(map(is_same, one, other))


def test_whole_conversations_have_the_same_bits_alone_and_among_others(nano, native):
    using = sampler(nano)
    assert using.path()[0] == "native"
    together = replies(using, TURNS * 2, range(6))
    for i in (0, 1, 4):
        alone = replies(using, [(TURNS * 2)[i]], [i])[0]
        assert same_bits(alone, together[i])
    assert {type(part) for talk in together for part in talk} == {str, DecodedImage}


@pytest.mark.slow
def test_64_prompts_and_16_conversations_are_those_of_the_float64_reference_to_rounding_and_judged_alike(nano, native):
    """A trained flow magnifies rounding, in a few pictures by 10^5: nine in ten are close, and all look the same."""
    talks = [[[caption_task(1, i).prompt]] for i in range(64)]
    talks += [[[turn] for turn in (caption_task(2, i).prompt, "make it blue")] for i in range(16)]
    mine, theirs = (replies(sampler(nano, precision=p), talks, range(80)) for p in ("float32", "float64"))
    pairs = [pair for talk, other in zip(mine, theirs, strict=True) for pair in zip(talk, other, strict=True)]
    assert all(a == b for a, b in pairs if isinstance(a, str) or isinstance(b, str))
    pictures = [(a, b) for a, b in pairs if isinstance(a, DecodedImage) and isinstance(b, DecodedImage)]
    assert len(pictures) >= 80
    gaps = torch.tensor([[float((a.u - b.u).abs().max()), float((a.image - b.image).abs().max())] for a, b in pictures])
    assert (gaps <= torch.tensor([CLOSE, CLOSE_PIXELS])).float().mean(0).min() >= 0.85 and gaps[:, 1].max() <= 0.02
    for scans in (detect(to_bytes(torch.stack([a.image.float(), b.image.float()]))) for a, b in pictures):
        one, other = ([(d.shape, d.color, d.size) for d in scan.detections] for scan in scans)
        assert one == other


# -- models that it does not take -------------------------------------------------------------------------------------


def test_other_models_are_refused_by_the_name_of_the_setting(nano):
    assert native_backend(pack(nano.pretzel.in_float64()))[1] == (
        "dtype of the weights is torch.float64; the compiled form takes torch.float32"
    )
    tiny = pack(tiny_components().pretzel)
    assert (
        native_backend(tiny)[1] == f"vlm.width is {tiny.language_cfg.width}; the compiled form takes a multiple of 16"
    )
    elsewhere = pack(build_components(nano.cfg, "meta").pretzel)
    assert native_backend(elsewhere)[1] == "device of the weights is meta; the compiled form takes cpu"


@pytest.mark.parametrize(
    ("name", "value"), [("scale", "softplus"), ("clips_mean", True), ("stack.activation", "gelu"), ("clip", 3.0)]
)
def test_other_blocks_are_refused_by_the_name_of_the_setting(nano, name, value):
    weights = pack(nano.pretzel)
    block = weights.shallow[1]
    stack = replace(block.cfg.stack, activation="gelu") if name == "stack.activation" else block.cfg.stack
    changes = {"stack": stack} if name == "stack.activation" else {name: value}
    weights.shallow = (weights.shallow[0], replace(block, cfg=replace(block.cfg, **changes)))
    assert native_backend(weights)[1].startswith(f"flow.shallow[1].{name} is {value}; the compiled form takes")


# -- machines where it cannot be compiled -----------------------------------------------------------------------------


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def copying(tmp_path: Path, native: NativeBackend) -> str:
    """A compiler that takes a while to copy the library that is there, and says so in `calls`."""
    made = build.library()._name
    return program(tmp_path / "slow++", f'echo x >> {tmp_path}/calls; sleep 0.2; for o; do :; done; cp {made} "$o"')


def test_a_broken_compiler_is_named_with_what_it_says(tmp_path):
    broken = program(tmp_path / "broken++", "echo 'x.cpp:1: error: no such thing' >&2; exit 3")
    with pytest.raises(Unavailable, match=r"broken\+\+ failed with exit status 3: x.cpp:1: error: no such thing"):
        build.built(tmp_path / "cache", broken)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_machine_without_a_compiler_is_told_what_was_looked_for(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler was found: looked for c\+\+, g\+\+, clang\+\+ on PATH"):
        build.found_compiler()


def test_a_machine_without_compiled_code_warns_once_and_takes_the_lean_form(monkeypatch, nano):
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._tried.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without compiled code, several times slower: no C"):
            assert native_backend(pack(nano.pretzel)) == (
                None,
                "no C++ compiler was found: looked for no-such-compiler on PATH",
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native_backend(pack(nano.pretzel))[0] is None
    finally:
        build._tried.cache_clear()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, copying):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match="cannot be written or loaded"):
        build.built(build.cache_folder(), copying)


def test_where_the_cache_cannot_be_written_the_lean_form_samples_and_says_why(tmp_path, monkeypatch, nano, native):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    build._tried.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot be written or loaded"):
            path, note = sampler(nano).path()
    finally:
        build._tried.cache_clear()
    assert path == "lean" and "cannot be written or loaded" in note


def test_processes_that_compile_at_the_same_time_do_not_disturb_each_other(tmp_path, copying):
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: build.built(tmp_path / "cache", copying), range(2)))
    assert made[0]._name == made[1]._name
    assert os.listdir(tmp_path / "cache") == [Path(made[0]._name).name]


def test_a_library_is_compiled_once(tmp_path, copying):
    for _ in range(2):
        build.built(tmp_path / "cache", copying)
    assert (tmp_path / "calls").read_text() == "x\n"


def test_a_library_that_is_cut_is_compiled_again(tmp_path, copying):
    (tmp_path / f"streams-{build.key(copying)}.so").write_bytes(b"\x7fELF")
    build.built(tmp_path, copying)
    assert (tmp_path / "calls").read_text() == "x\n"


def test_the_name_of_a_library_tells_compilers_and_sources_apart(tmp_path, monkeypatch):
    first, second = (program(tmp_path / name, "true") for name in ("a++", "b++"))
    assert build.key(first) != build.key(second)
    before = build.key(first)
    copy = shutil.copytree(SOURCE, tmp_path / "source", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    assert build.key(first, copy) == before
    (copy / "layers.h").write_text((copy / "layers.h").read_text() + "\n")
    assert build.key(first, copy) != before
