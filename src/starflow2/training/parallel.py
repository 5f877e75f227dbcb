"""The processes of a run: whole copies that average gradients, or one model in shards (FSDP2), behind one interface.

A step's batch is cut into equal shares of documents, `accumulate` for each process; share number s has the same
documents and the same noise whichever process it falls to. With data and checkpoints, the home of torch.distributed.
Not here: the loop, optimiser settings, files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from starflow2.errors import ConfigError, TrainingError
from starflow2.models.qwen import QwenStream
from starflow2.nn import CausalStack, at_least_fp32
from starflow2.training.config import ShardConfig, StageConfig
from starflow2.training.task import LossAndMetrics, LossWeights, Task

__all__ = [
    "Distributed",
    "FullyShardedDistributed",
    "check_batch_divides",
    "checkpoint_layers",
    "transformer_layers",
    "unsharded_parameters",
]


class Distributed:
    """The processes of a run, one or those that torchrun started; each holds all weights and takes its shares."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @staticmethod
    def from_environment(device: str, shard: ShardConfig | None = None) -> Distributed:
        """The group that torchrun describes, or this process alone. Raises ConfigError where shards do not fit."""
        world, is_sharded = int(os.environ.get("WORLD_SIZE", "1")), shard is not None and shard.mode != "none"
        if world == 1 and not is_sharded:
            return Distributed()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:nccl"
            if world == 1:
                dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
            else:
                dist.init_process_group(backend)
        if shard is None or not is_sharded:
            return Distributed(dist.get_rank(), world)
        return FullyShardedDistributed(dist.get_rank(), world, shard, device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def shard_size(self) -> int:
        """Over how many processes one copy of the model is spread."""
        return 1

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def broadcast_choice(self, choice: str) -> str:
        """The first process's choice, for what each would measure for itself."""
        choices = [choice]
        if self.world > 1:
            dist.broadcast_object_list(choices, 0)
        return choices[0]

    def all_gather(self, value: object) -> list[object]:
        """What every process has, by rank."""
        values: list[object] = [value]
        if self.world > 1:
            values *= self.world
            dist.all_gather_object(values, value)
        return values

    # -- weights

    def sharded_components(self, stage: StageConfig) -> tuple[str, ...]:
        """The parts of a model whose layers `place` cuts in shards: they may wait in their files until then."""
        return ()

    def prepare(self, task: Task, precision: str, device: str) -> None:
        """Make the trained weights of all processes the first one's, on `device` and ready for `loss`."""
        task.trained.to(device)
        if self.world > 1:
            for value in task.trained.state_dict().values():
                dist.broadcast(value, 0)

    def optimizer(
        self, kind: type[torch.optim.Optimizer], params: list[nn.Parameter], settings: dict[str, Any]
    ) -> torch.optim.Optimizer:
        """An optimiser whose work and state the processes divide among themselves."""
        if self.world == 1:
            return kind(params, **settings)
        return ZeroRedundancyOptimizer(params, optimizer_class=kind, **settings)

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        """Inside, the first process holds all of `module`'s weights, to be saved; all processes must enter."""
        yield

    # -- a step

    def shares(self, task: Task, batches: Sequence[Any], device: str) -> list[LossWeights]:
        """How much each of this process's shares counts in every term of the loss, by counts of all processes.

        A term is a mean over what a share holds of it, replies for one; the mean of such means is not the mean.
        """
        counts = [task.counts(data) for data in batches]
        names = list(counts[0])
        if not names or self.world * len(batches) == 1:
            return [LossWeights() for _ in counts]
        total = torch.tensor([[float(c[name]) for name in names] for c in counts], device=device).sum(0)
        if self.world > 1:
            dist.all_reduce(total)
        all_of = dict(zip(names, total.tolist(), strict=True))
        shares = self.world * len(batches)
        return [LossWeights({k: n * shares / max(all_of[k], 1.0) for k, n in c.items()}) for c in counts]

    def loss(self, task: Task, data: Any, generator: torch.Generator, share: LossWeights) -> LossAndMetrics:
        """The loss of a share and what to tell about it."""
        return task.loss(data, generator, share)

    def set_gradient_sync(self, is_last: bool) -> None:
        """To be called before each share of a step: gradients are exchanged with the last."""

    @torch.no_grad()
    def reduce_gradients(
        self, trained: nn.Module, asked: bool, told: dict[str, Tensor]
    ) -> tuple[bool, dict[str, Tensor]]:
        """Average gradients and running statistics over processes; was any asked to stop, and the mean of `told`.

        The loss is among it because all must agree whether it is finite: a step is taken by all or by none.
        """
        if self.world == 1:
            return asked, told
        values = self._gradients([p for p in trained.parameters() if p.requires_grad])
        return self._averaged(values, trained, asked, told)

    def _averaged(
        self, values: list[Tensor], trained: nn.Module, asked: bool, told: dict[str, Tensor]
    ) -> tuple[bool, dict[str, Tensor]]:
        values = values + [b for b in trained.buffers() if b.is_floating_point()]
        like = next(iter(told.values()))
        flags = at_least_fp32(torch.stack([torch.full_like(like, float(asked)), *told.values()]))
        flat = torch.cat([v.flatten() for v in values] + [flags]) / self.world
        dist.all_reduce(flat)
        parts = flat.split([v.numel() for v in values] + [len(flags)])
        for value, part in zip(values, parts, strict=False):
            value.copy_(part.view_as(value))
        return bool(parts[-1][0] > 0), dict(zip(told, parts[-1][1:].unbind(), strict=True))

    def _gradients(self, params: list[nn.Parameter]) -> list[Tensor]:
        """The gradients to be averaged, the same ones everywhere: zero for what only other processes' data used."""
        used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        dist.all_reduce(used)
        for p, count in zip(params, used.tolist(), strict=True):
            if count and p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in params if p.grad is not None]

    def clip(self, trained: nn.Module, largest: float) -> Tensor:
        """Clip the gradients' global norm; returns what it was."""
        return nn.utils.clip_grad_norm_(trained.parameters(), largest)


# -- shards ---------------------------------------------------------------------------------------------


class FullyShardedDistributed(Distributed):
    """The same with every weight, gradient and optimiser state cut into shards, one for each process (FSDP2).

    Transformer layers are gathered one by one; everything else is one unit that stays gathered during a step, so
    that a process without a picture, which calls no adapter, still takes part in every exchange. Under bfloat16 the
    layers that train are gathered and run in it; weights, heads and the affine maths stay float32. Frozen layers stay
    in the format they are held in. Layers are whole one at a time, while they are cut.
    """

    def __init__(self, rank: int, world: int, shard: ShardConfig, device: str) -> None:
        super().__init__(rank, world)
        self.shard, self.mesh = shard, _mesh(shard, world, device)
        self.root: _Loss | None = None

    @property
    def shard_size(self) -> int:
        return self.mesh.size(self.mesh.ndim - 1)

    def sharded_components(self, stage: StageConfig) -> tuple[str, ...]:
        trained = ("flow",) if stage.name in ("t2i", "joint") else ()
        # a fresh stage t2i measures states of the language model before anything is cut
        frozen = ("vlm",) if self.shard.frozen == "sharded" and stage.name in ("adapter", "joint") else ()
        return trained + frozen

    def prepare(self, task: Task, precision: str, device: str) -> None:
        half = torch.bfloat16 if precision == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
        units = transformer_layers(task.trained)
        language = task.components.vlm.layers if self.shard.frozen == "sharded" else []
        frozen = [layer for layer in language if not any(layer is unit for unit in units)]
        for layers, how in ((units, policy), (frozen, as_they_are)):
            for layer in layers:
                if how is policy:
                    self._equalize(layer.parameters(), device)
                fully_shard(layer, mesh=self.mesh, mp_policy=how, reshard_after_forward=self.shard.reshards)
        self._equalize((p for p in task.trained.parameters() if not isinstance(p, DTensor)), device)
        self._equalize(task.trained.buffers(), device)
        root = _Loss(task, units, frozen)
        fully_shard(root, mesh=self.mesh, mp_policy=as_they_are)
        self.root = root

    @torch.no_grad()
    def _equalize(self, values: Iterable[Tensor], device: str) -> None:
        """Give all processes the first one's values, on `device`; the others never read theirs from a mapped file."""
        for value in values:
            if self.world == 1:
                value.data = value.detach().to(device)
                continue
            first = value.detach().to(device, copy=True) if self.is_first else torch.empty_like(value, device=device)
            dist.broadcast(first, 0)
            value.data = first

    def optimizer(
        self, kind: type[torch.optim.Optimizer], params: list[nn.Parameter], settings: dict[str, Any]
    ) -> torch.optim.Optimizer:
        return kind(params, **settings)  # its state is sharded as the weights are

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        with unsharded_parameters(module, keep=self.is_first):
            yield

    def loss(self, task: Task, data: Any, generator: torch.Generator, share: LossWeights) -> LossAndMetrics:
        assert self.root is not None
        return cast(LossAndMetrics, self.root(data, generator, share))

    def set_gradient_sync(self, is_last: bool) -> None:
        cast(FSDPModule, self.root).set_requires_gradient_sync(is_last)

    @torch.no_grad()
    def reduce_gradients(
        self, trained: nn.Module, asked: bool, told: dict[str, Tensor]
    ) -> tuple[bool, dict[str, Tensor]]:
        assert self.root is not None
        used = torch.tensor(self.root.used, device=next(iter(told.values())).device)
        if self.world > 1:
            dist.all_reduce(used)
        self.root.forget_unused(used.tolist())
        return self._averaged([], trained, asked, told) if self.world > 1 else (asked, told)

    def clip(self, trained: nn.Module, largest: float) -> Tensor:
        norm = super().clip(trained, largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _Loss(nn.Module):
    """A task as a module whose forward is its loss, so that every weight is gathered in some forward."""

    def __init__(self, task: Task, units: Sequence[nn.Module], frozen: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trained, self.frozen, self.task = task.trained, nn.ModuleList(frozen), task
        inside = {id(m) for unit in units for m in unit.modules()}
        rest = [m for m in self.trained.modules() if id(m) not in inside]
        self._own = [(m, name) for m in rest for name, p in m._parameters.items() if p is not None and p.requires_grad]
        self._zero: Tensor | None = None
        self.used = [0.0] * len(self._own)  # by how many of this step's microbatches
        if frozen:
            frozen[0].register_forward_pre_hook(self._anchored, with_kwargs=True)

    def forward(self, data: Any, generator: torch.Generator, share: LossWeights) -> LossAndMetrics:
        # A process whose documents use no adapter must still send a gradient for it, or the exchange never ends.
        zero = torch.stack([0.0 * getattr(module, name).sum() for module, name in self._own]).sum()
        self._zero = zero
        loss, told = self.task.loss(data, generator, share)
        self._zero = None
        reached = _weights_of(loss, zero)
        self.used = [n + (getattr(m, name) in reached) for n, (m, name) in zip(self.used, self._own, strict=True)]
        return loss + zero, {name: value.detach() for name, value in told.items()}

    def forget_unused(self, used: list[float]) -> None:
        """No gradient, as in one process, where all that came was that zero: such a weight must not decay."""
        for count, (module, name) in zip(used, self._own, strict=True):
            if not count:
                getattr(module, name).grad = None
        self.used = [0.0] * len(self._own)

    def _anchored(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Frozen layers are gathered again in the backward pass, so it must reach them even where only words stand."""
        if self._zero is None or not torch.is_grad_enabled():
            return None
        if args:
            return (args[0] + self._zero.to(args[0].dtype), *args[1:]), kwargs
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": hidden + self._zero.to(hidden.dtype)}


def _weights_of(loss: Tensor, besides: Tensor) -> set[Tensor]:
    """The leaves that a loss has a gradient for other than by way of `besides`; none is computed."""
    leaves, seen = set[Tensor](), {besides.grad_fn}
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        ahead += [after for after, _ in node.next_functions]
    return leaves


def transformer_layers(module: nn.Module) -> list[nn.Module]:
    """The transformer layers in a module: what is gathered, and recomputed, one by one."""
    found = list[nn.Module]()
    for part in module.modules():
        if isinstance(part, CausalStack | QwenStream):
            found += list(part.layers)
    return found


def _mesh(shard: ShardConfig, world: int, device: str) -> DeviceMesh:
    if shard.mode == "fsdp":
        return init_device_mesh(device, (world,))
    share = shard.processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world % share:
        raise ConfigError(f"shard.processes is {share}; expected a divisor of the run's {world} processes.")
    return init_device_mesh(device, (world // share, share), mesh_dim_names=("copies", "shards"))


@contextmanager
def unsharded_parameters(module: nn.Module, keep: bool) -> Iterator[None]:
    """Inside, sharded weights are replaced by whole ones on the CPU, where `keep`; all processes must enter."""
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    full: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(p.data, DTensor):
                continue
            swapped.append((part, name, p))
            if p not in full:
                value = p.data.full_tensor()  # by all processes, one weight after the other
                full[p] = nn.Parameter(value.cpu() if keep else value.to("meta"), requires_grad=False)
    try:
        for part, name, p in swapped:
            part._parameters[name] = full[p]
        yield
    finally:
        for part, name, p in swapped:
            part._parameters[name] = p


class _Recomputed:
    """Mixed into a layer's class: its activations are forgotten and computed again in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def checkpoint_layers(task: Task, stage: StageConfig) -> None:
    """Let the layers that the stage names compute their activations twice instead of keeping them.

    By a class of their own, as FSDP2 does it, rather than a wrapper: names of weights stay, and copies work.
    """
    if stage.checkpoint_activations == "none":
        return
    layers = transformer_layers(task.trained)
    if stage.checkpoint_activations == "all":
        layers += [layer for layer in task.components.vlm.layers if not any(layer is other for other in layers)]
    for layer in layers:
        if not isinstance(layer, _Recomputed):
            kind = type(layer)
            layer.__class__ = type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})


def check_batch_divides(stage: StageConfig, group: Distributed, *, evaluates: bool = False) -> None:
    """Raise TrainingError unless a step's batch can be shared equally and shards go with the rest."""
    shares = group.world * stage.accumulate
    if stage.accumulate < 1 or stage.batch % shares:
        raise TrainingError(
            f"batch {stage.batch} cannot be shared equally by {group.world} processes of {stage.accumulate} "
            "microbatches; expected a multiple of their product."
        )
    states = stage.optim.optimizer_state_dtype
    if states != "float32" and isinstance(group, FullyShardedDistributed):
        raise TrainingError(
            f"optim.optimizer_state_dtype {states} and shard.mode are both set; shards divide float32 states already."
        )
    if evaluates and isinstance(group, FullyShardedDistributed):
        raise TrainingError("evaluate is given, but no process holds whole weights; score the model folder afterwards.")
