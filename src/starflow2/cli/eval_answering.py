"""`starflow2 eval mme`, `gqa`, `seed`, `mmbench`, `mmmu` and `ai2d`: questions about images, asked by lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from starflow2.cli.options import Device, Model, console, refuse, say, write_json
from starflow2.cli.parsing import Option
from starflow2.errors import UsageError

if TYPE_CHECKING:
    from starflow2.benchmarks.answering import Frozen

__all__ = ["AskAi2d", "AskGqa", "AskMmbench", "AskMme", "AskMmmu", "AskSeed"]

Suite = Literal["mme", "gqa", "seed", "mmbench", "mmmu", "ai2d"]


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """Options of all six; the harness runs in an environment of its own, see `make lmms`."""

    verb: ClassVar[str] = ""
    suite: ClassVar[Suite]

    out: Annotated[Path, Option("where the harness's files and our results go", metavar="FOLDER")]
    frozen_vlm: Annotated[bool, Option("add rows of the frozen language model, at native size and at 256 pixels")] = (
        False
    )
    fit: Annotated[Literal["stretch", "pad", "crop"], Option("how an image becomes the model's square")] = "stretch"
    data: Annotated[
        Path | None, Option("a Parquet file with the dataset's columns", metavar="FILE", default="lmms-eval's download")
    ] = None
    task: Annotated[
        str, Option("another task of lmms-eval with equal metrics", metavar="NAME", default="the usual")
    ] = ""
    limit: Annotated[int, Option("first questions to ask, 0 for all")] = 0
    batch: Annotated[int, Option("questions asked at once")] = 16
    python: Annotated[
        Path | None, Option("interpreter with lmms-eval", metavar="FILE", default=".venv-lmms/bin/python")
    ] = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        if self.limit < 0 or self.batch < 1:
            raise UsageError(f"--limit is {self.limit} and --batch {self.batch}; expected at least 0 and at least 1.")
        from starflow2.benchmarks.lmms_run import HarnessRun, find_python, run_suite
        from starflow2.benchmarks.results import result_table

        self._check_model()
        run = HarnessRun(
            python=find_python(self.python),
            model=self.model,
            device=self.device,
            batch=self.batch,
            fit=self.fit,
            task=self.task,
            data=self.data,
            limit=self.limit,
        )
        rows: tuple[Frozen, ...] = ("no", "native", "256") if self.frozen_vlm else ("no",)
        for frozen in rows:
            name = self.suite if frozen == "no" else f"{self.suite}-frozen-{frozen}"
            with console(stderr=True).status(f"asking {name}"):
                result = run_suite(self.suite, replace(run, frozen=frozen), self.out / name)
            console().print(result_table(result))
            write_json(result.to_json(), self.out / f"{name}.json")
            say(self.out / f"{name}.json")
        return 0

    def _check_model(self) -> None:
        """Raise StateError for a model that has not finished stage joint: the harness would hide the reason."""
        from starflow2.benchmarks.stages import check_finished
        from starflow2.models.config_file import read_config
        from starflow2.models.hub import find_model

        check_finished(self.verb, "joint", self.model, read_config(find_model(self.model)).finished_stages)


@dataclass(frozen=True, kw_only=True)
class AskMme(_Ask):
    """Ask MME's questions through lmms-eval: perception of 2,000 and cognition of 800. Needs stage joint."""

    verb: ClassVar[str] = "eval mme"
    suite: ClassVar[Suite] = "mme"


@dataclass(frozen=True, kw_only=True)
class AskGqa(_Ask):
    """Ask GQA's balanced testdev questions through lmms-eval. Needs stage joint."""

    verb: ClassVar[str] = "eval gqa"
    suite: ClassVar[Suite] = "gqa"


@dataclass(frozen=True, kw_only=True)
class AskSeed(_Ask):
    """Ask SEED-Bench's questions through lmms-eval; accuracy is that of images. Needs stage joint."""

    verb: ClassVar[str] = "eval seed"
    suite: ClassVar[Suite] = "seed"


@dataclass(frozen=True, kw_only=True)
class AskMmbench(_Ask):
    """Ask MMBench-en's dev questions through lmms-eval, circular and by rules alone. Needs stage joint."""

    verb: ClassVar[str] = "eval mmbench"
    suite: ClassVar[Suite] = "mmbench"


@dataclass(frozen=True, kw_only=True)
class AskMmmu(_Ask):
    """Ask MMMU's validation questions through lmms-eval. Needs stage joint."""

    verb: ClassVar[str] = "eval mmmu"
    suite: ClassVar[Suite] = "mmmu"


@dataclass(frozen=True, kw_only=True)
class AskAi2d(_Ask):
    """Ask AI2D's test questions, with masked labels, through lmms-eval. Needs stage joint."""

    verb: ClassVar[str] = "eval ai2d"
    suite: ClassVar[Suite] = "ai2d"
