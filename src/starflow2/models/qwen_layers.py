"""Qwen2.5-VL in plain torch: the language model and its vision tower, with weights under transformers' names.

Reading and training nano takes neither transformers nor the seconds of its import, and norms, rotations and attention
take fewer passes over memory. `tests/models/test_backbones.py` compares every number with transformers' own classes.
Not here: files (`own_backbone`), sizes (`config`), the interface to the rest (`qwen`).
Letters: B rows, T positions, E language width, H query heads, G key heads, K head dim; P images, M patches, W width of
the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.core.tiles import Tile, computes_in_tiles, tiles_of
from starflow2.models.config import LanguageConfig
from starflow2.nn import ByDocument, Cache, RmsNorm, attention, heads_of, rotate_halves

__all__ = ["EPS", "FRAMES", "MERGED", "LanguageModel", "QwenModel", "Tower"]

EPS = 1e-6  # of all norms
TOWER_BASE = 10000.0  # of the tower's rotations
MERGED = 2  # patches on a side of a merged token
FRAMES = 2  # an image is read as two equal frames of a film


def _frequencies(base: float, pairs: int, device: torch.device) -> Tensor:
    """Rotation frequencies (pairs,), float32."""
    return 1.0 / base ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float32, device=device) / (2 * pairs))


# -- the language model -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pass:
    """Inputs that all layers share: cos + i sin (B, T, 1, K / 2), the mask, the cache."""

    turns: Tensor
    attend: Tensor | ByDocument | Sequence[Tile] | None
    cache: Cache | None


class _LanguageAttention(nn.Module):
    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.dim = cfg.head_width
        self.q_proj = nn.Linear(cfg.width, cfg.heads * self.dim)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * self.dim)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * self.dim)
        self.o_proj = nn.Linear(cfg.heads * self.dim, cfg.width, bias=False)

    def forward(self, x: Tensor, shared: _Pass, layer: int) -> Tensor:
        q, k, v = self._fused(x, shared.turns) if computes_in_tiles(x) else self._apart(x, shared.turns)
        if shared.cache is not None:
            k, v = shared.cache.append(layer, k, v)
        return self.o_proj(attention(q, k, v, shared.attend).transpose(1, 2).flatten(2))

    def _apart(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, K), k and v (B, G, T, K) by three products."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate_halves(q, turns), rotate_halves(k, turns)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _fused(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Equal scores by one product and a faster rotation: channels that are rotated together are neighbours."""
        parts = self.q_proj, self.k_proj, self.v_proj
        (q, k, v), (q_bias, k_bias, v_bias) = (p.weight for p in parts), (p.bias for p in parts)
        weight = torch.cat([_neighbours(q, self.dim), _neighbours(k, self.dim), v])
        bias = torch.cat([_neighbours(q_bias, self.dim), _neighbours(k_bias, self.dim), v_bias])
        qkv = F.linear(x, weight, bias).unflatten(-1, (-1, self.dim))
        return heads_of(qkv, len(q) // self.dim, turns)


def _neighbours(rows: Tensor, dim: int) -> Tensor:
    """Rows (H * dim, ...) of a projection in an order in which channels i and i + dim / 2 are neighbours."""
    return rows.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


class _GatedMlp(nn.Module):
    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _LanguageLayer(nn.Module):
    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.self_attn = _LanguageAttention(cfg)
        self.mlp = _GatedMlp(cfg.width, cfg.mlp_width)
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(cfg.width, EPS), RmsNorm(cfg.width, EPS)

    def forward(self, x: Tensor, shared: _Pass, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), shared, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Embeddings, layers and last norm of Qwen2.5-VL's language model."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.width, cfg.special.pad)
        self.layers = nn.ModuleList(_LanguageLayer(cfg) for _ in range(cfg.depth))
        self.norm = RmsNorm(cfg.width, EPS)

    def forward(self, x: Tensor, positions: Tensor, attend: Tensor | ByDocument | None, cache: Cache | None) -> Tensor:
        """x: (B, T, E), positions: (3, B, T), attend: as `attention` takes it -> states after the last norm (B, T, E).

        New positions are appended to the cache, whose length is left to the caller.
        """
        shared = _Pass(self.turns(positions), self._mask(x, attend, cache), cache)
        for i, layer in enumerate(self.layers):
            x = layer(x, shared, i)
        out: Tensor = self.norm(x)
        return out

    def _mask(
        self, x: Tensor, attend: Tensor | ByDocument | None, cache: Cache | None
    ) -> Tensor | ByDocument | Sequence[Tile] | None:
        if isinstance(attend, ByDocument) or not computes_in_tiles(x):
            return attend
        batch, length, _ = x.shape
        keys = length + (0 if cache is None else cache.length)
        return tiles_of(attend, (batch, self.cfg.heads, length, self.cfg.head_width), keys)

    def turns(self, positions: Tensor) -> Tensor:
        """cos + i sin of M-RoPE, (B, T, 1, K / 2) in float32; each section of pairs follows one axis."""
        sections = torch.tensor(self.cfg.mrope_section, device=positions.device)
        pairs = torch.arange(3, device=positions.device)
        axis = pairs.repeat_interleave(sections, output_size=sum(self.cfg.mrope_section))  # of each pair
        freqs = _frequencies(self.cfg.rope_theta, len(axis), positions.device)
        angles = (positions.float()[axis].movedim(0, -1) * freqs).unsqueeze(2)  # (B, T, 1, K / 2)
        return torch.complex(angles.cos(), angles.sin())


# -- the vision tower -------------------------------------------------------------------------------------


class _PatchEmbedding(nn.Module):
    """The linear map of a patch, stored as the film convolution that it is in upstream files."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        size = (FRAMES, cfg.vision_patch, cfg.vision_patch)
        self.proj = nn.Conv3d(3, cfg.vision_width, size, stride=size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, M, 3 * FRAMES * patch^2) -> (P, M, W)."""
        return F.linear(patches, self.proj.weight.flatten(1))


class _TowerAttention(nn.Module):
    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.heads = cfg.vision_heads
        self.qkv = nn.Linear(cfg.vision_width, 3 * cfg.vision_width)
        self.proj = nn.Linear(cfg.vision_width, cfg.vision_width)

    def forward(self, x: Tensor, turns: Tensor, attend: Tensor | None) -> Tensor:
        q, k, v = self._fused(x, turns) if computes_in_tiles(x) else self._apart(x, turns)  # (P, H, M, K)
        return self.proj(attention(q, k, v, attend).transpose(1, 2).flatten(2))

    def _apart(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (P, M, 3, H, K)
        q, k = rotate_halves(qkv[:, :, :2].flatten(2, 3), turns).chunk(2, dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    def _fused(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Equal scores by a faster rotation, as in the language model."""
        width, dim = x.shape[-1], x.shape[-1] // self.heads
        weight, bias = (
            torch.cat([_neighbours(rows[: 2 * width], dim), rows[2 * width :]])
            for rows in (self.qkv.weight, self.qkv.bias)
        )
        return heads_of(F.linear(x, weight, bias).unflatten(-1, (-1, dim)), self.heads, turns)


class _TowerLayer(nn.Module):
    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(cfg.vision_width, EPS), RmsNorm(cfg.vision_width, EPS)
        self.attn = _TowerAttention(cfg)
        self.mlp = _GatedMlp(cfg.vision_width, cfg.vision_mlp_width, bias=True)

    def forward(self, x: Tensor, turns: Tensor, attend: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), turns, attend)
        return x + self.mlp(self.norm2(x))


class _Merger(nn.Module):
    """Four neighbouring patches to one token of the language model's width."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        hidden = MERGED**2 * cfg.vision_width
        self.ln_q = RmsNorm(cfg.vision_width, EPS)
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, cfg.width))

    def forward(self, x: Tensor) -> Tensor:
        """(P, M, W) -> (P, M / 4, E)."""
        return self.mlp(self.ln_q(x).unflatten(1, (-1, MERGED**2)).flatten(2))


class Tower(nn.Module):
    """The vision transformer of Qwen2.5-VL, for images of one shape at a time."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch_embed = _PatchEmbedding(cfg)
        self.blocks = nn.ModuleList(_TowerLayer(cfg) for _ in range(cfg.vision_depth))
        self.merger = _Merger(cfg)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches: (P, M, 3 * 2 * patch^2), the four of a merged token in a row -> tokens (P, M / 4, E).

        grid: rows and columns of patches, both even.
        """
        places = _places(grid, patches.device)
        turns, window = self._turns(places), self._window(places)
        x = self.patch_embed(patches)
        for i, block in enumerate(self.blocks):
            x = block(x, turns, None if self._sees_all(i) else window)
        out: Tensor = self.merger(x)
        return out

    def _sees_all(self, layer: int) -> bool:
        return not self.cfg.vision_whole or layer in self.cfg.vision_whole

    def _turns(self, places: Tensor) -> Tensor:
        """cos + i sin, (1, M, 1, K / 2) in float32; the first half of the pairs follows rows."""
        pairs = self.cfg.vision_width // self.cfg.vision_heads // 4
        freqs = _frequencies(TOWER_BASE, pairs, places.device)
        angles = (places.float()[..., None] * freqs).flatten(1)[None, :, None]
        return torch.complex(angles.cos(), angles.sin())

    def _window(self, places: Tensor) -> Tensor:
        """(1, 1, M, M) bool: patches of the same window, for layers that do not see the whole image."""
        side = MERGED * ((self.cfg.vision_window or self.cfg.image_size) // (MERGED * self.cfg.vision_patch))
        window = places // side
        return (window[:, None] == window).all(-1)[None, None]


def _places(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of every patch, merged tokens in reading order: (M, 2)."""
    rows, columns = grid
    index = torch.arange(rows * columns, device=device).view(rows, columns)
    index = index.unflatten(0, (-1, MERGED)).unflatten(2, (-1, MERGED)).transpose(1, 2).flatten()
    return torch.stack([index // columns, index % columns], dim=-1)


# -- both -------------------------------------------------------------------------------------------------


class _Body(nn.Module):
    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.visual = Tower(cfg)
        self.language_model = LanguageModel(cfg)


class QwenModel(nn.Module):
    """Tower, language model and head; names of weights are those of transformers' Qwen2_5_VLForConditionalGeneration.

    Fresh weights are drawn as there: N(0, 0.02), biases and the padding token's embedding 0, norms 1.
    """

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.ties_embeddings = cfg.ties_embeddings
        self.model = _Body(cfg)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)
        self.apply(_initialize)
        self.tie()

    def tie(self) -> None:
        """Let the head be the embeddings again, where the config says so."""
        if self.ties_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv3d | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()
