"""Real tokens per second of stage 3, forward and backward: packed rows against one document a row.

    PYTHONPATH=src python scripts/packing_speed.py --json packing.json     # nano on this machine, about two minutes

Both read the same random documents: half are captions of 60 words on average, 128 at most, with a drawn image, half
interleave words and images over 300 to 1200 positions. Both fill the same budget of slots: `--rows` rows of `--width`
positions, packed as `data.mixture` packs them, or as many rows of the length of their longest document as fit. Padding
counts for neither. Rounds alternate; medians are printed. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from starflow2.data.mixture import fits
from starflow2.models.checkpoint import load_components
from starflow2.models.components import Components
from starflow2.models.hub import NANO
from starflow2.models.sequence import IGNORE, Batch, Document, Image, Layout, Pictures, Segment, Text, pack
from starflow2.training.config import StageConfig
from starflow2.training.recipes import nano
from starflow2.training.task import Task
from starflow2.training.tasks import TASKS

CAPTION = (6.0, 10.0, 8, 128)  # words of a caption: shape and scale of a gamma distribution, least, most
INTERLEAVED = (300, 1200)  # positions of an interleaved document, least and most
STRETCH = 60  # words between two images of an interleaved document
WORDS = (300, 1000)  # ids of ordinary words, less where a vocabulary has fewer


def documents(
    layout: Layout, vocab: int, count: int, seed: int, interleaved: tuple[int, int] = INTERLEAVED
) -> list[Document]:
    """Captions with a drawn image and interleaved documents, as many of each, in random order."""
    rng = np.random.default_rng(seed)
    shape, scale, least, most = CAPTION
    made = list[Document]()
    for i in range(count):
        if i % 2 == 0:
            words = int(np.clip(rng.gamma(shape, scale), least, most))
            made.append([_words(rng, words, vocab), Image(is_target=True)])
        else:
            made.append(_interleaved(rng, int(rng.integers(interleaved[0], interleaved[1] + 1)), layout, vocab))
    return [made[i] for i in rng.permutation(count)]


def _interleaved(rng: np.random.Generator, positions: int, layout: Layout, vocab: int) -> Document:
    """Words and images of a reply by turns, `positions` slots in all."""
    picture, document = len(layout.ids(Image())), list[Segment]()
    while positions > STRETCH + picture:
        document += [_words(rng, STRETCH, vocab, is_target=True), Image(is_target=True)]
        positions -= STRETCH + picture
    return [*document, _words(rng, positions, vocab, is_target=True)] if positions else document


def _words(rng: np.random.Generator, count: int, vocab: int, *, is_target: bool = False) -> Text:
    high = min(WORDS[1], vocab)
    return Text(tuple(rng.integers(min(WORDS[0], high - 1), high, count).tolist()), is_target)


def length(document: Document, layout: Layout) -> int:
    return sum(len(layout.ids(segment)) for segment in document)


def packed(made: Sequence[Document], layout: Layout, rows: int, width: int) -> list[Batch]:
    """Batches of at most `rows` rows of `width` positions, documents in order."""
    groups = _groups(made, layout, lambda lengths: fits(lengths, rows, width))
    return [pack(group, layout, width) for group in groups]


def one_a_row(made: Sequence[Document], layout: Layout, rows: int, width: int) -> list[Batch]:
    """Batches of at most rows x width slots, a row for every document, as long as the longest."""
    groups = _groups(made, layout, lambda lengths: len(lengths) * max(lengths) <= rows * width)
    return [_beside([pack([document], layout) for document in group]) for group in groups]


def _groups(made: Sequence[Document], layout: Layout, is_room: Callable[[list[int]], bool]) -> list[list[Document]]:
    groups, lengths = [list[Document]()], list[int]()
    for document in made:
        lengths.append(length(document, layout))
        if not is_room(lengths):
            groups.append([])
            lengths = lengths[-1:]
        groups[-1].append(document)
    return [group for group in groups if group]


def _beside(rows: Sequence[Batch]) -> Batch:
    """Batches of one row each as one, padded at the right."""
    width = max(row.ids.shape[1] for row in rows)

    def joined(name: str, fill: int, dim: int = 0) -> torch.Tensor:
        return torch.cat([F.pad(getattr(r, name), (0, width - r.ids.shape[1]), value=fill) for r in rows], dim)

    places = torch.cat([F.pad(r.places, (0, 0, 0, width - r.places.shape[1])) for r in rows])
    before = np.cumsum([0, *(len(r.pictures) for r in rows)])
    pictures = Pictures(
        torch.cat([torch.full_like(r.pictures.row, i) for i, r in enumerate(rows)]),
        torch.cat([r.pictures.begin for r in rows]),
        torch.cat([r.pictures.is_target for r in rows]),
        torch.cat(
            [torch.where(r.pictures.previous < 0, -1, r.pictures.previous + int(before[i])) for i, r in enumerate(rows)]
        ),
    )
    ids, labels, document = joined("ids", 0), joined("labels", IGNORE), joined("document", -1)
    return Batch(ids, labels, document, joined("mrope", 0, 1), places, pictures, shares_rows=False)


def real(batches: Sequence[Batch]) -> int:
    """Slots that are not padding."""
    return sum(int((batch.document >= 0).sum()) for batch in batches)


def slots(batches: Sequence[Batch]) -> int:
    return sum(batch.ids.numel() for batch in batches)


def joint_task(components: Components, stage: StageConfig) -> Task:
    """Stage 3 over these weights, ready for gradients."""
    task = TASKS["joint"](components, stage, 0)
    components.requires_grad_(False)
    task.trained.train().requires_grad_(True)
    return task


def seconds(task: Task, batches: Sequence[Batch], size: int) -> float:
    """Wall time of the loss of every batch and its gradients; images of `size` pixels a side are noise."""
    generator, spent = torch.Generator().manual_seed(0), 0.0
    for batch in batches:
        images = 2 * torch.rand(len(batch.pictures), 3, size, size, generator=generator) - 1
        started = time.perf_counter()
        loss, _ = task.loss((images, batch), generator)
        loss.backward()
        spent += time.perf_counter() - started
        for p in task.trained.parameters():
            p.grad = None
    return spent


def measure(task: Task, arms: dict[str, list[Batch]], rounds: int) -> dict[str, Any]:
    """Measure both arms alternately, `rounds` times, after one batch of each that does not count."""
    size = task.components.cfg.fae.image_size
    for batches in arms.values():
        seconds(task, batches[:1], size)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in sorted(arms, reverse=bool(i % 2)):
            rates[name].append(real(arms[name]) / seconds(task, arms[name], size))
            print(f"round {i + 1} of {rounds}: {name} {rates[name][-1]:.0f} tokens/s", flush=True)
    ratios = [a / b for a, b in zip(rates["packed"], rates["one_a_row"], strict=True)]
    return {
        "tokens_per_s": {name: median(values) for name, values in rates.items()},
        "ratio": median(ratios),
        "ratios": ratios,
        "filled": {name: real(batches) / slots(batches) for name, batches in arms.items()},
        "tokens": real(arms["packed"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--width", type=int, default=1280, help="positions of a packed row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    components = load_components(args.model)
    made = documents(components.layout, components.cfg.vlm.vocab, args.documents, args.seed)
    budget = (components.layout, args.rows, args.width)
    arms = {"packed": packed(made, *budget), "one_a_row": one_a_row(made, *budget)}
    result = measure(joint_task(components, replace(nano().stage("joint"), kl_to_t2i=0.0)), arms, args.rounds)
    machine = {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "machine": platform.machine()}
    result |= {"documents": args.documents, "rows": args.rows, "width": args.width, **machine}
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
