"""`starflow2 ask`: answer a question about an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from starflow2.cli.notes import far, note, unlike
from starflow2.cli.options import (
    Device,
    ImageFile,
    JsonFile,
    Model,
    check_json,
    load_joint,
    printable,
    refuse,
    write_json,
)
from starflow2.cli.parsing import Option, Positional

__all__ = ["Ask"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Answer a question about an image."""

    verb: ClassVar[str] = "ask"

    image: Positional[ImageFile]
    question: Positional[Annotated[str, Option("what to ask, in quotes", metavar="QUESTION")]]
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        model = load_joint(self.model, self.device, self.verb)
        answer = model.ask(self.image, self.question)
        print(printable(answer))
        note(far(model, self.image))
        note(unlike(model.components, self.question, "ask"))
        facts = {"image": str(self.image), "question": self.question, "answer": answer}
        write_json(facts | {"model": model.components.cfg.name}, self.json)
        return 0
