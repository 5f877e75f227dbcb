"""Plan the training of a recipe as it stands, without running it: does it fit, how long does it take, what would fit.

Arithmetic only, with its assumptions beside each formula; no number is measured. Behind `starflow2 info --gpus`. Step
times assume a share of the GPUs' peak. Not counted: communication, data loading, evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from rich.console import Group
from rich.table import Table
from rich.text import Text

from starflow2.core.fields import Config, Count, Positive, Range
from starflow2.core.serialize import JsonObject
from starflow2.training.config import RunConfig, StageConfig
from starflow2.training.memory import microbatch_documents, reads_corpora, stage_bytes
from starflow2.training.work import Sizes, flops, stage_kind

__all__ = ["Hardware", "plan", "table"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware(Config):
    """GPUs of one kind that train one recipe together."""

    gpus: Count = 8
    gpu_memory: Positive = 80.0  # GiB each
    peak: Positive = 989e12  # FLOP/s each, dense bfloat16 (H100)
    mfu: Annotated[float, Range(above=0, most=1)] = 0.4  # share of the peak in training: assumed, not measured


def plan(run: RunConfig, hardware: Hardware, sizes: Sizes | None = None) -> JsonObject:
    """FLOPs, days, GPU hours and memory of each stage with its own settings, and settings that fit; as JSON.

    sizes: of the run's model, where they are known already.
    """
    sizes = sizes or Sizes.of(run.model)
    return {
        "name": run.model.name,
        "hardware": dict(vars(hardware)),
        "stages": [_stage(run, sizes, stage, hardware) for stage in run.stages],
    }


def _stage(run: RunConfig, sizes: Sizes, stage: StageConfig, hardware: Hardware) -> JsonObject:
    by_part = flops(sizes, stage_kind(stage))
    each = sum(by_part.values())
    step = stage.batch * each / (hardware.gpus * hardware.peak * hardware.mfu)
    hours = stage.steps * step / 3600
    found = stage_bytes(run, sizes, stage, hardware.gpus)
    documents = microbatch_documents(run, stage, hardware.gpus)
    fits = sum(found.values()) <= hardware.gpu_memory * GIB
    return {
        "stage": stage.name,
        "steps": stage.steps,
        "batch": stage.batch,
        "documents": stage.steps * stage.batch,
        "tflops_per_document": each / 1e12,
        "tflops_by_part": {part: value / 1e12 for part, value in by_part.items()},
        "step_s": step,
        "days": hours / 24,
        "gpu_hours": hours * hardware.gpus,
        "bytes": found,
        "total_bytes": sum(found.values()),
        "fits": fits,
        "microbatch_documents": documents,
        "microbatches": stage.batch / (hardware.gpus * documents),
        "flags": [] if fits else _flags_that_fit(run, sizes, stage, hardware),
    }


def _flags_that_fit(run: RunConfig, sizes: Sizes, stage: StageConfig, hardware: Hardware) -> list[str] | None:
    """Options of `train --stage` with which the stage fits, as few and as cheap as possible; None if none do."""
    for changed, flags in _candidates(stage, hardware.gpus):
        for smaller, size in _smaller_microbatches(run, changed, hardware.gpus):
            if sum(stage_bytes(run, sizes, smaller, hardware.gpus).values()) <= hardware.gpu_memory * GIB:
                return [*flags, *size]
    return None


def _candidates(stage: StageConfig, gpus: int) -> Iterator[tuple[StageConfig, list[str]]]:
    """Ways to need less memory, the cheapest first, with their options."""
    shard, flags = stage.shard, list[str]()
    yield stage, flags
    if gpus > 1 and shard.mode == "none":
        shard, flags = replace(shard, mode="fsdp"), ["--shard.mode", "fsdp"]
        yield replace(stage, shard=shard), flags
    for which in ("trained", "all"):
        again = replace(stage, shard=shard, checkpoint_activations=which)
        yield again, [*flags, "--checkpoint-activations", which]
    flags = [*flags, "--checkpoint-activations", "all"]
    if gpus > 1 and stage.name != "vlm":
        yield replace(again, shard=replace(shard, frozen="sharded")), [*flags, "--shard.frozen", "sharded"]
    if shard.mode == "none" and stage.optim.optimizer_state_dtype == "float32":
        optim = replace(stage.optim, optimizer_state_dtype="8bit")
        yield replace(again, optim=optim), [*flags, "--optim.optimizer-state-dtype", "8bit"]


def _smaller_microbatches(run: RunConfig, stage: StageConfig, gpus: int) -> Iterator[tuple[StageConfig, list[str]]]:
    """The stage with ever smaller microbatches, with their options."""
    yield stage, []
    if reads_corpora(run, stage):
        rows = stage.corpus.rows
        while rows > 1:
            rows //= 2
            yield replace(stage, corpus=replace(stage.corpus, rows=rows)), ["--corpus.rows", str(rows)]
        return
    number = 2 * stage.accumulate
    while stage.batch % (gpus * number) == 0:
        yield replace(stage, accumulate=number), ["--accumulate", str(number)]
        number *= 2


def table(facts: JsonObject) -> Group:
    """Tables of a plan, and a line with settings that fit for every stage that does not."""
    h = facts["hardware"]
    speed = f"{h['mfu']:.0%} of {h['peak'] / 1e12:g} TFLOP/s"
    title = f"{facts['name']} on {h['gpus']} GPUs of {h['gpu_memory']:g} GiB, {speed} (calculated)"
    remedies = (_remedy(row) for row in facts["stages"] if not row["fits"])
    return Group(_times(facts["stages"], title), _memory(facts["stages"]), *remedies)


def _times(stages: list[JsonObject], title: str) -> Table:
    times = Table(title=title, title_justify="left")
    for name in ("stage", "documents", "TFLOP each", "step", "days", "GPU hours"):
        times.add_column(name, justify="left" if name == "stage" else "right")
    for row in stages:
        times.add_row(
            row["stage"],
            f"{row['documents'] / 1e6:,.1f} M",
            f"{row['tflops_per_document']:.3g}",
            f"{row['step_s']:.3g} s",
            f"{row['days']:.3g}",
            f"{row['gpu_hours']:,.3g}" if row["gpu_hours"] < 100 else f"{row['gpu_hours']:,.0f}",
        )
    return times


def _memory(stages: list[JsonObject]) -> Table:
    memory = Table(title="memory of one GPU in GB, with the recipe's own settings", title_justify="left")
    memory.add_column("of stage")
    for row in stages:
        memory.add_column(row["stage"], justify="right")
    for part in stages[0]["bytes"]:
        memory.add_row(part, *(f"{row['bytes'][part] / 1e9:.1f}" for row in stages))
    memory.add_section()
    memory.add_row("total", *(f"{row['total_bytes'] / 1e9:.1f}" for row in stages), style="bold")
    memory.add_row("fits", *("yes" if row["fits"] else "no" for row in stages))
    memory.add_row("documents of a microbatch", *(f"{row['microbatch_documents']:.3g}" for row in stages))
    memory.add_row("microbatches of a step", *(f"{row['microbatches']:.3g}" for row in stages))
    return memory


def _remedy(row: JsonObject) -> Text:
    flags = "nothing that train has makes it fit" if row["flags"] is None else f"this fits: {' '.join(row['flags'])}"
    return Text(f"Stage {row['stage']} does not fit with the recipe's own settings; {flags}.")
