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
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model_cases import WHITEN, tiny_folder, tiny_model, tiny_parts, tiny_run, whiten_quickly
from starflow2 import checkpoint, stages, train
from starflow2.checkpoint import load_parts, save_parts
from starflow2.data.tasks import draw_task, understanding_task
from starflow2.errors import CheckpointError, ConfigError, OutputError, TrainingError
from starflow2.flow import Flow
from starflow2.model import StarFlow2
from starflow2.parts import Parts
from starflow2.sequence import length_groups
from starflow2.stages import TASKS, OptimConfig, RunConfig
from starflow2.train import StepReport, fit

STEPS, EVERY = 6, 2
RUN = tiny_run(STEPS, EVERY)
ORDER = ("features", "fae", "vlm", "t2i")


@pytest.fixture(scope="module", autouse=True)
def _whitens_quickly() -> Iterator[None]:
    whiten_quickly()
    yield
    stages.T2iTask._whiten = WHITEN


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
from model_cases import tiny_run, whiten_quickly
from starflow2 import checkpoint
from starflow2.train import fit

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

whiten_quickly()
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
    asked = [Path(__file__).parent, torch.get_num_threads(), *folders.values()]
    subprocess.run([sys.executable, "-c", script, *map(str, asked)], check=True)
    return folders


@pytest.mark.timeout(600)  # a fresh interpreter imports everything again, which takes minutes on a crowded machine
@pytest.mark.parametrize("moment", ["after a checkpoint", "while writing one", "any time"])
def test_a_run_killed_with_sigkill_and_resumed_gives_bit_equal_losses_and_weights(killed, whole, moment):
    folder = killed[moment]
    assert "t2i" not in load_parts(folder / "model").stages and len(lines(folder)) < STEPS
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
    assert "t2i" not in load_parts(folder / "model").stages
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


def snapshots(kept: list[dict[str, torch.Tensor]], part: str) -> Callable[[Parts, int], dict[str, float]]:
    """An `evaluate` that keeps the state of a part at every checkpoint."""

    def keep(parts: Parts, step: int) -> dict[str, float]:
        kept.append({k: v.clone() for k, v in getattr(parts, part).state_dict().items()})
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
    right = train.ngp_loss

    def wrong_once(flow: Flow, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        loss, nats = right(flow, *rest)
        return (spoil(loss, flow) if len(calls) == 2 else loss), nats

    monkeypatch.setattr(train, "ngp_loss", wrong_once)
    monkeypatch.setattr(train, "length_groups", lambda lengths, _: [list(range(len(lengths)))])
    kept: list[dict[str, torch.Tensor]] = []
    run = with_optim(run=with_stage(steps=3, save_every=1, log_every=3), ema=ema)
    fit(run, "t2i", folder, evaluate=snapshots(kept, "flow"))
    assert same(kept[0], kept[1]) and not same(kept[1], kept[2])
    assert all(bool(torch.isfinite(v).all()) for v in kept[2].values())
    (last,) = (line for line in lines(folder) if "loss" in line)
    assert last["step"] == 3 and last["skipped"] == 1, "counted although no line was written at that step"


def test_a_picture_that_is_not_finite_does_not_spoil_the_running_statistics_of_the_fae(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path, ("features",))
    draw = train.FaeTask.draw

    def broken(self: train.FaeTask, indices: range) -> torch.Tensor:
        images = draw(self, indices)
        return images * torch.inf if indices.start == 4 else images

    monkeypatch.setattr(train.FaeTask, "draw", broken)
    kept: list[dict[str, torch.Tensor]] = []
    run = with_optim("fae", with_stage("fae", steps=3, save_every=1), ema=0.0)
    fit(run, "fae", folder, evaluate=snapshots(kept, "fae"))
    assert "standardize.running_mean" in kept[0]
    assert same(kept[0], kept[1]) and not same(kept[1], kept[2])
    assert [line.get("skipped") for line in lines(folder, "fae") if "loss" in line] == [None, 1, 1]


def test_the_count_of_skipped_steps_survives_a_resume(folder, monkeypatch):
    right = train.ngp_loss
    with monkeypatch.context() as patch:
        patch.setattr(train, "ngp_loss", lambda flow, *rest: (right(flow, *rest)[0] * torch.inf, torch.zeros(())))
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
    start = tiny_parts().flow.state_dict()
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


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_changes_what_it_trains_and_leaves_the_rest_bit_equal(tmp_path, stage):
    folder = tiny_folder(tmp_path, ORDER[: ORDER.index(stage)])
    before = load_parts(folder / "model")
    modes: list[set[str]] = []
    names = ("features", "fae", "vlm", "flow")

    def look(parts: Parts, step: int) -> dict[str, float]:
        modes.append({name for name in names if any(m.training for m in getattr(parts, name).modules())})
        return {}

    fit(with_stage(stage, steps=2), stage, folder, evaluate=look)
    after = load_parts(folder / "model")
    trained = {"t2i": "flow"}.get(stage, stage)
    changed = {n for n in names if not same(getattr(before, n).state_dict(), getattr(after, n).state_dict())}
    assert changed == {trained}
    assert modes == [set()], "frozen parts, and averaged ones under evaluation, are in eval mode"
    assert after.stages == ORDER[: ORDER.index(stage) + 1]


@pytest.mark.parametrize("stage", ORDER)
def test_a_loss_is_a_function_of_batch_and_generator_alone(stage):
    parts = tiny_parts()
    task = TASKS[stage](parts, RUN.stage(stage), 0)
    data = task.draw(range(4))
    losses = []
    for seed in (1, 1, 2):
        torch.randn(3)
        losses.append(task.loss(data, torch.Generator().manual_seed(seed))[0].item())
    assert losses[0] == losses[1]
    assert (losses[0] == losses[2]) == (stage == "vlm"), "the language stage draws no noise"


def test_the_frozen_language_model_and_encoder_give_the_same_bits_every_time_in_a_t2i_run(folder):
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(parts: Parts, step: int) -> dict[str, float]:
        task = TASKS["t2i"](parts, RUN.stage("t2i"), 0)
        images, rows = task.draw(range(4))
        seen.append((parts.codec.encode(images), train.drawing_context(parts, rows).states))
        return {}

    fit(RUN, "t2i", folder, evaluate=look)
    assert len(seen) == STEPS // EVERY
    assert all(torch.equal(a, b) for pair in seen[1:] for a, b in zip(seen[0], pair, strict=True))


def test_evaluate_may_draw_pictures_with_the_stage_that_is_being_trained(folder):
    def look(parts: Parts, step: int) -> dict[str, float]:
        return {"std": StarFlow2(parts).draw(["two red hearts"], [0]).std().item()}

    fit(with_stage(steps=2), "t2i", folder, evaluate=look)
    assert lines(folder)[-1]["std"] > 0


def test_a_fresh_flow_starts_from_whitened_text_states_and_a_run_that_goes_on_keeps_what_it_has(folder):
    still = with_optim(run=with_stage(steps=1), lr=0.0, matrix_lr=0.0)
    fit(still, "t2i", folder)
    parts = load_parts(folder / "model")
    tokenizer, enter = parts.tokenizer, parts.flow.deep.context_in
    context = train.drawing_context(parts, [tokenizer.drawing_prompt(draw_task(0, i).prompt) for i in range(64)])
    entered = enter(context.states[context.attend])
    assert entered.mean(0).abs().max() < 1e-3
    assert entered.var(0).max() < 1.01 and entered.var(0).median() > 0.9
    with torch.no_grad():
        enter.weight.mul_(2)
    save_parts(parts, folder / "model")
    fit(still, "t2i", folder, resume=False)
    assert torch.equal(load_parts(folder / "model").flow.deep.context_in.weight, enter.weight)


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


def t2i_task(parts: Parts, seed: int = 0, **changes: Any) -> train.T2iTask:
    return train.T2iTask(parts, replace(RUN.stage("t2i"), **changes), seed)


def test_the_batch_of_a_step_is_a_function_of_seed_and_step_alone():
    parts = tiny_parts()
    images, rows = t2i_task(parts).draw(range(8, 16))
    t2i_task(parts).draw(range(0, 8))
    again, same_rows = t2i_task(parts).draw(range(8, 16))
    assert torch.equal(images, again) and rows == same_rows
    other, other_rows = t2i_task(parts, seed=1).draw(range(8, 16))
    assert not torch.equal(images, other) and rows != other_rows


@pytest.mark.parametrize("stage", ["features", "fae", "vlm"])
def test_batches_of_the_other_stages_are_functions_of_seed_and_step_too(stage):
    def flat(data: Any) -> list[torch.Tensor]:
        return list(data) if isinstance(data, tuple) else [data]

    parts = tiny_parts()
    first, again, other = (flat(TASKS[stage](parts, RUN.stage(stage), seed).draw(range(4, 8))) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("share", "low", "high"), [(0.1, 0.07, 0.13), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_about_a_tenth_of_the_captions_is_dropped_unless_asked_otherwise(monkeypatch, share, low, high):
    monkeypatch.setattr(train, "to_images", lambda scenes: None)
    task = t2i_task(tiny_parts(), caption_drop=share)
    empty = task.parts.tokenizer.drawing_prompt("")
    count = 1500 if 0 < share < 1 else 60
    rows = [row for first in range(0, count, 60) for row in task.draw(range(first, first + 60))[1]]
    assert low <= sum(row == empty for row in rows) / count <= high
    assert RUN.stage("t2i").caption_drop == 0.1


def test_training_in_groups_of_similar_length_gives_the_loss_of_the_whole_batch(monkeypatch):
    task = t2i_task(tiny_parts())
    images, rows = task.draw(range(32))
    assert len(length_groups([len(r) for r in rows], 64)) == 2, "these captions are of very different length"

    def of_each_row(flow: Flow, latents: torch.Tensor, context: Any, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The NGP loss with a level and noise that each row brings along, since groups draw their own."""
        level = 0.05 + 0.4 * torch.sigmoid(latents.mean((1, 2)))
        noisy = latents + level[:, None, None] * torch.sin(1e3 * latents)
        nats = flow.nats_per_dim(noisy, context, level)
        return (level * nats).mean(), nats.mean()

    monkeypatch.setattr(train, "ngp_loss", of_each_row)
    grouped, told = task.loss((images, rows), torch.Generator())
    grads = torch.autograd.grad(grouped, task.parts.flow.deep.proj_in.weight)[0]
    monkeypatch.setattr(train, "length_groups", lambda lengths, _: [list(range(len(lengths)))])
    together, told_together = task.loss((images, rows), torch.Generator())
    assert grouped.item() == pytest.approx(together.item(), abs=1e-5)
    assert told["nats_per_dim"].item() == pytest.approx(told_together["nats_per_dim"].item(), abs=1e-5)
    whole_grads = torch.autograd.grad(together, task.parts.flow.deep.proj_in.weight)[0]
    assert (grads - whole_grads).abs().max() <= 1e-5


def test_the_language_stage_learns_answers_and_not_questions():
    parts = tiny_parts()
    task = TASKS["vlm"](parts, RUN.stage("vlm"), 0)
    _, ids, labels = task.draw(range(4))
    special, answers = parts.tokenizer.special, labels != -100
    assert torch.equal(ids[answers], labels[answers]) and answers.any(1).all()
    for row in range(4):
        told = [parts.tokenizer.decode(part) for part in split(labels[row][answers[row]].tolist(), special.end)]
        assert told == [answer for _, answer in understanding_task(0, row)[1]]


def split(ids: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == end:
            parts.append([])
        else:
            parts[-1].append(i)
    assert not parts[-1], "every answer closes with the end token"
    return parts[:-1]


# -- several processes

TWO = """
import os, socket, sys
tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
import torch
torch.set_num_threads(1)
from dataclasses import replace
from safetensors.torch import save_file
from model_cases import tiny_run, whiten_quickly
from starflow2 import stages

whiten_quickly()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

def work(rank):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kept, calls, right = [], [], train.ngp_loss

    class Kept(train.T2iTask):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    def wrong_once(*args):
        calls.append(1)
        loss, nats = right(*args)  # the other process has no reason of its own to skip step 2
        return (loss + torch.inf if rank == 1 and len(calls) == 2 else loss), nats

    train.TASKS["t2i"], train.ngp_loss = Kept, wrong_once
    train.length_groups = lambda lengths, _: [list(range(len(lengths)))]
    train.fit(tiny_run(3, 3), "t2i", folder)
    save_file({k: v.contiguous() for k, v in kept[0].parts.flow.state_dict().items()}, f"{folder}/rank-{rank}")

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
    subprocess.run([sys.executable, "-c", TWO, str(Path(__file__).parent), str(folder)], check=True)
    first, second = load_file(folder / "rank-0"), load_file(folder / "rank-1")
    assert same(first, second)
    assert any(not torch.equal(v, load_parts(folder / "model").flow.state_dict()[k]) for k, v in first.items())
    assert [line.get("skipped") for line in lines(folder)] == [None, 1, 1]
