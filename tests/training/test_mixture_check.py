"""Mixtures that lack what their stage learns from, refused by name before anything is built or written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from starflow2.cli.app import main
from starflow2.core.serialize import from_dict, to_dict
from starflow2.data.mixture import Source, read_mixture
from starflow2.errors import ConfigError, DataError, StarFlowError
from starflow2.training.config import CorpusConfig, StageConfig, StageName
from starflow2.training.mixture_check import check_mixture
from starflow2.training.recipes import mini, paper, paper_siglip, smoke

pytest.importorskip("torchdata", reason="real corpora need the extra train")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captioned images, talks about them, words alone, and edits."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "captioned").mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(folder / "captioned" / f"{i}.png")
        (folder / "captioned" / f"{i}.txt").write_text(f"shade {i}")
    shown, words = {"type": "image", "image": "0.png"}, {"type": "text", "text": "what is it?"}
    drawn = [{"type": "image", "image": "1.png"}]
    talks = {"talks": ([shown, words], "a shade"), "words": ("hello", "good day"), "edits": ([shown, words], drawn)}
    for name, (asked, answered) in talks.items():
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        (folder / f"{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (folder / "broken.jsonl").write_text("{}\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "papers").mkdir()
    (folder / "papers" / "notes.md").write_text("no image here")
    return folder


def mixture(data: Path, names: Sequence[str]) -> str:
    """A file whose sources have these names; describe: captions turned round."""
    sources: list[dict[str, Any]] = []
    for name in names:
        if name in ("captioned", "describe", "papers"):
            url = str(data / ("captioned" if name == "describe" else name))
            sources.append({"corpus": "captions", "url": url, "weight": 1})
            sources[-1] |= {"task": "describe"} if name == "describe" else {}
        else:
            pictures = str(data / "captioned")
            sources.append(
                {"corpus": "dialogue", "url": str(data / f"{name}.jsonl"), "pictures": pictures, "weight": 1}
            )
    file = data / f"{'-'.join(names)}.json"
    file.write_text(json.dumps(sources))
    return str(file)


def stage(name: StageName, file: str) -> StageConfig:
    return StageConfig(name=name, steps=1, batch=2, corpus=CorpusConfig(mixture=file))


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("features", ["words", "captioned"]),
        ("fae", ["describe"]),
        ("vlm", ["words"]),
        ("vlm", ["captioned", "talks"]),
        ("t2i", ["captioned"]),
        ("adapter", ["describe"]),
        ("adapter", ["captioned", "words", "talks"]),
        ("adapter", ["captioned", "broken"]),  # what is broken at first may hold answers further on
        ("joint", ["edits", "talks"]),
        ("final", ["captioned"]),
    ],
)
def test_a_mixture_with_what_its_stage_learns_from_is_taken(data, name, sources):
    check_mixture(stage(name, mixture(data, sources)))


@pytest.mark.parametrize(
    ("name", "sources", "says"),
    [
        (
            "adapter",
            ["captioned"],
            'answers in words about images, .*captions at .*or captions with "task": "describe"',
        ),
        ("adapter", ["captioned", "edits", "words"], "answers in words about images"),
        ("vlm", ["captioned", "edits"], "answers in words, .*: none of the first 32 samples"),
        ("fae", ["words"], "learns from images, .* add sources with images"),
        ("joint", ["describe", "talks"], "images that are drawn, .* add captions"),
        (
            "t2i",
            ["captioned", "talks"],
            r"other documents, in dialogue at .*talks.jsonl; leave that source to stage jo",
        ),
        ("t2i", ["describe"], "takes words followed by one drawn image"),
        (
            "joint",
            ["captioned", "empty"],
            "dialogue at .*empty.jsonl has no sample. Give it yours with --corpus.mixture",
        ),
        ("fae", ["papers"], "captions at .*papers has no sample"),
        ("fae", ["gone"], "there is no .* at .*gone.jsonl"),
    ],
)
def test_a_mixture_that_lacks_it_is_refused_with_its_sources_named(data, name, sources, says):
    with pytest.raises(StarFlowError, match=says):
        check_mixture(stage(name, mixture(data, sources)))


def test_held_out_data_are_looked_at_too(data):
    corpus = CorpusConfig(mixture=mixture(data, ["talks"]), held_out=mixture(data, ["captioned"]))
    with pytest.raises(ConfigError, match=r"captioned\.json has none"):
        check_mixture(StageConfig(name="adapter", steps=1, batch=2, corpus=corpus, held_out_batches=1))


def test_the_command_refuses_in_one_line_and_leaves_no_folder(data, tmp_path, capsys):
    words = ["train", "nano", "--stage", "adapter", "--corpus.mixture", mixture(data, ["captioned"])]
    assert main([*words, "-o", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "stage adapter learns from answers in words about images" in said
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()


# -- mixtures of paper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [paper, paper_siglip, mini])
def test_every_stage_of_a_large_recipe_names_a_shipped_mixture_that_says_whose_choice_its_weights_are(recipe):
    files = [stage.corpus.mixture for stage in recipe().stages]
    assert [Path(file).name for file in files] == [f"paper-{stage.name}.json" for stage in recipe().stages]
    for file in files:
        for source in read_mixture(file):
            assert source.note and source.url.startswith("corpora/")
    weighted = [source for file in files for source in read_mixture(file) if len(read_mixture(file)) > 1]
    assert weighted and all("our choice" in source.note for source in weighted)


def test_the_mixtures_of_paper_hold_what_the_paper_names():
    fae, t2i, adapter, joint = (read_mixture(stage.corpus.mixture) for stage in paper().stages)
    assert [(source.corpus, source.task) for source in adapter] == [("cc12m", "describe")]
    assert {source.task for source in (*fae, *t2i, *joint)} == {"given"}
    named = {"blip3o", "cambrian", "comm", "pico-banana", "omniedit", "zebra-cot"}
    assert named <= {source.corpus for source in joint}


def test_a_large_recipe_in_miniature_draws_its_own_world_and_a_missing_corpus_is_named(tmp_path, monkeypatch):
    assert not any(stage.corpus.mixture for stage in smoke(paper()).stages)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"stage t2i: there is no file to read at corpora/cc12m.*--corpus.mixture FILE"):
        check_mixture(paper().stage("t2i"))


def test_a_note_changes_nothing_else(data):
    source = Source(corpus="captions", url="x", weight=1.0, note="mine")
    assert from_dict(Source, to_dict(source)) == source


def test_mixtures_gives_every_stage_its_file(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fae", "t2i", "adapter"):
        Path(f"{name}.json").write_text(Path(mixture(data, ["captioned"])).read_text())
    assert main(["train", "paper", "--smoke", "--keep-size", "--mixtures", "."]) == 2
    assert "lacks joint.json" in capsys.readouterr().err
    words = ["train", "paper", "--smoke", "--keep-size", "--mixtures", ".", "--stage", "t2i", "--dry-run"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["corpus"]["mixture"] == "t2i.json"
    Path("joint.json").write_text(Path("fae.json").read_text())
    assert main(["train", "paper", "--smoke", "--keep-size", "--mixtures", "."]) == 2
    assert "stage adapter learns from answers in words about images" in capsys.readouterr().err
    assert not Path("runs").exists()
