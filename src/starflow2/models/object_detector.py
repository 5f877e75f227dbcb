"""Objects and their colours in images, by a Mask2Former and a CLIP of transformers: a judge of drawn images.

It follows what GenEval does with mmdet and open_clip: boxes of instance masks, and colours of crops whose background is
painted grey. Weights differ from GenEval's, so its scores are another judge's.
Letters: B images, Q queries, K classes, h, w pixels, E width of CLIP's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import CheckpointError
from starflow2.models.huggingface import quiet

__all__ = ["COCO_NAMES", "DetectedObject", "ObjectDetector"]

COCO_NAMES: Final = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # GenEval's
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of colours, ImageNet's
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE: Final = 800  # as the published weights were trained
MULTIPLE: Final = 32  # of its input's sides
GREY: Final = 0x99 / 255  # outside of an object's mask
TEMPLATES: Final = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
LEAST_SCORE: Final = 0.3  # of what is worth reporting


@dataclass(frozen=True, slots=True)
class DetectedObject:
    """A named box (x0, y0, x1, y1) in pixels. mask: (h, w) bool."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor


class ObjectDetector:
    """Instances of the 80 classes of COCO, and colours of instances.

    >>> ObjectDetector.load("mask2former-folder", "clip-folder")  # doctest: +SKIP
    """

    def __init__(self, detector: Any, clip: Any, tokenizer: Any, side: int = SIDE) -> None:
        """detector, clip, tokenizer: Mask2FormerForUniversalSegmentation, CLIPModel, CLIPTokenizer of transformers.

        side: pixels of the shorter side of images that the detector sees.
        """
        self.detector, self.clip, self.tokenizer, self.side = detector.eval(), clip.eval(), tokenizer, side
        self._colors: dict[tuple[str, tuple[str, ...]], Tensor] = {}

    @classmethod
    def load(cls, detector: str, clip: str, device: str | torch.device = "cpu") -> ObjectDetector:
        """Both models from folders or Hub ids. Raises CheckpointError for anything else, or where scipy is missing."""
        from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

        kinds: tuple[Any, Any] = (Mask2FormerForUniversalSegmentation, CLIPModel)  # whose annotations are too narrow
        try:
            with quiet():
                found, colors = (k.from_pretrained(n).to(device) for k, n in zip(kinds, (detector, clip), strict=True))
                return cls(found, colors, AutoTokenizer.from_pretrained(clip))
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot load {detector} and {clip}: {str(error).strip().splitlines()[0]} Expected a Mask2Former for "
                "instances and a CLIP of transformers; the first also needs scipy."
            ) from error

    @property
    def device(self) -> torch.device:
        device: torch.device = self.detector.device
        return device

    @inference_defaults()
    def detect(self, image: Tensor) -> list[DetectedObject]:
        """Objects in an image (3, h, w) in [0, 1], the most certain first."""
        pixels = _normalised(_resized(image, self.side), MEAN, DEVIATION).to(self.device)
        out = self.detector(pixel_values=pixels)
        return self._instances(out.class_queries_logits[0], out.masks_queries_logits[0], image.shape[1:])

    def _instances(self, classes: Tensor, masks: Tensor, size: Sequence[int]) -> list[DetectedObject]:
        """Objects of logits (Q, K + 1), (Q, h', w'): the likeliest pairs of query and class, as many as queries."""
        chances = classes.softmax(-1)[:, :-1]  # (Q, K)
        best, index = chances.flatten().topk(min(len(classes), chances.numel()))
        logits = F.interpolate(masks[None], tuple(size), mode="bilinear", align_corners=False)[0]  # (Q, h, w)
        found = []
        for chance, pair in zip(best.tolist(), index.tolist(), strict=True):
            query, kind = divmod(pair, chances.shape[1])
            inside = logits[query] > 0
            if not inside.any():
                continue
            score = chance * float(logits[query].sigmoid()[inside].mean())
            if score > LEAST_SCORE:
                name = self.detector.config.id2label[kind]
                found.append(DetectedObject(COCO_NAMES.get(name, name), score, _box(inside), inside.cpu()))
        return sorted(found, key=lambda one: -one.score)

    @inference_defaults()
    def color(self, image: Tensor, found: DetectedObject, colors: Sequence[str]) -> str:
        """The colour among `colors` that fits an object in an image (3, h, w) in [0, 1] best."""
        painted = torch.where(found.mask, image, torch.full_like(image, GREY))
        x0, y0, x1, y1 = (round(value) for value in found.box)
        crop = painted[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        side = self.clip.config.vision_config.image_size
        pixels = _normalised(_center(_resized(crop, side), side), CLIP_MEAN, CLIP_DEVIATION)
        seen = _embedding(self.clip.get_image_features(pixel_values=pixels.to(self.device)))  # (1, E)
        likeness = F.normalize(seen, dim=-1) @ self._of_colors(found.name, tuple(colors)).T
        return colors[int(likeness.argmax())]

    def _of_colors(self, name: str, colors: tuple[str, ...]) -> Tensor:
        """Embeddings (colors, E) of a class in each colour, means over templates."""
        key = (name, colors)
        if key not in self._colors:
            rows = []
            for color in colors:
                texts = [template.format(color=color, name=name) for template in TEMPLATES]
                tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
                own = F.normalize(_embedding(self.clip.get_text_features(**tokens)), dim=-1)
                rows.append(F.normalize(own.mean(0), dim=-1))
            self._colors[key] = torch.stack(rows)
        return self._colors[key]


def _embedding(out: Any) -> Tensor:
    """CLIP's embedding, which newer transformers wrap into an output object."""
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found


def _box(inside: Tensor) -> tuple[float, float, float, float]:
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


def _resized(image: Tensor, side: int) -> Tensor:
    """(1, 3, h, w): an image whose shorter side is `side`, both rounded to what the models take."""
    height, width = image.shape[1:]
    scale = side / min(height, width)
    step = MULTIPLE if side % MULTIPLE == 0 else 1
    size = [max(side, round(length * scale / step) * step) for length in (height, width)]
    resized = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def _center(image: Tensor, side: int) -> Tensor:
    top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
    return image[:, :, top : top + side, left : left + side]


def _normalised(image: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    shift, scale = (image.new_tensor(values)[:, None, None] for values in (mean, deviation))
    return (image - shift) / scale
