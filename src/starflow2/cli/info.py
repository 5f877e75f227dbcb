"""`starflow2 info`: parameters, bytes and cache of a recipe or model, and a plan of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from starflow2.cli.options import JsonFile, check_json, console, find_recipe, refuse, write_json
from starflow2.cli.parsing import Option, Positional
from starflow2.core.serialize import JsonObject
from starflow2.errors import UsageError

__all__ = ["Info"]


@dataclass(frozen=True, kw_only=True)
class Info:
    """Count parameters, bytes and cache of a recipe or a model folder; with --gpus, plan its training.

    The plan (memory by component, FLOPs, days; the least time of drawing) is calculated, not measured.
    """

    verb: ClassVar[str] = "info"

    name: Positional[Annotated[str, Option("recipe name, module:function, or a model folder", metavar="RECIPE")]] = (
        "nano"
    )
    gpus: Annotated[int | None, Option("plan the recipe's training on this many GPUs", default="no plan")] = None
    gpu_memory: Annotated[float, Option("GiB of each GPU")] = 80.0
    gpu_tflops: Annotated[float, Option("dense bfloat16 peak of each GPU; 989 is an H100")] = 989.0
    gpu_bandwidth: Annotated[float, Option("TB/s of each GPU's memory; 3.35 is an H100")] = 3.35
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.core.serialize import to_dict
        from starflow2.models.summary import describe, table
        from starflow2.training.recipes import find_config

        config = find_config(self.name)
        summary = describe(config)
        facts, tables = to_dict(summary), [table(summary)]
        if self.gpus is not None:
            facts["plan"], planned = self._plan(self.gpus)
            tables.append(planned)
        console().print(*tables)
        write_json(facts, self.json)
        return 0

    def _plan(self, gpus: int) -> tuple[JsonObject, Any]:
        """The plan of training and the least time of drawing, as JSON and as tables."""
        from rich.console import Group

        from starflow2.training import roofline
        from starflow2.training.planner import Hardware, plan, table
        from starflow2.training.work import Sizes

        if self.gpu_bandwidth <= 0:
            raise UsageError(f"--gpu-bandwidth is {self.gpu_bandwidth:g}; expected more than 0.")
        if Path(self.name).is_dir():
            raise UsageError(f"--gpus plans the stages of a recipe, but {self.name} is a model folder; name a recipe.")
        hardware = Hardware(gpus=gpus, gpu_memory=self.gpu_memory, peak=1e12 * self.gpu_tflops)
        run = find_recipe(self.name)
        sizes = Sizes.of(run.model)
        planned = plan(run, hardware, sizes)
        drawn = roofline.drawing(sizes, roofline.GpuSpeed(bandwidth=1e12 * self.gpu_bandwidth, peak=hardware.peak))
        return {**planned, "drawing": drawn}, Group(table(planned), roofline.table(drawn))
