"""A program for tests of where weights are: stage 3 over two processes, each writing what it holds when it begins.

    python placing_program.py FOLDER sharded replicated

Trains in FOLDER/sharded and FOLDER/replicated over the weights in FOLDER/upstream, and writes found-RANK.json there.
Bytes are those of memory that no file backs, the most since the model was opened.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from model_cases import mix_of
from pretrained_cases import paper_in_miniature, write_upstream
from shard_program import start
from starflow2.models.checkpoint import save_components, start_components
from starflow2.models.config import ModelConfig
from starflow2.models.pretrained import Pretrained
from starflow2.nn import StackConfig
from starflow2.training.config import OptimConfig, RunConfig, ShardConfig
from starflow2.training.loop import fit
from starflow2.training.recipes import paper, smoke
from starflow2.training.tasks import TASKS, DocumentBatch, JointTask

WIDTH = 512


def large(folder: Path) -> ModelConfig:
    """The miniature with 130 MB in the layers of its flow, in float32, and of its language model, in bfloat16."""
    small = paper_in_miniature(folder, 64)
    stack = StackConfig(width=WIDTH, depth=8)
    deep = replace(small.flow.deep, stack=stack, context_dim=WIDTH)
    vlm = replace(small.vlm, width=WIDTH, heads=8, kv_heads=2, depth=4, mlp_width=2048, mrope_section=(8, 12, 12))
    return replace(
        small,
        vlm=vlm,
        vlm_from=Pretrained(source=str(folder / "vlm"), precision="bfloat16"),
        flow=replace(small.flow, deep=deep),
    )


def write_run(folder: Path, upstream: Path) -> None:
    """The run folder of a model that is ready for stage 3, over weights that stand in `upstream`."""
    cfg = large(upstream)
    write_upstream(upstream, cfg)
    torch.manual_seed(5)
    components = start_components(cfg)
    components.finished_stages = ("fae", "t2i", "adapter")
    save_components(components, folder / "model")


def recipe(upstream: Path, frozen: str) -> RunConfig:
    run = smoke(paper())
    stage = replace(
        run.stage("joint"),
        steps=2,
        batch=2,
        log_every=1,
        mix=mix_of(draw=1.0),
        optim=OptimConfig(matrix_lr=0.0, warmup_steps=1, ema=0.0),
        shard=ShardConfig(mode="fsdp", frozen=frozen),  # type: ignore[arg-type]
    )
    others = tuple(s for s in run.stages if s.name != "joint")
    return replace(run, model=large(upstream), stages=(*others, stage), precision="float32")


class Watch:
    """Measures the most anonymous memory since the start, every millisecond."""

    def __init__(self) -> None:
        self.first = self.most = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.done.wait(0.001):
            self.most = max(self.most, anonymous())

    def stop(self) -> int:
        self.done.set()
        self.thread.join()
        return self.most - self.first


def anonymous() -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a folder, in their mapped files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def placed(components: Any, folder: Path, upstream: Path) -> dict[str, Any]:
    """The layers of flow and language model in this process, against those in the files."""
    own = {f"flow.{k}": p for k, p in components.flow.named_parameters() if ".layers." in k}
    files = stored(folder / "model")
    language = components.vlm.model.model.language_model
    own |= {f"vlm.{k}": p for k, p in language.named_parameters() if k.startswith("layers.")}
    files |= {f"vlm.layers.{k.split('layers.')[1]}": v for k, v in stored(upstream / "vlm").items() if "layers." in k}
    found: dict[str, Any] = {"whole": 0, "here": 0, "wrong": [], "dtypes": []}
    for name, p in own.items():
        is_cut = isinstance(p, DTensor)
        mine = p.to_local() if is_cut else p.detach()
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        expected = files[name].chunk(world)[rank] if is_cut else files[name]
        found["wrong"] += [] if torch.equal(mine, expected) else [name]
        found["whole"] += p.numel() * p.element_size()
        found["here"] += mine.numel() * mine.element_size()
        found["dtypes"] += [
            f"{name.split('.')[0]} {str(p.dtype).removeprefix('torch.')} {'cut' if is_cut else 'whole'}"
        ]
    return found | {"dtypes": sorted(set(found["dtypes"]))}


class Looked(JointTask):
    """Stage 3 that looks at its weights before the first microbatch, when all of them are in their places."""

    folder: Path
    upstream: Path
    rank: int
    watch: Watch | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pretzel = self.pretzel.in_one_pass()  # with and without shards: two passes round otherwise

    def counts(self, data: DocumentBatch) -> dict[str, int]:
        if self.watch is not None:
            peak, self.watch = self.watch.stop(), None
            found = placed(self.components, self.folder, self.upstream) | {"peak": peak}
            (self.folder / f"found-{self.rank}.json").write_text(json.dumps(found))
        return super().counts(data)


def work(job: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    folder, upstream = Path(job["folder"]), Path(job["upstream"])
    attributes = {"folder": folder, "upstream": upstream, "rank": rank, "watch": Watch()}  # before the model is opened
    TASKS["joint"] = type("Looked", (Looked,), attributes)
    fit(recipe(upstream, job["frozen"]), "joint", folder)


if __name__ == "__main__":
    base = Path(sys.argv[1])
    for frozen in sys.argv[2:]:
        planned = {"folder": str(base / frozen), "upstream": str(base / "upstream"), "frozen": frozen, "world": 2}
        if start(planned, work) != [0, 0]:
            sys.exit(1)
