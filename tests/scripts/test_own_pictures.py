"""The emoji of docs/own-pictures.md as data: mixtures that every stage takes, a judge, a sheet, a list of losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import script
from starflow2.core.images import save_png
from starflow2.data.mixture import read_mixture
from starflow2.training.config import CorpusConfig, StageConfig
from starflow2.training.mixture_check import check_mixture

pytest.importorskip("datasets", reason="real corpora need the extra train")
NAMES = [f"thing {i}" for i in range(30)]


@pytest.fixture(scope="module")
def own() -> Any:
    return script("own_pictures")


@pytest.fixture(scope="module")
def data(own: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty things, each a picture of its own with a transparent edge, twenty of them with two tones of skin."""
    package = tmp_path_factory.mktemp("package")
    images = package / "img" / "google" / "64"
    images.mkdir(parents=True)
    entries = []
    for i, name in enumerate(NAMES):
        entry: dict[str, Any] = {
            "name": name.upper(),
            "category": "Things",
            "image": f"{i}.png",
            "has_img_google": True,
        }
        if i < 20:
            tones = {tone: {"image": f"{i}-{tone}.png", "has_img_google": True} for tone in ("1F3FB", "1F3FF")}
            entry["skin_variations"] = tones
        entries.append(entry)
        for file in [entry["image"], *(tone["image"] for tone in entry.get("skin_variations", {}).values())]:
            pixels = np.random.default_rng(len(file) + 7 * i).integers(0, 255, (64, 64, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(images / file)
    (package / "emoji.json").write_text(json.dumps(entries))
    own.write(package, package / "data")
    return package / "data"


def test_held_out_names_are_in_no_picture_question_or_edit_of_training(own, data):
    part = {name: (data / f"{name}-questions.jsonl").read_text() for name in ("train", "held")}
    held = [name for name in NAMES if f'"{name}"' in part["held"] or f'"{name},' in part["held"]]
    assert 0 < len(held) < 10 and not any(f'"{name}"' in part["train"] for name in held)
    assert Image.open(next((data / "train").glob("*.png"))).mode == "RGB"
    edits = [json.loads(line) for line in (data / "train-edits.jsonl").read_text().splitlines()]
    words = {edit["messages"][0]["content"][1]["text"] for edit in edits}
    assert words == {"make the skin light", "make the skin dark", "make the skin yellow"}


def test_every_stage_takes_its_mixture(data):
    stages = {"features": "draw", "fae": "draw", "vlm": "look", "t2i": "draw", "adapter": "look", "joint": "joint"}
    for stage, name in stages.items():
        corpus = CorpusConfig(mixture=str(data / f"train-{name}.json"), held_out=str(data / f"held-{name}.json"))
        check_mixture(StageConfig(name=stage, steps=1, batch=8, corpus=corpus, held_out_batches=1))  # type: ignore[arg-type]
        assert all(Path(source.url).exists() for source in read_mixture(corpus.mixture))


def test_true_pictures_are_judged_to_be_right_and_others_wrong_and_a_sheet_shows_both(own, data, tmp_path):
    prompts = (data / "prompts.txt").read_text().splitlines()
    for i, prompt in enumerate(prompts[:8]):
        shown = NAMES.index(prompt) if i < 6 else NAMES.index(prompts[0])
        save_png(Image.open(data / "train" / f"{shown}.png"), tmp_path / f"{i}.png", {"prompt": prompt})
    found = own.judge(data, tmp_path)
    assert (found["pictures"], found["right"]) == (8, 0.75)
    pictures = len(list((data / "train").glob("*.png")))
    assert 1 / pictures <= found["chance"] <= 3 / pictures
    assert own.sheet(data, tmp_path, columns=4, rows=2).size == (4 * 68 - 4, 2 * 140 - 12)
    with pytest.raises(SystemExit, match="no picture whose prompt"):
        own.judge(data, data)


def test_losses_are_listed_by_stage_from_before_the_first_step_on(own, tmp_path):
    lines = [{"step": 0, "held_out_loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 8, "held_out_loss": 0.5}]
    (tmp_path / "metrics-fae.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(own.losses(tmp_path)) == ["fae: 2.0000 at 0, 0.5000 at 8"]
