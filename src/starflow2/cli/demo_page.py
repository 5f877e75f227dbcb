"""One page that shows what a model draws: images, the detector's verdict on each, scores with floors and ceilings.

The page shows what was scored: a quick share of the test suite, one image per prompt. A model of stage 3 also shows
its conversations. The page is a single static file with its images inside. Not here: the rules of the scores (evals),
their full run (`eval world`), and everything about conversations (demo_conversations).
"""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

import starflow2
from starflow2.cli import demo_conversations
from starflow2.cli.demo_conversations import Conversations, DemoSuites, data_url, score_conversations
from starflow2.core.files import check_writable, named_place, replacing
from starflow2.core.images import PILImage, contact_sheet, save_png, to_pil
from starflow2.core.serialize import read_json
from starflow2.errors import CheckpointError, ConfigError, OutputError
from starflow2.evals.geneval import Drawer, Verdict, grade, name_scan, score_geneval
from starflow2.evals.report import commit, write_json
from starflow2.evals.statistics import Scores
from starflow2.evals.suite import Progress, Report
from starflow2.models.hub import find_model
from starflow2.pipeline import StarFlow2
from starflow2.world.captions import suite_drawings
from starflow2.world.detector import detect
from starflow2.world.grammar import FAMILIES

__all__ = ["Demo", "Shown", "check_folder", "make_demo"]

PARTS: tuple[Literal["id", "cg"], ...] = ("id", "cg")
FILES = ("sheet.png", "index.html", "report.json")
BADGES = {"id": "seen combination", "cg": "new combination"}
Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Shown:
    """One scored image. part: "id" for combinations of training, "cg" for those that it never showed together."""

    prompt: str
    category: str
    part: str
    image: PILImage
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Demo:
    """The outcome of a demo run. scores: the whole report of the suite. card: card.json of the model folder, or {}.

    conversations: only of a model whose streams were trained together.
    """

    model: str
    page: Path
    weights_mb: float
    seconds_per_image: float
    scores: Report
    shown: tuple[Shown, ...]
    card: Json
    commit: str
    conversations: Conversations | None = None

    def summary(self) -> Json:
        """The figures of report.json."""
        return {
            "commit": self.commit,
            "weights_mb": self.weights_mb,
            "seconds_per_image": self.seconds_per_image,
            "w_geneval": _summary(self.scores),
            **(self.conversations.summary() if self.conversations else {}),
            "card": self.card,
        }


def make_demo(
    model: StarFlow2,
    name: str,
    folder: str | Path,
    *,
    progress: Progress | None = None,
    suites: DemoSuites | None = None,
) -> Demo:
    """Draw, score, and write sheet.png, index.html and report.json into `folder`.

    name: where the model is from, as StarFlow2.from_pretrained takes it. progress: called with (items done, items in
    all) of the current suite. suites: those of conversations. Raises what drawing and writing raise.
    """
    folder, where = named_place(folder, "folder", OutputError), find_model(name)
    record = _DrawingRecord(model)
    scores = score_geneval(record, "test", quick=True, samples=1, parts=PARTS, progress=progress)
    demo = Demo(
        model=model.components.cfg.name,
        page=folder / "index.html",
        weights_mb=round(_weights_mb(where, model), 2),
        seconds_per_image=round(record.seconds / len(record.prompts), 4),
        scores=scores,
        shown=tuple(_graded(record, scores)),
        card=_card(where),
        commit=commit(),
        conversations=score_conversations(model, progress, suites) if model.is_joint else None,
    )
    _write(demo, folder)
    return demo


def check_folder(folder: Path) -> None:
    """Raise OutputError if the files of a demo cannot be written into `folder`."""
    for file in FILES:
        check_writable(folder / file)


def _write(demo: Demo, folder: Path) -> None:
    labels = [s.prompt if s.verdict.correct else f"{s.prompt} (missed)" for s in demo.shown]
    metadata = {"model": demo.model, "version": starflow2.__version__, "commit": demo.commit}
    save_png(contact_sheet([s.image for s in demo.shown], labels), folder / "sheet.png", metadata)
    write_json(demo.summary(), folder / "report.json")
    with replacing(demo.page) as temp:
        temp.write_text(_page(demo), encoding="utf-8")


# -- images and their scores ------------------------------------------------------------------------------------------


@dataclass
class _DrawingRecord:
    """A model that remembers its images, their prompts, and how long drawing took."""

    model: Drawer
    prompts: list[str] = field(default_factory=list)
    images: list[PILImage] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sampling_noise(self) -> float:
        return self.model.sampling_noise

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        started = time.perf_counter()
        images = self.model.draw(prompts, seeds)
        self.seconds += time.perf_counter() - started
        self.prompts += prompts
        self.images += [to_pil(image) for image in images]
        return images

    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        return self.model.roundtrip(images, noise_level, seed)


def _graded(record: _DrawingRecord, scores: Report) -> list[Shown]:
    """Every image with its verdict, in the order of the suite: part by part, category by category."""
    shown: list[Shown] = []
    scans = detect(np.stack([np.asarray(image) for image in record.images]))
    for part in PARTS:
        drawings = {d.prompt: d for d in suite_drawings("geneval", "test", part)}
        for i in range(len(shown), len(shown) + scores.parts[part].n):
            drawing = drawings[record.prompts[i]]
            verdict = grade(drawing.metadata, name_scan(scans[i]))
            shown.append(Shown(drawing.prompt, drawing.family, part, record.images[i], verdict))
    return shown


def _summary(scores: Report) -> Json:
    parts = {part: scores.parts[part] for part in PARTS}
    by_category = {
        part: {name: row.value("lenient") for name, row in found.by_kind.items()} for part, found in parts.items()
    }
    overall: Json = {part: found.value("lenient") for part, found in parts.items()}
    ceilings = {f"fae_ceiling_{name}": scores.bounds[name]["id"].value("lenient") for name in ("clean", "noise")}
    return overall | {"n": scores.n, "by_category": by_category} | ceilings


def _weights_mb(folder: Path, model: StarFlow2) -> float:
    """Megabytes of the weight files of a model folder; where there are none, of its tensors."""
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return (size or sum(t.nbytes for t in model.components.state_dict().values())) / 1e6


def _card(folder: Path) -> Json:
    """card.json of the model folder: how the weights were made and the scores of a full run; {} where there is none."""
    path = folder / "card.json"
    if not path.is_file():
        return {}
    try:
        card: object = read_json(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path} is not a JSON object; expected the card of the model.")
    return card


# -- the page ---------------------------------------------------------------------------------------------------------


def _page(demo: Demo) -> str:
    shown = demo.conversations
    return _PAGE.format(
        style=_STYLE + (demo_conversations.STYLE if shown else ""),
        model=html.escape(demo.model),
        count=len(demo.shown),
        right=sum(s.verdict.correct for s in demo.shown),
        weights=f"{demo.weights_mb:.0f}",
        seconds=f"{demo.seconds_per_image:.2f}",
        gallery="\n".join(_section(demo, category) for category in FAMILIES),
        ways=_WAYS if shown else "",
        talk=demo_conversations.sections(shown) if shown else "",
        scores=_score_table(demo.scores),
        talk_scores=f"<h2>Scores of conversations</h2>\n{demo_conversations.table(shown)}" if shown else "",
        card=_card_section(demo.card),
        commit=html.escape(demo.commit),
        version=html.escape(starflow2.__version__),
        n=demo.scores.n,
    )


def _section(demo: Demo, category: str) -> str:
    shown = [s for s in demo.shown if s.category == category]
    right = sum(s.verdict.correct for s in shown)
    figures = "\n".join(_figure(s) for s in shown)
    title = html.escape(category.replace("_", " "))
    return f'<h2>{title} <small>{right} of {len(shown)}</small></h2>\n<div class="grid">\n{figures}\n</div>'


def _figure(shown: Shown) -> str:
    source = data_url(shown.image)
    prompt, why = html.escape(shown.prompt, quote=True), html.escape(shown.verdict.reason, quote=True)
    is_right = shown.verdict.correct
    mark = '<b class="yes">✓</b>' if is_right else f'<b class="no" title="{why}">✗</b>'
    kind = f'<span class="new">{BADGES["cg"]}</span>' if shown.part == "cg" else ""
    note = "" if is_right else f'<span class="why">{why}</span>'
    return (
        f'<figure><img src="{source}" alt="{prompt}" width="128" height="128" loading="lazy">'
        f"<figcaption>{mark} {prompt}{note}{kind}</figcaption></figure>"
    )


def _score_table(scores: Report) -> str:
    """Category by category: ID and CG, the floor of each, the ceiling clean and noisy."""
    head = "<tr><th>category<th>ID<th>CG<th>floor ID / CG<th>ceiling clean / noisy</tr>"
    parts, floor = ([found[part] for part in PARTS] for found in (scores.parts, scores.bounds["floor"]))
    ceilings = [scores.bounds[name]["id"] for name in ("clean", "noise")]
    rows = []
    for name in [*(c for c in FAMILIES if c in parts[0].by_kind), "overall"]:
        cells = [_score(found, name) for found in parts]
        cells += [" / ".join(_score(found, name) for found in bounds) for bounds in (floor, ceilings)]
        title = html.escape(name.replace("_", " "))
        rows.append(
            f"<tr{' class=total' * (name == 'overall')}><th>{title}" + "".join(f"<td>{c}" for c in cells) + "</tr>"
        )
    return f"<table>{head}\n" + "\n".join(rows) + "</table>"


def _score(scores: Scores, name: str) -> str:
    row = scores if name == "overall" else scores.by_kind.get(name)
    return f"{row.value('lenient'):.2f}" if row else "–"


def _card_section(card: Mapping[str, object]) -> str:
    """The figures of card.json as a table."""
    if not card:
        return ""
    rows = "\n".join(f"<tr><th>{html.escape(key)}<td>{html.escape(value)}</tr>" for key, value in _flat(card))
    title = "The card of these weights, from the full test run"
    return f"<details><summary>{title}</summary>\n<table>{rows}</table></details>"


def _flat(tree: Mapping[str, object], above: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{above} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(value, name)
        else:
            rows.append((name, ", ".join(map(_cell, value)) if isinstance(value, list) else _cell(value)))
    return rows


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d22; --soft: #6b6b76; --line: #e3e3ea; --page: #fbfbfd; --card: #fff;
  --yes: #1c8a4a; --no: #c8372d; --new: #4659c9; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --soft: #9c9ca8; --line: #33333c; --page: #16161a;
  --card: #1f1f25; --yes: #4cc27c; --no: #f0776d; --new: #93a1f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 2.2rem; line-height: 1.15; margin: 0 0 .75rem; letter-spacing: -.02em; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .9rem; }
h2::first-letter { text-transform: uppercase; }
h2 small { color: var(--soft); font-weight: 400; margin-left: .35rem; }
p { max-width: 44rem; margin: 0 0 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .9rem; }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
img { display: block; width: 100%; height: auto; aspect-ratio: 1; border-radius: .3rem; }
figcaption { margin-top: .5rem; font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption span { display: block; margin-top: .2rem; font-size: .74rem; }
.yes { color: var(--yes); } .no { color: var(--no); } .why { color: var(--soft); } .new { color: var(--new); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
summary { cursor: pointer; color: var(--soft); padding: .3rem 0; }
details th, details td { color: inherit; text-align: left; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400; }
th:first-child { text-align: left; } tr:first-child th { color: var(--soft); } .total > * { font-weight: 600; }
pre { padding: .9rem 1.1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  overflow-x: auto; font-size: .88rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
"""

_WAYS = """<p>Further down: <a href="#story">a story told turn by turn</a>, <a href="#edits">edited images</a>,
<a href="#questions">questions about images</a>, <a href="#scores">scores</a>.</p>"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>StarFlow2: from words to images</title>
<style>{style}</style>
</head>
<body>
<h1>From words to images</h1>
<p>Each image below was drawn from the sentence under it by StarFlow2 {model}, a normalizing flow that reads the states
of a frozen vision-language model: {weights} MB of weights, {seconds} s per image on this machine. A classical detector,
not a network, graded every image by GenEval's rules: {right} of {count} show what was asked for. These are all the
images of the run, failures included. “New combination” marks sentences with a combination that training never
contained, for example of a colour and a shape.</p>
{ways}
{gallery}
{talk}
<h2 id="scores">Scores of this run</h2>
<div class="wide">{scores}</div>
<p>Shares of correct images on a quick share of the test suite ({n} images, one per prompt), so they are noisy. ID: seen
combinations, CG: new ones. Floor: true images of other prompts, the score of a model that never reads the prompt.
Ceiling: true images after the model's own codec, clean and at the noise of sampled latents; no drawing can pass it.</p>
{talk_scores}
<div class="wide">{card}</div>
<h2>Do it again</h2>
<pre>make demo                                              # this page
starflow2 generate "two pink hearts" -n 4 -o hearts.png  # a prompt of your own
starflow2 eval world --suite geneval --split test --json scores.json  # the full suite
starflow2 train nano                                    # the weights, from scratch</pre>
<p>Images depend only on prompt and seed: the same command makes the same page.</p>
<footer>StarFlow2 {version}, commit {commit}. The contact sheet is <a href="sheet.png">sheet.png</a>, the figures are in
<a href="report.json">report.json</a>.</footer>
</body>
</html>
"""
