"""`starflow2 check`: test that a model is exact on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from starflow2.cli.options import (
    Device,
    JsonFile,
    Model,
    check_json,
    console,
    refuse,
    write_json,
)

__all__ = ["Check"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Test that a model is exact on this machine: inverse, log-determinant, cache, batches.

    The exit status is 1 if any check fails.
    """

    verb: ClassVar[str] = "check"

    model: Model = "nano"
    device: Device = "auto"
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.pipeline import StarFlow2
        from starflow2.selfcheck import check_model, report, table

        with console(stderr=True).status("loading") as status:
            model = StarFlow2.from_pretrained(self.model, device=self.device)
            checks = check_model(model, status.update)
        console().print(table(checks))
        found = report(checks, model)
        console().print("sampling runs: {path} ({note})".format(**found["sampling"]), soft_wrap=True, highlight=False)
        write_json(found, self.json)
        return 0 if found["ok"] else 1
