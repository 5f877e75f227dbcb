"""Rows continued step by step: the cache against one full pass, and rows against each other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model_cases import tiny_components
from starflow2.inference.config import DrawConfig
from starflow2.inference.decoder import BatchDecoder, ReplyLimits, _Row
from starflow2.inference.events import Begun, Completed, Ended, Token
from starflow2.inference.sampler import Sampler
from starflow2.models.joint_stream import read_documents
from starflow2.models.sequence import Image, Segment, Text, pack
from stream_cases import Bent, Recording

PRECISIONS = ("float32", "float64")


def a_sampler(guidance: float = 1.0, precision: str = "float32", prior_scale: float = 0.7) -> Sampler:
    components = tiny_components(("features", "fae", "vlm", "t2i", "adapter", "joint"))
    return Sampler(components, DrawConfig(guidance=guidance, prior_scale=prior_scale, precision=precision))  # type: ignore[arg-type]


def recorded(rows: BatchDecoder, stream: Recording) -> tuple[Tensor, Tensor]:
    """States of the only row at all its positions, as they came step by step: (T, E) and (T, C)."""
    own = stream.states(rows.conditional.cache)
    real = rows.conditional.is_real[0]
    return torch.cat([s.h[0] for s in own])[real], torch.cat([s.g[0] for s in own])[real]


def six_segments(rows: BatchDecoder, row: int = 0) -> tuple[list[Segment], Tensor, Tensor]:
    """Uploads, words and drawn pictures in turn in one row: the document, its noisy latents and their levels."""
    ids: list[list[int]] = [[] for _ in range(rows.rows)]
    sampler = rows.sampler
    x = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(9))
    document: list[Segment] = []
    latents, levels = [], []

    def say(tokens: Sequence[int]) -> None:
        ids[row] = list(tokens)
        rows.read(ids)
        document.append(Text(tuple(tokens)))

    def draw(seed: int) -> None:
        for event in rows.reply([seed], ReplyLimits(tokens=0, pictures=1), [row], draws=True):
            if isinstance(event, Completed):
                latents.append(event.picture.x)
        levels.append(sampler.noise_level)
        document.extend([Image(is_target=True), Text((sampler.components.cfg.vlm.special.end,))])

    say((1, 30, 31))
    rows.see([row], x, 0.2)
    document.append(Image())
    latents.append(x[0].to(sampler.dtype))
    levels.append(0.2)
    say((40, 41, 2))
    draw(5)
    say((1, 50, 2))
    draw(6)
    return document, torch.stack(latents), torch.tensor(levels, dtype=sampler.dtype)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cached_steps_equal_one_full_pass_at_every_position_of_a_document(precision, guidance):
    sampler = a_sampler(guidance, precision)
    stream = sampler.pretzel = Recording(sampler.pretzel)
    rows = BatchDecoder(sampler, 1)
    document, x, levels = six_segments(rows)
    h, g = recorded(rows, stream)
    with torch.no_grad():
        read_documents(stream, pack([document], sampler.layout), x, levels)
    (full,) = stream.states(None)
    assert h.shape == full.h[0].shape == (rows.conditional.cache.length, 40)
    assert (h - full.h[0]).abs().max() <= 1e-4
    assert (g - full.g[0]).abs().max() <= 1e-4


def events_of(rows: BatchDecoder, asked: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[object]]:
    rows.read(asked)
    told: list[list[object]] = [[] for _ in asked]
    for event in rows.reply(seeds, ReplyLimits(tokens=5, pictures=1)):
        if isinstance(event, Token):
            told[event.row].append(event.id)
        elif isinstance(event, Completed):
            told[event.row].append(event.picture)
        elif isinstance(event, Begun | Ended):
            told[event.row].append(type(event))
    return told


def test_rows_in_different_modalities_equal_the_same_rows_alone():
    sampler = a_sampler()
    begin = sampler.layout.begin
    asked = [[1, 30, 2], [1, 31, 32, 33, 34, 2, 60, 61], [1, 35, 36, 2]]

    def steered(logits: Tensor) -> Tensor:
        logits[:, begin] += torch.where(logits[:, 40] > logits[:, 41], 50.0, -50.0)  # some rows draw, some write
        return logits

    sampler.pretzel = Bent(sampler.pretzel, steered)
    together = events_of(BatchDecoder(sampler, 3), asked, [7, 8, 9])
    alone = [events_of(BatchDecoder(sampler, 1), [a], [s])[0] for a, s in zip(asked, [7, 8, 9], strict=True)]
    kinds = {tuple(type(e).__name__ for e in row) for row in together}
    assert len(kinds) > 1, "the rows were to differ in what they make"
    for mine, theirs in zip(together, alone, strict=True):
        assert [type(e) for e in mine] == [type(e) for e in theirs]
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(a, int):
                assert a == b
            elif hasattr(a, "u"):
                assert (a.u - b.u).abs().max() <= 1e-4
                assert (a.image - b.image).abs().max() <= 1e-4
                assert a.log_prob == pytest.approx(b.log_prob, abs=1e-3)


# -- policy: temperature, prior scale, the unconditional branch


def chosen(temperature: float, count: int = 4000) -> Tensor:
    """How often each of four tokens is chosen from logits 0, 1, 2, 3 by seeds that count on: (4,) shares."""
    decoder = BatchDecoder(a_sampler(), 1)
    found = torch.zeros(4)
    for seed in range(count):
        scores = torch.full((decoder.sampler.components.cfg.vlm.vocab,), -torch.inf)
        scores[100:104] = torch.arange(4.0)
        row = _Row(seed, torch.Generator().manual_seed(seed))
        found[decoder._choose(scores, row, ReplyLimits(temperature=temperature)) - 100] += 1
    return found / count


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_chosen_with_the_probabilities_of_their_logits_over_the_temperature(temperature):
    expected = (torch.arange(4.0) / temperature).softmax(0)
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((chosen(temperature) - expected).abs() <= 5 * deviation).all())


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_images_start_from_the_prior_times_its_scale(scale):
    """z of a conversation, read back from its buffers: normal, with the standard deviation that is set."""
    decoder = BatchDecoder(a_sampler(guidance=0.0, prior_scale=scale), 1)
    decoder.read([[1, 30, 2]])
    list(decoder.reply([5], ReplyLimits(tokens=0, pictures=1), draws=True))
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(decoder.buffers.z[0].float(), scale * z, atol=1e-6)


def test_the_unconditional_branch_is_that_of_an_image_alone_whatever_came_before():
    """Guidance of an edit compares with no prompt and no previous image: its branch is that of a first image."""
    sampler = a_sampler(guidance=1e-9)  # measures both branches and follows the conditional one
    decoder = BatchDecoder(sampler, 1)
    decoder.read([[1, 30, 2]])
    decoder.see([0], torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(9)), 0.2)
    decoder.read([[1, 31, 2]])
    events = list(decoder.reply([5], ReplyLimits(tokens=0, pictures=1), draws=True))
    drawn = next(event.picture for event in events if isinstance(event, Completed))
    document = [Text(tuple(sampler.components.tokenizer.drawing_prompt("")[:-1])), Image(is_target=True)]
    level = torch.tensor([sampler.noise_level], dtype=sampler.dtype)
    with torch.no_grad():
        alone = read_documents(sampler.pretzel, pack([document], sampler.layout), drawn.x[None], level)
    expected = float(alone.affine.log_prob(alone.u).sum())
    assert drawn.unconditional_log_prob == pytest.approx(expected, abs=1e-3)
    assert abs(drawn.unconditional_log_prob - drawn.log_prob) > 1e-2
