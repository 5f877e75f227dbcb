"""Our model folders in the habits of transformers and diffusers; nothing else imports this module.
Letters: B prompts, T positions, I images, s pixels a side.

    import starflow2.hf  # registers what is below with AutoConfig, AutoModelForMultimodalLM and AutoProcessor
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForMultimodalLM.from_pretrained(folder)
    inputs = processor.apply_chat_template([{"role": "user", "content": "two pink hearts"}])
    pixels = model.generate(**inputs, generation_mode="image", seed=0)
    image = processor.post_process_multimodal_output(pixels, generation_mode="image")[0]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from starflow2.core.fields import conform
from starflow2.core.images import PILImage
from starflow2.core.text import shown
from starflow2.errors import ConfigError
from starflow2.inference import token_replies
from starflow2.inference.config import DrawConfig
from starflow2.models.checkpoint import load_words, save_words
from starflow2.models.config_file import KEYS, MODEL_TYPE
from starflow2.models.hub import find_model
from starflow2.pipeline import StarFlow2

__all__ = ["MultimodalOutput", "StarFlow2Config", "StarFlow2ForMultimodalLM", "StarFlow2Processor"]


class StarFlow2Config(PreTrainedConfig):
    """Contents of a model folder's config.json; a file that it writes is read by `StarFlow2`, too."""

    model_type = MODEL_TYPE

    def to_diff_dict(self) -> dict[str, object]:
        """Our own keys, without those that transformers adds to every config."""
        return {key: value for key, value in self.to_dict().items() if key in KEYS}


@dataclass
class MultimodalOutput(transformers.utils.ModelOutput):
    """Replies of words and images: their tokens alone, (B, T), and the images of all of them, (I, 3, s, s)."""

    sequences: Tensor
    pixels: Tensor | None = None


class StarFlow2ForMultimodalLM(PreTrainedModel):
    """A model behind transformers' `generate`. Sessions, edits and likelihoods: `model.starflow2`."""

    config_class, base_model_prefix, main_input_name = StarFlow2Config, "components", "input_ids"
    input_modalities, output_modalities = ["image", "text"], ("image", "text")

    def __init__(self, config: StarFlow2Config, starflow2: StarFlow2 | None = None) -> None:
        super().__init__(config)
        if starflow2 is None:
            raise ConfigError("a config alone has no weights; expected from_pretrained, of a model that was trained.")
        self.starflow2, self.components, self.training = starflow2, starflow2.components, starflow2.components.training

    @classmethod
    def from_pretrained(cls, name: Any, *_: Any, dtype: Any = None, device_map: Any = None, **options: Any) -> Self:
        """A model folder or Hub id. Raises ConfigError for options without a meaning here, and as `StarFlow2` does."""
        for given in (dtype, options.pop("torch_dtype", None)):
            if str(given) not in ("None", "auto", "float32", "torch.float32"):
                raise ConfigError(f"dtype is {shown(given)}; expected auto or float32, which the weights are in.")
        added = ("config", "from_auto", "trust_remote_code", "adapter_kwargs")  # by the Auto classes
        hub = {key: value for key, value in options.items() if value is not None and key.strip("_") not in added}
        model = StarFlow2.from_pretrained(name, device="cpu" if device_map is None else device_map, **hub)
        return cls(StarFlow2Config.from_pretrained(find_model(name, **hub)), model)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write a model folder as `StarFlow2.save_pretrained` does. Raises ConfigError for options it does not have."""
        ours = {name: options.pop(name) for name in ("push_to_hub", "repo_id", "model_card_kwargs") if name in options}
        token_replies.check_options(options, token_replies.SAVING)
        self.starflow2.save_pretrained(save_directory, **ours)

    def generate(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None, **wanted: Any
    ) -> Tensor | MultimodalOutput:
        """Reply to rows of `input_ids` (B, T), whose image slots stand for `pixel_values` (I, 3, s, s) in turn.

        By `generation_mode`: "text" returns the tokens given and made, (B, T + new); "image" pixels (B, 3, s, s) in
        [-1, 1]; "interleaved" a `MultimodalOutput`. num_return_sequences=n: n rows for each one given. Raises
        ConfigError for options beside `GenerationSettings`, DataError for slots that do not fit the images.
        """
        settings, layout = token_replies.GenerationSettings.of(wanted), self.components.layout
        prompts = token_replies.split_batch(self.components, input_ids, attention_mask, pixel_values)
        sampler = self.starflow2.sampler(DrawConfig.for_model(self.components, guidance=settings.guidance_scale))
        made, pixels = token_replies.joined(token_replies.replies_to_tokens(sampler, prompts, settings), layout)
        if settings.generation_mode == "text":
            return torch.cat([input_ids.cpu().repeat_interleave(settings.num_return_sequences, 0), made], dim=1)
        return MultimodalOutput(made, pixels) if pixels is None or settings.generation_mode != "image" else pixels


class StarFlow2Processor(ProcessorMixin):
    """Conversations to tokens and pixels, and replies back to words and images."""

    def __init__(self, folder: str | Path) -> None:
        self.words = load_words(folder)  # tokenizer, vocabulary and sizes

    @classmethod
    def from_pretrained(cls, name: Any, **options: Any) -> StarFlow2Processor:
        """That of a model folder or Hub id."""
        return cls(find_model(name, **{k: v for k, v in options.items() if v is not None and not k.startswith("_")}))

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write tokenizer, vocabulary and sizes, as far as they are not there: a model's folder has them already."""
        token_replies.check_options(options, token_replies.SAVING | {"push_to_hub": False})
        save_words(self.words, save_directory)

    def apply_chat_template(self, conversation: Any, **options: Any) -> BatchFeature:
        """Input of `generate` for one conversation or a list of them, in transformers' messages.

        [{"role": "user", "content": "text", or [{"type": "image", "image": a picture}, {"type": "text", "text": ...}]}]
        Returns input_ids (B, T), padded on the left, attention_mask, and pixel_values (I, 3, s, s) where there are
        images. Raises PromptError for other messages and unknown words, DataError and ShapeError for pictures.
        """
        options.pop("generation_mode", None)
        token_replies.check_options(options, token_replies.TEMPLATE)
        return BatchFeature(token_replies.token_batch(self.words, conversation))

    def __call__(self, *_: object, **__: object) -> BatchFeature:
        raise ConfigError("this processor reads conversations, not single texts; call apply_chat_template(messages).")

    def decode(self, outputs: Tensor, **_: object) -> Any:
        """Words of rows of tokens (B, T), a list, or of one row (T), a text; special tokens are left out."""
        return token_replies.decoded(self.words, outputs)

    batch_decode = decode

    def post_process_multimodal_output(
        self, outputs: Tensor | MultimodalOutput, generation_mode: token_replies.Mode = "text", **_: object
    ) -> list[str] | list[PILImage] | list[list[str | PILImage]]:
        """Texts, images, or for each reply a list of both in order: what `generate` returned in the same mode."""
        conform(token_replies.Mode, generation_mode, "generation_mode")
        if isinstance(outputs, MultimodalOutput):
            return token_replies.words_and_images(self.words, outputs.sequences, outputs.pixels)
        return token_replies.pictures(outputs) if generation_mode == "image" else self.decode(outputs)


transformers.AutoConfig.register(MODEL_TYPE, StarFlow2Config, exist_ok=True)
transformers.AutoModel.register(StarFlow2Config, StarFlow2ForMultimodalLM, exist_ok=True)
transformers.AutoModelForMultimodalLM.register(StarFlow2Config, StarFlow2ForMultimodalLM, exist_ok=True)
transformers.AutoProcessor.register(StarFlow2Config, StarFlow2Processor, exist_ok=True)
