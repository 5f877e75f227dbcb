"""W-Story: the truth climbs the whole ladder, and each fault is charged to its own rung and step."""

import json
from collections import Counter

import numpy as np
import pytest

from starflow2.errors import ConfigError, DataError
from starflow2.evals import story as stories
from starflow2.evals.story import evaluate_story, story_ceiling, verify_lock
from starflow2.world.scene import Scene, SceneObject, render
from starflow2.world.splits import bucket
from starflow2.world.stories import REQUEST_KINDS
from starflow2.world.story_text import agrees, answer_question, parse_sentence

RUNGS = ("structure", "block", "image", "consistency")
pytestmark = pytest.mark.timeout(600)  # seconds of one core, but the core may be shared


@pytest.fixture(autouse=True, scope="module")
def _few():
    """A suite of sixteen stories per part, two in a quick run, and a guesser who has read little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stories, "STORIES", 16)
        patch.setattr(stories, "PRIOR_STORIES", 150)
        for cached in (stories._suite, stories._bounds, stories._guesses):
            cached.cache_clear()
        yield
    for cached in (stories._suite, stories._bounds, stories._guesses):
        cached.cache_clear()


class Truth:
    """Tells the story that was asked for; `spoil` may change a story's blocks, given its steps."""

    def __init__(self, split="dev", spoil=lambda story, told: None):
        known = [story for part in ("id", "cg", "paraphrase") for story in stories._suite(split, part)]
        self.known = {(*(step.instruction for step in story.steps), story.question): story for story in known}
        self.spoil, self.seeds = spoil, []

    def __call__(self, asked, seeds):
        self.seeds += seeds
        return [self.tell(self.known[tuple(turns)]) for turns in asked]

    def tell(self, story):
        told = [[("text", step.sentence), ("image", render(step.scene))] for step in story.steps]
        told.append([("text", story.answer)])
        self.spoil(story, told)
        return told


def part(spoil, **options):
    return evaluate_story(Truth(spoil=spoil), "dev", quick=True, parts=("id",), **options)["parts"]["id"]


def steps(row, rung):
    return row[rung]["by_step"]


def repaint(told, step, things, background=0):
    told[step][1] = ("image", render(Scene(objects=tuple(things), background=background)))


# ----------------------------------------------------------------------------------------------- the whole ladder


def test_the_truth_told_scores_one_on_every_rung_and_the_report_is_json():
    report = evaluate_story(Truth(), "dev")
    assert json.loads(json.dumps(report)) == report
    assert report["n"] == 32 and set(report["parts"]) == {"id", "cg"}
    for row in report["parts"].values():
        assert row["n"] == 16
        assert all(row[rung]["score"] == row[rung]["low"] == 1 for rung in RUNGS)
        assert all(steps(row, rung) == [1, 1, 1, 1] for rung in RUNGS[1:])
        assert row["prefix"]["score"] == 4
        assert row["answer"]["true"]["score"] == row["answer"]["drawn"]["score"] == row["answer"]["told"]["score"] == 1
        assert row["answer"]["drawn"]["n"] == 16
        assert row["ceiling"] == dict.fromkeys((*RUNGS, "answer"), 1.0) | {"prefix": 4.0}
        assert row["floor"]["image"] < 0.2 and row["floor"]["prefix"] < 0.2 and row["floor"]["block"] == 1
        assert 0 < row["floor"]["guess"] < 1
    assert all(gap == {"score": 0, "low": 0, "high": 0} for gap in report["gap"].values())


def test_nothing_told_scores_nothing():
    def mute(story, told):
        told[:] = [[] for _ in told]

    row = part(mute)
    assert all(row[name]["score"] == 0 for name in (*RUNGS, "prefix"))
    assert row["answer"]["true"]["score"] == 0 and row["answer"]["drawn"] == {
        "score": None,
        "low": None,
        "high": None,
        "n": 0,
        "guess": None,
    }


def test_blank_pictures_are_neither_right_nor_consistent():
    def blank(story, told):
        for step in range(4):
            repaint(told, step, ())

    row = part(blank)
    assert row["structure"]["score"] == 1
    assert row["block"]["score"] == row["image"]["score"] == row["consistency"]["score"] == row["prefix"]["score"] == 0


# ------------------------------------------------------------------------------------- each fault on its own rung


def test_a_skipped_picture_fails_the_structure_that_step_and_the_next():
    row = part(lambda story, told: told[1].pop())
    assert row["structure"]["score"] == 0 and row["prefix"]["score"] == 1
    assert steps(row, "block") == [1, 0, 1, 1]
    assert steps(row, "image") == steps(row, "consistency") == [1, 0, 0, 1]


@pytest.mark.parametrize("fault", ["second text", "picture first", "picture with the answer", "no answer"])
def test_any_other_order_of_blocks_fails_the_structure_alone(fault):
    def spoil(story, told):
        if fault == "second text":
            told[2].append(("text", "done."))
        elif fault == "picture first":
            told[0].reverse()
        elif fault == "picture with the answer":
            told[4].append(told[0][1])
        else:
            told[4].clear()

    row = part(spoil)
    assert row["structure"]["score"] == 0 and row["prefix"]["score"] == 4
    assert row["answer"]["true"]["score"] == (fault != "no answer")


def bystanders(story, step):
    """Places in the list of those of the step's objects that it left alone."""
    old = story.steps[step - 1].scene.objects
    return [i for i, thing in enumerate(story.steps[step].scene.objects) if thing in old]


@pytest.mark.parametrize("fault", ["moved", "nudged", "resized"])
def test_a_bystander_that_moves_breaks_consistency_at_that_step_and_shortens_the_prefix(fault):
    """Built by hand, so that there is room to move."""
    story = next(s for s in stories._suite("dev", "id") if [x.change.op for x in s.steps[:2]] == ["start", "add"])
    old, new = (
        SceneObject(shape=look.shape, color=look.color, size=look.size or 0, x=x, y=y, angle=0)
        for look, (x, y) in zip(
            (story.steps[1].change.reference, story.steps[1].change.after), placed(story.steps[1].change), strict=True
        )
    )
    size = 1 - old.size if fault == "resized" else old.size
    shift = {"moved": 6, "nudged": 2}.get(fault, 0)
    after = SceneObject(shape=old.shape, color=old.color, size=size, x=old.x, y=old.y, angle=0)
    dx, dy = away(story.steps[1].change)
    after = SceneObject(
        shape=old.shape, color=old.color, size=size, x=old.x + shift * dx, y=old.y + shift * dy, angle=0
    )
    told = Truth().tell(story)
    repaint(told, 0, [old])
    repaint(told, 1, [after, new])
    (reading,) = stories.read_told([told])
    block, image, kept = stories.step_grades(story, reading)[1]
    assert image and kept == (fault == "nudged")
    assert block or story.steps[1].change.reference.size is not None


def placed(change):
    """Where the reference and the added object stand, with room on the far side."""
    dx, dy = away(change)
    return (32 + 8 * dx, 32 + 8 * dy), (32 - 17 * dx, 32 - 17 * dy)


def away(change):
    return {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}[change.relation]


def test_a_vanished_bystander_breaks_consistency_and_the_sentence_but_not_the_change():
    chosen = []

    def spoil(story, told):
        if story.steps[3].change.op == "add":
            others = [i for i in bystanders(story, 3) if not named(story.steps[3].change.reference, story, i)]
            if others:
                things = [t for i, t in enumerate(story.steps[3].scene.objects) if i != others[0]]
                repaint(told, 3, things, story.steps[3].scene.background)
                chosen.append(story)

    row = evaluate_story(Truth(spoil=spoil), "dev", parts=("id",))["parts"]["id"]
    left = 1 - len(chosen) / 16
    assert chosen and row["structure"]["score"] == 1
    assert steps(row, "block") == steps(row, "consistency") == [1, 1, 1, left]
    assert steps(row, "image") == [1, 1, 1, 1] and row["prefix"]["score"] == 3 + left


def named(look, story, i):
    return look.fits(story.steps[3].scene.objects[i])


def test_a_change_that_is_not_made_fails_the_image_and_nothing_else_before_it():
    def spoil(story, told):
        told[3][1] = told[2][1]

    row = part(spoil)
    assert steps(row, "image") == [1, 1, 1, 0] and steps(row, "block") == [1, 1, 1, 0]
    assert row["prefix"]["score"] == 3


def test_a_wrong_sentence_fails_its_block_only():
    def spoil(story, told):
        told[1][0] = ("text", "there is something new.")

    row = part(spoil)
    assert steps(row, "block") == [1, 0, 1, 1]
    assert row["image"]["score"] == row["consistency"]["score"] == row["structure"]["score"] == 1
    assert row["prefix"]["score"] == 1


def test_an_uninvited_object_breaks_consistency():
    def spoil(story, told):
        image = told[0][1][1].copy()
        spot = image[:12, :12] if np.ptp(image[:14, :14]) < 60 else image[-12:, -12:]
        spot[:] = (134, 52, 176)
        told[0][1] = ("image", image)

    row = part(spoil)
    assert steps(row, "consistency")[0] == 0 and steps(row, "block")[0] == 0 and row["prefix"]["score"] == 0


# ---------------------------------------------------------------------------------------------------------- answers


def test_an_answer_is_held_against_the_truth_and_against_what_was_drawn():
    """Whoever draws every last picture as that of step 1 and answers by it is right about what it drew."""
    truth = {}

    def spoil(story, told):
        told[3][1] = told[0][1]
        word = answer_question(story.question, story.steps[0].scene.objects)
        told[4] = [("text", (word or story.answer).capitalize() + ".")]
        truth[story.question, story.answer] = word

    row = evaluate_story(Truth(spoil=spoil), "dev", parts=("id",))["parts"]["id"]["answer"]
    settled = [word for word in truth.values() if word is not None]
    assert row["drawn"]["score"] == 1 and 0 < row["drawn"]["n"] < 16 and len(settled) <= row["drawn"]["n"]
    assert row["true"]["score"] < 1
    assert row["told"]["n"] == sum(n["true"]["n"] for kind, n in row["by_kind"].items() if kind in REQUEST_KINDS)


def test_the_guess_is_what_always_giving_the_usual_answer_scores():
    usual = stories._guesses()

    def guess(story, told):
        told[4] = [("text", usual[story.kind])]

    row = evaluate_story(Truth(spoil=guess), "dev", parts=("id",))["parts"]["id"]
    assert row["answer"]["true"]["score"] == row["floor"]["guess"]


def test_the_reader_of_words_is_right_where_the_requests_settle_it_and_guesses_elsewhere():
    usual = stories._guesses()

    def read(story, told):
        told[4] = [("text", story.answer if story.kind in REQUEST_KINDS else usual[story.kind])]

    row = evaluate_story(Truth(spoil=read), "dev", parts=("id",))["parts"]["id"]
    assert row["floor"]["guess"] < row["answer"]["true"]["score"] == row["floor"]["words"]


def test_who_is_asked_with_and_without_true_pictures_never_sees_the_answer():
    def ask(told, pictures):
        assert all(story.answer == "" for story in told)
        if pictures is None:
            return ["yes"] * len(told)
        assert pictures.shape == (len(told), 4, 64, 64, 3) and np.array_equal(
            pictures[0, 3], render(told[0].steps[3].scene)
        )
        return [answer_question(story.question, story.steps[-1].scene.objects) for story in told]

    row = part(lambda story, told: None, ask=ask)["asked"]
    assert row["true_pictures"]["score"] == 1 and row["no_pictures"]["score"] < 1
    with pytest.raises(DataError, match="expected 2 texts"):
        part(lambda story, told: None, ask=lambda told, pictures: [])


# ------------------------------------------------------------------------------------------------------- the suite


def test_a_quick_run_tells_one_story_in_eight_from_the_seeds_of_the_full_run():
    full, quick, done = Truth(), Truth(), []
    evaluate_story(full, "dev", parts=("id",))
    evaluate_story(quick, "dev", parts=("id",), quick=True, progress=lambda n, total: done.append((n, total)))
    assert full.seeds == list(range(stories.SEED_BASE, stories.SEED_BASE + 16))
    assert len(quick.seeds) == 2 and set(quick.seeds) <= set(full.seeds) and done[-1] == (2, 2)


def test_a_codec_that_forgets_the_picture_has_a_ceiling_of_nothing():
    gray = story_ceiling("dev", quick=True, roundtrip=lambda images: np.full_like(images, 200))
    assert gray["image"]["score"] == 0 and gray["structure"]["score"] == 1
    assert story_ceiling("dev", quick=True)["prefix"]["score"] == 4


def test_what_cannot_be_graded_is_refused():
    with pytest.raises(ConfigError, match="split"):
        evaluate_story(Truth(), "train")
    for tell, message in (
        (lambda asked, seeds: [], "expected 2 stories"),
        (lambda asked, seeds: [[[]] for _ in asked], "of 5 turns"),
        (lambda asked, seeds: [[[("text", None)]] * 5 for _ in asked], "block"),
        (lambda asked, seeds: [[[("image", np.zeros((64, 64, 3)))]] * 5 for _ in asked], "block"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate_story(tell, "dev", quick=True)


def test_the_judge_reads_back_what_sentences_state_and_last_pictures_are_of_the_split():
    for story in stories._suite("dev", "cg"):
        assert bucket(story.steps[-1].scene) == "dev"
        assert agrees(parse_sentence(story.steps[-1].sentence), story.steps[-1].scene.objects)
    assert Counter(story.kind for story in stories._suite("dev", "cg")).total() == 16


def test_the_suites_are_the_frozen_ones(monkeypatch):
    monkeypatch.setattr(stories, "STORIES", 64)
    stories._suite.cache_clear()
    try:
        verify_lock()
        monkeypatch.setattr(stories, "SEED_BASE", 1)
        with pytest.raises(DataError, match=r"changed: story\.seed_base$"):
            verify_lock()
    finally:
        stories._suite.cache_clear()
