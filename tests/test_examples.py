"""Every example on the pages, done by the shipped weights and judged: what a reader copies from there works."""

import re
from pathlib import Path

import pytest
import torch

from starflow2.core.images import read_picture, to_bytes
from starflow2.evals.edit import TINT
from starflow2.evals.geneval import grade, name_scan
from starflow2.pipeline import StarFlow2
from starflow2.world.captions import GenEvalObject
from starflow2.world.detector import Scan, detect
from starflow2.world.examples import EXAMPLES, Example, shown
from starflow2.world.scene import BACKGROUND_NAMES, BACKGROUNDS

ROOT = Path(__file__).resolve().parent.parent
OTHER = ("LOG.md", "choices.md", "own-pictures.md")  # records, and a page about a model of another world
PAGES = [
    ROOT / "README.md",
    *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in OTHER),
]
SAID = re.compile(
    r'(?:generate\(?|\.add\(|\.draw\(|(?:edit|ask|score|invert) [^\s"]+|score|--swap|/draw)\s*"?([a-z][a-z ,.?]+)"'
)
TAUGHT = {"a brown circle"}  # said to a model that was fine-tuned on it
TALKS = {"start with a purple star."}  # a turn of a conversation, tested below


@pytest.fixture(scope="module")
def model():
    return StarFlow2.from_pretrained("nano")


@pytest.fixture(scope="module")
def pictures(model):
    """The picture of every prompt and seed that an example draws or is about."""
    keys = sorted({(e.about or e.text, e.seed) for e in EXAMPLES})
    images = model.draw([prompt for prompt, _ in keys], [seed for _, seed in keys])
    return dict(zip(keys, images, strict=True))


def faults(example: Example, image: torch.Tensor) -> str:
    """Faults that the judge finds in a picture; '' if nothing."""
    (scan,) = detect(to_bytes(image[None]))
    verdict = grade({"include": list(example.shows)}, name_scan(scan))
    wrong = [] if verdict.strict_correct else [verdict.reason or "there is something else in the picture"]
    if example.background and not has_background(scan, example.background):
        wrong.append(f"the background is {scan.background}, not {example.background}")
    return "; ".join(wrong)


def has_background(scan: Scan, name: str) -> bool:
    asked = BACKGROUNDS[BACKGROUND_NAMES.index(name)] / 255
    return float(((asked - scan.background) ** 2).sum() ** 0.5) < TINT


def named(task: str) -> list[Example]:
    return [example for example in EXAMPLES if example.task == task]


def test_every_drawing_shows_what_its_sentence_says(pictures):
    wrong = {e.text: found for e in named("draw") if (found := faults(e, pictures[e.text, e.seed]))}
    assert not wrong


def test_every_edit_does_what_its_instruction_says(model, pictures):
    edits = named("edit")
    sources = torch.stack([pictures[e.about, e.seed] for e in edits])
    images = model.edits(sources, [e.text for e in edits], [e.seed for e in edits])
    assert not {e.text: found for e, image in zip(edits, images, strict=True) if (found := faults(e, image))}


def test_every_question_is_answered_rightly(model, pictures):
    asked = named("ask")
    answers = model.answers([[pictures[e.about, e.seed]] for e in asked], [e.text for e in asked])
    assert {e.text: a for e, a in zip(asked, answers, strict=True)} == {e.text: e.answer for e in asked}


def test_pages_say_nothing_else():
    known = {e.text for e in EXAMPLES} | {e.about for e in EXAMPLES} | TAUGHT | TALKS
    said = {text for page in PAGES for text in SAID.findall(page.read_text("utf-8"))}
    assert said and said <= known


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def seen(file: str, *shows: GenEvalObject) -> str:
    """What is wrong with a picture that a page saved."""
    return faults(Example(task="draw", what="", text=file, shows=shows), read_picture(file, 64))


def test_the_first_lines_of_the_readme_draw_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(python_blocks(ROOT / "README.md")[0], {})
    assert {str(seed): seen(f"hearts-{seed}.png", shown("two pink hearts")) for seed in range(4)} == dict.fromkeys(
        "0123", ""
    )
    assert not seen("star.png", shown("a red star")) and not seen("blue.png", shown("a blue star"))
    assert capsys.readouterr().out.strip() == "blue"


def test_the_conversation_on_its_page_draws_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks(ROOT / "docs" / "conversations.md"):
        exec(block, names)
    square = shown("a blue square")
    assert not seen("one.png", square, shown("a red star", ("left of", 0)))
    assert not seen("two.png", square, shown("a yellow star", ("left of", 0)))
    assert "yellow" in capsys.readouterr().out
    assert not seen("step.png", shown("a purple star"))


def test_an_edit_that_changes_nothing_says_so(model, pictures):
    star = pictures["a red star", 0]
    assert model.edit(star, "make the star red").is_unchanged
    assert not any(model.edit(pictures[e.about, e.seed], e.text, seed=e.seed).is_unchanged for e in named("edit"))


def side(image: torch.Tensor) -> float:
    """Longer side in pixels of the only object of a picture."""
    ((found,),) = [scan.detections for scan in detect(to_bytes(image[None]))]
    x0, y0, x1, y1 = found.box
    return max(x1 - x0, y1 - y0)


def test_what_is_made_larger_is_larger(model, pictures):
    for example in EXAMPLES:
        if example.what == "size" and example.task == "edit":
            source = pictures[example.about, example.seed]
            (image,) = model.edits(source[None], [example.text], [example.seed])
            assert side(image) > 1.25 * side(source)
