"""Is a loaded model still exact here? The checks behind `starflow2 check`, on its real weights.

For users on new hardware, library versions or weights of their own: round trip, log-determinant, the three ways of
inverting, independence of batch neighbours, guidance at zero, and the codec. The test suite proves more, but on small
random models. Prompts and scenes come from the drawn world.
Letters: B batch, N latents, D latent dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from starflow2.data.tasks import draw_task
from starflow2.errors import ConfigError
from starflow2.flow import AffineBlock, BlockConfig, Context, Flow, Jacobi, SampleConfig, solve
from starflow2.flow.block import scan
from starflow2.flow.solve import Guide
from starflow2.generate import DrawConfig, drawing_context
from starflow2.model import StarFlow2
from starflow2.stages import to_images

__all__ = ["Check", "check_model", "report", "table"]

ROWS = 3  # prompts of different length
SCENES = 16  # pictures for the codec
TWIN_GRID = (2, 2)  # latents of the twin whose whole Jacobian is computed
FLOAT32 = 1e-4
FLOAT64 = 1e-10
JACOBI = Jacobi(tolerance=0.0)  # to the fixed point, at most one pass per latent
PSNR_DB = 20.0  # an empty page in the right tint reaches about 12


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

    def to_json(self) -> dict[str, Any]:
        """name, value, bound, ok; and a note where there is something to say."""
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        row = {"name": self.name, "value": value, "bound": self.bound, "ok": self.ok}
        return row | ({"note": self.note} if self.note else {})


@dataclass(frozen=True, slots=True)
class _Material:
    """What the checks work on. x: (B, N, D) latents of drawn scenes at the sampling noise; context of their prompts."""

    model: StarFlow2
    prompts: list[str]
    x: Tensor
    context: Context
    unconditional: Context
    level: Tensor  # (B,)

    @property
    def flow(self) -> Flow:
        return self.model.parts.flow


_Measure = Callable[[_Material], float]


def check_model(model: StarFlow2, progress: Callable[[str], None] | None = None) -> list[Check]:
    """Every check on `model`, on its own device; those in float64 on a copy of the flow on the CPU.

    `progress` is called with the name of each check before it runs. A check that raises is one that fails.
    Raises ConfigError for a model without a trained flow.
    """
    if "t2i" not in model.parts.stages:
        raise ConfigError(f"this model has finished stages {list(model.parts.stages)}; the checks need t2i.")
    material = _material(model)
    return [_measured(planned, measure, material, progress) for planned, measure in _PLAN]


def _measured(planned: Check, measure: _Measure, material: _Material, progress: Callable[[str], None] | None) -> Check:
    if progress is not None:
        progress(planned.name)
    try:
        return replace(planned, value=measure(material))
    except Exception as error:  # a crash on a new library version is what this command is there to find
        return replace(planned, note=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def report(checks: Iterable[Check], model: StarFlow2) -> dict[str, Any]:
    """The outcome as JSON: checks, and the versions they were made with."""
    rows = [check.to_json() for check in checks]
    return {
        "model": model.parts.cfg.name,
        "device": str(model.device),
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
    parts = model.parts
    tokenizer = parts.tokenizer
    assert tokenizer is not None
    drawings = [draw_task(0, index) for index in range(ROWS)]
    rows = [tokenizer.drawing_prompt(drawing.prompt) for drawing in drawings]
    empty = [tokenizer.drawing_prompt("")] * ROWS
    both = drawing_context(parts, rows + empty)
    latents = parts.codec.encode(to_images([drawing.scene for drawing in drawings]).to(parts.device)).float()
    level = torch.full((ROWS,), model.sampling_noise, device=parts.device)
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    x = latents + level[:, None, None] * eps
    prompts = [drawing.prompt for drawing in drawings]
    return _Material(model, prompts, x, _rows(both, slice(None, ROWS)), _rows(both, slice(ROWS, None)), level)


def _rows(context: Context, rows: slice) -> Context:
    assert context.positions is not None and context.attend is not None
    return Context(context.states[rows], context.positions[rows], context.attend[rows])


def _repeated(context: Context | None, copies: int) -> Context | None:
    """A context of one row as `copies` equal ones."""
    if context is None:
        return None
    assert context.positions is not None and context.attend is not None
    fields = (context.states, context.positions, context.attend)
    return Context(*(t.expand(copies, *t.shape[1:]) for t in fields))


def _double(material: _Material) -> tuple[Flow, Tensor, Context, Tensor]:
    """Flow, first row of x, its context and level in float64 on the CPU."""
    flow, (context, _), level = _sampler(material)
    return flow, material.x[:1].cpu().double(), _rows(context, slice(None, 1)), level[:1]


def _sampler(m: _Material) -> tuple[Flow, tuple[Context, Context], Tensor]:
    """Flow, both contexts and levels in float64 on the CPU, the precision that pictures are sampled in there."""

    def double(context: Context) -> Context:
        assert context.positions is not None and context.attend is not None
        return Context(context.states.cpu().double(), context.positions.cpu().double(), context.attend.cpu())

    flow = copy.deepcopy(m.flow).cpu().double()
    return flow, (double(m.context), double(m.unconditional)), m.level.cpu().double()


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


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
    """The same weights as a flow over fewer latents, in float64."""

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
    """Largest derivative of any latent by one that stands behind it; exactly zero in a causal flow."""
    return max(float(grad[future].abs().max()) for grad, _, future in _diagonals(m))


@torch.no_grad()
def _cached_is_full(m: _Material) -> float:
    """Latents decoded one by one through the cache, against one full pass over what was decoded."""
    z, _ = m.flow(m.x, m.context, m.level)
    worst = 0.0
    for block in (m.flow.deep, *reversed(m.flow.shallow.blocks)):
        assert isinstance(block, AffineBlock)
        context = m.context if block is m.flow.deep else None
        cached = solve(block, z, context, m.level).x
        inward = scan(cached, block.cfg.direction)
        run = block.begin(len(z), context, m.level)
        affine = block.predict(F.pad(inward, (0, 0, 0, 1)), (0, block.cfg.num_latents), run)
        worst = max(worst, _gap(affine.denormalize(scan(z, block.cfg.direction)), inward))
        z = cached
    return worst


@torch.no_grad()
def _parallel_inverse(m: _Material) -> float:
    """All latents at once, iterated (Jacobi), against one after the other; from where drawn scenes land in z."""
    z, _ = m.flow(m.x, m.context, m.level)
    u = solve(m.flow.deep, z, m.context, m.level, solver=JACOBI).x
    return _gap(m.flow.shallow.inverse(u, m.level, JACOBI), m.flow.inverse(z, m.context, m.level))


@torch.no_grad()
def _parallel_sampling(m: _Material) -> float:
    """The same for a guided sample from the prior, in float64: there, both ways amplify rounding.

    In float32 they end up to 5e-4 apart in a latent of nano.
    """
    base = DrawConfig.for_model(m.model.parts)
    config = SampleConfig(guidance=base.guidance, rule=base.rule, prior_scale=base.prior_scale)
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
    plain = solve(flow.deep, z, context, level).x
    return _gap(solve(flow.deep, z, context, level, guide=Guide(unconditional, 0.0)).x, plain)


def _codec(m: _Material) -> float:
    """Mean PSNR of drawn scenes after encoding and decoding."""
    images = to_images([draw_task(0, index).scene for index in range(SCENES)])
    error = (m.model.roundtrip(images) - images).square().flatten(1).mean(1)  # (B,)
    return float((10 * torch.log10(4 / error.clamp(min=1e-12))).mean())  # values span 2


_PLAN: tuple[tuple[Check, _Measure], ...] = (
    (Check("inverse undoes forward (float32)", None, FLOAT32), _roundtrip),
    (Check("log-determinant = Jacobian (2x2 latents, float64)", None, FLOAT64), _jacobian_of_twin),
    (Check("log-determinant = Jacobian (all latents, float64)", None, FLOAT64), _jacobian_diagonal),
    (Check("no latent depends on a later one", None, 0.0), _leak),
    (Check("cached = one full pass (float32)", None, FLOAT32), _cached_is_full),
    (Check("parallel (Jacobi) = one by one (float32)", None, FLOAT32), _parallel_inverse),
    (Check("the same for a guided sample (float64)", None, FLOAT64), _parallel_sampling),
    (Check("guidance 0 changes nothing", None, FLOAT32), _no_guidance),
    (Check("picture alone = picture in a batch", None, FLOAT32), _batch_invariance),
    (Check("codec: PSNR of drawn scenes (dB)", None, PSNR_DB, "at least"), _codec),
)
