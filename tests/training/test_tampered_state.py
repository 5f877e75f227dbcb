"""A training state is compared with the state it goes into before anything of it is used."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from run_cases import RUN
from starflow2.errors import CheckpointError, StarFlowError, TrainingError
from starflow2.models.tensor_file import load_signed, save_tensors
from starflow2.training.checkpoint import FileStore, Resume, ShardStore
from starflow2.training.config import OptimConfig
from starflow2.training.parallel import Distributed
from starflow2.training.shard_index import IndexReader
from starflow2.training.state import TrainState

STAGE = replace(RUN.stage("t2i"), optim=OptimConfig(ema=0.9, matrix_lr=1e-3))
Tensors = dict[str, Tensor]
Settings = dict[str, str]


def fresh() -> TrainState:
    """A state with both optimisers, an average, and a count that is a whole number."""
    torch.manual_seed(0)
    trained = nn.ModuleDict({"layers": nn.Linear(4, 3), "norm": nn.BatchNorm1d(3)})
    return TrainState.fresh(trained, STAGE.optim, Distributed())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = fresh()
    for _ in range(2):
        state.trained["norm"](state.trained["layers"](torch.randn(5, 4))).square().sum().backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.step += 1
        state.update_average(STAGE.optim.ema)
    store = FileStore(tmp_path_factory.mktemp("saved"), STAGE, Distributed())
    store.save(state, state.settings(STAGE, {"precision": "float32", "seed": "0"}))
    return store.file


def resume(path: Path) -> TrainState:
    store, state = FileStore(path.parent, STAGE, Distributed()), fresh()
    found = store.find(Resume(), RUN)
    assert found is not None and found.path == path
    store.load(state, found)
    return state


def refusal(saved: Path, path: Path, change: Callable[[Tensors, Settings], object]) -> str:
    tensors, settings = load_signed(saved)
    change(tensors, settings)
    save_tensors(tensors, path, settings)
    with pytest.raises((TrainingError, CheckpointError)) as caught:
        resume(path)
    assert path.name in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


def test_a_state_comes_back_to_the_bit(saved, tmp_path):
    state, tensors = resume(saved), load_signed(saved)[0]
    own = state.tensors()
    assert own.keys() == tensors.keys() and all(torch.equal(own[k], tensors[k]) for k in own)
    assert (state.step, state.skipped) == (2, 0)


def without(tensors: Tensors, prefix: str) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]


def put(name: str, value: Tensor | Callable[[Tensor], Tensor]) -> Callable[[Tensors, Settings], None]:
    def change(tensors: Tensors, _: Settings) -> None:
        assert name in tensors
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def spoilt(tensor: Tensor) -> Tensor:
    return tensor.clone().index_fill_(0, torch.tensor([0]), torch.nan)


WEIGHT, AVERAGE, MOMENT, MUON = (
    "weights/layers.weight",
    "ema/layers.weight",
    "optim/0/0/exp_avg",
    "optim/1/0/momentum_buffer",
)
TENSORS: dict[str, Callable[[Tensors, Settings], object]] = {
    "a moment too short for its weight": put(MOMENT, torch.zeros(1)),
    "a moment too long": put(MOMENT, torch.zeros(4_000)),
    "a squared moment of another shape": put("optim/0/1/exp_avg_sq", torch.zeros(1, 3)),
    "a squared moment below zero": put("optim/0/0/exp_avg_sq", lambda t: t - 1),
    "a moment of Muon of another shape": put(MUON, torch.zeros(4, 3)),
    "a moment in half precision": put(MOMENT, lambda t: t.half()),
    "a moment that is NaN": put(MOMENT, spoilt),
    "one moment missing": lambda t, _: t.pop(MOMENT),
    "a moment that no optimiser has": lambda t, _: t.update({"optim/0/0/third": t[MOMENT].clone()}),
    "a parameter that no optimiser has": lambda t, _: t.update({"optim/0/77/exp_avg": torch.zeros(3)}),
    "a moment of no parameter": lambda t, _: t.update({"optim/0/x/exp_avg": torch.zeros(3)}),
    "an optimiser too many": lambda t, _: t.update({"optim/2/0/exp_avg": torch.zeros(3)}),
    "a count of steps beyond those taken": put("optim/0/0/step", torch.tensor(99.0)),
    "all moments missing": lambda t, _: without(t, "optim/"),
    "one optimiser's moments missing": lambda t, _: without(t, "optim/1/"),
    "the average missing": lambda t, _: without(t, "ema/"),
    "one averaged weight missing": lambda t, _: t.pop(AVERAGE),
    "an averaged weight of another shape": put(AVERAGE, torch.zeros(3, 5)),
    "an averaged weight that is NaN": put(AVERAGE, spoilt),
    "a weight that is NaN": put(WEIGHT, spoilt),
    "weights in whole numbers": put(WEIGHT, lambda t: t.int()),
    "a weight of another shape": put(WEIGHT, torch.zeros(4, 3)),
    "a weight missing": lambda t, _: t.pop(WEIGHT),
    "a weight too many": lambda t, _: t.update({"weights/more": torch.zeros(2)}),
    "a count as a float": put("weights/norm.num_batches_tracked", lambda t: t.float()),
}
SETTINGS: dict[str, dict[str, str]] = {
    "more steps than the stage has": {"step": "99"},
    "steps below zero": {"step": "-1"},
    "steps that are no number": {"step": "two"},
    "steps with a fraction": {"step": "2.0"},
    "a seed that is no number": {"seed": "x"},
    "skipped that is no number": {"skipped": ""},
    "more skipped than taken": {"skipped": "3"},
    "a stage that is no JSON": {"stage": "{"},
    "a stage that is a list": {"stage": "[]"},
    "a stage with NaN": {"stage": '{"steps": NaN}'},
    "a stage without an optimiser": {"stage": json.dumps({"name": "t2i", "optim": 5})},
    "a precision that there is not": {"precision": "int4"},
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_state_with_a_tensor_that_is_not_the_runs_is_refused(saved, tmp_path, case):
    refusal(saved, tmp_path / "state-t2i.safetensors", TENSORS[case])


@pytest.mark.parametrize("case", SETTINGS)
def test_a_state_with_a_setting_that_cannot_be_is_refused(saved, tmp_path, case):
    refusal(saved, tmp_path / "state-t2i.safetensors", lambda _, settings: settings.update(SETTINGS[case]))


@pytest.mark.parametrize("place", range(6))
def test_a_flipped_bit_is_noticed(saved, tmp_path, place):
    data = bytearray(saved.read_bytes())
    data[int((place + 0.5) / 6 * len(data))] ^= 1
    (tmp_path / "state-t2i.safetensors").write_bytes(data)
    with pytest.raises(StarFlowError, match="state"):
        resume(tmp_path / "state-t2i.safetensors")


# -- a sharded checkpoint


def test_an_index_that_names_a_function_is_refused_before_it_is_called(tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "exploded",))

    for content in (pickle.dumps(Bomb()), pickle.dumps({"a": 1}), pickle.dumps([print]), b"", b"\x80rubbish"):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(TrainingError, match="not the index of a checkpoint"):
            IndexReader(tmp_path, {}).read_metadata()
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two checkpoints in shards, of one process."""
    base = tmp_path_factory.mktemp("sharded")
    dist.init_process_group("gloo", init_method=f"file://{base}/meet", rank=0, world_size=1)
    store, state = ShardStore(base, replace(STAGE, keep_last=2), Distributed()), fresh()
    for _ in range(2):
        state.step += 1
        state.skipped += 1  # the optimisers have no moments
        with torch.no_grad():
            state.trained["layers"].weight.add_(1)
        store.save(state, state.settings(STAGE, {"precision": "float32", "seed": "0"}))
        store.close()
    yield base
    dist.destroy_process_group()


def from_shards(folder: Path) -> TrainState:
    store, state = FileStore(folder, STAGE, Distributed()), fresh()
    found = store.find(Resume(), RUN)
    assert found is not None and found.path.is_dir()
    store.load(state, found)
    return state


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


SHARDS: dict[str, Callable[[Path], object]] = {
    "a flipped bit at the begin": lambda p: flip(p, 0.0),
    "a flipped bit in the middle": lambda p: flip(p, 0.5),
    "a flipped bit at the end": lambda p: flip(p, 0.999),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-50]),
    "empty": lambda p: p.write_bytes(b""),
    "gone": lambda p: p.unlink(),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "of another step": lambda p: shutil.copy(next(p.parents[1].glob("1/*.distcp")), p),
    "settings without digests": lambda p: in_settings(p, "files", None),
    "settings with no digests": lambda p: in_settings(p, "files", "{}"),
    "digests that are no JSON": lambda p: in_settings(p, "files", "{"),
    "digests that are a list": lambda p: in_settings(p, "files", "[]"),
}


def in_settings(shard: Path, name: str, value: str | None) -> None:
    path = shard.with_name("settings.json")
    settings = json.loads(path.read_text("utf-8"))
    settings.pop(name)
    path.write_text(json.dumps(settings | ({} if value is None else {name: value})), encoding="utf-8")


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_are_not_what_was_written_are_refused(sharded, tmp_path, case):
    shutil.copytree(sharded, tmp_path / "run")
    (shard,) = (tmp_path / "run" / "state-t2i" / "2").glob("*.distcp")
    SHARDS[case](shard)
    with pytest.raises(TrainingError) as caught:
        from_shards(tmp_path / "run")
    assert "--resume none" in str(caught.value) and str(caught.value).isprintable()


def test_the_shards_themselves_load(sharded):
    assert from_shards(sharded).step == 2
    assert torch.equal(from_shards(sharded).trained["layers"].weight, fresh().trained["layers"].weight + 2)
