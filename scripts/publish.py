"""Make the models of a finished run the shipped ones, and renew everything in the repository that depends on them.

    make publish RUN=runs/nano                # everything, about an hour and a half on two cores
    python scripts/publish.py runs/nano --jobs 2             # two reports at a time, one process a core
    python scripts/publish.py runs/nano --only model lock examples    # some of the steps

model: copy the run's nano and nano-heldout into the package, with the log densities of drawn images measured on each.
lock: write worldbench.lock for today's suites. scores: score both models on every suite's test split, one line each in
docs/results/ledger.jsonl and one report in docs/results/MODEL. card: card.json and card.md of both models, and
docs/results/tables.md. run: the run's metrics, into docs/results/run. claims: what claims.md is written from, and it.
pages: what-to-say.md and README's sheet. examples: do every example of the pages; say which no longer hold, on
which pages they stand, and with which seed each would.

Every step can be repeated; `scores` goes on where it stopped. Exits with 1 if an example does not hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from starflow2.core.files import replacing
from starflow2.core.serialize import read_json
from starflow2.evals import dpg, edit, geneval, gqa, mcq, mme, newcomers, story
from starflow2.evals.examples import do_examples, working_seed
from starflow2.evals.report import commit, write_json
from starflow2.evals.suite import LOCK_VERSION, Report, Section
from starflow2.evals.tables import lines, notes, table
from starflow2.models.checkpoint import load_components, weights_digest
from starflow2.models.hub import ASSETS
from starflow2.pipeline import StarFlow2
from starflow2.research.far_images import COUNT, keep_far_limit

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = Path("docs") / "results"
MODELS: Final = ("nano", "nano-heldout")
SUITES: Final = ("geneval", "dpg", "mme", "gqa", "mcq", "edit", "sessions", "story", "newcomers")
PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "geneval": ("id", "cg", "paraphrase", "new", "scenes"),
    "edit": ("id", "cg", "paraphrase", "plain"),
    "story": ("id", "cg", "paraphrase", "plain"),
}
COMMAND: Final = "starflow2 train nano"
SHOWN: Final = ("two_object", "counting", "position", "color_attr")  # on README's sheet
PAGES: Final = ("README.md", "docs/*.md")


@dataclass(frozen=True, slots=True)
class Publisher:
    """A finished run, and the checkout whose shipped models it replaces. assets: where these are."""

    run: Path
    root: Path = ROOT
    assets: Path = ASSETS
    images: int = COUNT  # of each kind, by which far images are told
    quick: bool = False  # dev split, one item in eight, no ledger: to try the whole way
    command: str = COMMAND  # that made the run
    how: str = ""  # the run was made, in a sentence, where it is not that command from the start
    jobs: int = 1  # reports that are made side by side

    @property
    def models(self) -> list[str]:
        """Names of the models that the run has kept, or that are shipped already."""
        return [name for name in MODELS if any((at / name / "config.json").is_file() for at in (self.run, self.assets))]

    # -- steps

    def model(self) -> None:
        for name in MODELS:
            source = self.run / name
            if not (source / "config.json").is_file():
                print(f"{source} is not there; {name} stays as it is")
                continue
            components = load_components(source)  # whole and sound, or nothing is replaced
            place = self.assets / name
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(source, place)
            found = keep_far_limit(place, self.images)
            print(f"{place}: weights {weights_digest(components)}, images are far beyond {found.limit:.3f} nats/dim")

    def lock(self) -> None:
        fresh: Section = {"version": LOCK_VERSION}
        suites = (geneval.GenevalSuite(), mme.MmeSuite(), gqa.GqaSuite(), mcq.McqSuite(), dpg.DpgSuite())
        for suite in (*suites, story.StorySuite(), edit.EditSuite(), newcomers.NewcomersSuite()):
            fresh |= suite.lock()
        path = self.assets / "worldbench.lock"
        old = read_json(path) if path.is_file() else {}
        changed = [name for name in fresh if json.dumps(old.get(name)) != json.dumps(fresh[name])]
        print(f"{path}: {'sections changed: ' + ', '.join(changed) if changed else 'nothing changed'}")
        write_json(fresh, path)

    def scores(self) -> None:
        digests = {name: weights_digest(load_components(self.assets / name)) for name in self.models}
        missing = [
            (name, suite)
            for suite in SUITES
            for name, digest in digests.items()
            if not (self.report(name, suite).is_file() and read_json(self.report(name, suite)).get("weights") == digest)
        ]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda pair: self._score(*pair), missing))

    def _score(self, name: str, suite: str) -> None:
        self.report(name, suite).parent.mkdir(parents=True, exist_ok=True)
        self._starflow2("eval", "world", *self._eval_options(name, suite))

    def _eval_options(self, name: str, suite: str) -> list[str]:
        parts = ["--part", *PARTS[suite]] if suite in PARTS else []
        ledger = ["--quick"] if self.quick else ["--split", "test", "--ledger", str(RESULTS / "ledger.jsonl")]
        model = ["--model", str(self.assets / name), "--json", str(self.report(name, suite))]
        return ["--suite", suite, *parts, *ledger, *model]

    def report(self, name: str, suite: str) -> Path:
        """File of a report."""
        return self.root / RESULTS / name / f"{suite}.json"

    def _report(self, name: str, suite: str) -> Report:
        return Report.from_json(read_json(self.report(name, suite)))

    def card(self) -> None:
        tables = ["# Scores of the shipped models", "", "Written by `make publish` from the reports beside it.", ""]
        for name in self.models:
            card = self._card(name)
            write_json(card, self.assets / name / "card.json")
            text = "\n".join(self._card_page(name, card))
            _write(self.assets / name / "card.md", text)
            tables += [f"# {name}" if line.startswith("# ") else line for line in text.splitlines()]
        _write(self.root / RESULTS / "tables.md", "\n".join(tables) + "\n")

    def _card(self, name: str) -> dict[str, object]:
        made = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "command": self.command}
        return {"made": made | {"minutes": minutes_of(self.run)}} | {
            f"w_{suite}": headlines(self._report(name, suite)) for suite in SUITES if self.report(name, suite).is_file()
        }

    def _card_page(self, name: str, card: Mapping[str, Any]) -> Iterator[str]:
        yield from (f"# {name}", "")
        yield from (_WHAT[name], "")
        yield from (_WORLD, "", "## How it was made", "")
        made, how = card["made"], self.how or "from the start as published."
        yield f"One run of `{made['command']}`, commit {made['commit']}, {how}"
        yield from ("", "| stage | minutes |", "|---|---|")
        yield from (f"| {stage} | {minutes:.0f} |" for stage, minutes in made["minutes"].items())
        yield from ("", "## Scores", "")
        for suite in SUITES:
            if self.report(name, suite).is_file():
                yield from markdown_of(self._report(name, suite))

    def metrics(self) -> None:
        place = self.root / RESULTS / "run"
        place.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.run.glob("metrics-*.jsonl")):
            shutil.copy(path, place / path.name)
            print(place / path.name)

    def claims(self) -> None:
        for suite in ("mme", "gqa", "geneval"):
            if (report := self.report("nano", suite)).is_file():
                shutil.copy(report, self.root / RESULTS / f"{suite}.json")
        for what in ("skips", "turns", "sheets", "understanding", "paper"):
            self._starflow2("analyze", what)

    def pages(self) -> None:
        self._starflow2("words", "--output", "docs/what-to-say.md")
        drawn = self.root / "out" / "sheet"
        drawn.mkdir(parents=True, exist_ok=True)
        (drawn / "prompts.txt").write_text("\n".join(sheet_prompts()) + "\n", encoding="utf-8")
        self._starflow2("generate", "--prompts", str(drawn / "prompts.txt"), "--output", f"{drawn}/")
        shutil.copy(drawn / "sheet.png", self.root / "docs" / "images" / "sheet.png")

    def examples(self) -> bool:
        """Do every example; True if all hold."""
        model = StarFlow2.from_pretrained(self.assets / "nano")
        wrong = [done for done in do_examples(model) if done.fault]
        for done in wrong:
            example, seed = done.example, working_seed(model, done.example)
            remedy = "no seed below 16 does it" if seed is None else f"seed {seed} does it"
            pages = ", ".join(pages_with(self.root, example.text, example.about)) or "no page"
            print(f"{example.task} {example.text!r}, seed {example.seed}: {done.fault}; {remedy}; on {pages}")
        print(f"{len(wrong)} examples do not hold")
        return not wrong

    def _starflow2(self, *words: str) -> None:
        subprocess.run([sys.executable, "-m", "starflow2", *words], cwd=self.root, check=True)


# -- pieces


def minutes_of(run: Path) -> dict[str, float]:
    """Minutes that each stage of a run took, by its metrics: seconds of a step times steps, and the wait for data."""
    minutes = {}
    for path in sorted(run.glob("metrics-*.jsonl"), key=lambda path: path.stat().st_mtime):
        spent, before = 0.0, 0
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            if "seconds" in row:
                spent, before = spent + (row["step"] - before) * row["seconds"], row["step"]
        minutes[path.stem.removeprefix("metrics-")] = spent / 60
    return minutes


def headlines(report: Report) -> dict[str, object]:
    """The overall scores of a report with their intervals, by part and bound."""
    sets = {"": report.parts, **report.bounds}
    named = {f"{bound} {part}".strip(): scores for bound, parts in sets.items() for part, scores in parts.items()}
    return {
        name: {column: [v for v in (s.score, s.low, s.high) if v is not None] for column, s in scores.columns.items()}
        for name, scores in named.items()
    }


def markdown_of(report: Report) -> Iterator[str]:
    """A report as a table of Markdown with its notes."""
    grid = table(report)
    heads = [str(column.header) for column in grid.columns]
    yield from (f"### {grid.title}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}")
    yield from (f"| {' | '.join(row)} |" for row in lines(report))
    yield from ("", " ".join(notes(report)), "")


def sheet_prompts() -> list[str]:
    """The first eight prompts of four kinds of W-GenEval's test split, of which README's sheet is drawn."""
    items = geneval.captioned_scenes("test", "id")
    return [item.prompt for family in SHOWN for item in [i for i in items if i.family == family][:8]]


def pages_with(root: Path, *texts: str) -> list[str]:
    """Pages on which one of the texts stands in quotes."""
    pages = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    quoted = [f'"{text}"' for text in texts if text]
    return [str(p.relative_to(root)) for p in pages if any(text in p.read_text("utf-8") for text in quoted)]


def _write(path: Path, text: str) -> None:
    with replacing(path) as temp:
        temp.write_text(text, encoding="utf-8")
    print(path)


_WHAT: Final = {
    "nano": "The default model of starflow2: it draws 64 px images of the drawn world from words, answers about "
    "images, edits them and tells stories. Its last stage has seen every combination of the world, so what its tables "
    "call CG is seen here as well; nano-heldout is the model for that column.",
    "nano-heldout": "The model of starflow2 on which compositional generalisation is measured: no stage of its "
    "training has seen what dev and test hold out. For use, take nano.",
}
_WORLD: Final = (
    "The classes are the paper's (Qwen2.5-VL, DINOv2, FAE, deep and shallow flow), the sizes are tiny, and everything "
    "was trained by this repository from nothing, on drawn scenes: 8 shapes, 8 colours, 2 sizes, 5 backgrounds, up to "
    "4 objects. Other words are refused by name."
)


def steps_of(publisher: Publisher) -> dict[str, Callable[[], object]]:
    """All steps in their order, by name."""
    p = publisher
    named: dict[str, Callable[[], object]] = {"model": p.model, "lock": p.lock, "scores": p.scores, "card": p.card}
    return named | {"run": p.metrics, "claims": p.claims, "pages": p.pages, "examples": p.examples}


def main(argv: Sequence[str] | None = None) -> int:
    """Take the steps that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--only", nargs="+", choices=list(steps_of(Publisher(Path()))), help="steps; by default all")
    parser.add_argument("--command", default=COMMAND, help="that made the run (default: %(default)s)")
    parser.add_argument("--how", default="", help="how the run went, if not from the start as published")
    parser.add_argument("--quick", action="store_true", help="scores of one item in eight of dev, without a ledger")
    parser.add_argument("--jobs", type=int, default=1, help="reports made side by side, one a core (default: 1)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; expected 1 or more")
    if not args.run.is_dir():
        parser.error(f"{args.run} is no folder; expected that of a finished run")
    publisher = Publisher(args.run.resolve(), quick=args.quick, command=args.command, how=args.how, jobs=args.jobs)
    found = [step() for name, step in steps_of(publisher).items() if args.only is None or name in args.only]
    return int(found[-1] is False)


if __name__ == "__main__":
    sys.exit(main())
