"""`starflow2 eval isg`: replies of words and images in the layout that ISG-Bench's script reads, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from starflow2.cli.eval_drawing import DrawnImages, DrawOptions, draw_rows, show_result
from starflow2.cli.options import JsonFile, check_json, refuse, say
from starflow2.cli.parsing import Option

__all__ = ["ReplyIsg", "ScoreIsg"]


@dataclass(frozen=True, kw_only=True)
class ReplyIsg(DrawOptions):
    """Reply to ISG-Bench's queries in words and images: ID/reply.json, ID/1.png, and all of them in output.jsonl.

    Needs a model with stage joint. Queries with words that it never learnt are listed in unread.json.
    """

    verb: ClassVar[str] = "eval isg"

    queries: Annotated[Path, Option("ISG-Bench.jsonl, as it is published", metavar="FILE")]
    images: Annotated[Path, Option("the folder that the queries' images are below", metavar="FOLDER")]

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        from starflow2.benchmarks.interleaved import IsgLayout, read_isg, write_output

        say(write_output(draw_rows(self, 1, IsgLayout(self.images), read_isg(self.queries, self.images))))
        return 0


@dataclass(frozen=True, kw_only=True)
class ScoreIsg:
    """Score a folder of ISG-Bench's replies from a judge's answers on the levels of blocks, images and the whole."""

    verb: ClassVar[str] = "eval isg score"

    folder: DrawnImages
    answers: Annotated[Path, Option("answers.jsonl: one line an answer, behind the judge's name", metavar="FILE")]
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.benchmarks.interleaved import score_isg

        return show_result(score_isg(self.folder, self.answers), self.json)
