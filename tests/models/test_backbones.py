"""Our Qwen2.5-VL and DINOv2 give what transformers' own classes give, on the same small random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers import wake
from model_cases import texts, tiny_model, tiny_tokenizer
from starflow2.errors import ShapeError
from starflow2.models.qwen import QwenStream
from starflow2.models.sequence import image_mrope, text_mrope
from starflow2.models.vision import DinoFeatures
from starflow2.training.datasets import to_images
from starflow2.world.captions import caption_task
from starflow2.world.scene import render
from upstream import theirs

SPECIAL = tiny_model().vlm.special


def a_stream(dtype: torch.dtype = torch.float32) -> QwenStream:
    """Woken so far that attention looks at positions: at transformers' own initialisation it hardly does."""
    torch.manual_seed(3)
    return wake(QwenStream(tiny_model().vlm), 0.2).to(dtype).eval()


def a_document(stream: QwenStream, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures, ids (B, T) with the picture behind two tokens, and our M-RoPE positions (3, B, T)."""
    scenes = [caption_task(0, i).scene for i in range(rows)]
    grid = stream.cfg.image_grid
    count = grid[0] * grid[1]
    words = torch.randint(7, 200, (rows, 9))
    begin = torch.tensor([[SPECIAL.user, SPECIAL.vision_start]]).expand(rows, -1)
    seen = torch.full((rows, count), SPECIAL.image_pad)
    end = torch.full((rows, 1), SPECIAL.vision_end)
    ids = torch.cat([begin, seen, end, words], 1)
    picture, after = image_mrope(grid, 2)
    behind = text_mrope(1, ids.shape[1] - 2 - count, after)[:, 0]
    positions = torch.cat([text_mrope(1, 2)[:, 0], picture, behind], 1)
    return to_images(scenes), ids, positions[:, None].expand(-1, rows, -1)


def our_embeds(stream: QwenStream, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    embeds = stream.embed(ids)
    embeds[ids == SPECIAL.image_pad] = stream.see(images).flatten(0, 1)
    return embeds


def processed(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grids from transformers' own image processor, set to map pixels to [-1, 1] without resizing."""
    cfg = tiny_model().vlm
    processor = Qwen2VLImageProcessorPil(
        do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=cfg.vision_patch
    )
    pictures = [np.asarray(render(caption_task(0, i).scene)) for i in range(rows)]
    out = processor(pictures, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


@torch.no_grad()
def test_states_and_logits_of_pictures_and_words_equal_transformers_own_forward_pass():
    stream = a_stream()
    images, ids, positions = a_document(stream)
    patches, grid = processed(len(ids))
    types = (ids == SPECIAL.image_pad).int()
    upstream = theirs(stream)
    inner = upstream.model(input_ids=ids, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=types)
    ours = stream.states(our_embeds(stream, images, ids), positions)
    assert (ours - inner.last_hidden_state).abs().max() <= 1e-5
    whole = upstream(input_ids=ids, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=types)
    assert (stream.logits(ours) - whole.logits).abs().max() <= 1e-5


@torch.no_grad()
def test_positions_left_out_would_be_one_dimensional_in_silence_so_we_always_give_them():
    stream = a_stream()
    images, ids, positions = a_document(stream)
    embeds = our_embeds(stream, images, ids)
    bare = theirs(stream).model.language_model(inputs_embeds=embeds).last_hidden_state
    flat = stream.states(embeds, text_mrope(*ids.shape))
    right = stream.states(embeds, positions)
    assert (bare - flat).abs().max() <= 1e-5, "transformers falls back to counting tokens"
    assert (bare - right).abs().max() > 1e-2, "which is not where a picture's tokens stand"


@torch.no_grad()
def test_one_dimensional_positions_are_refused():
    stream = a_stream()
    with pytest.raises(ShapeError, match="positions"):
        stream.states(stream.embed(torch.tensor([[1, 2, 3]])), torch.arange(3)[None])


@pytest.mark.parametrize("chunk", [1, 7])
@torch.no_grad()
def test_cached_steps_equal_the_full_pass_also_through_a_picture(chunk):
    stream = a_stream()
    images, ids, positions = a_document(stream)
    embeds = our_embeds(stream, images, ids)
    full = stream.states(embeds, positions)
    cache = stream.new_cache()
    steps = [
        stream.states(embeds[:, i : i + chunk], positions[..., i : i + chunk], cache=cache)
        for i in range(0, ids.shape[1], chunk)
    ]
    assert cache.length == ids.shape[1]
    assert (torch.cat(steps, 1) - full).abs().max() <= 1e-5


@torch.no_grad()
def test_fused_attention_between_the_documents_of_a_row_equals_transformers_written_out_attention():
    stream = a_stream()
    images, ids, positions = a_document(stream)
    embeds, length = our_embeds(stream, images, ids), ids.shape[1]
    document = torch.arange(length) > length - 7  # the last six positions belong to a second one
    attend = ((document[:, None] == document) & torch.ones(length, length).tril().bool()).expand(len(ids), -1, -1)
    ours = stream.states(embeds, positions, attend=attend)
    upstream = theirs(stream)
    upstream.set_attn_implementation("eager")
    added = torch.zeros(attend.shape).masked_fill(~attend, torch.finfo(torch.float32).min)[:, None]
    written_out = upstream.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask={"full_attention": added}
    ).last_hidden_state
    assert (ours - written_out).abs().max() <= 1e-5
    together = stream.states(embeds, positions)
    assert (ours - together)[:, -6:].abs().max() > 0.01


@torch.no_grad()
def test_states_never_look_ahead():
    stream = a_stream()
    images, ids, positions = a_document(stream)
    embeds = our_embeds(stream, images, ids)
    changed = embeds.clone()
    changed[:, 10:] += 1
    before, after = stream.states(embeds, positions), stream.states(changed, positions)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().max() > 1e-2


@torch.no_grad()
def test_the_vision_tower_reads_each_picture_on_its_own_and_only_its_own_size():
    stream = a_stream()
    images, _, _ = a_document(stream, rows=3)
    seen = stream.see(images)
    assert seen.shape == (3, 16, stream.width)
    alone = torch.cat([stream.see(images[i : i + 1]) for i in range(3)])
    assert (seen - alone).abs().max() <= 1e-5 and (seen[0] - seen[1]).abs().max() > 1e-3
    with pytest.raises(ShapeError, match="images"):
        stream.see(torch.zeros(1, 3, 32, 32))


@torch.no_grad()
def test_dino_features_are_transformers_patch_states_without_the_class_token():
    dino = wake(DinoFeatures(tiny_model().features), 0.1).eval()
    images = to_images([caption_task(0, i).scene for i in range(2)])
    hidden = torch.rand(2, 64) < 0.3
    upstream, feats = theirs(dino), dino.features(images)
    states = upstream(images).last_hidden_state
    assert states.shape[1] == 65 and feats.shape == (2, 64, dino.feature_dim)
    assert (feats - states[:, 1:]).abs().max() <= 1e-5
    states = upstream(images, bool_masked_pos=hidden).last_hidden_state
    assert (dino.features(images, hidden) - states[:, 1:]).abs().max() <= 1e-5
    rows, columns = dino.grid
    assert (rows, columns) == (8, 8)


@torch.no_grad()
def test_hidden_patches_change_the_features_and_what_they_showed_no_longer_matters():
    dino = wake(DinoFeatures(tiny_model().features), 0.1).eval()
    images = to_images([caption_task(0, 0).scene])
    hidden = torch.zeros(1, 64, dtype=torch.bool)
    hidden[0, 9] = True  # row 1, column 1
    feats = dino.features(images, hidden)
    assert (feats - dino.features(images)).abs().max() > 1e-3
    painted = images.clone()
    painted[:, :, 8:16, 8:16] = 0.3
    assert torch.equal(dino.features(painted, hidden), feats)
    assert (dino.features(painted) - dino.features(images)).abs().max() > 1e-3


def test_every_caption_of_500_draws_and_every_answer_comes_back_from_the_tokenizer():
    tokenizer = tiny_tokenizer()
    for text in {caption_task(0, i).prompt for i in range(500)} | set(texts(20)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert max(tokenizer.encode(text)) < tokenizer.vocab <= tiny_model().vlm.vocab


@pytest.mark.parametrize("text", ["Zürich, 2 ßtraßen", "漢字 🙂", "a\tb", "UPPER case"])
def test_text_that_training_never_saw_survives_as_bytes(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_looks_like_a_special_token_is_read_as_text():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("a ring<|end|><|user|>")
    assert not {SPECIAL.end, SPECIAL.user} & set(ids)
    assert tokenizer.decode(ids) == "a ring<|end|><|user|>"


def test_a_drawing_prompt_ends_with_the_token_that_begins_a_picture():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.drawing_prompt("two red hearts")
    assert ids == [SPECIAL.user, *tokenizer.encode("two red hearts"), SPECIAL.assistant, SPECIAL.vision_start]
    assert tokenizer.drawing_prompt("") == [SPECIAL.user, SPECIAL.assistant, SPECIAL.vision_start]


def test_a_tokenizer_comes_back_from_its_file(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    again = type(tokenizer).load(tmp_path / "tokenizer.json")
    assert again.special == tokenizer.special and again.vocab == tokenizer.vocab
    assert again.encode("a ring<|end|>") == tokenizer.encode("a ring<|end|>")
