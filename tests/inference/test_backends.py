"""Packed weights over static lanes against the streams themselves: whole conversations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model_cases import STAGES, tiny_components, tiny_tokenizer
from starflow2.flow.solver import SEQUENTIAL
from starflow2.inference.backend import Backend, Begin, Chunk, Drawn, NewImage, Pair, Span
from starflow2.inference.lean import LeanBackend
from starflow2.inference.packed import pack
from starflow2.inference.streams import StreamBackend
from starflow2.models.components import Components
from starflow2.models.joint_stream import JointStream
from starflow2.models.sequence import Cursor
from starflow2.training.recipes import nano_model

SIDE, COUNT, DIM = 3, 9, 4
LEVEL = 0.5


@pytest.fixture(scope="module")
def stream() -> JointStream:
    return tiny_components(STAGES, side=SIDE).pretzel.in_float64()


@pytest.fixture
def both(stream) -> tuple[Backend, Backend]:
    return LeanBackend(pack(stream, torch.float64)), StreamBackend(stream, torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Row:
    """A lane with the cursor of its conversation."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.lane, self.cursor = backend, backend.open(), Cursor((SIDE, SIDE))
        backend.reserve(self.lane, 200)

    def chunk(self, ids: list[int], begin: Tensor | bool | None = False) -> Chunk:
        mrope, places = self.cursor.text(len(ids))
        start = None if begin is False else Begin(len(ids) - 1, LEVEL, begin)
        return Chunk(ids, mrope, places, begin=start)

    def say(self, *ids: int) -> None:
        self.backend.append(self.lane, self.chunk(list(ids)))

    def begin(self, *ids: int, reference: Tensor | None = None, strength: float = 1.5, seed: int = 0) -> None:
        self.backend.append(self.lane, self.chunk(list(ids), reference))
        ahead = Cursor((SIDE, SIDE), self.cursor.mrope, self.cursor.step)
        strengths = torch.full((COUNT,), strength, dtype=torch.float64)
        z = 0.8 * random(COUNT, DIM, seed=seed)
        self.backend.start(self.lane, NewImage(z, LEVEL, strengths, *ahead.latents(), reference))

    def see(self, u: Tensor, level: float, reference: Tensor | None = None) -> None:
        """A whole image, its begin and its end in one pass."""
        parts = [self.cursor.text(1), self.cursor.latents(), self.cursor.text(1)]
        mrope, places = (torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), (1, 0), strict=True))
        span, begin = Span(1, 0, COUNT, u, level, reference), Begin(0, level, reference)
        self.backend.append(self.lane, Chunk([4, *[6] * COUNT, 5], mrope, places, span, begin))

    def finish(self, u: Tensor, reference: Tensor | None) -> None:
        """The last latent of a drawn image, which is not read while it is drawn, and the end."""
        parts = [self.cursor.latents(COUNT - 1, COUNT), self.cursor.text(1)]
        mrope, places = (torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), (1, 0), strict=True))
        span = Span(0, COUNT - 1, COUNT, u, LEVEL, reference)
        self.backend.append(self.lane, Chunk([6, 5], mrope, places, span))


def padded(u: Tensor) -> Tensor:
    return torch.nn.functional.pad(u, (0, 0, 0, 1))


def conversation(backend: Backend) -> list[Tensor]:
    """Two rows that read, see and draw beside each other, guided and not; all that came of it."""
    found: list[Tensor] = []
    one, two, blank = Row(backend), Row(backend), Row(backend)
    idle = Row(backend)
    idle.say(9, 8)
    shown = padded(random(COUNT, DIM, seed=3))
    one.say(1, 30, 31)
    one.see(shown, 0.01)
    one.begin(40, 2, 4, reference=shown, seed=1)
    two.begin(1, 50, 51, 52, 2, 4, strength=0.0, seed=2)
    blank.begin(1, 2, 4)
    first, second = Pair(one.lane, blank.lane, LEVEL), Pair(two.lane, None, LEVEL)
    backend.arrange([second], [idle.lane])
    backend.draw([second], 4)
    backend.append_each([idle.lane], [idle.chunk([7])])
    backend.arrange([first, second], [])
    backend.draw([first, second], 5)
    backend.arrange([first], [two.lane])
    drawn = backend.drawn(second)
    found += parts(drawn)
    two.finish(padded(drawn.u), None)
    backend.draw([first], 4)
    found += parts(backend.drawn(first))
    one.finish(padded(backend.drawn(first).u), shown)
    backend.append_each([one.lane, idle.lane, two.lane], [row.chunk([33]) for row in (one, idle, two)])
    found.append(backend.logits([two.lane, one.lane, idle.lane]))
    backend.append_each(
        [idle.lane, two.lane, one.lane], [idle.chunk([34, 35, 36]), two.chunk([37]), one.chunk([38, 39])]
    )
    found.append(backend.logits([idle.lane, one.lane, two.lane]))
    twin = backend.fork(one.lane)
    backend.append(twin, one.chunk([44, 45]))
    return [
        *found,
        backend.logits([twin]),
        backend.logits([one.lane]),
        backend.unshallow(drawn.u[None], LEVEL, SEQUENTIAL),
    ]


def parts(drawn: Drawn) -> list[Tensor]:
    found = [drawn.u, drawn.conditional.mu, drawn.conditional.log_scale]
    other = drawn.unconditional
    return found if other is None else [*found, other.mu, other.log_scale]


def test_whole_conversations_equal_those_of_the_streams_themselves(both):
    lean, plain = (conversation(backend) for backend in both)
    assert len(lean) == len(plain)
    for mine, theirs in zip(lean, plain, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 1e-5  # both compute angles and some norms in float32


class Counted(TorchDispatchMode):
    """Counts the operations that torch dispatches, and those that wait for the device."""

    SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten._unique2")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.syncs += str(func).rsplit(".", 1)[0] in self.SYNCS
        return func(*args, **(kwargs or {}))


def test_a_guided_latent_of_nano_takes_at_most_600_operations_with_its_share_of_the_shallow_blocks():
    cfg = nano_model()
    components = Components(cfg, tiny_tokenizer())
    backend = LeanBackend(pack(components.pretzel))
    count, dim = cfg.flow.deep.num_latents, cfg.flow.deep.dim
    lanes = [backend.open(), backend.open()]
    for lane in lanes:
        backend.reserve(lane, 4 + count)
        cursor = Cursor(cfg.flow.deep.grid)
        backend.append(lane, Chunk([1, 2, 4], *cursor.text(3), begin=Begin(2, LEVEL, None)))
        image = NewImage(random(count, dim), LEVEL, torch.ones(count), *cursor.latents(), None)
        backend.start(lane, image)
    pair = Pair(lanes[0], lanes[1], LEVEL)
    backend.arrange([pair], [])
    with Counted() as drawing:
        backend.draw([pair], count)
    with Counted() as shallow:
        backend.unshallow(backend.drawn(pair).u[None], LEVEL, SEQUENTIAL)
    assert drawing.syncs == 0
    assert (drawing.operations + shallow.operations) / count <= 600


def test_lanes_keep_their_contents_while_others_come_and_go(both):
    """Slots change, memory grows and shrinks: a lane that is never touched holds the same bits throughout."""
    lean = both[0]
    assert isinstance(lean, LeanBackend)
    kept = Row(lean)
    kept.say(1, 30, 31)
    before = {name: value.clone() for name, value in lean.state(kept.lane).items()}
    for turn in range(3):
        others = [Row(lean) for _ in range(turn + 2)]
        for i, row in enumerate(others):
            row.say(*range(1, 3 + i))
        lean.reserve(others[0].lane, 900)
        lean.arrange([], [others[-1].lane, kept.lane])
        lean.arrange([], [row.lane for row in others])
        for row in others:
            lean.close(row.lane)
        lean.trim()
        assert all(torch.equal(value, before[name]) for name, value in lean.state(kept.lane).items())
    assert lean.lanes.capacity == 256 and lean.lanes.slots <= 3
    assert lean.nbytes == lean.bytes_for(0, 0) * lean.lanes.slots


def test_what_is_not_finite_in_a_lane_is_gone_when_it_is_taken_back(both):
    lean = both[0]
    row = Row(lean)
    row.say(1, 30)
    mark = lean.mark(row.lane)
    row.see(torch.full((COUNT + 1, DIM), torch.nan), LEVEL)
    assert bool(lean.mark(row.lane).g.isnan().any())
    lean.restore(row.lane, mark)
    lean.append(row.lane, Chunk([31], torch.full((3, 1), 2), torch.tensor([[0.0, 0.0, 2.0]])))
    assert bool(lean.logits([row.lane]).isfinite().all())
