"""`starflow2 bench`: compare, count and time every way of decoding, and what surrounds it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow2.cli.options import PROGRAM, JsonFile, Model, check_json, refuse, say
from starflow2.cli.parsing import Option, Positional
from starflow2.core.files import check_writable, replacing
from starflow2.core.serialize import JsonObject
from starflow2.errors import UsageError

if TYPE_CHECKING:
    from starflow2.models.components import Components

__all__ = ["Bench"]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Compare, count and time every way of decoding, and what surrounds it, on the CPU.

    Names: ceil (the machine), latent, picture, shallow, deep, text, calls (ask, score, invert), equality, many (rows),
    turns, flow (beside zuko and normflows where they are installed), train, data, start, all; nano and paper: a latent
    at their sizes, counted on tensors without values. Every variant is compared with its reference first. The exit
    status is 1 if one differs.
    """

    verb: ClassVar[str] = "bench"

    names: Positional[Annotated[tuple[str, ...], Option("see above", metavar="NAME")]] = ()
    rounds: Annotated[int, Option("interleaved rounds of timing")] = 7
    counts_only: Annotated[bool, Option("compare and count, without times")] = False
    peer: Annotated[
        tuple[str, ...],
        Option("apple=FOLDER, before=FOLDER: also a checkout of ml-starflow, of this project", metavar="PEER"),
    ] = ()
    json: JsonFile = None
    markdown: Annotated[Path | None, Option("also write the tables to this file", metavar="FILE")] = None
    model: Model = "nano"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        if self.markdown is not None:
            check_writable(self.markdown)
        if self.rounds < 1:
            raise UsageError(f"--rounds is {self.rounds}; expected at least 1.")
        peers = self._peers()
        from starflow2.pipeline import StarFlow2
        from starflow2.research.bench import report, table
        from starflow2.research.bench_suite import run_benches

        def components() -> Components:
            return StarFlow2.from_pretrained(self.model, device="cpu").components

        names = self.names or (() if peers else ("latent",))
        rows: list[JsonObject] = []
        for row in run_benches(components, names, self.rounds, times=not self.counts_only, peers=peers):
            rows.append(row)
            self._write(rows)  # after every variant: a run that is cut off has said what it knew
        say(*table(rows).splitlines())
        if self.markdown is not None:
            with replacing(self.markdown) as temp:
                temp.write_text(report(rows, self._command), encoding="utf-8")
        return 0 if all(row["check"]["ok"] for row in rows) else 1

    def _peers(self) -> dict[str, Path]:
        peers: dict[str, Path] = {}
        for peer in self.peer:
            name, equals, folder = peer.partition("=")
            if not (name and equals and folder):
                raise UsageError(f"--peer is {peer!r}; expected apple=FOLDER or before=FOLDER.")
            peers[name] = Path(folder)
        return peers

    def _write(self, rows: Sequence[JsonObject]) -> None:
        if self.json is not None:
            with replacing(self.json) as temp:
                temp.write_text("".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows), encoding="utf-8")

    @property
    def _command(self) -> str:
        """The command that repeats these rows."""
        words = [PROGRAM, self.verb, *self.names, "--rounds", str(self.rounds)]
        words += ["--counts-only"] if self.counts_only else []
        words += ["--peer", *(f"{peer.partition('=')[0]}=FOLDER" for peer in self.peer)] if self.peer else []
        words += ["--model", self.model] if self.model != "nano" else []
        return shlex.join(words) + (f" --markdown {self.markdown.name}" if self.markdown is not None else "")
