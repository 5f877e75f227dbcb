"""`starflow2 edit`: change an image as an instruction says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from starflow2.cli.notes import far, note, unlike
from starflow2.cli.options import (
    Device,
    Guidance,
    ImageFile,
    JsonFile,
    Model,
    PngFile,
    PriorScale,
    Seed,
    Tries,
    check_json,
    check_png,
    check_seed,
    check_tries,
    console,
    load_joint,
    note_confidence,
    png_text,
    refuse,
    say,
    write_json,
)
from starflow2.cli.parsing import Option, Positional

__all__ = ["Edit"]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Change an image as an instruction says."""

    verb: ClassVar[str] = "edit"

    image: Positional[ImageFile]
    instruction: Positional[Annotated[str, Option("what to change, in quotes", metavar="INSTRUCTION")]]
    output: PngFile = Path("out.png")
    seed: Seed = 0
    tries: Tries = None
    guidance: Guidance = None
    prior_scale: PriorScale = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_seed(self.seed)
        check_tries(self.tries)
        check_png(self.output)
        check_json(self.json)
        from starflow2.core.images import save_png
        from starflow2.inference.config import DrawConfig

        model = load_joint(self.model, self.device, self.verb)
        config = DrawConfig.for_model(model.components, guidance=self.guidance, prior_scale=self.prior_scale)
        with console(stderr=True).status("drawing"):
            made = model.edit(self.image, self.instruction, seed=self.seed, tries=self.tries, config=config)
        about = png_text(self.instruction, self.seed, made.settings)
        save_png(made.image, self.output, about | {"source": str(self.image)})
        say(self.output)
        note_confidence(made)
        note("the image is what it was before; other words may help." if made.is_unchanged else "")
        note(far(model, self.image))
        note(unlike(model.components, self.instruction, "edit"))
        facts = {"file": str(self.output), "image": str(self.image), "instruction": self.instruction}
        facts_of_image = {"seed": made.seed, "settings": made.settings, "gain": made.gain}
        checks = {"confidence": made.confidence, "is_unchanged": made.is_unchanged}
        write_json(facts | facts_of_image | checks, self.json)
        return 0
