"""`starflow2 eval`: score a model on a suite. The rules of the suites are in evals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from starflow2.cli.notes import note
from starflow2.cli.options import (
    PROGRAM,
    Device,
    JsonFile,
    Model,
    check_json,
    check_tries,
    console,
    load_joint,
    progress,
    refuse,
)
from starflow2.cli.parsing import Option, Positional
from starflow2.core.files import check_writable
from starflow2.errors import StateError, UsageError

if TYPE_CHECKING:
    from starflow2.evals.suite import Report
    from starflow2.pipeline import StarFlow2

__all__ = [
    "Eval",
]

PARTS = {  # of suites that run a choice of them
    "geneval": ("id", "cg", "paraphrase", "new", "scenes"),
    "edit": ("id", "cg", "paraphrase", "plain"),
    "story": ("id", "cg", "paraphrase", "plain"),
}
TRIED = ("geneval", "edit", "sessions", "story", "newcomers")  # suites that score several tries as well
DRAWN = ("geneval", "dpg", "newcomers")  # suites that need no more than stage 1


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a model on a benchmark, with floor and ceiling beside every number."""

    verb: ClassVar[str] = "eval"

    benchmark: Positional[
        Annotated[
            Literal[
                "world",
                "fae",
                "geneval",
                "dpg",
                "gedit",
                "imgedit",
                "magicbrush",
                "isg",
                "mme",
                "gqa",
                "seed",
                "mmbench",
                "mmmu",
                "ai2d",
                "likelihood",
                "report",
            ],
            Option(
                "world: the drawn world; fae: images through the codec and back; others are published benchmarks, with "
                "options of their own",
                metavar="SUITE",
            ),
        ]
    ]
    suite: Annotated[
        Literal["geneval", "dpg", "mme", "gqa", "mcq", "edit", "sessions", "story", "newcomers"],
        Option("drawing: geneval, dpg, newcomers; answering: mme, gqa, mcq; editing: edit, sessions; stories: story"),
    ] = "geneval"
    split: Annotated[Literal["dev", "test"], Option("dev for every choice, test to report")] = "dev"
    quick: Annotated[bool, Option("one item in eight; noisy")] = False
    part: Annotated[
        tuple[Literal["id", "cg", "paraphrase", "new", "scenes", "plain"], ...],
        Option(
            "seen combinations, new ones, other wording; of geneval new prompts, busy scenes; of edit and story "
            "plain words"
        ),
    ] = ("id", "cg")
    samples: Annotated[int, Option("images per prompt of geneval, 1 to 4")] = 4
    tries: Annotated[
        int | None,
        Option(
            "of drawing, editing and stories: also score the image that the model confirms among so many",
            default="the model's own",
        ),
    ] = None
    images: Annotated[
        Path | None,
        Option("images of fae: the first 512 of a folder, by name", metavar="FOLDER", default="512 of the drawn world"),
    ] = None
    ledger: Annotated[
        Path | None, Option("add a line about this full test run to a ledger", metavar="FILE", default="no record")
    ] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        from starflow2.core.ledger import append_line
        from starflow2.evals.report import write_json
        from starflow2.evals.tables import ledger_record, table
        from starflow2.models.checkpoint import weights_digest

        if self.benchmark not in ("world", "fae"):
            raise UsageError(
                f"{self.benchmark} has options of its own, behind its name: see {PROGRAM} eval {self.benchmark} --help."
            )
        check_json(self.json)
        self._check()
        if self.benchmark == "fae":
            return self._codec()
        model = self._model()
        with progress("scoring", "items") as step:
            report = self._score(model, step)
        report = replace(report, model=model.components.cfg.name, weights=weights_digest(model.components))
        console().print(table(report))
        if "final" in model.components.finished_stages:
            note("CG: the last stage of this model has seen what is held out; of nano-heldout none has.")
        if self.json is not None:
            write_json(report.to_json(), self.json)
        if self.ledger is not None:
            append_line(self.ledger, ledger_record(report))
        elif self._is_final:
            console(stderr=True).print("This test run was not recorded; --ledger FILE adds it to a ledger.")
        return 0

    @property
    def _is_final(self) -> bool:
        """True for full test runs, the only ones that enter a ledger."""
        return self.benchmark == "world" and self.split == "test" and not self.quick

    def _check(self) -> None:
        if self.benchmark == "fae":
            self._check_codec()
        if not self.part:
            raise UsageError("--part is empty; expected one or more of id, cg, paraphrase.")
        self._check_parts()
        if self.suite != "geneval" and self.samples != 4:
            raise UsageError(f"--samples belongs to --suite geneval; {self.suite} does not take it.")
        if self.tries is not None and (self.benchmark == "fae" or self.suite not in TRIED):
            raise UsageError(f"--tries belongs to suites {', '.join(TRIED)}; others do not take it.")
        check_tries(self.tries)
        if self.ledger is not None:
            if not self._is_final:
                raise UsageError("--ledger records full test runs of eval world; give --split test and no --quick.")
            check_writable(self.ledger)
        if self.benchmark == "world" and self.images is not None:
            raise UsageError("--images belongs to eval fae; eval world draws its own images.")

    def _check_parts(self) -> None:
        """Raise UsageError for parts that the suite does not have."""
        known = PARTS.get(self.suite, ("id", "cg"))
        unknown = [part for part in self.part if part not in known]
        if unknown or (self.suite not in PARTS and self.part != ("id", "cg")):
            named = ", ".join(unknown or self.part)
            raise UsageError(f"--part {named} is not a choice of --suite {self.suite}; it has {', '.join(known)}.")

    def _check_codec(self) -> None:
        """Raise UsageError for options that `eval fae` would not look at."""
        theirs = {
            "--suite": self.suite != "geneval",
            "--part": self.part != ("id", "cg"),
            "--samples": self.samples != 4,
        }
        theirs["--split"] = self.split != "dev" and self.images is not None
        for name in (name for name, is_given in theirs.items() if is_given):
            why = "--images chooses the images" if name == "--split" else "it belongs to eval world"
            raise UsageError(f"eval fae does not take {name} here: {why}.")

    def _codec(self) -> int:
        from starflow2.core.serialize import to_dict
        from starflow2.evals.codec import codec_pictures, codec_table, evaluate_codec
        from starflow2.evals.report import write_json
        from starflow2.pipeline import StarFlow2

        components = StarFlow2.from_pretrained(self.model, device=self.device).components
        images = codec_pictures(self.images, components.codec.image_size, self.split, 64 if self.quick else 512)
        report = evaluate_codec(components.codec, components.codec.extractor, images.to(components.device))
        console().print(codec_table(report))
        if self.json is not None:
            write_json(to_dict(replace(report, model=components.cfg.name)), self.json)
        return 0

    def _model(self) -> StarFlow2:
        """The model to score on the drawn world. Raises StateError for one whose images have another size."""
        from starflow2.models.config_file import read_config
        from starflow2.models.hub import find_model
        from starflow2.pipeline import StarFlow2
        from starflow2.world.scene import IMAGE_SIZE

        size = read_config(find_model(self.model)).model.fae.image_size
        if size != IMAGE_SIZE:
            raise StateError(
                f"eval world shows images of {IMAGE_SIZE} pixels a side, those of {self.model} have {size}: it takes "
                "models of the drawn world; measure the loss on held-out data of --corpus.mixture instead."
            )
        if self.suite in DRAWN:
            return StarFlow2.from_pretrained(self.model, device=self.device)
        return load_joint(self.model, self.device, f"eval --suite {self.suite}")

    def _tries(self, model: StarFlow2) -> int:
        """Tries of each image: those asked for, else the model's own if the suite takes several."""
        if self.tries is not None or self.suite not in TRIED:
            return self.tries or 1
        check = model.components.cfg.self_check
        if check is None or not model.is_joint or not (check.done or self.suite in DRAWN):
            return 1
        return check.tries

    def _score(self, model: StarFlow2, step: Callable[[int, int], None]) -> Report:
        from starflow2.evals.geneval import score_geneval
        from starflow2.evals.runner import drawing_choice, score_suite

        tries = self._tries(model)
        if self.suite != "geneval":
            return score_suite(
                model, self.suite, self.split, quick=self.quick, parts=self.part, tries=tries, progress=step
            )
        return score_geneval(
            model,
            self.split,
            quick=self.quick,
            samples=self.samples,
            parts=self.part,
            progress=step,
            choice=drawing_choice(model, tries),
        )
