"""W-Edit in sessions: three edits of one image in a conversation, and an undo before the third.

Every turn is graded as a single edit of the *true* image before it, so an error that an earlier turn left behind counts
again. Grades and controls are those of `edit`.

Letters: M sessions, K columns of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import numpy as np

from starflow2.evals.edit import (
    COLUMNS,
    SEED_BASE,
    SESSIONS,
    EditGrade,
    EditSuite,
    edit_marks,
    edit_twins,
    grade_edits,
    is_same_image,
)
from starflow2.evals.statistics import Score, Scores, bootstrap, quick_share
from starflow2.evals.suite import Codec, Graded, Images, Job, Runs, Section, checked_images, jobs, roundtrip_scenes
from starflow2.world.edits import EditSession, suite_sessions
from starflow2.world.scene import Split, render

__all__ = ["Session", "SessionsSuite", "Start"]

TURNS: Final = 3


class Session(Protocol):
    """A conversation about one image. All images are (64, 64, 3) uint8."""

    def edit(self, instruction: str) -> Images:
        """The current image, changed as instructed."""
        ...

    def undo(self, turns: int) -> Images:
        """Go back by so many edits; the image there, which is current from now on."""
        ...


Start = Callable[[Images, int], Session]  # image, seed


@dataclass(frozen=True, slots=True)
class SessionRun:
    """Images after the three edits, and after the undo."""

    images: tuple[Images, ...]
    undone: Images


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsSuite:
    """Sessions of three edits, all of them "id". Scores a `Start`. codec: as in `EditSuite`.

    Columns: all_turns, the share of sessions in which all three edits succeed; those of `EditSuite`, means over turns;
    undo_same, the share of undos that lead back to the earlier image, up to the PSNR that an edit must preserve, and
    undo_exact, to the byte. After an undo of everything, the codec's round trip of the source is as good as the source.
    """

    sessions: int = SESSIONS
    codec: Codec | None = None
    name: ClassVar[str] = "edit_sessions"
    chunk: ClassVar[int] = 1

    def items(self, split: Split) -> Mapping[str, Sequence[Job[EditSession]]]:
        return {"id": jobs(suite_sessions(split, self.sessions), SEED_BASE)}

    def quick(self, items: Sequence[Job[EditSession]]) -> Sequence[Job[EditSession]]:
        chosen = quick_share(items, stratum=lambda item: item.task.undo_to, unit=lambda item: item.index)
        return sorted(chosen, key=lambda item: item.task.undo_to)

    def run(self, start: Start, items: Sequence[Job[EditSession]]) -> list[SessionRun]:
        return [_run(start, item.task, item.seed) for item in items]

    def grade(self, runs: Runs[Job[EditSession], SessionRun]) -> Graded:
        """Scores of sessions and undos, and of each edit as a kind. Controls are those of `EditSuite`."""
        pairs = runs["id"]
        edits = [edit for item, _ in pairs for edit in item.task.edits]
        references = roundtrip_scenes(self.codec, [edit.source for edit in edits])
        images = np.stack([image for _, run in pairs for image in run.images])
        scores = _score(grade_edits(edits, images, references))
        with_references = zip(pairs, references[::TURNS], strict=True)
        marks = [_undo_marks(*pair, reference) for pair, reference in with_references]
        undo = bootstrap(range(len(marks)), np.array(marks, np.float64), np.random.default_rng(0))
        controls = {
            "copy": np.repeat(references[::TURNS], TURNS, axis=0),
            "ceiling": roundtrip_scenes(self.codec, [edit.target for edit in edits]),
        }
        settings = {"seed_base": SEED_BASE, "has_codec": self.codec is not None}
        bounds = {name: {"id": _score(grade_edits(edits, made, references))} for name, made in controls.items()}
        return Graded({"id": scores.with_columns(**undo.columns(("undo_same", "undo_exact")))}, None, bounds, settings)

    def lock(self) -> Section:
        return EditSuite().lock()


def _run(start: Start, session: EditSession, seed: int) -> SessionRun:
    talk = start(render(session.source), seed)
    first, second, third = session.instructions
    images = [_checked(talk.edit(first)), _checked(talk.edit(second))]
    undone = _checked(talk.undo(2 - session.undo_to))
    return SessionRun((*images, _checked(talk.edit(third))), undone)


def _checked(image: Images) -> Images:
    return checked_images(np.asarray(image)[None], 1)[0]


def _undo_marks(item: Job[EditSession], run: SessionRun, reference: Images) -> tuple[bool, bool]:
    """Marks of an undo: the image is back, and to the byte. reference: the source after the codec's round trip."""
    earlier = [run.images[0]] if item.task.undo_to else [render(item.task.source), reference]
    is_same = any(is_same_image(run.undone, image) for image in earlier)
    return is_same, any(np.array_equal(run.undone, image) for image in earlier)


def _score(grades: Sequence[EditGrade]) -> Scores:
    """Scores of all sessions, three grades each; sessions are resampled whole."""
    marks = np.array(list(map(edit_marks, grades)), np.float64).reshape(-1, TURNS, len(COLUMNS))  # (M, 3, K)
    rows, rng = range(len(marks)), np.random.default_rng(0)
    turns = [bootstrap(rows, marks[:, turn], rng).columns(COLUMNS) for turn in range(TURNS)]
    means = bootstrap(rows, np.asarray(marks.mean(axis=1)), rng).columns(COLUMNS)
    means["twins"] = Score(edit_twins(grades))
    all_turns = bootstrap(rows, np.asarray(marks[:, :, :1].all(axis=1), np.float64), rng).columns(("all_turns",))
    by_kind = {f"edit {number}": Scores(len(rows), len(rows), columns) for number, columns in enumerate(turns, 1)}
    return Scores(len(rows), len(rows), all_turns | means, by_kind)
