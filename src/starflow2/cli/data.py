"""`starflow2 data`: read a corpus as training would, and report its content and its broken samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

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

if TYPE_CHECKING:
    from starflow2.data.mixture import Source

__all__ = ["Data"]


CORPUS = (
    "schema: captions (images with text beside them), dialogue, cc12m, journeydb, blip3o, cambrian, comm, pico-banana, "
    "omniedit, zebra-cot, or your own module:function"
)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Check a corpus or a mixture before training: documents, images, lengths, and broken samples with their reasons.

    The exit status is 1 if no sample of a source can be used. Needs the extra `train` (pip install 'starflow2[train]').
    """

    verb: ClassVar[str] = "data"

    what: Positional[Annotated[Literal["check"], Option("read the corpus as training would", metavar="check")]]
    url: Positional[
        Annotated[str, Option("a file, folder or pattern, local or remote; or a mixture file, .json", metavar="URL")]
    ]
    corpus: Annotated[str, Option(CORPUS, metavar="NAME")] = "captions"
    format: Annotated[Literal["auto", "tar", "parquet", "jsonl", "folder"], Option("format of the files")] = "auto"
    pictures: Annotated[
        str, Option("folder that image paths are relative to", metavar="FOLDER", default="the file's own folder")
    ] = ""
    flatten: Annotated[
        str, Option("colour behind transparent images", metavar="COLOUR", default="none: they are broken")
    ] = ""
    limit: Annotated[int | None, Option("samples to read of each source", default="all")] = None
    json: JsonFile = None
    model: Model = "nano"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}; expected at least 1 sample.")
        from starflow2.data.check import check_corpus

        sources, spelling = self._sources(), _spelling(self.model)
        found = []
        for source in sources:
            with progress("reading", "samples") as step:
                facts = check_corpus(source, spelling, self.limit, lambda read: step(read, self.limit or read))
            console().print(_data_table(facts, self.model))
            found.append(facts)
        write_json({"sources": found} if self._is_mixture else found[0], self.json)
        unusable = [facts for facts in found if not facts["documents"]]
        for facts in unusable:
            message = f"none of the {facts['samples']} samples of {facts['url']} can be used."
            console(stderr=True).print(message, markup=False)
        return 1 if unusable else 0

    @property
    def _is_mixture(self) -> bool:
        return self.url.endswith(".json")

    def _sources(self) -> Sequence[Source]:
        """The sources to read: those of a mixture file, or the one that the options describe."""
        from starflow2.data.mixture import Source, read_mixture

        options = {name: getattr(self, name) for name in ("corpus", "format", "pictures", "flatten")}
        if not self._is_mixture:
            return [Source(url=self.url, weight=1, **options)]
        given = [f"--{name}" for name, value in options.items() if value != getattr(Data, name)]
        if given:
            raise UsageError(f"{given[0]} is an option of one corpus; in the mixture file {self.url} each has its own.")
        return read_mixture(self.url)


def _spelling(name: str) -> Any:
    """Tokenizer, layout and image size of a model, by its name, without reading its weights."""
    from starflow2.data.mixture import Spelling
    from starflow2.models.checkpoint import load_words
    from starflow2.models.hub import find_model

    words = load_words(find_model(name))
    return Spelling(words.tokenizer, words.layout, words.cfg.fae.image_size)


def _data_table(facts: Mapping[str, Any], model: str) -> Any:
    """The counts as a table; lengths depend on the tokenizer and the latents of `model`."""
    from rich.table import Table
    from rich.text import Text

    title = f"{facts['corpus']}, {facts['format']}, files: {facts['files']:,}"
    table = Table("", "", title=title, title_style="", title_justify="left", show_header=False)
    table.add_row("samples", f"{facts['samples']:,}")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in facts["kinds"].items())
    table.add_row("documents", f"{facts['documents']:,}" + (f" ({kinds})" if kinds else ""))
    table.add_row("images", f"{facts['pictures']:,}")
    for name in ("positions", "tokens"):
        table.add_row(f"{name} per document ({model})", ", ".join(f"{k} {v:,}" for k, v in facts[name].items()))
    table.add_section()
    table.add_row("broken", f"{facts['samples'] - facts['documents']:,}")
    for reason, found in facts["broken"].items():
        example = found["examples"][0]
        where = f"{Path(example['source']).name} {example['key']}"
        table.add_row(f"  {reason}", Text(printable(f"{found['count']:,}, such as {where}: {example['detail'][:120]}")))
    return table
