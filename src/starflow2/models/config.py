"""Configs of a model and its components: sizes, special token ids and sampling defaults, as frozen dataclasses.

`ModelConfig` holds all others; its constructor checks that they fit together. No networks and no transformers here, so
that reading a recipe is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from starflow2.core.fields import Config, Depth, Extent, Natural, Positive, Size, Weight
from starflow2.errors import ConfigError
from starflow2.flow import FlowConfig
from starflow2.flow.affine import Schedule
from starflow2.flow.noise import NoiseConfig
from starflow2.models.pretrained import Pretrained
from starflow2.nn import StackConfig

__all__ = [
    "CLIP_COLOURS",
    "HALF_COLOURS",
    "IMAGENET_COLOURS",
    "CodecConfig",
    "Colours",
    "DinoConfig",
    "ExtractorConfig",
    "FaeConfig",
    "JointsConfig",
    "LanguageConfig",
    "ModelConfig",
    "PatchConfig",
    "PixelConfig",
    "SelfCheckConfig",
    "SiglipConfig",
    "SpecialIds",
]


Colours = tuple[
    tuple[float, float, float], tuple[float, float, float]
]  # means, deviations of red, green, blue in [0, 1]
CLIP_COLOURS: Colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # of Qwen's tower
IMAGENET_COLOURS: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of DINOv2
HALF_COLOURS: Colours = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of SigLIP


def _check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(f"{name} is {value}; expected a multiple of {of} {divisor}.")


@dataclass(frozen=True, kw_only=True)
class PixelConfig(Config):
    """Resizing and normalisation that turn images in [-1, 1] into the input of a pretrained vision tower."""

    picture_size: Size  # pixels, square, of the images given; they are resized to the size that the tower reads
    mean: tuple[float, float, float] = HALF_COLOURS[0]  # of red, green, blue in [0, 1]
    std: tuple[Positive, Positive, Positive] = HALF_COLOURS[1]


@dataclass(frozen=True, kw_only=True)
class DinoConfig(Config):
    """Shape of a DINOv2; `image_size` and `patch_size` in pixels."""

    image_size: Size
    patch_size: Size
    width: Size
    depth: Depth
    heads: Size
    swiglu: bool = False
    table_size: Extent = 0  # pixels that the position embeddings cover, interpolated to image_size; 0 = image_size
    pixels: PixelConfig | None = None  # None: reads images of image_size in [-1, 1] unchanged

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_multiple("width", self.width, "heads", self.heads)


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(Config):
    """Shape of the vision half of a SigLIP; `image_size` and `patch_size` in pixels."""

    image_size: Size
    patch_size: Size
    width: Size
    depth: Depth
    heads: Size
    mlp_width: Size
    pixels: PixelConfig | None = None  # None: reads images of image_size in [-1, 1] unchanged

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_multiple("width", self.width, "heads", self.heads)


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig(Config):
    """A feature extractor of your own, named by its class, with the sizes that the FAE is built for."""

    extractor: str  # module:Class, an nn.Module with the members of `protocols.FeatureExtractor`; its weights stay
    feature_dim: Size
    grid: tuple[Size, Size]  # rows and columns of patches
    settings: dict[str, bool | int | float | str] = field(default_factory=dict)  # arguments of the class


@dataclass(frozen=True)
class SpecialIds(Config):
    """Token ids that the sequence layout needs."""

    pad: Natural
    user: Natural
    assistant: Natural
    end: Natural
    vision_start: Natural
    vision_end: Natural
    image_pad: Natural


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(Config):
    """Shape of a language model and its vision tower: a Qwen2.5-VL, or what the class `stream` makes of these sizes."""

    vocab: Size
    width: Size
    depth: Depth
    heads: Size
    kv_heads: Size
    mlp_width: Size
    mrope_section: tuple[Natural, Natural, Natural]
    special: SpecialIds
    vision_width: Size
    vision_depth: Depth
    vision_heads: Size
    vision_mlp_width: Size
    vision_patch: Size  # pixels; two by two patches merge into one token
    image_size: Size  # pixels, square, of images that the tower reads
    rope_theta: Positive = 1e6
    ties_embeddings: bool = True
    vision_window: Extent = 0  # pixels, side of the window of the tower's windowed layers; 0 = the image
    vision_whole: tuple[Natural, ...] = ()  # layers of the tower that attend to the whole image; () = all
    vision_deepstack: tuple[Natural, ...] = ()  # layers of the tower that feed inner layers of the language model, too
    pixels: PixelConfig | None = None  # None: reads images of image_size in [-1, 1] unchanged
    head_dim: Extent = 0  # channels of a head; 0 = width / heads
    stream: str = "starflow2.models.qwen:QwenStream"  # module:Class, a `huggingface.Backbone` and `LanguageStream`

    @property
    def head_width(self) -> int:
        """Channels of an attention head of the language model."""
        return self.head_dim or self.width // self.heads

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_dim:
            _check_multiple("width", self.width, "heads", self.heads)
        _check_multiple("heads", self.heads, "kv_heads", self.kv_heads)
        _check_multiple("vision_width", self.vision_width, "vision_heads", self.vision_heads)
        if (largest := max(vars(self.special).values())) >= self.vocab:
            raise ConfigError(f"special has the id {largest}; expected ids below vocab, which is {self.vocab}.")
        if min(self.image_size, self.vision_window or self.image_size) < 2 * self.vision_patch:
            raise ConfigError(
                f"image_size is {self.image_size} and vision_window {self.vision_window}; expected two patches of "
                f"{self.vision_patch} at least, or no window."
            )
        if 2 * sum(self.mrope_section) != self.head_width:
            raise ConfigError(
                f"mrope_section is {self.mrope_section}; expected three numbers whose sum is half of "
                f"{self.head_width}, the channels of a head."
            )

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of merged vision tokens."""
        side = self.image_size // (2 * self.vision_patch)
        return side, side


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Sizes of all components of a model, and the sampling defaults that it was tuned for."""

    name: str
    # feature extractor that the FAE reads: a known one, one of your own, or None without an FAE
    features: DinoConfig | SiglipConfig | ExtractorConfig | None
    vlm: LanguageConfig
    fae: FaeConfig | PatchConfig | CodecConfig  # the codec: an FAE, pixel patches, or one of your own
    flow: FlowConfig
    joints: JointsConfig
    guidance: Weight = 2.0  # 0 = off
    guidance_schedule: Schedule = "constant"
    edit_guidance: Weight | None = None  # of an image that follows another in its conversation; None = guidance
    prior_scale: Positive = 0.65  # 1 = exact sampling
    max_prompt_tokens: Size = 256
    max_positions: Size = 4096  # of one conversation
    self_check: SelfCheckConfig | None = None  # how the model checks its own images; None: it has not learnt to
    # -log density in nats per dim, without words, beyond which an image is unlike all of training; None: not measured
    far_nats: float | None = None
    features_from: Pretrained | None = None  # pretrained source of the extractor; None: its weights are in the folder
    vlm_from: Pretrained | None = None  # pretrained source of the language model and its tower; None: likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        deep, codec = self.flow.deep, self.fae
        if (codec.latent_dim, codec.grid) != (deep.dim, deep.grid):
            raise ConfigError(
                f"fae has {codec.grid} latents of {codec.latent_dim} channels, flow.deep {deep.grid} of {deep.dim}; "
                "expected the same."
            )
        if self.features is None and isinstance(codec, FaeConfig):
            raise ConfigError(
                "features is None but fae is a FaeConfig, which needs a feature extractor. "
                "Set features, or use a PatchConfig."
            )
        if self.features is not None and not isinstance(codec, FaeConfig):
            raise ConfigError(
                f"features are given but fae is a {type(codec).__name__}, which reads pixels. Set features to None."
            )
        if isinstance(self.features, ExtractorConfig):
            self._check_own_extractor(self.features)
        if deep.num_latents + 2 > self.max_positions:  # with begin and end; more would also fill the memory
            raise ConfigError(
                f"max_positions is {self.max_positions}; expected room for an image, {deep.num_latents + 2} positions."
            )
        if self.flow.noise is None:
            raise ConfigError("flow.noise is None; a model samples at the noise levels it was trained at, so set them.")

    def _check_own_extractor(self, features: ExtractorConfig) -> None:
        codec = cast(FaeConfig, self.fae)  # see __post_init__
        given, wanted = (features.feature_dim, features.grid), (codec.feature_dim, codec.grid)
        if given != wanted or self.features_from is not None:
            raise ConfigError(
                f"features has (feature_dim, grid) {given} and features_from is {self.features_from}; expected those "
                f"of fae, {wanted}, and None: a class of your own brings its weights itself."
            )

    @property
    def noise(self) -> NoiseConfig:
        """Noise levels at which the flow is trained."""
        return cast(NoiseConfig, self.flow.noise)  # never None, see __post_init__

    @property
    def draw_level(self) -> float:
        """Noise level at which images are drawn (standard deviation, on standardised latents)."""
        return self.noise.noise_max

    @property
    def upload_level(self) -> float:
        """Noise level that is added to images which the user gives."""
        return self.noise.noise_min

    @property
    def references(self) -> dict[str, Pretrained]:
        """Pretrained components whose weights are outside the model folder, by their names in `Components`."""
        refs = {"features": self.features_from, "vlm": self.vlm_from}
        return {name: ref for name, ref in refs.items() if ref is not None}


@dataclass(frozen=True, kw_only=True)
class SelfCheckConfig(Config):
    """How a model checks an image of its own: by yes-or-no questions in which {} stands for the user's words.

    Where `shows` is "", it is asked about the objects that the words name, one by one; where `done` is "", an image
    that follows another is not checked.
    """

    shows: str = ""  # does an image show what the words ask for?
    done: str = ""  # of an image that follows another: was it done, and nothing else changed?
    tries: Size = 4  # images of one request, of which the model keeps the one that it confirms

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shows", "done"):
            value = getattr(self, name)
            if value and value.count("{}") != 1:
                raise ConfigError(f'{name} is {value!r}; expected a question with one {{}} for the words, or "".')


@dataclass(frozen=True, kw_only=True)
class FaeConfig(Config):
    """Sizes and loss weights of the feature auto-encoder (FAE).

    A last linear layer covers what the upsamplings leave of the pixels of each latent.
    """

    feature_dim: Size
    latent_dim: Size
    grid: tuple[Size, Size]
    image_size: Size  # pixels, square
    encoder_width: Size  # width of q, k, v and skip of the one attention layer
    encoder_heads: Size
    feature_decoder: StackConfig
    pixel_decoder: StackConfig
    pixel_channels: tuple[Size, ...] = (
        48,
        24,
        12,
    )  # after each upsampling by two; () = none (FAE paper's ViT)
    noise_max: Weight = 0.6  # in training, latents are decoded under noise of a level from U(0, noise_max)
    kl_weight: Weight = 1e-3  # nats per latent channel
    feature_weight: Weight = 0.25
    edge_weight: Weight = 1.0  # of L1 on the Laplacian pyramid; plain L1 has weight 1

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, left = self.grid[0], self.image_size // (self.grid[0] * 2 ** len(self.pixel_channels))
        if left < 1 or left * rows * 2 ** len(self.pixel_channels) != self.image_size:
            raise ConfigError(
                f"image_size is {self.image_size}; expected a multiple of {rows} rows of latents times "
                f"2^{len(self.pixel_channels)} of the upsamplings in pixel_channels."
            )
        _check_multiple("encoder_width", self.encoder_width, "encoder_heads", self.encoder_heads)

    @property
    def pixels_per_step(self) -> int:
        """Side in pixels of the square that one position of the pixel decoder's last layer draws."""
        return self.image_size // (self.grid[0] * 2 ** len(self.pixel_channels))


@dataclass(frozen=True, kw_only=True)
class PatchConfig(Config):
    """Sizes of pixel patches, and the statistics that standardise each colour channel."""

    image_size: Size  # pixels, square
    patch_size: Size  # pixels, square
    mean: tuple[float, float, float]  # of red, green and blue in [-1, 1], over training images
    std: tuple[Positive, Positive, Positive]  # their standard deviations

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size is {self.image_size} and patch_size {self.patch_size}; "
                "expected image_size to be a multiple of patch_size."
            )

    @property
    def latent_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image_size // self.patch_size,) * 2


@dataclass(frozen=True, kw_only=True)
class CodecConfig(Config):
    """A codec of your own, named by its class, with the sizes that the flow is built for."""

    codec: str  # module:Class, an nn.Module with the members of `protocols.Codec`; its weights stay as they are
    latent_dim: Size
    grid: tuple[Size, Size]
    image_size: Size  # pixels, square
    settings: dict[str, bool | int | float | str] = field(default_factory=dict)  # arguments of the class


@dataclass(frozen=True, kw_only=True)
class JointsConfig(Config):
    """Sizes of the joints between the streams: adapter, skips and the view of the previous image."""

    adapter_width: Size  # hidden width of the adapter's MLP
    noise_width: Size = 64  # width of the adapter's embedding of the noise level
    # Our additions, off in the paper:
    adapter_stencil: bool = False  # the adapter also reads the latents left of and above the target
    # Side (odd) of the window of previous-image latents, centred on the target, that the flow also reads; 0: none
    reference: Extent = 0
    words: bool = False  # the flow also reads the embedding of each text token beside its state

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference and self.reference % 2 == 0:
            raise ConfigError(f"reference is {self.reference}; expected 0 or the odd side of a window.")
