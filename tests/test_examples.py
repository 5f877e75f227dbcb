"""Every example on the pages, done by the shipped weights and judged: what a reader copies from there works."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from starflow2.core.images import PILImage
from starflow2.evals.examples import do_examples, faults_of, working_seed
from starflow2.pipeline import StarFlow2
from starflow2.world.captions import GenEvalObject
from starflow2.world.detector import detect
from starflow2.world.examples import EXAMPLES, TASKS, Example, shown

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
def done(model):
    """Every example, done at the default settings."""
    return do_examples(model)


@pytest.mark.parametrize("task", TASKS)
def test_every_example_does_what_its_sentence_says(done, task):
    mine = [d for d in done if d.example.task == task]
    assert mine and not {d.example.text: d.fault for d in mine if d.fault}


def test_pages_say_nothing_else():
    known = {e.text for e in EXAMPLES} | {e.about for e in EXAMPLES} | TAUGHT | TALKS
    said = {text for page in PAGES for text in SAID.findall(page.read_text("utf-8"))}
    assert said and said <= known


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def seen(file: str, *shows: GenEvalObject) -> str:
    """What is wrong with a picture that a page saved."""
    with Image.open(file) as image:
        return faults_of(Example(task="draw", what="", text=file, shows=shows), image.convert("RGB"))


def test_the_first_lines_of_the_readme_draw_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(python_blocks(ROOT / "README.md")[0], {})
    assert {i: seen(f"hearts-{i}.png", shown("two pink hearts")) for i in range(4)} == dict.fromkeys(range(4), "")
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


def test_an_edit_that_changes_nothing_says_so(model, done):
    star = next(d.image for d in done if d.example.text == "a red star")
    assert model.edit(star, "make the star red").is_unchanged


def side(image: PILImage) -> float:
    """Longer side in pixels of the only object of a picture."""
    ((found,),) = [scan.detections for scan in detect(np.asarray(image)[None])]
    x0, y0, x1, y1 = found.box
    return max(x1 - x0, y1 - y0)


def test_what_is_made_larger_is_larger(done):
    sizes = [d for d in done if d.example.what == "size" and d.example.task == "edit"]
    assert sizes and all(side(d.image) > 1.25 * side(d.source) for d in sizes)


class Blank:
    """A model that draws white squares and answers "no"."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, prompts, *, seed):
        self.asked.append(prompts)
        return [self.edit(None, "", seed=seed)]

    def edit(self, image, instruction, *, seed):
        return SimpleNamespace(image=Image.new("RGB", (64, 64), "white"))

    def ask(self, image, question):
        return "no"


def test_a_model_that_does_nothing_right_is_found_out():
    blank = Blank()
    done = do_examples(blank)
    assert all(d.fault for d in done) and len(done) == len(EXAMPLES)
    assert len(blank.asked) == len({(e.about or e.text, e.seed) for e in EXAMPLES}), "a shared picture is drawn once"
    assert working_seed(blank, EXAMPLES[0]) is None


def test_a_seed_with_which_an_example_works_is_found():
    class Third(Blank):
        def ask(self, image, question):
            return "two" if len(self.asked) > 2 else "no"

    asked = next(e for e in EXAMPLES if e.answer == "two")
    assert working_seed(Third(), asked) == 2
