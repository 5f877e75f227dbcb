"""A whole model small enough for one core: nano's recipe shrunk, with a tokenizer of its own, woken."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from helpers import wake
from starflow2.flow import Context, NoiseConfig, SampleConfig, StackConfig
from starflow2.inference.config import DrawConfig
from starflow2.models.checkpoint import save_components
from starflow2.models.components import Components
from starflow2.models.config import ModelConfig
from starflow2.models.pretzel import text_context
from starflow2.models.sequence import pad_rows, text_mrope
from starflow2.models.tokenizer import ChatTokenizer, train_tokenizer
from starflow2.training.config import MixConfig, RunConfig, StageConfig
from starflow2.training.recipes import nano_model, smoke
from starflow2.world.captions import caption_task
from starflow2.world.conversations import understanding_words
from starflow2.world.questions import understanding_task

WIDTH, LATENT = 40, 4  # of every stream; channels of a latent
STAGES = ("features", "fae", "vlm", "t2i", "adapter", "joint")


def tiny_model(side: int = 8) -> ModelConfig:
    """nano with streams of width 40, one layer each, and `side` x `side` latents of 4 channels, 8 pixels each."""
    size, grid = 8 * side, (side, side)
    nano = nano_model()
    stack = StackConfig(width=WIDTH, depth=1, head_dim=20, activation="relu2")
    both_ways = replace(stack, rope=False, causal=False)
    blocks = [replace(b, dim=LATENT, grid=grid, stack=stack) for b in (nano.flow.deep, *nano.flow.shallow)]
    return replace(
        nano,
        name="tiny",
        features=replace(nano.features, image_size=size, width=WIDTH, depth=1, heads=2),
        vlm=replace(
            nano.vlm,
            vocab=320,
            width=WIDTH,
            depth=2,
            heads=2,
            kv_heads=1,
            mlp_width=64,
            mrope_section=(4, 3, 3),
            vision_width=32,
            vision_heads=2,
            vision_mlp_width=48,
            vision_patch=8,
        ),
        fae=replace(
            nano.fae,
            feature_dim=WIDTH,
            latent_dim=LATENT,
            grid=grid,
            image_size=size,
            encoder_width=32,
            encoder_heads=2,
            feature_decoder=both_ways,
            pixel_decoder=both_ways,
            pixel_channels=(12, 8, 6),
        ),
        flow=replace(
            nano.flow,
            deep=replace(blocks[0], context_dim=2 * WIDTH),
            shallow=tuple(blocks[1:]),
            noise=NoiseConfig(noise_min=0.01, noise_max=0.5, max_share=0.5),
        ),
        guidance=1.0,
        edit_guidance=None,
        max_prompt_tokens=160,
    )


def texts(count: int) -> Iterable[str]:
    """Captions, questions and answers of the first training items."""
    for index in range(count):
        yield caption_task(0, index).prompt
        for question, answer in understanding_task(0, index)[1]:
            yield question
            yield answer


@cache
def tiny_tokenizer() -> ChatTokenizer:
    return train_tokenizer(texts(60), tiny_model().vlm.vocab)


def tiny_components(stages: tuple[str, ...] = STAGES[:4], scale: float = 0.05, side: int = 8) -> Components:
    """Woken parts that claim to have finished `stages`: a copy of its own for every caller, always the same weights."""
    woken, generator = _woken(scale, side)
    torch.set_rng_state(generator)
    shared = (woken.cfg, woken.tokenizer, woken.vocabulary)
    components = copy.deepcopy(woken, {id(value): value for value in shared})
    components.finished_stages = stages
    return components


@cache
def _woken(scale: float, side: int) -> tuple[Components, torch.Tensor]:
    """Parts that nobody else changes, and the state in which making them leaves torch's generator."""
    torch.manual_seed(3)
    components = wake(Components(tiny_model(side), tiny_tokenizer()), scale)
    components.vocabulary = understanding_words()
    return components.eval(), torch.get_rng_state()


def compiled_components(side: int = 3) -> Components:
    """Like `tiny_components` after every stage, in widths that the compiled streams take."""
    cfg = tiny_model(side)
    stack = StackConfig(width=64, depth=1, head_dim=32, activation="relu2")
    deep, *shallow = (replace(block, stack=stack) for block in (cfg.flow.deep, *cfg.flow.shallow))
    cfg = replace(
        cfg,
        vlm=replace(cfg.vlm, width=32, mrope_section=(4, 2, 2)),
        flow=replace(cfg.flow, deep=replace(deep, context_dim=64), shallow=tuple(shallow)),
        joints=replace(cfg.joints, adapter_width=32),
    )
    torch.manual_seed(3)
    components = wake(Components(cfg, tiny_tokenizer()), 0.05)
    components.vocabulary, components.finished_stages = understanding_words(), STAGES
    return components.eval()


def mix_of(**shares: float) -> MixConfig:
    """Stage 3's mix with these shares, and nothing else in it."""
    return MixConfig(**{f.name: 0.0 for f in fields(MixConfig)} | shares)


def tiny_run(steps: int = 4, save_every: int = 2, precision: str = "float32") -> RunConfig:
    """All six stages of the tiny model, `steps` steps of four documents each, every step logged."""
    stages = tuple(
        StageConfig(name=name, steps=steps, batch=4, whitening_captions=64)  # type: ignore[arg-type]
        for name in STAGES
    )
    run = smoke(RunConfig(model=tiny_model(), stages=stages, precision=precision))
    long = tuple(replace(s, steps=steps, save_every=save_every, log_every=1) for s in run.stages)
    return replace(run, stages=long)


def tiny_folder(folder: Path, stages: tuple[str, ...] = ("features", "fae", "vlm")) -> Path:
    """`folder` with a model in it that is ready for the stage behind `stages`."""
    save_components(tiny_components(stages), folder / "model")
    return folder


@torch.no_grad()
def sampled_by_the_flow(
    components: Components, prompts: list[str], seeds: list[int], config: DrawConfig
) -> torch.Tensor:
    """Latents (B, N, D) row by row by the flow library's own sampling, all in float64: without Pretzel or cache."""
    twin = copy.deepcopy(components).double()
    settings = SampleConfig(
        guidance=config.guidance, rule=config.rule, schedule=config.schedule, prior_scale=config.prior_scale
    )
    level = torch.tensor([components.cfg.draw_level]).double()
    rows = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        context, unconditional = _prompt_states(twin, prompt)
        z = twin.flow.prior([seed]).double()
        rows.append(twin.flow.sample(z, context, unconditional if config.guidance else None, level, config=settings))
    return torch.cat(rows).float()


def _prompt_states(components: Components, prompt: str) -> tuple[Context, Context]:
    """States of the prompt and, padded to its length, of the empty one; each is read alone."""
    rows = [components.tokenizer.drawing_prompt(text) for text in (prompt, "")]
    text = pad_rows(rows, components.cfg.vlm.special.pad)
    found = []
    for i, row in enumerate(rows):
        ids = torch.tensor([row])
        embeds = components.vlm.embed(ids)
        h = text_context(components.cfg.joints, embeds, components.vlm.states(embeds, text_mrope(*ids.shape)))
        h = F.pad(h, (0, 0, text.width - len(row), 0))
        found.append(Context(h, text.left_positions[i : i + 1].to(h), text.left_attend[i : i + 1]))
    return found[0], found[1]
