"""GenEval's rules, against reference cases made with GenEval's own code and against hand-made ones."""

import json

import pytest

from starflow2.evals.geneval import Found, grade, relations


@pytest.fixture
def reference(shared_dir):
    return json.loads((shared_dir / "fixtures" / "geneval_rules.json").read_text())


def test_relations_agree_with_the_reference_on_every_box_pair(reference):
    wrong = [row for row in reference["position"] if relations(row["a"], row["b"]) != set(row["rel"])]
    assert len(reference["position"]) == 400 and wrong == []


def test_verdicts_agree_with_the_reference_on_every_case(reference):
    for case in reference["cases"]:
        found = [
            Found(name, tuple(box[:4]), box[4], color) for name, rows in case["objects"].items() for box, color in rows
        ]
        assert grade(case["meta"], found).correct == case["correct"], case["name"]


CIRCLE, LATE = Found("circle", (0, 0, 10, 10), 0.9, "red"), Found("circle", (30, 0, 40, 10), 0.8, "blue")
SQUARE, BLOB = Found("square", (60, 0, 70, 10), 0.7, "green"), Found(None, (0, 40, 9, 49), 0.5)


def row(name, count=1, **rest):
    return {"class": name, "count": count} | rest


@pytest.mark.parametrize(
    ("include", "found", "correct", "strict"),
    [
        ([row("circle")], [CIRCLE], True, True),
        ([row("circle")], [CIRCLE, BLOB], True, False),
        ([row("circle")], [CIRCLE, SQUARE], True, False),
        ([row("circle")], [BLOB], False, False),
        ([row("circle", color="blue")], [LATE, CIRCLE], False, False),  # the better scored circle is red
        ([row("circle", 2, color="red")], [CIRCLE, LATE], False, False),
        ([row("circle"), row("square", position=["right of", 0])], [SQUARE, CIRCLE], True, True),
        ([row("circle"), row("square", position=["above", 0])], [SQUARE, CIRCLE], False, False),
        ([row("circle", color="blue"), row("square", position=["right of", 0])], [SQUARE, CIRCLE], False, False),
    ],
)
def test_only_the_best_scored_are_examined_and_strict_allows_nothing_else(include, found, correct, strict):
    verdict = grade({"include": include}, found)
    assert (verdict.correct, verdict.strict_correct, bool(verdict.reason)) == (correct, strict, not correct)


def test_one_too_many_fails_counting_but_no_other_tag():
    asked = {"include": [row("circle")], "exclude": [row("circle", 2)]}
    assert grade(asked, [CIRCLE]).correct
    assert "fewer than 2 circle" in grade(asked, [CIRCLE, LATE]).reason
    assert grade({"include": [row("circle")]}, [CIRCLE, LATE]).correct


def test_boxes_with_one_centre_stand_in_no_relation():
    assert relations((0, 0, 10, 10), (2, 2, 8, 8)) == set()
