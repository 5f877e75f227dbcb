"""The prefix rule against one pass over everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import STAGES, WIDTH, mix_of, tiny_components
from starflow2.models.components import Components
from starflow2.models.joint_stream import JointStream, read_documents
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
        for position in range(batch.ids.shape[1]):
            own = batch.document[row, : position + 1] == batch.document[row, position]
            sees_latent = bool((is_latent[row, : position + 1] & own).any())
            if batch.document[row, position] >= 0:
                assert bool(first[row, position]) is not sees_latent


class TrackedCache(Cache):
    """A slow cache that writes nowhere, so that autograd can follow the first pass too."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        old = self.layers.get(layer)
        self.layers[layer] = (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))
        return self.layers[layer]


class TrackedStream:
    """A language stream with tracked caches."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def new_cache(self) -> Cache:
        return TrackedCache(self.stream.cfg.depth)


def read(batch: Batch, *, passes: int, tracked: bool = False) -> tuple[Tensor, Tensor]:
    """States of real positions, and the gradient of a weighted sum of them with respect to the latents.

    tracked: caches and the words' embeddings take part in autograd as well.
    """
    torch.manual_seed(0)
    components = tiny_components(STAGES)
    vlm: Any = TrackedStream(components.vlm) if tracked or passes == 2 else components.vlm
    is_latent = slots_of_latents(batch)
    words = vlm.embed(batch.ids).detach().requires_grad_(tracked)
    latents = torch.randn(*batch.ids.shape, WIDTH, requires_grad=True)
    whole = torch.where(is_latent[..., None], latents, words)
    if passes == 1:
        h = vlm.states(whole, batch.mrope, attend=batch.attend)
    else:
        first = prefix_mask(is_latent, batch.attend)
        h = two_pass_states(vlm, (words, whole), batch.mrope, first, batch.attend)
    h = h[batch.document >= 0]
    (grad,) = torch.autograd.grad((h * torch.randn(h.shape, generator=torch.Generator().manual_seed(1))).sum(), latents)
    return h.detach(), grad


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_two_passes_give_the_states_and_gradients_of_one(batch):
    one, two = read(batch, passes=1), read(batch, passes=2)
    assert (one[0] - two[0]).abs().max() <= 1e-5  # attention over other shapes sums in another order
    assert one[1].abs().max() > 1e-3 and (one[1] - two[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_activations_of_the_first_pass_change_no_bit_of_the_gradient(batch):
    """Bit-equal: both runs compute the same forward pass, and only one of them records its first half for autograd."""
    assert torch.equal(read(batch, passes=2)[1], read(batch, passes=2, tracked=True)[1])


def a_model_whose_adapter_trains() -> Components:
    components = tiny_components(STAGES)
    components.requires_grad_(False)
    components.joints.adapter.requires_grad_(True)
    return components


def saved_bytes(stream: JointStream, adapter: torch.nn.Module) -> tuple[int, list[Tensor]]:
    """Bytes that a forward pass over two long captions saves for backward, and the adapter's gradients."""
    saved: dict[int, int] = {}
    caption = [Text(tuple(range(20, 180))), *CAPTION[1:]]
    batch = packed(caption, caption)
    x = torch.randn(2, tiny_components(STAGES).layout.num_latents, 4, generator=torch.Generator().manual_seed(0))

    def save(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        out = read_documents(stream, batch, x, torch.full((2,), 0.2))
        loss = out.log_prob.sum() + out.logits.log_softmax(-1)[:, 0].sum()
        grads = torch.autograd.grad(loss, list(adapter.parameters()))
    return sum(saved.values()), list(grads)


def test_training_saves_less_for_backward_and_gets_the_same_gradients():
    components = a_model_whose_adapter_trains()
    pretzel, adapter = components.pretzel, components.joints.adapter
    with_rule, ours = saved_bytes(pretzel, adapter)
    without, expected = saved_bytes(pretzel.in_one_pass(), adapter)
    assert with_rule < 0.9 * without, (with_rule, without)
    scale = max(g.abs().max() for g in expected)
    # attention over other shapes sums in another order
    assert all((a - b).abs().max() <= 1e-5 * scale for a, b in zip(ours, expected, strict=True))


def count_passes(components: Components) -> list[None]:
    """A list that grows by one whenever the language model's layers run."""
    passes: list[None] = []
    components.vlm.layers[0].register_forward_hook(lambda *_: passes.append(None))
    return passes


def test_a_language_model_that_trains_is_read_in_one_pass():
    components = tiny_components(STAGES)
    components.requires_grad_(True)
    passes = count_passes(components)
    x = torch.randn(1, components.layout.num_latents, 4)
    assert read_documents(components.pretzel, packed(CAPTION), x, torch.full((1,), 0.2)).log_prob.isfinite().all()
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"checkpoint_activations": "all"}, 1), ({"shard": ShardConfig(mode="fsdp", frozen="sharded")}, 1), ({}, 2)],
    ids=["recomputed", "sharded", "neither"],
)
def test_layers_that_are_recomputed_or_sharded_run_once_for_each_batch(changes, expected):
    components = tiny_components(STAGES)
    components.requires_grad_(False)
    stage = StageConfig(name="joint", steps=1, batch=2, mix=mix_of(draw=1.0), **changes)
    task = JointTask(components, stage, 0)
    task.trained.requires_grad_(True)
    passes = count_passes(components)
    task.loss(task.make_batch(range(2)), torch.Generator().manual_seed(0))
    assert len(passes) == expected
