"""Editing benchmarks: published layouts, one conversation for later turns, scores against numbers made by hand."""

from __future__ import annotations

import json
import shutil
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmark_cases import tiny_model, write_lines
from starflow2.benchmarks.editing import EditLayout, read_edits, score_gedit, score_imgedit, score_magicbrush
from starflow2.benchmarks.folders import DrawnFolder, FolderSettings, draw_folder
from starflow2.core.images import pixel_distances, read_pixels
from starflow2.errors import ConfigError, DataError, StateError
from starflow2.pipeline import StarFlow2

GEDIT = [
    {"key": "a", "task_type": "color", "instruction": "make it red", "instruction_language": "en", "image": "one.png"},
    {"key": "b", "task_type": "color", "instruction": "make it blue", "instruction_language": "en", "image": "one.png"},
    {"key": "c", "task_type": "move", "instruction": "make it red", "instruction_language": "en", "image": "two.png"},
    {"key": "a", "task_type": "color", "instruction": "make it red", "instruction_language": "cn", "image": "one.png"},
]
GEDIT[1]["intersection_exist"] = False  # type: ignore[assignment]
IMGEDIT = {
    "10": {"id": "one.png", "prompt": "make it red", "edit_type": "adjust"},
    "11": {"id": "two.png", "prompt": "make it purple like a zebra", "edit_type": "add"},
    "12": {"id": "two.png", "prompt": "make it green", "edit_type": "add"},
}
MAGIC = {
    "7": [
        {"input": "7-input.png", "mask": "m.png", "output": "7-output1.png", "instruction": "make it red"},
        {"input": "7-output1.png", "mask": "m.png", "output": "7-output2.png", "instruction": "make it blue"},
    ],
    "8": [{"input": "8-input.png", "mask": "m.png", "output": "8-output1.png", "instruction": "make it green"}],
}
SETTINGS = FolderSettings(samples=1)


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return tiny_model()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder of source images and of MagicBrush's sessions."""
    folder = tmp_path_factory.mktemp("sources")
    names = ["one.png", "two.png", "7/7-input.png", "7/7-output1.png", "7/7-output2.png", "8/8-input.png"]
    for i, name in enumerate([*names, "8/8-output1.png"]):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = np.full((64, 64, 3), 30 * i, np.uint8)
        pixels[16:40, 16:40] = (200, 30, 40)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def drawn(model, sources, tmp_path_factory) -> dict[str, DrawnFolder]:
    """All three benchmarks' folders."""
    folder = tmp_path_factory.mktemp("edits")
    write_lines(folder / "gedit", GEDIT)
    (folder / "imgedit").write_text(json.dumps(IMGEDIT))
    (folder / "magicbrush").write_text(json.dumps(MAGIC))
    found = {}
    for name in ("gedit", "imgedit", "magicbrush"):
        rows = read_edits(name, folder / name, sources)
        found[name] = draw_folder(model, EditLayout(name, sources), rows, folder / f"{name}-images", SETTINGS)
    return found


def images(drawn: DrawnFolder) -> list[str]:
    return sorted(str(path.relative_to(drawn.folder)) for path in drawn.folder.rglob("*.png"))


def test_names_are_those_of_the_published_layouts(drawn):
    assert images(drawn["gedit"]) == [
        f"fullset/{p}.png" for p in ("color/cn/a", "color/en/a", "color/en/b", "move/en/c")
    ]
    assert images(drawn["imgedit"]) == ["10.png", "12.png"]
    assert images(drawn["magicbrush"]) == ["7/7_1.png", "7/7_inde_2.png", "7/7_iter_2.png", "8/8_1.png"]


def test_an_instruction_with_unknown_words_is_listed_and_stops_nothing(drawn):
    (missed,) = drawn["imgedit"].unread
    assert missed.name == "11" and "zebra" in missed.words


def test_edits_are_those_of_the_library(drawn, model, sources):
    alone = model.edit(sources / "one.png", "make it blue", seed=42, tries=1)
    assert np.abs(pixels_of(drawn["gedit"], "fullset/color/en/b.png") - np.asarray(alone.image, int)).max() <= 1
    session = model.session(seed=42)
    session.add(sources / "7" / "7-input.png", "make it red").draw(tries=1)
    second = session.add("make it blue").draw(tries=1)
    assert np.abs(pixels_of(drawn["magicbrush"], "7/7_iter_2.png") - np.asarray(second.image, int)).max() <= 1


def pixels_of(drawn: DrawnFolder, name: str) -> Any:
    return (read_pixels(drawn.folder / name) * 255).round().int().permute(1, 2, 0).numpy()


def test_a_model_before_stage_joint_cannot_edit(sources, tmp_path):
    rows = read_edits("gedit", write_lines(tmp_path / "e.jsonl", GEDIT), sources)
    with pytest.raises(StateError, match="needs a model that has finished stage joint"):
        draw_folder(
            tiny_model(("features", "fae", "vlm", "t2i")), EditLayout("gedit", sources), rows, tmp_path / "o", SETTINGS
        )


def test_another_source_image_is_another_run(drawn, model, sources, tmp_path):
    shutil.copytree(sources, tmp_path / "other")
    shutil.copy(sources / "two.png", tmp_path / "other" / "one.png")
    rows = read_edits("gedit", write_lines(tmp_path / "e.jsonl", GEDIT), tmp_path / "other")
    with pytest.raises(ConfigError, match="prompts_digest"):
        draw_folder(model, EditLayout("gedit", tmp_path / "other"), rows, drawn["gedit"].folder, SETTINGS)


def gedit_ratings() -> list[dict[str, Any]]:
    marks = {"color/cn/a": (9, 4), "color/en/a": (9, 4), "color/en/b": (4, 4), "move/en/c": (10, 10)}
    rows = [{"image": f"fullset/{k}.png", "semantics": s, "quality": q} for k, (s, q) in marks.items()]
    return [{"judge": "me"}, *rows]


def test_gedit_takes_the_root_of_each_image_then_means_of_groups(drawn, tmp_path):
    result = score_gedit(drawn["gedit"].folder, write_lines(tmp_path / "r.jsonl", gedit_ratings()))
    color = (6 + 4) / 2
    assert result.columns["overall"].score == pytest.approx((color + 10) / 2)
    assert result.columns["semantics"].score == pytest.approx((6.5 + 10) / 2)
    assert result.more["overall, en, intersection"].score == pytest.approx((sqrt(36) + 10) / 2)
    assert result.more["overall, cn"].score == 6 and "me" in result.notes[-1]


def test_imgedit_rounds_the_mean_of_each_image_then_takes_means_of_types(drawn, tmp_path):
    ratings = [{"judge": "me"}, {"image": "10.png", "scores": [5, 5, 4]}, {"image": "12.png", "scores": [2, 3, 1]}]
    result = score_imgedit(drawn["imgedit"].folder, write_lines(tmp_path / "r.jsonl", ratings))
    assert result.columns["adjust"].score == 4.67 and result.columns["add"].score == 2
    assert result.columns["overall"].score == pytest.approx((4.67 + 2) / 2)
    assert any("In 1 ratings" in note for note in result.notes)


def test_magicbrush_measures_the_last_turn_of_a_conversation_and_every_single_edit(drawn, sources, tmp_path):
    folder = drawn["magicbrush"].folder
    pairs = {name: pixel_distances(folder / name, sources / target) for name, target in (
        ("7/7_1.png", "7/7-output1.png"), ("7/7_inde_2.png", "7/7-output2.png"),
        ("7/7_iter_2.png", "7/7-output2.png"), ("8/8_1.png", "8/8-output1.png"),
    )}  # fmt: skip
    result = score_magicbrush(folder, sources)
    final = np.mean([pairs["7/7_iter_2.png"], pairs["8/8_1.png"]], axis=0)
    every = np.mean([pairs[name] for name in ("7/7_1.png", "7/7_inde_2.png", "8/8_1.png")], axis=0)
    found = [
        result.columns[name].score for name in ("l1, final turns", "l2, final turns", "l1, all turns", "l2, all turns")
    ]
    assert found == pytest.approx([*final, *every])
    cosines = [{"judge": "CLIP"}, *({"image": name, "clip_i": 0.5, "dino": 0.25, "clip_t": 0.1} for name in pairs)]
    result = score_magicbrush(folder, sources, write_lines(tmp_path / "s.jsonl", cosines))
    assert result.columns["dino, final turns"].score == 0.25 and result.judge == "CLIP"


def test_the_distance_is_taken_in_the_targets_size(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (16, 12), (0, 0, 0)).save(tmp_path / "b.png")
    assert pixel_distances(tmp_path / "a.png", tmp_path / "b.png") == pytest.approx((1 / 3, 1 / 3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop(1), "nothing about fullset/color/cn/a.png"),
        (lambda r: r.append(r[1]), r"r\.jsonl:6 .* and so is .*r\.jsonl:2"),
        (lambda r: r[2].update(semantics=11), r"r\.jsonl:3.*semantics is 11"),
        (lambda r: r[2].update(quality=None), r"r\.jsonl:3.*expected float"),
        (lambda r: r[2].update(image="fullset/color/en/z.png"), r"r\.jsonl:3.*not asked for"),
    ],
)
def test_spoiled_ratings_are_refused_with_file_and_line(change, says, drawn, tmp_path):
    rows = gedit_ratings()
    change(rows)
    with pytest.raises(DataError, match=says):
        score_gedit(drawn["gedit"].folder, write_lines(tmp_path / "r.jsonl", rows))


def test_ratings_of_another_benchmark_and_missing_targets_are_refused(drawn, sources, tmp_path):
    ratings = write_lines(tmp_path / "r.jsonl", gedit_ratings())
    with pytest.raises(DataError, match="holds images of gedit; expected imgedit"):
        score_imgedit(drawn["gedit"].folder, ratings)
    with pytest.raises(DataError, match=r"7-output1.png is not there"):
        score_magicbrush(drawn["magicbrush"].folder, tmp_path)


@pytest.mark.parametrize(
    ("benchmark", "text", "says"),
    [
        ("gedit", json.dumps(GEDIT[0] | {"image": "none.png"}), "is about none.png, which is not in"),
        ("gedit", json.dumps(GEDIT[0] | {"image": "../one.png"}), "which is not in"),
        ("gedit", json.dumps(GEDIT[0] | {"image": "a" * 5000}), "which is not in"),
        ("gedit", json.dumps(GEDIT[0] | {"image": "7"}), "about 7, which is not in"),
        ("gedit", json.dumps(GEDIT[0] | {"key": "../a"}), r"e:1.*names a file"),
        ("gedit", json.dumps(GEDIT[0] | {"instruction_language": "de"}), r"e:1.*'en', 'cn'"),
        ("gedit", f"{json.dumps(GEDIT[0])}\n{json.dumps(GEDIT[0])}", "fullset/color/en/a twice"),
        ("imgedit", "[]", "no JSON object of edits"),
        ("imgedit", '{"1": {"id": "one.png"}}', "e: 1: .*prompt: missing"),
        ("imgedit", '{"../1": {}}', "key '../1' names a file"),
        ("magicbrush", '{"7": []}', "7 has no turns"),
        ("magicbrush", '{"7": [{"input": "7-input.png"}]}', "e: 7: .*missing"),
    ],
)
def test_spoiled_edits_are_refused_with_their_place(benchmark, text, says, sources, tmp_path):
    (tmp_path / "e").write_text(text)
    with pytest.raises(DataError, match=says):
        read_edits(benchmark, tmp_path / "e", sources)
