"""transformers' Auto classes on a model folder, and diffusers' habits: the same words and pixels as our own calls."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

import starflow2.hf as hf
from model_cases import STAGES, tiny_components
from pretrained_cases import write_upstream
from starflow2 import StarFlow2
from starflow2.core.images import read_picture, to_pil
from starflow2.errors import CheckpointError, ConfigError, DataError, PromptError, ShapeError
from starflow2.models.checkpoint import save_components, start_components
from starflow2.models.hub import NANO

PROMPT = [{"role": "user", "content": "two pink hearts"}]


@pytest.fixture(scope="module")
def processor() -> hf.StarFlow2Processor:
    return AutoProcessor.from_pretrained(NANO)


@pytest.fixture(scope="module")
def model() -> hf.StarFlow2ForMultimodalLM:
    return AutoModelForMultimodalLM.from_pretrained(NANO)


@pytest.fixture(scope="module")
def picture(model: hf.StarFlow2ForMultimodalLM) -> Iterator[torch.Tensor]:
    yield read_picture(model.starflow2.generate("two pink hearts", seed=3, tries=1)[0].image, 64)


def test_auto_classes_find_ours(model, processor) -> None:
    assert type(AutoConfig.from_pretrained(NANO)) is hf.StarFlow2Config
    assert type(model) is hf.StarFlow2ForMultimodalLM
    assert type(processor) is hf.StarFlow2Processor


def test_image_mode_draws_what_generate_draws(model, processor) -> None:
    pixels = model.generate(**processor.apply_chat_template(PROMPT), generation_mode="image", seed=3)
    (image,) = processor.post_process_multimodal_output(pixels, generation_mode="image")
    expected = read_picture(model.starflow2.generate("two pink hearts", seed=3, tries=1)[0].image, 64)
    assert image.size == (64, 64)
    torch.testing.assert_close(read_picture(image, 64), expected, atol=2.5 / 255, rtol=0)  # a rounding step of PNG


def test_replies_of_a_prompt_have_seeds_in_turn(model, processor) -> None:
    inputs = processor.apply_chat_template(PROMPT)
    two = model.generate(**inputs, generation_mode="image", seed=3, num_return_sequences=2)
    second = model.generate(**inputs, generation_mode="image", seed=4)
    assert two.shape == (2, 3, 64, 64)
    torch.testing.assert_close(two[1], second[0], atol=1e-4, rtol=0)
    assert (two[0] - two[1]).abs().max() > 0.1


def test_torch_s_own_seed_decides_where_none_is_given(model, processor) -> None:
    inputs = processor.apply_chat_template(PROMPT)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**inputs, generation_mode="image"))
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=0)
    assert (drawn[0] - drawn[2]).abs().max() > 0.1


def test_text_mode_answers_what_ask_answers_in_a_padded_batch(model, processor, picture) -> None:
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for question in ("how many hearts are there?", "is there a pink heart?")
    ]
    inputs = processor.apply_chat_template(talks)
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    made = model.generate(**inputs, max_new_tokens=16)
    answers = processor.post_process_multimodal_output(made[:, inputs["input_ids"].shape[1] :])
    assert answers == [model.starflow2.ask(to_pil(picture), talk[0]["content"][1]["text"]) for talk in talks]
    assert all(answers)


def test_interleaved_mode_gives_words_and_images_in_order(model, processor) -> None:
    first = [{"role": "user", "content": "please start with a red cross."}]
    replied = model.generate(**processor.apply_chat_template(first), generation_mode="interleaved", seed=0)
    (parts,) = processor.post_process_multimodal_output(replied)
    assert [isinstance(part, str) for part in parts].count(False) == 1
    expected = model.starflow2.tell([["please start with a red cross."]], [0])[0][0]
    assert [p for p in parts if isinstance(p, str)] == [p for p in expected if isinstance(p, str)]


def test_a_past_with_images_is_read(model, processor, picture) -> None:
    talk = [
        {"role": "user", "content": "two pink hearts"},
        {"role": "assistant", "content": [{"type": "image", "image": picture}]},
        {"role": "user", "content": "how many hearts are there?"},
    ]
    inputs = processor.apply_chat_template(talk)
    made = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    past = [(["two pink hearts"], [picture])]
    assert processor.post_process_multimodal_output(made) == model.starflow2.answers_after(
        [past], ["how many hearts are there?"]
    )


def test_what_is_saved_loads_and_draws_the_same(model, processor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    AutoConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "a")  # transformers writes config.json anew
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "a")
    inputs = AutoProcessor.from_pretrained(tmp_path / "a").apply_chat_template(PROMPT)
    for mode in ("image", "text"):
        made = [m.generate(**inputs, generation_mode=mode, seed=3) for m in (model, again)]
        torch.testing.assert_close(*made, atol=0, rtol=0)  # the same weights, the same computation
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    StarFlow2.from_pretrained(tmp_path / "a")


# -- what transformers' own tests ask of configs, models and processors that are saved and loaded ----------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder of a tiny model."""
    return save_components(tiny_components(), tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_config_goes_through_json_files_folders_and_copies_unchanged(tiny, tmp_path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    config.to_json_file(tmp_path / "config.json")
    config.save_pretrained(tmp_path / "a")
    again = [
        hf.StarFlow2Config.from_dict(json.loads(config.to_json_string())),
        hf.StarFlow2Config.from_json_file(tmp_path / "config.json"),
        AutoConfig.from_pretrained(tmp_path / "a"),
        copy.deepcopy(config),
    ]
    assert {type(other) for other in again} == {hf.StarFlow2Config}
    assert all(other.to_diff_dict() == config.to_diff_dict() for other in again)
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == json.loads((tiny / "config.json").read_text())
    assert AutoConfig.for_model("starflow2").model_type == hf.StarFlow2Config().model_type == "starflow2"


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMultimodalLM])
def test_every_auto_class_loads_saves_and_loads_the_same_weights(auto, tiny, tmp_path) -> None:
    first = auto.from_pretrained(tiny, config=AutoConfig.from_pretrained(tiny))
    first.save_pretrained(tmp_path / "a", safe_serialization=True)
    first.save_pretrained(tmp_path / "a")  # over itself
    second = auto.from_pretrained(tmp_path / "a", dtype="auto")
    assert first.config.to_diff_dict() == second.config.to_diff_dict()
    weights = first.state_dict()
    assert weights.keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in weights.items())
    assert not second.training and all(value.is_contiguous() for value in second.state_dict().values())


def test_files_hold_every_weight_once_and_nothing_else(tiny, tmp_path) -> None:
    model = AutoModel.from_pretrained(tiny)
    model.save_pretrained(tmp_path / "a")
    files = sorted(path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.safetensors"))
    assert files == ["features/model.safetensors", "model.safetensors", "vlm/model.safetensors"]
    assert not [*(tmp_path / "a").rglob("*.bin")]
    sizes = [value.numel() for name in files for value in load_file(tmp_path / "a" / name).values()]
    once = {value.data_ptr(): value.numel() for value in model.state_dict().values() if value.numel()}
    assert sum(sizes) == sum(once.values()), "the language head is tied to the embedding"
    own = load_file(tmp_path / "a" / "model.safetensors")
    assert {f"components.{name}" for name in own} <= model.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.pop(sorted(own)[-1]), "1 tensors missing"),
        (lambda own: own.update(more=torch.zeros(2)), "1 unknown"),
        (lambda own: own.update({sorted(own)[0]: torch.zeros(2)}), "expected"),
    ],
)
def test_a_key_that_is_missing_unknown_or_of_another_shape_is_an_error_not_a_fresh_weight(
    change, words: str, copied
) -> None:
    own = load_file(copied / "model.safetensors")
    change(own)
    save_file(own, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        AutoModel.from_pretrained(copied)


def test_backbones_in_shards_are_read_by_the_auto_classes_and_referred_to_when_saved(tmp_path) -> None:
    components = start_components(write_upstream(tmp_path))
    components.finished_stages = STAGES
    folder = save_components(components, tmp_path / "model")
    assert len([*(tmp_path / "vlm").glob("model-*.safetensors")]) > 1
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again").state_dict()
    assert not (tmp_path / "again" / "vlm").exists()
    for name, value in components.state_dict().items():
        assert torch.equal(value, again[f"components.{name}"]), name


def test_a_folder_without_weights_and_a_config_alone_make_no_model(copied, tiny) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        AutoModel.from_pretrained(copied)
    with pytest.raises(ConfigError, match="no weights"):
        AutoModel.from_config(AutoConfig.from_pretrained(tiny))


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_shard_size", "1MB"), ("safe_serialization", False), ("state_dict", {}), ("is_main_process", False)],
)
def test_options_of_saving_do_what_they_say_or_are_refused(name: str, value: object, tiny, tmp_path) -> None:
    for saved in (AutoModel.from_pretrained(tiny), AutoProcessor.from_pretrained(tiny)):
        with pytest.raises(ConfigError, match=name):
            saved.save_pretrained(tmp_path / "a", **{name: value})
        assert not (tmp_path / "a").exists()


def test_a_processor_goes_through_a_folder_of_its_own_and_into_its_models(tiny, tmp_path) -> None:
    first = AutoProcessor.from_pretrained(tiny)
    first.save_pretrained(tmp_path / "alone")
    second = AutoProcessor.from_pretrained(tmp_path / "alone")
    talk = [{"role": "user", "content": [{"type": "image", "image": torch.zeros(3, 64, 64)}]}]
    ours, theirs = (processor.apply_chat_template(talk) for processor in (first, second))
    assert type(second) is hf.StarFlow2Processor and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first.words.vocabulary == second.words.vocabulary
    assert first.words.tokenizer.encode("a red star") == second.words.tokenizer.encode("a red star")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        AutoModel.from_pretrained(tmp_path / "alone")
    AutoModel.from_pretrained(tiny).save_pretrained(tmp_path / "alone")
    before = {path: path.read_bytes() for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    second.save_pretrained(tmp_path / "alone")
    assert before == {path: path.read_bytes() for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    AutoModel.from_pretrained(tmp_path / "alone")


def test_a_processor_takes_no_other_models_folder(tiny, processor, tmp_path) -> None:
    AutoProcessor.from_pretrained(tiny).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds another model"):
        processor.save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a model folder"):
        processor.save_pretrained(tmp_path / "b")


def test_weights_are_those_of_our_own_loader(model) -> None:
    ours = StarFlow2.from_pretrained().components.state_dict()
    assert {f"components.{name}" for name in ours} == set(model.state_dict())
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"generation_mode": "audio"}, ConfigError, "generation_mode"),
        ({"max_new_token": 3}, ConfigError, "max_new_tokens"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens"),
        ({"num_beams": 4}, ConfigError, "num_beams"),
        ({"temperature": float("nan")}, ConfigError, "temperature"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64)}, DataError, "slots"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(model, processor, options, error, words: str) -> None:
    with pytest.raises(error, match=words):
        model.generate(**{**processor.apply_chat_template(PROMPT), **options})


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ([{"role": "assistant", "content": "two pink hearts"}], "role 'user'"),
        ([*PROMPT, {"role": "assistant", "content": "two hearts"}], "last word"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "video"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": "a violet dragon"}], "dragon"),
    ],
)
def test_messages_of_another_form_are_refused(processor, talk, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        processor.apply_chat_template(talk)


@pytest.mark.parametrize(
    "talk", [None, 5, "a star", {}, [], [5], [[5]], [PROMPT, None], [[{"role": "user", "content": 3}]]]
)
def test_what_is_no_conversation_is_refused(processor, talk) -> None:
    with pytest.raises(PromptError, match=r"is |holds "):
        processor.apply_chat_template(talk)


def test_words_of_a_message_are_text(processor, picture) -> None:
    for part in (
        {"type": "text", "text": picture},
        {"type": "text"},
        {"type": ["text"], "text": "x"},
        {"type": "image"},
    ):
        with pytest.raises(PromptError, match="the content of message 0 holds"):
            processor.apply_chat_template([{"role": "user", "content": [part]}])


TENSORS = {
    "a row": ("input_ids", lambda x: x[0], ShapeError),
    "text": ("input_ids", lambda x: "two hearts", ShapeError),
    "floats": ("input_ids", lambda x: x.float(), ShapeError),
    "negative": ("input_ids", lambda x: -x - 1, DataError),
    "no tokens": ("input_ids", lambda x: x + 10**6, DataError),
    "without values": ("input_ids", lambda x: x.to("meta"), ShapeError),
    "a short mask": ("attention_mask", lambda x: x[:, 1:], ShapeError),
    "small images": ("pixel_values", lambda x: x[..., :-1], ShapeError),
    "bright images": ("pixel_values", lambda x: 255 * x + 9, DataError),
    "numbers": ("pixel_values", lambda x: 5, ShapeError),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_no_processor_made_are_refused(model, processor, picture, case: str) -> None:
    name, spoil, error = TENSORS[case]
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
    inputs = dict(processor.apply_chat_template([{"role": "user", "content": parts}]))
    with pytest.raises(error, match=name):
        model.generate(**(inputs | {name: spoil(inputs[name])}))


def test_outputs_of_another_kind_are_refused(processor) -> None:
    for mode, outputs, error in (
        ("text", torch.zeros(2, 3), ShapeError),
        ("text", torch.tensor([[-1]]), DataError),
        ("text", "x", ShapeError),
        ("image", torch.zeros(3, 8, 8), ShapeError),
        ("image", torch.zeros(1, 3, 8, 8, dtype=torch.int64), ShapeError),
        ("sound", torch.zeros(1, 3, 8, 8), ConfigError),
    ):
        with pytest.raises(error, match=r"outputs|generation_mode"):
            processor.post_process_multimodal_output(outputs, generation_mode=mode)


def test_a_processor_decodes_rows_and_single_rows_and_reads_no_single_texts(model, processor, picture) -> None:
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]}]
    inputs = processor.apply_chat_template(talk)
    rows = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    (answer,) = processor.batch_decode(rows, skip_special_tokens=True)
    assert answer == processor.decode(rows[0]) == model.starflow2.ask(to_pil(picture), "what is it?")
    with pytest.raises(ConfigError, match="apply_chat_template"):
        processor(text="a red star", return_tensors="pt")


def test_slots_without_their_image_are_refused(model, processor, picture) -> None:
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]}]
    inputs = processor.apply_chat_template(talk)
    with pytest.raises(DataError, match="pixel values"):
        model.generate(inputs["input_ids"])
    with pytest.raises(DataError, match="slots"):
        model.generate(inputs["input_ids"][:, :20], inputs["pixel_values"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", torch.float16), ("torch_dtype", torch.float16), ("device_map", "tpu"), ("quantize", True)],
)
def test_options_of_loading_are_honoured_or_refused(name: str, value: object) -> None:
    with pytest.raises(Exception, match=name.partition("_")[0]):
        AutoModelForMultimodalLM.from_pretrained(NANO, **{name: value})


def test_a_call_draws_and_edits_as_diffusers_do(model) -> None:
    pipe = model.starflow2
    (image,) = pipe("two pink hearts", generator=torch.Generator().manual_seed(0)).images
    two = pipe("two pink hearts", num_images_per_prompt=2, guidance_scale=1.0).images
    assert image.size == (64, 64) and len(two) == 2
    (edited,) = pipe("change the color of the hearts to green", image=image).images
    assert edited.tobytes() != image.tobytes()
