"""A step of training: what it changes, what it reports, and that bad ones change nothing."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model_cases import (
    STAGES,
    tiny_components,
    tiny_folder,
)
from run_cases import EVERY, RUN, STEPS, TRAINED, lines, modules_of, same, with_optim, with_stage
from starflow2.errors import ConfigError, TrainingError
from starflow2.flow import Flow
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.pipeline import StarFlow2
from starflow2.training.config import OptimConfig
from starflow2.training.counts import ReadCounts
from starflow2.training.datasets import Scenes
from starflow2.training.loop import fit
from starflow2.training.metrics import MetricsWriter, SpeedMeter, StepReport
from starflow2.training.start import start_stage
from starflow2.training.task import WHOLE_BATCH, LossAndMetrics
from starflow2.training.tasks import TASKS, FaeTask, T2iTask, task_maker
from starflow2.world.captions import caption_task


def snapshots(saved: list[dict[str, torch.Tensor]], part: str) -> Callable[[Components, int], dict[str, float]]:
    """An `evaluate` that copies the state of a part at every checkpoint."""

    def copy(components: Components, step: int) -> dict[str, float]:
        saved.append({k: v.clone() for k, v in getattr(components, part).state_dict().items()})
        return {"copied": float(step)}

    return copy


def bad_loss(loss: torch.Tensor, flow: Flow) -> torch.Tensor:
    return loss * torch.inf


def bad_gradient(loss: torch.Tensor, flow: Flow) -> torch.Tensor:
    weight = flow.deep.head.weight
    return loss + torch.sqrt((weight - weight).sum())  # 0, with an infinite slope


class Spoilt(T2iTask):
    """Stage t2i with losses that go wrong in some steps, counted from 1."""

    steps: tuple[int, ...] = (2,)
    spoil: Callable[[torch.Tensor, Flow], torch.Tensor] = staticmethod(bad_loss)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls = 0

    def loss(self, *args: Any) -> LossAndMetrics:
        self.calls += 1
        loss, metrics = super().loss(*args)
        return (self.spoil(loss, self.components.flow) if self.calls in self.steps else loss), metrics


@pytest.mark.parametrize("spoil", [bad_loss, bad_gradient])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_nothing_and_is_counted(folder, monkeypatch, spoil, ema):
    monkeypatch.setitem(TASKS, "t2i", type("", (Spoilt,), {"spoil": staticmethod(spoil)}))
    saved: list[dict[str, torch.Tensor]] = []
    run = with_optim(run=with_stage(steps=3, save_every=1, log_every=3), ema=ema)
    fit(run, "t2i", folder, evaluate=snapshots(saved, "flow"))
    assert same(saved[0], saved[1]) and not same(saved[1], saved[2])
    assert all(bool(torch.isfinite(v).all()) for v in saved[2].values())
    (last,) = (line for line in lines(folder) if "loss" in line)
    assert last["step"] == 3 and last["skipped"] == 1, "counted although no line was written at that step"


@dataclass(frozen=True)
class SpoiltScenes(Scenes):
    """Training scenes, but for one batch, which is not finite."""

    def __call__(self, indices: range) -> torch.Tensor:
        images = super().__call__(indices)
        return images * torch.inf if indices.start == 4 else images


def test_an_image_that_is_not_finite_does_not_spoil_the_running_statistics_of_the_fae(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path, ("features",))
    monkeypatch.setitem(TASKS, "fae", partial(FaeTask, dataset=SpoiltScenes(0)))
    saved: list[dict[str, torch.Tensor]] = []
    run = with_optim("fae", with_stage("fae", steps=3, save_every=1), ema=0.0)
    fit(run, "fae", folder, evaluate=snapshots(saved, "fae"))
    assert "standardize.running_mean" in saved[0]
    assert same(saved[0], saved[1]) and not same(saved[1], saved[2])
    assert [line.get("skipped") for line in lines(folder, "fae") if "loss" in line] == [None, 1, 1]


def test_a_run_whose_loss_stays_not_finite_ends_and_says_where_to_go_back_to(folder, monkeypatch):
    monkeypatch.setitem(TASKS, "t2i", type("", (Spoilt,), {"steps": (2, 4, 5, 6)}))
    with pytest.raises(TrainingError, match=r"last 3 steps, up to step 6; .*--resume weights:STEP --optim\.lr"):
        fit(with_stage(steps=9, max_skipped=3, save_every=2), "t2i", folder)
    assert lines(folder)[-1]["step"] == 6 and (folder / "state-t2i.safetensors").is_file()


def test_the_count_of_skipped_steps_survives_a_resume(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(TASKS, "t2i", type("", (Spoilt,), {"steps": (1, 2)}))
        fit(with_stage(steps=2), "t2i", folder)
    fit(with_stage(steps=3), "t2i", folder)
    assert lines(folder)[-1]["skipped"] == 2


def test_the_averaged_weights_are_what_is_saved_and_shown_to_evaluate(folder):
    """Copies of the same tensors, so all bits are equal."""
    copies: list[dict[str, torch.Tensor]] = []
    fit(with_optim(ema=0.5), "t2i", folder, evaluate=snapshots(copies, "flow"))
    state = load_file(folder / "state-t2i.safetensors")
    saved = load_file(folder / "model" / "model.safetensors")
    flow = {k: v for k, v in saved.items() if k.startswith("flow.")}
    assert flow and all(torch.equal(v, state[f"ema/{k}"]) for k, v in flow.items())
    assert any(not torch.equal(v, state[f"weights/{k}"]) for k, v in flow.items())
    assert same(copies[-1], {k.removeprefix("flow."): v for k, v in flow.items()})


def test_the_average_is_the_exponential_one_of_the_weights_after_each_step(tmp_path):
    plain: list[dict[str, torch.Tensor]] = []
    mean: list[dict[str, torch.Tensor]] = []
    for name, ema, copies in (("plain", 0.0, plain), ("mean", 0.15, mean)):
        tiny_folder(tmp_path / name, STAGES[:4])  # a flow that is not fresh starts from the weights that it has
        run = with_optim(run=with_stage(steps=4, save_every=1), ema=ema)
        fit(run, "t2i", tmp_path / name, evaluate=snapshots(copies, "flow"))
    start = tiny_components().flow.state_dict()
    average = {k: v.double() for k, v in start.items()}
    for step in range(4):
        decay = min(0.15, (1 + step) / (10 + step))  # shorter at the start: 0.1, then 0.15
        average = {k: decay * v + (1 - decay) * plain[step][k].double() for k, v in average.items()}
        assert max((average[k] - mean[step][k]).abs().max().item() for k in average) <= 1e-6


def test_the_rate_warms_up_stays_and_falls_to_zero_in_a_line():
    optim = OptimConfig(warmup_steps=10, decay_share=0.4)
    rates = [optim.rate(step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[9:61] == [1.0] * 52
    assert rates[60:] == pytest.approx([(100 - i) / 40 for i in range(60, 101)])
    assert rates[100] == 0
    assert OptimConfig(warmup_steps=0).rate(0, 100) == 1


def test_a_cosine_falls_from_the_peak_to_the_floor():
    optim = OptimConfig(lr=1e-3, min_lr=1e-5, decay="cosine", decay_share=1.0, warmup_steps=0)
    rates = [optim.rate(step, 100) for step in range(101)]
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * i / 100)) / 2 for i in range(101)]
    assert [1e-3 * rate for rate in rates] == pytest.approx(cosine, rel=1e-9)
    with pytest.raises(ConfigError, match=r"min_lr is 0\.1; expected 0 to optim\.lr"):
        OptimConfig(min_lr=0.1)


def test_a_run_follows_the_schedule(whole):
    optim = RUN.stage("t2i").optim
    assert [line["rate"] for line in lines(whole)] == [optim.rate(step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_changes_what_it_trains_and_leaves_the_rest_bit_equal(tmp_path, stage):
    folder = tiny_folder(tmp_path, STAGES[: STAGES.index(stage)])
    before = load_components(folder / "model")
    modes: list[set[str]] = []

    def look(components: Components, step: int) -> dict[str, float]:
        modes.append({name for name, part in modules_of(components).items() if any(m.training for m in part.modules())})
        return {}

    fit(with_stage(stage, steps=2), stage, folder, evaluate=look)
    after = load_components(folder / "model")
    pairs = zip(modules_of(before).items(), modules_of(after).values(), strict=True)
    changed = {name for (name, old), new in pairs if not same(old.state_dict(), new.state_dict())}
    assert changed == TRAINED[stage]
    assert modes == [set()], "frozen parts, and averaged ones under evaluation, are in eval mode"
    assert after.finished_stages == STAGES[: STAGES.index(stage) + 1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_is_a_function_of_batch_and_generator_alone(stage):
    components = tiny_components(STAGES)
    task = TASKS[stage](components, RUN.stage(stage), 0)
    data = task.make_batch(range(4))
    losses = []
    for seed in (1, 1, 2):
        torch.randn(3)
        losses.append(task.loss(data, torch.Generator().manual_seed(seed))[0].item())
    assert losses[0] == losses[1]
    assert (losses[0] == losses[2]) == (stage == "vlm"), "the language stage draws no noise"


def test_the_frozen_language_model_and_encoder_give_the_same_bits_every_time_in_a_t2i_run(folder):
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(components: Components, step: int) -> dict[str, float]:
        task = TASKS["t2i"](components, RUN.stage("t2i"), 0)
        images, rows = task.make_batch(range(4))
        outputs.append((components.codec.encode(images), drawing_context(components, rows).states))
        return {}

    fit(RUN, "t2i", folder, evaluate=look)
    assert len(outputs) == STEPS // EVERY
    assert all(torch.equal(a, b) for pair in outputs[1:] for a, b in zip(outputs[0], pair, strict=True))


def test_evaluate_may_draw_pictures_with_the_stage_that_is_being_trained(folder):
    def look(components: Components, step: int) -> dict[str, float]:
        return {"std": StarFlow2(components).draw(["two red hearts"], [0]).std().item()}

    fit(with_stage(steps=2), "t2i", folder, evaluate=look)
    assert lines(folder)[-1]["std"] > 0


def test_a_fresh_flow_starts_from_whitened_text_states_and_one_that_was_trained_keeps_its_own(folder):
    still = with_optim(run=with_stage(steps=1), lr=0.0, matrix_lr=0.0)
    fit(still, "t2i", folder)
    components = load_components(folder / "model")
    tokenizer, enter = components.tokenizer, components.flow.deep.context_in
    context = drawing_context(components, [tokenizer.drawing_prompt(caption_task(0, i).prompt) for i in range(64)])
    entered = enter(context.states[context.attend])
    assert entered.mean(0).abs().max() < 1e-3
    assert entered.var(0).max() < 1.01 and entered.var(0).median() > 0.9
    with torch.no_grad():
        enter.weight.mul_(2)
    save_components(components, folder / "model")
    fit(still, "t2i", folder, resume="none")
    assert torch.equal(load_components(folder / "model").flow.deep.context_in.weight, enter.weight)


def test_bfloat16_training_stays_close_to_float32_and_keeps_float32_weights(folder, whole):
    fit(replace(RUN, precision="bfloat16"), "t2i", folder)
    half, full = lines(folder), lines(whole)
    assert [line["nats_per_dim"] for line in half] == pytest.approx([x["nats_per_dim"] for x in full], abs=0.05)
    assert half[0]["loss"] != full[0]["loss"]
    assert {t.dtype for t in load_file(folder / "model" / "model.safetensors").values() if t.is_floating_point()} == {
        torch.float32
    }


def test_counts_and_speeds_are_those_of_the_batches_and_the_time_on_the_wall(folder, monkeypatch):
    """Counted and timed here, from the first batch that is made to the last step; listeners get what the file gets."""
    seen, times, listened = Counter[str](), list[float](), list[tuple[int, dict[str, float]]]()

    class Timed(T2iTask):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.make_captions, self.make_batch = self.make_batch, self.make_timed

        def make_timed(self, indices: range) -> Any:
            times.append(time.time())
            return self.make_captions(indices)

        def loss(self, data: Any, *args: Any) -> LossAndMetrics:
            seen.update(images=len(data[0]), words=sum(map(len, data[1])))
            time.sleep(0.02)
            return super().loss(data, *args)

    monkeypatch.setitem(TASKS, "t2i", Timed)
    fit(with_stage(steps=30, save_every=30), "t2i", folder, log=lambda step, line: listened.append((step, line)))
    last = lines(folder)[-1]
    assert seen["images"] == last["images"] == last["documents"] == 120 and last["latents"] == 120 * 64
    assert seen["words"] == last["text_tokens"]
    # threads on a busy machine start late; the exact figure is in the next test
    assert last["images_per_s"] == pytest.approx(120 / (last["time"] - times[0]), rel=0.2)
    assert last["latents_per_s"] == pytest.approx(64 * last["images_per_s"], rel=1e-9)
    assert {"lr", "matrix_lr", "memory_gb", "data_wait_s", "positions_per_s"} <= last.keys()
    assert listened[-1] == (30, {f"t2i/{k}": v for k, v in last.items() if k not in ("step", "time")})


def test_speeds_count_from_the_start_of_the_run_by_the_clock(folder):
    now = [100.0]
    before, after = ReadCounts(40, 40, 800, 2560), ReadCounts(100, 130, 2300, 8320)
    speed = SpeedMeter(RUN.stage("t2i"), 2, before, clock=lambda: now[0])
    now[0] = 130.0
    assert speed.rates(after) == {
        "documents_per_s": 2.0, "images_per_s": 3.0, "text_tokens_per_s": 50.0, "latents_per_s": 192.0,
    }  # fmt: skip
    writer = MetricsWriter(folder, speed, flops=lambda read: 1e9 * read.documents, peak=20e9)
    report = writer.write_step(5, {"loss": 1.0}, after)
    assert (report.images_per_s, report.latents_per_s, report.eta_s) == (3.0, 192.0, 10.0)
    assert lines(folder)[-1]["mfu"] == pytest.approx(60e9 / 30 / 20e9)
    assert lines(folder)[-1]["positions_per_s"] == 242.0


def test_reports_count_steps_and_say_how_long_it_will_take(folder):
    reports: list[StepReport] = []
    fit(with_stage(steps=5, log_every=2), "t2i", folder, report=reports.append)
    assert [line.step for line in reports] == [2, 4, 5] and {line.steps for line in reports} == {5}
    assert reports[-1].eta_s == 0 and all(line.images_per_s > 0 for line in reports)
    assert {"loss", "nats_per_dim", "grad_norm", "rate"} <= reports[0].metrics.keys()


def test_words_are_learnt_in_the_stage_that_trains_the_language_model_and_in_no_other(tmp_path):
    components = tiny_components(STAGES[:4])
    components.vocabulary = frozenset({"circle"})  # as of a time when it knew captions only
    save_components(components, tmp_path / "model")
    assert {"circle", "turn", "first"} <= start_stage(RUN, "vlm", tmp_path, "cpu").vocabulary
    for stage in ("t2i", "adapter"):
        assert start_stage(RUN, stage, tmp_path, "cpu").vocabulary == {"circle"}


def test_a_resumed_stage_measures_no_starting_values_again(folder, monkeypatch):
    calls: list[int] = []

    class Counted(T2iTask):
        def initialise(self) -> None:
            calls.append(1)
            super().initialise()

    monkeypatch.setitem(TASKS, "t2i", Counted)
    fit(with_stage(steps=2), "t2i", folder)
    assert calls == [1]
    shutil.rmtree(folder / "model")
    tiny_folder(folder)  # as if the run had been killed at its checkpoint
    fit(with_stage(steps=3), "t2i", folder)
    assert calls == [1]
    fit(with_stage(steps=3), "t2i", folder, resume="none")
    assert calls == [1], "a stage that was finished before starts from the weights that it has"


class Doubled(T2iTask):
    """Twice the loss of stage t2i."""

    def loss(self, data, generator, weights=WHOLE_BATCH) -> LossAndMetrics:
        loss, metrics = super().loss(data, generator, weights)
        return 2 * loss, metrics


def test_a_stage_takes_a_task_of_the_users_own_in_place_of_its_own(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    fit(with_stage(steps=1), "t2i", folder)
    fit(with_stage(steps=1, task=f"{__name__}:Doubled"), "t2i", other)
    assert lines(other)[0]["loss"] == pytest.approx(2 * lines(folder)[0]["loss"], rel=1e-6)
    assert task_maker(RUN.stage("t2i")) is T2iTask
    for name, message in (("nowhere:Task", "cannot use 'nowhere:Task'"), ("math:tau", "is 'math:tau', a float; exp")):
        with pytest.raises(ConfigError, match=message):
            task_maker(replace(RUN.stage("t2i"), task=name))
