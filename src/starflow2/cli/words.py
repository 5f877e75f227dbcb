"""`starflow2 words`: what can be said to a model, with an example of each kind, and as a page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow2.cli.options import Device, Model, console, load_joint, refuse
from starflow2.cli.parsing import Option
from starflow2.core.files import check_writable, replacing
from starflow2.errors import OutputError

if TYPE_CHECKING:
    from starflow2.pipeline import StarFlow2
    from starflow2.world.examples import Example, Task

__all__ = ["Words"]

VERBS = {"draw": "generate", "edit": "edit PICTURE", "ask": "ask PICTURE"}
TITLES = {"draw": "To draw", "edit": "To edit", "ask": "To ask"}


@dataclass(frozen=True, kw_only=True)
class Words:
    """List what can be said to a model: its words by kind, and an example of every kind of request."""

    verb: ClassVar[str] = "words"

    output: Annotated[
        Path | None, Option("also write a Markdown page with a picture of each example", metavar="FILE.md", short="-o")
    ] = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        if self.output is not None:
            _check_page(self.output)
        model = load_joint(self.model, self.device, self.verb)
        print(_listing(model))
        if self.output is not None:
            with console(stderr=True).status("drawing"):
                _write_page(model, self.output)
            print(self.output)
        return 0


def _check_page(path: Path) -> None:
    if path.suffix.lower() != ".md":
        raise OutputError(f"--output is {path}; expected a name that ends in .md.")
    check_writable(path)


def _examples(model: StarFlow2, task: Task) -> list[Example]:
    """The examples of one task whose words the model knows."""
    from starflow2.models.wording import words_of
    from starflow2.world.examples import EXAMPLES

    known = model.components.vocabulary
    return [e for e in EXAMPLES if e.task == task and (not known or {*words_of(f"{e.text} {e.about}")} <= known)]


def _command(example: Example) -> str:
    """The command line of an example; a comment says what PICTURE shows."""
    seed = f" --seed {example.seed}" if example.seed and example.task != "ask" else ""
    about = f"    # PICTURE: {example.about}" if example.about else ""
    return f'starflow2 {VERBS[example.task]} "{example.text}"{seed}{about}'


def _listing(model: StarFlow2) -> str:
    """Words by kind, then an example command of every kind of request."""
    from starflow2.models.wording import classes_of
    from starflow2.world.examples import TASKS

    lines = [f"{name}: {', '.join(words)}" for name, words in classes_of(model.components.vocabulary).items()]
    if not model.components.vocabulary:
        lines = ["This model has no fixed vocabulary: say it in your own words."]
    for task in TASKS:
        lines += ["", f"{TITLES[task]}:"]
        examples = _examples(model, task)
        width = max((len(example.what) for example in examples), default=0)
        lines += [f"  {example.what:<{width}}  {_command(example)}" for example in examples]
    return "\n".join(lines)


def _write_page(model: StarFlow2, page: Path) -> None:
    """Write the page, and one sheet of pictures for each task into the folder images/ beside it."""
    from starflow2.core.images import contact_sheet, save_png
    from starflow2.evals.examples import do_examples
    from starflow2.world.examples import TASKS

    parts = ["# What you can say", "", "Made by `starflow2 words --output`; a test draws and answers every line.", ""]
    parts += ["```text", _listing(model).partition("\n\n")[0], "```", ""]
    for task in TASKS:
        done = do_examples(model, _examples(model, task))
        name = f"images/{page.stem}-{task}.png"
        sheet = contact_sheet([d.image for d in done], [_label(d.example) for d in done], columns=4)
        save_png(sheet, page.parent / name)
        parts += [f"## {TITLES[task]}", "", f"![{TITLES[task]}: one picture for each sentence below]({name})", ""]
        parts += ["```bash", *map(_command, _examples(model, task)), "```", ""]
    with replacing(page) as temp:
        temp.write_text("\n".join(parts), encoding="utf-8")


def _label(example: Example) -> str:
    about = f"{example.about}: " if example.about else ""
    return f"{about}{example.text} {example.answer}".strip()
