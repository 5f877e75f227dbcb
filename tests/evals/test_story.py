"""W-Story: true replies climb the whole ladder, and each fault is charged to its own rung and step."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from starflow2.errors import ConfigError, DataError
from starflow2.evals.statistics import Score
from starflow2.evals.story import SEED_BASE, StorySuite, read_replies, step_grades, usual_answers
from starflow2.evals.suite import Report, ceiling, check_lock, evaluate, lock_text, verify_lock
from starflow2.world.scene import Scene, SceneObject, render
from starflow2.world.splits import bucket
from starflow2.world.stories import REQUEST_KINDS
from starflow2.world.story_text import agrees, answer_question, parse_sentence

RUNGS = ("structure", "block", "image", "consistency")
pytestmark = pytest.mark.timeout(600)  # seconds of one core, but the core may be shared


FEW = StorySuite(stories=16, prior_stories=150)  # two stories in a quick run, and a guesser who has read little
ONLY_ID = replace(FEW, parts=("id",))


def stories_of(split, part):
    return [item.task for item in replace(FEW, parts=(part,)).items(split)[part]]


class Truth:
    """Replies as the story asks; `spoil` may change the replies to a story, given its steps."""

    def __init__(self, split="dev", spoil=lambda story, replies: None):
        known = [story for part in ("id", "cg", "paraphrase") for story in stories_of(split, part)]
        self.known = {(*(step.instruction for step in story.steps), story.question): story for story in known}
        self.spoil, self.seeds = spoil, []

    def __call__(self, talks, seeds):
        self.seeds += seeds
        return [self.reply(self.known[tuple(turns)]) for turns in talks]

    def reply(self, story):
        replies = [[step.sentence, render(step.scene)] for step in story.steps]
        replies.append([story.answer])
        self.spoil(story, replies)
        return replies


def part(spoil):
    return evaluate(ONLY_ID, Truth(spoil=spoil), "dev", quick=True).parts["id"]


def whole_part(spoil):
    return evaluate(ONLY_ID, Truth(spoil=spoil), "dev").parts["id"]


def steps(scores, rung):
    return [scores.by_kind[f"step {number}"].value(rung) for number in (1, 2, 3, 4)]


def repaint(replies, step, objects, background=0):
    replies[step][1] = render(Scene(objects=tuple(objects), background=background))


# ----------------------------------------------------------------------------------------------- the whole ladder


def test_true_replies_score_one_on_every_rung_and_the_report_survives_json():
    report = evaluate(FEW, Truth(), "dev")
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.n == 32 and set(report.parts) == {"id", "cg"}
    for name, scores in report.parts.items():
        truth, floor = report.bounds["truth"][name], report.bounds["floor"][name]
        assert scores.n == 16
        assert all(scores[rung].score == scores[rung].low == 1 for rung in RUNGS)
        assert all(steps(scores, rung) == [1, 1, 1, 1] for rung in RUNGS[1:])
        assert scores.value("prefix") == 4
        assert scores.value("answer") == scores.value("answer_drawn") == scores.value("answer_by_request") == 1
        assert scores.value("n_drawn") == 16
        assert all(truth.value(rung) == 1 for rung in (*RUNGS, "answer")) and truth.value("prefix") == 4
        assert floor.value("image") < 0.2 and floor.value("prefix") < 0.2 and floor.value("block") == 1
        assert 0 < floor.value("guess") < 1
    assert all(gap == Score(0, 0, 0) for gap in report.gap.columns.values())


def test_no_replies_score_nothing():
    def mute(story, replies):
        replies[:] = [[] for _ in replies]

    scores = part(mute)
    assert all(scores.value(name) == 0 for name in (*RUNGS, "prefix", "answer", "n_drawn"))
    assert scores["answer_drawn"] == scores["guess_drawn"] == Score(None)


def test_blank_pictures_are_neither_right_nor_consistent():
    def blank(story, replies):
        for step in range(4):
            repaint(replies, step, ())

    scores = part(blank)
    assert scores.value("structure") == 1
    assert all(scores.value(name) == 0 for name in ("block", "image", "consistency", "prefix"))


# ------------------------------------------------------------------------------------- each fault on its own rung


def test_a_skipped_picture_fails_the_structure_that_step_and_the_next():
    scores = part(lambda story, replies: replies[1].pop())
    assert scores.value("structure") == 0 and scores.value("prefix") == 1
    assert steps(scores, "block") == [1, 0, 1, 1]
    assert steps(scores, "image") == steps(scores, "consistency") == [1, 0, 0, 1]


@pytest.mark.parametrize("fault", ["second text", "picture first", "picture with the answer", "no answer"])
def test_any_other_order_of_blocks_fails_the_structure_alone(fault):
    def spoil(story, replies):
        if fault == "second text":
            replies[2].append("done.")
        elif fault == "picture first":
            replies[0].reverse()
        elif fault == "picture with the answer":
            replies[4].append(replies[0][1])
        else:
            replies[4].clear()

    scores = part(spoil)
    assert scores.value("structure") == 0 and scores.value("prefix") == 4
    assert scores.value("answer") == (fault != "no answer")


def bystanders(story, step):
    """Places in the list of those of the step's objects that it left alone."""
    old = story.steps[step - 1].scene.objects
    return [i for i, thing in enumerate(story.steps[step].scene.objects) if thing in old]


@pytest.mark.parametrize("fault", ["moved", "nudged", "resized"])
def test_a_bystander_that_moves_breaks_consistency_at_that_step_and_shortens_the_prefix(fault):
    """Built by hand, so that there is room to move."""
    story = next(s for s in stories_of("dev", "id") if [x.change.op for x in s.steps[:2]] == ["start", "add"])
    old, new = (
        SceneObject(shape=look.shape, color=look.color, size=look.size or 0, x=x, y=y, angle=0)
        for look, (x, y) in zip(
            (story.steps[1].change.reference, story.steps[1].change.after), placed(story.steps[1].change), strict=True
        )
    )
    size = 1 - old.size if fault == "resized" else old.size
    shift = {"moved": 6, "nudged": 2}.get(fault, 0)
    dx, dy = away(story.steps[1].change)
    after = SceneObject(
        shape=old.shape, color=old.color, size=size, x=old.x + shift * dx, y=old.y + shift * dy, angle=0
    )
    replies = Truth().reply(story)
    repaint(replies, 0, [old])
    repaint(replies, 1, [after, new])
    (reading,) = read_replies([replies])
    block, image, consistency = step_grades(story, reading)[1]
    assert image and consistency == (fault == "nudged")
    assert block or story.steps[1].change.reference.size is not None


def placed(change):
    """Where the reference and the added object stand, with room on the far side."""
    dx, dy = away(change)
    return (32 + 8 * dx, 32 + 8 * dy), (32 - 17 * dx, 32 - 17 * dy)


def away(change):
    return {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}[change.relation]


def test_a_vanished_bystander_breaks_consistency_and_the_sentence_but_not_the_change():
    chosen = []

    def spoil(story, replies):
        if story.steps[3].change.op == "add":
            others = [i for i in bystanders(story, 3) if not named(story.steps[3].change.reference, story, i)]
            if others:
                objects = [t for i, t in enumerate(story.steps[3].scene.objects) if i != others[0]]
                repaint(replies, 3, objects, story.steps[3].scene.background)
                chosen.append(story)

    scores = whole_part(spoil)
    left = 1 - len(chosen) / 16  # sixteenths are exact
    assert chosen and scores.value("structure") == 1
    assert steps(scores, "block") == steps(scores, "consistency") == [1, 1, 1, left]
    assert steps(scores, "image") == [1, 1, 1, 1] and scores.value("prefix") == 3 + left


def named(look, story, i):
    return look.fits(story.steps[3].scene.objects[i])


def test_a_change_that_is_not_made_fails_the_image_and_nothing_else_before_it():
    def spoil(story, replies):
        replies[3][1] = replies[2][1]

    scores = part(spoil)
    assert steps(scores, "image") == [1, 1, 1, 0] and steps(scores, "block") == [1, 1, 1, 0]
    assert scores.value("prefix") == 3


def test_a_wrong_sentence_fails_its_block_only():
    def spoil(story, replies):
        replies[1][0] = "there is something new."

    scores = part(spoil)
    assert steps(scores, "block") == [1, 0, 1, 1]
    assert scores.value("image") == scores.value("consistency") == scores.value("structure") == 1
    assert scores.value("prefix") == 1


def test_an_uninvited_object_breaks_consistency():
    def spoil(story, replies):
        image = replies[0][1].copy()
        spot = image[:12, :12] if np.ptp(image[:14, :14]) < 60 else image[-12:, -12:]
        spot[:] = (134, 52, 176)
        replies[0][1] = image

    scores = part(spoil)
    assert steps(scores, "consistency")[0] == steps(scores, "block")[0] == scores.value("prefix") == 0


# ---------------------------------------------------------------------------------------------------------- answers


def test_an_answer_is_compared_with_the_truth_and_with_what_was_drawn():
    """Whoever draws every last picture as that of step 1 and answers by it is right about what it drew."""
    truth = {}

    def spoil(story, replies):
        replies[3][1] = replies[0][1]
        word = answer_question(story.question, story.steps[0].scene.objects)
        replies[4] = [(word or story.answer).capitalize() + "."]
        truth[story.question, story.answer] = word

    scores = whole_part(spoil)
    settled = [word for word in truth.values() if word is not None]
    assert scores.value("answer_drawn") == 1 and scores.value("answer") < 1
    assert 0 < scores.value("n_drawn") < 16 and len(settled) <= scores.value("n_drawn")
    kinds = {kind: row for kind, row in scores.by_kind.items() if not kind.startswith("step")}
    right = sum(row.n * row.value("answer") for kind, row in kinds.items() if kind in REQUEST_KINDS)
    count = sum(row.n for kind, row in kinds.items() if kind in REQUEST_KINDS)
    assert scores.value("answer_by_request") == pytest.approx(right / count)


def test_the_guess_is_what_always_giving_the_usual_answer_scores():
    usual = usual_answers(FEW.prior_stories)

    def guess(story, replies):
        replies[4] = [usual[story.kind]]

    report = evaluate(ONLY_ID, Truth(spoil=guess), "dev")
    assert report.parts["id"].value("answer") == report.bounds["floor"]["id"].value("guess")


def test_the_reader_of_words_is_right_where_the_requests_settle_it_and_guesses_elsewhere():
    usual = usual_answers(FEW.prior_stories)

    def read(story, replies):
        replies[4] = [story.answer if story.kind in REQUEST_KINDS else usual[story.kind]]

    report = evaluate(ONLY_ID, Truth(spoil=read), "dev")
    floor = report.bounds["floor"]["id"]
    assert floor.value("guess") < report.parts["id"].value("answer") == floor.value("words")


def test_who_is_asked_with_and_without_true_pictures_never_sees_the_answer():
    def ask(stories, pictures):
        assert all(story.answer == "" for story in stories)
        if pictures is None:
            return ["yes"] * len(stories)
        assert pictures.shape == (len(stories), 4, 64, 64, 3)
        assert np.array_equal(pictures[0, 3], render(stories[0].steps[3].scene))
        return [answer_question(story.question, story.steps[-1].scene.objects) for story in stories]

    asked = evaluate(replace(ONLY_ID, ask=ask), Truth(), "dev", quick=True).bounds["asked"]["id"]
    assert asked.value("true_pictures") == 1 and asked.value("no_pictures") < 1
    with pytest.raises(DataError, match="expected 2 texts"):
        evaluate(replace(ONLY_ID, ask=lambda stories, pictures: []), Truth(), "dev", quick=True)


# ------------------------------------------------------------------------------------------------------- the suite


def test_a_quick_run_tells_one_story_in_eight_from_the_seeds_of_the_full_run():
    full, quick, done = Truth(), Truth(), []
    evaluate(ONLY_ID, full, "dev")
    evaluate(ONLY_ID, quick, "dev", quick=True, progress=lambda n, total: done.append((n, total)))
    assert full.seeds == list(range(SEED_BASE, SEED_BASE + 16))
    assert len(quick.seeds) == 2 and set(quick.seeds) <= set(full.seeds) and done[-1] == (2, 2)


def test_a_codec_that_forgets_the_picture_has_a_ceiling_of_nothing():
    gray = ceiling(ONLY_ID, "dev", lambda images: np.full_like(images, 200), quick=True)["id"]
    assert gray.value("image") == 0 and gray.value("structure") == 1
    assert ceiling(ONLY_ID, "dev", None, quick=True)["id"].value("prefix") == 4


def test_what_cannot_be_graded_is_refused():
    with pytest.raises(ConfigError, match="split"):
        evaluate(FEW, Truth(), "train")
    for reply, message in (
        (lambda talks, seeds: [], "expected 2 stories"),
        (lambda talks, seeds: [[[]] for _ in talks], "of 5 turns"),
        (lambda talks, seeds: [[[None]] * 5 for _ in talks], "block"),
        (lambda talks, seeds: [[[np.zeros((64, 64, 3))]] * 5 for _ in talks], "block"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(FEW, reply, "dev", quick=True)


def test_the_judge_reads_back_what_sentences_state_and_last_pictures_are_of_the_split():
    for story in stories_of("dev", "cg"):
        assert bucket(story.steps[-1].scene) == "dev"
        assert agrees(parse_sentence(story.steps[-1].sentence), story.steps[-1].scene.objects)
    assert Counter(story.kind for story in stories_of("dev", "cg")).total() == 16


def test_the_suites_are_the_frozen_ones_and_another_seed_breaks_the_lock():
    verify_lock(StorySuite())
    fresh = StorySuite().lock()
    with pytest.raises(DataError, match=r"changed: story\.seed_base$"):
        check_lock(json.loads(lock_text()), {"story": fresh["story"] | {"seed_base": 1}})


# ------------------------------------------------------------------------------------------- several objects at once


@pytest.fixture(scope="module")
def about_several():
    """Plain-word stories with a request about several objects, and the number of its step."""
    stories = [item.task for item in StorySuite(parts=("plain",)).items("dev")["plain"]]
    found = [(s, i) for s in stories for i, step in enumerate(s.steps) if step.change.also]
    assert len(found) > 2
    return found


def grades_of(story, *changes):
    """Grades of the true replies, some images painted anew: (step, scene)."""
    scenes = dict(enumerate(step.scene for step in story.steps)) | dict(changes)
    replies = [[step.sentence, render(scenes[i])] for i, step in enumerate(story.steps)]
    (reading,) = read_replies([[*replies, [story.answer]]])
    return step_grades(story, reading)


def test_true_replies_to_requests_about_several_objects_are_right(about_several):
    for story, _ in about_several:
        assert grades_of(story) == [(True, True, True)] * 4


def test_one_of_several_that_stays_as_it_was_is_a_change_that_was_not_made(about_several):
    for story, i in about_several:
        before, after = story.steps[i - 1].scene, story.steps[i].scene
        kept = next(obj for obj in before.objects if obj not in after.objects)
        rest = [obj for obj in after.objects if (obj.x, obj.y) != (kept.x, kept.y)]
        half_done = replace(after, objects=(*rest, kept))
        assert [grade[1:] for grade in grades_of(story, (i, half_done))][i] == (False, False)


def test_a_bystander_of_a_change_of_several_has_to_stay(about_several):
    for story, i in about_several:
        after = story.steps[i].scene
        staying = [obj for obj in after.objects if obj in story.steps[i - 1].scene.objects]
        if staying:
            gone = replace(after, objects=tuple(obj for obj in after.objects if obj is not staying[0]))
            if gone.objects:
                assert not grades_of(story, (i, gone))[i][2]
