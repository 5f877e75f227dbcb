"""`starflow2 score` and `invert`: exact likelihood of replies, and the latent code of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from starflow2.cli.conversation import ImageFile, PngFile, conversing
from starflow2.cli.options import (
    Device,
    JsonFile,
    Model,
    check_json,
    check_png,
    console,
    own,
    printable,
    refuse,
    write_json,
)
from starflow2.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from starflow2.inference.likelihood import PictureScore
    from starflow2.inference.likelihood import Score as Scored
    from starflow2.pipeline import StarFlow2

__all__ = [
    "Invert",
    "Score",
]


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Say how likely a reply is: exact log probability of words and pictures.

    The last part is the reply, those before it are what the user said and showed. A part that is the name of a file is
    a picture, any other is words.
    """

    verb: ClassVar[str] = "score"

    parts: Positional[Annotated[tuple[str, ...], arg(metavar="PART", help="words in quotes, or a picture file")]] = ()
    map: Annotated[Path | None, own("FILE", "show how unlikely each patch of a picture is", "")] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        if not self.parts:
            raise ConfigError("there is nothing to score: give a reply, and before it what it replies to.")
        if self.map is not None:
            if not _is_picture(self.parts[-1]):
                raise ConfigError(f"--map needs a picture as the reply, the last part; it is {self.parts[-1]!r}.")
            check_png(self.map, "--map")
        check_json(self.json)
        model = conversing(self.model, self.device, self.verb)
        parts = [_part(model, part) for part in self.parts]
        scored = model.score(parts[:-1], parts[-1:])
        console().print(_score_table(scored))
        if self.map is not None:
            print(_save_map(parts[-1], scored.pictures[-1], self.map))
        about = {"asked": list(self.parts[:-1]), "reply": self.parts[-1], "model": model.components.cfg.name}
        write_json(about | _score_facts(scored), self.json)
        return 0


def _is_picture(part: str) -> bool:
    """Whether the part is the name of a file. Raises DataError for one that only looks like it."""
    try:
        if Path(part).is_file():
            return True
    except (OSError, ValueError):  # too long for a name: words
        return False
    if part.lower().endswith(PICTURE_SUFFIXES):
        raise DataError(f"cannot read {part} as a picture: there is no such file.")
    return False


def _part(model: StarFlow2, part: str) -> str | Tensor:
    """A picture, read once, or words as they are. Raises DataError."""
    from starflow2.core.images import read_picture

    return read_picture(part, model.components.cfg.fae.image_size) if _is_picture(part) else part


def _score_table(scored: Scored) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="log probability of the reply", title_style="", caption_style="")
    table.add_column("")
    for name in ("nats", "bits", "-nats/dim"):
        table.add_column(name, justify="right")
    for token in scored.tokens:
        table.add_row(Text(printable(token.text.replace("Ġ", ""))), *_figures(token.log_prob))
    for picture in scored.pictures:
        label = f"picture, {picture.dims} dims at noise {picture.noise_level:g}"
        table.add_row(label, *_figures(picture.log_prob, picture.dims))
    table.add_section()
    table.add_row("all", *_figures(scored.log_prob))
    return table


def _figures(log_prob: float, dims: int | None = None) -> tuple[str, str, str]:
    per_dim = "" if dims is None else f"{-log_prob / dims:.4f}"
    return f"{log_prob:.3f}", f"{log_prob / math.log(2):.3f}", per_dim


def _score_facts(scored: Scored) -> dict[str, Any]:
    return {
        "log_prob": scored.log_prob,
        "bits": scored.log_prob / math.log(2),
        "tokens": [{"text": token.text, "log_prob": token.log_prob} for token in scored.tokens],
        "pictures": [_picture_facts(picture) for picture in scored.pictures],
    }


def _picture_facts(picture: PictureScore) -> dict[str, Any]:
    return {
        "log_prob": picture.log_prob,
        "bits": picture.log_prob / math.log(2),
        "nats_per_dim": picture.nats_per_dim,
        "dims": picture.dims,
        "noise_level": picture.noise_level,
        "shallow_logdet": picture.shallow_logdet,
        "patches": picture.patches.tolist(),
    }


def _save_map(image: str | Tensor, picture: PictureScore, path: Path) -> str:
    """Write the map and say what its colours mean."""
    from starflow2.core.heatmap import heat_map
    from starflow2.core.images import save_png, to_pil

    assert not isinstance(image, str)
    low, high = float(picture.patches.min()), float(picture.patches.max())
    about = {"likeliest": f"{high:.3f}", "unlikeliest": f"{low:.3f}", "unit": "nats per patch"}
    save_png(to_pil(heat_map(image, -picture.patches)), path, about)
    return f"{path}: blue patches are likely (up to {high:.1f} nats), yellow ones are not (down to {low:.1f})"


@dataclass(frozen=True, kw_only=True)
class Invert:
    """Find the code from which a prompt draws a picture, and draw from it again.

    The reconstruction goes to --output; what --swap draws from the same code goes beside it, as FILE-swap.png.
    """

    verb: ClassVar[str] = "invert"

    image: Positional[ImageFile]
    prompt: Positional[Annotated[str, arg(metavar="PROMPT", help='what the picture shows, in quotes; "" for no words')]]
    output: PngFile = Path("out.png")
    swap: Annotated[str | None, own("PROMPT", "draw this from the same code, too", "")] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        swapped = self.output.with_name(f"{self.output.stem}-swap{self.output.suffix}")
        files = [self.output] if self.swap is None else [self.output, swapped]
        for path in files:
            check_png(path)
        check_json(self.json)
        facts = self._drawn(conversing(self.model, self.device, self.verb), files)
        print(f"code: {facts['log_prob']:.3f} nats, {facts['bits']:.3f} bits, {facts['nats_per_dim']:.4f} -nats/dim")
        print(f"reconstruction: {facts['psnr_db']:.1f} dB PSNR")
        for path in files:
            print(path)
        write_json(facts, self.json)
        return 0

    def _drawn(self, model: StarFlow2, files: Sequence[Path]) -> dict[str, Any]:
        """Invert, draw, write; the facts for --json."""
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
