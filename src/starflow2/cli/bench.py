"""`starflow2 bench`: compare, count and time every way of decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow2.cli.options import JsonFile, Model, check_json, refuse, say
from starflow2.cli.parsing import Option, Positional
from starflow2.core.files import replacing
from starflow2.errors import UsageError

if TYPE_CHECKING:
    from starflow2.models.components import Components

__all__ = ["Bench"]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Compare, count and time every way of decoding, on the CPU.

    Names: latent, picture, shallow, text, start. Every variant is compared with the reference first. The exit status is
    1 if one differs.
    """

    verb: ClassVar[str] = "bench"

    names: Positional[Annotated[tuple[str, ...], Option("see above", metavar="NAME")]] = ()
    rounds: Annotated[int, Option("interleaved rounds of timing")] = 7
    counts_only: Annotated[bool, Option("compare and count, without times")] = False
    json: JsonFile = None
    model: Model = "nano"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        if self.rounds < 1:
            raise UsageError(f"--rounds is {self.rounds}; expected at least 1.")
        from starflow2.pipeline import StarFlow2
        from starflow2.research.bench import table
        from starflow2.research.bench_cases import run_benches

        def components() -> Components:
            return StarFlow2.from_pretrained(self.model, device="cpu").components

        rows = list(run_benches(components, self.names or ("latent",), self.rounds, times=not self.counts_only))
        say(*table(rows).splitlines())
        if self.json is not None:
            with replacing(self.json) as temp:
                temp.write_text("".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows), encoding="utf-8")
        return 0 if all(row["check"] is None or row["check"]["ok"] for row in rows) else 1
