"""Microbatches, recomputed activations, optimiser states of 8 bits, and one process with the code of many."""

from __future__ import annotations

import copy
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from model_cases import STAGES, tiny_components, tiny_folder, tiny_run
from starflow2.errors import ConfigError, OutputError, TrainingError
from starflow2.flow import Affine
from starflow2.models.checkpoint import load_components
from starflow2.training import checkpoint
from starflow2.training.config import OptimConfig, ShardConfig, StageConfig
from starflow2.training.loop import fit
from starflow2.training.parallel import (
    Distributed,
    check_batch_divides,
    checkpoint_activations,
    transformer_layers,
)
from starflow2.training.state import TrainState, adamw
from starflow2.training.task import Task
from starflow2.training.tasks import TASKS, JointTask, T2iTask
from starflow2.training.trainer import Trainer

RUN = tiny_run(4)


def stage_of(name: str, **changes: Any) -> StageConfig:
    return replace(RUN.stage(name), batch=8, **changes)


def task_of(name: str, seed: int = 0, **changes: Any) -> Task:
    """The task of a stage on woken components that are frozen but for what it trains."""
    components = tiny_components(STAGES)
    task = TASKS[name](components, stage_of(name, **changes), seed)
    components.requires_grad_(False)
    task.trained.requires_grad_(True)
    return task


def trainer_of(task: Task, rank: int = 0) -> Trainer:
    """A trainer in float32 that says it is process `rank`."""
    trainer = Trainer.prepare(task, Distributed(), device="cpu", precision="float32")
    trainer.group = Distributed(rank, 1)
    return trainer


def gradients(task: Task) -> dict[str, torch.Tensor]:
    """Gradients by the names that weights have in checkpoints."""
    return {k: p.grad for k, p in task.trained.state_dict(keep_vars=True).items() if p.grad is not None}


def noise(task: Task, microbatch: int, step: int = 0) -> torch.Generator:
    """The generator of a microbatch: its seed names the run's seed, the stage, the microbatch and the step."""
    return torch.Generator().manual_seed(zlib.crc32(f"{task.seed}/{task.stage.name}/{microbatch}/{step}".encode()))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["vlm", "adapter", "joint"])
def test_microbatches_count_by_the_replies_and_images_they_hold(name, rank):
    """Documents hold unequally many of both, so that a mean of means would be another number."""
    task = task_of(name, seed=3, accumulate=4)
    data = [task.make_batch(range(i, i + 2)) for i in range(0, 8, 2)]
    means = trainer_of(task, rank).forward_backward(data)
    found = gradients(task)
    task.trained.zero_grad(set_to_none=True)

    losses = [task.loss(d, noise(task, 4 * rank + i)) for i, d in enumerate(data)]
    counts = {term: [task.counts(d)[term] for d in data] for term in task.counts(data[0])}

    def mean(term: str, values: list[torch.Tensor]) -> torch.Tensor:
        return sum(n * value for n, value in zip(counts[term], values, strict=True)) / sum(counts[term])

    if name == "joint":
        flow, text = (mean(term, [metrics[term] for _, metrics in losses]) for term in ("flow", "text"))
        loss = flow + task.stage.text_weight * text
    else:
        loss = mean("text", [loss for loss, _ in losses])
    loss.backward()
    # the sums are the same but for their order
    assert means["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    assert found.keys() == gradients(task).keys()
    assert max(float((found[k] - g).abs().max()) for k, g in gradients(task).items()) <= 1e-5
    plain = sum(loss for loss, _ in losses) / 4
    assert abs((plain - loss).item()) > 1e-3, "a mean of means is another number"


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 1}, {"step": 1}])
def test_noise_is_another_one_for_another_seed_process_or_step(other):
    def loss(seed: int = 0, rank: int = 0, step: int = 0) -> float:
        task = task_of("joint", seed=seed)
        trainer = trainer_of(task, rank)
        trainer.state.step = step
        data = TASKS["joint"](task.components, task.stage, 0).make_batch(range(4))  # the same for every seed
        return trainer.forward_backward([data])["loss"].item()

    assert loss() == loss() != loss(**other)


@pytest.mark.parametrize("name", ["t2i", "joint"])
@pytest.mark.parametrize("which", ["trained", "all"])
def test_recomputed_activations_change_no_number(name, which):
    """The same operations on the same shapes run once more; where memory lies may still change the order of a sum."""
    found, runs = {}, {}
    for mode in ("none", which):
        task = task_of(name, checkpoint_activations=mode)
        if isinstance(task, JointTask):
            task.pretzel = task.pretzel.in_one_pass()  # in both: two passes round otherwise
        calls: list[nn.Module] = []
        layers = transformer_layers(task.trained) + task.components.vlm.layers
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, args, to=calls: to.append(layer))
        means = trainer_of(task).forward_backward([task.make_batch(range(8))])
        found[mode] = means | gradients(task)
        runs[mode] = [calls.count(layer) for layer in layers]
    # captions are read without gradients, so there is nothing to recompute in the language model
    recomputed = 5 if (name, which) == ("joint", "all") else 3
    assert runs[which] == [2 * n for n in runs["none"][:recomputed]] + runs["none"][recomputed:]
    assert found["none"].keys() == found[which].keys()
    for key, value in found["none"].items():
        torch.testing.assert_close(found[which][key], value, rtol=1e-5, atol=1e-7)


def test_recomputed_layers_keep_the_names_of_their_weights_and_can_be_copied():
    task = task_of("joint", checkpoint_activations="all")
    names, number = list(task.components.state_dict()), len(list(task.components.modules()))
    checkpoint_activations(task)
    wrapped = len(list(task.components.modules()))
    checkpoint_activations(task)
    assert list(task.components.state_dict()) == names
    assert number < wrapped == len(list(task.components.modules())), "a second call wraps nothing again"
    flow, twin = task.components.flow, copy.deepcopy(task.components.flow)
    latents = torch.randn(1, 64, 4)
    assert torch.equal(twin.shallow(latents, torch.ones(1))[0], flow.shallow(latents, torch.ones(1))[0])
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not torch.equal(twin.shallow(latents, torch.ones(1))[0], flow.shallow(latents, torch.ones(1))[0])
    flow.load_state_dict(tiny_components(STAGES).flow.state_dict())


def test_shares_must_be_equal_and_settings_must_fit():
    with pytest.raises(TrainingError, match="8 cannot be divided equally among 1 processes of 3"):
        check_batch_divides(stage_of("t2i", accumulate=3), Distributed())
    with pytest.raises(ConfigError, match=r"shard\.processes is 2 under mode fsdp"):
        ShardConfig(mode="fsdp", processes=2)


@pytest.mark.parametrize(("states", "package"), [("8bit", "torchao"), ("8bit-bnb", "bitsandbytes")])
def test_moments_of_eight_bits_without_their_library_say_what_to_install(states, package, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)  # as if it were not there
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        adamw([nn.Parameter(torch.zeros(2))], OptimConfig(optimizer_state_dtype=states))


def stepped(state: TrainState, steps: int) -> None:
    for i in range(steps):
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(i + state.step))
        state.trained["a"](x).square().mean().backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state.step += steps


@pytest.mark.slow
@pytest.mark.timeout(600)  # torchao compiles its step
@pytest.mark.parametrize(
    ("states", "package", "moment"),
    [("8bit", "torchao", "exp_avg/codes"), ("8bit-bnb", "bitsandbytes", "__bnb_optimizer_quant_state__/state1")],
)
def test_moments_of_eight_bits_are_small_close_and_go_on_bit_for_bit(states, package, moment, tmp_path):
    pytest.importorskip(package)
    config = OptimConfig(lr=1e-3, optimizer_state_dtype=states)

    def fresh(o: OptimConfig) -> TrainState:
        torch.manual_seed(1)
        trained = nn.ModuleDict({"a": nn.Linear(128, 64)})
        return TrainState(trained, {}, [adamw(list(trained.parameters()), o)])

    whole, broken, plain = fresh(config), fresh(config), fresh(replace(config, optimizer_state_dtype="float32"))
    stepped(whole, 4)
    stepped(plain, 4)
    stepped(broken, 2)
    tensors = {k: v.detach().clone() for k, v in broken.tensors().items()}
    assert tensors[f"optim/0/0/{moment}"].dtype == torch.uint8
    again = fresh(config)
    again.load_tensors(tensors, {"step": "2"}, tmp_path)
    stepped(again, 2)
    one, other = (s.trained["a"].weight for s in (whole, again))
    assert torch.equal(one, other)
    assert (one - plain.trained["a"].weight).abs().max() < 2e-3


def test_drawings_are_counted_by_their_pictures():
    task: Task = TASKS["t2i"](tiny_components(STAGES), RUN.stage("t2i"), 0)
    assert task.counts(task.make_batch(range(2))) == {"images": 2}


# -- one process with the code of many

PLAIN = OptimConfig(lr=1e-3, matrix_lr=0.0, warmup_steps=1)


@pytest.fixture
def _alone() -> Iterator[None]:
    """Takes down the process group of one that shards without torchrun begin."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class OneGroup(T2iTask):
    """Reads all captions of a batch together, as under shards, where groups would draw their noise in another order."""

    def caption_groups(self, rows):
        return [list(range(len(rows)))]


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("name", "near"), [*((name, 0.0) for name in STAGES), ("joint", 1.0)])
def test_every_stage_trains_in_shards_as_it_does_in_copies(name, near, tmp_path, monkeypatch):
    """near: weight of the distance to the flow of stage t2i, for which every process keeps a whole copy of that."""
    monkeypatch.setitem(TASKS, "t2i", OneGroup)
    losses: dict[str, list[float]] = {"none": [], "fsdp": []}
    for mode in losses:
        folder = tiny_folder(tmp_path / mode, STAGES[: STAGES.index(name)])
        run = tiny_run(3, 2)
        frozen = "sharded" if mode == "fsdp" and not near else "replicated"
        shard = ShardConfig(mode=mode, frozen=frozen)  # type: ignore[arg-type]
        stages = (replace(s, shard=shard, optim=PLAIN, kl_to_t2i=near * (s.name == "joint")) for s in run.stages)
        run = replace(run, stages=tuple(stages))
        fit(run, name, folder, report=lambda line, to=losses[mode]: to.append(line.metrics["loss"]))
    assert losses["none"] == pytest.approx(losses["fsdp"], abs=1e-5) and len(losses["none"]) == 3
    one, other = (load_components(tmp_path / mode / "model").state_dict() for mode in ("none", "fsdp"))
    assert one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


@pytest.mark.usefixtures("_alone")
def test_under_bfloat16_layers_run_in_it_and_affine_maths_weights_and_moments_stay_float32(tmp_path, monkeypatch):
    affine, inside = set[torch.dtype](), set[torch.dtype]()
    normalize = Affine.normalize

    def recorded(self: Affine, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, logdet = normalize(self, u)
        affine.update(t.dtype for t in (self.mu, self.log_scale, z, logdet))
        return z, logdet

    def watched(*args: Any, **options: Any) -> JointTask:
        task = JointTask(*args, **options)
        for layer in task.components.flow.deep.body.layers:
            layer.register_forward_hook(lambda layer, args, out: inside.add(out.dtype))
        return task

    monkeypatch.setattr(Affine, "normalize", recorded)
    monkeypatch.setitem(TASKS, "joint", watched)
    run = tiny_run(1, 1, precision="bfloat16")
    run = replace(run, stages=tuple(replace(s, shard=ShardConfig(mode="fsdp"), optim=PLAIN) for s in run.stages))
    folder = tiny_folder(tmp_path, STAGES[:5])
    fit(run, "joint", folder)
    assert affine == {torch.float32} and torch.bfloat16 in inside
    index = FileSystemReader(folder / "state-joint" / "1").read_metadata().state_dict_metadata
    dtypes = {key.split("/")[0]: value.properties.dtype for key, value in index.items() if hasattr(value, "properties")}
    assert dtypes == {"weights": torch.float32, "ema": torch.float32, "optim": torch.float32}


@pytest.mark.usefixtures("_alone")
def test_moments_of_eight_bits_cannot_be_divided(tmp_path):
    sharded = replace(RUN.stage("t2i"), shard=ShardConfig(mode="fsdp"), optim=OptimConfig(optimizer_state_dtype="8bit"))
    with pytest.raises(TrainingError, match="8bit, which works with"):
        check_batch_divides(sharded, Distributed.from_environment("cpu", sharded.shard))


@pytest.mark.usefixtures("_alone")
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_of_shards(tmp_path, monkeypatch):
    run = tiny_run(6, 2)
    run = replace(run, stages=tuple(replace(s, shard=ShardConfig(mode="fsdp")) for s in run.stages))
    folder, saved, right = tiny_folder(tmp_path, STAGES[:5]), [], checkpoint.async_save

    def full(tensors: Any, **options: Any) -> Any:
        saved.append(1)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        return right(tensors, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "async_save", full)
        with pytest.raises(OutputError, match="No space left"):
            fit(run, "joint", folder)
    assert (folder / "state-joint" / "2" / "settings.json").is_file()
    steps: list[int] = []
    fit(run, "joint", folder, report=lambda line: steps.append(line.step))
    assert steps == [3, 4, 5, 6]
