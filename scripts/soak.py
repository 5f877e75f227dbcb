"""Call every public function over and over, and watch resident memory and open files: `make soak`.

    python scripts/soak.py --minutes 15

The model is the smallest whole one of the tests (tests/ is on the path). Every round talks, draws with several tries,
edits, asks, scores, inverts, rewinds, forks, saves and loads; beside that it calls in turn what suites call, suites and
a benchmark's folder, a server that stores its replies and starts again, fine-tuning and a density, transformers' Auto
classes, and commands. After the first fifth of the time nothing should grow: the largest resident memory of the last
fifth is compared with that of the second one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from starflow2.benchmarks.geneval import score_folder
from starflow2.cli.app import main as command
from starflow2.core.images import to_tensor
from starflow2.errors import PromptError
from starflow2.evals.runner import score_suite
from starflow2.flow import FitConfig, density
from starflow2.inference.config import ReplyLimits
from starflow2.inference.session import Session
from starflow2.models.config import SelfCheckConfig
from starflow2.models.lora import LoraConfig
from starflow2.pipeline import StarFlow2
from starflow2.serving.jobs import LOCAL, Ask, Done, ScoreAsk
from starflow2.serving.limits import ServeLimits
from starflow2.serving.service import Service
from starflow2.training.finetune import FinetuneConfig, finetune, read_album

__all__ = ["Seen", "growth", "main", "rounds", "soaked"]

ALLOWED = 0.05  # growth of resident memory between the second and the last fifth of the time


@dataclass(frozen=True, slots=True)
class Seen:
    """State of the process after a round."""

    seconds: float
    resident: int  # bytes
    files: int  # open


def _now(start: float) -> Seen:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return Seen(time.monotonic() - start, pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")))


def growth(seen: list[Seen]) -> tuple[float, bool]:
    """Growth of the largest resident memory from the second fifth of the time to the last; True if files are as many.

    >>> growth([Seen(t, 100 + t, 6) for t in range(1, 101)])[1]
    True
    """
    end = seen[-1].seconds
    second = [s for s in seen if end / 5 < s.seconds <= 2 * end / 5] or seen[:1]
    last = [s for s in seen if s.seconds > 4 * end / 5]
    grown = max(s.resident for s in last) / max(s.resident for s in second) - 1
    return grown, {s.files for s in last} == {s.files for s in second}


def _talk(model: StarFlow2, folder: Path, number: int) -> None:
    """A conversation with everything that a session can do, several tries, and a file that it goes on from."""
    session = model.session(seed=number)
    made = session.add("a red circle").draw(tries=4)
    mark = session.mark()
    session.add("make the circle blue").draw()
    session.rewind(mark)
    fork = session.fork()
    fork.add("what color is the circle?").write(tokens=3)
    for _ in session.add("two red hearts").run(tokens=3, pictures=1, tries=2):
        pass
    session.save(folder / "talk.safetensors")
    again = Session.load(folder / "talk.safetensors", model.sampler())
    again.add(made.image, "what is it?").write(tokens=2)
    again.save(folder / "talk.safetensors")


def _single_calls(model: StarFlow2, folder: Path, number: int) -> None:
    """Calls that are no conversation."""
    drawing = model.generate("two red hearts", seed=number, tries=4)[0]
    image = to_tensor(drawing.image)
    model("a red circle")
    model.ask(drawing.image, "what color is it?")
    model.edit(image, "make it blue", seed=number, tries=2)
    model.score(["two red hearts"], [image])
    model.from_code(model.invert(image, "two red hearts"), "two red hearts")
    model.is_far(image)
    with contextlib.suppress(PromptError):
        model.generate("a zebra")
    model.save_pretrained(folder / "model")
    StarFlow2.from_pretrained(folder / "model")


def _many_at_once(model: StarFlow2, folder: Path, number: int) -> None:
    """Calls of many rows, as suites make them."""
    images = model.draw(["a red circle", "two red hearts"], [number, number + 1])
    questions = ["what color is it?", "how many are there?"]
    model.answers([[image] for image in images], questions, tokens=2)
    model.answers_after([[([image, "a red circle"], ["a circle"])] for image in images], questions)
    model.tower_answers(images, questions)
    model.edits(images, ["make it blue"] * 2, [number, number])
    model.tell([["a red circle", "make it blue"]], [number])
    model.tell_confirmed([["a red circle"]], [number], 2)
    model.roundtrip(images, 0.1, number)


def _suites(model: StarFlow2, folder: Path, number: int) -> None:
    """A suite of the drawn world, and a folder of a published benchmark: drawn, gone on with, read and scored."""
    score_suite(model, "mme", "dev", quick=True)
    cases: Any = importlib.import_module("benchmark_cases")
    place = folder / "benchmark"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    drawn = cases.geneval_folder(place, model)
    judged = cases.write_lines(place / "detections.jsonl", cases.detections_of(drawn))
    cases.geneval_folder(place, model)
    score_folder(place / "images", judged)


def _server(model: StarFlow2, folder: Path, number: int) -> None:
    """A service that stores its replies, and one that goes on with them; drafts, likelihoods, a client that leaves."""
    with Service(model, ServeLimits(rows=4), folder / "kept") as service:
        asks = [Ask(parts=["a red circle"], mode="image", seed=number + i, drafts=2, keep="stored") for i in range(6)]
        ends = [next(event for event in reply if isinstance(event, Done)) for reply in service.submit_all(asks)]
        list(service.submit(ScoreAsk(prompt=["a red circle"], reply=["a circle"])))
        service.submit(asks[0]).cancel()
    limits = ReplyLimits(tokens=3, pictures=0)
    with Service(model, ServeLimits(rows=4), folder / "kept") as service:
        for end in ends:
            ask = Ask(parts=["what color is it?"], mode="text", limits=limits, previous=end.id, tries=1)
            list(service.submit(ask))
            service.drop(end.id or "", LOCAL)


def _training(model: StarFlow2, folder: Path, number: int) -> None:
    """A few steps of adapters on two pictures, and a small density."""
    album = folder / "album"
    album.mkdir(exist_ok=True)
    for i, drawing in enumerate(model.generate("a red circle", n=2, seed=number, tries=1)):
        drawing.image.save(album / f"{i}.png")
        (album / f"{i}.txt").write_text("a red circle", encoding="utf-8")
    pictures = read_album(album, model.components.cfg.fae.image_size)
    config = FinetuneConfig(steps=2, batch=2, lora=LoraConfig(rank=2))
    finetune(pictures, folder / "model", folder / "taught", config)
    numbers = density(3, width=32, blocks=2)
    numbers.fit(torch.randn(60, 3), config=FitConfig(steps=5, batch=16, seed=number))
    numbers.log_prob(numbers.rsample(4)).sum().backward()


def _auto_classes(model: StarFlow2, folder: Path, number: int) -> None:
    """transformers' habits on the folder that was saved."""
    hf: Any = importlib.import_module("starflow2.hf")
    again = hf.StarFlow2ForMultimodalLM.from_pretrained(str(folder / "model"))
    processor = hf.StarFlow2Processor.from_pretrained(str(folder / "model"))
    inputs = processor.apply_chat_template([{"role": "user", "content": "a red circle"}])
    for mode in ("text", "image"):
        made = again.generate(**inputs, generation_mode=mode, max_new_tokens=2, seed=number)
        processor.post_process_multimodal_output(made, generation_mode=mode)


def _commands(model: StarFlow2, folder: Path, number: int) -> None:
    out = ["-o", str(folder / "out.png"), "--model", str(folder / "model"), "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for argv in (
            ["info", "nano"],
            ["generate", "a zebra", *out],
            ["generate", "a red circle", "--tries", "2", *out],
        ):
            command(argv)


ALWAYS = (_talk, _single_calls)
IN_TURN = (_many_at_once, _suites, _server, _training, _auto_classes, _commands)


def rounds(model: StarFlow2, folder: Path) -> Callable[[int], None]:
    """One round by its number: conversations and single calls, and one of all others in turn."""

    def one(number: int) -> None:
        for call in (*ALWAYS, IN_TURN[number % len(IN_TURN)]):
            call(model, folder, number)

    return one


def soaked() -> StarFlow2:
    """The smallest whole model of the tests, which says that it has learnt to check itself."""
    cases: Any = importlib.import_module("model_cases")
    components = cases.tiny_components(cases.STAGES)
    asked = SelfCheckConfig(shows="is there {}?", done="is {} there now?", tries=2)
    components.cfg = replace(components.cfg, self_check=asked)
    return StarFlow2(components)


def main() -> int:
    """Run for as long as asked: 0 where memory stayed within 5 % and the number of open files the same."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    minutes = parser.parse_args().minutes
    torch.set_num_threads(1)
    model, seen, start = soaked(), list[Seen](), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        one = rounds(model, Path(name))
        while not seen or seen[-1].seconds < 60 * minutes:
            one(len(seen))
            seen.append(_now(start))
    grown, same_files = growth(seen)
    megabytes = [s.resident / 2**20 for s in seen]
    first, most, last = megabytes[0], max(megabytes), megabytes[-1]
    print(f"rounds {len(seen)}, resident MB: first {first:.0f}, most {most:.0f}, last {last:.0f}")
    print(f"growth {100 * grown:+.1f} %, open files {seen[-1].files}{'' if same_files else ', not constant'}")
    return int(grown > ALLOWED or not same_files)


if __name__ == "__main__":
    sys.exit(main())
