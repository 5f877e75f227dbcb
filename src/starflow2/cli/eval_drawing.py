"""`starflow2 eval geneval` and `eval dpg`: images in the published layouts, and scores from a judge's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar

from starflow2.cli.options import (
    Device,
    Guidance,
    JsonFile,
    Model,
    PriorScale,
    check_json,
    check_seed,
    console,
    progress,
    refuse,
    say,
    write_json,
)
from starflow2.cli.parsing import Option, Positional
from starflow2.core.files import check_writable
from starflow2.errors import UsageError

if TYPE_CHECKING:
    from starflow2.benchmarks.folders import DrawnFolder, Layout
    from starflow2.benchmarks.prompts import PromptRow
    from starflow2.benchmarks.results import Result

__all__ = [
    "DetectGeneval",
    "DrawDpg",
    "DrawGeneval",
    "DrawOptions",
    "DrawnImages",
    "ScoreDpg",
    "ScoreGeneval",
    "draw_rows",
    "show_result",
]

Made = TypeVar("Made")

WORDS_SHOWN = 12  # unknown words on the terminal; unread.json lists all

Prompts = Annotated[Path, Option("the benchmark's prompt file", metavar="FILE")]
GivenPrompts = Annotated[
    Path | None, Option("the prompt file that the images were drawn from", metavar="FILE", default="the folder's copy")
]
Folder = Annotated[Path, Option("where images go; an interrupted run goes on there", metavar="FOLDER")]
DrawnImages = Positional[Annotated[Path, Option("a folder of drawn images", metavar="FOLDER")]]
FirstSeed = Annotated[int, Option("image j of every prompt has seed + j")]
PlainTries = Annotated[int, Option("images drawn to keep the one that the model confirms")]
AtOnce = Annotated[int, Option("images drawn at once")]


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Options of every command that draws a folder."""

    out: Folder
    seed: FirstSeed = 42
    guidance: Guidance = None
    prior_scale: PriorScale = None
    tries: PlainTries = 1
    batch: AtOnce = 32
    model: Model = "nano"
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class DrawGeneval(DrawOptions):
    """Draw GenEval's prompts into its layout: 00000/metadata.jsonl, 00000/samples/0000.png.

    Prompts with words that the model never learnt are listed in unread.json and do not stop the others.
    """

    verb: ClassVar[str] = "eval geneval"

    prompts: Prompts
    samples: Annotated[int, Option("images of each prompt")] = 4

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        from starflow2.benchmarks.geneval import GenevalLayout
        from starflow2.benchmarks.prompts import read_geneval_prompts

        draw_rows(self, self.samples, GenevalLayout(), read_geneval_prompts(self.prompts))
        return 0


@dataclass(frozen=True, kw_only=True)
class DrawDpg(DrawOptions):
    """Draw DPG-Bench's prompts into its layout: a grid of two by two images for each, <prompt id>.png.

    Prompts with words that the model never learnt are listed in unread.json and do not stop the others.
    """

    verb: ClassVar[str] = "eval dpg"

    prompts: Annotated[Path, Option("a JSONL file of id and prompt, or the folder of text files", metavar="PATH")]

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        from starflow2.benchmarks.dpg import DpgLayout
        from starflow2.benchmarks.prompts import read_dpg_prompts

        draw_rows(self, 4, DpgLayout(), read_dpg_prompts(self.prompts))
        return 0


@dataclass(frozen=True, kw_only=True)
class ScoreGeneval:
    """Score a folder of GenEval's images from what a detector found in them, by GenEval's rules."""

    verb: ClassVar[str] = "eval geneval score"

    folder: DrawnImages
    detections: Annotated[Path, Option("detections.jsonl: one line an image, behind the judge's name", metavar="FILE")]
    prompts: GivenPrompts = None
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.benchmarks.geneval import score_folder
        from starflow2.benchmarks.prompts import read_geneval_prompts

        rows = None if self.prompts is None else read_geneval_prompts(self.prompts)
        return show_result(score_folder(self.folder, self.detections, rows), self.json)


@dataclass(frozen=True, kw_only=True)
class ScoreDpg:
    """Score a folder of DPG-Bench's grids from a judge's answers, by the official arithmetic and without its quirks."""

    verb: ClassVar[str] = "eval dpg score"

    folder: DrawnImages
    answers: Annotated[Path, Option("answers.jsonl: one line an answer, behind the judge's name", metavar="FILE")]
    questions: Annotated[Path, Option("DPG-Bench's questions, dpg_bench.csv", metavar="FILE")]
    prompts: GivenPrompts = None
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.benchmarks.dpg import score_folder
        from starflow2.benchmarks.prompts import read_dpg_prompts

        rows = None if self.prompts is None else read_dpg_prompts(self.prompts)
        return show_result(score_folder(self.folder, self.answers, self.questions, rows), self.json)


@dataclass(frozen=True, kw_only=True)
class DetectGeneval:
    """Detect objects and colours in a folder of GenEval's images with models of transformers.

    Another judge than GenEval's own, and labelled so: Mask2Former and CLIP as transformers runs them.
    """

    verb: ClassVar[str] = "eval geneval detect"

    folder: DrawnImages
    detector: Annotated[str, Option("a Mask2Former for COCO instances: folder or Hub id", metavar="NAME")]
    clip: Annotated[str, Option("a CLIP for the colours: folder or Hub id", metavar="NAME")]
    detections: Annotated[Path, Option("file to write", metavar="FILE")]
    prompts: GivenPrompts = None
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_writable(self.detections)
        from starflow2.benchmarks.detect import detect_folder
        from starflow2.benchmarks.prompts import read_geneval_prompts
        from starflow2.models.hub import pick_device
        from starflow2.models.object_detector import ObjectDetector

        rows = None if self.prompts is None else read_geneval_prompts(self.prompts)
        with progress("detecting", "images") as step:
            detector = ObjectDetector.load(self.detector, self.clip, pick_device(self.device))
            detect_folder(self.folder, self.detections, detector, rows, step)
        say(self.detections)
        return 0


def draw_rows(options: DrawOptions, samples: int, layout: Layout[Made], rows: Sequence[PromptRow]) -> DrawnFolder:
    """Draw prompts into a folder, and say what was drawn and what could not be read."""
    from starflow2.benchmarks.folders import FolderSettings, draw_folder
    from starflow2.pipeline import StarFlow2

    if samples < 1:
        raise UsageError(f"--samples is {samples}; expected at least 1.")
    check_seed(options.seed, samples)
    settings = FolderSettings(
        samples=samples,
        seed=options.seed,
        tries=options.tries,
        guidance=options.guidance,
        prior_scale=options.prior_scale,
        at_once=options.batch,
    )
    with progress("drawing", "prompts") as step:
        model = StarFlow2.from_pretrained(options.model, device=options.device)
        drawn = draw_folder(model, layout, rows, options.out, settings, step)
    say(*_summary(drawn))
    return drawn


def _summary(drawn: DrawnFolder) -> list[str]:
    each = f", {drawn.samples} images each" if drawn.samples > 1 else ""
    lines = [f"{drawn.folder}: {len(drawn.drawn)} of {len(drawn.rows)} prompts{each}."]
    if drawn.unread:
        words = drawn.unknown_words
        shown = ", ".join(f"{word} ({count})" for word, count in words[:WORDS_SHOWN])
        lines.append(
            f"The model cannot read {len(drawn.unread)} prompts, listed in unread.json; of {len(words)} words that "
            f"it never learnt the most frequent are {shown}."
        )
    return lines


def show_result(result: Result, json: Path | None) -> int:
    """Print a result as a table, and write it to `json` if that is given; returns exit status 0."""
    from starflow2.benchmarks.results import result_table

    console().print(result_table(result))
    write_json(result.to_json(), json)
    return 0
