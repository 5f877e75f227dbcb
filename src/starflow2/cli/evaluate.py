"""Commands that measure: `eval` scores a model on a suite, `analyze` looks inside it and at the paper's claims, `data`
looks at a corpus.

Imports the library inside `run`, so that `starflow2 --help` stays quick. Not here: what is measured (evals, analysis,
compare, claims).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from starflow2.cli.conversation import conversing
from starflow2.cli.options import (
    Device,
    JsonFile,
    Model,
    check_json,
    console,
    own,
    printable,
    progress,
    refuse,
    write_json,
)
from starflow2.core.files import check_writable, replacing
from starflow2.errors import ConfigError

if TYPE_CHECKING:
    from starflow2.pipeline import StarFlow2

__all__ = ["Analyze", "Data", "Eval"]

LEDGER = Path("docs/results/ledger.jsonl")
DRAWN = ("geneval", "dpg")  # suites that need no more than stage 1


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a model on a benchmark, with floor and ceiling beside every number.

    A full test run adds a line to docs/results/ledger.jsonl where it runs from a checkout.
    """

    verb: ClassVar[str] = "eval"

    benchmark: Positional[
        Annotated[
            Literal["world", "fae"],
            arg(metavar="SUITE", help="world: the drawn world; fae: pictures through the codec and back"),
        ]
    ]
    suite: Annotated[
        Literal["geneval", "dpg", "mme", "gqa", "mcq", "edit", "sessions", "story"],
        arg(help="drawing: geneval, dpg; answering: mme, gqa, mcq; edits, alone and in sessions; stories"),
    ] = "geneval"
    split: Annotated[Literal["dev", "test"], arg(help="dev for every choice, test to report")] = "dev"
    quick: Annotated[bool, arg(help="one item in eight: noisy")] = False
    part: Annotated[
        tuple[Literal["id", "cg", "paraphrase"], ...],
        arg(help="of geneval: seen combinations, new ones, other wording"),
    ] = ("id", "cg")
    samples: Annotated[int, arg(help="of geneval: pictures of each prompt, 1 to 4")] = 4
    images: Annotated[
        Path | None, own("FOLDER", "of fae: the first 512 pictures by name", "512 of the drawn world")
    ] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        from starflow2.evals.report import append_ledger, write_json
        from starflow2.models.checkpoint import weights_digest

        check_json(self.json)
        self._check()
        if self.benchmark == "fae":
            return self._codec()
        ledger = _ledger() if self.split == "test" and not self.quick else None
        model = self._model()
        with progress("scoring", "items") as step:
            report = self._scored(model, step)
        made_by = {"model": model.parts.cfg.name, "weights": weights_digest(model.parts)}
        report |= made_by
        console().print(_table(report))
        if self.json is not None:
            write_json(report, self.json)
        if ledger is not None:
            append_ledger(ledger, _record(report) | made_by)
        return 0

    def _check(self) -> None:
        if self.benchmark == "fae":
            self._check_codec()
        if not self.part:
            raise ConfigError("--part names no part; expected one or more of id, cg, paraphrase.")
        if self.suite != "geneval" and (self.part != ("id", "cg") or self.samples != 4):
            raise ConfigError(f"--part and --samples are of suite geneval; {self.suite} takes neither.")
        if self.benchmark == "world" and self.images is not None:
            raise ConfigError("--images is of eval fae; eval world draws its own.")

    def _check_codec(self) -> None:
        """Raise ConfigError for options that `eval fae` would not look at."""
        theirs = {
            "--suite": self.suite != "geneval",
            "--part": self.part != ("id", "cg"),
            "--samples": self.samples != 4,
        }
        theirs["--split"] = self.split != "dev" and self.images is not None
        for name in (name for name, is_given in theirs.items() if is_given):
            why = "--images says which pictures" if name == "--split" else "it is of eval world"
            raise ConfigError(f"eval fae does not take {name} here: {why}.")

    def _codec(self) -> int:
        from starflow2.evals.codec import codec_pictures, codec_table, evaluate_codec
        from starflow2.evals.report import write_json
        from starflow2.pipeline import StarFlow2

        parts = StarFlow2.from_pretrained(self.model, device=self.device).parts
        images = codec_pictures(self.images, parts.codec.image_size, self.split, 64 if self.quick else 512)
        report = evaluate_codec(parts.codec, parts.extractor, images.to(parts.device))
        report["model"] = parts.cfg.name
        console().print(codec_table(report))
        if self.json is not None:
            write_json(report, self.json)
        return 0

    def _model(self) -> StarFlow2:
        from starflow2.pipeline import StarFlow2

        if self.suite in DRAWN:
            return StarFlow2.from_pretrained(self.model, device=self.device)
        return conversing(self.model, self.device, f"eval --suite {self.suite}")

    def _scored(self, model: StarFlow2, step: Callable[[int, int], None]) -> dict[str, Any]:
        from starflow2.evals.runner import score_suite
        from starflow2.evals.world import score_geneval

        if self.suite != "geneval":
            return score_suite(model, self.suite, self.split, quick=self.quick, progress=step)
        return score_geneval(model, self.split, quick=self.quick, samples=self.samples, parts=self.part, progress=step)


def _table(report: Mapping[str, Any]) -> Any:
    from starflow2.evals.report import table
    from starflow2.evals.tables import suite_table

    return table(report) if _is_geneval(report) else suite_table(report)


def _record(report: Mapping[str, Any]) -> dict[str, Any]:
    from starflow2.evals.report import ledger_record
    from starflow2.evals.tables import suite_record

    return ledger_record(report) if _is_geneval(report) else suite_record(report)


def _is_geneval(report: Mapping[str, Any]) -> bool:
    return str(report["suite"]) == "geneval"


def _ledger() -> Path | None:
    """The ledger of the checkout that this package runs from, None where it is installed."""
    root = Path(__file__).parents[3]
    return root / LEDGER if (root / "pyproject.toml").is_file() else None


# -- analyze ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Look inside a model of stage 3: skips, cost of turns, sheets, comparisons, and the paper's claims beside it.

    skips: what both skips carry, over 50 prompts. turns: a session against reading everything anew. sheets: edits and
    stories as pictures. compare: the paper's arms on equal budgets, trained here (hours on CPU; a stopped call
    goes on) from a model of stages 1 and 2. paper: claims.md from the JSON files in the folder, skips and turns
    measured first where they are missing. codecs: an FAE that trains with the flow, and no FAE at all,
    beside the default (likewise).
    """

    verb: ClassVar[str] = "analyze"

    what: Positional[
        Annotated[
            Literal["skips", "turns", "sheets", "compare", "paper", "codecs"], arg(metavar="NAME", help="see above")
        ]
    ]
    output: Annotated[Path, arg(aliases=("-o",), metavar="FOLDER", help="where files go")] = Path("docs/results")
    steps: Annotated[int | None, own("INT", "of compare and codecs: training steps of every arm", "300; 1000")] = None
    batch: Annotated[int | None, own("INT", "of both: documents per step", "32; 64")] = None
    seeds: Annotated[int | None, own("INT", "of both: how many seeds, 0 and up", "3; 1")] = None
    jobs: Annotated[int | None, own("INT", "of both: arms at a time, each in its own process", "1")] = None
    json: JsonFile = None
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        check_writable(self.output / "claims.md")
        if self._given() and self.what not in ("compare", "codecs"):
            given = ", ".join(f"--{name}" for name in self._given())
            raise ConfigError(f"{given}: of compare and codecs; {self.what} trains nothing.")
        doing: dict[str, Callable[[], Any]] = {
            "skips": self._skips,
            "turns": self._turns,
            "sheets": self._sheets,
            "compare": self._compare,
            "paper": self._paper,
            "codecs": self._codecs,
        }
        told = doing[self.what]()
        if self.json is not None:
            _write(told, self.json)
        return 0

    def _given(self) -> dict[str, int]:
        """What was said of steps, batch, seeds and jobs. Raises ConfigError for less than one."""
        given = {name: getattr(self, name) for name in ("steps", "batch", "seeds", "jobs")}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if value < 1:
                raise ConfigError(f"--{name} is {value}; expected at least 1.")
        return given

    def _budget(self) -> dict[str, Any]:
        """The same as fields of a comparison's settings."""
        given: dict[str, Any] = {name: value for name, value in self._given().items() if name != "jobs"}
        return given | ({"seeds": tuple(range(given["seeds"]))} if "seeds" in given else {})

    def _joint(self) -> StarFlow2:
        return conversing(self.model, self.device, f"analyze {self.what}")

    def _skips(self) -> Any:
        from starflow2.research.analysis import plot_skips, skip_contributions

        report = skip_contributions(self._joint().sampler())
        told = report.to_json()
        _write(told, self.output / "skips.json")
        plot_skips(report, self.output / "skips.png")
        for name in ("visual", "text"):
            row = told[name]
            print(f"{name}: ratio {row['contribution_ratio']['mean']:.3f}, cosine {row['cosine']['mean']:+.3f}")
        return told

    def _turns(self) -> Any:
        from starflow2.research.analysis import plot_turn_costs, turn_costs

        costs = turn_costs(self._joint().sampler())
        told = {"turns": [cost.to_json() for cost in costs]}
        _write(told, self.output / "turns.json")
        plot_turn_costs(costs, self.output / "turns.png")
        for row in told["turns"]:
            slot, anew = 1000 * row["per_slot"], row["slower_to_start"]
            print(f"turn {row['turn']}: {slot:.1f} ms per slot, {anew:.1f} times slower to start anew")
        return told

    def _sheets(self) -> Any:
        from starflow2.research.figures import edit_sheet, story_sheet

        model, files = self._joint(), [self.output / "edits.png", self.output / "stories.png"]
        edit_sheet(model, files[0])
        story_sheet(model, files[1])
        print(*files, sep="\n")
        return {"files": [str(file) for file in files]}

    def _compare(self) -> Any:
        from starflow2.models.hub import NANO, pick_device
        from starflow2.research.ablations import CompareConfig, compare_and_keep

        config = replace(CompareConfig(), **self._budget())
        folder = NANO if self.model == "nano" else Path(self.model)
        device = str(pick_device(self.device))
        rows = compare_and_keep(folder, config, self.output, device=device, jobs=self.jobs or 1)
        print(self.output / "compare.md")
        return {"rows": rows}

    def _codecs(self) -> Any:
        from starflow2.models.hub import find_model, pick_device
        from starflow2.research.codec_ablations import CodecsConfig, compare_codecs, write

        config = replace(CodecsConfig(), **self._budget())
        device = str(pick_device(self.device))
        rows = compare_codecs(find_model(self.model), config, self.output, device=device, jobs=self.jobs or 1)
        print(write(rows, config, self.output))
        return {"rows": rows}

    def _paper(self) -> Any:
        from starflow2.research.paper_claims import CLAIMS, write_claims

        for name, measure in (("skips", self._skips), ("turns", self._turns)):
            if not (self.output / f"{name}.json").is_file():
                measure()
        print(write_claims(self.output))
        return {"claims": [claim.text for claim in CLAIMS]}


def _write(told: Any, path: Path) -> None:
    with replacing(path) as temp:
        temp.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


# -- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data:
    """Check a corpus before training: documents, pictures, lengths, and what is broken and why.

    Exit status 1 if none of its samples can be used. Needs the extra `train`.
    """

    verb: ClassVar[str] = "data"

    what: Positional[Annotated[Literal["check"], arg(metavar="check", help="read it as training would")]]
    url: Positional[Annotated[str, arg(metavar="URL", help="a file, folder or pattern, here or remote")]]
    corpus: Annotated[
        Literal["captions", "cc12m", "journeydb", "blip3o", "cambrian", "comm", "pico-banana", "omniedit", "zebra-cot"],
        arg(help="whose schema it has; captions: pictures with words beside them"),
    ] = "captions"
    format: Annotated[Literal["auto", "tar", "parquet", "jsonl", "folder"], arg(help="what the files are")] = "auto"
    pictures: Annotated[str, own("FOLDER", "where paths of pictures start", "the file's own folder")] = ""
    limit: Annotated[int | None, own("INT", "samples to read", "all")] = None
    json: JsonFile = None
    model: Model = "nano"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_json(self.json)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit is {self.limit}; expected at least 1 sample.")
        from starflow2.data.check import survey
        from starflow2.data.mixture import Source

        source = Source(corpus=self.corpus, url=self.url, weight=1, format=self.format, pictures=self.pictures)
        with progress("reading", "samples") as step:
            facts = survey(source, _spelling(self.model), self.limit, lambda read: step(read, self.limit or read))
        console().print(_data_table(facts))
        write_json(facts, self.json)
        if facts["documents"]:
            return 0
        console(stderr=True).print(f"none of the {facts['samples']} samples of {self.url} can be used.", markup=False)
        return 1


def _spelling(name: str) -> Any:
    """How the model of that name writes documents down; its weights are not read."""
    from starflow2.data.mixture import Spelling
    from starflow2.models.checkpoint import load_words
    from starflow2.models.components import build
    from starflow2.models.hub import find_model

    tokenizer, cfg = load_words(find_model(name))
    return Spelling(tokenizer, build(cfg, "meta").layout, cfg.fae.image_size)


def _data_table(facts: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    title = f"{facts['corpus']}, {facts['format']}, files: {facts['files']:,}"
    table = Table("", "", title=title, title_style="", title_justify="left", show_header=False)
    table.add_row("samples", f"{facts['samples']:,}")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in facts["kinds"].items())
    table.add_row("documents", f"{facts['documents']:,}" + (f" ({kinds})" if kinds else ""))
    table.add_row("pictures", f"{facts['pictures']:,}")
    for name in ("positions", "tokens"):
        table.add_row(f"{name} of a document", ", ".join(f"{k} {v:,}" for k, v in facts[name].items()))
    table.add_section()
    table.add_row("broken", f"{facts['samples'] - facts['documents']:,}")
    for reason, found in facts["broken"].items():
        example = found["examples"][0]
        where = f"{Path(example['source']).name} {example['key']}"
        table.add_row(f"  {reason}", Text(printable(f"{found['count']:,}, such as {where}: {example['detail'][:120]}")))
    return table
