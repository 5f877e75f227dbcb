"""Teach nano a colour that it has never seen and measure the gain and the loss: a test of `starflow2 finetune`.

    PYTHONPATH=src python scripts/teach_word.py --out out/teach            # 200 images of brown objects
    PYTHONPATH=src python scripts/teach_word.py --out out/smoke --steps 2 --pictures 8 --samples 1 --quick-suite no

Renders scenes with objects in a new colour, with captions in the world's words, fine-tunes the model on them, and
scores it before and after: the share of drawn images that show the shape of the prompt in the new colour, by a
detector with
that colour in its palette, and W-GenEval on the dev split. Also measures how many true images keep the colour through
the codec: of some colours, such as teal, none does. Writes OUT/result.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from starflow2.core.images import to_bytes
from starflow2.evals.geneval import score_geneval
from starflow2.models.hub import NANO
from starflow2.pipeline import StarFlow2
from starflow2.training.finetune import FinetuneConfig, finetune, read_album
from starflow2.world import detector
from starflow2.world import scene as world
from starflow2.world.captions import caption_task

WORD, RGB = "brown", (110, 50, 10)  # more than 0.3, the detector's tolerance, from every colour of the world
REPLACED = ("red", "yellow", "green", "blue", "purple", "pink", "black")  # not orange: "an" would be wrong


@contextmanager
def one_more_colour() -> Iterator[int]:
    """Inside, renderer and detector know the new colour; yields its index."""
    palette = np.vstack([world.PALETTE, np.array([RGB], dtype=np.uint8)])
    original = world.PALETTE
    try:
        world.PALETTE = detector.PALETTE = palette  # type: ignore[misc, attr-defined]
        yield len(palette) - 1
    finally:
        world.PALETTE = detector.PALETTE = original  # type: ignore[misc, attr-defined]


def captioned(count: int, seed: int) -> Iterator[tuple[np.ndarray, str]]:
    """Training pictures of the world with one object in the new colour, and their captions with the new word."""
    made = index = 0
    with one_more_colour() as new:
        while made < count:
            drawing = caption_task(seed, index)
            index += 1
            words, things = drawing.prompt.split(), drawing.scene.objects
            for old, name in enumerate(world.COLORS):
                alone = [i for i, thing in enumerate(things) if thing.color == old]
                if name in REPLACED and words.count(name) == 1 and len(alone) == 1:
                    painted = tuple(replace(t, color=new) if i == alone[0] else t for i, t in enumerate(things))
                    text = " ".join(WORD if w == name else w for w in words)
                    yield world.render(replace(drawing.scene, objects=painted)), text
                    made += 1
                    break


def write_album(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (pixels, text) in enumerate(captioned(count, seed)):
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(text + "\n", encoding="utf-8")


def new_word_score(model: StarFlow2, samples: int) -> dict[str, float]:
    """Share of pictures of "a teal SHAPE" with the colour in them, and with that shape in it."""
    prompts = [f"a {WORD} {shape}" for shape in world.SHAPES for _ in range(samples)]
    images = to_bytes(model.draw(prompts, list(range(len(prompts)))))
    coloured = right = 0
    with one_more_colour() as new:
        for prompt, scan in zip(prompts, detector.detect(images), strict=True):
            shape = world.SHAPES.index(prompt.split()[-1])
            coloured += any(d.color == new for d in scan.detections)
            right += any(d.color == new and d.shape == shape for d in scan.detections)
    return {"colour": coloured / len(prompts), "colour_and_shape": right / len(prompts), "pictures": len(prompts)}


def codec_ceiling(model: StarFlow2, true: torch.Tensor) -> float:
    """Share of true pictures (n, 3, s, s) that show the new colour after the codec, at the noise of drawing."""
    images = to_bytes(model.roundtrip(true, model.sampling_noise))
    with one_more_colour() as new:
        return float(np.mean([any(d.color == new for d in scan.detections) for scan in detector.detect(images)]))


def scores(model: StarFlow2, samples: int, suite: bool) -> dict[str, Any]:
    geneval = score_geneval(model, "dev", quick=True).to_json() if suite else None
    return {"new_word": new_word_score(model, samples), "w_geneval_dev_quick": geneval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--out", type=Path, default=Path("out/teach"))
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--samples", type=int, default=8, help="pictures of each shape when scoring")
    parser.add_argument("--steps", type=int, default=FinetuneConfig.steps)
    parser.add_argument("--lr", type=float, default=FinetuneConfig.lr)
    parser.add_argument("--replay", type=float, default=FinetuneConfig.replay)
    parser.add_argument("--batch", type=int, default=FinetuneConfig.batch)
    parser.add_argument("--quick-suite", choices=("yes", "no"), default="yes", help="score W-GenEval, too")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    write_album(args.out / "album", args.pictures, seed=7)
    before = StarFlow2.from_pretrained(args.model, device=args.device)
    album = read_album(args.out / "album", before.components.cfg.fae.image_size)
    result: dict[str, Any] = {"codec_ceiling": codec_ceiling(before, album.images)}
    result["before"] = scores(before, args.samples, args.quick_suite == "yes")
    config = FinetuneConfig(steps=args.steps, lr=args.lr, replay=args.replay, batch=args.batch)
    started = time.perf_counter()
    taught = finetune(
        album,
        args.model,
        args.out / "model",
        config,
        device=args.device,
        report=lambda line: print(f"{line.step}/{line.steps} {line.metrics} eta {line.eta_s:.0f} s", flush=True),
    )
    result["seconds"] = time.perf_counter() - started
    after = StarFlow2.from_pretrained(taught, device=args.device)
    after.check_prompt(f"a {WORD} circle")
    result["after"] = scores(after, args.samples, args.quick_suite == "yes")
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print({k: result[k]["new_word"] for k in ("before", "after")}, f"ceiling {result['codec_ceiling']:.3f}")
    print(f"{result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
