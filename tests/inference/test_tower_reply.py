"""Replies of the frozen language model about images of any shape, against transformers' own processor and search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model_cases import tiny_components
from starflow2.errors import ConfigError, ShapeError, StateError
from starflow2.inference.tower_reply import TowerView, tower_reply, tower_size
from starflow2.inference.vlm_answer import answer
from starflow2.models.components import Components
from starflow2.training.datasets import to_images
from starflow2.world.captions import caption_task
from upstream import theirs


@pytest.fixture(scope="module")
def components() -> Components:
    return tiny_components(scale=0.25)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return to_images([caption_task(0, 0).scene])[0]


def test_an_image_of_the_models_size_gets_the_answer_that_many_at_once_get(components, image):
    question = "what color is the star?"
    assert (
        tower_reply(components, [image, question], max_tokens=6)
        == answer(components, image[None], [question], max_tokens=6)[0]
    )


@torch.no_grad()
def test_replies_about_several_images_of_any_shape_are_those_of_transformers(components, image):
    wide, tall = image[:, 16:48], image[:, :, :48]
    parts = [wide, "what color is the star?", tall, "is it red?"]
    special, tokenizer, patch = components.cfg.vlm.special, components.tokenizer, components.cfg.vlm.vision_patch
    processor = Qwen2VLImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=patch)
    pictures = [p for p in parts if isinstance(p, torch.Tensor)]
    bytes_ = [((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for p in pictures]
    features = processor([np.asarray(Image.fromarray(b)) for b in bytes_], return_tensors="pt")
    counts = iter([int(grid.prod()) // 4 for grid in features["image_grid_thw"]])
    ids = list(tokenizer.opens_user())
    for part in parts:
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        else:
            ids += [special.vision_start, *[special.image_pad] * next(counts), special.vision_end]
    row = torch.tensor([[*ids, *tokenizer.opens_reply()]])
    out = theirs(components.vlm).generate(
        input_ids=row,
        pixel_values=features["pixel_values"],
        image_grid_thw=features["image_grid_thw"],
        mm_token_type_ids=(row == special.image_pad).int(),
        attention_mask=torch.ones_like(row),
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=special.end,
        pad_token_id=special.pad,
    )
    assert tower_reply(components, parts, max_tokens=6) == tokenizer.decode(out[0, row.shape[1] :].tolist())


@pytest.mark.parametrize("shape", [(64, 64), (50, 200), (300, 90), (31, 17)])
@pytest.mark.parametrize("limits", [(1, 1_605_632), (64 * 64, 128 * 128)])
def test_sizes_are_those_of_qwens_own_processor(shape, limits):
    smart_resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    ours = tower_size(*shape, 28, TowerView(least_pixels=limits[0], most_pixels=limits[1]))
    assert ours == smart_resize(*shape, factor=28, min_pixels=limits[0], max_pixels=limits[1])


def test_a_square_view_shows_every_image_in_one_shape():
    assert tower_size(100, 400, 28, TowerView(square=256)) == (252, 252)


def test_what_cannot_be_answered_is_refused(components, image):
    with pytest.raises(ConfigError, match="0 parts"):
        tower_reply(components, [])
    with pytest.raises(ShapeError, match="200 to 1"):
        tower_size(1, 400, 28, TowerView())
    with pytest.raises(StateError, match="needs vlm"):
        tower_reply(tiny_components(stages=("features",)), [image, "is it red?"])
