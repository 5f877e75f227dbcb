"""W-Edit in sessions: who knows every turn scores all of it, and an undo that is forgotten is found out."""

from __future__ import annotations

import json
from functools import partial

import numpy as np

from starflow2.evals.edit import SEED_BASE
from starflow2.evals.sessions import SessionsSuite
from starflow2.evals.suite import Report, evaluate
from starflow2.world.scene import render

FEW = SessionsSuite(sessions=16)


class Knower:
    """Knows each session's pictures; may forget to undo."""

    def __init__(self, image, seed, forgets=False):
        self.session = FEW.items("dev")["id"][seed - SEED_BASE].task
        assert np.array_equal(render(self.session.source), image)
        self.versions, self.forgets, self.turn = [image], forgets, 0

    def edit(self, instruction):
        assert instruction == self.session.instructions[self.turn]
        self.versions.append(render(self.session.scenes[self.turn]))
        self.turn += 1
        return self.versions[-1]

    def undo(self, turns):
        if not self.forgets:
            del self.versions[-turns:]
        return self.versions[-1]


def test_who_knows_every_turn_and_undoes_it_scores_all_of_the_sessions():
    done = []
    report = evaluate(FEW, Knower, "dev", progress=lambda n, total: done.append((n, total)))
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.n == 16 and done[-1] == (16, 16)
    scores, copy, ceiling = report.parts["id"], report.bounds["copy"]["id"], report.bounds["ceiling"]["id"]
    assert [turn.value("success") for turn in scores.by_kind.values()] == [1, 1, 1] and scores["all_turns"].low == 1
    assert scores.value("undo_same") == scores.value("undo_exact") == 1
    assert copy.value("success") == copy.value("all_turns") == copy.by_kind["edit 1"].value("applied") == 0
    assert ceiling.value("all_turns") == 1


def test_who_forgets_to_undo_is_found_out():
    report = evaluate(FEW, partial(Knower, forgets=True), "dev", quick=True)
    scores = report.parts["id"]
    assert report.n == 2 and scores.value("undo_exact") == 0 and scores.value("undo_same") < 0.7


def test_an_early_turn_that_fails_and_is_made_good_counts_once():
    class Stuck(Knower):
        def edit(self, instruction):
            made = super().edit(instruction)
            return made if self.turn > 1 else self.versions[0]

    scores = evaluate(FEW, Stuck, "dev", quick=True).parts["id"]
    first, second, third = (turn.value("success") for turn in scores.by_kind.values())
    assert first == scores.value("all_turns") == 0 and second == third == 1
