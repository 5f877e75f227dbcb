"""The script that measures packing: both arms hold the same documents, and give the same losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import script
from model_cases import STAGES, tiny_components, tiny_run
from starflow2.models.sequence import Batch
from starflow2.training.losses import joint_loss


@pytest.fixture(scope="module")
def packing() -> Any:
    return script("packing_speed")


def words_of(batches: list[Batch]) -> list[list[int]]:
    """The ids of every document, sorted."""
    found = []
    for batch in batches:
        for row, documents in zip(batch.ids, batch.document, strict=True):
            found += [row[documents == d].tolist() for d in documents.unique() if d >= 0]
    return sorted(found)


def test_lengths_are_those_of_captions_and_of_interleaved_documents(packing):
    components = tiny_components(STAGES)
    lengths = [packing.length(d, components.layout) for d in packing.documents(components.layout, 320, 400, 0)]
    captions = [n - 66 for n in lengths if n < 200]
    assert len(captions) == 200 and max(captions) <= 128 and 55 < sum(captions) / 200 < 65
    others = [n for n in lengths if n >= 200]
    assert min(others) >= 300 and max(others) <= 1200 and max(others) > 1000


def test_both_arms_hold_the_same_documents_within_the_same_budget(packing):
    layout = tiny_components(STAGES).layout
    made = packing.documents(layout, 320, 24, 0)
    packed, alone = (arm(made, layout, 4, 1280) for arm in (packing.packed, packing.one_a_row))
    assert words_of(packed) == words_of(alone) and len(words_of(alone)) == 24
    assert packing.real(packed) == packing.real(alone) == sum(packing.length(d, layout) for d in made)
    assert all(batch.ids.numel() <= 4 * 1280 for batch in packed + alone)
    assert all(batch.attend is None for batch in alone), "one document a row needs no mask of blocks"
    assert packing.slots(packed) < packing.slots(alone)


def test_documents_alone_in_their_rows_have_the_losses_of_packed_ones(packing):
    components = tiny_components(STAGES)
    made = packing.documents(components.layout, 320, 4, 1, interleaved=(150, 260))
    noise = components.cfg.noise
    losses = []
    for arm in (packing.packed, packing.one_a_row):
        (batch,) = arm(made, components.layout, 8, 400)
        pictures = torch.sin(torch.arange(64 * 4.0)).view(1, 64, 4).expand(len(batch.pictures), -1, -1)
        with torch.no_grad():
            terms = joint_loss(components.pretzel, batch, (pictures, torch.full((len(pictures),), 0.3)), noise)
        losses.append(torch.stack([terms.flow, terms.text]))
    assert (losses[0] - losses[1]).abs().max() < 1e-5


def test_a_round_measures_both_and_their_ratio(packing):
    components = tiny_components(STAGES)
    made = packing.documents(components.layout, 320, 8, 1, interleaved=(250, 400))
    arms = {name: getattr(packing, name)(made, components.layout, 3, 400) for name in ("packed", "one_a_row")}
    result = packing.measure(packing.joint_task(components, tiny_run(1).stage("joint")), arms, 1)
    rates = result["tokens_per_s"]
    assert result["ratio"] == rates["packed"] / rates["one_a_row"] > 0
    assert result["filled"]["packed"] > result["filled"]["one_a_row"]
    assert all(p.grad is None and p.requires_grad for p in components.flow.parameters())
