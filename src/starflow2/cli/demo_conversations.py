"""The conversations of the demo: a story, edits and questions, as a model of stage 3 replies to them.

The page shows what was scored: the first items of quick shares of the test suites, right or wrong. Not here: the page
around it and images from single sentences (demo), and the rules of the scores (evals).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from torch import Tensor

from starflow2.core.images import PILImage, to_bytes, to_floats, to_pil
from starflow2.evals import edit, gqa, mme, story
from starflow2.evals.asking import AskedQuestion
from starflow2.evals.runner import Scorer
from starflow2.evals.statistics import Scores
from starflow2.evals.suite import Images, Progress, Report
from starflow2.inference.reading import PastTurn
from starflow2.inference.session import Session
from starflow2.models.components import Components
from starflow2.pipeline import StarFlow2
from starflow2.world.edit_operations import OPERATIONS
from starflow2.world.edits import Edit
from starflow2.world.questions import SUBTASKS
from starflow2.world.scene import render
from starflow2.world.stories import STEPS

__all__ = ["STYLE", "Conversations", "DemoSuites", "ModelLog", "data_url", "score_conversations", "sections", "table"]

Part = Literal["id", "cg"]
PARTS: Final[tuple[Part, ...]] = ("id", "cg")
EDITS_SHOWN: Final = 1  # of each operation and part
QUESTIONS_SHOWN: Final = 4  # of each suite of questions
RUNGS: Final = ("words fit the image", "the change is there", "all else stayed")  # of a step of a story


@dataclass(frozen=True, slots=True)
class Turn:
    """The user's words, the reply in order, and the detector's marks: (what was checked, True if it is so)."""

    user: str
    assistant: tuple[story.Block, ...]
    marks: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class ShownEdit:
    """A scored edit. faults: "" if it succeeded."""

    operation: str
    part: Part
    instruction: str
    source: Images
    result: Images
    faults: str


@dataclass(frozen=True, slots=True)
class ShownQuestion:
    """A scored question about an image. truth: the right answer."""

    part: Part
    image: Images
    question: str
    answer: str
    truth: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class DemoSuites:
    """The suites that are scored, each on its quick test share."""

    mme: mme.MmeSuite = field(default_factory=mme.MmeSuite)
    gqa: gqa.GqaSuite = field(default_factory=gqa.GqaSuite)
    edit: edit.EditSuite = field(default_factory=edit.EditSuite)
    story: story.StorySuite = field(default_factory=story.StorySuite)


@dataclass(frozen=True, slots=True)
class Conversations:
    """Scores and examples. scores: the report of each suite. encode_calls: of the codec while the story was told."""

    scores: Mapping[str, Report]
    encode_calls: int
    story: tuple[Turn, ...]
    edits: tuple[ShownEdit, ...]
    questions: tuple[ShownQuestion, ...]

    def summary(self) -> dict[str, object]:
        """The figures of report.json: shares in [0, 1], MME in points of 1,200, the prefix in steps of 4."""
        edits, stories = self.scores["edit"].parts, self.scores["story"].parts["id"]
        answers = {
            f"w_{name}": _by_part(self.scores[name].parts, column)
            | {"vlm": _by_part(self.scores[name].bounds["vlm"], column)}
            for name, column in (("mme", "total"), ("gqa", "accuracy"))
        }
        return answers | {
            "w_edit": _by_part(edits, "success") | {"preserved": edits["id"].value("preserved")},
            "w_story": {name: stories.value(name) for name in ("structure", "prefix")}
            | {"answers": stories.value("answer")},
            "encode_calls": self.encode_calls,
        }


def _by_part(parts: Mapping[str, Scores], column: str) -> dict[str, object]:
    return {part: parts[part].value(column) for part in PARTS}


def score_conversations(
    model: StarFlow2, progress: Progress | None = None, suites: DemoSuites | None = None
) -> Conversations:
    """Score the suites of conversations on quick test shares; `progress` takes (items done, items of the suite).

    Raises what the suites and the model raise.
    """
    suites, log = suites or DemoSuites(), ModelLog(model)
    scorer = Scorer(log, "test", quick=True, progress=progress)
    scores, questions = dict[str, Report](), list[ShownQuestion]()
    scores["mme"] = scorer.mme(suites.mme)
    questions += _shown_questions(suites.mme, log.answered)
    log.answered.clear()
    scores["gqa"] = scorer.gqa(suites.gqa)
    questions += _shown_questions(suites.gqa, log.answered)
    scores["edit"] = scorer.edit(suites.edit)
    scores["story"] = scorer.story(suites.story)
    edits = _shown_edits(log, suites.edit, scores["edit"])
    first = log.stories[0]
    turns = _shown_story(first, suites.story)
    return Conversations(scores, first.encode_calls, turns, tuple(edits), tuple(questions))


# -- what the model replied -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answered:
    image: Images
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Edited:
    instruction: str
    seed: int
    source: Images
    result: Images


@dataclass(frozen=True, slots=True)
class _Story:
    requests: tuple[str, ...]
    seed: int
    replies: story.Replies
    encode_calls: int  # while the stories of its batch were told


@dataclass
class ModelLog:
    """A model that remembers the questions, edits and stories it was given, and its replies."""

    model: StarFlow2
    answered: list[_Answered] = field(default_factory=list)
    edited: list[_Edited] = field(default_factory=list)
    stories: list[_Story] = field(default_factory=list)

    @property
    def sampling_noise(self) -> float:
        return self.model.sampling_noise

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self.model.draw(prompts, seeds)

    def check_prompt(self, prompt: str) -> None:
        self.model.check_prompt(prompt)

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        return self.model.roundtrip(images, noise_level, seed)

    def tower_answers(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        return self.model.tower_answers(images, questions)

    def answers(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> list[str]:
        answers = self.model.answers(images, questions)
        rows = zip(images, questions, answers, strict=True)
        self.answered += [_Answered(to_bytes(some[0][None])[0], question, answer) for some, question, answer in rows]
        return answers

    def answers_after(self, pasts: Sequence[Sequence[PastTurn]], questions: Sequence[str]) -> list[str]:
        return self.model.answers_after(pasts, questions)

    def session(self, *, seed: int = 0) -> Session:
        return self.model.session(seed=seed)

    def edits(self, images: Tensor, instructions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        results = self.model.edits(images, instructions, seeds)
        rows = zip(instructions, seeds, to_bytes(images), to_bytes(results), strict=True)
        self.edited += [_Edited(*row) for row in rows]
        return results

    def tried(self, turns: Sequence[Sequence[str | Tensor]], seeds: Sequence[int], tries: int) -> tuple[Tensor, Tensor]:
        return self.model.tried(turns, seeds, tries)

    def tell_confirmed(
        self, talks: Sequence[Sequence[str]], seeds: Sequence[int], tries: int
    ) -> list[list[list[str | Tensor]]]:
        return self.model.tell_confirmed(talks, seeds, tries)

    def tell(self, talks: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[list[list[str | Tensor]]]:
        with _encodings(self.model.components) as calls:
            replies = self.model.tell(talks, seeds)
        for requests, seed, turns in zip(talks, seeds, replies, strict=True):
            blocks = [[b if isinstance(b, str) else to_bytes(b[None])[0] for b in turn] for turn in turns]
            self.stories.append(_Story(tuple(requests), seed, blocks, len(calls)))
        return replies


@contextmanager
def _encodings(components: Components) -> Iterator[list[None]]:
    """Inside, the list grows by one entry whenever the codec's encoder runs."""
    calls: list[None] = []
    hook = components.codec.encoder.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


# -- examples ---------------------------------------------------------------------------------------------------------


def _shown_story(record: _Story, suite: story.StorySuite) -> tuple[Turn, ...]:
    """The story turn by turn; each step with its rungs of the ladder, the answer with whether it is true."""
    truth = suite.items("test")["id"][record.seed - story.SEED_BASE].task
    (reading,) = story.read_replies([record.replies])
    marks = [tuple(zip(RUNGS, grades, strict=True)) for grades in story.step_grades(truth, reading)]
    is_true = story.plain_words(reading.answer) == truth.answer
    marks.append((("right" if is_true else f"should be “{truth.answer}”", is_true),))
    turns = zip(record.requests, record.replies, marks, strict=True)
    return tuple(Turn(request, tuple(reply), own) for request, reply, own in turns)


def _shown_edits(log: ModelLog, suite: edit.EditSuite, scores: Report) -> Iterator[ShownEdit]:
    """The first edits of every operation, seen and new combinations, operation by operation."""
    left = list(log.edited)
    picked: list[tuple[Part, Edit, _Edited]] = []
    for part in PARTS:
        items, count = suite.items("test")[part], scores.parts[part].n
        rows = [(part, items[made.seed - edit.SEED_BASE].task, made) for made in left[:count]]
        left = left[count:]
        for operation in OPERATIONS:
            picked += [row for row in rows if row[1].operation == operation][:EDITS_SHOWN]
    picked.sort(key=lambda row: OPERATIONS.index(row[1].operation))
    sources = np.stack([made.source for _, _, made in picked])
    references = to_bytes(log.roundtrip(to_floats(sources)))
    results = np.stack([made.result for _, _, made in picked])
    grades = edit.grade_edits([truth for _, truth, _ in picked], results, references)
    for (part, truth, made), grade in zip(picked, grades, strict=True):
        checks = (("not done", grade.applied), ("something else changed", grade.preserved))
        faults = ", ".join(fault for fault, is_fine in checks if not is_fine)
        yield ShownEdit(truth.operation, part, made.instruction, made.source, made.result, faults)


def _shown_questions(suite: mme.MmeSuite | gqa.GqaSuite, answered: Sequence[_Answered]) -> Iterator[ShownQuestion]:
    """Some of the questions, evenly over the suite and so over its parts, with their right answers."""
    items = suite.items("test")["all"]
    for index in np.linspace(0, len(answered) - 1, QUESTIONS_SHOWN).round().astype(int).tolist():
        row = answered[index]
        item = next(item for item in items if _is_about(item, row))
        answer = mme.parse_yes_no(row.answer) if isinstance(suite, mme.MmeSuite) else story.plain_words(row.answer)
        truth = item.question.answer
        yield ShownQuestion(item.part, row.image, row.question, row.answer, truth, answer == truth)


def _is_about(item: AskedQuestion, row: _Answered) -> bool:
    return item.question.text == row.question and np.array_equal(render(item.scene), row.image)


# -- the page's sections ----------------------------------------------------------------------------------------------


def data_url(image: PILImage) -> str:
    """An image as a data URL, for pages that need no other file."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def sections(shown: Conversations) -> str:
    """The story as a conversation, the edits and the questions, as HTML."""
    calls = shown.encode_calls
    turns = "\n".join(map(_turn, shown.story))
    edits = "\n".join(map(_edit, shown.edits))
    done = sum(not row.faults for row in shown.edits)
    questions = "\n".join(map(_question, shown.questions))
    right = sum(question.is_right for question in shown.questions)
    return f"""<h2 id="story">A story, told turn by turn</h2>
<p>One conversation: the model answers every request with a sentence and an image of its own choosing, and each image
stays in its cache as it was drawn. Between the images the encoder ran {calls} times. This is the first story of the
run; the detector reads its images and marks every step.</p>
<div class="talk">
{turns}
</div>
<h2 id="edits">Edited images <small>{done} of {len(shown.edits)}</small></h2>
<p>The source on the left, the result on the right: the first edits of each kind. An edit succeeds if what was asked for
is there and nothing else changed.</p>
<div class="grid pairs">
{edits}
</div>
<h2 id="questions">Questions about images <small>{right} of {len(shown.questions)}</small></h2>
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
    faults = f'<span class="why">{shown.faults}</span>' if shown.faults else ""
    caption = f"{_mark(not shown.faults)} {html.escape(shown.instruction)}{faults}{_badge(shown.part)}"
    return f'<figure><div class="pair">{pictures}</div><figcaption>{caption}</figcaption></figure>'


def _question(shown: ShownQuestion) -> str:
    answer = html.escape(shown.answer) or "nothing"
    truth = "" if shown.is_right else f'<span class="why">right: {html.escape(shown.truth)}</span>'
    caption = f"{html.escape(shown.question)}<span>{_mark(shown.is_right)} {answer}</span>{truth}{_badge(shown.part)}"
    return f"<figure>{_image(shown.image, shown.question)}<figcaption>{caption}</figcaption></figure>"


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


def table(shown: Conversations) -> str:
    """Suite by suite: ID and CG, the frozen language model, the floor and the ceiling of each, as HTML."""
    head = "<tr><th>suite<th>ID<th>CG<th>frozen language model<th>floor ID / CG<th>ceiling ID / CG</tr>"
    scores = shown.scores
    rows = [*_answer_rows(scores), *_edit_rows(scores["edit"]), *_story_rows(scores["story"])]
    counts = {name: report.n for name, report in scores.items()}
    return f"""<div class="wide"><table>{head}
{"".join(map(_table_row, rows))}</table></div>
<p>Quick shares of the test suites, so they are noisy: {counts["mme"]} questions of MME's kind and {counts["gqa"]} of
GQA's, {counts["edit"]} edits, {counts["story"]} stories. The frozen language model sees images through its own vision
tower; both streams together are to keep what it knows. Floors: always yes, knowing the training questions without
seeing the image, handing the source back, telling another story, guessing by the kind of question. Ceilings: all right;
the true target after the codec; the true story after the codec at the noise of sampled latents.</p>"""


def _table_row(row: _Row) -> str:
    name, scores, *bounds = row
    cells = [*map(_cell, scores), *("–" if pair is _NONE else " / ".join(map(_cell, pair)) for pair in bounds)]
    return f"<tr><th>{name}" + "".join(f"<td>{cell}" for cell in cells) + "</tr>\n"


def _cell(value: _Cell) -> str:
    return "–" if value is None else f"{value:,.0f}" if value > STEPS else f"{value:.2f}"


def _answer_rows(scores: Mapping[str, Report]) -> Iterator[_Row]:
    full, mme_scores, gqa_scores = 200.0 * len(SUBTASKS), scores["mme"], scores["gqa"]
    floor = _values(mme_scores.bounds["floor"], "always_yes")
    vlm = _values(mme_scores.bounds["vlm"], "total")
    yield f"MME, points of {full:,.0f}", _values(mme_scores.parts, "total"), vlm, floor, (full, full)
    parts, vlm = gqa_scores.parts, _values(gqa_scores.bounds["vlm"], "accuracy")
    yield "GQA, accuracy", _values(parts, "accuracy"), vlm, _values(parts, "prior"), (1.0, 1.0)


def _edit_rows(scores: Report) -> Iterator[_Row]:
    for column, name in (("success", "edits, done and nothing else"), ("preserved", "edits, all else preserved")):
        floor, ceiling = (_values(scores.bounds[bound], column) for bound in ("copy", "ceiling"))
        yield name, _values(scores.parts, column), _NONE, floor, ceiling


def _story_rows(scores: Report) -> Iterator[_Row]:
    parts, floor, ceiling = scores.parts, scores.bounds["floor"], scores.bounds["ceiling"]["id"]
    names = ("structure", *story.RUNGS, "prefix")
    titles = ("text and image in turn", *RUNGS, f"first steps without a fault, of {STEPS}")
    for name, title in zip(names, titles, strict=True):
        yield f"stories, {title}", _values(parts, name), _NONE, _values(floor, name), (ceiling.value(name), None)
    yield "stories, answers", _values(parts, "answer"), _NONE, _values(floor, "guess"), (ceiling.value("answer"), None)


def _values(parts: Mapping[str, Scores], column: str) -> list[float]:
    return [parts[part].value(column) for part in PARTS]


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
