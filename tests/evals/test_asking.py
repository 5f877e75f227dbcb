"""W-MME-p and W-GQA: who knows the truth scores all of it, who never looks scores the floor."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from starflow2.errors import ConfigError, DataError
from starflow2.evals.asking import digests
from starflow2.evals.gqa import SORT_OF, GqaSuite, question_prior
from starflow2.evals.mme import MmeSuite, parse_yes_no, score_mme
from starflow2.evals.statistics import Score
from starflow2.evals.suite import Report, evaluate, verify_lock
from starflow2.world.questions import HELD_OUT_CHAINS, SUBTASKS, YES_NO, chain
from starflow2.world.scene import render
from starflow2.world.splits import bucket, held_out, scene_key

SUITES = {"mme": MmeSuite(), "gqa": GqaSuite()}


class Knower:
    """Looks the right answer up by picture and words; remembers what it was asked."""

    def __init__(self, items):
        self.truth = {(render(i.scene).tobytes(), i.question.text): i.question.answer for i in items}
        self.asked = []

    def __call__(self, images, texts):
        self.asked += [(image.tobytes(), text) for image, text in zip(images, texts, strict=True)]
        return [self.truth[key].capitalize() + "." for key in self.asked[-len(texts) :]]


# --------------------------------------------------------------------------------------- MME's official scoring


def test_parser_and_arithmetic_agree_exactly_with_the_official_ones(shared_dir):
    official = json.loads((shared_dir / "fixtures" / "mme_scoring.json").read_text())
    assert {text: parse_yes_no(text) for text in official["parse"]} == official["parse"]
    assert sum(score_mme(official["records"]).values()) == pytest.approx(official["total"], abs=1e-9)


def test_an_image_counts_twice_only_if_both_its_answers_are_right():
    rows = [("a", "yes", "yes"), ("a", "no", "no"), ("b", "yes", "Yes, it is"), ("b", "no", "yes")]
    records = [{"category": "color", "question_id": q, "answer": a, "pred": p} for q, a, p in rows]
    assert score_mme(records) == {"color": 125.0}  # 3 of 4 answers, 1 of 2 images


# ----------------------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_who_knows_the_truth_scores_all_of_it_and_the_report_survives_json(suite):
    report = evaluate(suite, Knower(suite.items("dev")["all"]), "dev")
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    for part in report.parts.values():
        if suite.name == "mme":
            assert part["total"] == Score(1200.0, 1200.0, 1200.0)
            assert part.value("of_2000") == 2000 and part.value("parse_rate") == 1
        else:
            assert part["accuracy"] == Score(1.0, 1.0, 1.0) and part.value("valid") == 1
    counts = {name: part.n for name, part in report.parts.items()}  # images of MME, two questions each
    assert counts == (
        {"id": 192, "cg": 192, "all": 384} if suite.name == "mme" else {"id": 768, "cg": 256, "all": 1024}
    )
    assert report.gap.value("total" if suite.name == "mme" else "accuracy") == 0


def test_who_always_says_yes_and_who_throws_a_coin_score_the_floors_of_mme():
    coin = np.random.default_rng(0)
    report = evaluate(MmeSuite(), lambda images, texts: ["yes"] * len(texts), "dev", quick=True)
    always, floor = report.parts["all"], report.bounds["floor"]["all"]
    assert always["total"] == Score(300.0, 300.0, 300.0) and always.value("yes_share") == 1
    assert floor.value("always_yes") == 300 and floor.value("coin") == 450
    tossed = evaluate(MmeSuite(), lambda images, texts: coin.choice(["yes", "no"], len(texts)).tolist(), "dev")
    total = tossed.parts["all"]["total"]
    assert total.low < 450 < total.high and 30 < total.high - total.low < 150


def test_what_cannot_be_parsed_is_wrong_and_counted_apart():
    mute = evaluate(MmeSuite(), lambda images, texts: ["perhaps"] * len(texts), "dev", quick=True).parts["all"]
    assert mute.value("total") == mute.value("parse_rate") == mute.value("yes_share") == 0
    wrong = evaluate(GqaSuite(), lambda images, texts: ["a red star"] * len(texts), "dev", quick=True).parts["all"]
    assert wrong.value("accuracy") == wrong.value("valid") == 0


def test_the_prior_printed_beside_gqa_is_what_its_answers_score_and_near_chance():
    report = evaluate(GqaSuite(), lambda images, texts: [question_prior(text) for text in texts], "dev")
    for part in report.parts.values():
        assert part["accuracy"] == part["prior"]
    id_part = report.parts["id"]
    assert 0.25 < id_part.value("prior") < 0.42
    for kind, chance in {"choose": 1 / 2, "compare": 1 / 2, "logical": 1 / 2, "count": 1 / 4, "query": 1 / 4}.items():
        assert id_part.by_kind[kind].value("prior") < chance + 0.12, kind


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_a_quick_run_asks_about_an_eighth_of_the_same_images(suite):
    knower, done = Knower(suite.items("dev")["all"]), []
    report = evaluate(suite, knower, "dev", quick=True, progress=lambda n, total: done.append((n, total)))
    count = {"mme": 96, "gqa": 128}[suite.name]
    assert report.n == len(knower.asked) == count and done[-1] == (count, count)
    if suite.name == "mme":
        assert {row.n for row in report.parts["cg"].by_kind.values()} == {4}


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_what_cannot_be_scored_is_refused(suite):
    with pytest.raises(ConfigError, match="split"):
        evaluate(suite, lambda images, texts: texts, "train")
    for bad in (lambda images, texts: texts[1:], lambda images, texts: [None] * len(texts)):
        with pytest.raises(DataError, match=r"expected (96|128) texts"):
            evaluate(suite, bad, "dev", quick=True)


# ------------------------------------------------------------------------------------------------------- items


def test_mme_asks_a_yes_and_a_no_about_each_of_64_images_half_of_them_with_a_held_out_pair():
    items = MmeSuite().items("dev")["all"]
    assert Counter((i.kind, i.part) for i in items) == {(s, p): 64 for s in SUBTASKS for p in ("id", "cg")}
    assert len({(i.kind, scene_key(i.scene)) for i in items}) == 6 * 64
    for yes, no in zip(items[::2], items[1::2], strict=True):
        assert (yes.question.answer, no.question.answer) == ("yes", "no")
        assert yes.scene == no.scene and yes.image == no.image and yes.question.text.endswith(YES_NO)
        assert bucket(yes.scene) == "dev" and not held_out(yes.scene, "test")
        assert held_out(yes.scene, "dev") == ({"pair"} if yes.part == "cg" else set())


def test_gqa_asks_seen_chains_about_seen_things_and_in_cg_only_held_out_chains():
    items = GqaSuite().items("dev")["all"]
    asked = Counter((i.image, i.part) for i in items)
    assert set(asked.values()) == {4} and len(asked) == 256 and len({scene_key(i.scene) for i in items}) == 256
    for item in items:
        assert bucket(item.scene) == "dev" and not held_out(item.scene, "test") and not held_out(item.scene, "dev")
        is_held_out = any(chain(item.question.program)[-len(c) :] == c for c in HELD_OUT_CHAINS["dev"])
        assert is_held_out == (item.part == "cg")


def test_gqa_answers_are_balanced_within_each_kind_and_sort():
    answers = Counter((i.part, i.kind, i.question.answer) for i in GqaSuite().items("dev")["all"])
    for (part, kind, word), count in answers.items():
        same = [answers[part, kind, other] for other in SORT_OF[word]]
        assert count < 1.5 * np.mean(same) + 2, (part, kind, word)


def test_the_suites_are_the_frozen_ones():
    verify_lock(MmeSuite(), GqaSuite())


def test_one_changed_question_changes_the_hash_of_its_split_only():
    items = {split: GqaSuite().items(split)["all"] for split in ("dev", "test")}
    first, *rest = items["dev"]
    changed = (replace(first, question=replace(first.question, text="is there a star?")), *rest)
    before, after = digests(items.get), digests({**items, "dev": changed}.get)
    assert before["test"] == after["test"] and before["dev"]["count"] == after["dev"]["count"]
    assert before["dev"]["blake2b"] != after["dev"]["blake2b"]
