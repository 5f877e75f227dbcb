"""Several processes of one run in whole copies: equal weights, checkpoints for any number, mixtures that they share."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from model_cases import tiny_folder
from run_cases import lines, same
from starflow2.core.images import to_pil
from starflow2.training.datasets import to_images
from starflow2.world.captions import caption_task

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
STEPS, STOP = 8, random.Random().randrange(2, 5)  # another step every time
PICTURES = 20

RUNS = """
import json, os, signal, sys
from dataclasses import replace
tests, base, stop, steps = sys.argv[1:]
sys.path.insert(0, tests)
import torch
from safetensors.torch import save_file
from model_cases import tiny_run
from shard_program import start
from starflow2.errors import TrainingError
from starflow2.training.config import CorpusConfig
from starflow2.training.loop import fit
from starflow2.training.tasks import TASKS, T2iTask

tasks = []

class WrongOnce(T2iTask):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = 0
        tasks.append(self)

    def loss(self, *args):
        self.calls += 1
        loss, metrics = super().loss(*args)  # the other process has no reason of its own to skip step 2
        wrong = os.environ["RANK"] == "1" and self.calls == 2
        return (loss + torch.inf if wrong else loss), metrics

class Listed(T2iTask):
    def loss(self, data, *args):
        Listed.calls += 1
        if Listed.calls == self.stop and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        with open(f"{self.folder}/read-{os.environ['RANK']}", "a") as file:
            file.writelines(self.components.tokenizer.decode(row) + chr(10) for row in data[1])
        return super().loss(data, *args)

def copies(job, rank):
    torch.set_num_threads(1)
    TASKS["t2i"] = WrongOnce if job["world"] == 2 else T2iTask
    fit(tiny_run(job["steps"], 3), "t2i", f"{base}/copies")
    if tasks:
        state = {k: v.contiguous() for k, v in tasks[0].trained["flow"].state_dict().items()}
        save_file(state, f"{base}/copies/rank-{rank}")

def mixture(job, rank):
    torch.set_num_threads(1)
    Listed.folder, Listed.stop, Listed.calls = f"{base}/{job['folder']}", job.get("asked", 0), 0
    TASKS["t2i"] = Listed
    run = tiny_run(int(steps), 100)
    corpus = CorpusConfig(mixture=f"{base}/mixture.json", rows=2, width=200)
    stages = (replace(s, batch=8, corpus=corpus, caption_drop=0.0) for s in run.stages)
    fit(replace(run, stages=tuple(stages)), "t2i", Listed.folder)

assert start({"world": 2, "steps": 3}, copies) == [0, 0]
assert start({"world": 1, "steps": 5}, copies) == [0]
assert start({"world": 2, "folder": "whole"}, mixture) == [0, 0]
assert start({"world": 2, "folder": "on two", "asked": int(stop)}, mixture) == [3, 3]
import shutil
shutil.copytree(f"{base}/on two", f"{base}/on one")
shutil.copytree(f"{base}/on two", f"{base}/on three")
for name, world in (("on two", 2), ("on one", 1), ("on three", 3)):
    assert start({"world": world, "folder": name}, mixture) == [0] * world
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs above, with what they printed."""
    base = tmp_path_factory.mktemp("processes")
    for name in ("copies", "whole", "on two"):
        tiny_folder(base / name)
    (base / "pictures").mkdir()
    for i in range(PICTURES):
        drawing = caption_task(5, i)
        to_pil(to_images([drawing.scene])[0]).save(base / "pictures" / f"{i}.png")
        (base / "pictures" / f"{i}.txt").write_text(f"{drawing.prompt}, zebra {i}")
    source = {"corpus": "captions", "url": str(base / "pictures"), "weight": 1.0}
    (base / "mixture.json").write_text(json.dumps([source]))
    arguments = [str(Path(__file__).parents[1]), str(base), str(STOP), str(STEPS)]
    done = subprocess.run([sys.executable, "-c", RUNS, *arguments], check=True, stderr=subprocess.PIPE, text=True)
    (base / "errors").write_text(done.stderr)
    return base


def read(folder: Path) -> list[str]:
    """The captions that the processes of a run have read."""
    return [line for file in folder.glob("read-*") for line in file.read_text().splitlines()]


def test_a_step_that_goes_wrong_in_one_process_is_skipped_by_all_and_their_weights_stay_equal(base):
    first, second = load_file(base / "copies" / "rank-0"), load_file(base / "copies" / "rank-1")
    assert same(first, second), "both apply the same averaged gradients to the same weights"
    assert [line.get("skipped") for line in lines(base / "copies")] == [None, 1, 1, 1, 1]


def test_a_checkpoint_of_two_processes_goes_on_in_one(base):
    assert [line["step"] for line in lines(base / "copies")] == [1, 2, 3, 4, 5]
    assert lines(base / "copies")[-1]["documents"] == 20


def test_two_processes_that_share_a_mixture_go_on_as_if_they_had_not_stopped(base):
    whole, again = ([line["loss"] for line in lines(base / name)] for name in ("whole", "on two"))
    assert len(whole) == STEPS and again == pytest.approx(whole, abs=1e-5), f"stopped after {STOP} steps"
    assert sorted(read(base / "whole")) == sorted(read(base / "on two"))


@pytest.mark.parametrize("name", ["on one", "on three"])
def test_a_mixture_of_two_processes_goes_on_in_one_and_in_three_without_losing_a_sample(base, name):
    assert [line["step"] for line in lines(base / name)] == list(range(1, STEPS + 1))
    assert len(set(read(base / name))) == PICTURES
    said = [line for line in (base / "errors").read_text().splitlines() if "goes on with other" in line]
    assert len(said) == 2 and all("other processes: nothing that was left unread is lost" in line for line in said)


@pytest.mark.parametrize("name", ["whole", "on one", "on three"])
def test_the_documents_in_the_metrics_are_those_that_the_processes_read(base, name):
    last = lines(base / name)[-1]
    assert last["documents"] == last["images"] == len(read(base / name)) and last["latents"] == 64 * last["images"]
    assert abs(last["documents"] - 8 * STEPS) <= 4, "eight a step on average, whatever the number of processes"
