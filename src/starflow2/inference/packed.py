"""Weights of both streams laid out for step-by-step decoding: fused projections, and constants of a noise level.

What differs from the modules: q, k, v and gate, up are one matrix each; rows of the language model's q and k heads are
permuted so that rotated pairs are neighbours, as in the flow, and its query heads so that neighbours have different
keys, the order in which attention leaves them; whatever depends on the noise level alone is computed once. `unpackable`
says why a stream cannot be packed; the engine then reads through the stream itself.
Letters: E language width, H query heads, G key heads, K head dim, C flow width, D latent dim, N latents, M positions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.flow.block import AffineBlock, BlockConfig
from starflow2.models.joint_stream import JointStream
from starflow2.models.pretzel import Pretzel
from starflow2.models.qwen import QwenStream
from starflow2.nn import axial_angles

__all__ = [
    "BlockWeights",
    "FlowLayer",
    "LanguageLayer",
    "LevelWeights",
    "PackedWeights",
    "flow_layer",
    "key_by_key",
    "pack",
    "unpackable",
]


@dataclass(frozen=True, slots=True)
class LanguageLayer:
    """A layer of the language model. Matrices are (out, in); query heads stand in the order (H / G, G)."""

    norm_in: Tensor  # (E,), RMS norm, eps 1e-6
    qkv: Tensor  # ((H + 2 G) K, E), pairs that are rotated together are neighbours
    qkv_bias: Tensor
    out: Tensor  # (E, H K)
    norm_mlp: Tensor  # (E,)
    gate_up: Tensor  # (2 F, E)
    down: Tensor  # (E, F)


@dataclass(frozen=True, slots=True)
class FlowLayer:
    """A layer of a flow block. Matrices are (out, in); both norms are layer norms, eps 1e-5."""

    norm_in: Tensor  # (C,)
    norm_in_bias: Tensor
    qkv: Tensor  # (3 C, C)
    qkv_bias: Tensor
    out: Tensor  # (C, C)
    out_bias: Tensor
    norm_mlp: Tensor
    norm_mlp_bias: Tensor
    up: Tensor  # (4 C, C)
    up_bias: Tensor
    down: Tensor  # (C, 4 C)
    down_bias: Tensor


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """An affine block: input projection, layers, final RMS norm (eps 1e-6, gain as it is applied) and head."""

    cfg: BlockConfig
    proj_in: Tensor  # (C, D), with a stencil (C, 4 D)
    proj_in_bias: Tensor
    layers: tuple[FlowLayer, ...]
    final_norm: Tensor  # (C,)
    head: Tensor  # (2 D, C), log scale first
    head_bias: Tensor
    table: Tensor  # (N, C) learned positions; zero where the block has none
    start: Tensor | None  # (C,) the embedded start token of a block without context


@dataclass(frozen=True, slots=True)
class LevelWeights:
    """Weights and sums that depend on the noise level alone."""

    adapter_norm: Tensor  # (E,) gain and FiLM of the adapter as the weight of its norm
    adapter_norm_bias: Tensor  # (E,)
    deep_noise: Tensor  # (C,)
    deep_slots: Tensor  # (N, C) in `exact`: added at the slot of each latent, beside a reference and its projection
    shallow_slots: tuple[Tensor, ...]  # (N, C) per block: added at the slot of each target, row 0 the whole start slot


class PackedWeights:
    """Both streams' weights for decoding; they do not change when the modules do. Made by `pack`."""

    language: tuple[LanguageLayer, ...]
    embed: Tensor  # (V, E)
    lm_head: Tensor  # (V, E)
    language_norm: Tensor  # (E,)
    deep: BlockWeights
    shallow: tuple[BlockWeights, ...]  # in data order
    context_in: Tensor  # (C, E), with `words` (C, 2 E)
    context_in_bias: Tensor
    visual_skip: Tensor | None  # (C, E); None where it is closed
    text_skip: Tensor | None  # (E, C)
    adapter_in: Tensor  # (A, D), with a stencil (A, 5 D)
    adapter_in_bias: Tensor
    adapter_out: Tensor  # (E, A)
    adapter_out_bias: Tensor
    reference: Tensor | None  # (C, side^2 D)
    near: Tensor  # (N + 1, 5) each latent, then those left, above-left, above and above-right; N where there is none

    def __init__(self, stream: Pretzel, dtype: torch.dtype | None) -> None:
        """dtype: of all weights; None: as they are stored."""
        self.stream, self.dtype = stream, dtype or stream.flow.deep.head.weight.dtype
        self.cfg = stream.joints.cfg
        self.language_cfg = cast(QwenStream, stream.vlm).cfg
        self._levels: dict[float, LevelWeights] = {}
        with torch.no_grad():
            self._pack_language(cast(QwenStream, stream.vlm), dtype)
            self._pack_flow(dtype)
            self._pack_joints(dtype)
        self.near = _near(stream.flow.deep)
        pairs = self.language_cfg.width // self.language_cfg.heads // 2
        power = torch.arange(0, 2 * pairs, 2).float() / (2 * pairs)
        self._freqs = (1.0 / self.language_cfg.rope_theta**power).to(self.near.device)
        axes = [axis for axis, count in enumerate(self.language_cfg.mrope_section) for _ in range(count)]
        self._axis = torch.tensor(axes, device=self.near.device)  # of each pair

    def _pack_language(self, vlm: QwenStream, dtype: torch.dtype | None) -> None:
        weights = {name: _as(x, dtype) for name, x in vlm.language_weights().items()}
        self.embed, self.lm_head = weights["embed_tokens.weight"], weights["lm_head.weight"]
        self.language_norm = weights["norm.weight"]
        dim = vlm.cfg.width // vlm.cfg.heads
        order = torch.arange(dim).view(2, -1).T.flatten().to(self.embed.device)  # halves to neighbours

        def paired(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, dim))[:, order].flatten(0, 1)

        def across_keys(x: Tensor) -> Tensor:
            return x.unflatten(0, (vlm.cfg.kv_heads, -1, dim)).transpose(0, 1).flatten(0, 2)

        def layer(prefix: str) -> LanguageLayer:
            def fused(kind: str) -> Tensor:
                q, k, v = (weights[f"{prefix}.self_attn.{name}_proj.{kind}"] for name in "qkv")
                return torch.cat([across_keys(paired(q)), paired(k), v])

            gate_up = torch.cat([weights[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
            return LanguageLayer(
                weights[f"{prefix}.input_layernorm.weight"],
                fused("weight"),
                fused("bias"),
                across_keys(weights[f"{prefix}.self_attn.o_proj.weight"].T).T.contiguous(),
                weights[f"{prefix}.post_attention_layernorm.weight"],
                gate_up,
                weights[f"{prefix}.mlp.down_proj.weight"],
            )

        self.language = tuple(layer(f"layers.{i}") for i in range(vlm.cfg.depth))

    def _pack_flow(self, dtype: torch.dtype | None) -> None:
        flow = self.stream.flow
        self.deep = _block(flow.deep, dtype, starts=False)
        self.shallow = tuple(_block(cast(AffineBlock, b), dtype, starts=True) for b in flow.shallow.blocks)
        self.context_in = _as(flow.deep.context_in.weight, dtype)
        self.context_in_bias = _as(flow.deep.context_in.bias, dtype)

    def _pack_joints(self, dtype: torch.dtype | None) -> None:
        joints, skips = self.stream.joints, self.stream.skips
        self.visual_skip = _as(joints.visual_skip.weight, dtype) if "visual" in skips else None
        self.text_skip = _as(joints.text_skip.weight, dtype) if "text" in skips else None
        into, out = (cast(nn.Linear, joints.adapter.mlp[i]) for i in (0, 2))
        self.adapter_in, self.adapter_in_bias = _as(into.weight, dtype), _as(into.bias, dtype)
        self.adapter_out, self.adapter_out_bias = _as(out.weight, dtype), _as(out.bias, dtype)
        self.reference = _as(joints.reference.weight, dtype) if self.cfg.reference else None

    # -- what a noise level and a position give

    @property
    def exact(self) -> torch.dtype:
        """Dtype of sums that are made once an image; devices other than the CPU may have no float64."""
        return torch.float64 if self.near.device.type == "cpu" else self.dtype

    def at(self, level: float) -> LevelWeights:
        """The constants of one noise level, computed at the first call."""
        if level not in self._levels:
            self._levels[level] = self._level(level)
        return self._levels[level]

    @torch.no_grad()
    def _level(self, level: float) -> LevelWeights:
        """Computed in float64 and rounded once: what is wrong here is wrong at every latent."""

        device = torch.device("cpu") if self.near.device.type == "mps" else self.near.device  # which has no float64

        def exact(x: Any) -> Any:
            return x.to(device, torch.float64)

        def embedded(module: Any) -> Tensor:
            out: Tensor = exact(copy.deepcopy(module))(torch.tensor([level], dtype=torch.float64, device=device))[0]
            return out

        def rounded(x: Tensor) -> Tensor:
            return x.to(self.near.device, self.dtype)

        adapter, flow = self.stream.joints.adapter, self.stream.flow
        to_film = exact(copy.deepcopy(adapter.film.to_film))
        gamma, beta = to_film(F.silu(embedded(adapter.noise_embedding))).chunk(2, dim=-1)
        gain = exact(adapter.gain)
        slots = []
        for weights, block in zip(self.shallow, flow.shallow.blocks, strict=True):
            assert weights.start is not None
            start, table, bias = (exact(x) for x in (weights.start, weights.table, weights.proj_in_bias))
            noise = embedded(cast(AffineBlock, block).noise_embedding)
            slots.append(rounded(torch.cat([start[None], table[1:] + bias]) + noise))
        deep = rounded(embedded(flow.deep.noise_embedding))
        table, bias, noise = (x.to(self.exact) for x in (self.deep.table, self.deep.proj_in_bias, deep))
        return LevelWeights(rounded(gain * (1 + gamma)), rounded(gain * beta), deep, table + bias + noise, tuple(slots))

    def language_rotation(self, mrope: Tensor) -> Tensor:
        """cos + i sin of the language model's M-RoPE: positions (3, M) -> (M, K / 2) complex; angles are float32."""
        angles = mrope.float().T[:, self._axis] * self._freqs
        return self._rotation(angles)

    def flow_rotation(self, places: Tensor) -> Tensor:
        """cos + i sin of the deep block's three axes: places (M, 3) -> (M, K / 2) complex; angles are float32."""
        return self._rotation(axial_angles(places.float()[None], self.deep.cfg.stack.head_dim)[0])

    def shallow_rotation(self, index: int) -> Tensor:
        """cos + i sin at every target of a shallow block, (N, K / 2) complex."""
        cfg = self.shallow[index].cfg
        target = torch.arange(cfg.num_latents, device=self.near.device)
        places = torch.stack([target // cfg.grid[1], target % cfg.grid[1], torch.zeros_like(target)], dim=-1)
        return self._rotation(axial_angles(places.float()[None], cfg.stack.head_dim)[0])

    def _rotation(self, angles: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype))


def unpackable(stream: JointStream) -> str | None:
    """Why a stream cannot be packed, None if it can."""
    if type(stream) is not Pretzel:
        return f"{type(stream).__name__} is not a Pretzel"
    if type(stream.vlm) is not QwenStream:
        return f"its language model is a {type(stream.vlm).__name__}, not a QwenStream"
    if stream.trace is not None:
        return "its skips are traced"
    deep, shallow = stream.flow.deep.cfg, [cast(AffineBlock, b).cfg for b in stream.flow.shallow.blocks]
    if deep.start == "always" or deep.direction != "l2r" or any(b.start == "none" for b in shallow):
        return "a block begins with another start token"
    if any(b.grid != deep.grid or b.dim != deep.dim for b in shallow):
        return "its blocks have unequal grids"
    if any(not (b.stack.rope and b.stack.final_norm and b.stack.causal and b.noise) for b in (deep, *shallow)):
        return "a block lacks rotary positions, a final norm, a causal mask or noise levels"
    return None


def pack(stream: JointStream, dtype: torch.dtype | None = None) -> PackedWeights:
    """Copies of a stream's weights for decoding; dtype: None keeps that of each. See `unpackable`."""
    reason = unpackable(stream)
    assert reason is None and isinstance(stream, Pretzel), reason
    return PackedWeights(stream, dtype)


def key_by_key(queries: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Rows (H K, ...) of packed query heads in the model's own order, where those of a key stand side by side."""
    return queries.unflatten(0, (-1, kv_heads, head_dim)).transpose(0, 1).flatten(0, 2)


def _as(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy that shares nothing with the module."""
    return x.detach().to(dtype or x.dtype, copy=True).contiguous()


def _block(block: AffineBlock, dtype: torch.dtype | None, *, starts: bool) -> BlockWeights:
    cfg, weight = block.cfg, _as(block.proj_in.weight, dtype)
    table = block.position_table if cfg.learned_positions else weight.new_zeros(cfg.num_latents, cfg.stack.width)
    start = None
    if starts:
        start = weight[:, : cfg.dim] @ _as(block.start.flatten(), dtype) + _as(block.proj_in.bias, dtype)
    return BlockWeights(
        cfg=cfg,
        proj_in=weight,
        proj_in_bias=_as(block.proj_in.bias, dtype),
        layers=tuple(flow_layer(layer, dtype) for layer in block.body.layers),
        final_norm=1 + _as(cast(Any, block.body.final_norm).weight, dtype),
        head=_as(block.head.weight, dtype),
        head_bias=_as(block.head.bias, dtype),
        table=_as(table, dtype),
        start=start,
    )


def flow_layer(layer: Any, dtype: torch.dtype | None) -> FlowLayer:
    """Copies of the weights of a layer of `CausalStack`; dtype: None keeps that of each."""
    attention, mlp = layer.attention, layer.mlp
    modules = (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.up, mlp.down)
    return FlowLayer(*(_as(x, dtype) for module in modules for x in (module.weight, module.bias)))


def _near(deep: AffineBlock) -> Tensor:
    count, columns = deep.cfg.num_latents, deep.cfg.grid[1]
    index = torch.arange(count + 1, device=deep.above.device)
    left = torch.where((index % columns > 0) & (index < count), index - 1, count)
    return torch.cat([index[:, None], left[:, None], deep.above], dim=1)
