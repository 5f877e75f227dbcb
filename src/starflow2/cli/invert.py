"""`starflow2 invert`: the latent code of an image, and images decoded from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow2.cli.notes import far, note
from starflow2.cli.options import (
    Device,
    ImageFile,
    JsonFile,
    Model,
    PngFile,
    check_json,
    check_png,
    console,
    load_joint,
    refuse,
    say,
    write_json,
)
from starflow2.cli.parsing import Option, Positional
from starflow2.core.serialize import JsonObject

if TYPE_CHECKING:
    from starflow2.pipeline import StarFlow2

__all__ = ["Invert"]


@dataclass(frozen=True, kw_only=True)
class Invert:
    """Find the latent code from which a prompt draws an image, and decode it again.

    The reconstruction goes to --output. With --swap, the image that another prompt draws from the same code is
    written beside it, as FILE-swap.png.
    """

    verb: ClassVar[str] = "invert"

    image: Positional[ImageFile]
    prompt: Positional[Annotated[str, Option('what the image shows, in quotes; "" for no prompt', metavar="PROMPT")]]
    output: PngFile = Path("out.png")
    swap: Annotated[str | None, Option("also draw this from the same code", metavar="PROMPT")] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        beside = self.output.with_name(f"{self.output.stem}-swap{self.output.suffix}")
        files = [self.output] if self.swap is None else [self.output, beside]
        for path in files:
            check_png(path)
        check_json(self.json)
        model = load_joint(self.model, self.device, self.verb)
        facts = self._drawn(model, files)
        print(f"code: {facts['log_prob']:.3f} nats, {facts['bits']:.3f} bits, {facts['nats_per_dim']:.4f} -nats/dim")
        print(f"reconstruction: {facts['psnr_db']:.1f} dB PSNR")
        say(*files)
        note(far(model, self.image))
        write_json(facts, self.json)
        return 0

    def _drawn(self, model: StarFlow2, files: Sequence[Path]) -> JsonObject:
        """Invert the image, decode the code, write the files; return the facts for --json."""
        from starflow2.core.images import psnr, read_picture, save_png, to_tensor

        for words in filter(None, (self.prompt.strip(), self.swap)):
            model.check_prompt(words)
        image = read_picture(self.image, model.components.cfg.fae.image_size)
        with console(stderr=True).status("drawing"):
            code = model.invert(image, self.prompt)
            prompts = [self.prompt] if self.swap is None else [self.prompt, self.swap]
            drawn = [model.from_code(code, prompt) for prompt in prompts]
        for picture, prompt, path in zip(drawn, prompts, files, strict=True):
            about = {"prompt": prompt, "source": str(self.image), "inverted with": self.prompt}
            save_png(picture, path, about | {"model": model.components.cfg.name})
        return {
            "image": str(self.image),
            "prompt": self.prompt,
            "swap": self.swap,
            "files": [str(path) for path in files],
            "log_prob": code.log_prob,
            "bits": code.log_prob / math.log(2),
            "nats_per_dim": -code.log_prob / code.z.numel(),
            "psnr_db": float(psnr(to_tensor(drawn[0])[None], image[None])),
            "model": model.components.cfg.name,
        }
