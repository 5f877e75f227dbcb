"""Commands of published benchmarks: verbs of several words, what they print, and refusals on one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmark_cases import DPG_ROWS, GENEVAL_ROWS, detections_of, tiny_model, write_lines
from model_cases import STAGES
from starflow2.benchmarks.folders import read_folder
from starflow2.benchmarks.geneval import GenevalLayout
from starflow2.cli.app import main, split_verb
from starflow2.models.checkpoint import save_components


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """The tiny model before stage joint."""
    place = tmp_path_factory.mktemp("tiny") / "model"
    save_components(tiny_model(STAGES[:4]).components, place)
    return str(place)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_the_longest_verb_counts_and_what_follows_are_its_arguments():
    assert split_verb(["eval", "geneval", "score", "x"]) == ("eval geneval score", ["x"])
    assert split_verb(["eval", "geneval", "--out", "x"]) == ("eval geneval", ["--out", "x"])
    assert split_verb(["eval", "world"]) == ("eval", ["world"])
    assert split_verb(["nothing"]) == ("nothing", [])


def test_the_help_of_eval_lists_the_commands_below_it(capsys):
    assert main(["eval", "--help"]) == 0
    page = capsys.readouterr().out
    assert "eval geneval score" in page and "eval report" in page
    assert main(["eval", "geneval", "--help"]) == 0
    page = capsys.readouterr().out
    assert "usage: starflow2 eval geneval" in page and "eval geneval detect" in page and "eval dpg" not in page


def test_geneval_is_drawn_scored_and_reported(folder, capsys):
    write_lines(Path("prompts.jsonl"), GENEVAL_ROWS)
    argv = ["eval", "geneval", "--prompts", "prompts.jsonl", "--out", "images", "--samples", "1", "--model", folder]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "images: 3 of 4 prompts." in printed and "bench (1)" in printed
    drawn = read_folder("images", GenevalLayout())
    write_lines(Path("d.jsonl"), detections_of(drawn))
    assert main(["eval", "geneval", "score", "images", "--detections", "d.jsonl", "--json", "g.json"]) == 0
    assert "counting" in capsys.readouterr().out
    assert json.loads(Path("g.json").read_text())["columns"]["overall"]["score"] == 1
    assert main(["eval", "report", "g.json", "--images", "images"]) == 0
    assert capsys.readouterr().out.split() == ["report/report.md", "report/report.json", "report/images.png"]


def test_dpg_is_drawn_into_grids(folder, capsys):
    write_lines(Path("prompts.jsonl"), DPG_ROWS)
    assert main(["eval", "dpg", "--prompts", "prompts.jsonl", "--out", "images", "--model", folder]) == 0
    assert "1 of 2 prompts, 4 images each" in capsys.readouterr().out and Path("images/one.png").is_file()


def test_the_density_of_images_is_a_table(folder, capsys):
    argv = ["eval", "likelihood", "--count", "2", "--levels", "0.5", "--model", folder, "--json", "l.json"]
    assert main(argv) == 0
    assert "nats per dimension at noise 0.5" in capsys.readouterr().out
    assert json.loads(Path("l.json").read_text())["counts"]["images"] == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["eval", "geneval", "--prompts", "none.jsonl", "--out", "o"], "cannot read 'none.jsonl'"),
        (["eval", "geneval", "--out", "o"], "required: --prompts"),
        (["eval", "geneval", "--prompts", "p", "--out", "o", "--samples", "0"], "cannot read 'p'"),
        (["eval", "geneval", "score", "o", "--detections", "d.jsonl"], "o is no folder of drawn prompts"),
        (["eval", "dpg", "--prompts", "none", "--out", "o", "--sample", "3"], "eval dpg has no option --sample"),
        (["eval", "gedit", "--edits", "none", "--images", ".", "--out", "o"], "cannot read 'none'"),
        (["eval", "imgedit", "--edits", "none", "--images", ".", "--out", "o"], "cannot read none"),
        (["eval", "likelihood", "--count", "1"], "--count is 1; expected at least 2"),
        (["eval", "report"], "eval report needs results"),
        (["eval", "report", "none.json"], "cannot read none.json"),
        (["eval", "mme", "--out", "o", "--limit", "-1"], "--limit is -1"),
        (["eval", "mme", "--out", "o", "--python", "none"], "no interpreter at none"),
        (["eval", "seed", "--out", "o", "--fit", "tile"], "expected stretch, pad or crop, got 'tile'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(argv, says, capsys):
    assert says in refused(capsys, *argv)
    assert list(Path().iterdir()) == []


def test_an_edit_benchmark_needs_stage_joint(folder, capsys):
    Image.new("RGB", (64, 64)).save("one.png")
    row = {"key": "a", "task_type": "t", "instruction": "make it red", "instruction_language": "en", "image": "one.png"}
    write_lines(Path("e.jsonl"), [row])
    argv = ["eval", "gedit", "--edits", "e.jsonl", "--images", ".", "--out", "o", "--model", folder]
    assert "gedit needs a model that has finished stage joint" in refused(capsys, *argv)
    assert not Path("o").exists()
