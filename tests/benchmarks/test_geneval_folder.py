"""GenEval's folders: their layout, runs that are interrupted, and scores against verdicts made by hand."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmark_cases import (
    GENEVAL_ROWS,
    SETTINGS,
    detection,
    detections_of,
    geneval_folder,
    read_lines_of,
    tiny_model,
    write_lines,
)
from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, draw_folder, read_folder
from starflow2.benchmarks.geneval import DetectedImage, GenevalLayout, kept, score_folder
from starflow2.benchmarks.prompts import read_geneval_prompts
from starflow2.benchmarks.records import read_judged
from starflow2.core.files import TEMPORARY
from starflow2.core.images import read_metadata
from starflow2.errors import ConfigError, DataError, OutputError, StateError
from starflow2.pipeline import StarFlow2


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return tiny_model(("features", "fae", "vlm", "t2i"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> DrawnFolder:
    return geneval_folder(tmp_path_factory.mktemp("geneval"), model)


@pytest.fixture
def drawn(finished, tmp_path) -> DrawnFolder:
    """A copy of the finished folder that a test may spoil."""
    shutil.copytree(finished.folder, tmp_path / "images")
    return DrawnFolder(tmp_path / "images", finished.record, finished.samples, finished.rows, finished.unread)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_layout_is_the_published_one_and_every_image_says_how_it_was_made(finished):
    names = set(contents(finished.folder))
    samples = {f"{row}/samples/000{j}.png" for row in ("00000", "00002", "00003") for j in (0, 1)}
    metadata = {f"{row}/metadata.jsonl" for row in ("00000", "00002", "00003")}
    assert names == samples | metadata | {"run.json", "unread.json", "prompts.jsonl"}
    assert read_lines_of(finished.folder / "00002" / "metadata.jsonl") == [GENEVAL_ROWS[2]]
    about = read_metadata(finished.folder / "00002" / "samples" / "0001.png")
    assert about["prompt"] == "a photo of two hearts" and about["seed"] == "43" and about["model"] == "tiny"
    record = json.loads((finished.folder / "run.json").read_text())
    assert record["seed"] == 42 and record["samples"] == 2 and len(record["weights"]) == 16 and record["commit"]


def test_prompts_with_unknown_words_are_listed_and_counted_and_stop_nothing(finished):
    (missed,) = finished.unread
    assert (missed.name, missed.words) == ("00001", ("bench",)) and "never learnt 'bench'" in missed.reason
    assert finished.unknown_words == [("bench", 1)]


def test_an_interrupted_run_ends_in_the_same_bytes(finished, model, drawn):
    whole = contents(finished.folder)
    (drawn.folder / "00000" / "samples" / "0001.png").unlink()
    shutil.rmtree(drawn.folder / "00003")
    (drawn.folder / "00000" / "samples" / f"{TEMPORARY}0.tmp").touch()  # what a kill leaves
    rows = read_geneval_prompts(finished.folder.parent / "prompts.jsonl")
    draw_folder(model, GenevalLayout(), rows, drawn.folder, SETTINGS)
    assert contents(drawn.folder) == whole


def test_a_finished_folder_is_not_drawn_again(model, drawn, finished):
    class Silent(StarFlow2):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("an image was drawn")

    rows = read_geneval_prompts(finished.folder.parent / "prompts.jsonl")
    draw_folder(Silent(model.components), GenevalLayout(), rows, drawn.folder, SETTINGS)


def test_images_of_two_runs_never_mix(model, drawn, tmp_path):
    rows = read_geneval_prompts(write_lines(tmp_path / "prompts.jsonl", GENEVAL_ROWS))
    other = FolderSettings(samples=2, at_once=4, seed=1)
    with pytest.raises(ConfigError, match="images of another run: seed was 42 and is 1"):
        draw_folder(model, GenevalLayout(), rows, drawn.folder, other)
    with pytest.raises(ConfigError, match="prompts was 4 and is 3; prompts_digest"):
        draw_folder(model, GenevalLayout(), rows[:3], drawn.folder, SETTINGS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").touch()
    with pytest.raises(OutputError, match=r"not empty and has no run.json"):
        draw_folder(model, GenevalLayout(), rows, tmp_path / "full", SETTINGS)


def test_a_model_that_cannot_draw_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(StateError, match="needs a model that has finished stage t2i"):
        geneval_folder(tmp_path, tiny_model(("features", "fae")))
    assert not (tmp_path / "images").exists()


def test_scores_are_shares_of_images_by_tag_and_the_mean_of_tags(drawn, tmp_path):
    lines = detections_of(drawn)
    lines[3]["detections"].append(detection("heart", (5, 40, 20, 60)))  # a third heart: that image is wrong
    lines[5]["detections"][0]["color"] = "blue"
    result = score_folder(drawn.folder, write_lines(tmp_path / "d.jsonl", lines))
    columns = {name: score.score for name, score in result.columns.items()}
    assert columns == {
        "single_object": 1.0,
        "two_object": None,
        "counting": 0.5,
        "colors": 0.5,
        "position": None,
        "color_attr": None,
        "overall": pytest.approx(2 / 3),
    }
    assert result.more["overall, unread prompts wrong"].score == pytest.approx((0.5 + 0.5 + 0.5) / 3)
    assert result.more["correct images, all tags pooled"].score == pytest.approx(4 / 6)
    low, high = result.columns["overall"].low, result.columns["overall"].high
    assert low <= 2 / 3 <= high
    assert result.made["weights"] == drawn.record.weights and any("3 of 6 tags" in note for note in result.notes)


def test_another_judge_is_named_and_not_compared(drawn, tmp_path):
    lines = [{"judge": "my eyes"}, *detections_of(drawn)[1:]]
    result = score_folder(drawn.folder, write_lines(tmp_path / "d.jsonl", lines))
    assert result.judge == "my eyes" and any("not to be compared with the paper" in note for note in result.notes)


def test_thresholds_and_limits_are_those_of_genevals_script():
    found = [detection("cow", score=score) for score in (0.3, 0.31, 0.9, 0.91)]
    many = [detection("sheep", score=0.5 + i / 100) for i in range(20)]
    image = {"image": "x", "size": [64, 64], "detections": [*found, *many]}

    def names(tag: str) -> list[str | None]:
        return [one.name for one in kept(as_record(image), tag)]

    assert names("colors").count("cow") == 3 and names("colors").count("sheep") == 16
    assert names("counting") == ["cow"]
    assert [one.score for one in kept(as_record(image), "colors") if one.name == "cow"] == [0.91, 0.9, 0.31]


def as_record(line: dict[str, Any]) -> DetectedImage:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = write_lines(Path(folder) / "d.jsonl", [{"judge": "x"}, line])
        return read_judged(path, DetectedImage).records[0].value


def test_the_published_prompts_are_read_as_they_are(shared_dir):
    rows = read_geneval_prompts(shared_dir / "data" / "geneval" / "evaluation_metadata.jsonl")
    assert len(rows) == 553 and rows[552].name == "00552"
    long = read_geneval_prompts(shared_dir / "data" / "geneval" / "evaluation_metadata_long.bagel.jsonl")
    assert [row.row["include"] for row in long] == [row.row["include"] for row in rows]


def with_line(index: int, **changes: Any):
    def spoil(lines: list[Any]) -> None:
        lines[index] |= changes

    return spoil


def with_detection(**changes: Any):
    def spoil(lines: list[Any]) -> None:
        lines[2]["detections"][0] |= changes

    return spoil


def without(index: int):
    def spoil(lines: list[Any]) -> None:
        del lines[index]

    return spoil


def twice(lines: list[Any]) -> None:
    lines.append(lines[2])


def uncolored(lines: list[Any]) -> None:
    del lines[5]["detections"][0]["color"]


def nameless(lines: list[Any]) -> None:
    del lines[2]["detections"][0]["class"]


SPOILED = [
    ("a missing picture", without(2), "has nothing about 00000/samples/0001.png"),
    ("a picture twice", twice, r"d\.jsonl:8 is about 00000/samples/0001.png, and so is .*d\.jsonl:3"),
    ("a picture of no prompt", with_line(2, image="00009/samples/0000.png"), r"d\.jsonl:3 .* was not asked for"),
    ("no judge", without(0), r'd\.jsonl:1 holds .*expected \{"judge": NAME\}'),
    ("an empty judge", with_line(0, judge=" "), r"d\.jsonl:1: judge is empty"),
    ("a box to the right of the image", with_detection(box=[1, 1, 70, 20]), r"d\.jsonl:3.*lies outside"),
    ("a box above the image", with_detection(box=[1, -9, 20, 20]), r"d\.jsonl:3.*lies outside"),
    ("a box from right to left", with_detection(box=[20, 1, 10, 20]), r"d\.jsonl:3.*expected x0 <= x1"),
    ("a box of three numbers", with_detection(box=[1, 1, 20]), r"d\.jsonl:3.*length 4"),
    ("a score above one", with_detection(score=1.2), r"d\.jsonl:3.*score is 1.2"),
    ("a score in words", with_detection(score="high"), r"d\.jsonl:3.*expected float"),
    ("a detection without a class", nameless, r"d\.jsonl:3.*class_: missing"),
    ("an empty class", with_detection(**{"class": " "}), r"d\.jsonl:3.*class is empty"),
    ("a key that is not known", with_detection(colour="red"), r"d\.jsonl:3.*unknown key"),
    ("no colour where one is asked for", uncolored, r"d\.jsonl:6: star has no color"),
    ("a size of nothing", with_line(2, size=[0, 64]), r"d\.jsonl:3.*expected width and height"),
    ("detections that are no list", with_line(2, detections="none"), r"d\.jsonl:3.*expected a list"),
]


@pytest.mark.parametrize(("_what", "spoil", "says"), SPOILED, ids=[case[0] for case in SPOILED])
def test_a_spoiled_detector_file_is_refused_with_file_and_line(_what, spoil, says, drawn, tmp_path):
    lines = copy.deepcopy(detections_of(drawn))
    spoil(lines)
    with pytest.raises(DataError, match=says):
        score_folder(drawn.folder, write_lines(tmp_path / "d.jsonl", lines))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; expected one JSON object a line"),
        ('{"judge": "x"}\n\n', r"d\.jsonl:2 is empty"),
        ('{"judge": "x"}\n{"image": ', r"d\.jsonl:2 is not JSON"),
        ('{"judge": "x"}\n[1]\n', r"d\.jsonl:2 holds \[1\]; expected a JSON object"),
        ('{"judge": "x"}\n{"image": "a", "image": "b"}\n', r"d\.jsonl:2 is not JSON.*occurs twice"),
        ('{"judge": "x"}\n{"image": NaN}\n', r"d\.jsonl:2 is not JSON.*no finite number"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused_with_file_and_line(text, says, drawn, tmp_path):
    (tmp_path / "d.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=says):
        score_folder(drawn.folder, tmp_path / "d.jsonl")


def test_a_spoiled_folder_is_refused(drawn, tmp_path):
    lines = write_lines(tmp_path / "d.jsonl", detections_of(drawn))
    score_folder(drawn.folder, lines)
    metadata = drawn.folder / "00000" / "metadata.jsonl"
    whole = metadata.read_text()
    metadata.write_text(json.dumps(GENEVAL_ROWS[3]) + "\n")
    with pytest.raises(DataError, match=r"metadata.jsonl:1 is not prompt 00000"):
        score_folder(drawn.folder, lines)
    metadata.write_text(whole)
    other = read_geneval_prompts(write_lines(tmp_path / "other.jsonl", GENEVAL_ROWS[:3]))
    with pytest.raises(DataError, match="drawn from another prompt file: 4 prompts, here 3"):
        score_folder(drawn.folder, lines, other)
    (drawn.folder / "00002" / "samples" / "0000.png").unlink()
    with pytest.raises(DataError, match=r"half-written: 00002/samples/0000.png"):
        score_folder(drawn.folder, lines)
    for name, says in (("unread.json", "no list of prompts"), ("run.json", "no folder of drawn prompts")):
        (drawn.folder / name).write_text("{}")
        with pytest.raises(DataError, match=says):
            score_folder(drawn.folder, lines)
    with pytest.raises(DataError, match=r"has no run.json"):
        score_folder(tmp_path, lines)


def test_a_folder_of_another_program_is_scored_from_its_prompts(drawn, tmp_path):
    rows = read_geneval_prompts(write_lines(tmp_path / "prompts.jsonl", [row.row for row in drawn.drawn]))
    foreign = tmp_path / "foreign"
    for new, old in zip(rows, drawn.drawn, strict=True):
        shutil.copytree(drawn.folder / old.name, foreign / new.name)
        for j in (2, 3):  # four samples, as the published script draws
            shutil.copy(foreign / new.name / "samples" / "0000.png", foreign / new.name / "samples" / f"000{j}.png")
    lines = detections_of(read_folder(foreign, GenevalLayout(), rows))
    result = score_folder(foreign, write_lines(tmp_path / "d.jsonl", lines), rows)
    assert result.model == "unknown" and result.columns["overall"].score == 1 and result.counts["images"] == 12


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tag": "shape"}, "expected one of 'single_object'"),
        ({"prompt": " "}, "prompt or include is empty"),
        ({"include": []}, "prompt or include is empty"),
        ({"include": [{"class": "cow", "count": 0}]}, "count is 0"),
        ({"include": [{"class": "cow", "count": 1, "color": "mauve"}]}, "color is 'mauve'"),
        ({"include": [{"class": "cow", "count": 1, "position": ["left of", 0]}]}, "expected one before it"),
        ({"include": [{"class": "cow", "count": 1, "position": ["near", 0]}]}, "left of"),
    ],
)
def test_a_prompt_that_cannot_be_graded_is_refused_with_file_and_line(row, says, tmp_path):
    with pytest.raises(DataError, match=rf"p\.jsonl:2.*{says}"):
        read_geneval_prompts(write_lines(tmp_path / "p.jsonl", [GENEVAL_ROWS[0], GENEVAL_ROWS[0] | row]))
