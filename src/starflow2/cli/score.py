"""`starflow2 score`: the exact log probability of a reply, text and images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow2.cli.options import (
    Device,
    JsonFile,
    Model,
    check_json,
    check_png,
    console,
    load_joint,
    printable,
    refuse,
    say,
    write_json,
)
from starflow2.cli.parsing import Option, Positional
from starflow2.core.serialize import JsonObject
from starflow2.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from starflow2.inference.likelihood import PictureScore
    from starflow2.inference.likelihood import Score as Scored
    from starflow2.pipeline import StarFlow2

__all__ = ["Score"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Compute the exact log probability of a reply, text or image.

    The last PART is the reply; those before it are the user's turn. A PART that is the name of a file is an image,
    anything else is text.
    """

    verb: ClassVar[str] = "score"

    parts: Positional[Annotated[tuple[str, ...], Option("text in quotes, or an image file", metavar="PART")]] = ()
    map: Annotated[Path | None, Option("draw a map of how likely each patch of the image is", metavar="FILE")] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        if not self.parts:
            raise UsageError("there is nothing to score: give a reply, preceded by what it replies to.")
        if self.map is not None:
            if not _is_image(self.parts[-1]):
                raise UsageError(f"--map needs an image as the reply, the last PART; it is {self.parts[-1]!r}.")
            check_png(self.map, "--map")
        check_json(self.json)
        from starflow2.core.images import read_picture

        model = load_joint(self.model, self.device, self.verb)
        parts = [_part(model, part) for part in self.parts]
        scored = model.score(parts[:-1], parts[-1:])
        console().print(_score_table(scored))
        if self.map is not None:
            image = read_picture(self.parts[-1], model.components.cfg.fae.image_size)
            say(_save_map(image, scored.pictures[-1], self.map))
        about = {"asked": list(self.parts[:-1]), "reply": self.parts[-1], "model": model.components.cfg.name}
        write_json(about | _score_facts(scored), self.json)
        return 0


def _is_image(part: str) -> bool:
    """True if the part is the name of a file. Raises DataError if it only looks like one."""
    try:
        if Path(part).is_file():
            return True
    except (OSError, ValueError):  # too long for a file name, so it is text
        return False
    if part.lower().endswith(IMAGE_SUFFIXES):
        raise DataError(f"cannot read {part} as an image: there is no such file.")
    return False


def _part(model: StarFlow2, part: str) -> str | Tensor:
    """The image of a file name as a tensor, or the text itself. Raises DataError."""
    from starflow2.core.images import read_picture

    return read_picture(part, model.components.cfg.fae.image_size) if _is_image(part) else part


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
        label = f"image, {picture.dims} dimensions at noise level {picture.noise_level:g}"
        table.add_row(label, *_figures(picture.log_prob, picture.dims))
    table.add_section()
    table.add_row("all", *_figures(scored.log_prob))
    return table


def _figures(log_prob: float, dims: int | None = None) -> tuple[str, str, str]:
    per_dim = "" if dims is None else f"{-log_prob / dims:.4f}"
    return f"{log_prob:.3f}", f"{log_prob / math.log(2):.3f}", per_dim


def _score_facts(scored: Scored) -> JsonObject:
    return {
        "log_prob": scored.log_prob,
        "bits": scored.log_prob / math.log(2),
        "tokens": [{"text": token.text, "log_prob": token.log_prob} for token in scored.tokens],
        "pictures": [_picture_facts(picture) for picture in scored.pictures],
    }


def _picture_facts(picture: PictureScore) -> JsonObject:
    return {
        "log_prob": picture.log_prob,
        "bits": picture.log_prob / math.log(2),
        "nats_per_dim": picture.nats_per_dim,
        "dims": picture.dims,
        "noise_level": picture.noise_level,
        "shallow_logdet": picture.shallow_logdet,
        "patches": picture.patches.tolist(),
    }


def _save_map(image: Tensor, picture: PictureScore, path: Path) -> str:
    """Write the map; return a line that explains its colours."""
    from starflow2.core.heatmap import heat_map
    from starflow2.core.images import save_png, to_pil

    low, high = float(picture.patches.min()), float(picture.patches.max())
    about = {"likeliest": f"{high:.3f}", "unlikeliest": f"{low:.3f}", "unit": "nats per patch"}
    save_png(to_pil(heat_map(image, -picture.patches)), path, about)
    return f"{path}: blue patches are likely (up to {high:.1f} nats), yellow ones unlikely (down to {low:.1f})"
