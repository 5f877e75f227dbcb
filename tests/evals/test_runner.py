"""Suites by name: tensors meet bytes at the seam, and every report has its lines with floors and ceilings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from starflow2.errors import ConfigError
from starflow2.evals import runner as suites
from starflow2.evals.runner import score_suite
from starflow2.evals.tables import HEADINGS, lines, suite_table
from starflow2.world.stories import suite_stories


class Talking:
    """A session that draws in turn what is darker by one step, and knows what it was told since its beginning."""

    told: ClassVar[list[list[object]]] = []  # of every session, all that it was ever told

    def __init__(self, seed: int) -> None:
        self.history: list[object] = []
        Talking.told.append([])

    def add(self, *parts: object) -> Talking:
        self.history += [p if isinstance(p, str) else "picture" for p in parts]
        Talking.told[-1] += [p if isinstance(p, str) else "picture" for p in parts]
        return self

    def draw(self) -> Any:
        image = torch.full((3, 64, 64), 1 - 0.1 * len(self.history))
        return SimpleNamespace(picture=SimpleNamespace(image=image))

    def mark(self) -> int:
        return len(self.history)

    def rewind(self, mark: int) -> None:
        del self.history[mark:]


class Fake:
    """A talker that does nothing well, and remembers what it was given."""

    sampling_noise = 0.5

    def __init__(self) -> None:
        self.noise: list[float] = []
        self.pasts: Sequence[Any] = ()
        self.shown: list[int] = []

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return torch.ones(len(prompts), 3, 64, 64)

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        self.noise.append(noise_level)
        return images

    def answers(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> list[str]:
        self.shown += [len(some) for some in images]
        return ["yes"] * len(questions)

    def answers_after(self, pasts: Sequence[Any], questions: Sequence[str]) -> list[str]:
        self.pasts = pasts
        return ["after"] * len(questions)

    def session(self, *, seed: int = 0) -> Any:
        return Talking(seed)

    def tower_answers(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        return ["no"] * len(questions)

    def edits(self, images: Tensor, instructions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return -images

    def tell(self, talks: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[list[list[str | Tensor]]]:
        return [[["words", torch.zeros(3, 64, 64)] for _ in talk] for talk in talks]


def scored(score: float) -> dict[str, float]:
    return {"score": score, "low": score - 0.1, "high": score + 0.1}


def test_pictures_cross_the_seam_as_bytes_and_back(monkeypatch):
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1] = 255

    def evaluate_edit(edit: Any, split: str, *, codec: Any, draw: Any, **_: Any) -> dict[str, Any]:
        return {"made": edit(images, ["a", "b"], [0, 1]), "same": codec(images), "drawn": draw}

    fake = Fake()
    monkeypatch.setattr(suites, "evaluate_edit", evaluate_edit)
    report = score_suite(fake, "edit", "dev", quick=True)
    assert (report["made"] == 255 - images).all() and (report["same"] == images).all()
    assert report["drawn"] is None, "a quick run leaves the costly control out"
    assert score_suite(fake, "edit", "dev")["drawn"] is not None


def test_stories_come_back_as_blocks_of_words_and_bytes(monkeypatch):
    def evaluate_story(tell: Any, split: str, **_: Any) -> dict[str, Any]:
        return {"told": tell([["one", "two"]], [0])}

    monkeypatch.setattr(suites, "evaluate_story", evaluate_story)
    monkeypatch.setattr(suites, "story_ceiling", lambda split, **_: {"prefix": scored(4.0)})
    ((first, _),) = score_suite(Fake(), "story", "dev")["told"]
    assert [kind for kind, _ in first] == ["text", "image"]
    assert first[1][1].shape == (64, 64, 3) and first[1][1].dtype == np.uint8


def test_questions_after_the_true_story_come_behind_its_words_with_and_without_its_pictures(monkeypatch):
    story = suite_stories("dev", "id", 1)[0]

    def evaluate_story(tell: Any, split: str, *, ask: Any, **_: Any) -> dict[str, Any]:
        return {"said": ask([story], images)}

    monkeypatch.setattr(suites, "evaluate_story", evaluate_story)
    monkeypatch.setattr(suites, "story_ceiling", lambda split, **_: {})
    for images in (np.full((1, 4, 64, 64, 3), 255, np.uint8), None):
        fake = Fake()
        assert score_suite(fake, "story", "dev")["said"] == ["after"]
        (past,) = fake.pasts
        assert [said for said, _ in past] == [[step.instruction] for step in story.steps]
        for step, (_, replied) in zip(story.steps, past, strict=True):
            assert replied[0] == step.sentence and len(replied) == (1 if images is None else 2)
            assert images is None or (replied[1] == 1).all()


def test_understanding_is_set_beside_the_language_models_own(monkeypatch):
    def evaluate(answer: Any, split: str, **_: Any) -> dict[str, Any]:
        said = answer(np.zeros((1, 64, 64, 3), np.uint8), ["is there a star?"])[0]
        return {"parts": {"id": said, "cg": said}}

    monkeypatch.setattr(suites, "evaluate_mme", evaluate)
    report = score_suite(Fake(), "mme", "dev")
    assert report["parts"]["id"] == "yes" and report["vlm"]["id"] == "no"


def test_edits_of_a_session_go_on_from_the_picture_there_is_and_going_back_forgets(monkeypatch):
    source = np.full((64, 64, 3), 255, np.uint8)

    def evaluate(start: Any, split: str, **_: Any) -> dict[str, Any]:
        for turns in (1, 2):
            talk = start(source, 7)
            first, second = talk.edit("a"), talk.edit("b")
            assert first.mean() > second.mean()
            assert np.array_equal(talk.undo(turns), first if turns == 1 else source)
            third = talk.edit("c")
            assert np.array_equal(third, second if turns == 1 else first), "as many words since, so as dark"
        return {}

    monkeypatch.setattr(suites, "evaluate_edit_sessions", evaluate)
    Talking.told.clear()
    score_suite(Fake(), "sessions", "dev")
    assert Talking.told == [["picture", "a", "b", "c"], ["picture", "a", "b", "picture", "c"]]


def test_questions_about_any_number_of_pictures(monkeypatch):
    def evaluate_mcq(answer: Any, split: str, **_: Any) -> dict[str, Any]:
        picture = np.zeros((64, 64, 3), np.uint8)
        return {"said": answer([[picture, picture], [], [picture]], ["a", "b", "c"])}

    fake = Fake()
    monkeypatch.setattr(suites, "evaluate_mcq", evaluate_mcq)
    assert len(score_suite(fake, "mcq", "dev")["said"]) == 3 and fake.shown == [2, 0, 1]


def test_an_unknown_suite_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match='Did you mean "story"'):
        score_suite(Fake(), "storys", "dev")


MME = {
    "suite": "mme",
    "split": "test",
    "quick": False,
    "n": 768,
    "parts": {
        part: {
            "total": scored(total),
            "by_subtask": {"count": scored(150.0)},
            "floor": {"always_yes": 300.0, "coin": 450.0},
        }
        for part, total in (("id", 900.0), ("cg", 850.0))
    },
    "vlm": {part: {"total": scored(1000.0), "by_subtask": {"count": scored(160.0)}} for part in ("id", "cg")},
}
EDIT = {
    "suite": "edit",
    "split": "dev",
    "quick": True,
    "n": 63,
    "parts": {
        part: {
            "overall": {name: scored(0.5) for name in ("success", "applied", "preserved", "overall")},
            "by_operation": {"move": {"success": scored(0.25)}},
            "controls": {
                kind: {"overall": {name: scored(value) for name in ("success", "applied", "preserved", "overall")}}
                for kind, value in (("copy", 0.0), ("ceiling", 1.0))
            },
        }
        for part in ("id", "cg")
    },
}


def test_lines_put_floor_and_ceiling_beside_every_headline():
    first, second = lines(MME)
    assert first[0] == "total of 1,200" and first[1].startswith("900 [") and first[3] == "50"
    assert "300 always yes" in first[4] and first[5] == "1000 / 1000"
    assert second[0] == "count" and second[5] == "160 / 160"
    success = lines(EDIT)[0]
    assert success[:1] == ("success",) and success[4:] == ("0.000 / 0.000", "1.000 / 1.000")
    assert lines(EDIT)[-1][0] == "move: success"


def test_tables_say_which_suite_and_whether_it_was_a_quick_run():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(suite_table(EDIT))
    text = " ".join(console.export_text().split())
    assert "W-edit, quick dev, 63 items" in text and all(heading in text for heading in HEADINGS)
    assert "handed back unchanged" in text
