"""Stages on a mixture of real corpora: every task takes it, a resumed run repeats the uninterrupted one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_cases import STAGES, tiny_components, tiny_run
from starflow2.core.images import read_picture, to_pil
from starflow2.errors import DataError, TrainingError
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.config import SelfCheckConfig
from starflow2.models.context import drawing_context
from starflow2.models.sequence import Image, Text, pack
from starflow2.training.config import CorpusConfig, StageConfig
from starflow2.training.counts import ReadCounts
from starflow2.training.datasets import to_images
from starflow2.training.loader import Feed, feed_for
from starflow2.training.loop import fit
from starflow2.training.metrics import StepReport
from starflow2.training.parallel import Distributed
from starflow2.training.tasks import TOWER_IMAGES, AdapterTask, T2iTask
from starflow2.world.captions import caption_task

pytest.importorskip("torchdata", reason="real corpora need the extra train")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty captioned pictures in a folder, one of them broken, and a file that names it."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        drawing = caption_task(5, i)
        to_pil(to_images([drawing.scene])[0]).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"{drawing.prompt}, zebra {i}")
    (folder / "07.png").write_bytes(b"no picture")
    file = folder.with_name("mixture.json")
    file.write_text(json.dumps([{"corpus": "captions", "url": str(folder), "weight": 1.0}]))
    return file


def on(mixture: Path, stage: StageConfig, steps: int) -> StageConfig:
    corpus = CorpusConfig(mixture=str(mixture), rows=2, width=200, broken=str(mixture.with_name("broken.jsonl")))
    return replace(stage, steps=steps, corpus=corpus, distill=0.0)


def trained(folder: Path, stage: str, mixture: Path, steps: int, dies_at: int = -1) -> list[float]:
    """The losses in the metrics file of a run over all stages before `stage`; it may be killed at a step."""

    def report(line: StepReport) -> None:
        if line.step == dies_at:
            raise KeyboardInterrupt

    if not (folder / "model").is_dir():
        save_components(tiny_components(STAGES[: STAGES.index(stage)]), folder / "model")
    run = tiny_run(steps=steps)
    run = replace(run, stages=tuple(on(mixture, s, steps) if s.name == stage else s for s in run.stages))
    fit(run, stage, folder, report=report)
    lines = (folder / f"metrics-{stage}.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("stage", ["t2i", "joint"])
def test_a_resumed_run_on_a_mixture_repeats_the_uninterrupted_one(tmp_path, mixture, stage):
    whole = trained(tmp_path / "whole", stage, mixture, 4)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stage, mixture, 4, dies_at=3)
    assert trained(tmp_path / "parts", stage, mixture, 4) == whole and len(set(whole)) == 4


@pytest.mark.parametrize("stage", ["features", "fae", "vlm", "adapter"])
def test_every_other_stage_takes_a_mixture_too(tmp_path, mixture, stage):
    folder = tmp_path / "run"
    if stage in ("vlm", "adapter"):  # which learn answers
        (source,) = json.loads(mixture.read_text())
        mixture = tmp_path / "mixture.json"
        mixture.write_text(json.dumps([{**source, "task": "describe"}]))
    save_components(tiny_components(STAGES[: STAGES.index(stage)]), folder / "model")
    assert all(loss > 0 for loss in trained(folder, stage, mixture, 2))


def test_a_model_that_saw_real_text_refuses_no_word_and_broken_pictures_are_listed(tmp_path, mixture):
    trained(tmp_path, "t2i", mixture, 4)
    assert load_components(tmp_path / "model").vocabulary == frozenset()
    listed = [json.loads(line) for line in mixture.with_name("broken.jsonl").read_text().splitlines()]
    assert {line["key"].split("/")[-1].split(".")[0] for line in listed} == {"07"}


def test_a_model_of_a_mixture_does_not_say_that_it_checks_its_own_images(tmp_path, mixture):
    components = tiny_components(STAGES[:4])
    asked = SelfCheckConfig(shows="does it show {}?", done="was {} done?")
    components.cfg = replace(components.cfg, self_check=asked)
    save_components(components, tmp_path / "model")
    trained(tmp_path, "t2i", mixture, 2)
    assert load_components(tmp_path / "model").cfg.self_check is None


class Pretended(Distributed):
    """One of several processes that all read as much; there are no others."""

    def sum(self, values: Sequence[int]) -> list[int]:
        return [self.world * value for value in values]

    def all_gather(self, value: object) -> list[object]:
        return [value] * self.world


def feed_of(mixture: Path, group: Distributed, saved: dict[str, str] | None = None, **changes: Any) -> Feed:
    stage = on(mixture, StageConfig(name="t2i", steps=50, batch=4), 50)
    stage = replace(stage, corpus=replace(stage.corpus, **changes))
    return feed_for(T2iTask(tiny_components(STAGES[:3]), stage, 0), stage, group, step=0, saved=saved)


@pytest.mark.parametrize(
    ("change", "named"), [({}, "processes"), ({"rows": 1}, "packing"), ({"more": True}, "sources")]
)
def test_another_number_of_processes_another_packing_or_mixture_goes_on_and_is_said_in_one_line(
    mixture, tmp_path, caplog, change, named
):
    feed, other, change = feed_of(mixture, Distributed()), mixture, dict(change)
    with feed as batches:
        next(batches)
        saved = feed.position()
    if change.pop("more", False):
        other = tmp_path / "heavier.json"
        other.write_text(mixture.read_text().replace("1.0", "2.0"))
    group = Pretended(0, 3) if named == "processes" else Distributed()
    feed = feed_of(other, group, saved, **change)
    with feed as batches:
        assert len(next(batches)[0][0]) > 0
    assert f"other {named}:" in caplog.text and caplog.text.count("\n") == 1
    before = json.loads(saved["read"])["documents"]
    assert feed.read.documents > before > 0, "counts go on from the checkpoint's"


def test_the_same_mixture_in_another_file_is_the_same_mixture(mixture, tmp_path, caplog):
    feed = feed_of(mixture, Distributed())
    with feed as batches:
        next(batches)
        saved = feed.position()
        after = next(batches)
    moved = tmp_path / "moved.json"
    moved.write_text(mixture.read_text())
    with feed_of(moved, Distributed(), saved) as batches:
        again = next(batches)
    assert not caplog.text
    assert [rows for _, rows in again] == [rows for _, rows in after]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("unit", ["documents", "positions"])
def test_the_batch_is_what_the_stage_says_whatever_the_number_of_processes(mixture, world, unit):
    """The mean over steps is exact: what one has too many of, the next ones have too few of."""
    changes = {"batch_positions": 200 * 2 * world + 100} if unit == "positions" else {}
    wanted, feed = changes.get("batch_positions", 4), feed_of(mixture, Pretended(0, world), **changes)
    steps, largest = 8, 0
    with feed as batches:
        for _ in range(steps):
            before = getattr(feed.read, unit)
            microbatches = next(batches)
            largest = max(largest, (getattr(feed.read, unit) - before) / len(microbatches))
    assert abs(getattr(feed.read, unit) - steps * wanted) <= largest / 2


def test_what_a_feed_says_it_read_is_what_an_independent_count_finds(mixture):
    components, feed = tiny_components(STAGES[:3]), feed_of(mixture, Distributed())
    images, rows = 0, list[list[int]]()
    with feed as batches:
        for _ in range(5):
            for pictures, words in next(batches):
                images, rows = images + len(pictures), rows + words
    layout = components.layout
    alone = [pack([[Text(tuple(row[:-1])), Image(is_target=True), Text((3,))]], layout) for row in rows]
    slots = sum(int((batch.document >= 0).sum()) for batch in alone)
    assert feed.read == ReadCounts(len(rows), images, slots - 64 * images, 64 * images)


def test_a_fresh_flow_is_whitened_by_the_captions_of_the_mixture(mixture):
    components = tiny_components(STAGES[:3])
    task = T2iTask(components, on(mixture, StageConfig(name="t2i", steps=2, batch=4, whitening_captions=64), 2), 0)
    rows = task.whitening_prompts()
    captions = {f"{caption_task(5, i).prompt}, zebra {i}" for i in range(20) if i != 7}
    assert len(rows) == 64 and {components.tokenizer.decode(row) for row in rows} == captions
    task.initialise()
    entered = components.flow.deep.context_in(text_states(components, rows))
    assert entered.mean(0).abs().max() < 1e-3


def test_a_fresh_adapter_takes_the_scale_of_the_towers_embeddings_of_the_mixtures_own_images(mixture):
    components = tiny_components(STAGES[:4])
    stage = replace(on(mixture, tiny_run(1).stage("adapter"), 2), caption_drop=0.0)
    task = AdapterTask(components, stage, 0)
    images = task.first_images(TOWER_IMAGES)
    folder = mixture.with_name(json.loads(mixture.read_text())[0]["url"].split("/")[-1])
    own = [read_picture(folder / f"{i:02}.png", 64) for i in range(20) if i != 7]
    assert all(any(torch.equal(image, one) for one in own) for image in images)
    task.initialise()
    with torch.no_grad():
        expected = components.vlm.see(images).square().mean().sqrt().item()
    assert components.joints.adapter.gain.tolist() == pytest.approx([expected] * 40)


def test_a_mixture_without_images_is_refused_where_they_are_measured(tmp_path):
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    file = tmp_path / "mixture.json"
    file.write_text(json.dumps([{"corpus": "dialogue", "url": str(tmp_path / "x.jsonl"), "weight": 1}]))
    task = AdapterTask(tiny_components(STAGES[:4]), on(file, tiny_run(1).stage("adapter"), 2), 0)
    with pytest.raises(DataError, match=r"stage adapter measures 4 images .* first 2 .* hold 0; give it sources with"):
        task.first_images(4, limit=2)
    with pytest.raises(TrainingError, match="the stage reads a mixture"):
        task.make_batch(range(2))


def text_states(components: Components, rows: list[list[int]]) -> torch.Tensor:
    """The language model's states of all tokens of these prompts."""
    context = drawing_context(components, rows)
    return context.states[context.attend]


def test_captions_come_out_of_packed_rows_as_they_went_in_and_pictures_before_pictures_are_refused():
    components = tiny_components(STAGES[:3])
    task, layout = T2iTask(components, StageConfig(name="t2i", steps=1, batch=2), 0), components.layout
    words = [(20, 21), (30, 31, 32)]
    batch = pack([[Text(w), Image(is_target=True), Text((3,))] for w in words], layout, 200)
    _, rows = task.from_documents(torch.zeros(2, 3, 64, 64), batch)
    assert rows == [[*w, layout.begin] for w in words] and len(batch.ids) == 1
    edit = pack([[Image(), Text((20,)), Image(is_target=True)]], layout)
    with pytest.raises(DataError, match="stage joint"):
        task.from_documents(torch.zeros(2, 3, 64, 64), edit)
