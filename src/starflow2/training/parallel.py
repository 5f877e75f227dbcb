"""The processes of a run: whole copies (DDP) or one model in shards (FSDP2), behind one interface.

A step's batch is cut into microbatches, as many for each process; microbatch number s has the same noise, and of the
drawn world the same documents, whichever process it falls to. With checkpoints, the home of torch.distributed.
Not here: the loop, optimiser settings, files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from starflow2.errors import ConfigError, TrainingError
from starflow2.models.components import Components, build
from starflow2.models.huggingface import Backbone
from starflow2.nn import CausalStack, at_least_fp32
from starflow2.training.config import JOINT, ShardConfig, StageConfig
from starflow2.training.task import LossAndMetrics, LossWeights, Task

__all__ = [
    "DataParallelReplica",
    "Distributed",
    "FullyShardedDistributed",
    "Replica",
    "ShardedReplica",
    "check_batch_divides",
    "checkpoint_activations",
    "own_part",
    "transformer_layers",
    "unsharded_parameters",
]

PATIENCE = timedelta(hours=6)  # that processes wait for one that writes a model or draws


class Distributed:
    """The processes of a run, one or those that torchrun started; each holds all weights and a part of each batch."""

    def __init__(self, rank: int = 0, world: int = 1, control: dist.ProcessGroup | None = None) -> None:
        """control: the processes on CPU, for what is exchanged beside gradients and may take long."""
        self.rank, self.world, self.control = rank, world, control

    @staticmethod
    def from_environment(device: str, shard: ShardConfig | None = None) -> Distributed:
        """The processes that torchrun describes, or this one alone. Raises ConfigError if shards do not divide them."""
        shard = shard or ShardConfig()
        world, is_sharded = int(os.environ.get("WORLD_SIZE", "1")), shard.mode != "none"
        if world == 1 and not is_sharded:
            return Distributed()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            _initialize(device, world, timedelta(minutes=shard.timeout_minutes))
        control = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
        if not is_sharded:
            return Distributed(dist.get_rank(), world, control)
        return FullyShardedDistributed(dist.get_rank(), world, control, shard=shard, device=device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def shard_size(self) -> int:
        """The number of processes that hold one copy of the model together."""
        return 1

    def barrier(self) -> None:
        """Wait for all processes, for hours if need be: one of them may be writing a model, or drawing."""
        if self.world > 1:
            dist.barrier(self.control)

    def sum(self, values: Sequence[int]) -> list[int]:
        """The sums of integers over all processes; the accelerator takes no part."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def broadcast_choice(self, choice: str) -> str:
        """The first process's choice, where each process measures for itself."""
        choices = [choice]
        if self.world > 1:
            dist.broadcast_object_list(choices, 0, self.control)
        return choices[0]

    def all_gather(self, value: object) -> list[object]:
        """The values of all processes, by rank."""
        values: list[object] = [value]
        if self.world > 1:
            values *= self.world
            dist.all_gather_object(values, value, self.control)
        return values

    def sharded_components(self, stage: StageConfig) -> tuple[str, ...]:
        """Components whose layers `prepare` will shard. `load_components` may leave them memory-mapped until then."""
        return ()

    def prepare(self, task: Task, precision: str, device: str) -> Replica:
        """Move the trained weights to `device`, in all processes those of the first; returns what computes on them."""
        task.trained.to(device)
        return DataParallelReplica(task, self.world) if self.world > 1 else Replica(task)

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

    def whole_model(self, components: Components) -> Components | None:
        """The model for the first process to draw or score with, None in the others; all processes must call it."""
        return components if self.is_first else None

    def loss_weights(self, task: Task, microbatches: Sequence[Any]) -> list[LossWeights]:
        """The weights of the loss terms of each microbatch of this process, by counts of all processes.

        A term is a mean over the values that a microbatch has of it, such as replies; means over unequally many values
        must not count alike.
        """
        counts = [task.counts(data) for data in microbatches]
        names = list(counts[0])
        number = self.world * len(microbatches)
        if not names or number == 1:
            return [LossWeights() for _ in counts]
        totals = dict(zip(names, self.sum([sum(c[name] for c in counts) for name in names]), strict=True))
        return [LossWeights({k: n * number / max(totals[k], 1) for k, n in c.items()}) for c in counts]


class Replica:
    """The trained weights of a task in a process, and what a step does with them; here those of a single process."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def loss(self, data: Any, generator: torch.Generator, weights: LossWeights) -> LossAndMetrics:
        """The loss of a microbatch and its metrics."""
        return self.task.loss(data, generator, weights)

    def exchange(self, is_last: bool) -> AbstractContextManager[None]:
        """Context for forward and backward of a microbatch: gradients are exchanged with the last one of a step."""
        return nullcontext()

    def reduce(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """After the last backward pass: the metrics' mean over processes.

        The loss is among them because all processes must agree whether it is finite: all take a step, or none.
        """
        return metrics

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients' global norm and return it as it was before."""
        return nn.utils.clip_grad_norm_(self.task.trained.parameters(), max_norm)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the task's modules can be called without a backward pass, by all processes alike."""
        yield


# whether DDP gives all processes the running statistics of the first; the older name is deprecated
_NAMES = signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"


class DataParallelReplica(Replica):
    """One of several whole copies; DistributedDataParallel averages their gradients during the backward pass."""

    def __init__(self, task: Task, world: int) -> None:
        super().__init__(task)
        self.world = world
        for buffer in task.trained.buffers():
            dist.broadcast(buffer, 0)
        # The documents of a batch decide which weights it uses, so unused ones must be looked for. DDP then also keeps
        # its groups of gradients after the first step, so that a resumed run adds up gradients in the same order.
        options: dict[str, Any] = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
        options[_SYNC_BUFFERS] = False
        self.module = DistributedDataParallel(_TaskLoss(task), **options)

    def loss(self, data: Any, generator: torch.Generator, weights: LossWeights) -> LossAndMetrics:
        return cast(LossAndMetrics, self.module(data, generator, weights))

    def exchange(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self.module.no_sync()

    def reduce(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        statistics = [b for b in self.task.trained.buffers() if b.is_floating_point()]
        return _average(statistics, metrics, self.world)


class _TaskLoss(nn.Module):
    """A task as a module whose forward is its loss, which is the form that DDP and FSDP2 wrap."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.trained, self.task = task.trained, task

    def forward(self, data: Any, generator: torch.Generator, weights: LossWeights) -> LossAndMetrics:
        loss, metrics = self.task.loss(data, generator, weights)
        return loss, {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def _average(values: Sequence[Tensor], metrics: dict[str, Tensor], world: int) -> dict[str, Tensor]:
    """Average `values` in place over all processes; returns the mean metrics."""
    scalars = at_least_fp32(torch.stack([*metrics.values()]))
    flat = torch.cat([v.flatten() for v in values] + [scalars]) / world
    dist.all_reduce(flat)
    *means, scalars = flat.split([v.numel() for v in values] + [len(scalars)])
    for value, mean in zip(values, means, strict=True):
        value.copy_(mean.view_as(value))
    return dict(zip(metrics, scalars.unbind(), strict=True))


# -- shards ---------------------------------------------------------------------------------------------


class FullyShardedDistributed(Distributed):
    """Processes that divide every weight, gradient and optimiser state among themselves (FSDP2).

    Transformer layers are gathered one by one; everything else is one unit that stays gathered during a step, so
    that a process without an image, which calls no adapter, still takes part in every exchange. Under bfloat16 the
    layers that train are gathered and run in it; weights, heads and the affine maths stay float32. Frozen layers stay
    in the format of their files. While layers are being sharded, one at a time is whole.
    """

    def __init__(
        self, rank: int, world: int, control: dist.ProcessGroup | None, *, shard: ShardConfig, device: str
    ) -> None:
        super().__init__(rank, world, control)
        self.shard, self.mesh = shard, _mesh(shard, world, device)

    @property
    def shard_size(self) -> int:
        return self.mesh.size(self.mesh.ndim - 1)

    def sharded_components(self, stage: StageConfig) -> tuple[str, ...]:
        trained = ("flow",) if stage.name in ("t2i", *JOINT) else ()
        # a fresh stage t2i measures states of the language model before anything is sharded
        frozen = ("vlm",) if self.shard.frozen == "sharded" and stage.name in ("adapter", *JOINT) else ()
        return trained + frozen

    def prepare(self, task: Task, precision: str, device: str) -> Replica:
        half = torch.bfloat16 if precision == "bfloat16" else None
        trained_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        unchanged = MixedPrecisionPolicy(cast_forward_inputs=False)
        layers = transformer_layers(task.trained)
        language = task.components.vlm.layers if self.shard.frozen == "sharded" else []
        frozen = [layer for layer in language if not any(layer is other for other in layers)]
        for layer in layers:
            self._equalize(layer.parameters(), device)
            self._shard(layer, trained_policy)
        for layer in frozen:
            self._shard(layer, unchanged)
        self._equalize((p for p in task.trained.parameters() if not isinstance(p, DTensor)), device)
        self._equalize(task.trained.buffers(), device)
        root = _ShardedTaskLoss(task, layers, frozen)
        fully_shard(root, mesh=self.mesh, mp_policy=unchanged)
        return ShardedReplica(root, self)

    def _shard(self, layer: nn.Module, policy: MixedPrecisionPolicy) -> None:
        fully_shard(layer, mesh=self.mesh, mp_policy=policy, reshard_after_forward=self.shard.reshards)

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

    def whole_model(self, components: Components) -> Components | None:
        with self.unsharded(components):
            return _whole_copy(components) if self.is_first else None


class ShardedReplica(Replica):
    """This process's shards of a model, and what a step does with them."""

    def __init__(self, root: _ShardedTaskLoss, group: Distributed) -> None:
        super().__init__(root.task)
        self.root, self.group = root, group

    def loss(self, data: Any, generator: torch.Generator, weights: LossWeights) -> LossAndMetrics:
        return cast(LossAndMetrics, self.root(data, generator, weights))

    def exchange(self, is_last: bool) -> AbstractContextManager[None]:
        cast(FSDPModule, self.root).set_requires_gradient_sync(is_last)
        return nullcontext()

    @torch.no_grad()
    def reduce(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        self.root.forget_unused(self.group.sum(self.root.uses))
        return _average([], metrics, self.group.world) if self.group.world > 1 else metrics

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Weights outside of layers are gathered; a layer is gathered when it is called.

        All processes must call the same layers in the same order.
        """
        uses = list(self.root.uses)
        units = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        cast(FSDPModule, self.root).unshard()
        try:
            yield
        finally:
            for unit in units:  # a forward pass without a backward pass leaves weights gathered
                unit.reshard()
            self.root.uses = uses

    def clip(self, max_norm: float) -> Tensor:
        norm = super().clip(max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _ShardedTaskLoss(_TaskLoss):
    """The loss of a task in shards, in which every weight is used by every process: FSDP2 gathers it in some forward.

    A weight that a process's documents do not use enters its loss with a factor of 0.
    """

    def __init__(self, task: Task, layers: Sequence[nn.Module], frozen: Sequence[nn.Module]) -> None:
        super().__init__(task)
        self.frozen = nn.ModuleList(frozen)
        inside = {id(m) for layer in layers for m in layer.modules()}
        rest = [m for m in self.trained.modules() if id(m) not in inside]
        self._own = [(m, name) for m in rest for name, p in m._parameters.items() if p is not None and p.requires_grad]
        self._zero: Tensor | None = None
        self.uses = [0] * len(self._own)  # in how many microbatches of this step the loss depended on each
        if frozen:
            frozen[0].register_forward_pre_hook(self._anchor, with_kwargs=True)

    def forward(self, data: Any, generator: torch.Generator, weights: LossWeights) -> LossAndMetrics:
        # a process whose documents use no adapter must still send a gradient for it, or the exchange never ends
        zero = torch.stack([0.0 * getattr(module, name).sum() for module, name in self._own]).sum()
        self._zero = zero
        loss, metrics = super().forward(data, generator, weights)
        self._zero = None
        used = _leaves(loss, zero)
        self.uses = [n + (getattr(m, name) in used) for n, (m, name) in zip(self.uses, self._own, strict=True)]
        return loss + zero, metrics

    def forget_unused(self, uses: list[int]) -> None:
        """Remove the gradient of weights that no process used: a gradient of 0 would let them decay."""
        for count, (module, name) in zip(uses, self._own, strict=True):
            if not count:
                getattr(module, name).grad = None
        self.uses = [0] * len(self._own)

    def _anchor(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Frozen layers are gathered again in the backward pass, so it must reach them even in documents of words."""
        if self._zero is None or not torch.is_grad_enabled():
            return None
        if args:
            return (args[0] + self._zero.to(args[0].dtype), *args[1:]), kwargs
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": hidden + self._zero.to(hidden.dtype)}


def _leaves(loss: Tensor, besides: Tensor) -> set[Tensor]:
    """The parameters that a loss depends on other than by way of `besides`; computes no gradient."""
    leaves, visited = set[Tensor](), {besides.grad_fn}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [before for before, _ in node.next_functions]
    return leaves


def transformer_layers(module: nn.Module) -> list[nn.Module]:
    """The transformer layers in a module, which are gathered and recomputed one by one."""
    found = list[nn.Module]()
    for part in module.modules():
        if isinstance(part, CausalStack) or (isinstance(part, Backbone) and hasattr(part, "layers")):
            found += cast(Iterable[nn.Module], part.layers)
    return found


def _initialize(device: str, world: int, timeout: timedelta) -> None:
    """Join the processes that torchrun has started; on GPUs each uses the one of its local rank."""
    if world == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(_backend(device), rank=0, world_size=1, store=store, timeout=timeout)
        return
    own = torch.device(device, torch.cuda.current_device()) if device == "cuda" else None
    dist.init_process_group(_backend(device), timeout=timeout, device_id=own)


def _backend(device: str) -> str:
    return "gloo" if device == "cpu" else f"cpu:gloo,{device}:nccl"


def _mesh(shard: ShardConfig, world: int, device: str) -> DeviceMesh:
    if shard.mode == "fsdp":
        return init_device_mesh(device, (world,))
    size = shard.processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world % size:
        raise ConfigError(f"shard.processes is {size}; expected a divisor of the run's {world} processes.")
    return init_device_mesh(device, (world // size, size), mesh_dim_names=("copies", "shards"))


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


def _whole_copy(components: Components) -> Components:
    """A model of plain modules with the weights of one whose shards are gathered now; it shares what was never cut."""
    twin, device = build(components.cfg, "meta"), components.device
    twin.load_state_dict({k: v.to(device) for k, v in components.state_dict().items()}, assign=True)
    for name, buffer in components.named_buffers():  # also those that no state dict holds
        owner, _, leaf = name.replace("_checkpoint_wrapped_module.", "").rpartition(".")
        twin.get_submodule(owner)._buffers[leaf] = buffer
    twin._tokenizer, twin.vocabulary = components._tokenizer, components.vocabulary
    twin.finished_stages, twin.fingerprints = components.finished_stages, components.fingerprints
    return twin.eval().requires_grad_(False)


def checkpoint_activations(task: Task) -> None:
    """Recompute the activations of the layers that the stage names in the backward pass instead of keeping them.

    Names of weights in checkpoints stay. A second call changes nothing.
    """
    which = task.stage.checkpoint_activations
    if which == "none":
        return
    modules: list[nn.Module] = [task.trained, *([task.components.vlm] if which == "all" else [])]
    layers = {id(layer) for module in modules for layer in transformer_layers(module)}
    wrapper = partial(checkpoint_wrapper, preserve_rng_state=False)
    for module in modules:
        apply_activation_checkpointing(
            module, wrapper, lambda m: id(m) in layers and not isinstance(m, CheckpointWrapper)
        )


def check_batch_divides(stage: StageConfig, group: Distributed) -> None:
    """Raise TrainingError unless a step can be divided among the processes and the settings go with shards."""
    corpus, number = stage.corpus, group.world * stage.accumulate
    if corpus.batch_positions and group.world * corpus.rows * corpus.width > corpus.batch_positions:
        raise TrainingError(
            f"corpus.batch_positions is {corpus.batch_positions}, but {group.world} processes read corpus.rows x "
            f"corpus.width = {corpus.rows * corpus.width} positions each at a time; give fewer rows or a larger batch."
        )
    if corpus.mixture and stage.batch < group.world:
        raise TrainingError(
            f"batch is {stage.batch}; expected at least a document for each of {group.world} processes."
        )
    if not corpus.mixture and (stage.accumulate < 1 or stage.batch % number):
        raise TrainingError(
            f"batch {stage.batch} cannot be divided equally among {group.world} processes of {stage.accumulate} "
            "microbatches; expected a multiple of their product."
        )
    states = stage.optim.optimizer_state_dtype
    if states != "float32" and isinstance(group, FullyShardedDistributed):
        raise TrainingError(
            f"optim.optimizer_state_dtype is {states}, which works with shard.mode none only; use float32, whose "
            "states are divided among the processes."
        )


def own_part(value: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value
