"""`starflow2 eval gedit`, `eval imgedit` and `eval magicbrush`: edited images in the published layouts, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from starflow2.cli.eval_drawing import DrawnImages, DrawOptions, draw_rows, show_result
from starflow2.cli.options import JsonFile, check_json, refuse
from starflow2.cli.parsing import Option

__all__ = ["DrawGedit", "DrawImgedit", "DrawMagicbrush", "ScoreGedit", "ScoreImgedit", "ScoreMagicbrush"]

EditBenchmark = Literal["gedit", "imgedit", "magicbrush"]  # of benchmarks.editing, which needs torch
SourceImages = Annotated[Path, Option("the folder of source images", metavar="FOLDER")]
Ratings = Annotated[Path, Option("ratings.jsonl: one line an image, behind the judge's name", metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class _DrawEdits(DrawOptions):
    """Options of the three that edit, and what they do."""

    verb: ClassVar[str] = ""
    benchmark: ClassVar[EditBenchmark]

    edits: Path
    images: SourceImages

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        from starflow2.benchmarks.editing import EditLayout, read_edits

        rows = read_edits(self.benchmark, self.edits, self.images)
        draw_rows(self, 1, EditLayout(self.benchmark, self.images), rows)
        return 0


@dataclass(frozen=True, kw_only=True)
class DrawGedit(_DrawEdits):
    """Edit GEdit-Bench's images into its layout: fullset/TASK/LANGUAGE/KEY.png. Needs a model with stage joint."""

    verb: ClassVar[str] = "eval gedit"
    benchmark: ClassVar[EditBenchmark] = "gedit"

    edits: Annotated[Path, Option("the dataset's rows as JSONL, an image file each", metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class DrawImgedit(_DrawEdits):
    """Edit ImgEdit-Bench's images into its layout: KEY.png. Needs a model with stage joint."""

    verb: ClassVar[str] = "eval imgedit"
    benchmark: ClassVar[EditBenchmark] = "imgedit"

    edits: Annotated[Path, Option("basic_edit.json, as it is published", metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class DrawMagicbrush(_DrawEdits):
    """Edit MagicBrush's images into its layout, each turn alone and all turns in one conversation.

    Needs a model with stage joint.
    """

    verb: ClassVar[str] = "eval magicbrush"
    benchmark: ClassVar[EditBenchmark] = "magicbrush"

    edits: Annotated[Path, Option("edit_sessions.json, as it is published", metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class ScoreGedit:
    """Score a folder of GEdit-Bench from a judge's ratings of semantics and quality, 0 to 10."""

    verb: ClassVar[str] = "eval gedit score"

    folder: DrawnImages
    ratings: Ratings
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.benchmarks.editing import score_gedit

        return show_result(score_gedit(self.folder, self.ratings), self.json)


@dataclass(frozen=True, kw_only=True)
class ScoreImgedit:
    """Score a folder of ImgEdit-Bench from a judge's three ratings an image, 1 to 5."""

    verb: ClassVar[str] = "eval imgedit score"

    folder: DrawnImages
    ratings: Ratings
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.benchmarks.editing import score_imgedit

        return show_result(score_imgedit(self.folder, self.ratings), self.json)


@dataclass(frozen=True, kw_only=True)
class ScoreMagicbrush:
    """Score a folder of MagicBrush against its target images: L1 and L2, and similarities from a file."""

    verb: ClassVar[str] = "eval magicbrush score"

    folder: DrawnImages
    targets: Annotated[Path, Option("the folder of published images", metavar="FOLDER")]
    similarities: Annotated[
        Path | None, Option("similarities.jsonl: clip_i, dino and clip_t of every image", metavar="FILE")
    ] = None
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.benchmarks.editing import score_magicbrush

        return show_result(score_magicbrush(self.folder, self.targets, self.similarities), self.json)
