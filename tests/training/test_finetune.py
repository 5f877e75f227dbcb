"""Adapters and fine-tuning: nothing changes before training, only the adapter learns, what is merged is the sum."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import script
from model_cases import STAGES, tiny_components, tiny_folder, tiny_model, tiny_tokenizer
from starflow2.cli.app import main
from starflow2.cli.finetune import Finetune
from starflow2.errors import CheckpointError, ConfigError, DataError, PromptError, StateError
from starflow2.models import lora
from starflow2.models.checkpoint import load_components
from starflow2.models.components import Components
from starflow2.models.lora import LoraConfig
from starflow2.models.prompts import check_words
from starflow2.models.tensor_file import load_signed, save_tensors
from starflow2.training.finetune import FinetuneConfig, finetune, finetune_task, read_album
from starflow2.training.metrics import StepReport
from starflow2.world.captions import caption_task

SMALL = FinetuneConfig(steps=3, batch=4, lora=LoraConfig(rank=2))


@pytest.fixture
def album_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 80), (20, 150, 150 + i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("A  teal\nCircle, twice\n")
    return folder


def density(components: Components) -> torch.Tensor:
    """Log density of some latents behind a caption, through the whole deep block."""
    from starflow2.models.context import drawing_context

    rows = [components.tokenizer.drawing_prompt(caption_task(0, i).prompt) for i in range(2)]
    latents = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return components.flow.log_prob(latents, drawing_context(components, rows), torch.full((2,), 0.5))


def shaken(added: torch.nn.ModuleDict) -> None:
    with torch.no_grad():
        for i, module in enumerate(added.values()):
            module.b.copy_(0.05 * torch.randn(module.b.shape, generator=torch.Generator().manual_seed(i)))


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_is_w_plus_scale_b_a():
    components = tiny_components(STAGES)
    plain, before = {k: v.clone() for k, v in components.state_dict().items()}, density(components)
    added = lora.attach(components, LoraConfig(rank=3, scale=0.5))
    assert torch.equal(density(components), before)
    shaken(added)
    after = density(components)
    assert (after - before).abs().min() > 1e-3
    sums = {n.replace("/", "."): 0.5 * (m.b @ m.a).detach() for n, m in added.items()}
    lora.merge(components)
    assert torch.allclose(density(components), after, atol=1e-4)
    merged = components.state_dict()
    assert merged.keys() == plain.keys()
    for name, value in merged.items():
        inside = name.removeprefix("flow.deep.").removesuffix(".weight")
        expected = plain[name] + sums[inside] if name.startswith("flow.deep.") and inside in sums else plain[name]
        assert torch.equal(value, expected) or torch.allclose(value, expected, atol=1e-7), name
    assert set(sums) == {"context_in", *(f"body.layers.0.{n}" for n in ("attention.qkv", "attention.proj"))} | {
        "body.layers.0.mlp.up",
        "body.layers.0.mlp.down",
    }


def test_an_adapter_alone_is_small_and_goes_back_on_its_own_model_only(tmp_path):
    components = tiny_components(STAGES)
    shaken(lora.attach(components, LoraConfig(rank=2)))
    lora.save(components, LoraConfig(rank=2), tmp_path / "a.safetensors")
    wanted = density(components)
    again = tiny_components(STAGES)
    lora.load(again, tmp_path / "a.safetensors")
    assert torch.equal(density(again), wanted)
    assert (tmp_path / "a.safetensors").stat().st_size < 40_000
    other = tiny_components(STAGES, scale=0.06)
    with pytest.raises(CheckpointError, match="belongs to weights"):
        lora.load(other, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="has no metadata lora"):
        lora.load(tiny_components(STAGES), tmp_path / "none.safetensors")
    with pytest.raises(StateError, match="has adapters; expected none"):
        lora.attach(again, LoraConfig())


TAMPERED = {
    "another rank": lambda t, m: m.update(lora='{"rank": 3, "scale": 1.0}'),
    "an enormous rank": lambda t, m: m.update(lora='{"rank": 100000000000, "scale": 1.0}'),
    "an infinite scale": lambda t, m: m.update(lora='{"rank": 2, "scale": 1e999}'),
    "no JSON": lambda t, m: m.update(lora="{"),
    "NaN": lambda t, m: t["context_in.a"].fill_(torch.nan),
    "another shape": lambda t, m: t.update({"context_in.b": t["context_in.b"][:-1].contiguous()}),
    "whole numbers": lambda t, m: t.update({"context_in.b": t["context_in.b"].int()}),
    "a tensor missing": lambda t, m: t.pop("context_in.a"),
    "a tensor more": lambda t, m: t.update(more=torch.zeros(2)),
}


@pytest.mark.parametrize("case", [*TAMPERED, "a flipped bit"])
def test_adapters_that_were_changed_are_refused_and_leave_the_model_as_it_was(tmp_path, case):
    path = tmp_path / "a.safetensors"
    components = tiny_components(STAGES)
    shaken(lora.attach(components, LoraConfig(rank=2)))
    lora.save(components, LoraConfig(rank=2), path)
    if case in TAMPERED:
        tensors, metadata = load_signed(path)
        TAMPERED[case](tensors, metadata)
        save_tensors(tensors, path, metadata)
    else:
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    model = tiny_components(STAGES)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        lora.load(model, path)
    lora.attach(model, LoraConfig(rank=1))  # which a model with adapters refuses


@pytest.mark.parametrize("stages", [STAGES[:4], STAGES], ids=["draws only", "joint"])
def test_finetuning_changes_the_deep_block_alone_and_the_lexicon_grows(tmp_path, album_folder, stages):
    base = tiny_folder(tmp_path / "base", stages) / "model"
    album = read_album(album_folder, 64)
    reports: list[StepReport] = []
    made = finetune(album, base, tmp_path / "taught", SMALL, report=reports.append)
    old, new = load_components(base), load_components(made)
    with pytest.raises(PromptError, match="teal"):
        check_words(old, "a teal circle")
    check_words(new, "a teal circle twice")
    before, after = old.state_dict(), new.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(n.startswith(("flow.deep.body.layers.", "flow.deep.context_in.weight")) for n in changed)
    assert all(n.endswith(".weight") for n in changed) and new.finished_stages == old.finished_stages
    assert reports[-1].step == reports[-1].steps == 3
    lora.load(old, made / "adapter.safetensors")
    lora.merge(old)
    assert all(torch.allclose(old.state_dict()[k], v, atol=1e-6) for k, v in after.items())
    assert load_file(made / "adapter.safetensors")["context_in.a"].shape[0] == 2


def test_the_loss_of_an_album_falls_when_nothing_is_replayed(album_folder):
    components = tiny_components(STAGES[:4])
    config = FinetuneConfig(steps=12, batch=4, replay=0.0, lr=1e-2, lora=LoraConfig(rank=4))
    task = finetune_task(components, read_album(album_folder, 64), config)
    data, losses = task.make_batch(range(4)), list[float]()
    optimizer = torch.optim.AdamW(task.trained.parameters(), lr=1e-2)
    for _ in range(12):
        loss, _ = task.loss(data, torch.Generator().manual_seed(1))
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("stages", [STAGES[:4], STAGES], ids=["draws only", "joint"])
def test_a_share_of_every_batch_is_the_drawn_world(album_folder, stages):
    def tealness(replay: float) -> float:
        config = FinetuneConfig(steps=1, batch=4, replay=replay)
        pictures = finetune_task(tiny_components(stages), read_album(album_folder, 64), config).make_batch(range(80))[0]
        return float((pictures[:, 0].amax((1, 2)) < -0.8).float().mean())  # no red anywhere

    assert tealness(0.0) == 1.0
    assert 0.2 < tealness(0.5) < 0.7


def mixture_of(folder: Path, *records: dict[str, Any]) -> str:
    """A mixture file of conversations."""
    (folder / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = folder / "mixture.json"
    file.write_text(json.dumps([{"corpus": "dialogue", "url": str(folder / "talks.jsonl"), "weight": 1}]))
    return str(file)


def a_talk(folder: Path, content: str) -> dict[str, Any]:
    """A red picture, and what the user says or shows before it is drawn or spoken of."""
    Image.new("RGB", (64, 64), (250, 20, 20)).save(folder / "red.png")
    red = [{"type": "image", "image": "red.png"}]
    sides = (red, content) if content == "red" else (content, red)
    return {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), sides, strict=True)]}


@pytest.mark.parametrize("stages", [STAGES[:4], STAGES], ids=["draws only", "joint"])
def test_a_share_of_every_batch_is_a_mixture_where_one_is_given(tmp_path, album_folder, stages):
    pytest.importorskip("torchdata", reason="real corpora need the extra train")
    config = FinetuneConfig(steps=1, batch=4, mixture=mixture_of(tmp_path, a_talk(tmp_path, "a zebra")))
    components = tiny_components(stages)
    images = finetune_task(components, read_album(album_folder, 64), config).make_batch(range(40))[0]
    is_red = images[:, 0].amin((1, 2)) > 0.8
    assert 0.2 < float(is_red.float().mean()) < 0.8 and bool((images[~is_red][:, 0] < -0.8).all())
    check_words(components, "a zebra")  # the model has now seen real text
    asked = replace(config, mixture=mixture_of(tmp_path, a_talk(tmp_path, "red")), replay=0.9)
    task = finetune_task(tiny_components(stages), read_album(album_folder, 64), asked)
    if "joint" in stages:
        assert len(task.make_batch(range(8))[1].labels)
    else:
        with pytest.raises(DataError, match="kind understand, but this model has not finished stage joint"):
            task.make_batch(range(8))


def test_a_model_of_another_image_size_is_not_shown_the_drawn_world(tmp_path, album_folder):
    components = Components(tiny_model(4), tiny_tokenizer())
    components.finished_stages = STAGES[:4]
    album = read_album(album_folder, 32)
    with pytest.raises(
        ConfigError, match=r"64 pixels a side, this model's 32; .* --mixture FILE, or nothing with --rep"
    ):
        finetune_task(components, album, SMALL)
    task = finetune_task(components, album, replace(SMALL, replay=0.0))
    assert task.make_batch(range(2))[0].shape == (2, 3, 32, 32)


def test_captions_are_normalized_as_prompts_are(album_folder):
    components = tiny_components(STAGES[:4])
    config = FinetuneConfig(steps=1, batch=4, replay=0.0)
    _, rows = finetune_task(components, read_album(album_folder, 64), config).make_batch(range(40))
    caption, empty = (components.tokenizer.drawing_prompt(text) for text in ("a teal circle, twice", ""))
    assert all(row in (caption, empty) for row in rows) and caption in rows


def test_albums_that_cannot_be_read_say_why(tmp_path, album_folder):
    with pytest.raises(DataError, match="no folder"):
        read_album(tmp_path / "nowhere", 64)
    (album_folder / "1.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"1\.txt is empty"):
        read_album(album_folder, 64)
    (album_folder / "1.txt").unlink()
    with pytest.raises(DataError, match=r"no caption of 1\.png: cannot read '.*1\.txt'"):
        read_album(album_folder, 64)


def test_hidden_files_are_no_images_and_all_that_is_refused_is_named_at_once(album_folder):
    (album_folder / "._0.png").write_bytes(b"of macOS")
    (album_folder / "folder.png").mkdir()
    (album_folder / "0.txt").rename(album_folder / "0.TXT")
    (album_folder / "1.txt").write_bytes("\ufeffA teal circle".encode())
    album = read_album(album_folder, 64)
    assert album.captions == ("A teal Circle, twice", "A teal circle", "A teal Circle, twice")
    (album_folder / "1.txt").write_bytes(b"\xff\xfea")
    (album_folder / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2 of 3 images cannot be used.*1\.txt.*UTF-16.*2\.png.*no known format"):
        read_album(album_folder, 64)


def test_the_command_teaches_a_folder_and_says_where_the_model_is(tmp_path, album_folder, capsys):
    base, out = tiny_folder(tmp_path / "base", STAGES[:4]) / "model", tmp_path / "out"
    sizes = ["--steps", "1", "--batch", "2", "--rank", "2", "--device", "cpu"]
    assert main(["finetune", str(album_folder), "--model", str(base), "-o", str(out), *sizes]) == 0
    assert capsys.readouterr().out.strip() == str(out) and (out / "adapter.safetensors").is_file()
    assert main(["finetune", str(tmp_path), "--model", str(base), "-o", str(out), *sizes]) == 2
    assert "holds no images" in capsys.readouterr().err


def test_the_command_and_the_library_begin_from_the_same_settings():
    command, library = Finetune(folder=Path("album")), FinetuneConfig()
    for name in ("steps", "batch", "lr", "replay", "seed"):
        assert getattr(command, name) == getattr(library, name), name
    assert command.rank == library.lora.rank


def test_a_model_that_does_not_draw_yet_is_refused(album_folder):
    with pytest.raises(StateError, match="needs t2i"):
        finetune_task(tiny_components(STAGES[:3]), read_album(album_folder, 64), SMALL)


def test_the_ceiling_is_what_the_codec_leaves_of_the_new_colour(tmp_path):
    teach = script("teach_word")
    teach.write_album(tmp_path, 4, seed=3)
    true = read_album(tmp_path, 64).images
    grey = torch.full((4, 3, 64, 64), 0.5)
    for left, share in ((lambda images, noise: images, 1.0), (lambda images, noise: grey, 0.0)):
        model = SimpleNamespace(sampling_noise=0.5, roundtrip=left)
        assert teach.codec_ceiling(model, true) == share


def test_the_pictures_of_the_new_colour_show_it_and_the_judge_with_its_palette_sees_it():
    from starflow2.world import detector as judge

    teach = script("teach_word")
    made = list(teach.captioned(12, 3))
    assert all(text.split().count(teach.WORD) == 1 for _, text in made)
    images = np.stack([pixels for pixels, _ in made])
    with teach.one_more_colour() as new:
        assert all(any(d.color == new for d in scan.detections) for scan in judge.detect(images))
    assert len(judge.PALETTE) == new, "the palette is put back"
    assert not any(d.color == new for scan in judge.detect(images) for d in scan.detections)


@pytest.mark.slow
def test_the_script_runs_from_end_to_end(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "teach_word.py"
    sizes = ["--steps", "2", "--pictures", "4", "--samples", "1", "--batch", "4", "--quick-suite", "no"]
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path / "out"), *sizes], check=True)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["after"]["new_word"]["pictures"] == 8
