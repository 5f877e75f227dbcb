"""`starflow2 data`: read a corpus as training would, and report its content and its broken samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from starflow2.cli.options import (
    JsonFile,
    Model,
    check_json,
    console,
    printable,
    progress,
    refuse,
    write_json,
)
from starflow2.cli.parsing import Option, Positional
from starflow2.errors import UsageError

__all__ = ["Data"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Check a corpus before training: documents, images, lengths, and broken samples with their reasons.

    The exit status is 1 if no sample can be used. Needs the extra `train` (pip install 'starflow2[train]').
    """

    verb: ClassVar[str] = "data"

    what: Positional[Annotated[Literal["check"], Option("read the corpus as training would", metavar="check")]]
    url: Positional[Annotated[str, Option("a file, folder or pattern, local or remote", metavar="URL")]]
    corpus: Annotated[
        Literal["captions", "cc12m", "journeydb", "blip3o", "cambrian", "comm", "pico-banana", "omniedit", "zebra-cot"],
        Option("the corpus whose schema it has; captions: images with text files beside them"),
    ] = "captions"
    format: Annotated[Literal["auto", "tar", "parquet", "jsonl", "folder"], Option("format of the files")] = "auto"
    pictures: Annotated[
        str, Option("folder that image paths are relative to", metavar="FOLDER", default="the file's own folder")
    ] = ""
    limit: Annotated[int | None, Option("samples to read", default="all")] = None
    json: JsonFile = None
    model: Model = "nano"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}; expected at least 1 sample.")
        from starflow2.data.check import check_corpus
        from starflow2.data.mixture import Source

        source = Source(corpus=self.corpus, url=self.url, weight=1, format=self.format, pictures=self.pictures)
        with progress("reading", "samples") as step:
            facts = check_corpus(source, _spelling(self.model), self.limit, lambda read: step(read, self.limit or read))
        console().print(_data_table(facts))
        write_json(facts, self.json)
        if facts["documents"]:
            return 0
        console(stderr=True).print(f"none of the {facts['samples']} samples of {self.url} can be used.", markup=False)
        return 1


def _spelling(name: str) -> Any:
    """Tokenizer, layout and image size of a model, by its name, without reading its weights."""
    from starflow2.data.mixture import Spelling
    from starflow2.models.checkpoint import load_words
    from starflow2.models.components import build
    from starflow2.models.hub import find_model

    tokenizer, cfg = load_words(find_model(name))
    return Spelling(tokenizer, build(cfg, "meta").layout, cfg.fae.image_size)


def _data_table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    title = f"{facts['corpus']}, {facts['format']}, files: {facts['files']:,}"
    table = Table("", "", title=title, title_style="", title_justify="left", show_header=False)
    table.add_row("samples", f"{facts['samples']:,}")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in facts["kinds"].items())
    table.add_row("documents", f"{facts['documents']:,}" + (f" ({kinds})" if kinds else ""))
    table.add_row("images", f"{facts['pictures']:,}")
    for name in ("positions", "tokens"):
        table.add_row(f"{name} per document", ", ".join(f"{k} {v:,}" for k, v in facts[name].items()))
    table.add_section()
    table.add_row("broken", f"{facts['samples'] - facts['documents']:,}")
    for reason, found in facts["broken"].items():
        example = found["examples"][0]
        where = f"{Path(example['source']).name} {example['key']}"
        table.add_row(f"  {reason}", Text(printable(f"{found['count']:,}, such as {where}: {example['detail'][:120]}")))
    return table
