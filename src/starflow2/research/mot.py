"""A mixture of transformers as the baseline of section 5.3 (BAGEL's design), with the Pretzel's interface.

One stream instead of two: every layer of the language model has a second set of weights, the visual experts, for the
slots of images. Each slot goes through the experts of its kind, and slots of both kinds meet in attention only. Text
experts start as the language model itself and are frozen or finetuned; visual experts, flow head and shallow blocks are
new. A begin slot is visual, although it holds a token: it predicts the first latent's Gaussian and carries the noise
level, neither of which frozen text experts can handle. An end slot is text: it predicts tokens.
Letters: B rows, T positions, M slots of one kind, P images, E width, H heads, G key heads, K head dim, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.errors import ConfigError
from starflow2.flow import Flow, FlowConfig
from starflow2.models.components import Components
from starflow2.models.config import JointsConfig, LanguageConfig
from starflow2.models.joint_stream import LatentInputs, PretzelCache, Skip, Slots, States, Trace
from starflow2.models.pretzel import reference_projection
from starflow2.nn import ByDocument, Cache, StackConfig, at_least_fp32, attention, attention_mask, check, num_parameters

__all__ = [
    "Experts",
    "Mot",
    "MotComponents",
    "MotJoints",
    "TextExperts",
    "Trains",
    "VisualExperts",
    "matched_width",
]

Trains = Literal["frozen", "finetuned"]  # whether the text experts train


# -- experts ------------------------------------------------------------------------------------------------


class _RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class _Attention(nn.Module):
    """The projections around attention, which itself is shared by both experts."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        head_dim = cfg.width // cfg.heads
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * head_dim)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * head_dim)
        self.o_proj = nn.Linear(cfg.width, cfg.width, bias=False)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Expert(nn.Module):
    """One layer's weights for one kind of slot; names as in Qwen2.5, so that its weights load by name."""

    def __init__(self, cfg: LanguageConfig, mlp_width: int) -> None:
        super().__init__()
        self.input_layernorm = _RmsNorm(cfg.width)
        self.self_attn = _Attention(cfg)
        self.post_attention_layernorm = _RmsNorm(cfg.width)
        self.mlp = _Mlp(cfg.width, mlp_width)

    def qkv(self, x: Tensor) -> Tensor:
        """(M, E) -> (M, (H + 2 G) K)."""
        x = self.input_layernorm(x)
        return torch.cat([self.self_attn.q_proj(x), self.self_attn.k_proj(x), self.self_attn.v_proj(x)], dim=-1)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output of the layer for x (M, E) and the result of attention (M, E): (M, E)."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextExperts(nn.Module):
    """The language model's own weights, under its own names."""

    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.layers = nn.ModuleList(_Expert(cfg, cfg.mlp_width) for _ in range(cfg.depth))
        self.norm = _RmsNorm(cfg.width)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)
        if cfg.ties_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def experts(self) -> list[_Expert]:
        """Layers by their type, which a ModuleList does not tell."""
        return cast(list[_Expert], list(self.layers))


class VisualExperts(nn.Module):
    """The second set of weights of every layer."""

    def __init__(self, cfg: LanguageConfig, mlp_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Expert(cfg, mlp_width) for _ in range(cfg.depth))

    @property
    def experts(self) -> list[_Expert]:
        """Layers by their type, which a ModuleList does not tell."""
        return cast(list[_Expert], list(self.layers))


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Indices of text and of visual slots among B x T."""

    text: Tensor  # (M,) indices into the flattened B * T slots
    visual: Tensor  # (M',)
    back: Tensor  # (B * T,) index of each slot in text and visual concatenated
    shape: torch.Size

    @classmethod
    def of(cls, is_visual: Tensor) -> _Kinds:
        flat = is_visual.flatten()
        text, visual = (~flat).nonzero()[:, 0], flat.nonzero()[:, 0]
        return cls(text, visual, torch.cat([text, visual]).argsort(), is_visual.shape)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) -> (M, F), (M', F)."""
        flat = x.flatten(0, 1)
        return flat[self.text], flat[self.visual]

    def together(self, text: Tensor, visual: Tensor) -> Tensor:
        """(M, F), (M', F) -> (B, T, F)."""
        return torch.cat([text, visual])[self.back].unflatten(0, self.shape)


class Experts(nn.Module):
    """A language model with visual experts; a `LanguageStream` if all slots are text."""

    def __init__(self, cfg: LanguageConfig, visual_mlp_width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.text = TextExperts(cfg)
        self.visual = VisualExperts(cfg, visual_mlp_width)

    @property
    def width(self) -> int:
        return self.cfg.width

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, E)."""
        return self.text.embed_tokens(ids)

    def new_cache(self) -> Cache:
        return Cache(self.cfg.depth)

    def logits(self, h: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""
        return self.text.lm_head(h)

    def states(
        self, embeds: Tensor, positions: Tensor, cache: Cache | None = None, attend: Tensor | ByDocument | None = None
    ) -> Tensor:
        """Last hidden states (B, T, E) of text; arguments as in `LanguageStream`."""
        is_visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return self.mixed(embeds, positions, is_visual, cache, attend)

    def mixed(
        self,
        x: Tensor,
        positions: Tensor,
        is_visual: Tensor,
        cache: Cache | None = None,
        attend: Tensor | ByDocument | None = None,
    ) -> Tensor:
        """Each slot of x (B, T, E) through the experts of its kind -> (B, T, E); text slots get the model's last norm.

        is_visual: (B, T) bool; the rest as in `LanguageStream`.
        """
        check(positions, "A B T", "positions", A=3)
        kinds = _Kinds.of(is_visual)
        rotation = _rotation(positions, self.cfg, at_least_fp32(x).dtype)
        mask = attention_mask(x, 0 if cache is None else cache.length, attend)
        text, visual = kinds.apart(x)
        for i, (for_words, for_images) in enumerate(zip(self.text.experts, self.visual.experts, strict=True)):
            qkv = kinds.together(for_words.qkv(text), for_images.qkv(visual))
            q, k, v = self._heads(qkv, rotation)
            if cache is not None:
                k, v = cache.append(i, k, v)
            groups = self.cfg.heads // self.cfg.kv_heads
            out = attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), mask)  # (B, H, T, K)
            text_out, visual_out = kinds.apart(out.transpose(1, 2).flatten(2))
            text, visual = for_words(text, text_out), for_images(visual, visual_out)
        if cache is not None:
            cache.advance(x.shape[1])
        return kinds.together(self.text.norm(text), visual)

    def _heads(self, qkv: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, (H + 2 G) K) -> q (B, H, T, K), k and v (B, G, T, K), the first two rotated."""
        cfg = self.cfg
        heads = qkv.unflatten(-1, (cfg.heads + 2 * cfg.kv_heads, -1)).transpose(1, 2)
        q, k, v = heads.split((cfg.heads, cfg.kv_heads, cfg.kv_heads), dim=1)
        return _rotated(q, rotation), _rotated(k, rotation), v


def _rotation(positions: Tensor, cfg: LanguageConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of M-RoPE: positions (3, B, T) -> 2 x (B, 1, T, K / 2); each section has one axis."""
    pairs = cfg.width // cfg.heads // 2
    freqs = cfg.rope_theta ** -(torch.arange(pairs, dtype=dtype, device=positions.device) / pairs)
    axis = torch.arange(3, device=positions.device).repeat_interleave(torch.tensor(cfg.mrope_section).to(positions))
    angles = positions.to(dtype)[axis].movedim(0, -1) * freqs  # (B, T, K / 2)
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x: (B, H, T, K), its first half rotated against its second (Qwen's layout of pairs)."""
    cos, sin = (r.to(x.dtype) for r in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# -- the baseline -----------------------------------------------------------------------------------------------


class MotJoints(nn.Module):
    """The projection of the previous image; with one stream there are no adapter and no skips."""

    def __init__(self, cfg: JointsConfig, dim: int, width: int) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.reference:
            self.reference = reference_projection(cfg, dim, width)


@dataclass(frozen=True)
class Mot:
    """The baseline as a `JointStream`; owns no weights. With one stream C = E, and there are no skips.

    `flow` has the shallow blocks and a deep block without layers: embeddings, final norm and head.
    """

    vlm: Experts
    flow: Flow
    joints: MotJoints
    skips: frozenset[Skip] = frozenset()

    def with_skips(self, skips: Collection[Skip]) -> Self:
        """This stream unchanged: it has no skips."""
        return self

    def traced(self, trace: Trace) -> Self:
        """This stream unchanged: it has no skips to trace."""
        return self

    def in_one_pass(self) -> Self:
        """This stream unchanged: it always reads in one pass."""
        return self

    def in_float64(self) -> Self:
        """A twin over copies of the weights in double precision."""
        twin = copy.deepcopy(self)
        for module in (twin.vlm, twin.flow, twin.joints):
            module.double()
        return twin

    def new_cache(self) -> PretzelCache:
        return PretzelCache(self.vlm.new_cache(), Cache(self.flow.deep.cfg.stack.depth))

    @property
    def inputs(self) -> LatentInputs:
        """Embeds latents for the flow."""
        side = self.joints.cfg.reference
        return LatentInputs(self.flow, side, self.joints.reference if side else None)

    def read(self, slots: Slots, cache: PretzelCache | None = None) -> States:
        """States at new positions, after those in `cache`: h for tokens, and g = h after the flow's final norm."""
        x = self.vlm.embed(slots.ids)
        is_visual = torch.zeros_like(slots.ids, dtype=torch.bool)
        if slots.begin is not None:
            row, position, added = slots.begin
            x = x.index_put((row, position), added.to(x.dtype), accumulate=True)
            is_visual[row, position] = True
        if slots.latent is not None:
            row, position = slots.latent.row, slots.latent.position
            x = x.index_put((row, position), slots.latent.base.to(x.dtype))
            is_visual[row, position] = True
        vlm, flow = (None, None) if cache is None else (cache.vlm, cache.flow)
        h = self.vlm.mixed(x, slots.mrope, is_visual, vlm, slots.attend)
        return States(h, self.flow.deep.body(h, None, slots.attend, flow))

    def logits(self, h: Tensor, g: Tensor) -> Tensor:
        """Next-token logits of text positions: h (..., E) -> (..., V); g is not read."""
        return self.vlm.logits(h)

    def adapted(self, u: Tensor, noise_level: Tensor) -> Tensor:
        """Whole images as inputs of the stream: u (P, N, D), noise_level (P,) -> (P, N, E)."""
        targets = torch.arange(1, u.shape[1] + 1, device=u.device).expand(len(u), -1)
        return self.inputs.base(F.pad(u, (0, 0, 0, 1)), targets, noise_level, None, None)

    def latents(
        self,
        buffer: Tensor,
        targets: Tensor,
        noise_level: Tensor,
        reference: Tensor | None,
        has_reference: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Latents before `targets` as inputs (P, n, E), returned twice: language model and flow are one stream."""
        base = self.inputs.base(buffer, targets, noise_level, reference, has_reference)
        return base, base


# -- components of the baseline ---------------------------------------------------------------------------------


def matched_width(components: Components) -> int:
    """The MLP width of visual experts for which the baseline adds as many parameters as flow and joints have.

    Raises ConfigError if width 1 already adds more.
    """

    def new_parameters(width: int) -> int:
        with torch.device("meta"):
            return num_parameters(VisualExperts(components.cfg.vlm, width), *_around(components))

    wanted = num_parameters(components.flow, components.joints)
    one, two = new_parameters(1), new_parameters(2)  # the count is linear in the width
    width = 1 + round((wanted - one) / (two - one))
    if width < 1:
        raise ConfigError(f"flow and joints have {wanted} parameters; expected at least {one}, the smallest baseline.")
    return width


def _around(components: Components) -> tuple[Flow, MotJoints]:
    """New modules besides the visual experts."""
    return Flow(_flow_config(components)), MotJoints(
        components.cfg.joints, components.cfg.flow.deep.dim, components.cfg.vlm.width
    )


def _flow_config(components: Components) -> FlowConfig:
    """The flow's config with a deep block without layers, as wide as the language model."""
    flow, vlm = components.cfg.flow, components.cfg.vlm
    stack = StackConfig(width=vlm.width, depth=0, head_dim=vlm.width // vlm.heads, rope=False)
    return replace(flow, deep=replace(flow.deep, stack=stack, context_dim=0, start="none"))


class MotComponents(Components[Experts, MotJoints]):
    """Components of a model with the baseline instead of both streams.

    Text experts start as the language model of `components`; features, codec and tokenizer are shared, all else is
    fresh. Both variants add as many parameters as the Pretzel's flow and joints have (`matched_width`). "frozen" trains
    as many as the Pretzel; "finetuned" trains the text experts too.
    """

    def __init__(self, components: Components, text: Trains = "frozen", seed: int = 0) -> None:
        """seed: of all fresh weights."""
        cfg = replace(components.cfg, name=f"{components.cfg.name}-mot-{text}", flow=_flow_config(components))
        modules = {k: m for k, m in components.named_children() if k in ("features", "fae", "patches")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules["vlm"] = Experts(components.cfg.vlm, matched_width(components))
            modules["flow"], modules["joints"] = _around(components)
        super().__init__(cfg, components.tokenizer, modules)
        self.text, self.vocabulary = text, components.vocabulary
        shared = ("features", "vlm", "fae")
        self.finished_stages = tuple(stage for stage in components.finished_stages if stage in shared)
        self.vlm.text.load_state_dict(components.vlm.language_weights())
        self.vlm.text.requires_grad_(text == "finetuned")
        self.to(components.device)

    @property
    def pretzel(self) -> Mot:
        """The baseline over these weights."""
        return Mot(self.vlm, self.flow, self.joints)

    @property
    def joint_modules(self) -> dict[str, nn.Module]:
        """Modules that train: all new ones, and text experts if they are finetuned."""
        modules: dict[str, nn.Module] = {"visual": self.vlm.visual, "flow": self.flow, "joints": self.joints}
        return modules | ({"text": self.vlm.text} if self.text == "finetuned" else {})
