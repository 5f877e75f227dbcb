"""A latent at a model's own sizes, counted on tensors without values: no weights, no memory, no accelerator.

An operation after which the host would wait for a device cannot run on such tensors: it raises. The same steps are
compared with the reference on numbers, in a model of the same settings and layers with small widths, which also shows
what torch.compile makes of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from starflow2.flow import BlockConfig, Flow
from starflow2.inference.backend import Backend
from starflow2.inference.lean import LeanBackend
from starflow2.inference.packed import pack
from starflow2.inference.streams import StreamBackend
from starflow2.models.config import LanguageConfig, ModelConfig
from starflow2.models.huggingface import stream_class
from starflow2.models.pretzel import Joints, Pretzel
from starflow2.research.bench import Variant
from starflow2.research.bench_cases import LATENT, Drawing
from starflow2.training.recipes import nano_model, paper_model

__all__ = ["at_nano_size", "at_paper_size", "counted", "narrow"]

COUNT = 4  # latents: all are alike
WIDTH, HEAD = 64, 32  # of the flow whose results are compared
LANGUAGE_HEAD, KV_HEADS, VOCAB = 16, 2, 64  # of its language model


def at_paper_size() -> Iterator[list[Variant]]:
    """A latent at the paper's sizes, the weights of its language model in bfloat16."""
    return counted(paper_model(), torch.bfloat16)


def at_nano_size() -> Iterator[list[Variant]]:
    """A latent at nano's sizes."""
    return counted(nano_model(), torch.float32)


def counted(cfg: ModelConfig, language: torch.dtype) -> Iterator[list[Variant]]:
    """A latent of a config, guided and not. language: dtype of the language model's weights."""
    small = narrow(cfg)
    twin, compiled = _woken(small), _woken(small, language)
    with torch.device("meta"):
        stream = _streams(cfg, language)
    dtypes = f"{language}, {torch.float32}".replace("torch.", "")  # of the language model and of the flow
    for guided in (True, False):
        twins = {
            name: Drawing(backend, small, guided=guided, count=COUNT)
            for name, backend in _forms(twin.in_float64(), twin).items()
        }
        step = Drawing(LeanBackend(pack(compiled)), small, guided=guided, count=COUNT).step
        settings = {"shape": cfg.name, "batch": 1, "guided": guided, "dtype": dtypes, "device": "meta"}
        yield [
            Variant(
                bench=cfg.name,
                name=name,
                run=drawing.draw,
                before=drawing.restart,
                units=COUNT,
                tolerance=LATENT,
                settings=settings,
                twin=twins[name].whole,
                step=step if name == "lean" else None,
                is_timed=False,  # seconds of tensors without values say nothing
            )
            for name, drawing in _drawings(cfg, stream, guided=guided).items()
        ]


def _forms(reference: Pretzel, stream: Pretzel) -> dict[str, Backend]:
    """The plain form over one stream and the lean form of another one."""
    dtype = reference.flow.deep.head.weight.dtype
    return {"reference": StreamBackend(reference, dtype), "lean": LeanBackend(pack(stream))}


# -- tensors without values -----------------------------------------------------------------------------------------


def _drawings(cfg: ModelConfig, stream: Pretzel, *, guided: bool) -> dict[str, _Counted]:
    """Drawings by form over a stream without values, the reference first."""
    forms = _forms(stream, stream)
    return {name: _Counted(Drawing(form, cfg, guided=guided, count=COUNT)) for name, form in forms.items()}


@dataclass(frozen=True, slots=True)
class _Counted:
    """A drawing whose tensors have no values."""

    drawing: Drawing

    def restart(self) -> None:
        with _Fused():
            self.drawing.restart()

    def draw(self) -> Tensor:
        with _Fused():
            return self.drawing.draw()


class _Fused(TorchFunctionMode):
    """Attention and RMS norm in one operation each, as on a GPU; without a device torch takes them apart."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            q, k, v = args[:3]
            return _attention(q, k, v, kwargs.get("attn_mask"), is_causal=kwargs.get("is_causal", False))
        if func in (F.rms_norm, torch.rms_norm) and args[0].device.type == "meta":
            return F.layer_norm(args[0], args[1])  # another norm, of the same shape and in one operation, too
        return func(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Attention by the kernel that a GPU takes where there is a mask."""
    if k.shape[1] < q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention.default
    found: Tensor = kernel(q, k, v, mask, False, 0.0, is_causal)[0]
    return found


# -- models -----------------------------------------------------------------------------------------------------------


def _streams(cfg: ModelConfig, language: torch.dtype) -> Pretzel:
    """Both streams of a config with fresh weights; no codec."""
    vlm, flow, deep = stream_class(cfg.vlm)(cfg.vlm), Flow(cfg.flow), cfg.flow.deep
    joints = Joints(cfg.joints, deep.dim, cfg.vlm.width, deep.stack.width)
    for module in (vlm, flow, joints):
        module.requires_grad_(False).eval()
    vlm.to(language)
    return Pretzel(vlm, flow, joints)  # type: ignore[arg-type]


def _woken(cfg: ModelConfig, language: torch.dtype = torch.float32) -> Pretzel:
    """Both streams with a value in every weight that a fresh model keeps at zero: differences would not show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stream = _streams(cfg, language)
        for module in (stream.flow, stream.joints):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return stream


def narrow(cfg: ModelConfig) -> ModelConfig:
    """A config with the settings, layers and ratios of heads of `cfg` in small widths, with a small vocabulary."""
    language = _narrow_language(cfg.vlm)
    contexts = cfg.flow.deep.context_dim // cfg.vlm.width
    deep = replace(_narrow_block(cfg.flow.deep), context_dim=contexts * language.width)
    flow = replace(cfg.flow, deep=deep, shallow=tuple(_narrow_block(block) for block in cfg.flow.shallow))
    return replace(cfg, vlm=language, flow=flow, joints=replace(cfg.joints, adapter_width=WIDTH))


def _narrow_block(block: BlockConfig) -> BlockConfig:
    return replace(block, stack=replace(block.stack, width=WIDTH, head_dim=HEAD))


def _narrow_language(cfg: LanguageConfig) -> LanguageConfig:
    heads = KV_HEADS * cfg.heads // cfg.kv_heads
    special = type(cfg.special)(pad=0, user=1, assistant=2, end=3, vision_start=4, vision_end=5, image_pad=6)
    return replace(
        cfg,
        vocab=VOCAB,
        special=special,
        width=heads * LANGUAGE_HEAD,
        heads=heads,
        kv_heads=KV_HEADS,
        mlp_width=2 * WIDTH,
        mrope_section=(LANGUAGE_HEAD // 4, LANGUAGE_HEAD // 8, LANGUAGE_HEAD // 8),
        vision_width=32,
        vision_depth=1,
        vision_heads=2,
        vision_mlp_width=32,
        vision_whole=(),
    )
