"""What a step takes: microbatches, activations computed twice, optimiser states, shares that count what they hold."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from model_cases import STAGES, tiny_components, tiny_folder, tiny_run
from starflow2 import nn as nn_module
from starflow2.errors import ConfigError, OutputError, TrainingError
from starflow2.flow import Affine, Flow
from starflow2.models import pretzel
from starflow2.models.checkpoint import load_components
from starflow2.models.pretzel import Pretzel
from starflow2.training import checkpoint as trainstate
from starflow2.training import loop as train
from starflow2.training import parallel
from starflow2.training.checkpoint import TrainState, store_for
from starflow2.training.config import OptimConfig, ShardConfig, StageConfig
from starflow2.training.parallel import Distributed, check_batch_divides, checkpoint_layers
from starflow2.training.task import Task
from starflow2.training.tasks import TASKS

RUN = tiny_run(4)


def stage_of(name: str, **changes: Any) -> StageConfig:
    return replace(RUN.stage(name), batch=8, **changes)


def gradients(name: str, batches: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, torch.Tensor]:
    """Gradients and told values of the first step, with noise that every picture brings along."""
    stage = stage_of(name, accumulate=batches, **changes)
    components = tiny_components(STAGES)
    monkeypatch.setattr(
        "starflow2.training.tasks._source_levels", lambda components, count, _: torch.full((count,), 0.2)
    )
    monkeypatch.setattr("starflow2.training.tasks.add_noise", lambda x, level, _: x + 0.1 * torch.sin(1e3 * x))
    monkeypatch.setattr(
        "starflow2.flow.noise.NoiseConfig.sample_levels", lambda self, count, _: torch.full((count,), 0.3)
    )
    task = TASKS[name](components, stage, 0)
    components.requires_grad_(False)
    task.trained.requires_grad_(True)
    checkpoint_layers(task, stage)
    group, share = Distributed(), 8 // batches
    data = [task.make_batch(range(i * share, (i + 1) * share)) for i in range(batches)]
    told = train._backward(task, stage, data, train.StepContext(0, "float32", "cpu", group), 0)
    grads = {k: p.grad for k, p in task.trained.named_parameters() if p.grad is not None}
    return {f"told/{k}": v for k, v in told.items()} | grads


@pytest.mark.parametrize("name", ["vlm", "adapter", "joint"])
def test_microbatches_give_the_loss_and_gradients_of_the_whole_batch(name, monkeypatch):
    """Documents hold unequally many replies and pictures, so that a mean of means would be another number."""
    whole, parts = gradients(name, 1, monkeypatch), gradients(name, 4, monkeypatch)
    assert whole.keys() == parts.keys()
    assert max(float((whole[k] - parts[k]).abs().max()) for k in whole) <= 1e-5
    monkeypatch.setattr(TASKS[name], "counts", lambda self, data: {})
    means = gradients(name, 4, monkeypatch)
    assert abs(float(means["told/loss"] - whole["told/loss"])) > 1e-3, "this batch would not tell the difference"


@pytest.mark.parametrize("name", ["t2i", "joint"])
@pytest.mark.parametrize("which", ["trained", "all"])
def test_activations_that_are_computed_twice_change_no_number(name, which, monkeypatch):
    monkeypatch.setattr(pretzel, "PREFIX_SHARE", 2.0)  # one pass with and without: two passes round otherwise
    kept = gradients(name, 1, monkeypatch)
    calls: list[int] = []
    again = parallel.checkpoint
    monkeypatch.setattr(parallel, "checkpoint", lambda *a, **k: calls.append(1) or again(*a, **k))
    twice = gradients(name, 1, monkeypatch, checkpoint_activations=which)
    assert all(torch.equal(kept[k], twice[k]) for k in kept) and kept.keys() == twice.keys()
    flow, language = 3, 2  # layers of the tiny model
    if name == "joint":
        assert len(calls) == flow + (language if which == "all" else 0)
    else:  # captions are read without gradients, in one group or two of similar length
        assert len(calls) in (flow, 2 * flow)


def test_recomputed_layers_keep_the_names_of_their_weights_and_can_be_copied():
    components = tiny_components(STAGES)
    names = list(components.state_dict())
    task = TASKS["joint"](components, RUN.stage("joint"), 0)
    stage = stage_of("joint", checkpoint_activations="all")
    checkpoint_layers(task, stage)
    checkpoint_layers(task, stage)
    assert list(components.state_dict()) == names
    twin: Flow = copy.deepcopy(components.flow)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert type(twin.deep.body.layers[0]).__mro__[1:] == type(components.flow.deep.body.layers[0]).__mro__[1:]
    latents = torch.randn(1, 64, 4)
    assert not torch.equal(twin.shallow(latents, torch.ones(1))[0], components.flow.shallow(latents, torch.ones(1))[0])
    assert isinstance(Pretzel(components.vlm, components.flow, components.joints).in_float64(), Pretzel)


def test_shares_must_be_equal_and_settings_must_fit():
    with pytest.raises(TrainingError, match="8 cannot be shared equally by 1 processes of 3"):
        check_batch_divides(stage_of("t2i", accumulate=3), Distributed())
    with pytest.raises(ConfigError, match=r"shard\.processes is 2 under mode fsdp"):
        ShardConfig(mode="fsdp", processes=2)


@pytest.mark.parametrize(("states", "package"), [("8bit", "torchao"), ("8bit-bnb", "bitsandbytes")])
def test_moments_of_eight_bits_without_their_library_say_what_to_install(states, package, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)  # as if it were not there
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        train.adam([nn.Parameter(torch.zeros(2))], OptimConfig(optimizer_state_dtype=states))


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
        return TrainState(trained, {}, [train.adam(list(trained.parameters()), o)])

    whole, broken, plain = fresh(config), fresh(config), fresh(replace(config, optimizer_state_dtype="float32"))
    stepped(whole, 4)
    stepped(plain, 4)
    stepped(broken, 2)
    tensors = {k: v.detach().clone() for k, v in broken.tensors().items()}
    assert tensors[f"optim/0/0/{moment}"].dtype == torch.uint8
    again = fresh(config)
    again.fill(tensors, {"step": "2"}, tmp_path)
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


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_trains_in_shards_as_it_does_in_copies(name, tmp_path, monkeypatch):
    monkeypatch.setattr("starflow2.training.tasks.length_groups", lambda lengths, _: [list(range(len(lengths)))])
    told: dict[str, list[float]] = {}
    for mode in ("none", "fsdp"):
        folder = tiny_folder(tmp_path / mode, STAGES[: STAGES.index(name)])
        run = tiny_run(3, 2)
        shard = ShardConfig(mode=mode, frozen="sharded" if mode == "fsdp" else "replicated")  # type: ignore[arg-type]
        run = replace(run, stages=tuple(replace(s, shard=shard, optim=PLAIN) for s in run.stages))
        losses: list[float] = []
        train.fit(run, name, folder, report=lambda line, to=losses: to.append(line.metrics["loss"]))
        told[mode] = losses
    assert told["none"] == pytest.approx(told["fsdp"], abs=1e-5) and len(told["none"]) == 3
    one, other = (load_components(tmp_path / mode / "model").state_dict() for mode in ("none", "fsdp"))
    assert one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


@pytest.mark.usefixtures("_alone")
def test_under_bfloat16_layers_run_in_it_and_affine_maths_and_weights_stay_float32(tmp_path, monkeypatch):
    affine, inside = set[torch.dtype](), set[torch.dtype]()
    normalize, attend = Affine.normalize, nn_module.attention

    def seen(self: Affine, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, logdet = normalize(self, u)
        affine.update(t.dtype for t in (self.mu, self.log_scale, z, logdet))
        return z, logdet

    def attended(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        inside.add(q.dtype)
        return attend(q, *rest)

    monkeypatch.setattr(Affine, "normalize", seen)
    monkeypatch.setattr(nn_module, "attention", attended)
    run = tiny_run(1, 1, precision="bfloat16")
    run = replace(run, stages=tuple(replace(s, shard=ShardConfig(mode="fsdp"), optim=PLAIN) for s in run.stages))
    kept: list[TrainState] = []
    new_state = train._new_state
    monkeypatch.setattr(train, "_new_state", lambda *a: kept.append(new_state(*a)) or kept[-1])
    train.fit(run, "joint", tiny_folder(tmp_path, STAGES[:5]))
    assert affine == {torch.float32} and torch.bfloat16 in inside
    moments = {v.dtype for o in kept[0].optimizers for s in o.state_dict()["state"].values() for v in s.values()}
    assert {p.dtype for p in kept[0].trained.parameters()} == moments == {torch.float32}


@pytest.mark.usefixtures("_alone")
def test_a_run_cannot_change_between_copies_and_shards_in_silence(tmp_path):
    stage, sharded = RUN.stage("t2i"), replace(RUN.stage("t2i"), shard=ShardConfig(mode="fsdp"))
    shards = Distributed.from_environment("cpu", sharded.shard)
    (tmp_path / "state-t2i").mkdir()
    with pytest.raises(TrainingError, match=r"another shard\.mode than none"):
        store_for(tmp_path, stage, Distributed())
    (tmp_path / "state-t2i").rmdir()
    (tmp_path / "state-t2i.safetensors").touch()
    with pytest.raises(TrainingError, match=r"another shard\.mode than fsdp"):
        store_for(tmp_path, sharded, shards)
    with pytest.raises(TrainingError, match="8bit and shard"):
        check_batch_divides(replace(sharded, optim=OptimConfig(optimizer_state_dtype="8bit")), shards)
    with pytest.raises(TrainingError, match="no process holds whole weights"):
        check_batch_divides(sharded, shards, evaluates=True)


@pytest.mark.usefixtures("_alone")
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_of_shards(tmp_path, monkeypatch):
    run = tiny_run(6, 2)
    run = replace(run, stages=tuple(replace(s, shard=ShardConfig(mode="fsdp")) for s in run.stages))
    folder, saved, right = tiny_folder(tmp_path, STAGES[:5]), [], trainstate.async_save

    def full(tensors: Any, **options: Any) -> Any:
        saved.append(1)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        return right(tensors, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainstate, "async_save", full)
        with pytest.raises(OutputError, match="No space left"):
            train.fit(run, "joint", folder)
    assert (folder / "state-joint" / "2" / "settings.json").is_file()
    steps: list[int] = []
    train.fit(run, "joint", folder, report=lambda line: steps.append(line.step))
    assert steps == [3, 4, 5, 6]
