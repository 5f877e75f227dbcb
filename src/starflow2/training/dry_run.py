"""Count what a stage takes at the recipe's real shapes, or run one step of it on random data.

On the meta device it only counts; on a real one it takes a step. Weights are random and nothing is read or written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from starflow2.core.serialize import JsonObject
from starflow2.models.components import Components, build
from starflow2.models.sequence import Image, Layout, Segment, Text, pack
from starflow2.nn import num_parameters
from starflow2.training.config import JOINT, RunConfig, StageConfig
from starflow2.training.loop import try_step
from starflow2.training.memory import microbatch_documents, reads_corpora
from starflow2.training.metrics import peak_memory
from starflow2.training.parallel import Distributed
from starflow2.training.task import Task
from starflow2.training.tasks import task_maker

__all__ = ["RandomDocuments", "dry_run"]

PROMPT_TOKENS, REPLY_TOKENS = 128, 32  # of a random document, fewer where a model reads fewer


@dataclass(frozen=True, slots=True)
class RandomDocuments:
    """Documents of one length with random words and images, in the input format of the stage's task."""

    components: Components
    stage: str

    def __call__(self, indices: range) -> Any:
        count, size = len(indices), self.components.cfg.fae.image_size
        generator = torch.Generator().manual_seed(indices.start)
        documents = [self._document(generator) for _ in indices]
        if self.stage in ("features", "fae"):
            return _random_images(count, size, generator)
        if self.stage == "t2i":
            special = self.components.cfg.vlm.special
            rows = [[special.user, *self._ids(self._prompt_tokens, generator), special.assistant] for _ in indices]
            return _random_images(count, size, generator), [[*row, special.vision_start] for row in rows]
        batch = pack(documents, self._layout)
        return _random_images(len(batch.pictures), size, generator), batch

    @property
    def _prompt_tokens(self) -> int:
        return min(PROMPT_TOKENS, self.components.cfg.max_prompt_tokens - 4)

    @property
    def _layout(self) -> Layout:
        return self.components.tower_layout if self.stage == "vlm" else self.components.layout

    def _document(self, generator: torch.Generator) -> list[Segment]:
        """An image and words of the user, words of the reply, and in stages joint and final an image of the reply."""
        prompt, reply = self._ids(self._prompt_tokens, generator), self._ids(REPLY_TOKENS, generator)
        document: list[Segment] = [Image(), Text(tuple(prompt)), Text(tuple(reply), is_target=True)]
        return [*document, Image(is_target=True)] if self.stage in JOINT else document

    def _ids(self, count: int, generator: torch.Generator) -> list[int]:
        cfg = self.components.cfg.vlm
        special = [getattr(cfg.special, name) for name in ("pad", "user", "assistant", "end", "vision_start")]
        special += [cfg.special.vision_end, cfg.special.image_pad]
        ordinary = torch.tensor([i for i in range(min(cfg.vocab, 1024)) if i not in special])
        return ordinary[torch.randint(len(ordinary), (count,), generator=generator)].tolist()


def dry_run(run: RunConfig, stage_name: str, device: str = "meta") -> JsonObject:
    """Count parameters, positions and bytes of a stage; on a real device also run one training step on random data.

    Under torchrun every process takes its share. Peak bytes: the most that the accelerator has allocated; on a CPU, the
    most that this process has ever used. Raises TrainingError for a batch that cannot be divided, ConfigError.
    """
    stage, is_real = run.stage(stage_name), device != "meta"
    group = Distributed.from_environment(device, stage.shard) if is_real else Distributed()
    stage = _with_random_documents(run, stage, group.world)
    torch.manual_seed(run.seed)
    components = build(run.model, device)
    with torch.device(device):
        task = task_maker(stage)(components, stage, run.seed, dataset=RandomDocuments(components, stage_name))
    facts = _sizes(task, group)
    if not is_real:
        return facts
    components.requires_grad_(False)
    for name, reference in run.model.references.items():
        getattr(components, name).to(getattr(torch, reference.precision))  # as its files have it
    started = time.perf_counter()
    metrics = try_step(task, run, group, device)
    return facts | {
        "device": device,
        "documents": stage.batch,
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        "seconds": round(time.perf_counter() - started, 3),
        "peak_bytes": peak_memory(device),
    }


def _with_random_documents(run: RunConfig, stage: StageConfig, world: int) -> StageConfig:
    """The stage without its mixture, in microbatches of as many documents as a packed one holds on average."""
    if not reads_corpora(run, stage):
        return stage
    documents = max(1, int(microbatch_documents(run, stage, world)))
    number = max(1, round(stage.batch / (documents * world)))
    corpus = replace(stage.corpus, mixture="", held_out="")
    batch = documents * number * world
    return replace(stage, corpus=corpus, held_out_batches=0, batch=batch, accumulate=number)


def _sizes(task: Task, group: Distributed) -> JsonObject:
    """Parameters, one microbatch, and bytes of weights and optimiser states in each process."""
    components, stage = task.components, task.stage
    trained, total = num_parameters(task.trained), num_parameters(components, task.trained)
    documents = stage.batch // (group.world * stage.accumulate)
    positions, images = _batch_size(task.make_batch(range(documents)), components.layout.num_latents)
    moments = 8 if stage.optim.optimizer_state_dtype == "float32" else 2
    return {
        "parameters": {"trained": trained, "frozen": total - trained},
        "microbatch": {"documents": documents, "positions": positions, "pictures": images},
        "bytes_per_process": {
            "frozen": 4 * (total - trained - _saved_by_sharding(task, group)),
            "weights_gradients_average": 4 * (3 if stage.optim.ema else 2) * trained // group.shard_size,
            "optimizer": moments * trained // group.shard_size,  # at most: Muon needs half of it
        },
    }


def _saved_by_sharding(task: Task, group: Distributed) -> int:
    """How many frozen parameters are left out of each process because the layers of the language model are sharded."""
    if task.stage.shard.frozen != "sharded" or "vlm" in task.trained:
        return 0
    layers = num_parameters(*task.components.vlm.layers)
    return layers - layers // group.shard_size


def _batch_size(data: Any, num_latents: int) -> tuple[int, int]:
    """Positions of a microbatch that a transformer reads, padding included, and its images."""
    if isinstance(data, Tensor):
        return len(data) * num_latents, len(data)
    images, words = data
    if isinstance(words, list):
        return len(words) * (max(len(row) for row in words) + num_latents), len(images)
    return words.ids.numel(), len(images)


def _random_images(count: int, size: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(count, 3, size, size, generator=generator) - 1
