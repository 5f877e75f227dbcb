"""Losses by source of a mixture: what every source's own images and tokens cost, over all processes, and in the log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_cases import STAGES, tiny_components, tiny_run
from run_cases import lines
from starflow2.core.images import to_pil
from starflow2.models.checkpoint import save_components
from starflow2.models.sequence import Batch, Document, Image, Text, pack
from starflow2.training.config import CorpusConfig, StageConfig
from starflow2.training.datasets import to_images
from starflow2.training.loop import fit
from starflow2.training.parallel import Distributed
from starflow2.training.source_losses import SourceLosses
from starflow2.training.tasks import AdapterTask, JointTask, T2iTask
from starflow2.world.captions import caption_task

pytest.importorskip("torchdata", reason="real corpora need the extra train")

DRAWN: Document = [Text((1, 20, 21, 2)), Image(is_target=True), Text((3,), is_target=True)]
TOLD: Document = [Image(), Text((1, 20, 2)), Text((60, 61, 3), is_target=True)]
SOURCES = (0, 1, 0, 1, 1)  # of five documents


class Two(Distributed):
    """A process of two; the other one has seen what it is given."""

    def __init__(self, other: object) -> None:
        super().__init__(0, 2)
        self.other = other

    def all_gather(self, value: object) -> list[object]:
        return [value, self.other]


def test_means_are_over_the_values_of_all_processes_and_start_anew_after_each_line():
    losses = SourceLosses(("a", "b", "c"))
    losses.add("text", torch.tensor([0, 0, 1]), torch.tensor([1.0, 2.0, 5.0]))
    losses.add("text", torch.tensor([0]), torch.tensor([6.0]))
    losses.add("flow", torch.tensor([1, 1]), torch.tensor([4.0, 100.0]), torch.tensor([True, False]))
    with losses.paused():
        losses.add("text", torch.tensor([0]), torch.tensor([1e6]))
    other = {"text": [[7.0, 0.0, 8.0], [1.0, 0.0, 2.0]]}
    assert losses.take(Two(other)) == {"flow/b": 4.0, "text/a": 4.0, "text/b": 5.0, "text/c": 4.0}
    assert losses.take(Distributed()) == {}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of captioned images, the second one turned round."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(6):
        drawing = caption_task(5, i)
        to_pil(to_images([drawing.scene])[0]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(drawing.prompt)
    source = {"corpus": "captions", "url": str(folder), "weight": 1.0}
    file = folder.with_name("mixture.json")
    file.write_text(json.dumps([source, {**source, "task": "describe"}]))
    return file


def stage(name: str, mixture: Path) -> StageConfig:
    corpus = CorpusConfig(mixture=str(mixture), rows=2, width=200)
    return replace(tiny_run(2, 2).stage(name), corpus=corpus, distill=0.0, hidden_latents_share=0.0, text_mean="token")


def batch_of(*documents: Document) -> Batch:
    return replace(pack(documents, tiny_components(STAGES).layout, 200), sources=SOURCES[: len(documents)])


def test_in_stage_3_every_source_gets_the_nats_of_its_own_targets_and_tokens(mixture):
    components, batch = tiny_components(STAGES), batch_of(DRAWN, TOLD, TOLD, DRAWN, DRAWN)
    task = JointTask(components, stage("joint", mixture), 0)
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    _, metrics = task.loss((images, batch), torch.Generator().manual_seed(2))
    found = task.by_source.take(Distributed())
    assert set(found) == {"flow/captions-1", "flow/captions-2", "text/captions-1", "text/captions-2"}
    flow = (found["flow/captions-1"] + 2 * found["flow/captions-2"]) / 3
    text = (5 * found["text/captions-1"] + 7 * found["text/captions-2"]) / 12
    assert (flow, text) == (
        pytest.approx(metrics["flow"].item(), abs=1e-5),
        pytest.approx(metrics["text"].item(), 1e-5),
    )


def test_answers_of_stage_2_are_told_apart_as_if_each_source_were_read_alone(mixture):
    components = tiny_components(STAGES)
    other: Document = [Image(), Text((1, 30, 2)), Text((70, 71, 72, 3), is_target=True)]
    task = AdapterTask(components, stage("adapter", mixture), 0)
    embeddings = torch.randn(2, 64, components.cfg.vlm.width, generator=torch.Generator().manual_seed(3))
    task.reply_loss(embeddings, batch_of(TOLD, other))
    found = task.by_source.take(Distributed())
    assert len(found) == 2
    for i, document in enumerate((TOLD, other)):
        alone = replace(batch_of(document), sources=(i,))
        expected = task.reply_loss(embeddings[i : i + 1], alone).item()
        assert found[f"text/captions-{i + 1}"] == pytest.approx(expected, abs=1e-5)


def test_drawings_of_stage_1_are_told_apart_by_the_source_of_their_prompts(mixture):
    task = T2iTask(tiny_components(STAGES[:3]), stage("t2i", mixture), 0)
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    data = task.from_documents(images, batch_of(*[DRAWN] * 5))
    loss, _ = task.loss(data, torch.Generator().manual_seed(2))
    found = task.by_source.take(Distributed())
    assert (2 * found["flow/captions-1"] + 3 * found["flow/captions-2"]) / 5 == pytest.approx(loss.item(), abs=1e-5)
    assert found["flow/captions-1"] != found["flow/captions-2"]


def test_a_run_logs_them_with_every_line_and_not_those_of_held_out_data(mixture, tmp_path):
    save_components(tiny_components(STAGES[:5]), tmp_path / "model")
    plain = stage("joint", mixture)
    corpus = replace(plain.corpus, held_out=str(mixture))
    run = tiny_run(2, 2)
    wanted = replace(plain, corpus=corpus, held_out_batches=1, batch=8)
    run = replace(run, stages=tuple(wanted if s.name == "joint" else s for s in run.stages))
    fit(run, "joint", tmp_path)
    logged = [line for line in lines(tmp_path, "joint") if "loss" in line]
    assert len(logged) == 2
    for line in logged:
        parts = [line[name] for name in line if name.startswith("text/captions")]
        assert len(parts) == 2 and min(parts) - 1e-6 <= line["text"] <= max(parts) + 1e-6
        assert line["flow/captions-1"] == pytest.approx(line["flow"], abs=1e-4) and "flow/captions-2" not in line
