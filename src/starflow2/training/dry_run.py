"""A step of a stage on made-up data at the recipe's real shapes: does it fit, and what does it take?

On the meta device it only counts; on a real one it takes the step. Weights are random and nothing is read or written.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from starflow2.models.components import Components, build
from starflow2.models.sequence import Image, Layout, Segment, Text, pack
from starflow2.models.tokenizer import ChatTokenizer
from starflow2.training.config import RunConfig, StageConfig
from starflow2.training.loop import try_step
from starflow2.training.parallel import Distributed
from starflow2.training.task import Task
from starflow2.training.tasks import TASKS

__all__ = ["rehearse"]

PROMPT_TOKENS, REPLY_TOKENS = 128, 32  # of a made-up document, less where a model reads less


@dataclass(frozen=True, slots=True)
class _Made:
    """Documents of one length with random words and pictures, in the form that the stage's own task takes."""

    components: Components
    stage: str

    def __call__(self, indices: range) -> Any:
        count, size = len(indices), self.components.cfg.fae.image_size
        generator = torch.Generator().manual_seed(indices.start)
        documents = [self._document(generator) for _ in indices]
        if self.stage in ("features", "fae"):
            return _noise(count, size, generator)
        if self.stage == "t2i":
            special = self.components.cfg.vlm.special
            rows = [[special.user, *self._ids(self._prompt, generator), special.assistant] for _ in indices]
            return _noise(count, size, generator), [[*row, special.vision_start] for row in rows]
        batch = pack(documents, self._layout)
        return _noise(len(batch.pictures), size, generator), batch

    @property
    def _prompt(self) -> int:
        return min(PROMPT_TOKENS, self.components.cfg.max_prompt_tokens - 4)

    @property
    def _layout(self) -> Layout:
        layout = self.components.layout
        return replace(layout, grid=self.components.cfg.vlm.image_grid) if self.stage == "vlm" else layout

    def _document(self, generator: torch.Generator) -> list[Segment]:
        """A picture and words are shown; words are the reply, and in stage 3 a picture, too."""
        asked, told = self._ids(self._prompt, generator), self._ids(REPLY_TOKENS, generator)
        document: list[Segment] = [Image(), Text(tuple(asked)), Text(tuple(told), is_target=True)]
        return [*document, Image(is_target=True)] if self.stage == "joint" else document

    def _ids(self, count: int, generator: torch.Generator) -> list[int]:
        cfg = self.components.cfg.vlm
        special = [getattr(cfg.special, name) for name in ("pad", "user", "assistant", "end", "vision_start")]
        special += [cfg.special.vision_end, cfg.special.image_pad]
        ordinary = torch.tensor([i for i in range(min(cfg.vocab, 1024)) if i not in special])
        drawn: list[int] = ordinary[torch.randint(len(ordinary), (count,), generator=generator)].tolist()
        return drawn


def rehearse(run: RunConfig, stage_name: str, device: str = "meta") -> dict[str, Any]:
    """What a stage trains, reads and holds, in numbers and bytes; on a real device one step of it is taken.

    Under torchrun every process takes its share. Bytes of a step: the most that the accelerator held; on a CPU, the
    most that this process ever held. Raises TrainingError where the batch cannot be shared, ConfigError.
    """
    stage, is_real = run.stage(stage_name), device != "meta"
    group = Distributed.from_environment(device, stage.shard) if is_real else Distributed()
    torch.manual_seed(run.seed)
    components = build(run.model, device)
    components.tokenizer = cast(ChatTokenizer, object())  # made-up documents are ids already
    with torch.device(device):
        task = TASKS[stage_name](components, stage, run.seed)
    task.make_batch = _Made(components, stage_name)
    facts = _counted(components, task, stage, group)
    if not is_real:
        return facts
    components.requires_grad_(False)
    started = time.perf_counter()
    values = try_step(task, stage, run, group, device)
    return facts | {
        "device": device,
        "loss": values["loss"],
        "grad_norm": values["grad_norm"],
        "seconds": round(time.perf_counter() - started, 3),
        "peak_bytes": _peak(device),
    }


def _counted(components: Components, task: Task, stage: StageConfig, group: Distributed) -> dict[str, Any]:
    trained, everything = _count([task.trained]), _count([components, task.trained])
    share = stage.batch // (group.world * stage.accumulate)
    data = task.make_batch(range(share))
    positions, pictures = _size(data, components.layout.num_latents)
    holders = group.shard_size
    divided = _count(components.vlm.layers) if stage.shard.frozen == "sharded" and "vlm" not in task.trained else 0
    moments = 8 if stage.optim.optimizer_state_dtype == "float32" else 2
    return {
        "parameters": {"trained": trained, "frozen": everything - trained},
        "microbatch": {"documents": share, "positions": positions, "pictures": pictures},
        "bytes_per_process": {
            "frozen": 4 * (everything - trained - divided + divided // holders),
            "weights_gradients_average": 4 * (3 if stage.optim.ema else 2) * trained // holders,
            "optimizer": moments * trained // holders,  # at most: Muon keeps half of it
        },
    }


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def _size(data: Any, latents: int) -> tuple[int, int]:
    """Positions that a transformer reads in a microbatch, padding included, and its pictures."""
    if isinstance(data, Tensor):
        return len(data) * latents, len(data)
    images, words = data
    if isinstance(words, list):
        return len(words) * (max(len(row) for row in words) + latents), len(images)
    return words.ids.numel(), len(images)


def _noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(count, 3, size, size, generator=generator) - 1


def _peak(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
