"""Recipes: a run as data. `nano()` is the embedded default; any function that returns RunConfig is one.

`paper()` is the paper's size over Qwen2.5-VL-7B and DINOv2-g, `mini()` one consumer GPU between the two.
`smoke(recipe)` shrinks any of them to seconds on two cores, on the same code path; `smoke_at_size` keeps image sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path

from starflow2.core.imports import find_object, foreign_code, importable_folder
from starflow2.errors import ConfigError, nearest
from starflow2.flow import BlockConfig, FlowConfig, NoiseConfig
from starflow2.models.config import (
    CLIP_COLOURS,
    IMAGENET_COLOURS,
    CodecConfig,
    DinoConfig,
    ExtractorConfig,
    FaeConfig,
    JointsConfig,
    LanguageConfig,
    ModelConfig,
    PatchConfig,
    PixelConfig,
    SelfCheckConfig,
    SiglipConfig,
    SpecialIds,
)
from starflow2.models.config_file import read_config
from starflow2.models.pretrained import Pretrained
from starflow2.nn import StackConfig
from starflow2.training.config import (
    CorpusConfig,
    MixConfig,
    OptimConfig,
    RunConfig,
    ShardConfig,
    StageConfig,
    WarmupMixConfig,
    WarmupTalkConfig,
)
from starflow2.training.nano_mixes import ENDED, GROWN, NANO_DRAWINGS, NANO_END, NANO_TALK, NANO_TALK_EARLY

__all__ = [
    "find",
    "find_config",
    "mini",
    "nano",
    "nano_end_to_end",
    "nano_final",
    "nano_grown",
    "nano_model",
    "nano_patches",
    "paper",
    "paper_model",
    "paper_siglip",
    "smoke",
    "smoke_at_size",
    "with_patches",
]

NANO_SPECIAL = SpecialIds(pad=0, user=1, assistant=2, end=3, vision_start=4, vision_end=5, image_pad=6)
QWEN_SPECIAL = SpecialIds(
    pad=151643, user=151644, assistant=151644, end=151645, vision_start=151652, vision_end=151653, image_pad=151655
)
WORLD_MEAN, WORLD_STD = (0.73, 0.75, 0.70), (0.32, 0.35, 0.39)  # of the drawn world's colours in [-1, 1]
PICTURE = 256  # pixels of a side of paper's images
CLIP = PixelConfig(picture_size=PICTURE, mean=CLIP_COLOURS[0], std=CLIP_COLOURS[1])  # of Qwen's tower
VIT = StackConfig(width=1024, depth=24, rope=False, causal=False)  # paper's pixel decoder
MIXTURES = Path(__file__).parents[1] / "assets" / "mixtures"  # of recipe paper; their weights are our choice
IMAGENET = PixelConfig(picture_size=PICTURE, mean=IMAGENET_COLOURS[0], std=IMAGENET_COLOURS[1])  # of DINOv2


def nano_model() -> ModelConfig:
    """The sizes of nano: images of 64 pixels a side, 8x8 latents of 16 channels."""
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
            special=NANO_SPECIAL,
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
        joints=JointsConfig(adapter_width=192, adapter_stencil=True, reference=5, words=True),
        edit_guidance=1.0,
        prior_scale=0.65,
    )


def nano() -> RunConfig:
    """The default recipe, from a fresh tokenizer to two models: `nano-heldout`, which has seen nothing that dev and
    test hold out, after stage end, and `nano`, which has seen everything, after stage final.

    Steps are such that features to t2i take about two and a half hours on two CPU cores (5, 13, 68 and 68 minutes), and
    adapter to final as long again (9, 109, 17 and 18), at the speeds of 23 November; this run has not been made yet.
    Every stage starts from the weights in the run's folder, so a run may stop between any two.
    """
    asked = SelfCheckConfig(shows="does the picture show {}?", done="was {} done, and nothing else changed?")
    return RunConfig(
        model=replace(nano_model(), self_check=asked),
        stages=(
            StageConfig(name="features", steps=400, batch=64),
            StageConfig(name="fae", steps=1000, batch=64),
            StageConfig(
                name="vlm",
                steps=2600,
                batch=48,
                optim=OptimConfig(decay_share=0.25),
                warmup_talk=WarmupTalkConfig(steps=1000, mix=NANO_TALK_EARLY),
                talk=NANO_TALK,
            ),
            StageConfig(name="t2i", steps=3400, batch=64, optim=OptimConfig(lr=3e-3)),
            StageConfig(name="adapter", steps=500, batch=48, distill=0.1, talk=NANO_TALK),
            StageConfig(
                name="joint",
                steps=3640,
                batch=32,
                optim=OptimConfig(matrix_lr=3e-3, decay_share=0.45),
                hidden_latents_share=0.6,
                kl_to_t2i=24.0,
                warmup_mix=WarmupMixConfig(
                    steps=1200, mix=MixConfig(understand=0.05, draw=0.15, edit=0.8, chain=0.0, story=0.0)
                ),
                mix=MixConfig(
                    understand=0.03, check=0.05, draw=0.40, edit=0.24, chain=0.03, beginning=0.17, story=0.08
                ),
                captions=NANO_DRAWINGS,
                talk=NANO_TALK,
            ),
            NANO_END,
            StageConfig(
                name="final",
                steps=600,
                batch=32,
                optim=OptimConfig(lr=6e-4, matrix_lr=9e-4, decay_share=1.0),
                mix=MixConfig(understand=0.03, check=0.05, draw=0.56, edit=0.2, chain=0.02, beginning=0.09, story=0.05),
                captions=NANO_DRAWINGS,
                talk=NANO_TALK,
                everything=True,
                keep_as="nano",
            ),
        ),
    )


def nano_grown() -> RunConfig:
    """`nano` from the weights of version 0, in an hour and a half of two quiet cores; docs/training.md#nano.

    `scripts/grow_nano.py` makes the folder to start in: there, features, fae and t2i count as finished. The language
    model learns to see columns (docs/choices.md#columns) and learns on; the flow and the joints then follow it in
    `joint`, which has no reference, at a rate at which they forget little, with a quarter of the drawings for counting,
    which is forgotten first. As run on 1 December it draws a tenth worse than it began: docs/LOG.md.
    """
    run = nano()
    stages = [s for s in run.stages if s.name != "end"]  # which lets go of a flow that joint does not hold on to here
    return replace(run, stages=tuple(replace(s, **GROWN.get(s.name, {})) for s in stages))  # type: ignore[arg-type]


def nano_final() -> RunConfig:
    """The weights of version 0 with stages end and final alone: eighteen minutes of two quiet cores.

    `scripts/grow_nano.py FOLDER nano-final` makes the folder to start in. The language model stays as it is, so it
    reads no new words, and checks an image by questions that it knows, about one object after the other. What is held
    out is seen in the last stage only; the weights of version 0 are kept as nano-heldout.
    """
    run = nano()
    model = replace(nano_model(), self_check=SelfCheckConfig())
    return replace(run, model=model, stages=tuple(replace(s, **ENDED.get(s.name, {})) for s in run.stages))  # type: ignore[arg-type]


# -- the paper's future work, at nano's size --------------------------------------------------------------


def nano_end_to_end() -> RunConfig:
    """`nano`, but in stage t2i the FAE trains on beside the flow, on its own losses and the flow's.

    The model and the stages before t2i are nano's, so a run folder of nano can be continued. A step of t2i costs as
    much more as a step of fae. This recipe has not been trained to the end here.
    """
    run = nano()
    return replace(run, stages=tuple(replace(s, codec_weight=4.0) if s.name == "t2i" else s for s in run.stages))


def nano_patches() -> RunConfig:
    """`nano` without FAE and features: the flow models patches of 8x8 pixels, 192 channels each.

    Noise is at most 0.15 of a colour's deviation, 0.05 in [-1, 1] (as in TARFlow), since only `--cleanup tweedie` can
    remove it after sampling. This recipe has not been trained to the end here.
    """
    run = nano()
    stages = tuple(s for s in run.stages if s.name not in ("features", "fae"))
    return replace(run, model=with_patches(run.model), stages=stages)


def with_patches(model: ModelConfig) -> ModelConfig:
    """A model over as many patches of pixels as it has latents; statistics are those of the drawn world."""
    side = model.fae.image_size // model.fae.grid[0]
    codec = PatchConfig(image_size=model.fae.image_size, patch_size=side, mean=WORLD_MEAN, std=WORLD_STD)
    deep, *shallow = (replace(block, dim=codec.latent_dim) for block in (model.flow.deep, *model.flow.shallow))
    noise = NoiseConfig(noise_min=0.01, noise_max=0.15, max_share=0.8)
    flow = replace(model.flow, deep=deep, shallow=tuple(shallow), noise=noise)
    return replace(model, name=f"{model.name}-patches", features=None, features_from=None, fae=codec, flow=flow)


# -- over pretrained parts ------------------------------------------------------------------------------


def _qwen(width: int, depth: int, heads: int, kv_heads: int, mlp_width: int, vocab: int) -> LanguageConfig:
    """A Qwen2.5-VL whose tower reads images of 448 pixels a side as 16x16 tokens, one for each latent."""
    return LanguageConfig(
        vocab=vocab,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        mrope_section=(16, 24, 24),
        special=QWEN_SPECIAL,
        vision_width=1280,
        vision_depth=32,
        vision_heads=16,
        vision_mlp_width=3420,
        vision_patch=14,
        image_size=448,
        vision_window=112,
        vision_whole=(7, 15, 23, 31),
        ties_embeddings=vocab == 151936,  # the 3B; the 7B has a head of its own
        pixels=CLIP,
    )


def _fae(feature_dim: int, encoder: tuple[int, int], pixel_decoder: StackConfig) -> FaeConfig:
    """The FAE paper's auto-encoder: 16x16 latents of 32 channels, six layers back to features, a ViT to pixels."""
    decoder = StackConfig(width=feature_dim, depth=6, rope=False, causal=False)
    return FaeConfig(
        feature_dim=feature_dim,
        latent_dim=32,
        grid=(16, 16),
        image_size=PICTURE,
        encoder_width=encoder[0],
        encoder_heads=encoder[1],
        feature_decoder=decoder,
        pixel_decoder=pixel_decoder,
        pixel_channels=(),
    )


def _flow(deep: StackConfig, shallow: StackConfig, context_dim: int) -> FlowConfig:
    """STARFlow's conventions: softplus scale, scale and mean clipped at 4, a penalty on u; levels as iTARFlow's."""

    def block(stack: StackConfig, direction: str, context_dim: int = 0) -> BlockConfig:
        return BlockConfig(
            dim=32,
            grid=(16, 16),
            stack=stack,
            direction=direction,  # type: ignore[arg-type]
            scale="softplus",
            clip=4.0,
            clips_mean=True,
            context_dim=context_dim,
            noise=True,
            noise_waves=256,
        )

    return FlowConfig(
        deep=block(deep, "l2r", context_dim),
        shallow=(block(shallow, "l2r"), block(shallow, "r2l")),
        noise=NoiseConfig(noise_min=0.01, noise_max=0.5),
        latent_penalty=1e-4,
    )


def paper_model() -> ModelConfig:
    """The paper's sizes: 3.68 B parameters train (docs/choices.md#widths-and-depths) beside 9.9 B frozen ones."""
    return ModelConfig(
        name="paper",
        features=DinoConfig(
            image_size=224,
            patch_size=14,
            width=1536,
            depth=40,
            heads=24,
            swiglu=True,
            table_size=518,
            pixels=IMAGENET,
        ),
        features_from=Pretrained(source="facebook/dinov2-giant"),
        vlm=_qwen(width=3584, depth=28, heads=28, kv_heads=4, mlp_width=18944, vocab=152064),
        vlm_from=Pretrained(source="Qwen/Qwen2.5-VL-7B-Instruct"),
        fae=_fae(1536, (6144, 24), VIT),
        flow=_flow(StackConfig(width=3072, depth=24), StackConfig(width=3072, depth=4), 3584),
        joints=JointsConfig(adapter_width=3584, noise_width=256),
        guidance=3.0,
        prior_scale=1.0,
        max_prompt_tokens=512,
        max_positions=8192,
    )


def mini_model() -> ModelConfig:
    """Sizes between nano and paper: 0.5 B parameters train over Qwen2.5-VL-3B and DINOv2-B."""
    return replace(
        paper_model(),
        name="mini",
        features=DinoConfig(
            image_size=224, patch_size=14, width=768, depth=12, heads=12, table_size=518, pixels=IMAGENET
        ),
        features_from=Pretrained(source="facebook/dinov2-base"),
        vlm=_qwen(width=2048, depth=36, heads=16, kv_heads=2, mlp_width=11008, vocab=151936),
        vlm_from=Pretrained(source="Qwen/Qwen2.5-VL-3B-Instruct"),
        fae=_fae(768, (3072, 12), StackConfig(width=768, depth=12, rope=False, causal=False)),
        flow=_flow(StackConfig(width=1152, depth=24), StackConfig(width=1152, depth=4), 2048),
        joints=JointsConfig(adapter_width=2048, noise_width=256),
    )


def _adamw(lr: float, warmup_steps: int = 2000) -> OptimConfig:
    """The paper's optimiser: AdamW alone, warm-up, then a cosine to 1e-6.

    Peak rates are our guesses (the paper's are in no copy that we found; STARFlow's release has 6.4e-5), and so are
    warm-up, clipping and the average of weights, of which the paper says nothing. Weight decay is on every weight,
    norms and biases included (docs/choices.md#paper-size).
    """
    return OptimConfig(
        lr=lr,
        matrix_lr=0.0,
        weight_decay=1e-4,
        warmup_steps=warmup_steps,
        decay_share=1.0,
        decay="cosine",
        min_lr=1e-6,
        ema=0.999,
    )


def paper() -> RunConfig:
    """The paper's own size and stages: 3.68 B trained beside a language model of 7.6 B; 800, 200 and 80 M documents.

    About 9,600 H100-hours at 40 % of peak (`starflow2 info paper --gpus 64`). The paper reports GenEval 0.51 after
    stage t2i and 0.82 after joint, DPG 84.94. This recipe has not been trained here. Batch sizes and numbers of
    documents are the paper's; what is a guess of ours is listed in docs/choices.md#paper-size, the mixtures among it.
    """
    stages = (
        StageConfig(
            name="fae",
            steps=1_000_000,
            batch=512,
            optim=_adamw(1e-4, 1000),
            perceptual=0.5,
            adversarial=0.1,
        ),
        StageConfig(name="t2i", steps=781_250, batch=1024, optim=_adamw(1e-4)),
        StageConfig(name="adapter", steps=195_312, batch=1024, optim=_adamw(1e-4), text_mean="token"),
        StageConfig(name="joint", steps=78_125, batch=1024, optim=_adamw(5e-5), text_mean="token"),
    )
    return RunConfig(model=paper_model(), stages=tuple(map(_paper_run, stages)), precision="bfloat16")


def _paper_run(stage: StageConfig) -> StageConfig:
    """A stage in shards over its corpora, below `corpora/` in the current folder; interleaved ones in longer rows."""
    rows, width = (2, 4096) if stage.name == "joint" else (8, 1024)
    corpus = CorpusConfig(mixture=str(MIXTURES / f"paper-{stage.name}.json"), rows=rows, width=width, workers=4)
    shard = ShardConfig(mode="fsdp")
    return replace(stage, shard=shard, corpus=corpus, save_every=2000, keep_last=3, keep_every=20_000)


def paper_siglip() -> RunConfig:
    """`paper` with the features of SigLIP2 so400m (256 px, 16x16 patches of 16) in place of DINOv2-g's."""
    run = paper()
    features = SiglipConfig(image_size=256, patch_size=16, width=1152, depth=27, heads=16, mlp_width=4304)
    model = replace(
        run.model,
        name="paper-siglip",
        features=features,
        features_from=Pretrained(source="google/siglip2-so400m-patch16-256"),
        fae=_fae(1152, (4608, 18), VIT),
    )
    return replace(run, model=model)


def mini() -> RunConfig:
    """One consumer GPU of 24 GB: 0.5 B trained over Qwen2.5-VL-3B, 16 M + 4 M + 4 M documents, batch 128.

    This recipe has not been trained here; `starflow2 info mini --gpus 1 --gpu-memory 24` plans its training.
    """
    steps = {"fae": 100_000, "t2i": 125_000, "adapter": 31_250, "joint": 31_250}
    rows = {"fae": 4, "t2i": 4, "adapter": 2, "joint": 1}  # of 1024 positions, 2048 in joint
    run = paper()
    stages = (
        replace(
            stage,
            steps=steps[stage.name],
            batch=128,
            save_every=500,
            keep_every=5000,
            shard=ShardConfig(),
            checkpoint_activations="all" if stage.name in ("adapter", "joint") else "trained",
            corpus=replace(stage.corpus, rows=rows[stage.name], width=2048 if stage.name == "joint" else 1024),
        )
        for stage in run.stages
    )
    return replace(run, model=mini_model(), stages=tuple(stages))


# -- in miniature --------------------------------------------------------------------------------------


MINI_SIZE, MINI_GRID, MINI_LATENT = 64, (4, 4), 8  # pixels, latents and channels of a model in miniature
MINI_WIDTH = 64  # of all its streams


def smoke(run: RunConfig) -> RunConfig:
    """A run cut to a few steps of tiny batches.

    Models larger than nano also get tiny widths, fresh weights, and images of the drawn world's size. Its processes
    hold whole copies.
    """
    small = smoke_at_size(run)
    if small.model == run.model:
        return small
    drawn = (replace(stage, corpus=replace(stage.corpus, mixture="")) for stage in small.stages)
    return replace(small, model=_at_world_size(small.model), stages=tuple(drawn))


def smoke_at_size(run: RunConfig) -> RunConfig:
    """A run cut to a few steps as `smoke` does it, but its images and latents keep their size and grid.

    A model whose images are not of the drawn world's size needs a mixture, here as in earnest.
    """
    stages = tuple(_short(stage) for stage in run.stages)
    is_large = run.model.references or run.model.flow.deep.stack.width > nano_model().flow.deep.stack.width
    model = _narrow(run.model) if is_large else run.model
    return replace(run, model=model, stages=stages, precision="auto" if is_large else run.precision)


def _short(stage: StageConfig) -> StageConfig:
    return replace(
        stage,
        steps=4,
        batch=4,
        optim=replace(stage.optim, warmup_steps=1),
        save_every=2,
        keep_last=1,
        keep_every=0,
        shard=ShardConfig(),
        corpus=replace(stage.corpus, rows=2, workers=0),
    )


def _narrow(model: ModelConfig) -> ModelConfig:
    """A model of these classes, conventions, image size and grids in widths of 64, two layers each.

    Fresh components take the place of pretrained ones, and a vocabulary for a tokenizer that is trained here.
    """
    width, has_own = MINI_WIDTH, isinstance(model.features, ExtractorConfig)

    def block(cfg: BlockConfig) -> BlockConfig:
        context = width * (2 if model.joints.words else 1) if cfg.context_dim else 0
        stack, waves = _narrow_stack(cfg.stack), 32 if cfg.noise_waves else 0
        return replace(cfg, stack=stack, context_dim=context, noise_waves=waves)

    return replace(
        model,
        name=f"{model.name}-smoke",
        features=_narrow_features(model.features)
        if isinstance(model.features, DinoConfig | SiglipConfig)
        else model.features,
        features_from=None,
        vlm=replace(
            model.vlm,
            vocab=512,
            width=width,
            depth=2,
            heads=2,
            kv_heads=1,
            mlp_width=128,
            mrope_section=(4, 6, 6),
            special=NANO_SPECIAL,
            vision_width=32,
            vision_depth=2,
            vision_heads=2,
            vision_mlp_width=64,
            vision_whole=(1,) if model.vlm.vision_whole else (),
            vision_deepstack=(0,) if model.vlm.vision_deepstack else (),
            head_dim=0,
        ),
        vlm_from=None,
        fae=_narrow_fae(model.fae, has_own) if isinstance(model.fae, FaeConfig) else model.fae,
        flow=replace(model.flow, deep=block(model.flow.deep), shallow=tuple(map(block, model.flow.shallow))),
        joints=replace(model.joints, adapter_width=width, noise_width=32),
    )


def _narrow_stack(cfg: StackConfig) -> StackConfig:
    return replace(cfg, width=MINI_WIDTH, depth=min(2, cfg.depth), head_dim=32)


def _narrow_features(cfg: DinoConfig | SiglipConfig) -> DinoConfig | SiglipConfig:
    narrow = replace(cfg, width=MINI_WIDTH, depth=2, heads=2)
    return replace(narrow, mlp_width=128) if isinstance(narrow, SiglipConfig) else narrow


def _narrow_fae(cfg: FaeConfig, is_own: bool) -> FaeConfig:
    """is_own: its features are of a user's class, whose width stays."""
    return replace(
        cfg,
        feature_dim=cfg.feature_dim if is_own else MINI_WIDTH,
        encoder_width=MINI_WIDTH,
        encoder_heads=2,
        feature_decoder=_narrow_stack(cfg.feature_decoder),
        pixel_decoder=_narrow_stack(cfg.pixel_decoder),
    )


def _at_world_size(model: ModelConfig) -> ModelConfig:
    """The model with the drawn world's images, 64 pixels a side, in 4x4 latents."""
    codec: FaeConfig | PatchConfig
    if isinstance(model.fae, CodecConfig) or isinstance(model.features, ExtractorConfig):
        return model  # its class decides
    if isinstance(model.fae, PatchConfig):
        codec = replace(model.fae, image_size=MINI_SIZE, patch_size=MINI_SIZE // MINI_GRID[0])
    else:
        codec = replace(model.fae, latent_dim=MINI_LATENT, grid=MINI_GRID, image_size=MINI_SIZE)
    deep, *shallow = (
        replace(block, dim=codec.latent_dim, grid=MINI_GRID) for block in (model.flow.deep, *model.flow.shallow)
    )
    tower = 2 * model.vlm.vision_patch  # pixels of a side of a merged token
    vlm = replace(
        model.vlm,
        image_size=MINI_GRID[0] * tower,
        vision_window=2 * tower if model.vlm.vision_window else 0,
        pixels=None if model.vlm.pixels is None else replace(model.vlm.pixels, picture_size=MINI_SIZE),
    )
    features = None if model.features is None else _features_at_world_size(model.features)
    flow = replace(model.flow, deep=deep, shallow=tuple(shallow))
    return replace(model, features=features, vlm=vlm, fae=codec, flow=flow)


def _features_at_world_size(cfg: DinoConfig | SiglipConfig) -> DinoConfig | SiglipConfig:
    """4x4 patches of 64 px images, resized where the large one resizes, its positions interpolated likewise."""
    pixels = None if cfg.pixels is None else replace(cfg.pixels, picture_size=MINI_SIZE)
    patch = cfg.patch_size if pixels is not None else MINI_SIZE // MINI_GRID[0]
    small = replace(cfg, image_size=MINI_GRID[0] * patch, patch_size=patch, pixels=pixels)
    return replace(small, table_size=6 * patch) if isinstance(small, DinoConfig) and small.table_size else small


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "nano": nano,
    "nano-end-to-end": nano_end_to_end,
    "nano-final": nano_final,
    "nano-grown": nano_grown,
    "nano-patches": nano_patches,
    "mini": mini,
    "paper": paper,
    "paper-siglip": paper_siglip,
}


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
    recipe = find_object(name, "a recipe")
    try:
        signature(recipe).bind()  # a function that needs arguments is no recipe
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot use {name!r} as a recipe: {error}.") from error
    with foreign_code(name, "a recipe"), importable_folder():
        run = recipe()
    if not isinstance(run, RunConfig):
        raise ConfigError(f"recipe {name!r} gave {type(run).__name__}; expected a function that returns RunConfig.")
    return run


def find_config(name: str) -> ModelConfig:
    """The sizes of a recipe (its name, or module:function) or of a model folder.

    Raises ConfigError for an unknown recipe and CheckpointError for a folder that holds no model.

    >>> find_config("nano").name
    'nano'
    """
    if Path(name).is_dir():
        return read_config(Path(name)).model
    return find(name).model
