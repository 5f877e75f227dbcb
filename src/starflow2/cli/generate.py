"""`starflow2 generate`: draw images from prompts, or reply in text and images, and write the files."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from starflow2.cli.notes import note, unlike
from starflow2.cli.options import (
    PROGRAM,
    Device,
    Guidance,
    Model,
    PriorScale,
    Tries,
    check_seed,
    check_tries,
    load_joint,
    note_confidence,
    png_text,
    printable,
    progress,
    refuse,
    say,
)
from starflow2.cli.parsing import Option, Positional
from starflow2.core.files import check_writable, named_place
from starflow2.core.serialize import JsonObject
from starflow2.core.text import read_lines
from starflow2.errors import OutputError, PromptError, UsageError, printable_line

if TYPE_CHECKING:
    from starflow2.core.images import PILImage
    from starflow2.inference.config import DrawConfig
    from starflow2.inference.session import Session
    from starflow2.pipeline import Drawing, StarFlow2

__all__ = ["Generate"]

MAX_IMAGES = 2**16  # per prompt
REPLY_TOKENS, REPLY_IMAGES = 256, 4  # at most, of one interleaved reply


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Draw images from prompts.

    One image is written to --output; several become a contact sheet there. If --output is a folder, every image gets
    a file of its own, beside the sheet. Every PNG file carries prompt, seed and settings. With --mode interleaved the
    model itself decides how to reply, in text and images; the images go to out-1.png, out-2.png, ...
    """

    verb: ClassVar[str] = "generate"

    prompt: Positional[Annotated[tuple[str, ...], Option("what to draw, in quotes", metavar="PROMPT")]] = ()
    mode: Annotated[Literal["image", "interleaved"], Option("draw images, or let the model reply")] = "image"
    n: Annotated[int, Option("images per prompt, with consecutive seeds", short="-n")] = 1
    tries: Tries = None
    seed: Annotated[int, Option("seed of the first image of each prompt")] = 0
    guidance: Guidance = None
    prior_scale: PriorScale = None
    cleanup: Annotated[
        Literal["none", "tweedie", "iterative"], Option("denoise sampled latents (models before stage joint)")
    ] = "none"
    batch: Annotated[int | None, Option("images drawn at once", default="32")] = None
    prompts: Annotated[Path | None, Option("a file with more prompts, one per line", metavar="FILE")] = None
    output: Annotated[str, Option("a .png file, or a folder", metavar="PATH", short="-o")] = "out.png"
    json: Annotated[bool, Option("print the results as a JSON list on standard output")] = False
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        prompts = [*self.prompt, *(read_lines(self.prompts) if self.prompts is not None else [])]
        if not prompts:
            raise PromptError('there is nothing to draw: give a prompt, such as "two pink hearts".')
        if not 1 <= self.n <= MAX_IMAGES:
            raise UsageError(f"-n is {self.n}; expected at least 1 image per prompt, and at most {MAX_IMAGES}.")
        check_tries(self.tries)
        check_seed(self.seed, self.n)
        if self.mode == "interleaved":
            return self._reply(prompts)
        files = _plan(self.output, prompts, range(self.seed, self.seed + self.n))
        model, drawings, seconds = self._draw(prompts)
        pace = seconds / len(drawings)
        _save(drawings, files)
        if self.json:
            _print_json([_row(drawing, path, pace) for drawing, path in zip(drawings, files.each, strict=True)])
        else:
            say(*files.all)
        for drawing in drawings:
            note_confidence(drawing)
        for prompt in prompts:
            note(unlike(model.components, prompt, "draw"))
        return 0

    def _config(self, model: StarFlow2) -> DrawConfig:
        from starflow2.inference.config import DrawConfig

        return DrawConfig.for_model(
            model.components,
            guidance=self.guidance,
            prior_scale=self.prior_scale,
            cleanup=self.cleanup,
            batch=self.batch,
        )

    def _draw(self, prompts: list[str]) -> tuple[StarFlow2, list[Drawing], float]:
        from starflow2.pipeline import StarFlow2

        with progress("drawing", "latents") as step:
            model = StarFlow2.from_pretrained(self.model, device=self.device)
            config = self._config(model)
            started = time.perf_counter()
            drawings = model.generate(prompts, n=self.n, seed=self.seed, tries=self.tries, config=config, progress=step)
            return model, drawings, time.perf_counter() - started

    def _reply(self, prompts: list[str]) -> int:
        """Let the model reply to one prompt; write nothing before the reply is complete."""
        if len(prompts) > 1 or self.n > 1:
            raise UsageError(
                f"--mode interleaved replies once to one prompt, got {len(prompts)} with -n {self.n}; "
                f"{PROGRAM} chat takes several turns."
            )
        if self.tries is not None:
            raise UsageError("--tries belongs to --mode image; in --mode interleaved the model replies once.")
        if self.batch is not None:
            raise UsageError("--batch belongs to --mode image; --mode interleaved draws one image after the other.")
        (prompt,) = prompts
        paths = _numbered(self.output, prompt)
        model = load_joint(self.model, self.device, "--mode interleaved")
        config = self._config(model)
        blocks = _replied(model.session(seed=self.seed, config=config).add(prompt))
        settings = config.recorded() | {"model": model.components.cfg.name}
        rows = _save_blocks(blocks, paths, png_text(prompt, self.seed, settings))
        if self.json:
            _print_json(rows)
        else:
            for row in rows:
                print(printable(row.get("text") or printable_line(row["file"])))
        return 0


def _replied(session: Session) -> list[str | PILImage]:
    """The model's reply: text and images in order."""
    from starflow2.inference.events import Drew, Made, Wrote

    blocks: list[str | PILImage] = []
    with progress("drawing", "latents") as step:
        for event in session.run(tokens=REPLY_TOKENS, pictures=REPLY_IMAGES):
            match event:
                case Drew():
                    step(event.done, event.total)
                case Made():
                    blocks.append(event.image)
                case Wrote() if blocks and isinstance(blocks[-1], str):
                    blocks[-1] += event.text
                case Wrote():
                    blocks.append(event.text)
    return blocks


def _numbered(output: str, prompt: str) -> list[Path]:
    """A file name for every image that a reply can hold: out-1.png, ... or folder/two-red-hearts-1.png, ..."""
    (one,) = _plan(output, [prompt], [""]).each
    paths = [one.with_name(f"{one.stem}-{i}.png") for i in range(1, REPLY_IMAGES + 1)]
    for path in paths:
        check_writable(path)
    return paths


def _save_blocks(blocks: Sequence[str | PILImage], paths: Sequence[Path], about: dict[str, str]) -> list[JsonObject]:
    """Write the images; return one JSON row per block, with its text or its file."""
    from starflow2.core.images import save_png

    rows: list[JsonObject] = []
    left = iter(paths)
    for block in blocks:
        if isinstance(block, str):
            rows.append({"text": printable(block).strip()})
        else:
            path = next(left)
            save_png(block, path, about)
            rows.append({"file": str(path)})
    return [row for row in rows if row != {"text": ""}]


def _print_json(rows: Sequence[JsonObject]) -> None:
    is_unicode = "utf" in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    print(json.dumps(rows, indent=1, ensure_ascii=not is_unicode))


@dataclass(frozen=True, slots=True)
class _Files:
    """Where images go. each: the file of each image; sheet: the contact sheet of several, which can be that file."""

    each: list[Path]
    sheet: Path | None

    @property
    def all(self) -> list[Path]:
        """Every file once."""
        return list(dict.fromkeys([*self.each, *([self.sheet] if self.sheet else [])]))


def _plan(output: str, prompts: Sequence[str], seeds: Sequence[object]) -> _Files:
    """File names of everything that will be written. Raises OutputError if one of them cannot be.

    In a folder, a file is named after its prompt and its seed.
    """
    count, path = len(prompts) * len(seeds), named_place(output, "--output", OutputError)
    if output.endswith(("/", "\\")) or path.is_dir():
        names = ["-".join(filter(None, (_slug(prompt), str(seed)))) for prompt in prompts for seed in seeds]
        counts: dict[str, int] = {"sheet": 1}
        each = [path / f"{_unique(name, counts)}.png" for name in names]
        files = _Files(each, path / "sheet.png" if count > 1 else None)
    elif path.suffix.lower() != ".png":
        raise OutputError(f"--output is {output}; expected a name that ends in .png, or in / for a folder.")
    else:
        files = _Files([path] * count, path if count > 1 else None)
    for file in files.all:
        check_writable(file)
    return files


def _slug(prompt: str) -> str:
    """A prompt as a file name: "two pink hearts" -> two-red-hearts."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "image"


def _unique(name: str, counts: dict[str, int]) -> str:
    """`name`, numbered from its second use on."""
    counts[name] = counts.get(name, 0) + 1
    return name if counts[name] == 1 else f"{name}-{counts[name]}"


def _save(drawings: Sequence[Drawing], files: _Files) -> None:
    """Write the contact sheet, and the files of single images."""
    from starflow2.core.images import contact_sheet, save_png

    if files.sheet is not None:
        labels = [drawing.prompt for drawing in drawings]
        columns = min(8, max(4, round(len(drawings) ** 0.5)))
        first = drawings[0]
        about = png_text("\n".join(dict.fromkeys(labels)), first.seed, first.settings)
        about["pictures"] = json.dumps([{"prompt": d.prompt, "seed": d.seed} for d in drawings], ensure_ascii=False)
        save_png(contact_sheet([d.image for d in drawings], labels, columns), files.sheet, about)
    for drawing, path in zip(drawings, files.each, strict=True):
        if path != files.sheet:
            save_png(drawing.image, path, png_text(drawing.prompt, drawing.seed, drawing.settings))


def _row(drawing: Drawing, path: Path, seconds: float) -> JsonObject:
    made_of = {"prompt": drawing.prompt, "seed": drawing.seed, "settings": drawing.settings}
    gain = {} if drawing.gain is None else {"gain": drawing.gain}
    sure = {} if drawing.confidence is None else {"confidence": drawing.confidence}
    return {"file": str(path), **made_of, **gain, **sure, "seconds": round(seconds, 4)}
