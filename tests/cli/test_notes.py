"""Notes on standard error: images and sentences unlike those of training are named, and none is refused for it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model_cases import STAGES, tiny_components
from starflow2.cli.app import main
from starflow2.cli.notes import FAR, far
from starflow2.cli.repl import Album, Chat, Screen
from starflow2.inference.likelihood import score
from starflow2.pipeline import StarFlow2


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return StarFlow2(tiny_components(STAGES))


@pytest.fixture
def commands(model, monkeypatch, tmp_path) -> None:
    """Every command loads the tiny model, in an empty folder."""
    monkeypatch.setattr(StarFlow2, "from_pretrained", lambda *_, **__: model)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 64), (200, 30, 40)).save("photo.png")


def test_an_image_beyond_the_models_limit_is_noted_by_every_command_that_reads_one(commands, model, capsys):
    before, (nats,) = model.components.cfg, model.nats_of([Path("photo.png")])
    try:
        for limit, is_noted in ((nats - 0.1, True), (nats + 0.1, False), (None, False)):
            model.components.cfg = replace(before, far_nats=limit)
            for argv in (
                ["ask", "photo.png", "how many circles are there?"],
                ["edit", "photo.png", "make the star blue"],
                ["invert", "photo.png", "two red hearts"],
            ):
                assert main(argv) == 0
                assert (FAR in capsys.readouterr().err) == is_noted, argv
            screen = Screen(io.StringIO(), io.StringIO())
            chat = Chat(model.session(), screen, Album(Path("made"), {"model": "tiny"}))
            chat.run(["/show photo.png"])
            assert (FAR in screen.err.getvalue()) == is_noted
    finally:
        model.components.cfg = before


def test_nats_are_those_of_score_in_float64_per_dim(model):

    image = torch.zeros(3, 64, 64)
    (picture,) = score(model.exact_sampler(), [], [image], noise_level=model.sampling_noise).pictures
    assert model.nats_of([image])[0] == pytest.approx(picture.nats_per_dim, abs=1e-4)
    assert float(picture.patches.sum()) + picture.shallow_logdet == pytest.approx(picture.log_prob, abs=1e-3)
    assert far(model, image) == ""


def test_a_sentence_unlike_those_of_training_is_noted_by_every_command_that_reads_one(commands, model, capsys):
    for argv, odd in (
        (["generate", "two red hearts", "red is the circle", "--tries", "1"], "'red is the circle'"),
        (["ask", "photo.png", "star color"], "'star color'"),
        (["edit", "photo.png", "is there a star?", "--tries", "1"], "'is there a star?'"),
    ):
        assert main(argv) == 0
        noted = [line for line in capsys.readouterr().err.splitlines() if "put unlike" in line]
        assert len(noted) == 1 and odd in noted[0]
    screen = Screen(io.StringIO(), io.StringIO())
    chat = Chat(model.session(), screen, Album(Path("made"), {"model": "tiny"}))
    chat.run(["two red hearts", "circle the red is", "is there a star?", "make the star blue"])
    assert screen.err.getvalue().count("put unlike") == 1 and "'circle the red is'" in screen.err.getvalue()
