"""Training: a killed run repeats itself bit for bit, a stage changes only what it trains, bad steps change nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers import wake
from model_cases import (
    STAGES,
    mix_of,
    tiny_components,
    tiny_folder,
    tiny_model,
    tiny_run,
    tiny_tokenizer,
)
from starflow2.data.dialogue import Dialogue, Turn
from starflow2.errors import CheckpointError, ConfigError, OutputError, TrainingError
from starflow2.flow import Flow
from starflow2.models import checkpoint
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.models.sequence import IGNORE, Batch, length_groups
from starflow2.pipeline import StarFlow2
from starflow2.training import datasets, task
from starflow2.training import loop as train
from starflow2.training import tasks as stages
from starflow2.training.config import CaptionConfig, OptimConfig, RunConfig, ShardConfig, WarmupMixConfig
from starflow2.training.datasets import dropped, joint_dialogue
from starflow2.training.loop import StepReport, fit
from starflow2.training.losses import JointTerms
from starflow2.training.tasks import TASKS, T2iTask
from starflow2.world.captions import T2I_MIX, caption_task
from starflow2.world.conversations import understanding_dialogue
from starflow2.world.scene import Scene, render, stream
from starflow2.world.stories import story_dialogue, story_task

STEPS, EVERY = 6, 2
RUN = tiny_run(STEPS, EVERY)
ORDER = ("features", "fae", "vlm", "t2i")  # of a model that draws, before its streams are joined


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that is ready for t2i."""
    return tiny_folder(tmp_path_factory.mktemp("ready"))


@pytest.fixture
def folder(ready: Path, tmp_path: Path) -> Path:
    """A copy that a test may train in."""
    shutil.copytree(ready, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder after an uninterrupted t2i run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(ready, folder)
    fit(RUN, "t2i", folder)
    return folder


def lines(folder: Path, stage: str = "t2i") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"metrics-{stage}.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[float, ...]]:
    """Every number of a curve that does not measure time, exactly as written."""
    return [tuple(line[k] for k in ("step", "loss", "nats_per_dim", "grad_norm", "rate")) for line in lines(folder)]


def weights(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "model").rglob("*.safetensors"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def with_stage(name: str = "t2i", run: RunConfig = RUN, **changes: Any) -> RunConfig:
    return replace(run, stages=tuple(replace(s, **changes) if s.name == name else s for s in run.stages))


def with_optim(name: str = "t2i", run: RunConfig = RUN, **changes: Any) -> RunConfig:
    return with_stage(name, run, optim=replace(run.stage(name).optim, **changes))


def assert_same_run(folder: Path, whole: Path) -> None:
    assert [line["step"] for line in lines(folder)] == list(range(1, STEPS + 1))
    assert curve(folder) == curve(whole)
    assert weights(folder) == weights(whole)
    old, new = (load_file(f / "state-t2i.safetensors") for f in (whole, folder))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


# -- exact resume

KILLED = """
import os, signal, sys, time
from pathlib import Path
tests, threads, *folders = sys.argv[1:]
sys.path.insert(0, tests)
import torch
torch.set_num_threads(int(threads))
from model_cases import tiny_run
from starflow2.models import checkpoint
from starflow2.training.loop import fit

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def after_a_checkpoint(folder):
    fit(run, "t2i", folder, evaluate=lambda parts, step: die() if step == 4 else {})

def while_writing_a_checkpoint(folder):
    write, count = checkpoint.save_file, []
    def half(tensors, path, **options):
        count.append(path)
        if len(count) == 2:
            Path(path).write_bytes(b"half")
            die()
        write(tensors, path, **options)
    checkpoint.save_file = half
    fit(run, "t2i", folder)

def at_any_moment(folder):
    fit(run, "t2i", folder, report=lambda _: time.sleep(0.05))

run = tiny_run(STEPS, EVERY)
for folder, how in zip(folders, (after_a_checkpoint, while_writing_a_checkpoint, at_any_moment)):
    child = os.fork()
    if not child:
        how(folder)
        os._exit(1)
    gone, status = os.waitpid(child, os.WNOHANG)
    while not gone:
        curve = Path(folder) / "metrics-t2i.jsonl"
        if how is at_any_moment and curve.is_file() and curve.read_text().count("\\n") >= 3:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
        gone, status = os.waitpid(child, os.WNOHANG)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (how.__name__, status)
"""


@pytest.fixture(scope="module")
def killed(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of three runs that ended in SIGKILL."""
    base = tmp_path_factory.mktemp("killed")
    folders = {name: base / name.replace(" ", "-") for name in ("after a checkpoint", "while writing one", "any time")}
    for folder in folders.values():
        shutil.copytree(ready, folder)
    script = KILLED.replace("STEPS, EVERY", f"{STEPS}, {EVERY}")
    asked = [Path(__file__).parents[1], torch.get_num_threads(), *folders.values()]
    subprocess.run([sys.executable, "-c", script, *map(str, asked)], check=True)
    return folders


@pytest.mark.timeout(600)  # a fresh interpreter imports everything again, which takes minutes on a crowded machine
@pytest.mark.parametrize("moment", ["after a checkpoint", "while writing one", "any time"])
def test_a_run_killed_with_sigkill_and_resumed_gives_bit_equal_losses_and_weights(killed, whole, moment):
    folder = killed[moment]
    assert "t2i" not in load_components(folder / "model").finished_stages and len(lines(folder)) < STEPS
    fit(RUN, "t2i", folder)
    assert_same_run(folder, whole)


def test_a_run_without_interruption_repeats_itself_whatever_the_global_generator_does(folder, whole):
    torch.manual_seed(99)
    fit(RUN, "t2i", folder, report=lambda _: torch.randn(5))
    assert_same_run(folder, whole)


def test_sigterm_leaves_a_checkpoint_and_a_clear_error_and_the_run_goes_on_from_there(folder, whole):
    before = signal.getsignal(signal.SIGTERM)

    def terminate(line: StepReport) -> None:
        if line.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingError, match=r"step [34]; its checkpoint is written.*--resume auto") as caught:
        fit(RUN, "t2i", folder, report=terminate)
    stopped = int(re.findall(r"step (\d)", str(caught.value))[0])
    assert signal.getsignal(signal.SIGTERM) == before
    assert "t2i" not in load_components(folder / "model").finished_stages
    seen: list[int] = []
    fit(RUN, "t2i", folder, report=lambda line: seen.append(line.step))
    assert seen == list(range(stopped + 1, STEPS + 1))
    assert_same_run(folder, whole)


def test_a_line_of_metrics_cut_short_by_a_power_failure_does_not_stop_the_run(folder):
    fit(with_stage(steps=4), "t2i", folder)
    with (folder / "metrics-t2i.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    fit(RUN, "t2i", folder)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_stage_is_not_trained_again_and_keeps_its_curve(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    seen: list[int] = []
    fit(RUN, "t2i", tmp_path / "run", report=lambda line: seen.append(line.step))
    assert not seen
    assert_same_run(tmp_path / "run", whole)


def test_without_resume_a_stage_starts_anew(folder):
    fit(with_stage(steps=2), "t2i", folder)
    seen: list[int] = []
    fit(with_stage(steps=3), "t2i", folder, resume=False, report=lambda line: seen.append(line.step))
    assert seen == [1, 2, 3] and [line["step"] for line in lines(folder)] == [1, 2, 3]


@pytest.fixture
def two_steps(folder: Path) -> Path:
    fit(with_stage(steps=2), "t2i", folder)
    return folder


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (with_stage(batch=8), r"batch \(4, now 8\)"),
        (with_optim(lr=1e-4), r"optim\.lr \(0\.002, now 0\.0001\)"),
        (with_optim(ema=0.5, clip=2.0), r"optim\.clip.*optim\.ema"),
        (with_stage(caption_drop=0.2), "caption_drop"),
        (replace(RUN, seed=7), r"seed \(0, now 7\)"),
        (replace(RUN, precision="bfloat16"), r"precision \(float32, now bfloat16\)"),
    ],
    ids=["batch", "lr", "two at once", "caption_drop", "seed", "precision"],
)
def test_resuming_with_other_settings_is_an_error_that_names_them(two_steps, run, named):
    with pytest.raises(TrainingError, match=f"another .*{named}.*--resume none"):
        fit(run, "t2i", two_steps)


def test_resuming_with_more_steps_goes_on_and_precision_auto_takes_what_the_run_began_with(two_steps):
    seen: list[int] = []
    run = replace(with_stage(steps=3, save_every=1), precision="auto")
    fit(run, "t2i", two_steps, report=lambda line: seen.append(line.step))
    assert seen == [3]


def test_a_folder_with_a_model_of_another_size_is_refused_by_the_part_that_differs(folder):
    other = replace(RUN, model=replace(tiny_model(), fae=replace(tiny_model().fae, kl_weight=0.5)))
    with pytest.raises(TrainingError, match=r"another fae than the recipe.*--output"):
        fit(other, "t2i", folder)


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"not tensors", CheckpointError), (None, TrainingError)],
    ids=["rubbish", "foreign safetensors"],
)
def test_a_checkpoint_that_is_none_is_refused(folder, data, error):
    path = folder / "state-t2i.safetensors"
    if data is None:
        save_file({"x": torch.zeros(2)}, path)
    else:
        path.write_bytes(data)
    with pytest.raises(error, match=r"state-t2i\.safetensors"):
        fit(RUN, "t2i", folder)


def test_a_checkpoint_of_other_weights_is_refused(two_steps):
    path = two_steps / "state-t2i.safetensors"
    with checkpoint_meta(path) as meta:
        save_file({"weights/flow.nothing": torch.zeros(2)}, path, metadata=meta)
    with pytest.raises(TrainingError, match="weights of another model"):
        fit(RUN, "t2i", two_steps)


def checkpoint_meta(path: Path) -> Any:
    import contextlib

    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return contextlib.nullcontext(file.metadata())


@pytest.mark.parametrize(
    ("stages", "asked", "first"),
    [((), "t2i", "features"), (("features",), "t2i", "fae"), (("features", "fae"), "t2i", "vlm")],
)
def test_a_stage_without_its_predecessors_says_which_to_run(tmp_path, stages, asked, first):
    if stages:
        tiny_folder(tmp_path, stages)
    with pytest.raises(TrainingError, match=f"run --stage {first} first"):
        fit(RUN, asked, tmp_path)


def test_an_unknown_stage_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match='Did you mean "t2i"'):
        fit(RUN, "t2l", tmp_path)


FULL = {
    "safetensors' own": SafetensorError("I/O error: No space left on device (os error 28)"),
    "the system's": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=list(FULL))
def test_a_disk_that_fills_up_at_a_checkpoint_leaves_the_one_before_and_the_run_goes_on_later(
    folder, whole, monkeypatch, error
):
    written: list[object] = []

    def full(tensors: object, path: Path, **options: object) -> None:
        written.append(path)
        if len(written) > 1:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OutputError, match=r"state-t2i\.safetensors.*No space left"):
            fit(RUN, "t2i", folder)
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
    seen: list[int] = []
    fit(RUN, "t2i", folder, report=lambda line: seen.append(line.step))
    assert seen == [3, 4, 5, 6]
    assert_same_run(folder, whole)


# -- steps


def snapshots(kept: list[dict[str, torch.Tensor]], part: str) -> Callable[[Components, int], dict[str, float]]:
    """An `evaluate` that keeps the state of a part at every checkpoint."""

    def keep(components: Components, step: int) -> dict[str, float]:
        kept.append({k: v.clone() for k, v in getattr(components, part).state_dict().items()})
        return {"seen": float(step)}

    return keep


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def bad_loss(loss: torch.Tensor, flow: Flow) -> torch.Tensor:
    return loss * torch.inf


def bad_gradient(loss: torch.Tensor, flow: Flow) -> torch.Tensor:
    weight = flow.deep.head.weight
    return loss + torch.sqrt((weight - weight).sum())  # 0, with an infinite slope


@pytest.mark.parametrize("spoil", [bad_loss, bad_gradient])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_nothing_and_is_counted(folder, monkeypatch, spoil, ema):
    calls: list[int] = []
    right = stages.ngp_loss

    def wrong_once(flow: Flow, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        loss, nats = right(flow, *rest)
        return (spoil(loss, flow) if len(calls) == 2 else loss), nats

    monkeypatch.setattr(stages, "ngp_loss", wrong_once)
    monkeypatch.setattr(stages, "length_groups", lambda lengths, _: [list(range(len(lengths)))])
    kept: list[dict[str, torch.Tensor]] = []
    run = with_optim(run=with_stage(steps=3, save_every=1, log_every=3), ema=ema)
    fit(run, "t2i", folder, evaluate=snapshots(kept, "flow"))
    assert same(kept[0], kept[1]) and not same(kept[1], kept[2])
    assert all(bool(torch.isfinite(v).all()) for v in kept[2].values())
    (last,) = (line for line in lines(folder) if "loss" in line)
    assert last["step"] == 3 and last["skipped"] == 1, "counted although no line was written at that step"


def test_a_picture_that_is_not_finite_does_not_spoil_the_running_statistics_of_the_fae(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path, ("features",))
    draw = datasets.Scenes.__call__

    def broken(self: datasets.Scenes, indices: range) -> torch.Tensor:
        images = draw(self, indices)
        return images * torch.inf if indices.start == 4 else images

    monkeypatch.setattr(datasets.Scenes, "__call__", broken)
    kept: list[dict[str, torch.Tensor]] = []
    run = with_optim("fae", with_stage("fae", steps=3, save_every=1), ema=0.0)
    fit(run, "fae", folder, evaluate=snapshots(kept, "fae"))
    assert "standardize.running_mean" in kept[0]
    assert same(kept[0], kept[1]) and not same(kept[1], kept[2])
    assert [line.get("skipped") for line in lines(folder, "fae") if "loss" in line] == [None, 1, 1]


def test_the_count_of_skipped_steps_survives_a_resume(folder, monkeypatch):
    right = stages.ngp_loss
    with monkeypatch.context() as patch:
        patch.setattr(stages, "ngp_loss", lambda flow, *rest: (right(flow, *rest)[0] * torch.inf, torch.zeros(())))
        fit(with_stage(steps=2), "t2i", folder)
    fit(with_stage(steps=3), "t2i", folder)
    assert lines(folder)[-1]["skipped"] == 2


def test_the_averaged_weights_are_what_is_saved_and_shown_to_evaluate(folder):
    kept: list[dict[str, torch.Tensor]] = []
    fit(with_optim(ema=0.5), "t2i", folder, evaluate=snapshots(kept, "flow"))
    state = load_file(folder / "state-t2i.safetensors")
    saved = load_file(folder / "model" / "model.safetensors")
    flow = {k: v for k, v in saved.items() if k.startswith("flow.")}
    assert flow and all(torch.equal(v, state[f"ema/{k}"]) for k, v in flow.items())
    assert any(not torch.equal(v, state[f"weights/{k}"]) for k, v in flow.items())
    assert same(kept[-1], {k.removeprefix("flow."): v for k, v in flow.items()})


def test_the_average_is_the_exponential_one_of_the_weights_after_each_step(tmp_path):
    plain: list[dict[str, torch.Tensor]] = []
    mean: list[dict[str, torch.Tensor]] = []
    for name, ema, kept in (("plain", 0.0, plain), ("mean", 0.15, mean)):
        tiny_folder(tmp_path / name, ORDER)  # a flow that is not fresh keeps its weights as they are
        run = with_optim(run=with_stage(steps=4, save_every=1), ema=ema)
        fit(run, "t2i", tmp_path / name, evaluate=snapshots(kept, "flow"))
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


def test_a_run_follows_the_schedule(whole):
    optim = RUN.stage("t2i").optim
    assert [line["rate"] for line in lines(whole)] == [optim.rate(step, STEPS) for step in range(STEPS)]


TRAINED = {
    "features": {"features"}, "fae": {"fae"}, "vlm": {"vlm"}, "t2i": {"flow"}, "adapter": {"adapter"},
    "joint": {"flow", "adapter", "visual_skip", "text_skip", "reference"},
}  # fmt: skip


def modules_of(components: Components) -> dict[str, torch.nn.Module]:
    whole = {name: getattr(components, name) for name in ("features", "fae", "vlm", "flow")}
    return whole | dict(components.joints.named_children())


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
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(components: Components, step: int) -> dict[str, float]:
        task = TASKS["t2i"](components, RUN.stage("t2i"), 0)
        images, rows = task.make_batch(range(4))
        seen.append((components.codec.encode(images), drawing_context(components, rows).states))
        return {}

    fit(RUN, "t2i", folder, evaluate=look)
    assert len(seen) == STEPS // EVERY
    assert all(torch.equal(a, b) for pair in seen[1:] for a, b in zip(seen[0], pair, strict=True))


def test_evaluate_may_draw_pictures_with_the_stage_that_is_being_trained(folder):
    def look(components: Components, step: int) -> dict[str, float]:
        return {"std": StarFlow2(components).draw(["two red hearts"], [0]).std().item()}

    fit(with_stage(steps=2), "t2i", folder, evaluate=look)
    assert lines(folder)[-1]["std"] > 0


def test_a_fresh_flow_starts_from_whitened_text_states_and_a_run_that_goes_on_keeps_what_it_has(folder):
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
    fit(still, "t2i", folder, resume=False)
    assert torch.equal(load_components(folder / "model").flow.deep.context_in.weight, enter.weight)


def test_bfloat16_training_stays_close_to_float32_and_keeps_float32_weights(folder, whole):
    fit(replace(RUN, precision="bfloat16"), "t2i", folder)
    half, full = lines(folder), lines(whole)
    assert [line["nats_per_dim"] for line in half] == pytest.approx([x["nats_per_dim"] for x in full], abs=0.05)
    assert half[0]["loss"] != full[0]["loss"]
    assert {t.dtype for t in load_file(folder / "model" / "model.safetensors").values() if t.is_floating_point()} == {
        torch.float32
    }


def test_reports_count_steps_and_say_how_long_it_will_take(folder):
    seen: list[StepReport] = []
    fit(with_stage(steps=5, log_every=2), "t2i", folder, report=seen.append)
    assert [line.step for line in seen] == [2, 4, 5] and {line.steps for line in seen} == {5}
    assert seen[-1].eta_s == 0 and all(line.images_per_s > 0 for line in seen)
    assert {"loss", "nats_per_dim", "grad_norm", "rate"} <= seen[0].metrics.keys()


# -- data


def t2i_task(components: Components, seed: int = 0, **changes: Any) -> stages.T2iTask:
    return stages.T2iTask(components, replace(RUN.stage("t2i"), **changes), seed)


def test_the_batch_of_a_step_is_a_function_of_seed_and_step_alone():
    components = tiny_components()
    images, rows = t2i_task(components).make_batch(range(8, 16))
    t2i_task(components).make_batch(range(0, 8))
    again, same_rows = t2i_task(components).make_batch(range(8, 16))
    assert torch.equal(images, again) and rows == same_rows
    other, other_rows = t2i_task(components, seed=1).make_batch(range(8, 16))
    assert not torch.equal(images, other) and rows != other_rows


@pytest.mark.parametrize("stage", ["features", "fae", "vlm", "adapter", "joint"])
def test_batches_of_the_other_stages_are_functions_of_seed_and_step_too(stage):
    def flat(data: Any) -> list[torch.Tensor]:
        return [data[0], data[1].ids, data[1].labels] if isinstance(data, tuple) else [data]

    components = tiny_components(STAGES)
    first, again, other = (
        flat(TASKS[stage](components, RUN.stage(stage), seed).make_batch(range(4, 8))) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[-1].shape != other[-1].shape or not torch.equal(first[-1], other[-1])


@pytest.mark.parametrize(("share", "low", "high"), [(0.1, 0.07, 0.13), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_about_a_tenth_of_the_captions_is_dropped_unless_asked_otherwise(monkeypatch, share, low, high):
    monkeypatch.setattr(datasets, "to_images", lambda scenes: None)
    task = t2i_task(tiny_components(), caption_drop=share)
    empty = task.components.tokenizer.drawing_prompt("")
    count = 1500 if 0 < share < 1 else 60
    rows = [row for first in range(0, count, 60) for row in task.make_batch(range(first, first + 60))[1]]
    assert low <= sum(row == empty for row in rows) / count <= high
    assert RUN.stage("t2i").caption_drop == 0.1


def test_training_in_groups_of_similar_length_gives_the_loss_of_the_whole_batch(monkeypatch):
    task = t2i_task(tiny_components())
    images, rows = task.make_batch(range(32))
    assert len(length_groups([len(r) for r in rows], 64)) == 2, "these captions are of very different length"

    def of_each_row(flow: Flow, latents: torch.Tensor, context: Any, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The NGP loss with a level and noise that each row brings along, since groups draw their own."""
        level = 0.05 + 0.4 * torch.sigmoid(latents.mean((1, 2)))
        noisy = latents + level[:, None, None] * torch.sin(1e3 * latents)
        nats = flow.nats_per_dim(noisy, context, level)
        return (level * nats).mean(), nats.mean()

    monkeypatch.setattr(stages, "ngp_loss", of_each_row)
    grouped, told = task.loss((images, rows), torch.Generator())
    grads = torch.autograd.grad(grouped, task.components.flow.deep.proj_in.weight)[0]
    monkeypatch.setattr(stages, "length_groups", lambda lengths, _: [list(range(len(lengths)))])
    together, told_together = task.loss((images, rows), torch.Generator())
    assert grouped.item() == pytest.approx(together.item(), abs=1e-5)
    assert told["nats_per_dim"].item() == pytest.approx(told_together["nats_per_dim"].item(), abs=1e-5)
    whole_grads = torch.autograd.grad(together, task.components.flow.deep.proj_in.weight)[0]
    assert (grads - whole_grads).abs().max() <= 1e-5


@pytest.mark.parametrize("stage", ["vlm", "adapter"])
def test_the_language_stage_and_its_adapter_learn_answers_and_not_questions(stage):
    components = tiny_components(STAGES)
    images, batch = TASKS[stage](components, RUN.stage(stage), 0).make_batch(range(6))
    special = components.tokenizer.special
    dialogues = [understanding_dialogue(0, i) for i in range(6)]
    for index, dialogue in enumerate(dialogues):
        told = batch.labels[(batch.document == index) & (batch.labels != IGNORE)].tolist()
        assert [components.tokenizer.decode(part) for part in split(told, special.end)] == [
            " ".join(str(p) for p in turn.assistant) for turn in dialogue.turns
        ]
    scenes = [scene for dialogue in dialogues for scene in dialogue.pictures]
    assert len(images) == len(batch.pictures) == len(scenes) and not batch.pictures.is_target.any()
    assert all(torch.equal(to_bytes(image), to_bytes(render(s))) for image, s in zip(images, scenes, strict=True))


def to_bytes(picture: Any) -> torch.Tensor:
    """A rendered scene, or a picture of a batch, as bytes (3, height, width)."""
    if isinstance(picture, torch.Tensor):
        return ((picture + 1) * 127.5).round().byte()
    return torch.from_numpy(picture).permute(2, 0, 1)


def split(ids: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == end:
            parts.append([])
        else:
            parts[-1].append(i)
    assert not parts[-1], "every answer closes with the end token"
    return parts[:-1]


# -- stages 2 and 3


def falls(stage: str, components: Components, rate: float, steps: int = 8) -> list[float]:
    """Losses of a few steps of plain gradient descent on one batch with the same noise every time."""
    task = TASKS[stage](components, RUN.stage(stage), 0)
    data, losses = task.make_batch(range(4)), list[float]()
    optimizer = torch.optim.AdamW(task.trained.parameters(), lr=rate)
    for _ in range(steps):
        loss, _ = task.loss(data, torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", ["adapter", "joint"])
def test_the_loss_of_a_fixed_batch_falls_and_what_is_frozen_stays(stage):
    components = tiny_components(STAGES)
    losses = falls(stage, components, 3e-3)
    assert losses[-1] < 0.98 * losses[0] and all(b < a for a, b in zip(losses, losses[3:], strict=False))
    frozen = {name: part for name, part in modules_of(components).items() if name not in TRAINED[stage]}
    before = modules_of(tiny_components(STAGES))
    assert len(frozen) >= 3 and all(same(part.state_dict(), before[name].state_dict()) for name, part in frozen.items())


def test_stage_three_trains_its_zero_skips_and_everything_in_front_of_them():
    components = tiny_components(STAGES)
    with torch.no_grad():
        for skip in (components.joints.visual_skip, components.joints.text_skip, components.joints.reference):
            skip.weight.zero_()
    task = TASKS["joint"](components, RUN.stage("joint"), 0)
    data = task.make_batch(range(8))
    task.loss(data, torch.Generator().manual_seed(1))[0].backward()
    grads = {name: p.grad for name, p in task.trained.named_parameters()}
    for name in ("joints.visual_skip.weight", "joints.text_skip.weight", "joints.reference.weight"):
        assert grads[name].abs().max() > 0, name
    asleep = {name for name, grad in grads.items() if grad is None}
    assert asleep <= {"flow.deep.start"}, "a document always begins with words"


def test_a_fresh_adapter_starts_at_the_scale_of_the_language_models_own_tower():
    components = tiny_components(ORDER)
    images = datasets.to_images([caption_task(0, i).scene for i in range(64)])
    with torch.no_grad():
        expected = components.vlm.see(images).square().mean().sqrt().item()
    TASKS["adapter"](components, RUN.stage("adapter"), 0).initialise()
    assert components.joints.adapter.gain.tolist() == pytest.approx([expected] * 40)


def test_an_adapter_that_was_trained_before_keeps_its_scale_when_its_stage_starts_anew(tmp_path):
    folder = tiny_folder(tmp_path, STAGES[:5])
    gain = load_components(folder / "model").joints.adapter.gain
    still = replace(RUN.stage("adapter").optim, lr=0.0, matrix_lr=0.0)
    fit(with_stage("adapter", steps=1, optim=still), "adapter", folder, resume=False)
    assert torch.equal(load_components(folder / "model").joints.adapter.gain, gain)


def test_distance_to_the_tower_is_told_and_weighs_in_only_if_it_is_asked_for():
    cfg = tiny_model()
    components = wake(
        Components(replace(cfg, vlm=replace(cfg.vlm, vision_patch=4)), tiny_tokenizer()), 0.05
    )  # 8 x 8 tokens
    components.finished_stages = STAGES
    losses = {}
    for weight in (0.0, 0.5, 1.0):
        task = TASKS["adapter"](components, replace(RUN.stage("adapter"), distill=weight), 0)
        losses[weight] = task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1))
    assert losses[0.0][1] == {}
    far = losses[1.0][1]["distance"].item()
    assert far > 0
    for weight in (0.5, 1.0):
        assert losses[weight][0].item() == pytest.approx(losses[0.0][0].item() + weight * far, rel=1e-5)


def test_a_distance_to_a_tower_that_sees_another_grid_is_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match=r"distill is 1.0.*\(4, 4\).*\(8, 8\)"):
        TASKS["adapter"](tiny_components(STAGES), replace(RUN.stage("adapter"), distill=1.0), 0)


def test_the_joint_loss_is_that_of_pictures_and_a_share_of_that_of_words():
    components = tiny_components(STAGES)
    told = {}
    for weight in (0.0, 0.25, 2.0):
        task = TASKS["joint"](components, replace(RUN.stage("joint"), text_weight=weight), 0)
        loss, terms = task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1))
        told[weight] = loss.item()
        assert loss.item() == pytest.approx((terms["flow"] + weight * terms["text"]).item())
    assert told[2.0] > told[0.25] > told[0.0]
    assert RUN.stage("joint").text_weight == 0.25


def test_as_many_edits_are_predicted_blindly_as_is_asked():
    only_edits = mix_of(edit=0.5, chain=0.5)
    told: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    for share in (0.0, 1.0):
        components = tiny_components(STAGES)
        task = TASKS["joint"](
            components, replace(RUN.stage("joint"), hidden_latents_share=share, mix=only_edits, caption_drop=0.0), 0
        )
        told.append(task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1)))
    (_, without), (loss, blind) = told
    assert "blind" not in without and blind["blind"].abs() > 1e-3 and blind["flow"] != without["flow"]
    assert loss.item() == pytest.approx((blind["flow"] + 0.25 * blind["text"] + blind["blind"]).item(), abs=1e-5)


def kept_task(components: Components, keep: float = 2.0) -> task.Task:
    return TASKS["joint"](components, replace(RUN.stage("joint"), kl_to_t2i=keep, caption_drop=0.0), 0)


def test_drawings_are_kept_near_what_the_flow_drew_before_the_stage():
    components = tiny_components(STAGES[:5])
    for skip in (components.joints.visual_skip, components.joints.text_skip):
        torch.nn.init.zeros_(skip.weight)
    task = kept_task(components)
    data = task.make_batch(range(8))
    loss, terms = task.loss(data, torch.Generator().manual_seed(1))
    assert abs(terms["kept"].item()) < 1e-6, "nothing has moved yet"
    wake(components.flow.deep, 0.02, seed=3)
    loss, terms = task.loss(data, torch.Generator().manual_seed(1))
    assert terms["kept"].item() > 1e-3
    assert loss.item() == pytest.approx((terms["flow"] + 0.25 * terms["text"] + 2 * terms["kept"]).item(), abs=1e-5)
    (slope,) = torch.autograd.grad(terms["kept"], [components.flow.deep.head.weight])
    with torch.no_grad():
        components.flow.deep.head.weight -= 0.01 * slope / slope.norm()
    assert task.loss(data, torch.Generator().manual_seed(1))[1]["kept"] < terms["kept"]


@pytest.mark.parametrize(("kind", "counts"), [("draw", True), ("story", False), ("edit", False)])
def test_only_pictures_alone_in_their_documents_are_kept(kind, counts):
    """Stage t2i has read captions, not the words a story begins with."""
    components = tiny_components(STAGES[:5])
    stage = replace(RUN.stage("joint"), kl_to_t2i=1.0, mix=mix_of(**{kind: 1.0}), caption_drop=0.0)
    task = TASKS["joint"](components, stage, 0)
    wake(components.flow.deep, 0.02, seed=3)
    _, terms = task.loss(task.make_batch(range(3)), torch.Generator().manual_seed(1))
    assert (terms["kept"].item() > 1e-3) if counts else (terms["kept"].item() == 0)


def test_what_is_kept_is_measured_on_intermediate_latents_that_do_not_train():
    components = tiny_components(STAGES[:5])
    names = set(dict(kept_task(components).trained.named_parameters()))
    whole = set(dict(kept_task(components, 0.0).trained.named_parameters()))
    assert whole - names == {f"flow.shallow.{name}" for name, _ in components.flow.shallow.named_parameters()}


def test_a_stage_that_is_kept_near_the_one_before_it_has_to_come_behind_it():
    components = tiny_components(STAGES)
    task = kept_task(components)
    with pytest.raises(ConfigError, match="has finished joint"):
        task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1))
    for wrong in ({"kl_to_t2i": -1.0}, {"kl_to_t2i": 1.0, "shard": ShardConfig(mode="fsdp")}):
        with pytest.raises(ConfigError, match="kl_to_t2i is"):
            replace(RUN.stage("joint"), **wrong)
    with pytest.raises(ConfigError, match="stage t2i"):
        replace(RUN.stage("t2i"), kl_to_t2i=1.0)


def levels_of(components: Components, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise levels of many pictures in stage 3, those that are shown and those that are drawn."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(pretzel: Any, batch: Batch, pictures: Any, noise: Any, blind: Any) -> Any:
        seen.append((pictures[1], batch.pictures.is_target))
        return JointTerms(*torch.zeros(3), out=None)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "joint_loss", look)
    task = TASKS["joint"](components, RUN.stage("joint"), 0)
    data = task.make_batch(range(24))
    for seed in range(20):
        task.loss(data, torch.Generator().manual_seed(seed))
    level, drawn = (torch.cat(t) for t in zip(*seen, strict=True))
    return level[~drawn], level[drawn]


def test_pictures_that_are_shown_are_often_as_clean_as_uploads_and_often_as_noisy_as_drawings(monkeypatch):
    shown, drawn = levels_of(tiny_components(STAGES), monkeypatch)
    assert len(shown) > 100 and len(drawn) > 100
    for level, lowest, highest in ((shown, 0.4, 0.3), (drawn, 0.0, 0.5)):
        assert abs(float((level == 0.01).float().mean()) - lowest) < 0.12
        assert abs(float((level == 0.5).float().mean()) - highest) < 0.12
        assert level.min() >= 0.01 and level.max() <= 0.5


def kinds(**mix: float) -> set[str]:
    stage = replace(RUN.stage("joint"), mix=mix_of(**mix))
    return {joint_dialogue(stage, 0, i).kind for i in range(12)}


def test_documents_of_stage_three_are_mixed_as_the_config_says():
    parts = {name: kinds(**{name: 1.0}) for name in ("understand", "draw", "edit", "chain", "story")}
    assert parts["draw"] == {"draw"}
    assert not parts["understand"] & (parts["draw"] | parts["edit"] | parts["story"])
    assert not (parts["edit"] | parts["chain"]) & parts["story"] and not parts["edit"] & parts["chain"]
    assert kinds(draw=0.5, story=0.5) == parts["draw"] | parts["story"]
    for shares in ({"draw": -1.0}, {}):
        with pytest.raises(ConfigError, match="MixConfig is"):
            kinds(**shares)


def test_captions_of_drawings_are_about_what_the_config_says_in_both_stages_that_draw():
    components, only = tiny_components(STAGES), CaptionConfig(**{name: float(name == "counting") for name in T2I_MIX})
    wanted = {caption_task(0, i, weights={"counting": 1.0}).prompt for i in range(8)}
    stage = replace(RUN.stage("joint"), mix=mix_of(draw=1.0), captions=only, caption_drop=0.0)
    assert {str(joint_dialogue(stage, 0, i).turns[0].user[0]) for i in range(8)} == wanted
    task = T2iTask(components, replace(RUN.stage("t2i"), captions=only, caption_drop=0.0), 0)
    _, prompts = task.make_batch(range(8))
    assert prompts == [
        components.tokenizer.drawing_prompt(caption_task(0, i, weights={"counting": 1.0}).prompt) for i in range(8)
    ]
    assert asdict(CaptionConfig()) == dict(T2I_MIX)
    for shares in ({"counting": -1.0}, dict.fromkeys(T2I_MIX, 0.0)):
        with pytest.raises(ConfigError, match="CaptionConfig is"):
            CaptionConfig(**shares)


def test_the_first_steps_have_a_mix_of_their_own():
    opening = WarmupMixConfig(steps=2, mix=mix_of(draw=1.0))
    stage = replace(RUN.stage("joint"), mix=mix_of(story=1.0), warmup_mix=opening)
    assert {joint_dialogue(stage, 0, i).kind for i in range(2 * stage.batch)} == {"draw"}
    assert {joint_dialogue(stage, 0, 2 * stage.batch + i).kind for i in range(2 * stage.batch)} == {"story"}


def drawing_dialogue() -> Dialogue:
    """The user shows a picture and says something; the model draws, says something and draws again."""
    a, b, c = (caption_task(0, i).scene for i in range(3))
    return Dialogue((Turn((a, "a red circle"), (b,)), Turn(("a blue star",), ("here", c))), "edit")


def test_of_dropped_dialogues_the_words_of_the_user_go_and_half_of_the_time_the_pictures_too():
    dialogue, found = drawing_dialogue(), {"whole": 0, "shown": 0, "nothing": 0}
    for index in range(600):
        gone = dropped(dialogue, stream(0, index, 99), 0.5)
        assert gone.kind == "edit" and gone.pictures[-2:] == dialogue.pictures[-2:]
        asked = tuple(turn.user for turn in gone.turns)
        shown = ((dialogue.turns[0].user[0],), ())
        found[{asked == shown: "shown", asked == ((), ()): "nothing", gone == dialogue: "whole"}[True]] += 1
    assert abs(found["whole"] - 300) < 50 and abs(found["shown"] - 150) < 50 and abs(found["nothing"] - 150) < 50


def test_answers_in_words_are_never_asked_without_their_question_and_no_share_drops_nothing():
    words = Dialogue((Turn((caption_task(0, 0).scene, "a red circle"), ("yes",)),), "picture")
    assert all(dropped(words, stream(0, i, 99), 1.0) is words for i in range(20))
    told = story_dialogue(story_task(0, 0))  # a question is its last turn
    for dialogue in (drawing_dialogue(), told):
        assert all(dropped(dialogue, stream(0, i, 99), 0.0) is dialogue for i in range(20))
        for i in range(20):
            turns = dropped(dialogue, stream(0, i, 99), 1.0).turns
            assert not any(isinstance(part, str) for turn in turns for part in (*turn.user, *turn.assistant))
            assert all(turn.assistant for turn in turns)


def test_a_dropped_drawing_is_read_as_the_unconditional_branch_of_guidance():
    components = tiny_components(STAGES)
    gone = Dialogue((Turn((), (caption_task(0, 0).scene,)),), "draw")
    (user, assistant, *_), prompt = components.tokenizer.document(gone.turns), components.tokenizer.drawing_prompt("")
    assert [*user.ids, *assistant.ids, components.layout.begin] == prompt


def test_a_scene_is_shown_and_drawn_as_it_is_rendered():
    components = tiny_components(STAGES)
    stage = replace(RUN.stage("joint"), mix=mix_of(edit=0.5, chain=0.5), caption_drop=0.0)
    images, batch = TASKS["joint"](components, stage, 0).make_batch(range(1, 4))
    scenes = [s for i in range(1, 4) for s in joint_dialogue(stage, 0, i).pictures]
    assert all(isinstance(s, Scene) for s in scenes) and len(images) == len(scenes) == len(batch.pictures)
    assert all(torch.equal(to_bytes(image), to_bytes(render(s))) for image, s in zip(images, scenes, strict=True))
    turns = [len(joint_dialogue(stage, 0, i).turns) for i in range(1, 4)]
    assert max(turns) > 1, "of edits in chains, too"
    assert batch.pictures.is_target.tolist() == [flag for n in turns for flag in (False, *n * (True,))]


KILLED_LATER = """
import os, signal, sys
tests, threads, *folders = sys.argv[1:]
sys.path.insert(0, tests)
import torch
torch.set_num_threads(int(threads))
from model_cases import tiny_run
from starflow2.training.loop import fit

run = tiny_run(STEPS, EVERY)
for stage, folder in zip(("adapter", "joint"), folders):
    child = os.fork()
    if not child:
        fit(run, stage, folder, evaluate=lambda parts, step: os.kill(os.getpid(), signal.SIGKILL) if step == 4 else {})
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (stage, status)
"""


@pytest.fixture(scope="module")
def killed_later(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of stages 2 and 3 that ended in SIGKILL behind their second checkpoint."""
    base = tmp_path_factory.mktemp("killed-later")
    folders = {stage: tiny_folder(base / stage, STAGES[: STAGES.index(stage)]) for stage in ("adapter", "joint")}
    script = KILLED_LATER.replace("STEPS, EVERY", f"{STEPS}, {EVERY}")
    asked = [Path(__file__).parents[1], torch.get_num_threads(), *folders.values()]
    subprocess.run([sys.executable, "-c", script, *map(str, asked)], check=True)
    return folders


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["adapter", "joint"])
def test_stages_two_and_three_killed_and_resumed_repeat_the_uninterrupted_run_bit_for_bit(
    killed_later, tmp_path, stage
):
    folder = killed_later[stage]
    assert stage not in load_components(folder / "model").finished_stages and len(lines(folder, stage)) == 4
    fit(RUN, stage, folder)
    whole = tiny_folder(tmp_path, STAGES[: STAGES.index(stage)])
    fit(RUN, stage, whole)
    timed = ("time", "seconds", "images_per_s")
    one, other = ([{k: v for k, v in x.items() if k not in timed} for x in lines(f, stage)] for f in (folder, whole))
    assert one == other and len(one) == STEPS
    assert weights(folder) == weights(whole)
    old, new = (load_file(f / f"state-{stage}.safetensors") for f in (whole, folder))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize(("stage", "first"), [("adapter", "t2i"), ("joint", "adapter")])
def test_stages_two_and_three_ask_for_the_one_before(tmp_path, stage, first):
    tiny_folder(tmp_path, STAGES[: STAGES.index(first)])
    with pytest.raises(TrainingError, match=f"run --stage {first} first"):
        fit(RUN, stage, tmp_path)


# -- several processes

TWO = """
import os, socket, sys
tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
import torch
torch.set_num_threads(1)
from dataclasses import replace
from safetensors.torch import save_file
from model_cases import tiny_run
from starflow2.training import tasks as stages
from starflow2.training import loop as train

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

def work(rank):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kept, calls, right = [], [], stages.ngp_loss

    class Kept(stages.T2iTask):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    def wrong_once(*args):
        calls.append(1)
        loss, nats = right(*args)  # the other process has no reason of its own to skip step 2
        return (loss + torch.inf if rank == 1 and len(calls) == 2 else loss), nats

    stages.TASKS["t2i"], stages.ngp_loss = Kept, wrong_once
    stages.length_groups = lambda lengths, _: [list(range(len(lengths)))]
    train.fit(tiny_run(3, 3), "t2i", folder)
    save_file({k: v.contiguous() for k, v in kept[0].components.flow.state_dict().items()}, f"{folder}/rank-{rank}")

children = []
for rank in (0, 1):
    child = os.fork()
    if not child:
        try:
            work(rank)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_step_that_goes_wrong_in_one_process_is_skipped_by_all_and_their_weights_stay_equal(folder):
    subprocess.run([sys.executable, "-c", TWO, str(Path(__file__).parents[1]), str(folder)], check=True)
    first, second = load_file(folder / "rank-0"), load_file(folder / "rank-1")
    assert same(first, second)
    assert any(not torch.equal(v, load_components(folder / "model").flow.state_dict()[k]) for k, v in first.items())
    assert [line.get("skipped") for line in lines(folder)] == [None, 1, 1]


def test_a_model_that_goes_on_to_conversations_learns_their_words(tmp_path):
    components = tiny_components(("features", "fae", "vlm", "t2i"))
    components.vocabulary = frozenset({"circle"})  # as of a time when it knew captions only
    save_components(components, tmp_path / "model")
    assert {"circle", "turn", "first"} <= train._start_components(RUN, "adapter", tmp_path, "cpu").vocabulary
    assert train._start_components(RUN, "t2i", tmp_path, "cpu").vocabulary == {"circle"}
