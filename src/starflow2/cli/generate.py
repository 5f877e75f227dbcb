"""`starflow2 generate`: draw pictures from prompts, or reply in words and pictures, and write the files."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from starflow2.cli.conversation import conversing
from starflow2.cli.options import (
    PROGRAM,
    Device,
    Guidance,
    Model,
    PriorScale,
    check_seed,
    own,
    png_text,
    printable,
    progress,
    refuse,
)
from starflow2.core.files import check_writable
from starflow2.errors import ConfigError, DataError, OutputError, PromptError

if TYPE_CHECKING:
    from starflow2.core.images import PILImage
    from starflow2.inference.config import DrawConfig
    from starflow2.inference.session import Session
    from starflow2.pipeline import Drawing, StarFlow2

__all__ = [
    "Generate",
]


REPLY_TOKENS, REPLY_PICTURES = 256, 4  # what one interleaved reply may hold


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Draw pictures from words.

    One picture is written to --output. Several become a contact sheet there; where --output is a folder, one file each
    beside the sheet. Every PNG carries prompt, seed and settings. With --mode interleaved the model replies to the
    prompt as it sees fit, in words and pictures: out-1.png, out-2.png, ...
    """

    verb: ClassVar[str] = "generate"

    prompt: Positional[Annotated[tuple[str, ...], arg(metavar="PROMPT", help="what to draw, in quotes")]] = ()
    mode: Annotated[Literal["image", "interleaved"], arg(help="a picture, or whatever the model replies")] = "image"
    n: Annotated[int, arg(aliases=("-n",), help="pictures of each prompt, seeds counting on")] = 1
    keep: Annotated[Literal["all", "best"], arg(help="best: of each prompt the one that it explains best")] = "all"
    seed: Annotated[int, arg(help="seed of the first picture of each prompt")] = 0
    guidance: Guidance = None
    prior_scale: PriorScale = None
    cleanup: Annotated[Literal["none", "tweedie"], arg(help="denoise the sampled latents")] = "none"
    batch: Annotated[int | None, own("INT", "pictures at once", "32")] = None
    prompts: Annotated[Path | None, own("FILE", "more prompts, one on each line", "")] = None
    output: Annotated[str, arg(aliases=("-o",), metavar="PATH", help="a .png file, or a folder")] = "out.png"
    json: Annotated[bool, arg(help="tell what was made as a JSON list on standard output")] = False
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        prompts = [*self.prompt, *_lines(self.prompts)]
        if not prompts:
            raise PromptError('there is nothing to draw: give a prompt, for instance "two red hearts".')
        if self.n < 1:
            raise ConfigError(f"-n is {self.n}; expected at least 1 picture per prompt.")
        if self.keep == "best" and self.n < 2:
            raise ConfigError(
                f"--keep best chooses among the pictures of a prompt; -n is {self.n}, expected 2 or more."
            )
        check_seed(self.seed, self.n)
        if self.mode == "interleaved":
            return self._converse(prompts)
        seeds = ["best"] if self.keep == "best" else range(self.seed, self.seed + self.n)
        files = _plan(self.output, prompts, seeds)
        pictures, seconds = self._draw(prompts)
        pace = seconds / len(pictures)
        if self.keep == "best":
            pictures = [_best(pictures[i : i + self.n]) for i in range(0, len(pictures), self.n)]
        written = _save(pictures, files)
        if self.json:
            _print_json([_row(picture, path, pace) for picture, path in zip(pictures, written, strict=True)])
        else:
            for path in dict.fromkeys([*written, *([files.sheet] if files.sheet else [])]):
                print(path)
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

    def _draw(self, prompts: list[str]) -> tuple[list[Drawing], float]:
        from starflow2.pipeline import StarFlow2

        with progress("drawing", "latents") as step:
            model = StarFlow2.from_pretrained(self.model, device=self.device)
            config = self._config(model)
            if self.keep == "best" and not (model.is_joint and config.guidance):
                done = ", ".join(model.components.finished_stages)
                raise ConfigError(
                    "--keep best compares pictures by what the prompt adds to their likelihood, which takes guidance "
                    f"and a model with stage joint; --guidance is {config.guidance:g} and this model has {done}."
                )
            started = time.perf_counter()
            pictures = model.generate(prompts, n=self.n, seed=self.seed, config=config, progress=step)
            return pictures, time.perf_counter() - started

    def _converse(self, prompts: list[str]) -> int:
        """Let the model reply to one prompt; nothing is written before the reply is whole."""
        if len(prompts) > 1 or self.n > 1:
            raise ConfigError(
                f"--mode interleaved replies to one prompt once, not to {len(prompts)} with -n {self.n}; "
                f"{PROGRAM} chat takes turn after turn."
            )
        if self.batch is not None:
            raise ConfigError("--batch is of --mode image; --mode interleaved makes one reply, picture after picture.")
        (prompt,) = prompts
        paths = _numbered(self.output, prompt)
        model = conversing(self.model, self.device, "--mode interleaved")
        config = self._config(model)
        blocks = _replied(model.session(seed=self.seed, config=config).add(prompt))
        settings = config.told() | {"model": model.components.cfg.name}
        rows = _save_blocks(blocks, paths, png_text(prompt, self.seed, settings))
        if self.json:
            _print_json(rows)
        else:
            for row in rows:
                print(row.get("text") or row["file"])
        return 0


def _best(pictures: Sequence[Drawing]) -> Drawing:
    """The one to whose likelihood the prompt adds most."""
    return max(pictures, key=lambda picture: -math.inf if picture.gain is None else picture.gain)


def _replied(session: Session) -> list[str | PILImage]:
    """What the model replies: words and pictures in order."""
    from starflow2.inference.events import Drew, Made, Wrote

    blocks: list[str | PILImage] = []
    with progress("drawing", "latents") as step:
        for event in session.run(tokens=REPLY_TOKENS, pictures=REPLY_PICTURES):
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
    """Names of the pictures of a reply, as many as there can be: out-1.png, ... or folder/two-red-hearts-1.png, ..."""
    one = _plan(output, [prompt], [""]).each
    assert one is not None
    paths = [one[0].with_name(f"{one[0].stem}-{i}.png") for i in range(1, REPLY_PICTURES + 1)]
    for path in paths:
        check_writable(path)
    return paths


def _save_blocks(
    blocks: Sequence[str | PILImage], paths: Sequence[Path], about: dict[str, str]
) -> list[dict[str, Any]]:
    """Write the pictures among the blocks and list all of them in order, by text or file."""
    from starflow2.core.images import save_png

    rows: list[dict[str, Any]] = []
    left = iter(paths)
    for block in blocks:
        if isinstance(block, str):
            rows.append({"text": printable(block).strip()})
        else:
            path = next(left)
            save_png(block, path, about)
            rows.append({"file": str(path)})
    return [row for row in rows if row != {"text": ""}]


def _print_json(rows: Sequence[dict[str, Any]]) -> None:
    print(json.dumps(rows, indent=1, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class _Files:
    """Where pictures go: a file for each, or none, and a sheet of all, or none."""

    each: list[Path] | None
    sheet: Path | None


def _plan(output: str, prompts: Sequence[str], seeds: Sequence[object]) -> _Files:
    """Names of what will be written, all of it checked to be writable before anything is drawn.

    In a folder a name is that of the prompt, and which of `seeds` it is.
    """
    count, path = len(prompts) * len(seeds), Path(output)
    if output.endswith(("/", "\\")) or path.is_dir():
        names = ["-".join(filter(None, (_slug(prompt), str(seed)))) for prompt in prompts for seed in seeds]
        taken: dict[str, int] = {"sheet": 1}
        each = [path / f"{_unique(name, taken)}.png" for name in names]
        files = _Files(each, path / "sheet.png" if count > 1 else None)
    elif path.suffix.lower() != ".png":
        raise OutputError(f"--output is {output}; expected a name that ends in .png, or a folder with / at its end.")
    else:
        files = _Files([path], None) if count == 1 else _Files(None, path)
    for file in [*(files.each or []), *([files.sheet] if files.sheet else [])]:
        check_writable(file)
    return files


def _slug(prompt: str) -> str:
    """A prompt as a file name: "two red hearts" -> two-red-hearts."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "picture"


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}-{taken[name]}"


def _save(pictures: Sequence[Drawing], files: _Files) -> list[Path]:
    """Write them and say which file each picture is in."""
    from starflow2.core.images import contact_sheet, save_png

    if files.sheet is not None:
        labels = [picture.prompt for picture in pictures]
        columns = min(8, max(4, round(len(pictures) ** 0.5)))
        first = pictures[0]
        about = png_text("\n".join(dict.fromkeys(labels)), first.seed, first.settings)
        about["pictures"] = json.dumps([{"prompt": p.prompt, "seed": p.seed} for p in pictures], ensure_ascii=False)
        save_png(contact_sheet([p.image for p in pictures], labels, columns), files.sheet, about)
    if files.each is None:
        assert files.sheet is not None
        return [files.sheet] * len(pictures)
    for picture, path in zip(pictures, files.each, strict=True):
        save_png(picture.image, path, png_text(picture.prompt, picture.seed, picture.settings))
    return files.each


def _row(picture: Drawing, path: Path, seconds: float) -> dict[str, Any]:
    made_of = {"prompt": picture.prompt, "seed": picture.seed, "settings": picture.settings}
    gain = {} if picture.gain is None else {"gain": picture.gain}
    return {"file": str(path), **made_of, **gain, "seconds": round(seconds, 4)}


def _lines(path: Path | None) -> list[str]:
    """Prompts of a file, one on each line; blank lines are skipped."""
    if path is None:
        return []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"cannot read prompts from {path}: {reason}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
