"""The judge made of transformers' models, on tiny random ones: its boxes, its colours, and the file that it writes."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmark_cases import geneval_folder, read_lines_of, tiny_model
from helpers import wake
from starflow2.benchmarks.detect import JUDGE, detect_folder
from starflow2.benchmarks.geneval import score_folder
from starflow2.benchmarks.prompts import COLORS
from starflow2.core.images import read_pixels
from starflow2.errors import CheckpointError
from starflow2.models.object_detector import DetectedObject, ObjectDetector

pytest.importorskip("scipy", reason="scipy is not installed, which transformers' Mask2Former asks for")


@pytest.fixture(scope="module")
def detector() -> ObjectDetector:
    """Random weights in the architectures of the published ones."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        PreTrainedTokenizerFast,
        SwinConfig,
    )

    torch.manual_seed(0)
    names = {0: "star", 1: "mouse", 2: "heart"}
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    sizes |= {"num_attention_heads": 2, "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(backbone_config=swin, num_queries=6, **sizes)
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 32, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    words = {w: i for i, w in enumerate(["[PAD]", "[EOS]", "a", "photo", "of", "-", "colored", "object", *COLORS])}
    plain = Tokenizer(models.WordLevel(words | {"[UNK]": 40}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", eos_token="[EOS]")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    found = wake(Mask2FormerForUniversalSegmentation(config), 0.3)
    return ObjectDetector(found, wake(clip, 0.3), tokenizer, side=128)


def test_boxes_are_those_of_masks_and_scores_those_of_class_times_mask(detector):
    classes = torch.full((6, 4), -9.0)
    classes[:, 3] = 9  # nothing
    classes[0] = torch.tensor([9.0, -9, -9, -9])
    classes[1] = torch.tensor([-9.0, 9, -9, -9])
    masks = torch.full((6, 64, 64), -9.0)
    masks[0, 10:20, 30:50], masks[1, 0:4, 0:4] = 9, 2.0
    star, mouse = detector._instances(classes, masks, (64, 64))
    assert (star.name, star.box) == ("star", (30, 10, 50, 20)) and star.score == pytest.approx(1, abs=1e-3)
    assert mouse.name == "computer mouse" and mouse.score == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=1e-3)
    assert int(star.mask.sum()) == 200


def test_a_colour_depends_on_the_object_and_not_on_what_lies_outside_of_its_mask(detector):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:48, 16:48] = True
    found = DetectedObject("star", 1.0, (10, 10, 54, 54), mask)
    one, other = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mixed = torch.where(mask, one, other)
    assert detector.color(one, found, COLORS) == detector.color(mixed, found, COLORS)
    seen = {detector.color(torch.full((3, 64, 64), value / 4), found, COLORS) for value in range(5)}
    assert seen <= set(COLORS)


def test_the_file_that_it_writes_is_scored_and_says_that_the_judge_is_another(detector, tmp_path):
    drawn = geneval_folder(tmp_path, tiny_model())
    detect_folder(drawn.folder, tmp_path / "d.jsonl", detector)
    head, *lines = read_lines_of(tmp_path / "d.jsonl")
    assert head == {"judge": JUDGE} and len(lines) == 6 and any(line["detections"] for line in lines)
    colored = [d["color"] for line in lines[4:] for d in line["detections"] if d["class"] == "star"]
    assert all(color in COLORS for color in colored)
    result = score_folder(drawn.folder, tmp_path / "d.jsonl")
    assert result.judge == JUDGE and any("not to be compared" in note for note in result.notes)


def test_an_image_of_another_shape_keeps_its_boxes_inside(detector, tmp_path):
    drawn = geneval_folder(tmp_path, tiny_model())
    image = read_pixels(drawn.folder / "00000" / "samples" / "0000.png")[:, :40]
    for found in detector.detect(image):
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 40 and found.mask.shape == (40, 64)


def test_folders_of_other_models_are_refused(detector, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot load .*Expected a Mask2Former"):
        ObjectDetector.load(str(tmp_path), str(tmp_path))


def test_both_models_are_loaded_from_folders(detector, tmp_path):
    detector.detector.save_pretrained(tmp_path / "mask2former")
    detector.clip.save_pretrained(tmp_path / "clip")
    detector.tokenizer.save_pretrained(tmp_path / "clip")
    again = ObjectDetector.load(str(tmp_path / "mask2former"), str(tmp_path / "clip"))
    again.side = detector.side
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    one, other = detector.detect(image), again.detect(image)
    assert [(found.name, found.box) for found in one] == [(found.name, found.box) for found in other]
