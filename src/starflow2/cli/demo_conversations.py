"""The conversations of the demo: a story, edits and questions as a model of stage 3 tells, makes and answers them.

What is shown is what was scored: the first items of quick shares of the test suites, whatever became of them. Not here:
the page around it, pictures from single sentences (demo) and the rules of the scores (evals).
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from starflow2.core.images import PILImage, to_bytes, to_floats, to_pil
from starflow2.evals import edit as editing
from starflow2.evals import gqa as answering
from starflow2.evals import mme
from starflow2.evals import story as stories
from starflow2.evals.runner import Suite, score_suite
from starflow2.inference.conversations import PastTurn
from starflow2.inference.session import Session
from starflow2.models.components import Components
from starflow2.pipeline import StarFlow2
from starflow2.world.edit_operations import OPERATIONS
from starflow2.world.edits import Edit, suite_edits
from starflow2.world.questions import SUBTASKS
from starflow2.world.scene import render
from starflow2.world.stories import STEPS, suite_stories

__all__ = ["STYLE", "Talk", "data_url", "sections", "table", "talk"]

Part = Literal["id", "cg"]
PARTS: Final[tuple[Part, ...]] = ("id", "cg")
SUITES: Final[tuple[Suite, ...]] = ("mme", "gqa", "edit", "story")  # scored on one test item in eight each
EDITS_SHOWN: Final = 1  # of each operation and part
QUESTIONS_SHOWN: Final = 4  # of each suite of questions
RUNGS: Final = ("words fit the picture", "the change is there", "all else stayed")  # of a step of a story

Images = NDArray[np.uint8]  # (64, 64, 3), or (n, 64, 64, 3)
Report = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user said, what came back in order, and the judge's marks: (what was looked at, whether it is so)."""

    user: str
    assistant: tuple[str | Images, ...]
    marks: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class ShownEdit:
    """A scored edit. why: "" where it succeeded."""

    operation: str
    part: Part
    instruction: str
    source: Images
    result: Images
    why: str


@dataclass(frozen=True, slots=True)
class ShownQuestion:
    """A scored question about a picture."""

    part: Part
    picture: Images
    question: str
    said: str
    answer: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class Talk:
    """What was measured and shown. report: what report.json gains; scores: the whole report of each suite."""

    report: Report
    scores: Mapping[str, Report]
    story: tuple[Turn, ...]
    edits: tuple[ShownEdit, ...]
    questions: tuple[ShownQuestion, ...]


def talk(model: StarFlow2, progress: Progress | None = None) -> Talk:
    """Scores every suite of conversations on its quick test share; `progress` takes (items done, items of the suite).

    Raises what the suites and the model raise.
    """
    listener = _Listener(model)
    scores: dict[str, Report] = {}
    asked: dict[str, list[_Asked]] = {}
    for suite in SUITES:
        listener.asked = asked[suite] = []
        scores[suite] = score_suite(listener, suite, "test", quick=True, progress=progress)
    story = listener.stories[0]
    report = _summary(scores) | {"encode_calls": story.encode_calls}
    questions = (*_shown_questions("mme", asked["mme"]), *_shown_questions("gqa", asked["gqa"]))
    return Talk(report, scores, _shown_story(story), tuple(_shown_edits(listener, scores["edit"])), questions)


def _summary(scores: Mapping[str, Report]) -> Report:
    """The figures of report.json: shares in [0, 1], MME in points of 1,200, the prefix in steps of 4."""
    mme, gqa = ({part: _answered(scores[s]["parts"][part]) for part in PARTS} for s in ("mme", "gqa"))
    mme_vlm, gqa_vlm = ({part: _answered(scores[s]["vlm"][part]) for part in PARTS} for s in ("mme", "gqa"))
    edit, story = scores["edit"]["parts"], scores["story"]["parts"]["id"]
    return {
        "w_mme": mme | {"vlm": mme_vlm},
        "w_gqa": gqa | {"vlm": gqa_vlm},
        "w_edit": {part: edit[part]["overall"]["success"]["score"] for part in PARTS}
        | {"preserved": edit["id"]["overall"]["preserved"]["score"]},
        "w_story": {name: story[name]["score"] for name in ("structure", "prefix")}
        | {"answers": story["answer"]["true"]["score"]},
    }


def _answered(part: Report) -> float:
    """The one score of a part of MME or GQA."""
    return float(part["total" if "total" in part else "accuracy"]["score"])


# -- what was said ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    picture: Images
    question: str
    said: str


@dataclass(frozen=True, slots=True)
class _Edited:
    instruction: str
    seed: int
    source: Images
    result: Images


@dataclass(frozen=True, slots=True)
class _Story:
    asked: tuple[str, ...]
    seed: int
    told: list[list[str | Images]]  # by turn
    encode_calls: int  # while it and those beside it were told


@dataclass
class _Listener:
    """A model that remembers what it was asked and what it replied."""

    model: StarFlow2
    asked: list[_Asked] = field(default_factory=list)
    edited: list[_Edited] = field(default_factory=list)
    stories: list[_Story] = field(default_factory=list)

    @property
    def sampling_noise(self) -> float:
        return self.model.sampling_noise

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self.model.draw(prompts, seeds)

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        return self.model.roundtrip(images, noise_level, seed)

    def tower_answers(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        return self.model.tower_answers(images, questions)

    def answers(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> list[str]:
        told = self.model.answers(images, questions)
        rows = zip(images, questions, told, strict=True)
        self.asked += [_Asked(to_bytes(shown[0][None])[0], question, said) for shown, question, said in rows]
        return told

    def answers_after(self, pasts: Sequence[Sequence[PastTurn]], questions: Sequence[str]) -> list[str]:
        return self.model.answers_after(pasts, questions)

    def session(self, *, seed: int = 0) -> Session:
        return self.model.session(seed=seed)

    def edits(self, images: Tensor, instructions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        made = self.model.edits(images, instructions, seeds)
        rows = zip(instructions, seeds, to_bytes(images), to_bytes(made), strict=True)
        self.edited += [_Edited(*row) for row in rows]
        return made

    def tell(self, talks: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[list[list[str | Tensor]]]:
        with _encodings(self.model.components) as calls:
            told = self.model.tell(talks, seeds)
        for asked, seed, turns in zip(talks, seeds, told, strict=True):
            blocks = [[b if isinstance(b, str) else to_bytes(b[None])[0] for b in turn] for turn in turns]
            self.stories.append(_Story(tuple(asked), seed, blocks, len(calls)))
        return told


@contextmanager
def _encodings(components: Components) -> Iterator[list[None]]:
    """Inside, the list grows by one entry whenever the codec's encoder runs."""
    calls: list[None] = []
    hook = components.codec.encoder.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


# -- what is shown of it ----------------------------------------------------------------------------------------------


def _shown_story(told: _Story) -> tuple[Turn, ...]:
    """The story turn by turn; every step with its rungs of the ladder, the answer with whether it is true."""
    index = told.seed - stories.SEED_BASE
    story = suite_stories("test", "id", index + 1)[index]
    blocks = [[("text", b) if isinstance(b, str) else ("image", b) for b in turn] for turn in told.told]
    (reading,) = stories.read_told([blocks])  # type: ignore[list-item]
    marks = [tuple(zip(RUNGS, grades, strict=True)) for grades in stories.step_grades(story, reading)]
    is_true = _words(reading.answer) == story.answer
    marks.append((("right" if is_true else f"should be “{story.answer}”", is_true),))
    return tuple(Turn(a, tuple(t), m) for a, t, m in zip(told.asked, told.told, marks, strict=True))


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _shown_edits(listener: _Listener, scores: Report) -> Iterator[ShownEdit]:
    """The first edits of every operation, seen and new combinations, operation by operation."""
    left = list(listener.edited)
    picked: list[tuple[Part, Edit, _Edited]] = []
    for part in PARTS:
        known = suite_edits("test", part, editing.PER_OPERATION[part])
        count = scores["parts"][part]["n"]
        rows = [(part, known[made.seed - editing.SEED_BASE], made) for made in left[:count]]
        left = left[count:]
        for operation in OPERATIONS:
            picked += [row for row in rows if row[1].operation == operation][:EDITS_SHOWN]
    picked.sort(key=lambda row: OPERATIONS.index(row[1].operation))
    sources = np.stack([made.source for _, _, made in picked])
    references = to_bytes(listener.roundtrip(to_floats(sources)))
    results = np.stack([made.result for _, _, made in picked])
    grades = editing.grade_edits([edit for _, edit, _ in picked], results, references)
    for (part, edit, made), grade in zip(picked, grades, strict=True):
        faults = (("not done", grade.applied), ("something else changed", grade.preserved))
        why = ", ".join(fault for fault, is_fine in faults if not is_fine)
        yield ShownEdit(edit.operation, part, made.instruction, made.source, made.result, why)


def _shown_questions(suite: Literal["mme", "gqa"], asked: Sequence[_Asked]) -> Iterator[ShownQuestion]:
    """Some of the questions, evenly over the suite and so over its parts, with their right answers."""
    items = mme.mme_items("test") if suite == "mme" else answering.gqa_items("test")
    for at in np.linspace(0, len(asked) - 1, QUESTIONS_SHOWN).round().astype(int).tolist():
        row = asked[at]
        same = (item for item in items if item.question.text == row.question)
        item = next(item for item in same if np.array_equal(render(item.scene), row.picture))
        answer = item.question.answer
        found = mme.parse_yes_no(row.said) if suite == "mme" else _words(row.said)
        yield ShownQuestion(item.part, row.picture, row.question, row.said, answer, found == answer)


# -- the page's sections ----------------------------------------------------------------------------------------------


def data_url(picture: PILImage) -> str:
    """A picture as the address of itself, for pages that need no other file."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def sections(told: Talk) -> str:
    """The story as a conversation, the edits and the questions, as HTML."""
    calls = told.report["encode_calls"]
    turns = "\n".join(map(_turn, told.story))
    edits = "\n".join(map(_edit, told.edits))
    done = sum(not edit.why for edit in told.edits)
    questions = "\n".join(map(_question, told.questions))
    right = sum(question.is_right for question in told.questions)
    return f"""<h2 id="story">A story, told in turn</h2>
<p>One conversation: the model answers every request with a sentence and a picture of its own choosing, and each picture
stays in its cache as it was drawn. Between the pictures the encoder ran {calls} times. It is the first story of the
run; the judge reads its pictures and marks every step.</p>
<div class="talk">
{turns}
</div>
<h2 id="edits">Pictures changed as told <small>{done} of {len(told.edits)}</small></h2>
<p>Left the source, right the result: the first edits of each kind. An edit succeeds if what was asked for is there and
nothing else changed.</p>
<div class="grid pairs">
{edits}
</div>
<h2 id="questions">Questions about pictures <small>{right} of {len(told.questions)}</small></h2>
<div class="grid asked">
{questions}
</div>"""


def _turn(turn: Turn) -> str:
    blocks = "".join(f"<p>{html.escape(b)}</p>" if isinstance(b, str) else _image(b, turn.user) for b in turn.assistant)
    marks = "".join(f"<li>{_mark(fits)} {html.escape(name)}</li>" for name, fits in turn.marks)
    return (
        f'<div class="step"><p class="you">{html.escape(turn.user)}</p>\n'
        f'<div class="reply">{blocks or "<p>nothing</p>"}</div><ul>{marks}</ul></div>'
    )


def _edit(shown: ShownEdit) -> str:
    pictures = _image(shown.source, "before") + _image(shown.result, "after")
    why = f'<span class="why">{shown.why}</span>' if shown.why else ""
    caption = f"{_mark(not shown.why)} {html.escape(shown.instruction)}{why}{_badge(shown.part)}"
    return f'<figure><div class="pair">{pictures}</div><figcaption>{caption}</figcaption></figure>'


def _question(shown: ShownQuestion) -> str:
    said = html.escape(shown.said) or "nothing"
    truth = "" if shown.is_right else f'<span class="why">right: {html.escape(shown.answer)}</span>'
    caption = f"{html.escape(shown.question)}<span>{_mark(shown.is_right)} {said}</span>{truth}{_badge(shown.part)}"
    return f"<figure>{_image(shown.picture, shown.question)}<figcaption>{caption}</figcaption></figure>"


def _image(image: Images, words: str) -> str:
    source = data_url(to_pil(to_floats(image[None])[0]))
    return f'<img src="{source}" alt="{html.escape(words, quote=True)}" width="128" height="128" loading="lazy">'


def _mark(is_right: bool) -> str:
    return '<b class="yes">✓</b>' if is_right else '<b class="no">✗</b>'


def _badge(part: Part) -> str:
    return '<span class="new">new combination</span>' if part == "cg" else ""


# -- the table --------------------------------------------------------------------------------------------------------

_Cell = float | None
_Row = tuple[str, Sequence[_Cell], Sequence[_Cell], Sequence[_Cell], Sequence[_Cell]]
_NONE: Final = (None, None)


def table(told: Talk) -> str:
    """Suite by suite: ID and CG, the frozen language model, the floor and the ceiling of each, as HTML."""
    head = "<tr><th>suite<th>ID<th>CG<th>frozen language model<th>floor ID / CG<th>ceiling ID / CG</tr>"
    rows = [*_answer_rows(told.scores), *_edit_rows(told.scores["edit"]), *_story_rows(told.scores["story"])]
    counts = {name: told.scores[name]["n"] for name in SUITES}
    return f"""<div class="wide"><table>{head}
{"".join(map(_table_row, rows))}</table></div>
<p>Quick shares of the test suites, so they are noisy: {counts["mme"]} questions of MME's kind and {counts["gqa"]} of
GQA's, {counts["edit"]} edits, {counts["story"]} stories. The frozen language model sees pictures through its own vision
tower; both streams together are to keep what it knows. Floors: who always says yes, who knows the training questions
but sees no picture, who hands the source back, who tells another story, who guesses by the kind of question. Ceilings:
all right; the true target after the codec; the true story after the codec at the noise of sampled latents.</p>"""


def _table_row(row: _Row) -> str:
    name, scores, *bounds = row
    cells = [*map(_cell, scores), *("–" if pair is _NONE else " / ".join(map(_cell, pair)) for pair in bounds)]
    return f"<tr><th>{name}" + "".join(f"<td>{cell}" for cell in cells) + "</tr>\n"


def _cell(value: _Cell) -> str:
    return "–" if value is None else f"{value:,.0f}" if value > STEPS else f"{value:.2f}"


def _answer_rows(scores: Mapping[str, Report]) -> Iterator[_Row]:
    full = 200.0 * len(SUBTASKS)
    for suite, name, ceiling in (("mme", f"MME, points of {full:,.0f}", full), ("gqa", "GQA, accuracy", 1.0)):
        parts, vlm = ([scores[suite][of][part] for part in PARTS] for of in ("parts", "vlm"))
        floors = [part["floor"]["always_yes"] if suite == "mme" else part["prior"] for part in parts]
        yield name, [*map(_answered, parts)], [*map(_answered, vlm)], floors, (ceiling, ceiling)


def _edit_rows(scores: Report) -> Iterator[_Row]:
    parts = [scores["parts"][part] for part in PARTS]
    for column, name in (("success", "edits, done and nothing else"), ("preserved", "edits, all else preserved")):
        found, floor, ceiling = (
            [of["overall"][column]["score"] for of in some]
            for some in (parts, *([part["controls"][name] for part in parts] for name in ("copy", "ceiling")))
        )
        yield name, found, _NONE, floor, ceiling


def _story_rows(scores: Report) -> Iterator[_Row]:
    parts, through = [scores["parts"][part] for part in PARTS], scores["ceiling"]
    names = ("structure", "block", "image", "consistency", "prefix")
    titles = ("text and picture in turn", *RUNGS, f"first steps without a fault, of {STEPS}")
    for name, title in zip(names, titles, strict=True):
        floor = [part["floor"][name] for part in parts]
        yield f"stories, {title}", [p[name]["score"] for p in parts], _NONE, floor, (through[name]["score"], None)
    found, floor = [p["answer"]["true"]["score"] for p in parts], [p["floor"]["guess"] for p in parts]
    yield "stories, answers", found, _NONE, floor, (through["answer"]["true"]["score"], None)


STYLE = """
.talk { max-width: 40rem; }
.step { display: grid; grid-template-columns: minmax(0, 1fr) 11rem; gap: .5rem 1.25rem; padding: .9rem 0;
  border-top: 1px solid var(--line); }
.step p { margin: 0; overflow-wrap: anywhere; }
.you { grid-column: 1 / -1; justify-self: end; padding: .4rem .85rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 1rem 1rem .25rem 1rem; }
.reply img { width: 8rem; margin-top: .5rem; }
.step ul { list-style: none; margin: 0; padding: 0; align-self: end; color: var(--soft); font-size: .82rem; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
.asked { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
@media (max-width: 30rem) { .step { grid-template-columns: 1fr; } }
"""
