"""`starflow2 prepare`: the run folder that a recipe over pretrained parts starts from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from starflow2.cli.options import JsonFile, check_json, console, find_recipe, refuse, say, write_json
from starflow2.cli.parsing import Option, Positional
from starflow2.core.files import check_writable
from starflow2.errors import OutputError

__all__ = ["Prepare"]


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make the run folder of a recipe over pretrained parts: load and check them, initialise the rest.

    The folder stores their fingerprints, not their weights. `starflow2 train RECIPE -o FOLDER` then trains the stages.
    """

    verb: ClassVar[str] = "prepare"

    recipe: Positional[Annotated[str, Option("paper, mini, or your own module:function", metavar="RECIPE")]]
    flow: Annotated[
        Path | None,
        Option("safetensors file of a released STARFlow to start the deep block from", metavar="FILE", default="none"),
    ] = None
    output: Annotated[Path | None, Option("the run's folder", metavar="FOLDER", short="-o", default="runs/RECIPE")] = (
        None
    )
    json: JsonFile = None

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        from starflow2.models.checkpoint import save_components, start_components
        from starflow2.models.convert import adopt, flow_state
        from starflow2.models.tensor_file import load_tensors

        folder = (self.output or Path("runs") / self.recipe.replace(":", "-")) / "model"
        if folder.exists():
            raise OutputError(f"{folder} exists already; choose another --output.")
        check_writable(folder / "config.json")
        state = None if self.flow is None else flow_state(load_tensors(self.flow))
        run = find_recipe(self.recipe)
        with _seeded(run.seed), console(stderr=True).status("loading"):
            components = start_components(run.model)
            copied, fresh = ([], []) if state is None else adopt(components.flow, state)
            save_components(components, folder)
        if state is not None:
            print(
                f"{len(copied)} tensors of the flow from {self.flow}, {len(fresh)} fresh: {', '.join(fresh[:4])}, ..."
            )
        say(folder)
        facts = {"folder": str(folder), "fingerprints": components.fingerprints, "copied": copied, "fresh": fresh}
        write_json(facts, self.json)
        return 0


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block, and restore its state afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
