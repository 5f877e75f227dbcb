"""The prefix rule against one pass over everything."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from model_cases import STAGES, WIDTH, mix_of, tiny_components
from starflow2.models import pretzel as module
from starflow2.models.joint_stream import read_documents
from starflow2.models.prefix import prefix_mask, two_pass_states
from starflow2.models.sequence import Batch, Document, Image, Text, pack
from starflow2.nn import Cache
from starflow2.training.config import ShardConfig, StageConfig
from starflow2.training.tasks import JointTask

CAPTION: Document = [Text((1, 20, 21, 22, 23, 24, 25, 2)), Image(is_target=True), Text((3,), is_target=True)]
STORY: Document = [*CAPTION, Text((1, 30, 31, 2)), Image(is_target=True), Text((40, 41, 3), is_target=True)]
WORDS: Document = [Text((1, 50, 51, 2)), Text((52, 53, 3), is_target=True)]


def packed(*documents: Document, width: int = 0) -> Batch:
    return pack(documents, tiny_components(STAGES).layout, width)


def slots_of_latents(batch: Batch) -> Tensor:
    """(B, T) bool."""
    is_latent = torch.zeros_like(batch.ids, dtype=torch.bool)
    count = tiny_components(STAGES).layout.num_latents
    for row, begin in zip(batch.pictures.row, batch.pictures.begin, strict=True):
        is_latent[row, begin + 1 : begin + 1 + count] = True
    return is_latent


BATCHES = {
    "one document": packed(CAPTION),
    "documents of unequal length": packed(STORY, CAPTION, WORDS),
    "several in a row": packed(STORY, CAPTION, WORDS, CAPTION, width=200),
    "a picture first": packed([Image(), Text((1, 20, 2))], CAPTION),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_positions_before_a_picture_are_those_that_see_none_of_its_latents(batch):
    first, is_latent = prefix_mask(slots_of_latents(batch), batch.attend), slots_of_latents(batch)
    for row in range(len(batch.ids)):
        for at in range(batch.ids.shape[1]):
            own = batch.document[row, : at + 1] == batch.document[row, at]
            seen = bool((is_latent[row, : at + 1] & own).any())
            if batch.document[row, at] >= 0:
                assert bool(first[row, at]) is not seen


def read(batch: Batch, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """States of real positions, and the gradients of a weighted sum of them with respect to latents and before them."""
    torch.manual_seed(0)
    vlm = tiny_components(STAGES).vlm
    is_latent = slots_of_latents(batch)
    words = vlm.embed(batch.ids).detach().requires_grad_(how == "two passes, all tracked")
    latents = torch.randn(*batch.ids.shape, WIDTH, requires_grad=True)
    whole = torch.where(is_latent[..., None], latents, words)
    if how == "one pass":
        h = vlm.states(whole, batch.mrope, attend=batch.attend)
    else:
        first = prefix_mask(is_latent, batch.attend)
        h = two_pass_states(vlm, (words, whole), batch.mrope, first, batch.attend)
    h = h[batch.document >= 0]
    (grad,) = torch.autograd.grad((h * torch.randn(h.shape, generator=torch.Generator().manual_seed(1))).sum(), latents)
    return h.detach(), grad, is_latent


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_two_passes_give_the_states_and_gradients_of_one(batch):
    one, two = read(batch, "one pass"), read(batch, "two passes")
    assert (one[0] - two[0]).abs().max() <= 1e-5
    assert one[1].abs().max() > 1e-3 and (one[1] - two[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_what_is_not_kept_changes_no_bit_of_the_gradient(batch, monkeypatch):
    monkeypatch.setattr(Cache, "append", concatenated)
    assert torch.equal(read(batch, "two passes")[1], read(batch, "two passes, all tracked")[1])


def concatenated(self: Cache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A slow twin of Cache.append that writes nowhere, so that autograd can follow the first pass, too."""
    held = getattr(self, "held", {})
    old = held.get(layer)
    held[layer] = (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))
    self.held = held  # type: ignore[attr-defined]
    return held[layer]


def kept_bytes(share: float, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Tensor]]:
    """What a whole forward pass keeps for backward, and the adapter's gradients."""
    monkeypatch.setattr(module, "PREFIX_SHARE", share)
    components, kept = tiny_components(STAGES), dict[int, int]()
    components.requires_grad_(False)
    components.joints.adapter.requires_grad_(True)
    caption = [Text(tuple(range(20, 180))), *CAPTION[1:]]
    batch = packed(caption, caption)
    x = torch.randn(2, components.layout.num_latents, 4, generator=torch.Generator().manual_seed(0))

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = read_documents(components.pretzel, batch, x, torch.full((2,), 0.2))
        loss = out.log_prob.sum() + out.logits.log_softmax(-1)[:, 0].sum()
        grads = torch.autograd.grad(loss, list(components.joints.adapter.parameters()))
    return sum(kept.values()), list(grads)


def test_training_keeps_less_and_gets_the_same_gradients(monkeypatch):
    with_rule, ours = kept_bytes(0.1, monkeypatch)
    without, wanted = kept_bytes(2.0, monkeypatch)
    assert with_rule < 0.9 * without, (with_rule, without)
    scale = max(g.abs().max() for g in wanted)
    assert all((a - b).abs().max() <= 1e-5 * scale for a, b in zip(ours, wanted, strict=True))


def never(*_: object) -> Tensor:
    raise AssertionError("read in two passes")


def test_a_language_model_that_trains_is_read_in_one_pass(monkeypatch):
    monkeypatch.setattr(module, "two_pass_states", never)
    components = tiny_components(STAGES)
    components.requires_grad_(True)
    x = torch.randn(1, components.layout.num_latents, 4)
    assert read_documents(components.pretzel, packed(CAPTION), x, torch.full((1,), 0.2)).log_prob.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint_activations": "all"}, {"shard": ShardConfig(mode="fsdp", frozen="sharded")}, {}],
    ids=["recomputed", "sharded", "neither"],
)
def test_layers_that_are_recomputed_or_sharded_run_once_for_each_batch(monkeypatch, changes):
    monkeypatch.setattr(module, "two_pass_states", never)
    components = tiny_components(STAGES)
    components.requires_grad_(False)
    stage = StageConfig(name="joint", steps=1, batch=2, mix=mix_of(draw=1.0), **changes)
    task = JointTask(components, stage, 0)
    task.trained.requires_grad_(True)
    with nullcontext() if changes else pytest.raises(AssertionError, match="two passes"):
        task.loss(task.make_batch(range(2)), torch.Generator().manual_seed(0))
