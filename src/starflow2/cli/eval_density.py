"""`starflow2 eval likelihood`: the density that a model gives to images, at named noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from starflow2.cli.eval_drawing import show_result
from starflow2.cli.options import Device, JsonFile, Model, check_json, progress, refuse
from starflow2.cli.parsing import Option
from starflow2.errors import UsageError

__all__ = ["EvalLikelihood"]


@dataclass(frozen=True, kw_only=True)
class EvalLikelihood:
    """Nats and bits per latent dimension of images, beside a fitted Gaussian's, and the way to the prior and back."""

    verb: ClassVar[str] = "eval likelihood"

    images: Annotated[
        Path | None,
        Option("the first images of a folder, by name", metavar="FOLDER", default="the drawn world's dev split"),
    ] = None
    count: Annotated[int, Option("images to score")] = 64
    levels: Annotated[
        tuple[float, ...], Option("noise levels", metavar="LEVEL", default="the lowest, and that of drawing")
    ] = ()
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        if self.count < 2:
            raise UsageError(f"--count is {self.count}; expected at least 2 images.")
        from starflow2.benchmarks.likelihood import score_density
        from starflow2.evals.codec import codec_pictures
        from starflow2.pipeline import StarFlow2

        with progress("scoring", "images") as step:
            model = StarFlow2.from_pretrained(self.model, device=self.device)
            images = codec_pictures(self.images, model.components.codec.image_size, "dev", self.count)
            result = score_density(model, images, self.levels or None, step)
        return show_result(result, self.json)
