"""StarFlow2, the public face: load a model by name, folder or Hub id, draw, save, share.

Everything it does is a call into generate and checkpoint. Not here: training and scoring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from starflow2.checkpoint import load_parts, save_parts, write_config
from starflow2.errors import CheckpointError, ConfigError, DeviceError, PromptError, nearest
from starflow2.generate import DrawConfig, draw
from starflow2.images import Picture as Image
from starflow2.images import to_pil
from starflow2.parts import Parts

__all__ = ["Picture", "StarFlow2", "pick_device"]

NANO = Path(__file__).parent / "assets" / "nano"


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn picture, what was asked for, and the seed that draws it again."""

    image: Image
    prompt: str
    seed: int
    settings: dict[str, Any]


def pick_device(name: str = "auto") -> torch.device:
    """ "auto", "cpu", "cuda[:i]" or "mps" as a device. Raises DeviceError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in there:
        raise DeviceError(f"device is {name!r}; expected auto, cpu, cuda or mps.{nearest(kind, there)}")
    if not there[kind]:
        raise DeviceError(f"device is {name!r}, but this machine has none; use --device cpu.")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        raise DeviceError(f"device is {name!r}: {str(error).splitlines()[0]}") from error


class StarFlow2(ModelHubMixin, library_name="starflow2", tags=["normalizing-flow", "text-to-image"]):
    """A trained model that draws pictures from words.

    >>> model = StarFlow2.from_pretrained("nano")  # doctest: +SKIP
    >>> model.generate("two red hearts", n=4)[0].image.save("hearts.png")  # doctest: +SKIP
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @property
    def device(self) -> torch.device:
        return self.parts.device

    # -- pictures -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        config: DrawConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Picture]:
        """`n` pictures of each prompt, prompt by prompt; picture j of any prompt has seed + j.

        The same prompt and seed give the same picture (<= 1e-4) whatever else is in the call.
        Raises PromptError for an empty, overlong or unknown-word prompt, ConfigError for n < 1.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if n < 1:
            raise ConfigError(f"n is {n}; expected at least 1 picture per prompt.")
        if not -(2**63) <= seed <= 2**63 - n:
            raise ConfigError(f"seed is {seed}; expected a 64-bit integer.")
        for prompt in prompts:
            self.check_prompt(prompt)
        config = config or DrawConfig.for_model(self.parts)
        asked = [(p, seed + j) for p in prompts for j in range(n)]
        images = self.draw([p for p, _ in asked], [s for _, s in asked], config, progress)
        settings = {
            "guidance": config.guidance,
            "prior_scale": config.prior_scale,
            "cleanup": config.cleanup,
            "model": self.parts.cfg.name,
        }
        return [Picture(to_pil(image), prompt, s, settings) for image, (prompt, s) in zip(images, asked, strict=True)]

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: DrawConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """One image per (prompt, seed) as a tensor (B, 3, height, width) in [-1, 1], unchecked."""
        config = config or DrawConfig.for_model(self.parts)
        heard = [self._as_learnt(p) for p in prompts]
        return draw(self.parts, heard, seeds, config, progress).images.cpu()

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        """images (B, 3, h, w) through the FAE and back, with noise on the latents if asked."""
        with torch.no_grad():
            latents = self.parts.codec.encode(images.to(self.device))
            eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
            return self.parts.fae.decode(latents + noise_level * eps.to(latents)).cpu()

    @property
    def sampling_noise(self) -> float:
        """Noise level of sampled latents (standard deviation, on standardised latents)."""
        noise = self.parts.cfg.flow.noise
        return 0.0 if noise is None else noise.noise_max

    def check_prompt(self, prompt: str) -> None:
        """Raise PromptError for what this model cannot draw: nothing, too much, unknown words."""
        if not _words(prompt):
            raise PromptError("the prompt is empty; say what to draw, for instance 'two red hearts'.")
        assert self.parts.tokenizer is not None
        count = len(self.parts.tokenizer.drawing_prompt(self._as_learnt(prompt)))
        limit = self.parts.cfg.max_prompt_tokens
        if count > limit:
            raise PromptError(f"the prompt has {count} tokens; this model reads up to {limit}.")
        unknown = [w for w in _words(prompt) if self.parts.lexicon and w not in self.parts.lexicon]
        if unknown:
            listed = ", ".join(dict.fromkeys(repr(w) for w in unknown))
            raise PromptError(
                f"this model never learnt {listed}.{nearest(unknown[0], self.parts.lexicon)} "
                f"It knows {len(self.parts.lexicon)} words: shapes, colours, sizes, places, counts."
            )

    def _as_learnt(self, prompt: str) -> str:
        """A model with a lexicon has seen lower case and single spaces only: other text is other tokens."""
        return " ".join(prompt.lower().split()) if self.parts.lexicon else prompt

    # -- files and Hub --------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **hub: Any) -> str | None:
        """Write the model folder, whole or not at all, and a model card; `hub` goes to huggingface_hub."""
        save_parts(self.parts, save_directory)  # first: the mixin begins by deleting config.json
        url: str | None = super().save_pretrained(save_directory, **hub)
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        write_config(self.parts, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path = "nano", *, device: str = "auto", **hub: Any
    ) -> StarFlow2:
        """A model by name ("nano"), folder or Hub id; `hub` goes to huggingface_hub's download.

        Raises CheckpointError for anything that is no whole starflow2 model, DeviceError.
        """
        known = ["device", *inspect.signature(snapshot_download).parameters]
        for option in hub:
            if option not in known:
                raise ConfigError(f"unknown option {option!r} of from_pretrained.{nearest(option, known)}")
        where = pick_device(device)
        return cls(load_parts(_locate(name, hub), where))


def _words(prompt: str) -> list[str]:
    return re.findall(r"[^\s.,;:!?]+", prompt.lower())


def _locate(name: str | Path, hub: dict[str, Any]) -> Path:
    if str(name) == "nano":
        return NANO
    try:
        if Path(name).exists():
            return Path(name)
    except OSError as error:
        raise CheckpointError(f"there is no model {str(name)[:40]!r}...: {error.strerror}.") from error
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no model {str(name)!r}: no such folder, and no Hub id (owner/name)."
            f"{nearest(str(name), ['nano'])}"
        )
    try:
        return Path(snapshot_download(str(name), **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot fetch {name} from the Hub: {reason}") from error
