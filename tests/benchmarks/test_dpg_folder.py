"""DPG-Bench's grids, and its arithmetic with and without quirks against numbers made by hand."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from benchmark_cases import DPG_ROWS, tiny_model, write_lines
from starflow2.benchmarks.dpg import DpgLayout, Question, image_scores, score_folder
from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, draw_folder
from starflow2.benchmarks.prompts import read_dpg_prompts
from starflow2.core.images import read_pixels
from starflow2.errors import DataError

HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
# The published file's form: parents by number, 0 for none; the first row is the one that the official script skips.
QUESTIONS = f"""{HEAD}
one,t,,1,0,entity,whole,entity - whole (star),Is there a star?
one,t,,2,0,entity,whole,entity - whole (sky),"Is there a sky, too?"
one,t,,3,2,attribute,color,attribute - color (sky),Is the sky red?
one,t,,4,3,relation,spatial,"relation - spatial (a, b)",Is it above?
two,t,,1,0,entity,whole,entity - whole (zebra),Is there a zebra?
three,t,,1,0,global,,global - (photo),Is it a photo?
three,t,,2,1,other,count,other - count (x),Are there two?
"""
ROWS = (*DPG_ROWS, {"id": "three", "prompt": "two hearts."})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> DrawnFolder:
    folder = tmp_path_factory.mktemp("dpg")
    rows = read_dpg_prompts(write_lines(folder / "prompts.jsonl", ROWS))
    return draw_folder(tiny_model(), DpgLayout(), rows, folder / "images", FolderSettings(at_once=8))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text(QUESTIONS)
    return path


def answers(no: set[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """All answers yes, but for these (image, crop, question)."""
    asked = [("one", n) for n in (1, 2, 3, 4)] + [("three", n) for n in (1, 2)]
    lines: list[dict[str, Any]] = [{"judge": "mplug"}]
    for name, number in asked:
        for crop in range(4):
            word = "no" if (name, crop, number) in no else "yes"
            lines.append({"image": f"{name}.png", "crop": crop, "question": number, "answer": word})
    return lines


def test_a_grid_holds_four_samples_in_the_order_of_reading(finished):
    assert sorted(path.name for path in finished.folder.glob("*.png")) == ["one.png", "three.png"]
    assert [missed.name for missed in finished.unread] == ["two"]
    grid = read_pixels(finished.folder / "one.png")
    assert tuple(grid.shape) == (3, 128, 128)
    alone = tiny_model().generate(["a red star."], n=4, seed=42, tries=1)
    for image, (top, left) in zip(alone, ((0, 0), (0, 64), (64, 0), (64, 64)), strict=True):
        cell = (grid[:, top : top + 64, left : left + 64] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.abs(cell.astype(int) - np.asarray(image.image, int)).max() <= 1  # rows of a batch may round apart


def test_the_official_arithmetic_keeps_its_quirks_and_corrected_columns_stand_beside(finished, questions, tmp_path):
    # of prompt one: no sky in the first cell, whose children fail with it; no star in the last, which is skipped
    no = {("one", 0, 2), ("one", 3, 1), ("three", 3, 2)}
    result = score_folder(finished.folder, write_lines(tmp_path / "a.jsonl", answers(no)), questions)
    columns = {name: score.score for name, score in result.columns.items()}
    one = (0 + 1 + 1 + 1) / 4  # of questions 2 to 4; the first cell loses all three
    three = (1 + 1 + 1 + 1 / 2) / 4
    assert columns["overall"] == pytest.approx(100 * (one + three) / 2)
    assert columns["entity"] == 100 and columns["attribute"] == 100 and columns["relation"] == 100  # the last cell's
    assert columns["global"] == 100 and columns["other"] == 0
    more = {name: score.score for name, score in result.more.items()}
    whole = (1 / 4 + 1 + 1 + 3 / 4) / 4
    assert more["overall, all questions"] == pytest.approx(100 * (whole + three) / 2)
    assert more["entity, all cells"] == pytest.approx(100 * 6 / 8) and more["other, all cells"] == 75
    assert more["overall, unread prompts wrong"] == pytest.approx(100 * (whole + three) / 3)
    assert result.counts == {"prompts": 2, "unread prompts": 1, "left out": 0}


def test_a_first_prompt_that_depends_on_the_skipped_question_is_left_out_as_officially(finished, tmp_path):
    path = tmp_path / "q.csv"
    path.write_text(QUESTIONS.replace("one,t,,3,2,", "one,t,,3,1,"))
    result = score_folder(finished.folder, write_lines(tmp_path / "a.jsonl", answers(set())), path)
    assert result.counts["left out"] == 1 and result.columns["overall"].score == 100
    assert result.columns["relation"].score is None, "its questions stand in no official column"


def test_only_exactly_yes_counts(finished, questions, tmp_path):
    lines = answers(set())
    lines[1]["answer"] = "Yes"
    result = score_folder(finished.folder, write_lines(tmp_path / "a.jsonl", lines), questions)
    assert result.more["entity, all cells"].score == pytest.approx(100 * 7 / 8)


def test_a_failed_parent_fails_its_children_in_the_order_of_the_file():
    late = [Question(2, (1,), "entity", ""), Question(1, (3,), "entity", ""), Question(3, (), "entity", "")]
    assert image_scores(late, {1: [True], 2: [True], 3: [False]}) == [pytest.approx(1 / 3)]
    ordered = [late[2], late[1], late[0]]
    assert image_scores(ordered, {1: [True], 2: [True], 3: [False]}) == [0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop(3), "nothing about one.png, 2, 1"),
        (lambda a: a.append(a[5]), r"a\.jsonl:26 is about one.png, 0, 2, and so is .*a\.jsonl:6"),
        (lambda a: a[4].update(crop=4), r"a\.jsonl:5 is about one.png, 4, 1, which was not asked for"),
        (lambda a: a[4].update(image="two.png"), r"a\.jsonl:5 .*not asked for"),
        (lambda a: a[4].update(question="1"), r"a\.jsonl:5.*expected int"),
        (lambda a: a[4].update(answer=True), r"a\.jsonl:5.*expected str"),
        (lambda a: a[4].pop("answer"), r"a\.jsonl:5.*answer: missing"),
        (lambda a: a.pop(0), r"a\.jsonl:1 holds .*judge"),
    ],
)
def test_spoiled_answers_are_refused_with_file_and_line(change, says, finished, questions, tmp_path):
    lines = answers(set())
    change(lines)
    with pytest.raises(DataError, match=says):
        score_folder(finished.folder, write_lines(tmp_path / "a.jsonl", lines), questions)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("tuple,", "triple,", r"q\.csv:1 has no column tuple"),
        ("one,t,,2,0", "one,t,,two,0", r"q\.csv:3.*whole numbers"),
        ("one,t,,2,0", "one,t,,2,none", r"q\.csv:3.*whole numbers"),
        ("one,t,,2,0", "one,t,,1,0", r"q\.csv:3: question 1 of one stands there already"),
        ("entity - whole (sky)", "", r"q\.csv:3: tuple is ''"),
        ("three,", "four,", "no question about three"),
        ("entity - whole (sky)", "x" * 200_000, r"q\.csv:\d+ is no line of a table: field larger"),
    ],
)
def test_spoiled_questions_are_refused_with_file_and_line(old, new, says, finished, tmp_path):
    (tmp_path / "q.csv").write_text(QUESTIONS.replace(old, new))
    with pytest.raises(DataError, match=says):
        score_folder(finished.folder, write_lines(tmp_path / "a.jsonl", answers(set())), tmp_path / "q.csv")


def test_a_missing_grid_is_found(finished, questions, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "images")
    (tmp_path / "images" / "three.png").unlink()
    with pytest.raises(DataError, match=r"half-written: three.png"):
        score_folder(tmp_path / "images", write_lines(tmp_path / "a.jsonl", answers(set())), questions)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([ROWS[0], ROWS[0]], r"p\.jsonl:2: id one stands at .*p\.jsonl:1"),
        ([{"id": "../one", "prompt": "x"}], r"p\.jsonl:1.*it names a file"),
        ([{"id": "one", "prompt": ""}], r"p\.jsonl:1.*prompt is empty"),
        ([{"id": 1, "prompt": "x"}], r"p\.jsonl:1.*expected str"),
    ],
)
def test_spoiled_prompts_are_refused_with_file_and_line(rows, says, tmp_path):
    with pytest.raises(DataError, match=says):
        read_dpg_prompts(write_lines(tmp_path / "p.jsonl", rows))


def test_published_text_files_and_the_packed_file_are_the_same_prompts(tmp_path, shared_dir):
    rows = read_dpg_prompts(shared_dir / "data" / "dpg" / "dpg_prompts.jsonl")
    assert len(rows) == 1065
    for row in rows[:5]:
        (tmp_path / f"{row.name}.txt").write_text(row.prompt)
    assert sorted((row.name, row.prompt) for row in rows[:5]) == [
        (r.name, r.prompt) for r in read_dpg_prompts(tmp_path)
    ]
