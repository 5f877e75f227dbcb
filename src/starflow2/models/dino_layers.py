"""DINOv2 in plain torch, with weights under the names that its files give them.

`tests/models/test_backbones.py` compares its features with transformers' own. Not here: files (`own_backbone`), sizes
and colours of images (`vision`).
Letters: B images, N patches, M = N + 1 with the class token, F width, H heads, K head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.models.config import DinoConfig
from starflow2.nn import attention

__all__ = ["EPS", "MLP_RATIO", "DinoModel"]

EPS = 1e-6  # of layer norms
MLP_RATIO = 4


class _Projections(nn.Module):
    """Queries, keys and values, each a matrix of its own in the files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, heads: int) -> Tensor:
        """(B, M, F) -> what is attended to (B, M, F)."""
        q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return attention(q, k, v, None).transpose(1, 2).flatten(2)


class _Output(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)


class _Attention(nn.Module):
    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.attention, self.output = _Projections(cfg.width), _Output(cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output.dense(self.attention(x, self.heads))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _GatedMlp(nn.Module):
    """SwiGLU of two thirds of the usual width, rounded up to a multiple of 8 (DINOv2-g)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-int(MLP_RATIO * width * 2 / 3) // 8) * 8
        self.weights_in, self.weights_out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(F.silu(gate) * up)


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class _Layer(nn.Module):
    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(cfg.width, EPS), _Attention(cfg)
        self.layer_scale1 = _LayerScale(cfg.width)
        self.norm2 = nn.LayerNorm(cfg.width, EPS)
        self.mlp = _GatedMlp(cfg.width) if cfg.swiglu else _Mlp(cfg.width)
        self.layer_scale2 = _LayerScale(cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class _Patches(nn.Module):
    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, cfg.width, cfg.patch_size, cfg.patch_size)


class _Embeddings(nn.Module):
    """Patches, class token and positions, whose table may be that of another image size."""

    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.side = (cfg.table_size or cfg.image_size) // cfg.patch_size  # of the table
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.width))
        self.patch_embeddings = _Patches(cfg)
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.side**2 + 1, cfg.width))

    def forward(self, images: Tensor, masked: Tensor | None) -> Tensor:
        """(B, 3, height, width) -> (B, M, F). masked: (B, N) bool."""
        grid: Tensor = self.patch_embeddings.projection(images)
        x = grid.flatten(2).transpose(1, 2)  # (B, N, F)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return x + self._positions(grid.shape[2], grid.shape[3])

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The table (1, M, F), interpolated in float32 to another number of patches."""
        table = self.position_embeddings
        if rows == columns == self.side:
            return table
        patches = table[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches.float(), (rows, columns), mode="bicubic", align_corners=False).to(table.dtype)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


class _Encoder(nn.Module):
    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(cfg) for _ in range(cfg.depth))


class DinoModel(nn.Module):
    """Class token and patches after the last norm: (B, 3, height, width) -> (B, M, F).

    Fresh weights as in DINOv2: N(0, 0.02) cut at two units, biases and the mask token 0, norms and layer scales 1.
    """

    def __init__(self, cfg: DinoConfig) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(cfg), _Encoder(cfg)
        self.layernorm = nn.LayerNorm(cfg.width, EPS)
        self.apply(_initialize)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """masked: (B, N) bool, patches to replace by the mask token."""
        x = self.embeddings(images, masked)
        for layer in self.encoder.layer:
            x = layer(x)
        out: Tensor = self.layernorm(x)
        return out


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, _Embeddings):
        nn.init.trunc_normal_(module.position_embeddings, std=0.02)
        nn.init.trunc_normal_(module.cls_token, std=0.02)
