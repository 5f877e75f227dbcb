"""Benchmarks of everything but decoding: what the machine can do, training steps, data, starting up."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from starflow2.core.images import read_picture, to_pil
from starflow2.core.serialize import JsonObject
from starflow2.data.shards import Samples
from starflow2.models.components import Components
from starflow2.research.bench import Variant
from starflow2.training.parallel import Distributed
from starflow2.training.recipes import nano
from starflow2.training.tasks import TASKS
from starflow2.training.trainer import Trainer
from starflow2.world.captions import caption_task
from starflow2.world.edits import edit_dialogue, edit_task
from starflow2.world.questions import understanding_task
from starflow2.world.scene import render_batch
from starflow2.world.stories import story_dialogue, story_task

__all__ = ["ceiling", "data", "start", "train"]

LARGE, NEAR, SIDE = 2**24, 2**20, 768  # floats of a copy, floats that the third cache holds, side of a matrix
BATCHES = {"t2i": 32, "joint": 16}  # documents of a step
LOSSES = 0.05  # largest difference of a loss in bfloat16
SAMPLES, PHOTO = 64, 512  # of the data; pixels of a side of a photo


# -- the machine ------------------------------------------------------------------------------------------------------


def ceiling() -> Iterator[list[Variant]]:
    """Copies from memory, sums over what a cache holds, and matrix products in three precisions, on this thread."""
    x = torch.arange(LARGE, dtype=torch.float32)
    yield [_rated("copy", lambda: x.clone(), x, 2 * x.nbytes, "B/s")]
    near = torch.ones(NEAR)
    total = torch.tensor(float(NEAR))
    yield [_rated("read, third cache", lambda: near.sum(), total, 32 * near.nbytes, "B/s", times=32)]
    a = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / SIDE**0.5
    exact = a @ a
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        b = a.to(dtype)
        name, tolerance = f"product, {dtype}".replace("torch.", ""), 40 * torch.finfo(dtype).eps
        yield [_rated(name, partial(torch.matmul, b, b), exact, 2 * SIDE**3, "FLOP/s", tolerance=tolerance)]


def _rated(
    name: str,
    run: Callable[[], Tensor],
    expected: Tensor,
    work: float,
    unit: str,
    *,
    times: int = 1,
    tolerance: float = 0.0,
) -> Variant:
    """A variant by itself; work: bytes or operations of `times` runs."""

    def repeated() -> Tensor:
        for _ in range(times - 1):
            run()
        return run()

    return Variant(
        bench="ceil", name=name, run=repeated, expected=expected, tolerance=tolerance, work=work, work_unit=unit
    )


# -- training ---------------------------------------------------------------------------------------------------------


def train(components: Components) -> Iterator[list[Variant]]:
    """Steps of stages t2i and joint in both precisions, with what comes before the optimiser by itself, and their data.

    Units are documents; the loss is compared, of the same weights, documents and noise.
    """
    for name, batch in BATCHES.items():
        yield [v for precision in ("float32", "bfloat16") for v in _steps(components, name, batch, precision)]
        yield [_documents(components, name, batch)]


def _steps(components: Components, name: str, batch: int, precision: str) -> Iterator[Variant]:
    """Forward and backward alone, and the whole step."""
    trainer = _trainer(components, name, batch, precision)
    documents = trainer.task.make_batch(range(batch))
    work = _flops(trainer, documents)
    runs: dict[str, Callable[[], Tensor]] = {
        "forward and backward": lambda: trainer.forward_backward([documents])["loss"].detach(),
        "step": lambda: torch.tensor(trainer.train_step([documents])[0]["loss"]),
    }
    for what, run in runs.items():
        yield Variant(
            bench="train",
            name=f"{name}, {precision}, {what}",
            run=run,
            before=trainer.task.trained.zero_grad,
            units=batch,
            tolerance=LOSSES,
            settings={"shape": components.cfg.name, "batch": batch, "dtype": precision},
            work=work,
            work_unit="FLOP/s",
        )


def _stage(name: str, batch: int) -> Any:
    """The stage of nano's recipe without the distance to an earlier flow, which its run folder would hold."""
    stage = nano().stage(name)
    return replace(stage, batch=batch, kl_to_t2i=0.0) if name == "joint" else replace(stage, batch=batch)


def _trainer(components: Components, name: str, batch: int, precision: str) -> Trainer:
    """A stage on a copy of the model, before its first step."""
    twin = copy.deepcopy(components).requires_grad_(False)
    task = TASKS[name](twin, _stage(name, batch), 0)
    task.trained.train()
    return Trainer.prepare(task, Distributed(), device="cpu", precision=precision)


def _flops(trainer: Trainer, batch: Any) -> float:
    """Operations of the matrix products and attention of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        trainer.forward_backward([batch])
    trainer.task.trained.zero_grad()
    return float(counter.get_total_flops())


def _documents(components: Components, name: str, batch: int) -> Variant:
    """The images of a batch, which are the same each time that it is made."""
    task = TASKS[name](components, _stage(name, batch), 0)

    def run() -> Tensor:
        images: Tensor = task.make_batch(range(batch))[0]
        return images

    settings: JsonObject = {"shape": components.cfg.name, "batch": batch}
    return Variant(bench="train", name=f"{name}, data", run=run, expected=run(), units=batch, settings=settings)


# -- data -------------------------------------------------------------------------------------------------------------


def data() -> Iterator[list[Variant]]:
    """Samples of the drawn world, samples of a tar file, and photos that become input of a model; units are samples."""
    scenes = [caption_task(0, i).scene for i in range(SAMPLES)]
    makers: dict[str, Callable[[int], object]] = {
        "drawings": lambda i: caption_task(0, i).prompt,
        "edits": lambda i: edit_dialogue(edit_task(0, i)).turns,
        "questions": lambda i: understanding_task(0, i)[1],
        "stories": lambda i: story_dialogue(story_task(0, i)).turns,
    }
    for name, make in makers.items():
        yield [_repeated(f"world, {name}", lambda make=make: _bytes([make(i) for i in range(SAMPLES)]))]  # type: ignore[misc]
    yield [_repeated("world, rendering", lambda: torch.from_numpy(render_batch(scenes)))]
    photo = _photo()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.tar"
        _write_tar(path, photo)
        yield [_sampled("tar, by tarfile", lambda: _by_tarfile(path)), _sampled("tar", lambda: _by_samples(path))]
    whole, size = _encoded(photo, "PNG"), PHOTO // 2
    jpeg = _encoded(photo, "JPEG")
    yield [
        _sampled("photo, PNG", lambda: read_picture(whole, size), units=1, tolerance=0.1),
        _sampled("photo, JPEG", lambda: read_picture(jpeg, size), units=1, tolerance=0.1),
    ]


def _sampled(name: str, run: Callable[[], Tensor], *, units: int = SAMPLES, tolerance: float = 0.0) -> Variant:
    return Variant(
        bench="data", name=name, run=run, units=units, tolerance=tolerance, work=units, work_unit="samples/s"
    )


def _repeated(name: str, run: Callable[[], Tensor]) -> Variant:
    """Samples that are the same each time that they are made."""
    return replace(_sampled(name, run), expected=run())


def _bytes(samples: Sequence[object]) -> Tensor:
    return torch.frombuffer(bytearray(str(samples).encode()), dtype=torch.uint8)


def _photo() -> Tensor:
    """A smooth image (3, s, s) in [-1, 1]."""
    across = torch.linspace(0, 6.28, PHOTO)
    return torch.stack(
        [across.sin().outer(across.cos()), across.cos().outer(across.cos()), across.sin().expand(PHOTO, -1)]
    )


def _encoded(image: Tensor, form: str) -> bytes:
    file = io.BytesIO()
    to_pil(image).save(file, form, **({"quality": 95} if form == "JPEG" else {}))
    return file.getvalue()


def _write_tar(path: Path, photo: Tensor) -> None:
    """Samples of a small image and a caption."""
    image = _encoded(photo[:, ::8, ::8], "JPEG")
    with tarfile.open(path, "w") as file:
        for i in range(SAMPLES):
            for extension, content in (("jpg", image), ("txt", f"photo {i}".encode())):
                member = tarfile.TarInfo(f"{i:04}.{extension}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def _by_tarfile(path: Path) -> Tensor:
    with tarfile.open(path) as file:
        return _sizes([len(opened.read()) for member in file if (opened := file.extractfile(member)) is not None])


def _by_samples(path: Path) -> Tensor:
    return _sizes([len(content) for sample in Samples(str(path)) for content in sample.fields.values()])


def _sizes(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(lengths))


# -- starting up ------------------------------------------------------------------------------------------------------

FIRST = """
from starflow2 import StarFlow2
StarFlow2.from_pretrained("nano", device="cpu").generate("two pink hearts", tries=1)
"""


def start() -> Iterator[list[Variant]]:
    """CPU seconds of importing torch and the library, and of a first image, each in a process of its own.

    The image is the plain sample, then the one that `starflow2 generate` writes, which the model chooses from several.
    """
    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "import torch": ["-c", "import torch"],
            "import starflow2.pipeline": ["-c", "import starflow2.pipeline"],
            "first image": ["-c", FIRST],
            "starflow2 generate": ["-m", "starflow2", "generate", "two pink hearts", "-o", f"{folder}/hearts.png"],
        }
        yield [Variant(bench="start", name=name, run=partial(_in_a_process, of)) for name, of in programs.items()]


def _in_a_process(arguments: Sequence[str]) -> Tensor:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return torch.zeros(1)
