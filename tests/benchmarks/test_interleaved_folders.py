"""ISG-Bench: replies of words and images in its layout, and its four scores against numbers made by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmark_cases import read_lines_of, tiny_model, write_lines
from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, draw_folder
from starflow2.benchmarks.interleaved import GROUPS, IsgLayout, read_isg, score_isg, write_output
from starflow2.benchmarks.prompts import PromptRow
from starflow2.cli.app import main
from starflow2.core.images import read_picture
from starflow2.errors import ConfigError, DataError, StateError
from starflow2.inference.events import Made
from starflow2.models.checkpoint import save_components
from starflow2.pipeline import Drawing, StarFlow2

SETTINGS = FolderSettings(samples=1)


def text(words: str = "a") -> dict[str, str]:
    return {"type": "text", "content": words}


IMAGE = {"type": "image", "content": "images/a.png"}


def asked(number: int, *parents: int) -> dict[str, Any]:
    return {"image": "<gen_img1>", "Question": "Is it red?", "id": number, "Preliminary": list(parents)}


def about(subject: str, **more: str) -> dict[str, str]:
    return {"subject": subject, "object": "<query_img1>", "Question": "Are they alike?"} | more


QUERIES: list[dict[str, Any]] = [
    {
        "id": "0000",
        "Category": "Prediction",
        "Query": [text("a red star"), IMAGE],
        "Golden": [text(), IMAGE, IMAGE],
        "predict": {
            "image_qa": {"questions": [asked(0), asked(1, 0), asked(2, 1)]},
            "block_qa": {"questions": [about("<gen_text1>"), {"subject": "<gen_img1>"}, about("<gen_img2>")]},
        },
    },
    {
        "id": "0001",
        "Category": "painting",
        "Query": [IMAGE, text("a blue star")],
        "Golden": [text()],
        "predict": {"image_qa": [asked(7)], "block_qa": {"questions": []}},
    },
    {
        "id": "0002",
        "Category": "HowTo",
        "Query": [text("two hearts")],
        "Golden": [text(), IMAGE],
        "predict": {"image_qa": [asked(5)], "block_qa": {"questions": []}},
    },
    {
        "id": "0003",
        "Category": "Historical",
        "Query": [text("a zebra"), IMAGE],
        "Golden": [text()],
        "predict": {"block_qa": {"questions": []}},
    },
]
REPLIES = {"0000": "tii", "0001": "i", "0002": "ti"}  # text, image
ANSWERS: list[dict[str, Any]] = [
    {"judge": "me"},
    {"id": "0000", "level": "holistic", "score": 6},
    *({"id": "0000", "level": "image", "question": i, "score": yes} for i, yes in enumerate((1, 1, 0))),
    {"id": "0000", "level": "block", "question": 0, "score": 8},
    {"id": "0000", "level": "block", "question": 2, "score": 4},
    {"id": "0001", "level": "holistic", "score": 3},
    {"id": "0002", "level": "holistic", "score": 10},
    {"id": "0002", "level": "image", "question": 5, "score": 1},
]


@dataclass(frozen=True, slots=True)
class Scripted(IsgLayout):
    """The layout with replies of a known structure."""

    def draw(self, model: StarFlow2, rows: Sequence[PromptRow], settings: FolderSettings) -> list[list[str | Drawing]]:
        drawing = Drawing(Image.new("RGB", (8, 8)), "a star", 42, {"model": "tiny"})
        return [["words" if kind == "t" else drawing for kind in REPLIES[row.name]] for row in rows]


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return tiny_model()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("isg")
    (folder / "images").mkdir()
    Image.new("RGB", (80, 60), (200, 30, 40)).save(folder / "images" / "a.png")
    write_lines(folder / "ISG-Bench.jsonl", QUERIES)
    return folder


@pytest.fixture(scope="module")
def rows(sources) -> list[PromptRow]:
    return read_isg(sources / "ISG-Bench.jsonl", sources)


@pytest.fixture
def drawn(model, rows, tmp_path) -> DrawnFolder:
    return draw_folder(model, Scripted(), rows, tmp_path / "replies", SETTINGS)


def test_a_reply_is_that_of_a_session_in_the_models_own_order(model, sources, rows, tmp_path):
    found = draw_folder(model, IsgLayout(sources), rows[:2], tmp_path / "r", SETTINGS)
    for row, parts in zip(rows[:2], (["a red star", 0], [0, "a blue star"]), strict=True):
        shown = [sources / "images" / "a.png" if part == 0 else part for part in parts]
        events = list(model.session(seed=42).add(*shown).run(tokens=512, pictures=8))
        expected = [event.picture.image for event in events if isinstance(event, Made)]
        output = json.loads((found.folder / row.name / "reply.json").read_text())["output"]
        images = [block["content"] for block in output if block["type"] == "image"]
        assert images == [f"{i}.png" for i in range(1, len(expected) + 1)]
        for name, image in zip(images, expected, strict=True):
            shown_image = read_picture(found.folder / row.name / name, 64)
            torch.testing.assert_close(shown_image, image.cpu(), atol=2.5 / 255, rtol=0)  # rounding of PNG


def test_a_query_with_unknown_words_is_listed_and_a_run_goes_on_where_it_stopped(drawn, model, rows):
    assert [prompt.name for prompt in drawn.unread] == ["0003"] and "zebra" in drawn.unread[0].words
    before = (drawn.folder / "0000" / "2.png").read_bytes()
    (drawn.folder / "0002" / "reply.json").unlink()
    draw_folder(model, Scripted(), rows, drawn.folder, SETTINGS)
    assert (drawn.folder / "0002" / "reply.json").is_file()
    assert (drawn.folder / "0000" / "2.png").read_bytes() == before


def test_a_query_that_is_longer_than_the_model_reads_gets_no_reply(model, sources, tmp_path):
    long = copy.deepcopy(QUERIES[0]) | {"Query": [text("a red star")] + [IMAGE] * 40}
    rows = read_isg(write_lines(tmp_path / "q.jsonl", [long]), sources)
    found = draw_folder(model, IsgLayout(sources), rows, tmp_path / "r", SETTINGS)
    assert json.loads((found.folder / "0000" / "reply.json").read_text()) == {"output": []}
    result = score_isg(found.folder, write_lines(tmp_path / "a", [{"judge": "me"}]))
    assert [result.columns[level].score for level in ("structure", "block", "image", "holistic")] == [0, 1, 0, 1]


def test_the_output_is_the_published_lines_with_replies_behind_them(drawn):
    lines = read_lines_of(write_output(drawn))
    assert [{k: v for k, v in line.items() if k != "output"} for line in lines] == QUERIES
    assert [[b["type"][0] for b in line["output"] or ()] for line in lines] == [list("tii"), ["i"], list("ti"), []]
    assert lines[3]["output"] is None and Path(lines[0]["output"][2]["content"]).is_file()


def test_scores_are_means_of_groups_with_the_quirk_and_without(drawn, tmp_path):
    result = score_isg(drawn.folder, write_lines(tmp_path / "a.jsonl", ANSWERS))
    expected = {"structure": 0.75, "block": 3.5, "image": (1 / 6 + 1) / 2, "holistic": (4.5 + 10) / 2}
    assert {name: score.score for name, score in result.columns.items()} == pytest.approx(expected)
    assert result.more["image, prerequisites counted"].score == pytest.approx((1 / 3 + 1) / 2)
    assert result.more["holistic, prediction"].score == 4.5 and "block, complementation" not in result.more
    wrong = {level: result.more[f"{level}, unread queries wrong"].score for level in expected}
    assert wrong == pytest.approx({"structure": 0.5, "block": 2.25, "image": (1 / 6 + 1) / 2, "holistic": 15.5 / 3})
    assert result.counts == {"queries": 3, "unread queries": 1, "of no group": 0} and result.judge == "me"
    assert result.columns["structure"].low <= 0.75 <= result.columns["structure"].high


def test_a_category_that_the_published_script_does_not_know_is_replied_to_and_not_counted(model, sources, tmp_path):
    lines = [QUERIES[0] | {"Category": "Cooking"}, QUERIES[1]]
    rows = read_isg(write_lines(tmp_path / "q.jsonl", lines), sources)
    found = draw_folder(model, Scripted(), rows, tmp_path / "r", SETTINGS)
    result = score_isg(found.folder, write_lines(tmp_path / "a.jsonl", ANSWERS[:8]))
    assert result.counts["of no group"] == 1 and result.columns["holistic"].score == 3
    categories = [category for group in GROUPS.values() for category in group]
    assert len(GROUPS) == 8 and len(categories) == len(set(categories))


def changed(line: int, **more: object) -> list[dict[str, Any]]:
    answers = copy.deepcopy(ANSWERS)
    answers[line] |= more
    return answers


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (ANSWERS[1:], ":1 holds"),
        (ANSWERS[:-1], "nothing about 0002, image, 5"),
        ([*ANSWERS, ANSWERS[-1]], ":11 is about 0002, image, 5, and so is"),
        (changed(1, id="0003"), ":2 is about 0003, holistic, 0, which was not asked for"),
        (changed(2, score=0.5), ":3: score is 0.5; expected 1 for yes or 0 for no"),
        (changed(5, score=0), ":6: score is 0; expected 1 to 10"),
        (changed(5, score=11), ":6: score is 11; expected 1 to 10"),
        (changed(5, level="structure"), ":6:"),
        (changed(6, question=1), ":7 is about 0000, block, 1, which was not asked for"),
    ],
)
def test_answers_that_do_not_fit_the_replies_are_refused_with_file_and_line(answers, says, drawn, tmp_path):
    with pytest.raises(DataError, match=says):
        score_isg(drawn.folder, write_lines(tmp_path / "a.jsonl", answers))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "../x"}, ":1: id is"),
        ({"id": 3}, ":1: id is"),
        ({"id": "0001"}, ":2: id 0001 stands at"),
        ({"Category": None}, ":1: Category is None; expected a name"),
        ({"Query": []}, ":1: Query has no block"),
        ({"Query": [IMAGE]}, ":1: Query has no text"),
        ({"Query": ["words"]}, ":1: Query is not a list of blocks"),
        ({"Query": [{"type": "video", "content": "a"}]}, ":1: Query has"),
        ({"Query": [text(), {"type": "image", "content": "images/none.png"}]}, "about images/none.png, which is not"),
        ({"Query": [text(), {"type": "image", "content": "../a.png"}]}, "which is not in"),
        ({"Golden": 3}, ":1: Golden is not a list of blocks"),
        ({"predict": {}}, None),
        ({"predict": {"image_qa": [{"id": 0}]}}, ":1: image_qa of predict is not as published"),
        ({"predict": None}, ":1: image_qa of predict is not as published"),
    ],
)
def test_queries_that_are_not_as_published_are_refused_with_file_and_line(change, says, sources, tmp_path):
    lines = copy.deepcopy(QUERIES)
    lines[0] |= change
    path = write_lines(tmp_path / "q.jsonl", lines)
    if says is None:
        assert len(read_isg(path, sources)) == 4
        return
    with pytest.raises(DataError, match=says):
        read_isg(path, sources)


def test_a_folder_that_lost_something_is_refused(drawn, tmp_path):
    answers = write_lines(tmp_path / "a.jsonl", ANSWERS)
    (drawn.folder / "0000" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png is missing"):
        score_isg(drawn.folder, answers)
    (drawn.folder / "0001" / "reply.json").write_text("{}")
    with pytest.raises(DataError, match=r"reply\.json is no reply|is missing"):
        score_isg(drawn.folder, answers)
    (drawn.folder / "0002" / "reply.json").unlink()
    with pytest.raises(DataError, match="half-written"):
        score_isg(drawn.folder, answers)


def test_another_image_or_a_model_before_stage_joint_is_refused(drawn, model, sources, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "images" / "a.png")
    with pytest.raises(ConfigError, match="prompts_digest"):
        draw_folder(model, Scripted(), read_isg(sources / "ISG-Bench.jsonl", tmp_path), drawn.folder, SETTINGS)
    with pytest.raises(StateError, match="needs a model that has finished stage joint"):
        draw_folder(tiny_model(("features", "fae", "vlm", "t2i")), Scripted(), drawn.rows, tmp_path / "o", SETTINGS)


def test_the_commands_reply_and_score(model, sources, tmp_path, capsys):
    save_components(model.components, tmp_path / "model")
    write_lines(tmp_path / "q.jsonl", QUERIES[2:])
    argv = ["eval", "isg", "--queries", str(tmp_path / "q.jsonl"), "--images", str(sources), "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "o"), "--model", str(tmp_path / "model")]) == 0
    assert "1 of 2 prompts" in capsys.readouterr().out
    output = read_lines_of(tmp_path / "o" / "output.jsonl")[0]["output"] or []
    answers = [{"judge": "me"}] + [{"id": "0002", "level": "holistic", "score": 5}] * bool(output)
    if [block["type"] for block in output] == ["text", "image"]:
        answers.append({"id": "0002", "level": "image", "question": 5, "score": 1})
    write_lines(tmp_path / "a.jsonl", answers)
    argv = ["eval", "isg", "score", str(tmp_path / "o"), "--answers", str(tmp_path / "a.jsonl")]
    assert main([*argv, "--json", str(tmp_path / "isg.json")]) == 0
    assert main(["eval", "report", str(tmp_path / "isg.json"), "--out", str(tmp_path / "r")]) == 0
    assert "## ISG-Bench" in (tmp_path / "r" / "report.md").read_text()
    capsys.readouterr()
