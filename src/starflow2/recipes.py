"""Recipes: a run as data. `nano()` is the embedded default; any function that returns RunConfig is one.

`smoke(recipe)` shrinks any of them to seconds on two cores, on the same code path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from inspect import signature

from starflow2.backbones import DinoConfig, LanguageConfig, SpecialIds
from starflow2.errors import ConfigError, nearest
from starflow2.fae import FaeConfig
from starflow2.flow import BlockConfig, FlowConfig, NoiseConfig
from starflow2.nn import StackConfig
from starflow2.parts import ModelConfig
from starflow2.pretzel import JointsConfig
from starflow2.stages import OptimConfig, RunConfig, StageConfig

__all__ = ["find", "nano", "smoke"]


def nano_model() -> ModelConfig:
    """The sizes of nano: 64 px pictures, 8x8 latents of 16 channels."""
    bidirectional = StackConfig(width=192, depth=2, head_dim=64, activation="relu2", rope=False, causal=False)
    shallow = StackConfig(width=128, depth=2, head_dim=64, activation="relu2")
    deep = StackConfig(width=192, depth=6, head_dim=64, activation="relu2")

    def block(stack: StackConfig, direction: str, context_dim: int = 0) -> BlockConfig:
        return BlockConfig(
            dim=16,
            grid=(8, 8),
            stack=stack,
            direction=direction,  # type: ignore[arg-type]
            context_dim=context_dim,
            learned_positions=True,
            stencil=True,
            noise=True,
        )

    return ModelConfig(
        name="nano",
        features=DinoConfig(image_size=64, patch_size=8, width=192, depth=3, heads=3),
        vlm=LanguageConfig(
            vocab=512,
            width=192,
            depth=4,
            heads=4,
            kv_heads=2,
            mlp_width=512,
            mrope_section=(8, 8, 8),
            special=SpecialIds(pad=0, user=1, assistant=2, end=3, vision_start=4, vision_end=5, image_pad=6),
            vision_width=128,
            vision_depth=2,
            vision_heads=4,
            vision_mlp_width=256,
            vision_patch=4,
            image_size=64,
        ),
        fae=FaeConfig(
            feature_dim=192,
            latent_dim=16,
            grid=(8, 8),
            image_size=64,
            encoder_width=384,
            encoder_heads=6,
            feature_decoder=replace(bidirectional, depth=1),
            pixel_decoder=bidirectional,
        ),
        flow=FlowConfig(
            deep=block(deep, "l2r", context_dim=2 * 192),
            shallow=(block(shallow, "l2r"), block(shallow, "r2l")),
            noise=NoiseConfig(noise_min=0.01, noise_max=0.5, max_share=0.8),
        ),
        joints=JointsConfig(adapter_width=192, adapter_stencil=True, reference=True, words=True),
    )


def nano() -> RunConfig:
    """The embedded default: about 110 minutes on two CPU cores (features 5, FAE 13, language model 7, flow 85).

    The shipped weights came from nearly this recipe (the whitened context and this mix of captions were introduced
    while stage t2i ran) and score W-GenEval 0.485 on seen and 0.270 on unseen combinations, test split, against
    a ceiling of 0.995: see the model card. More steps of t2i are the first thing to add.
    """
    return RunConfig(
        model=nano_model(),
        stages=(
            StageConfig(name="features", steps=400, batch=64),
            StageConfig(name="fae", steps=1000, batch=64),
            StageConfig(name="vlm", steps=4000, batch=48, optim=OptimConfig(decay_share=0.2)),
            StageConfig(name="t2i", steps=4100, batch=64, optim=OptimConfig(lr=3e-3, decay_share=0.4)),
            StageConfig(name="adapter", steps=800, batch=48, distill=0.1),
            StageConfig(name="joint", steps=8000, batch=32),
        ),
    )


def smoke(run: RunConfig) -> RunConfig:
    """The same run in a few steps of tiny batches."""
    stages = tuple(
        replace(s, steps=4, batch=4, optim=replace(s.optim, warmup_steps=1), save_every=2) for s in run.stages
    )
    return replace(run, stages=stages)


RECIPES: dict[str, Callable[[], RunConfig]] = {"nano": nano}


def find(name: str) -> RunConfig:
    """The recipe of that name, or what the function `module:function` returns.

    Raises ConfigError for an unknown name (with the nearest one), a function that cannot be imported or is no recipe.

    >>> find("nano").model.name
    'nano'
    """
    if name in RECIPES:
        return RECIPES[name]()
    module, _, function = name.partition(":")
    if not module or not function:
        known = ", ".join(RECIPES)
        raise ConfigError(f"there is no recipe {name!r}; expected {known} or module:function.{nearest(name, RECIPES)}")
    try:
        recipe = getattr(import_module(module), function)
        signature(recipe).bind()  # a function that needs arguments is no recipe
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot use {name!r} as a recipe: {error}.") from error
    run = recipe()
    if not isinstance(run, RunConfig):
        raise ConfigError(f"recipe {name!r} gave {type(run).__name__}; expected a function that returns RunConfig.")
    return run
