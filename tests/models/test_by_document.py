"""Attention by document, as on GPUs, against the mask over whole rows, through every module that reads packed rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_cases import STAGES, mix_of, tiny_components
from starflow2.models.prefix import prefix_mask
from starflow2.models.qwen import Qwen3Stream, QwenStream
from starflow2.models.sequence import Batch, Document, Image, Text, pack
from starflow2.nn import ByDocument
from starflow2.training.config import StageConfig, StageName
from starflow2.training.tasks import TASKS

CAPTION: Document = [Text((1, 20, 21, 22, 23, 24, 25, 2)), Image(is_target=True), Text((3,), is_target=True)]
STORY: Document = [*CAPTION, Text((1, 30, 31, 2)), Image(is_target=True), Text((40, 41, 3), is_target=True)]
WORDS: Document = [Text((1, 50, 51, 2)), Text((52, 53, 3), is_target=True)]
SHOWN: Document = [Image(), Text((1, 20, 2)), Text((60, 3), is_target=True)]


def packed() -> Batch:
    """Documents of 7 to 143 positions in rows of 200, the last of them mostly empty."""
    return pack([STORY, CAPTION, WORDS, SHOWN, CAPTION, WORDS], tiny_components(STAGES).layout, 200)


@pytest.mark.parametrize("groups", [1, 4], ids=["all heads", "shared keys"])
def test_attention_by_document_is_attention_under_the_mask_of_the_rows_with_the_same_gradients(groups):
    generator, document = torch.Generator().manual_seed(0), torch.tensor([[3] * 5 + [0] + [1] * 2, [2] * 6 + [-1] * 2])
    shapes = [(2, 4, 8, 6), (2, 4 // groups, 8, 6), (2, 4 // groups, 8, 6)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    mask = (document[:, :, None] == document[:, None]).tril()[:, None]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)
    where = ByDocument.of(document)
    found, real = where.attention(q, k, v), (document >= 0)[:, None, :, None]
    assert [(group.count, group.length) for group in where.groups] == [(2, 2), (2, 6)]
    assert (found - wanted).masked_select(real).abs().max() < 1e-12
    assert not found.masked_select(~real).any(), "what belongs to no document gets zeros"
    scale = torch.randn(found.shape, generator=generator, dtype=torch.float64) * real
    ours, theirs = (torch.autograd.grad((out * scale).sum(), (q, k, v)) for out in (found, wanted))
    assert all((one - other).abs().max() < 1e-12 for one, other in zip(ours, theirs, strict=True))


def test_documents_of_similar_length_are_attended_to_together_and_never_padded_to_more_than_twice_their_length():
    document = torch.repeat_interleave(torch.arange(12), torch.tensor([1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33]))
    groups = ByDocument.of(document[None]).groups
    assert [(group.count, group.length) for group in groups] == [(2, 2), (2, 4), (2, 8), (2, 16), (3, 32), (1, 33)]


def test_positions_that_see_no_latent_are_the_same_by_document():
    batch = packed()
    is_latent = batch.ids == tiny_components(STAGES).layout.latent
    first = [prefix_mask(is_latent, where)[batch.document >= 0] for where in (batch.attend, batch.by_document().attend)]
    assert torch.equal(*first) and 0.05 < first[0].float().mean() < 0.5


def losses(stage: StageName, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Loss of a stage's task on the packed rows, and its gradients."""
    components = tiny_components(STAGES).requires_grad_(False)
    task = TASKS[stage](components, StageConfig(name=stage, steps=1, batch=2, mix=mix_of(draw=1.0)), 0)
    task.trained.requires_grad_(True)
    images = torch.rand(len(batch.pictures), 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    loss, _ = task.loss((images, batch), torch.Generator().manual_seed(2))
    return loss, list(torch.autograd.grad(loss, list(task.trained.parameters()), materialize_grads=True))


@pytest.mark.parametrize("stage", ["adapter", "joint"])
def test_a_stage_has_the_same_loss_and_gradients_by_document(stage):
    batch = packed()
    (one, grads), (other, theirs) = losses(stage, batch), losses(stage, batch.by_document())
    assert one.item() == pytest.approx(other.item(), abs=1e-5)  # sums over other shapes round otherwise
    scale = max(g.abs().max() for g in grads)
    assert all((a - b).abs().max() <= 1e-4 * scale for a, b in zip(grads, theirs, strict=True))


def test_a_batch_by_document_moves_with_its_documents_and_another_family_of_language_models_keeps_the_mask():
    moved = packed().by_document().to("meta")
    assert isinstance(moved.attend, ByDocument) and moved.attend.groups[0].keys.device.type == "meta"
    assert QwenStream.attends_by_document and not Qwen3Stream.attends_by_document
