"""Checks that a loaded model is exact on this machine, with its real weights; behind `starflow2 check`.

For users on new hardware, library versions or weights of their own: round trip, log-determinant, the three ways of
inverting, independence of batch neighbours, guidance at zero, and the codec; with streams trained together also the
Pretzel: its cache, its skips, its rows, its likelihood. The test suite proves more, but on small random models.
Prompts and scenes come from the drawn world.
Letters: B batch, P pictures, N latents, D latent dim, T positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from itertools import zip_longest
from typing import Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from starflow2.core.images import psnr, to_floats
from starflow2.core.serialize import JsonObject
from starflow2.errors import DataError, StateError
from starflow2.flow import AffineBlock, BlockConfig, Context, Flow, Guide, Jacobi, SampleConfig, solve
from starflow2.flow.block import Reading, scan
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed, DecodedImage, Token
from starflow2.inference.likelihood import decode_code, invert
from starflow2.inference.sampler import Sampler
from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.models.joint_stream import JointStream, Output, PretzelCache, Slots, States, read_documents
from starflow2.models.pretzel import Pretzel
from starflow2.models.sequence import IGNORE, Document, Image, Text, pack, with_pictures
from starflow2.pipeline import StarFlow2
from starflow2.world.captions import caption_task
from starflow2.world.scene import render_batch

__all__ = ["Check", "check_model", "report", "table"]

ROWS = 3  # prompts of different length
SCENES = 16  # pictures for the codec
TWIN_GRID = (2, 2)  # latents of the twin whose whole Jacobian is computed
FLOAT32 = 1e-4
FLOAT64 = 1e-10
SAMPLED = 1e-3  # of images drawn in float32 with other images beside them: a trained flow magnifies rounding
STREAMS64 = 1e-5  # of both streams: transformers' norms and softmax round to float32 whatever they are given
JACOBI = Jacobi(tolerance=0.0)  # to the fixed point, at most one pass per latent
PSNR_DB = 20.0  # an empty page in the right tint reaches about 12
WORDS = 5  # tokens of a reply, where rows are compared


@dataclass(frozen=True, slots=True)
class Check:
    """One fact about the model: `value` must be at most, or at least, `bound`.

    A value of None is a check that could not be made; `note` says why.
    """

    name: str
    value: float | None
    bound: float
    direction: Literal["at most", "at least"] = "at most"
    note: str = ""

    @property
    def ok(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value <= self.bound if self.direction == "at most" else self.value >= self.bound

    def to_json(self) -> JsonObject:
        """name, value, bound, ok; and a note where there is something to say."""
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        row = {"name": self.name, "value": value, "bound": self.bound, "ok": self.ok}
        return row | ({"note": self.note} if self.note else {})


@dataclass(frozen=True, slots=True)
class _Material:
    """Material of the checks. x: (B, N, D) latents of drawn scenes at the sampling noise; context of their prompts."""

    model: StarFlow2
    prompts: list[str]
    x: Tensor
    context: Context
    unconditional: Context
    level: Tensor  # (B,)

    @property
    def flow(self) -> Flow:
        return self.model.components.flow


_Measure = Callable[[_Material], float]
Planned = tuple[Check, _Measure]


def check_model(
    model: StarFlow2, progress: Callable[[str], None] | None = None, plan: Sequence[Planned] | None = None
) -> list[Check]:
    """Every check on `model`, on its own device; those in float64 on a copy of the flow on the CPU.

    `progress` is called with the name of each check before it runs. A check that raises is one that fails.
    plan: checks with their measures, by default those that fit the model. Raises StateError for a model without a
    trained flow.
    """
    if "t2i" not in model.components.finished_stages:
        raise StateError(
            f"this model has finished stages {list(model.components.finished_stages)}; the checks need t2i."
        )
    material = _material(model)
    if plan is None:
        plan = (*FLOW_PLAN, *(JOINT_PLAN if model.is_joint else ()))
    return [_measured(planned, measure, material, progress) for planned, measure in plan]


def _measured(planned: Check, measure: _Measure, material: _Material, progress: Callable[[str], None] | None) -> Check:
    if progress is not None:
        progress(planned.name)
    try:
        return replace(planned, value=measure(material))
    except Exception as error:  # a crash on a new library version is what this command is there to find
        return replace(planned, note=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def report(checks: Iterable[Check], model: StarFlow2) -> JsonObject:
    """The outcome as JSON: checks, the code that samples, and the versions they were made with."""
    rows = [check.to_json() for check in checks]
    path, note = model.sampler().path()
    return {
        "model": model.components.cfg.name,
        "device": str(model.device),
        "sampling": {"path": path, "note": note},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "ok": all(row["ok"] for row in rows),
        "checks": rows,
    }


def table(checks: Iterable[Check]) -> Table:
    """The outcome for the terminal."""
    grid = Table("check", title="Is this model exact on this machine?", title_justify="left")
    for heading in ("value", "bound", ""):
        grid.add_column(heading, justify="right")
    for check in checks:
        value = "–" if check.value is None else f"{check.value:.3g}"
        sign = "≤" if check.direction == "at most" else "≥"
        mark = "[green]ok[/]" if check.ok else "[bold red]FAILS[/]"
        name = check.name if not check.note else f"{check.name}\n[dim]{check.note}[/]"
        grid.add_row(name, value, f"{sign} {check.bound:g}", mark)
    return grid


# -- material ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _material(model: StarFlow2) -> _Material:
    components = model.components
    tokenizer = components.tokenizer
    drawings = [caption_task(0, index) for index in range(ROWS)]
    rows = [tokenizer.drawing_prompt(drawing.prompt) for drawing in drawings]
    empty = [tokenizer.drawing_prompt("")] * ROWS
    both = drawing_context(components, rows + empty)
    latents = components.codec.encode(_scenes(components, ROWS).to(components.device)).float()
    level = torch.full((ROWS,), model.sampling_noise, device=components.device)
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    x = latents + level[:, None, None] * eps
    prompts = [drawing.prompt for drawing in drawings]
    return _Material(model, prompts, x, _rows(both, slice(None, ROWS)), _rows(both, slice(ROWS, None)), level)


def _scenes(components: Components, count: int) -> Tensor:
    """The first training scenes as pictures of the model's size, (count, 3, s, s)."""
    images = to_floats(render_batch([caption_task(0, index).scene for index in range(count)]))
    return F.interpolate(images, size=components.cfg.fae.image_size, mode="area")


def _fields(context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """States, positions and visibility of a context that has them all."""
    assert context.positions is not None and context.attend is not None
    return context.states, context.positions, context.attend


def _rows(context: Context, rows: slice) -> Context:
    return Context(*(field[rows] for field in _fields(context)))


def _repeated(context: Context | None, copies: int) -> Context | None:
    """A context of one row as `copies` equal ones."""
    if context is None:
        return None
    return Context(*(t.expand(copies, *t.shape[1:]) for t in _fields(context)))


def _double(material: _Material) -> tuple[Flow, Tensor, Context, Tensor]:
    """Flow, first row of x, its context and level in float64 on the CPU."""
    flow, (context, _), level = _sampler(material)
    return flow, material.x[:1].cpu().double(), _rows(context, slice(None, 1)), level[:1]


def _sampler(m: _Material) -> tuple[Flow, tuple[Context, Context], Tensor]:
    """Flow, both contexts and levels in float64 on the CPU."""

    def double(context: Context) -> Context:
        states, positions, attend = _fields(context)
        return Context(states.cpu().double(), positions.cpu().double(), attend.cpu())

    flow = copy.deepcopy(m.flow).cpu().double()
    return flow, (double(m.context), double(m.unconditional)), m.level.cpu().double()


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest distance between two tensors; infinite where one is not finite, since `max` would pass over NaN."""
    gap = float((a - b).detach().abs().max())
    return math.inf if math.isnan(gap) else gap


# -- the checks -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _roundtrip(m: _Material) -> float:
    """max |inverse(forward(x)) - x|."""
    z, _ = m.flow(m.x, m.context, m.level)
    return _gap(m.flow.inverse(z, m.context, m.level), m.x)


def _jacobian_of_twin(m: _Material) -> float:
    """|logdet - log |det J|| with the whole Jacobian of the same weights on a small grid."""
    flow, x, context, level = _double(m)
    twin = _on_grid(flow, TWIN_GRID)
    x = x[:, : twin.cfg.deep.num_latents]
    _, logdet = twin(x, context, level)

    def flat(v: Tensor) -> Tensor:
        return twin(v.view(x.shape), context, level)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    return _gap(torch.linalg.slogdet(jacobian).logabsdet, logdet)


def _on_grid(flow: Flow, grid: tuple[int, int]) -> Flow:
    """A flow with these weights over fewer latents, in float64."""

    def cut(block: BlockConfig) -> BlockConfig:
        return replace(block, grid=grid)

    cfg = flow.cfg
    twin = Flow(replace(cfg, deep=cut(cfg.deep), shallow=tuple(cut(b) for b in cfg.shallow))).double()
    count = grid[0] * grid[1]
    state = {k: v[:count] if k.endswith("position_table") else v for k, v in flow.state_dict().items()}
    twin.load_state_dict(state)
    return twin


def _diagonals(m: _Material) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Per block: gradients (N, N, D) of the sum over z_i's channels by each x_j; its logdet; (N, N) True where j > i.

    Every block at the full grid, fed with what the block before it gives.
    """
    flow, x, context, level = _double(m)
    for block in (*flow.shallow.blocks, flow.deep):
        assert isinstance(block, AffineBlock)
        count = block.cfg.num_latents
        rows = x.expand(count, -1, -1).clone().requires_grad_()  # (N, N, D), row i is for z_i
        given = _repeated(context if block is flow.deep else None, count)
        z, logdet = block(rows, given, level.expand(count))
        index = torch.arange(count)
        (grad,) = torch.autograd.grad(z[index, index].sum(), rows)
        order = index if block.cfg.direction == "l2r" else -index
        yield grad, logdet[0].detach(), order[None] > order[:, None]
        x = z[:1].detach()


def _jacobian_diagonal(m: _Material) -> float:
    """|logdet - sum of the log diagonal of autograd's Jacobian|, over all blocks, every latent."""
    total, stated = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for grad, logdet, _ in _diagonals(m):
        index = torch.arange(len(grad))
        total, stated = total + grad[index, index].abs().log().sum(), stated + logdet
    return _gap(total, stated)


def _leak(m: _Material) -> float:
    """Largest derivative of any latent by a later one; exactly zero in a causal flow."""
    return max(_gap(grad[future], torch.zeros_like(grad[future])) for grad, _, future in _diagonals(m))


HOWS: tuple[Reading, ...] = ("steps", "chunks")  # two ways to decode one latent after the other


@torch.no_grad()
def _cached_is_full(m: _Material) -> float:
    """Latents decoded one by one, in both ways, against one full pass over what was decoded."""
    z, _ = m.flow(m.x, m.context, m.level)
    worst = 0.0
    for block in (m.flow.deep, *reversed(m.flow.shallow.blocks)):
        assert isinstance(block, AffineBlock)
        context = m.context if block is m.flow.deep else None
        z = scan(z, block.cfg.direction)
        run = block.begin(len(z), context, m.level)
        x = z
        for how in HOWS:
            x = solve(block.predictor(len(z), context, m.level, None, how), z).x
            affine = block.predict(F.pad(x, (0, 0, 0, 1)), (0, block.cfg.num_latents), run)
            worst = max(worst, _gap(affine.denormalize(z), x))
        z = scan(x, block.cfg.direction)
    return worst


@torch.no_grad()
def _parallel_inverse(m: _Material) -> float:
    """All latents at once, iterated (Jacobi), against one after the other; from where drawn scenes land in z."""
    z, _ = m.flow(m.x, m.context, m.level)
    u = m.flow.deep.inverse(z, m.context, m.level, solver=JACOBI)
    return _gap(m.flow.shallow.inverse(u, m.level, JACOBI), m.flow.inverse(z, m.context, m.level))


@torch.no_grad()
def _parallel_sampling(m: _Material) -> float:
    """Jacobi against sequential sampling of a guided image, in float64: there, both ways amplify rounding.

    In float32 they end up to 5e-4 apart in a latent of nano.
    """
    base = DrawConfig.for_model(m.model.components)
    config = SampleConfig(guidance=base.guidance, rule=base.rule, schedule=base.schedule, prior_scale=base.prior_scale)
    parallel = replace(config, deep_solver=JACOBI, shallow_solver=JACOBI)
    flow, (context, unconditional), level = _sampler(m)
    z = flow.prior(list(range(len(m.x)))).to(level)
    one, other = (flow.sample(z, context, unconditional, level, config=c) for c in (config, parallel))
    return _gap(one, other)


def _batch_invariance(m: _Material) -> float:
    """A picture drawn alone, against the same one drawn among others with longer and shorter prompts."""
    seeds = list(range(len(m.prompts)))
    together = m.model.draw(m.prompts, seeds)
    alone = [m.model.draw([prompt], [seed]) for prompt, seed in zip(m.prompts, seeds, strict=True)]
    return _gap(torch.cat(alone), together)


@torch.no_grad()
def _no_guidance(m: _Material) -> float:
    """Both branches with guidance 0, against the conditional branch by itself."""
    flow, (context, unconditional), level = _sampler(m)
    z = flow.prior(list(range(len(m.x)))).to(level)
    plain = flow.deep.inverse(z, context, level)
    return _gap(flow.deep.inverse(z, context, level, guide=Guide(unconditional, 0.0)), plain)


def _codec(m: _Material) -> float:
    """Mean PSNR of drawn scenes after encoding and decoding."""
    images = _scenes(m.model.components, SCENES)
    return float(psnr(m.model.roundtrip(images), images).mean())


FLOW_PLAN: tuple[Planned, ...] = (
    (Check("inverse undoes forward (float32)", None, FLOAT32), _roundtrip),
    (Check("log-determinant = Jacobian (2x2 latents, float64)", None, FLOAT64), _jacobian_of_twin),
    (Check("log-determinant = Jacobian (all latents, float64)", None, FLOAT64), _jacobian_diagonal),
    (Check("no latent depends on a later one", None, 0.0), _leak),
    (Check("cached = one full pass (float32)", None, FLOAT32), _cached_is_full),
    (Check("parallel (Jacobi) = one by one (float32)", None, FLOAT32), _parallel_inverse),
    (Check("the same for a guided sample (float64)", None, FLOAT64), _parallel_sampling),
    (Check("guidance 0 changes nothing", None, FLOAT32), _no_guidance),
    (Check("picture alone = picture in a batch", None, SAMPLED), _batch_invariance),
    (Check("codec: PSNR of drawn scenes (dB)", None, PSNR_DB, "at least"), _codec),
)


# -- the checks of both streams together ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recorder(Pretzel):
    """A Pretzel that records the states that it computes."""

    record: list[States] = field(default_factory=list)

    @classmethod
    def of(cls, stream: JointStream) -> _Recorder:
        """Over the weights of a Pretzel. Raises StateError for another stream."""
        if not isinstance(stream, Pretzel):
            raise StateError(f"the checks of both streams need a Pretzel, not {type(stream).__name__}.")
        return cls(**{field.name: getattr(stream, field.name) for field in fields(stream)})

    def read(self, slots: Slots, cache: PretzelCache | None = None) -> States:
        self.record.append(super().read(slots, cache))
        return self.record[-1]


def _ids(components: Components, index: int, *, asks: bool = True) -> list[int]:
    """Token ids of a user turn with a training caption; `asks`: with the opening of the reply."""
    tokenizer, words = components.tokenizer, components.tokenizer.encode(caption_task(0, index).prompt)
    return [*tokenizer.opens_user(), *words, *(tokenizer.opens_reply() if asks else [])]


def _upload(components: Components) -> Tensor:
    """An image (3, s, s) to upload."""
    return _scenes(components, 1)[0]


def _drawn(engine: Engine, row: int, seed: int) -> DecodedImage:
    """The image with which a row replies."""
    engine.begin(row, ReplyLimits(tokens=0, pictures=1), seed, draws=True)
    return next(event.picture for event in list(engine.run()) if isinstance(event, Completed))


@torch.no_grad()
def _interleaved(components: Components, precision: Literal["float32", "float64"]) -> float:
    """Words, upload, drawn picture, words, drawn picture, words: step by step through the engine, against one full
    pass. Last states as a share of the largest, and log densities of the drawn pictures in nats per dimension."""
    sampler = Sampler(components, DrawConfig.for_model(components, precision=precision))
    recorder = _Recorder.of(sampler.pretzel)
    replies, ends = components.tokenizer.opens_reply(), components.cfg.vlm.special.end
    upload = sampler.noisy(_upload(components)[None], torch.tensor([sampler.upload_level]))
    engine = Engine(sampler)
    row = engine.open()
    caption, again = _ids(components, 0, asks=False), _ids(components, 1)
    engine.feed(row, caption)
    engine.see(row, upload[0], sampler.upload_level)
    engine.feed(row, replies)
    first = _drawn(engine, row, 0)
    engine.feed(row, again)
    second = _drawn(engine, row, 1)
    engine.feed(row, caption)
    end, drawn = Text((ends,)), Image(is_target=True)
    opened: Document = [Text(tuple(caption)), Image(), Text(tuple(replies)), drawn, end]
    document: Document = [*opened, Text(tuple(again)), drawn, end, Text(tuple(caption))]
    x = torch.stack([upload[0], first.x, second.x])
    levels = torch.tensor([sampler.upload_level, sampler.noise_level, sampler.noise_level], dtype=x.dtype).to(x.device)
    output = read_documents(recorder, pack([document], sampler.layout).to(x.device), x, levels)
    (full,) = recorder.record
    pairs = zip(engine.states(row), (full.h[0], full.g[0]), strict=True)
    stated = torch.tensor([first.log_prob or 0.0, second.log_prob or 0.0]).to(x)
    nats = _gap(output.affine.log_prob(output.u).sum(1)[1:], stated) / x[0].numel()
    return max(nats, *(_gap(stepped, whole[-1]) / float(whole.abs().max()) for stepped, whole in pairs))


def _interleaved_float32(m: _Material) -> float:
    return _interleaved(m.model.components, "float32")


def _interleaved_float64(m: _Material) -> float:
    return _interleaved(copy.deepcopy(m.model.components).cpu(), "float64")


def _documents(components: Components) -> list[Document]:
    """Words, an uploaded image and two drawn ones; a caption and its image; words alone. All words have labels."""
    end = Text((components.cfg.vlm.special.end,), is_target=True)
    words = [Text(tuple(_ids(components, index)), is_target=True) for index in range(3)]
    drawn = Image(is_target=True)
    return [[words[0], Image(), words[1], drawn, end, words[2], drawn, end], [words[1], drawn, end], [words[2], end]]


def _latents(sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Latents (4, N, D) of the pictures of `_documents`, and their levels."""
    levels = torch.full((4,), sampler.noise_level)
    levels[0] = sampler.upload_level
    return sampler.noisy(_scenes(sampler.components, 4), levels), levels.to(sampler.components.device, sampler.dtype)


@torch.no_grad()
def _closed_skips(m: _Material) -> float:
    """Logits with both skips closed, against the language model by itself on the same embeddings."""
    components, sampler = m.model.components, m.model.sampler()
    shared = sampler.pretzel
    pretzel = shared.with_skips(())
    x, levels = (t[:3] for t in _latents(sampler))
    batch = pack(_documents(components)[:1], components.layout).to(x.device)
    logits = read_documents(pretzel, batch, x, levels).logits
    u, _ = shared.flow.shallow(x, levels)
    embeds = with_pictures(shared.vlm.embed(batch.ids), pretzel.adapted(u, levels), batch)
    bare = shared.vlm.states(embeds, batch.mrope)[batch.labels != IGNORE]
    return _gap(logits, shared.vlm.logits(bare))


def _replies(
    sampler: Sampler, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
) -> list[list[int | DecodedImage]]:
    """Replies of all rows: token ids and images in order."""
    engine = Engine(sampler)
    replies: dict[int, list[int | DecodedImage]] = {}
    for ids, seed in zip(prompts, seeds, strict=True):
        row = engine.open()
        replies[row] = []
        engine.feed(row, ids)
        engine.begin(row, ReplyLimits(tokens=WORDS, pictures=1), seed)
    for event in engine.run():
        if isinstance(event, Token):
            replies[event.row].append(event.id)
        elif isinstance(event, Completed):
            replies[event.row].append(event.picture)
    return list(replies.values())


def _steered(sampler: Sampler, prompts: Sequence[Sequence[int]]) -> Sampler:
    """A sampler with which some of the rows begin with an image and the others with words."""
    engine, begin, end = Engine(sampler), sampler.layout.begin, sampler.components.cfg.vlm.special.end

    def lead(logits: Tensor) -> Tensor:
        return (logits[:, begin] - logits[:, end]).float()

    leads = []
    for ids in prompts:
        row = engine.open()
        engine.feed(row, ids)
        leads.append(lead(sampler.pretzel.logits(*(state[None] for state in engine.states(row)))))
    ordered = torch.cat(leads).sort().values
    widest = int(ordered.diff().argmax())
    threshold = float(ordered[widest : widest + 2].mean())

    def steer(logits: Tensor) -> Tensor:
        logits[:, begin] += torch.where(lead(logits) > threshold, 1e3, -1e3)
        return logits

    twin = copy.copy(sampler)
    twin.adjust_logits = steer
    return twin


@torch.no_grad()
def _mixed_rows(m: _Material) -> float:
    """Rows of which some draw while others write, against each alone: latents and pixels; infinite if words differ."""
    components = m.model.components
    asked = [_ids(components, index) for index in range(ROWS)]
    sampler, seeds = _steered(m.model.sampler(), asked), range(ROWS)
    together = _replies(sampler, asked, seeds)
    if len({isinstance(next(iter(row), None), DecodedImage) for row in together}) == 1:
        raise DataError("all rows began in the same modality, so nothing was compared.")
    worst = 0.0
    for ids, seed, row in zip(asked, seeds, together, strict=True):
        (alone,) = _replies(sampler, [ids], [seed])
        worst = max([worst, *(_apart(*pair) for pair in zip_longest(row, alone))])
    return worst


def _apart(a: int | DecodedImage | None, b: int | DecodedImage | None) -> float:
    if isinstance(a, DecodedImage) and isinstance(b, DecodedImage):
        return max(_gap(a.u, b.u), _gap(a.image, b.image))
    return 0.0 if a == b else math.inf


def _fork_and_rewind(m: _Material) -> float:
    """A picture drawn by a session, against the same drawn after taking it back, and by a fork."""
    session = m.model.session().add(m.prompts[0], _upload(m.model.components))
    mark, fork = session.mark(), session.fork()
    first = session.draw().picture
    session.rewind(mark)
    again, other = session.draw().picture, fork.draw().picture
    return max(_gap(first.u, again.u), _gap(first.u, other.u), _gap(first.image, other.image))


def _inversion(m: _Material) -> float:
    """A picture through its latent code and back, against the codec's own round trip at the same noise; in pixels."""
    sampler, image = m.model.exact_sampler(), _upload(m.model.components)
    x = sampler.noisy(image[None], torch.tensor([sampler.noise_level]))
    code = invert(sampler, image, m.prompts[0])
    with torch.no_grad():
        seen = m.model.components.codec.decode(x.to(m.x.dtype))[0]
    return _gap(decode_code(sampler, code.z, m.prompts[0]).image, seen)


def _patches(m: _Material) -> float:
    """|sum of the patches + shallow log-determinant - log_prob|, in nats per dimension."""
    (found,) = m.model.score([m.prompts[0]], [_upload(m.model.components)]).pictures
    return abs(float(found.patches.sum()) + found.shallow_logdet - found.log_prob) / found.dims


@torch.no_grad()
def _packed(m: _Material) -> float:
    """Documents that share a row, against each alone: Gaussians, logits, and log_prob in nats per dimension."""
    sampler, documents = m.model.sampler(), _documents(m.model.components)
    x, levels = _latents(sampler)
    width = sum(len(sampler.layout.ids(segment)) for document in documents for segment in document)

    def read(some: Sequence[Document], pictures: slice) -> Output:
        batch = pack(some, sampler.layout, width).to(x.device)
        return read_documents(sampler.pretzel, batch, x[pictures], levels[pictures])

    together, worst, first = read(documents, slice(None)), 0.0, 0
    for index, document in enumerate(documents):
        own = slice(first, first + sum(isinstance(segment, Image) for segment in document))
        alone = read([document], own)
        worst = max(worst, _gap(together.logits[together.documents == index], alone.logits))
        if own.stop > own.start:
            pairs = ((o.affine.mu, o.affine.log_scale, o.log_prob / x[0].numel()) for o in (together, alone))
            worst = max(worst, *(_gap(a[own], b) for a, b in zip(*pairs, strict=True)))
        first = own.stop
    return worst


def _encodings(m: _Material) -> float:
    """Number of encoder runs after the upload in a conversation that draws two images."""
    calls: list[None] = []
    session = m.model.session()
    hook = m.model.components.codec.encoder.register_forward_hook(lambda *_: calls.append(None))
    try:
        session.add(m.prompts[0], _upload(m.model.components))
        if len(calls) != 1:
            raise DataError(f"an upload ran the encoder {len(calls)} times; expected once, so counting tells nothing.")
        session.draw()
        session.add(m.prompts[1]).draw()
    finally:
        hook.remove()
    return float(len(calls) - 1)


JOINT_PLAN: tuple[Planned, ...] = (
    (Check("conversation: cached = one full pass (float32)", None, FLOAT32), _interleaved_float32),
    (Check("conversation: cached = one full pass (float64)", None, STREAMS64), _interleaved_float64),
    (Check("skips closed = bare language model", None, 0.0), _closed_skips),
    (Check("row alone = row among others that write or draw", None, SAMPLED), _mixed_rows),
    (Check("fork and rewind repeat bit for bit", None, 0.0), _fork_and_rewind),
    (Check("picture = picture from its latent code", None, FLOAT32), _inversion),
    (Check("patches + shallow log-determinant = log_prob", None, FLOAT32), _patches),
    (Check("document alone = document in a packed row", None, FLOAT32), _packed),
    (Check("encodings between generated pictures", None, 0.0), _encodings),
)
