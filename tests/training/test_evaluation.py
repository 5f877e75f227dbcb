"""Held-out losses and scores while a stage trains, in whole copies and under shards, and what they leave untouched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_cases import STAGES, tiny_folder, tiny_run
from run_cases import lines, same, weights
from starflow2.core.images import to_pil
from starflow2.errors import ConfigError
from starflow2.models.checkpoint import load_components
from starflow2.models.components import Components
from starflow2.pipeline import StarFlow2
from starflow2.training.config import CorpusConfig, OptimConfig, RunConfig, ShardConfig, StageConfig
from starflow2.training.datasets import to_images
from starflow2.training.evaluation import held_out_batches
from starflow2.training.loop import fit
from starflow2.training.parallel import Distributed
from starflow2.training.tasks import TASKS
from starflow2.world.captions import caption_task

PLAIN = OptimConfig(lr=1e-3, matrix_lr=0.0, warmup_steps=1)


@pytest.fixture
def _alone() -> Iterator[None]:
    """Takes down the process group of one that shards without torchrun begin."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_of(**changes: Any) -> RunConfig:
    run = tiny_run(4, 4)
    return replace(run, stages=tuple(replace(s, optim=PLAIN, **changes) for s in run.stages))


def held_out(folder: Path, stage: str = "joint") -> dict[int, float]:
    return {int(line["step"]): line["held_out_loss"] for line in lines(folder, stage) if "held_out_loss" in line}


@pytest.mark.usefixtures("_alone")
def test_under_shards_held_out_losses_and_drawings_are_those_of_whole_copies_and_training_goes_on_as_without(tmp_path):
    drawn: dict[str, list[torch.Tensor]] = {"none": [], "fsdp": []}

    def draw(components: Components, to: list[torch.Tensor]) -> dict[str, float]:
        to.append(StarFlow2(components).draw(["two red hearts"], [0]))
        return {"std": to[-1].std().item()}

    for mode, pictures in drawn.items():
        folder = tiny_folder(tmp_path / mode, STAGES[:5])
        run = run_of(shard=ShardConfig(mode=mode), evaluate_every=2, held_out_batches=2)  # type: ignore[arg-type]
        fit(run, "joint", folder, evaluate=lambda parts, step, to=pictures: draw(parts, to))
    losses, sharded = held_out(tmp_path / "none"), held_out(tmp_path / "fsdp")
    assert list(losses) == [0, 2, 4] and list(sharded.values()) == pytest.approx(list(losses.values()), abs=1e-5)
    assert losses[2] != losses[4]
    pairs = zip(drawn["none"], drawn["fsdp"], strict=True)
    assert all(torch.allclose(one, other, atol=1e-3) for one, other in pairs) and len(drawn["none"]) == 2
    unwatched = tiny_folder(tmp_path / "unwatched", STAGES[:5])
    fit(run_of(shard=ShardConfig(mode="fsdp")), "joint", unwatched)
    assert weights(unwatched) == weights(tmp_path / "fsdp")


def test_a_held_out_loss_is_that_of_the_averaged_weights_on_batches_that_no_step_reads(folder):
    run = run_of(held_out_batches=3)
    fit(run, "t2i", folder)
    loss = held_out(folder, "t2i")[4]
    components = load_components(folder / "model")
    components.finished_stages = STAGES[:4]
    task = TASKS["t2i"](components, run.stage("t2i"), run.seed)
    batches = held_out_batches(task, Distributed())
    seen = task.make_batch(range(16))[0]
    assert len(batches) == 3 and not any(torch.equal(a, b) for images, _ in batches for a in images for b in seen)
    again = held_out_batches(task, Distributed())
    assert all(torch.equal(one[0], other[0]) and one[1] == other[1] for one, other in zip(batches, again, strict=True))
    nats = []
    for i, data in enumerate(batches):
        import zlib

        generator = torch.Generator().manual_seed(zlib.crc32(f"{run.seed}/t2i/held out/{i}".encode()))
        nats.append(task.loss(data, generator)[0].item())
    assert loss == pytest.approx(sum(nats) / 3, abs=1e-5)


def test_a_mixture_has_held_out_data_of_its_own(folder, tmp_path):
    pytest.importorskip("torchdata", reason="real corpora need the extra train")
    files = []
    for name, seed in (("trained", 5), ("kept", 6)):
        for i in range(8):
            drawing = caption_task(seed, i)
            (tmp_path / name).mkdir(exist_ok=True)
            to_pil(to_images([drawing.scene])[0]).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(drawing.prompt)
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps([{"corpus": "captions", "url": str(tmp_path / name), "weight": 1.0}]))
    corpus = CorpusConfig(mixture=str(files[0]), held_out=str(files[1]), rows=2, width=200)
    fit(run_of(corpus=corpus, held_out_batches=1), "t2i", folder)
    assert list(held_out(folder, "t2i")) == [0, 4]


def test_held_out_data_of_a_mixture_must_be_named():
    corpus = CorpusConfig(mixture="mix.json")
    with pytest.raises(ConfigError, match="expected both or neither"):
        StageConfig(name="t2i", steps=1, batch=1, corpus=corpus, held_out_batches=2)
    with pytest.raises(ConfigError, match="expected both or neither"):
        StageConfig(name="t2i", steps=1, batch=1, corpus=replace(corpus, held_out="other.json"))


def test_evaluations_change_no_weight_of_a_run_in_copies(folder, ready, tmp_path):
    fit(run_of(evaluate_every=1, held_out_batches=1), "t2i", folder)
    other = tiny_folder(tmp_path / "other")
    fit(run_of(), "t2i", other)
    one, two = (load_components(f / "model").flow.state_dict() for f in (folder, other))
    assert same(one, two)
