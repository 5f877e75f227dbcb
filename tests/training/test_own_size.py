"""Every stage of every large recipe at its own image size and grid, and everything that a finished model is used for.

Widths are small and weights random, so nothing here says that a model learns: only that no step on the way takes the
size of another model for granted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import own_size_cases
from starflow2.cli.app import main
from starflow2.models.config_file import read_config
from starflow2.pipeline import StarFlow2
from starflow2.training import recipes

pytest.importorskip("torchdata", reason="real corpora need the extra train")
pytestmark = pytest.mark.own_size

STAGES = ("fae", "t2i", "adapter", "joint")


def command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


def losses(run: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / f"metrics-{stage}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["paper", "paper-siglip", "mini"])
def test_a_large_recipe_goes_from_published_weights_to_a_picture_an_answer_and_an_edit(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(own_size_cases, "FOLDER", tmp_path)
    recipe, run, large = f"own_size_cases:{name.replace('-', '_')}", tmp_path / "run", recipes.find(name)
    own_size_cases.write_backbones(large, tmp_path / name)
    own_size_cases.write_mixtures(tmp_path)

    command("prepare", recipe, "-o", run)
    frozen = StarFlow2.from_pretrained(run / "model", device="cpu").tower_answers(torch.zeros(1, 3, 256, 256), ["cats"])
    assert len(frozen) == 1, "the language model answers by itself before anything is trained"
    command("train", recipe, "-o", run, "--device", "cpu")
    model = run / "model"
    made = read_config(model)
    assert made.finished_stages == STAGES and all(len(losses(run, stage)) for stage in STAGES)
    assert (made.model.fae.image_size, made.model.flow.deep.grid) == (256, large.model.flow.deep.grid)

    command("train", recipe, "--stage", "joint", "--steps", 3, "-o", run, "--device", "cpu")  # goes on from step 2
    assert json.loads((run / "metrics-joint.jsonl").read_text().splitlines()[-1])["step"] == 3

    _use(model, tmp_path, capsys)
    album, mixture = tmp_path / "pictures", tmp_path / "joint.json"
    sizes = ("--steps", 1, "--batch", 2, "--rank", 2, "--device", "cpu")
    command("finetune", album, "--model", model, "--mixture", mixture, "-o", tmp_path / "taught", *sizes)
    assert read_config(tmp_path / "taught").model == made.model


def _use(model: Path, folder: Path, capsys: Any) -> None:
    """generate, ask, edit and score."""
    shown, options = folder / "pictures" / "0.png", ("--model", model, "--device", "cpu")
    command("generate", "two red cats", "-o", folder / "cats.png", "--guidance", 0, *options)
    command("edit", shown, "make it red", "-o", folder / "edited.png", *options)
    assert all(Image.open(folder / f"{name}.png").size == (256, 256) for name in ("cats", "edited"))
    command("ask", shown, "How many cats?", *options)
    capsys.readouterr()
    command("score", "two red cats", shown, "--json", folder / "score.json", *options)
    assert json.loads((folder / "score.json").read_text())


def test_a_recipe_whose_corpora_are_not_there_asks_for_data_before_anything_is_built(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["train", "paper"],
        ["train", "mini", "--stage", "t2i"],
        ["train", "paper", "--smoke", "--keep-size"],
    ):
        assert main([*words, "-o", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert "no file to read at corpora/cc12m" in said and "--corpus.mixture FILE" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
