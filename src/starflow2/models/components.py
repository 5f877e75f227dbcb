"""`Components`: the modules of a model with its tokenizer, and constructors with fresh weights.

Each component is defined in a module of its own; files are read and written in `checkpoint`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, Self, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import TypeVar

from starflow2.core.fields import of_kind
from starflow2.errors import ConfigError
from starflow2.flow import Flow
from starflow2.models.config import CodecConfig, ExtractorConfig, FaeConfig, ModelConfig
from starflow2.models.fae import Fae, FaeCodec
from starflow2.models.huggingface import stream_class
from starflow2.models.joint_stream import JointStream
from starflow2.models.own_codec import build_codec, build_extractor
from starflow2.models.patches import PatchCodec
from starflow2.models.pretzel import Joints, Pretzel
from starflow2.models.protocols import Codec, LanguageStream
from starflow2.models.qwen import QwenStream
from starflow2.models.sequence import Layout
from starflow2.models.tokenizer import ChatTokenizer
from starflow2.models.vision import DinoFeatures, SiglipFeatures, features_of

__all__ = ["Components", "build", "fresh_modules", "without_values"]

Language = TypeVar("Language", bound=nn.Module, default=QwenStream)
Joining = TypeVar("Joining", bound=nn.Module, default=Joints)


class Components(nn.Module, Generic[Language, Joining]):
    """The modules of a model and its tokenizer; `finished_stages` lists the stages that have trained them.

    modules: by the names below, `fresh_modules(cfg)` by default. tokenizer: None for a model whose parameters are only
    counted; its property `tokenizer` then raises ConfigError.
    """

    features: DinoFeatures | SiglipFeatures  # only with `fae`; or one of a user, which does as much
    fae: Fae  # either this codec
    patches: PatchCodec  # or this one
    own_codec: nn.Module  # or one of a user
    vlm: Language
    flow: Flow
    joints: Joining

    def __init__(
        self,
        cfg: ModelConfig,
        tokenizer: ChatTokenizer | None = None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = of_kind(cfg, ModelConfig, "cfg", "load_components(folder) reads the components of a model")
        self._tokenizer = None if tokenizer is None else of_kind(tokenizer, ChatTokenizer, "tokenizer")
        self.vocabulary: frozenset[str] = frozenset()  # words that prompts may use; empty: any
        self.finished_stages: tuple[str, ...] = ()
        self.fingerprints: dict[str, str] = {}  # of pretrained components that a folder refers to, once loaded
        for name, module in (fresh_modules(cfg) if modules is None else modules).items():
            self.add_module(name, module)

    @property
    def tokenizer(self) -> ChatTokenizer:
        if self._tokenizer is None:
            raise ConfigError(f"model {self.cfg.name} was built without a tokenizer; pass one to Components.")
        return self._tokenizer

    def named(self, name: str) -> Self:
        """A copy under another name with the same modules, which is saved with them."""
        other = copy.copy(self)
        other.cfg = replace(self.cfg, name=name)
        return other

    @property
    def pretzel(self) -> JointStream:
        """Both streams over these weights. It is immutable: `with_skips` returns another one with some skips closed."""
        return Pretzel(cast(LanguageStream, self.vlm), self.flow, cast(Joints, self.joints))

    @property
    def codec(self) -> Codec:
        """Images to latents and back; an FAE gets no gradients through it."""
        if isinstance(self.cfg.fae, CodecConfig):
            return cast(Codec, self.own_codec)
        return FaeCodec(self.fae, self.features) if isinstance(self.cfg.fae, FaeConfig) else self.patches

    def codec_in_float64(self) -> Codec:
        """The codec over copies of its weights in double precision."""
        names = [name for name in ("features", "fae", "patches", "own_codec") if name in self._modules]
        return Components(self.cfg, None, {n: copy.deepcopy(self.get_submodule(n)).double() for n in names}).codec

    @property
    def joint_modules(self) -> dict[str, nn.Module]:
        """Modules that stage 3 trains: flow and joints."""
        return {"flow": self.flow, "joints": self.joints}

    @property
    def layout(self) -> Layout:
        """Grid and special tokens of an image in documents of this model."""
        ids = self.cfg.vlm.special
        return Layout(self.cfg.flow.deep.grid, ids.vision_start, ids.vision_end, ids.image_pad, ids.pad)

    @property
    def tower_layout(self) -> Layout:
        """Grid and special tokens of an image that the language model reads through its own vision tower."""
        return replace(self.layout, grid=self.cfg.vlm.image_grid)

    @property
    def device(self) -> torch.device:
        return self.flow.deep.head.weight.device


def fresh_modules(cfg: ModelConfig) -> dict[str, nn.Module]:
    """Modules of a model with fresh weights, by their names in `Components`."""
    modules: dict[str, nn.Module] = {}
    if isinstance(cfg.features, ExtractorConfig):
        modules["features"] = build_extractor(cfg.features)
    elif cfg.features is not None:
        modules["features"] = features_of(cfg.features)
    modules["vlm"] = stream_class(cfg.vlm)(cfg.vlm)
    if isinstance(cfg.fae, FaeConfig):
        modules["fae"] = Fae(cfg.fae)
    elif isinstance(cfg.fae, CodecConfig):
        modules["own_codec"] = build_codec(cfg.fae)
    else:
        modules["patches"] = PatchCodec(cfg.fae)
    modules["flow"] = Flow(cfg.flow)
    deep = cfg.flow.deep
    modules["joints"] = Joints(cfg.joints, deep.dim, cfg.vlm.width, deep.stack.width)
    return modules


class _Unfilled(TorchFunctionMode):
    """Leaves out the first values of weights while it is entered."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Context in which modules are built on the meta device: neither memory nor values.

    There torch computes even random values through its compiler, which takes as long to import as all of torch.
    """
    with torch.device("meta"), _Unfilled():
        yield


def build(cfg: ModelConfig, device: str | torch.device = "cpu") -> Components:
    """Components without tokenizer, with fresh weights (or none, on the meta device)."""
    with torch.device(device):
        return Components(cfg)
