"""The language model answers questions about images by itself, through its own vision tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model_cases import tiny_components, tiny_run
from starflow2.core.dialogue import Turn
from starflow2.errors import ConfigError, ShapeError, StateError
from starflow2.inference.vlm_answer import answer
from starflow2.models.sequence import IGNORE, pack
from starflow2.training.datasets import to_images
from starflow2.training.tasks import VlmTask
from starflow2.world.captions import caption_task
from starflow2.world.scene import render
from upstream import theirs

QUESTIONS = ["what color is the star?", "describe the picture.", "is it small?", "list every object.", "is it red?"]


@pytest.fixture(scope="module")
def asked():
    """A woken model, images and questions of unequal length, and the answers of at most six tokens to all at once."""
    components = tiny_components(scale=0.25)
    images = to_images([caption_task(0, i).scene for i in range(len(QUESTIONS))])
    return components, images, answer(components, images, QUESTIONS, max_tokens=6)


def test_an_answer_is_the_same_alone_and_in_a_batch(asked):
    """Of words, not of numbers: the nearest two logits of any step are 0.016 apart, far more than rounding."""
    components, images, answers = asked
    alone = [answer(components, images[i : i + 1], [text], max_tokens=6)[0] for i, text in enumerate(QUESTIONS)]
    assert alone == answers and len(set(answers)) > 1
    assert answer(components, images.flip(0), QUESTIONS[::-1], max_tokens=6) == answers[::-1]


@torch.no_grad()
def test_answers_are_those_of_transformers_own_greedy_search(asked):
    components, _, answers = asked
    size = components.cfg.vlm.vision_patch
    processor = Qwen2VLImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=size)
    upstream = theirs(components.vlm)
    special, task = components.cfg.vlm.special, VlmTask(components, tiny_run().stage("vlm"), 0)
    for i, text in enumerate(QUESTIONS):
        turn = Turn((None, text), ("none",))  # training's own layout; None: an image
        document = components.tokenizer.document([turn])
        batch = pack([document], task.make_batch.layout)
        ids = batch.ids[:, : 1 + int((batch.labels[0] != IGNORE).nonzero()[0])]  # up to where the reply begins
        features = processor([np.asarray(render(caption_task(0, i).scene))], return_tensors="pt")
        out = upstream.generate(
            input_ids=ids,
            pixel_values=features["pixel_values"],
            image_grid_thw=features["image_grid_thw"],
            mm_token_type_ids=(ids == special.image_pad).int(),
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=special.end,
            pad_token_id=special.pad,
        )
        assert components.tokenizer.decode(out[0, ids.shape[1] :].tolist()) == answers[i]


def test_an_answer_ends_at_the_end_token_or_at_the_limit(asked, monkeypatch):
    components, images, _ = asked
    end = components.cfg.vlm.special.end
    word = components.tokenizer.encode("star")[0]
    sizes = []  # of the batch at every step

    def scripted(h):
        """The first row ends at once, the second after three tokens, the third never."""
        sizes.append(len(h))
        out = torch.zeros(len(h), components.cfg.vlm.vocab)
        out[:, word] = 1
        if len(sizes) in (1, 4):
            out[0, end] = 2
        return out

    monkeypatch.setattr(components.vlm, "logits", scripted)
    found = answer(components, images[:3], ["is it red?"] * 3, max_tokens=5)
    assert found == [components.tokenizer.decode([word] * count) for count in (0, 3, 5)] and sizes == [3, 2, 2, 2, 1]


def test_questions_that_cannot_be_asked_are_refused(asked):
    components, images, _ = asked
    with pytest.raises(ConfigError, match="5 images and 1 questions"):
        answer(components, images, ["is it red?"])
    with pytest.raises(ConfigError, match="max_tokens"):
        answer(components, images[:1], ["is it red?"], max_tokens=0)
    with pytest.raises(ShapeError, match="images"):
        answer(components, images[:1, :, :32], ["is it red?"])
    with pytest.raises(StateError, match="needs vlm"):
        answer(tiny_components(stages=("features",)), images[:1], ["is it red?"])
