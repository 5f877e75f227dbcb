"""Every size of a model as data: no networks here, and no transformers, so that reading a recipe is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from starflow2.errors import ConfigError
from starflow2.flow import FlowConfig
from starflow2.flow.affine import Schedule
from starflow2.flow.noise import NoiseConfig
from starflow2.models.pretrained import Pretrained
from starflow2.nn import StackConfig

__all__ = [
    "DinoConfig",
    "FaeConfig",
    "JointsConfig",
    "LanguageConfig",
    "ModelConfig",
    "PatchConfig",
    "PixelConfig",
    "SiglipConfig",
    "SpecialIds",
]


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """How pictures in [-1, 1] become what a pretrained tower was trained on."""

    picture_size: int  # pixels, square, of the pictures that come; resized to what the tower reads
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Shape of a DINOv2; `image_size` and `patch_size` in pixels."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    swiglu: bool = False
    table_size: int = 0  # pixels that the table of positions covers, interpolated to image_size; 0 = those
    pixels: PixelConfig | None = None  # None: pictures of image_size in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Shape of the vision half of a SigLIP; `image_size` and `patch_size` in pixels."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    pixels: PixelConfig | None = None  # None: pictures of image_size in [-1, 1]


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that the sequence layout needs."""

    pad: int
    user: int
    assistant: int
    end: int
    vision_start: int
    vision_end: int
    image_pad: int


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Shape of a Qwen2.5-VL, language model and vision tower; head dim = width / heads."""

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    mrope_section: tuple[int, int, int]
    special: SpecialIds
    vision_width: int
    vision_depth: int
    vision_heads: int
    vision_mlp_width: int
    vision_patch: int  # pixels; two by two patches merge into one token
    image_size: int  # pixels, square, of pictures the tower reads
    rope_theta: float = 1e6
    ties_embeddings: bool = True
    vision_window: int = 0  # pixels a windowed layer of the tower sees at once; 0 = the picture
    vision_whole: tuple[int, ...] = ()  # layers of the tower that see the whole picture; () = all
    pixels: PixelConfig | None = None  # None: pictures of image_size in [-1, 1]

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of merged vision tokens."""
        side = self.image_size // (2 * self.vision_patch)
        return side, side


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every size of a model, and the sampling defaults it was tuned for."""

    name: str
    features: DinoConfig | SiglipConfig | None  # what the FAE reads; None where there is no FAE
    vlm: LanguageConfig
    fae: FaeConfig | PatchConfig  # the codec: an FAE, or patches of pixels in its place
    flow: FlowConfig
    joints: JointsConfig
    guidance: float = 2.0  # 0 = off
    guidance_schedule: Schedule = "constant"
    edit_guidance: float | None = None  # of a picture that follows another in its conversation; None: as `guidance`
    prior_scale: float = 0.65  # 1 = exact sampling
    max_prompt_tokens: int = 256
    max_positions: int = 4096  # of one conversation
    features_from: Pretrained | None = None  # where the frozen extractor comes from; None: trained and kept by us
    vlm_from: Pretrained | None = None  # the same of the language model and its tower

    def __post_init__(self) -> None:
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
        if self.features is not None and isinstance(codec, PatchConfig):
            raise ConfigError("features are given but fae is a PatchConfig, which reads pixels. Set features to None.")
        if self.flow.noise is None:
            raise ConfigError("flow.noise is None; a model samples at the noise levels it was trained at, so set them.")

    @property
    def noise(self) -> NoiseConfig:
        """Noise levels that the flow is trained at."""
        return cast(NoiseConfig, self.flow.noise)  # checked above

    @property
    def draw_level(self) -> float:
        """Noise level at which images are drawn (standard deviation, on standardised latents)."""
        return self.noise.noise_max

    @property
    def upload_level(self) -> float:
        """Noise level at which images from outside enter."""
        return self.noise.noise_min

    @property
    def references(self) -> dict[str, Pretrained]:
        """The parts that a model folder only refers to, by their names in `Components`."""
        refs = {"features": self.features_from, "vlm": self.vlm_from}
        return {name: ref for name, ref in refs.items() if ref is not None}


@dataclass(frozen=True, kw_only=True)
class FaeConfig:
    """Sizes of the auto-encoder. What its upsamplings leave of the pixels per latent, one linear map spells out."""

    feature_dim: int
    latent_dim: int
    grid: tuple[int, int]
    image_size: int  # pixels, square
    encoder_width: int  # width of q, k, v and skip of the one attention layer
    encoder_heads: int
    feature_decoder: StackConfig
    pixel_decoder: StackConfig
    pixel_channels: tuple[int, ...] = (48, 24, 12)  # after each upsampling by two; () = none (the FAE paper's ViT)
    noise_max: float = 0.6  # latents are decoded under noise U(0, noise_max) in training
    kl_weight: float = 1e-3  # nats per latent channel
    feature_weight: float = 0.25
    edge_weight: float = 1.0  # L1 on the Laplacian pyramid, beside plain L1

    def __post_init__(self) -> None:
        rows, left = self.grid[0], self.image_size // (self.grid[0] * 2 ** len(self.pixel_channels))
        if left < 1 or left * rows * 2 ** len(self.pixel_channels) != self.image_size:
            raise ConfigError(
                f"image_size is {self.image_size}; expected a multiple of {rows} rows of latents times "
                f"2^{len(self.pixel_channels)} of the upsamplings in pixel_channels."
            )

    @property
    def pixels_per_step(self) -> int:
        """Side in pixels of what one position of the pixel decoder's last layer draws."""
        return self.image_size // (self.grid[0] * 2 ** len(self.pixel_channels))


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Sizes of the patches, and the statistics that bring each colour to zero mean and unit variance."""

    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    mean: tuple[float, float, float]  # of red, green and blue in [-1, 1], over training pictures
    std: tuple[float, float, float]  # their standard deviations

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size is {self.image_size} and patch_size {self.patch_size}; "
                "expected a picture of whole patches: image_size a multiple of patch_size."
            )
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std}; expected three numbers above 0.")

    @property
    def latent_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image_size // self.patch_size,) * 2


@dataclass(frozen=True, kw_only=True)
class JointsConfig:
    """Shape of the adapter and of the ways between the streams."""

    adapter_width: int  # hidden width of the adapter's MLP
    noise_width: int = 64  # width of the adapter's embedding of the noise level
    adapter_stencil: bool = False  # the adapter also reads the latents left and above (our choice, off in the paper)
    # the flow also reads the picture before around the target's place: side of that window of latents, odd; 0 = not at
    # all (our choice, likewise)
    reference: int = 0
    words: bool = False  # the flow also reads each token's own embedding beside its state (our choice, likewise)

    def __post_init__(self) -> None:
        if self.reference < 0 or (self.reference and self.reference % 2 == 0):
            raise ConfigError(f"reference is {self.reference}; expected 0 or the odd side of a window of latents.")
