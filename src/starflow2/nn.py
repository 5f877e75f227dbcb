"""Layers shared by every model here: norms, rotary positions, causal attention, a transformer stack and its cache.

Not here: anything that knows about latents, tokens or images.
Letters: B batch, T positions, C width, H heads, K head dim, D documents of at most L positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.core.fields import Config, Depth, Size, described, of_kind
from starflow2.core.tiles import RotatedHeads, Tile, TiledAttention, is_tiled, tiles_of
from starflow2.errors import ConfigError, ShapeError

__all__ = [
    "Activation",
    "ByDocument",
    "Cache",
    "CausalStack",
    "FiLM",
    "FinalNorm",
    "RmsNorm",
    "StackConfig",
    "at_least_fp32",
    "attention",
    "attention_mask",
    "axial_angles",
    "check",
    "check_floating",
    "heads_of",
    "is_readable",
    "num_parameters",
    "raw_bytes",
    "rotate",
    "rotate_halves",
    "zero_linear",
]

Activation = Literal["gelu", "relu2"]
TEXT_PAIRS = 8  # rotation pairs of the third (text or time) axis, STARFlow's split
ROPE_BASE = 10000.0


def check(x: Tensor, shape: str, name: str = "x", **sizes: int) -> None:
    """Raise ShapeError unless `x` has the axes named in `shape` and the given `sizes`.

    >>> check(torch.zeros(2, 4, 3), "B N D", D=3)
    """
    axes = shape.split()
    wanted = " ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes)
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is {described(x)}; expected a tensor ({wanted}).")
    if x.ndim != len(axes) or any(sizes.get(a, n) != n for a, n in zip(axes, x.shape, strict=False)):
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected ({wanted}).")


def check_floating(x: Tensor, name: str = "x") -> None:
    """Raise ShapeError for what is no tensor, and for whole numbers, truth values and complex numbers."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is {described(x)}; expected a tensor of floating point numbers.")
    if not x.is_floating_point():
        raise ShapeError(f"{name} has dtype {x.dtype}; expected floating point numbers: convert them, x.float().")


def is_readable(x: Tensor) -> bool:
    """True where a look at the values of `x` costs nothing and is possible: a plain tensor on the CPU, not a traced,
    fake or sharded one."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def raw_bytes(x: Tensor) -> bytes:
    """Values of `x` as bytes in memory order, for digests."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def num_parameters(*modules: nn.Module) -> int:
    """Number of parameters that these modules have together, shared ones counted once.

    >>> num_parameters(nn.Linear(2, 3))
    9
    """
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def at_least_fp32(x: Tensor) -> Tensor:
    """Promote half precision to float32; float32 and float64 pass unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def zero_linear(width_in: int, width_out: int, *, bias: bool = True) -> nn.Linear:
    """Linear layer whose output is zero at initialisation, whatever its input."""
    layer = nn.Linear(width_in, width_out, bias=bias)
    nn.init.zeros_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class FinalNorm(nn.Module):
    """RMS norm with gain (1 + weight), weight zero at initialisation, eps 1e-6 (STARFlow's final norm)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_fp32(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class RmsNorm(nn.Module):
    """RMS norm with a gain, computed in float32 or better: x / rms(x) * weight, in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16) or x.device.type != "cpu":
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    """`F.rms_norm` in three passes over memory and seven backward; torch takes more than twice as many on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = square.add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():  # create_graph, as in `_SquaredRelu`
            raise NotImplementedError("RmsNorm can be differentiated only once; use F.rms_norm for more.")
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        by_gain = grad * normed
        with torch.autocast(x.device.type, enabled=False):
            mean = (by_gain @ weight).div_(x.shape[-1]).unsqueeze(-1)  # (..., 1)
        by_x = (grad * weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return by_x, by_gain.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class FiLM(nn.Module):
    """Scale and shift a normalized stream, both predicted from an embedding; identity at initialisation."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.to_film = zero_linear(condition_width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.to_film(F.silu(condition)).chunk(2, dim=-1)
        return x * (1 + gamma) + beta


# -- rotary positions ---------------------------------------------------------------------------


def _check_rotary(head_dim: int) -> None:
    """Raise ConfigError for a head that three axes cannot share."""
    if head_dim < 2 * TEXT_PAIRS + 4 or head_dim % 4:
        raise ConfigError(
            f"head_dim is {head_dim}; rotary positions on three axes need "
            f"a multiple of 4 that is at least {2 * TEXT_PAIRS + 4}."
        )


def axial_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Rotation angles of three axes, row, column and text: (B, T, 3) -> (B, T, head_dim / 2).

    The third axis gets 8 pairs, the two image axes share the rest; base 10000 (STARFlow).
    """
    _check_rotary(head_dim)
    spatial = head_dim - 2 * TEXT_PAIRS  # channels of both image axes, four for each of their frequencies
    dtype = torch.promote_types(positions.dtype, torch.float32)
    half = torch.arange(spatial // 4, dtype=dtype, device=positions.device)
    freqs = ROPE_BASE ** (-2 * half / (spatial // 2))
    text = torch.arange(TEXT_PAIRS, dtype=dtype, device=positions.device)
    text_freqs = ROPE_BASE ** (-text / TEXT_PAIRS)
    row, col, step = positions.to(dtype).unsqueeze(-1).unbind(-2)  # 3 x (B, T, 1)
    return torch.cat([row * freqs, col * freqs, step * text_freqs], dim=-1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate interleaved pairs (2i, 2i+1) of x (..., K), in float32 or better.

    turns: cos + i sin, complex, that broadcasts over (..., K / 2).
    """
    pairs = torch.view_as_complex(at_least_fp32(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def heads_of(qkv: Tensor, heads: int, turns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K), keys and values (B, G, T, K) from (B, T, H + 2 G, K), the first two rotated by `turns`.

    turns: (B or 1, T, 1, K / 2) complex, as in `rotate`.
    """
    groups = (qkv.shape[2] - heads) // 2
    if turns is not None and is_tiled(qkv):
        return RotatedHeads.apply(qkv, heads, turns)  # type: ignore[no-untyped-call]
    rotated = qkv[:, :, : heads + groups]
    if turns is not None:
        rotated = rotate(rotated, turns)
    q, k = rotated.transpose(1, 2).split((heads, groups), dim=1)
    return q, k, qkv[:, :, heads + groups :].transpose(1, 2)


def rotate_halves(x: Tensor, turns: Tensor) -> Tensor:
    """`rotate` of channel i of x (..., K) against channel i + K / 2 (Qwen's pairs) in place of neighbours."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    cos, sin = turns.real, turns.imag
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# -- attention and cache ------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | ByDocument | Sequence[Tile] | None) -> Tensor:
    """Softmax attention; q: (B, H, T, K), k, v: (B, G, T, K), each for H / G neighbouring heads of q.

    attend: (B or 1, 1, Tq, Tk) bool, True = may attend, documents, or None; where `is_tiled`, also its `tiles_of`.
    """
    if isinstance(attend, ByDocument):
        return attend.attention(q, k, v)
    groups = q.shape[1] // k.shape[1]
    if is_tiled(q):
        tiles = tiles_of(attend, q.shape, k.shape[2]) if attend is None or isinstance(attend, Tensor) else attend
        grouped = q.unflatten(1, (-1, groups)).contiguous()
        out: Tensor = TiledAttention.apply(grouped, k.contiguous(), v.contiguous(), tiles)  # type: ignore[no-untyped-call]
        return out.flatten(1, 2)
    assert attend is None or isinstance(attend, Tensor)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attend)


@dataclass(frozen=True, slots=True)
class DocumentGroup:
    """Documents of similar length: where their positions stand in rows, and where as documents (D, L).

    queries, keys: (4, n) int64, row, column, number among these documents and place of each position.
    """

    count: int  # D
    length: int  # L, of the longest
    queries: Tensor
    keys: Tensor

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values (n, H, K) of its queries; q: (B, H, Tq, K), k, v: (B, G, Tk, K), G divides H."""
        q, k, v = (
            self._documents(x, where).transpose(1, 2)
            for x, where in ((q, self.queries), (k, self.keys), (v, self.keys))
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)[self.queries[2], self.queries[3]]

    def _documents(self, x: Tensor, where: Tensor) -> Tensor:
        """(B, H, T, K) -> (D, L, H, K), zero where a document has no such position here."""
        row, column, document, place = where
        empty = x.new_zeros(self.count, self.length, x.shape[1], x.shape[3])
        return empty.index_put((document, place), x.transpose(1, 2)[row, column])


@dataclass(frozen=True, slots=True)
class ByDocument:
    """Causal attention within the documents of packed rows, without a mask over whole rows.

    Documents are taken out of their rows, groups of similar length together, so that a fused kernel needs no mask and
    its work grows with the documents rather than with the rows. Positions of no document get zeros.
    """

    groups: tuple[DocumentGroup, ...]
    document: Tensor  # (B, Tq) int64, the document of each query, -1 for none
    place: Tensor  # (B, Tq) int64, its place there

    @staticmethod
    def of(document: Tensor) -> ByDocument:
        """Rows that hold their documents one after the other; document: (B, T) int64, -1 at padding."""
        column = torch.arange(document.shape[1], device=document.device).expand_as(document)
        begins = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
        place = column - torch.where(begins, column, 0).cummax(1).values
        return ByDocument.between((document, place), (document, place))

    @staticmethod
    def between(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> ByDocument:
        """Queries and keys in any order; both: documents (B, T), -1 for none, and places in them (B, T)."""
        (row, column), ids = _real(keys[0]), keys[0][keys[0] >= 0]
        numbers, index = ids.unique(return_inverse=True)
        lengths = torch.zeros_like(numbers).scatter_reduce(0, index, keys[1][row, column] + 1, "amax")
        size = lengths.clamp(min=2).sub(1).log2().floor().long()  # documents of up to 2, 4, 8, ... positions
        groups = tuple(
            DocumentGroup(len(own), int(lengths[size == power].max()), _at(queries, own), _at(keys, own))
            for power in size.unique().tolist()
            for own in (numbers[size == power],)
        )
        return ByDocument(groups, *queries)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (B, H, Tq, K); q: (B, H, Tq, K), k, v: (B, G, Tk, K), G divides H."""
        found = torch.cat([group.attention(q, k, v) for group in self.groups])  # (n, H, K)
        rows, columns = (torch.cat([group.queries[i] for group in self.groups]) for i in (0, 1))
        out = found.new_zeros(q.transpose(1, 2).shape)  # (B, Tq, H, K)
        return out.index_put((rows, columns), found).transpose(1, 2)

    def to(self, device: torch.device | str) -> ByDocument:
        groups = (replace(g, queries=g.queries.to(device), keys=g.keys.to(device)) for g in self.groups)
        return ByDocument(tuple(groups), self.document.to(device), self.place.to(device))


def _real(document: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of positions in a document."""
    row, column = (document >= 0).nonzero(as_tuple=True)
    return row, column


def _at(positions: tuple[Tensor, Tensor], own: Tensor) -> Tensor:
    """(4, n) row, column, number among `own`, which is sorted, and place of the positions of these documents."""
    document, place = positions
    row, column = torch.isin(document, own).nonzero(as_tuple=True)
    return torch.stack([row, column, torch.searchsorted(own, document[row, column]), place[row, column]])


class Cache:
    """Keys and values of a stack, two growing buffers per layer.

    `append` writes after `length`; `advance` moves `length` once all layers have written;
    `truncate` rewinds; `fork` copies rows so that branches never share memory; `state` and
    `from_state` carry a cache through a file.
    """

    def __init__(self, depth: int, capacity: int = 64) -> None:
        self.length = 0
        self._capacity = capacity
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * depth

    @property
    def depth(self) -> int:
        return len(self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, spare capacity included."""
        return sum(t.nbytes for pair in self._buffers if pair is not None for t in pair)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v: (B, H, T, K) of `layer` after the cached ones; return all so far."""
        end = self.length + k.shape[2]
        buffers = self._reserve(layer, k, end)
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[:, :, self.length : end] = new
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def _reserve(self, layer: int, like: Tensor, end: int) -> tuple[Tensor, Tensor]:
        old = self._buffers[layer]
        if old is not None and old[0].shape[2] >= end:
            return old
        self._capacity = max(self._capacity, end if old is None else 2 * end)
        batch, heads, _, dim = like.shape
        new = (
            like.new_empty(batch, heads, self._capacity, dim),
            like.new_empty(batch, heads, self._capacity, dim),
        )
        if old is not None:
            for target, source in zip(new, old, strict=True):
                target[:, :, : self.length] = source[:, :, : self.length]
        self._buffers[layer] = new
        return new

    def advance(self, count: int) -> None:
        self.length += count

    def truncate(self, length: int) -> None:
        """Drop all positions after the first `length`, which stay bit-equal. Raises ShapeError."""
        if not 0 <= length <= self.length:
            raise ShapeError(f"truncate got length {length}; expected 0 to {self.length}, the cached positions.")
        self.length = length

    def fork(self, copies: int = 1) -> Cache:
        """Copy the cache, each row repeated `copies` times."""
        twin = Cache(self.depth, self._capacity)
        twin.length = self.length
        twin._buffers = [
            None if pair is None else (pair[0].repeat_interleave(copies, 0), pair[1].repeat_interleave(copies, 0))
            for pair in self._buffers
        ]
        return twin

    def state(self) -> dict[str, Tensor]:
        """Keys and values (B, H, T, K) by layer, "0.k", "0.v", "1.k", ..., up to `length`, as views.

        Empty for a cache that nothing was written to.
        """
        pairs = [pair for pair in self._buffers if pair is not None]
        return {
            f"{i}.{name}": pair[j][:, :, : self.length] for i, pair in enumerate(pairs) for j, name in enumerate("kv")
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Cache:
        """Make a cache of copies of these keys and values, named as `state` names them.

        Raises ShapeError for other names, a layer that is missing, and layers of unequal shape.
        """
        depth = len(state) // 2
        if not state or set(state) != {f"{i}.{name}" for i in range(depth) for name in "kv"}:
            raise ShapeError(f"state of a cache has keys {sorted(state)}; expected 0.k, 0.v, 1.k, ... of all layers.")
        if len({x.shape for x in state.values()}) > 1:
            shapes = {name: tuple(x.shape) for name, x in state.items()}
            raise ShapeError(f"state of a cache has shapes {shapes}; expected one shape (B, H, T, K).")
        length = state["0.k"].shape[2]
        cache = cls(depth, length)
        cache._buffers = [(state[f"{i}.k"].clone(), state[f"{i}.v"].clone()) for i in range(depth)]
        cache.length = length
        return cache

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows, in the given order."""
        self._buffers = [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self._buffers]


# -- the stack ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StackConfig(Config):
    """Sizes of a pre-norm transformer: heads of `head_dim`, an MLP of `mlp_ratio` x width."""

    width: Size
    depth: Depth
    head_dim: Size = 64
    mlp_ratio: Size = 4
    activation: Activation = "gelu"
    rope: bool = True  # three-axis rotary positions on queries and keys
    final_norm: bool = True  # RMS norm after the last layer
    causal: bool = True  # False: every position attends to every other (the FAE's decoders)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.head_dim:
            raise ConfigError(f"width is {self.width}; expected a multiple of head_dim {self.head_dim}.")
        if self.rope:
            _check_rotary(self.head_dim)

    @property
    def heads(self) -> int:
        return self.width // self.head_dim


class _Attention(nn.Module):
    def __init__(self, cfg: StackConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = cfg.heads, cfg.head_dim
        self.norm = nn.LayerNorm(cfg.width)
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, ctx: _StackContext, layer: int) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3 * self.heads, self.head_dim)
        q, k, v = heads_of(qkv, self.heads, ctx.rotation)  # 3 x (B, H, T, K)
        if ctx.cache is not None:
            k, v = ctx.cache.append(layer, k, v)
        out = attention(q, k, v, ctx.mask_for(q, k.shape[2]))  # (B, H, T, K)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class _SquaredRelu(torch.autograd.Function):
    """relu(x)^2 in two passes over memory each way instead of three and four (docs/LOG.md, "relu2")."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # create_graph: `positive` has no graph, second derivatives would be wrong
            raise NotImplementedError("relu2 can be differentiated only once; use activation gelu for more.")
        (positive,) = ctx.saved_tensors
        return torch.addcmul(positive.new_zeros(()), grad, positive, value=2)  # one pass


class _Mlp(nn.Module):
    def __init__(self, cfg: StackConfig) -> None:
        super().__init__()
        self.is_gelu = cfg.activation == "gelu"
        self.norm = nn.LayerNorm(cfg.width)
        self.up = nn.Linear(cfg.width, cfg.mlp_ratio * cfg.width)
        self.down = nn.Linear(cfg.mlp_ratio * cfg.width, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        h = F.gelu(h) if self.is_gelu else _SquaredRelu.apply(h)  # type: ignore[no-untyped-call]
        return self.down(h)


class _Layer(nn.Module):
    def __init__(self, cfg: StackConfig) -> None:
        super().__init__()
        self.attention, self.mlp = _Attention(cfg), _Mlp(cfg)

    def forward(self, x: Tensor, ctx: _StackContext, layer: int) -> Tensor:
        x = x + self.attention(x, ctx, layer)
        return x + self.mlp(x)


@dataclass(slots=True)
class _StackContext:
    rotation: Tensor | None  # (B, T, 1, K / 2) complex
    attend: Tensor | ByDocument | None
    cache: Cache | None
    _tiles: Sequence[Tile] | None = None

    def mask_for(self, q: Tensor, keys: int) -> Tensor | ByDocument | Sequence[Tile] | None:
        """The mask as `attention` of q takes it, made once for all layers."""
        if not is_tiled(q) or isinstance(self.attend, ByDocument):
            return self.attend
        if self._tiles is None:
            self._tiles = tiles_of(self.attend, q.shape, keys)
        return self._tiles


class CausalStack(nn.Module):
    """Transformer body, causal unless its config says otherwise: (B, T, C) -> (B, T, C).

    Runs one full pass or continues from a cache.
    """

    def __init__(self, cfg: StackConfig) -> None:
        super().__init__()
        self.cfg = of_kind(cfg, StackConfig, "cfg")
        self.layers = nn.ModuleList(_Layer(cfg) for _ in range(cfg.depth))
        self.final_norm = FinalNorm(cfg.width) if cfg.final_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        attend: Tensor | ByDocument | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x: (B, T, C); positions: (B, T, 3), needed with rope; returns (B, T, C).

        attend: (B, Tk) bool, False at padding, beside the causal mask, or (B, Tq, Tk) bool, the
        whole mask, or documents; None: no padding. Tk counts cached positions too.
        """
        past = 0 if cache is None else cache.length
        rotation = self._rotation(positions, x)
        mask = attention_mask(x, past, attend, self.cfg.causal)
        ctx = _StackContext(rotation, mask, cache)
        for i, layer in enumerate(self.layers):
            x = layer(x, ctx, i)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.final_norm(x)

    def _rotation(self, positions: Tensor | None, x: Tensor) -> Tensor | None:
        if not self.cfg.rope:
            return None
        if positions is None:
            raise ShapeError("positions is None; expected (B, T, 3) positions, because this stack has rope.")
        angles = axial_angles(positions, self.cfg.head_dim).unsqueeze(2)  # (B, T, 1, K / 2)
        dtype = at_least_fp32(x).dtype
        return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype))


@overload
def attention_mask(x: Tensor, past: int, attend: Tensor | None, is_causal: bool = True) -> Tensor | None: ...


@overload
def attention_mask(
    x: Tensor, past: int, attend: Tensor | ByDocument | None, is_causal: bool = True
) -> Tensor | ByDocument | None: ...


def attention_mask(
    x: Tensor, past: int, attend: Tensor | ByDocument | None, is_causal: bool = True
) -> Tensor | ByDocument | None:
    """Boolean mask (B or 1, 1, Tq, Tk) of new positions x (B, Tq, C) after `past` cached ones; None: all attend to all.

    attend: (B, Tk) bool, False at padding, or (B, Tq, Tk) bool, the whole mask. Documents are returned as they are.
    """
    if isinstance(attend, ByDocument):
        return attend
    length = x.shape[1]
    if attend is not None and attend.ndim == 3:
        return attend.unsqueeze(1)
    if attend is None and (length == 1 or not is_causal):
        return None
    mask = torch.ones(length, past + length, dtype=torch.bool, device=x.device)
    mask = (mask.tril(past) if is_causal else mask)[None, None]  # (1, 1, Tq, Tk)
    if attend is None:
        return mask
    own = torch.eye(length, dtype=torch.bool, device=x.device)
    own = F.pad(own, (past, 0))[None, None]  # a padded query attends to itself: no empty softmax
    return mask & (attend[:, None, None, :] | own)
