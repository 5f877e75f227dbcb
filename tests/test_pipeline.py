"""The public face: rows keep to themselves, seeds mean what they say, what cannot be drawn is refused by name."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download

from model_cases import STAGES, sampled_by_the_flow, tiny_components, tiny_model, tiny_tokenizer
from starflow2 import StarFlow2
from starflow2.core.images import read_picture, save_png, to_pil
from starflow2.errors import CheckpointError, ConfigError, DataError, DeviceError, PromptError, ShapeError, StateError
from starflow2.inference.cleanup import cleanup_levels, denoised
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.conversations import generate_replies
from starflow2.inference.likelihood import score
from starflow2.inference.session import Session
from starflow2.models import checkpoint, lora
from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.models.hub import pick_device
from starflow2.models.lora import LoraConfig

PROMPTS = [
    "two red hearts",
    "a small black diamond",
    "a photo of a large blue star left of a small green ring on a gray background",
]
OFF, ON = DrawConfig(guidance=0.0), DrawConfig(guidance=1.5)
SIDE, LATENTS = 4, 16  # of the model below: rows of its grid, latents of an image of 32 pixels


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    """A model that went through stage t2i."""
    return StarFlow2(tiny_components(side=SIDE))


def latents(model: StarFlow2, prompts: list[str], seeds: list[int], config: DrawConfig) -> torch.Tensor:
    talks = [[[prompt]] for prompt in prompts]
    replies = generate_replies(model.sampler(config), talks, seeds, ReplyLimits(tokens=0, pictures=1), draws=True)
    return torch.stack([image.x for ((image,),) in replies]).float()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# -- rows and seeds


@pytest.mark.parametrize("config", [OFF, ON, DrawConfig(guidance=1.5, rule="tarflow")], ids=["off", "on", "tarflow"])
def test_row_i_of_a_mixed_batch_is_the_picture_of_its_prompt_alone(model, config):
    seeds = [5, 6, 7]
    lengths = {len(model.components.tokenizer.drawing_prompt(p)) for p in PROMPTS}
    assert len(lengths) == 3, "prompts of one length would need no padding"
    together = latents(model, PROMPTS, seeds, config)
    alone = torch.cat([latents(model, [p], [s], config) for p, s in zip(PROMPTS, seeds, strict=True)])
    assert gap(together, alone) <= 1e-4
    assert gap(together, sampled_by_the_flow(model.components, PROMPTS, seeds, config)) <= 1e-4
    images = model.draw(PROMPTS, seeds, config)
    assert gap(images[1:2], model.draw(PROMPTS[1:2], seeds[1:2], config)) <= 1e-4
    assert gap(together[0], together[1]) > 0.1, "rows that are all alike would show nothing"


def test_a_flow_that_magnifies_rounding_still_draws_row_i_as_if_alone_in_double_precision():
    """Trained flows do: a difference of 1e-6 in one latent grows a thousandfold on the way through the others."""
    model = StarFlow2(tiny_components(scale=0.16))
    prompts, seeds = [PROMPTS[i % 3] for i in range(6)], list(range(6))
    gaps = {}
    for precision in ("float32", "float64"):
        config = DrawConfig(guidance=1.5, precision=precision)
        alone = torch.cat([latents(model, [p], [s], config) for p, s in zip(prompts, seeds, strict=True)])
        gaps[precision] = gap(latents(model, prompts, seeds, config), alone)
    assert gaps["float32"] > 1e-4, "nothing to see here"
    assert gaps["float64"] <= 1e-5


def test_pictures_drawn_in_chunks_are_those_of_one_batch(model):
    prompts, seeds = [PROMPTS[i % 3] for i in range(5)], list(range(5))
    whole = model.draw(prompts, seeds, ON)
    assert gap(whole, model.draw(prompts, seeds, DrawConfig(guidance=1.5, batch=2))) <= 1e-4


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(model):
    torch.manual_seed(1)
    first = model.draw(PROMPTS[:1], [3], ON)
    torch.manual_seed(2)
    assert torch.equal(first, model.draw(PROMPTS[:1], [3], ON))
    assert gap(first, model.draw(PROMPTS[:1], [4], ON)) > 1e-3


def test_prompt_guidance_and_prior_scale_all_reach_the_picture(model):
    base = model.draw(PROMPTS[:1], [3], ON)
    assert gap(base, model.draw(PROMPTS[1:2], [3], ON)) > 1e-3
    assert gap(base, model.draw(PROMPTS[:1], [3], OFF)) > 1e-3
    assert gap(base, model.draw(PROMPTS[:1], [3], DrawConfig(guidance=1.5, prior_scale=1.0))) > 1e-3


def test_without_guidance_a_prior_draw_goes_through_the_flow_and_comes_back(model):
    """Sampling against the parallel direction: forward(sample) is the scaled prior draw, which its seed names."""
    components = model.components
    config = DrawConfig(guidance=0.0, prior_scale=0.7)
    sampled = latents(model, PROMPTS, [1, 2, 3], config)
    rows = [components.tokenizer.drawing_prompt(p) for p in PROMPTS]
    level = torch.full((3,), model.sampling_noise)
    with torch.no_grad():
        z, _ = components.flow(sampled, drawing_context(components, rows), level)
    expected = torch.stack([torch.randn(LATENTS, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)])
    assert gap(z, 0.7 * expected) <= 1e-4


def test_generate_gives_n_pictures_of_each_prompt_with_seeds_that_count_on(model):
    pictures = model.generate(PROMPTS[:2], n=3, seed=10, config=ON)
    assert [(p.prompt, p.seed) for p in pictures] == [(p, s) for p in PROMPTS[:2] for s in (10, 11, 12)]
    assert {p.image.size for p in pictures} == {(32, 32)} and {p.image.mode for p in pictures} == {"RGB"}
    (again,) = model.generate(PROMPTS[1], seed=11, config=ON)
    assert np.abs(np.asarray(again.image, int) - np.asarray(pictures[4].image, int)).max() <= 1
    assert again.settings == {"guidance": 1.5, "prior_scale": 0.8, "cleanup": "none", "model": "tiny"}


def test_what_a_model_was_tuned_for_is_its_default(model):
    config = DrawConfig.for_model(model.components)
    assert (config.guidance, config.prior_scale) == (model.components.cfg.guidance, model.components.cfg.prior_scale)
    assert DrawConfig.for_model(model.components, guidance=0.0, prior_scale=None).guidance == 0
    assert torch.equal(model.draw(PROMPTS[:1], [0]), model.draw(PROMPTS[:1], [0], config))


def test_progress_counts_every_latent_of_every_picture_once(model):
    seen: list[tuple[int, int]] = []
    model.draw(PROMPTS, [0, 1, 2], DrawConfig(guidance=1.5, batch=2), lambda done, of: seen.append((done, of)))
    done = [count for count, _ in seen]
    assert done == sorted(done) and len(set(done)) == len(done)
    assert seen[-1] == (3 * LATENTS, 3 * LATENTS) and {of for _, of in seen} == {3 * LATENTS}


def test_tweedie_clean_up_moves_latents_by_the_squared_noise_level_times_the_score(model):
    raw = latents(model, PROMPTS, [1, 2, 3], ON)
    clean = denoised(model.sampler(ON), PROMPTS, raw).float()
    shown = model.draw(PROMPTS, [1, 2, 3], DrawConfig(guidance=1.5, cleanup="tweedie"))
    assert gap(shown, model.components.codec.decode(clean)) <= 1e-4
    assert clean.shape == raw.shape and bool(torch.isfinite(clean).all()) and not clean.requires_grad
    assert gap(clean, raw) > 1e-3
    rows = [model.components.tokenizer.drawing_prompt(p) for p in PROMPTS]
    context, level = drawing_context(model.components, rows), torch.full((3,), model.sampling_noise)
    direction, step = clean - raw, 1e-2
    with torch.no_grad():  # a difference quotient along the step, in place of autograd
        far, near = (model.components.flow.log_prob(raw + s * direction, context, level) for s in (step, -step))
    slope = (far - near) / (2 * step)
    expected = direction.square().sum((1, 2)) / model.sampling_noise**2
    assert slope.tolist() == pytest.approx(expected.tolist(), rel=0.05)


def test_iterative_clean_up_of_a_standard_normal_shrinks_by_what_each_level_leaves():
    """A fresh flow is a standard normal at every level, whose score is known: at t it takes t^2 - s t of x away."""
    fresh = StarFlow2(Components(tiny_model(SIDE), tiny_tokenizer()))
    fresh.components.finished_stages = STAGES[:4]
    config = DrawConfig(cleanup="iterative", cleanup_steps=4, guidance=0.0)
    levels = [0.5 * (0.01 / 0.5) ** (i / 3) for i in range(4)]
    assert cleanup_levels(config, 0.5, 0.01) == pytest.approx(levels)
    factor = math.prod(1 - t * t + s * t for t, s in zip(levels, [*levels[1:], 0.0], strict=True))
    raw = torch.randn(3, LATENTS, 4, generator=torch.Generator().manual_seed(0))
    assert gap(denoised(fresh.sampler(config), PROMPTS, raw), factor * raw) <= 1e-5


def test_an_iterative_clean_up_of_one_step_is_that_of_tweedie_and_of_several_another(model):
    raw, tweedie = latents(model, PROMPTS, [1, 2, 3], ON), DrawConfig(guidance=1.5, cleanup="tweedie")
    once, often = (replace(tweedie, cleanup="iterative", cleanup_steps=steps) for steps in (1, 4))
    found = [denoised(model.sampler(config), PROMPTS, raw) for config in (tweedie, once, often)]
    assert torch.equal(found[0], found[1]) and gap(found[2], found[0]) > 1e-3
    assert gap(model.draw(PROMPTS, [1, 2, 3], often), model.components.codec.decode(found[2].float())) <= 1e-4


def test_a_roundtrip_without_noise_is_the_codec_and_with_noise_is_named_by_its_seed(model):
    images = model.draw(PROMPTS, [0, 1, 2], ON)
    assert torch.equal(model.roundtrip(images), model.components.codec.decode(model.components.codec.encode(images)))
    noisy = model.roundtrip(images, noise_level=0.5, seed=1)
    assert torch.equal(noisy, model.roundtrip(images, noise_level=0.5, seed=1))
    assert gap(noisy, model.roundtrip(images, noise_level=0.5, seed=2)) > 1e-3
    assert model.sampling_noise == 0.5


# -- what is refused


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "...", "?!"])
def test_a_prompt_without_words_is_refused(model, prompt):
    with pytest.raises(PromptError, match="prompt is empty"):
        model.generate(prompt)


def test_unknown_words_are_all_named_with_the_nearest_known_one(model):
    with pytest.raises(PromptError, match=r"'haerts', 'unicorn'.*Did you mean \"hearts\"\?"):
        model.generate("two red haerts and a unicorn, a unicorn")
    with pytest.raises(PromptError, match=r"'<\|end\|>'"):
        model.generate("two red hearts <|end|>")


def test_a_prompt_of_ten_thousand_words_is_refused_with_its_length_and_the_limit(model):
    with pytest.raises(PromptError, match=r"\d{5} tokens.*up to 160"):
        model.generate("red " * 10_000)


def test_one_bad_prompt_among_good_ones_stops_before_anything_is_drawn(model):
    seen: list[int] = []
    with pytest.raises(PromptError, match="dragon"):
        model.generate([*PROMPTS, "a dragon"], progress=lambda done, _: seen.append(done))
    assert not seen


def test_capitals_and_spaces_do_not_change_the_picture(model):
    plain, loud = (model.generate(p, config=ON)[0] for p in ("two red hearts", "  Two   RED\nhearts "))
    assert np.array_equal(np.asarray(plain.image), np.asarray(loud.image))
    assert loud.prompt == "  Two   RED\nhearts "


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_picture_is_refused(model, n):
    with pytest.raises(ConfigError, match=f"n is {n}"):
        model.generate(PROMPTS[0], n=n)


@pytest.mark.parametrize("seed", [-(2**70), 2**64])
def test_a_seed_that_no_generator_takes_is_refused(model, seed):
    with pytest.raises(ConfigError, match="seed"):
        model.generate(PROMPTS[0], seed=seed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"prior_scale": 0.0}, "prior_scale is 0.0"),
        ({"batch": 0}, "batch is 0"),
        ({"cleanup": "tweedy"}, "cleanup is 'tweedy'.*Did you mean \"tweedie\""),
        ({"precision": "float46"}, "precision is 'float46'.*Did you mean \"float64\""),
        ({"rule": "starflw"}, "rule is 'starflw'.*Did you mean \"starflow\""),
        ({"guidence": 1.0}, 'guidence.*Did you mean "guidance"'),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_name(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        DrawConfig.for_model(model.components, **changes)


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), (PROMPTS, [1])])
def test_prompts_and_seeds_come_in_pairs(model, prompts, seeds):
    with pytest.raises(ConfigError, match="expected equally many"):
        model.draw(prompts, seeds, ON)


def test_a_model_whose_flow_was_never_trained_does_not_draw():
    unfinished = StarFlow2(tiny_components(("features", "fae", "vlm")))
    with pytest.raises(StateError, match="drawing needs t2i"):
        unfinished.generate("two red hearts")


def test_latents_that_are_not_finite_are_an_error_that_names_the_seeds():
    components = tiny_components()
    with torch.no_grad():
        components.flow.deep.head.bias[:] = float("nan")
    with pytest.raises(DataError, match=r"seeds \[4, 5\]"):
        StarFlow2(components).generate("two red hearts", n=2, seed=4)


@pytest.mark.parametrize("name", ["tpu", "cud", "", "cpu0"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(DeviceError, match="expected auto, cpu, cuda or mps"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_there_is_refused(name):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(DeviceError, match="this machine has none"):
        pick_device(name)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


# -- both streams


@pytest.fixture(scope="module")
def joint() -> StarFlow2:
    """A model that went through every stage, with 2 x 2 latents and pictures of 16 pixels."""
    return StarFlow2(tiny_components(STAGES, side=2))


def photo(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def same_picture(a: Any, b: Any) -> bool:
    return bool(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1)


def test_zero_skips_draw_the_pictures_of_stage_one():
    """Stage 3 begins here: the whole of sampling, guidance included, through the Pretzel and past it."""
    components = tiny_components(STAGES, side=2)
    with torch.no_grad():
        for linear in (components.joints.visual_skip, components.joints.text_skip, components.joints.reference):
            linear.weight.zero_()
    drawn = StarFlow2(components).draw(PROMPTS, [5, 6, 7], ON)
    by_the_flow = sampled_by_the_flow(components, PROMPTS, [5, 6, 7], ON)
    assert gap(drawn, components.codec.decode(by_the_flow)) <= 1e-4
    assert gap(drawn, StarFlow2(tiny_components(STAGES, side=2)).draw(PROMPTS, [5, 6, 7], ON)) > 1e-3


def test_a_joint_model_generates_what_a_session_would_draw(joint, model):
    assert joint.is_joint and not model.is_joint
    pictures = joint.generate(PROMPTS[:2], n=2, seed=3, config=ON)
    for picture in pictures:
        made = joint.session(seed=picture.seed, config=ON).add(picture.prompt).draw()
        assert same_picture(picture.image, made.image)
        assert picture.gain == pytest.approx(made.picture.log_prob - made.picture.unconditional_log_prob, abs=1e-3)
    assert [(p.prompt, p.seed) for p in pictures] == [(p, s) for p in PROMPTS[:2] for s in (3, 4)]
    assert joint.generate(PROMPTS[0], config=OFF)[0].gain is None, "nobody asked the unconditional branch"


def test_progress_of_a_joint_model_counts_every_latent_of_every_picture_once(joint):
    seen: list[tuple[int, int]] = []
    joint.draw(PROMPTS, [0, 1, 2], DrawConfig(guidance=1.5, batch=2), lambda done, of: seen.append((done, of)))
    assert seen == [(i, 12) for i in range(1, 13)]


def test_what_both_kinds_of_models_refuse_is_the_same(joint):
    with pytest.raises(PromptError, match="dragon"):
        joint.generate("a dragon")
    with pytest.raises(ConfigError, match="equally many"):
        joint.draw(PROMPTS, [1], ON)
    with pytest.raises(ConfigError, match="cleanup is 'tweedie'"):
        joint.generate(PROMPTS[0], config=DrawConfig(cleanup="tweedie"))


def test_a_model_without_joint_training_holds_no_conversation(model):
    for call in (model.session, lambda: model.ask(photo(), "two red hearts"), lambda: model.edit(photo(), PROMPTS[0])):
        with pytest.raises(StateError, match="needs adapter"):
            call()


def test_asking_and_editing_are_short_sessions(joint, tmp_path):
    picture = to_pil(photo())
    save_png(picture, tmp_path / "a.png")
    seen = read_picture(picture, 16)
    edited = joint.edit(str(tmp_path / "a.png"), "a red circle", seed=4, config=ON)
    made = joint.session(seed=4, config=ON).add(seen, "a red circle").draw()
    assert same_picture(edited.image, made.image) and edited.seed == 4 and edited.prompt == "a red circle"
    assert edited.gain == pytest.approx(made.picture.log_prob - made.picture.unconditional_log_prob)
    asked = [joint.ask(shown, "a red circle") for shown in (str(tmp_path / "a.png"), tmp_path / "a.png", picture, seen)]
    assert asked == [joint.session().add(seen, "a red circle").write()] * 4


def test_answers_and_edits_of_many_are_those_of_each(joint):
    images, words = [photo(0), photo(1)], ["a red circle", "two Red hearts"]
    edits = joint.edits(torch.stack(images), words, [3, 4])
    for image, word, seed, edited in zip(images, words, (3, 4), edits, strict=True):
        assert same_picture(to_pil(edited), joint.edit(image, word, seed=seed).image)
    shown = [[photo(0)], [photo(0), photo(1)], []]
    answers = joint.answers(shown, ["a red circle"] * 3, tokens=5)
    assert answers == [Session(joint.sampler()).add(*pictures, "a red circle").write(tokens=5) for pictures in shown]


def test_told_turns_hold_words_and_pictures(joint):
    told = joint.tell([["a red circle", "two red hearts"], ["a blue star"]], [0, 1])
    assert [len(talk) for talk in told] == [2, 1]
    assert all(isinstance(b, str | torch.Tensor) for talk in told for turn in talk for b in turn)


def test_a_picture_comes_back_from_its_code_as_the_codec_shows_it_and_changes_with_the_words(joint):
    code = joint.invert(photo(), "a  RED circle")
    x = joint.sampler().noisy(photo()[None], torch.tensor([joint.sampling_noise]))
    shown = to_pil(joint.components.codec.decode(x.float())[0])
    assert same_picture(joint.from_code(code, "a red circle"), shown)
    assert not same_picture(joint.from_code(code, "two red hearts"), shown)


def test_pictures_follow_the_weights_when_these_change_behind_a_sampler(joint):
    other = StarFlow2(copy.deepcopy(joint.components))
    before = other.draw(["two red hearts"], [0])
    with torch.no_grad():
        other.components.joints.visual_skip.weight.add_(0.3)
    changed = other.draw(["two red hearts"], [0])
    assert gap(before, changed) > 1e-3
    adapters = lora.attach(other.components, LoraConfig())
    with torch.no_grad():
        for value in adapters.parameters():
            value.add_(0.2)
    assert gap(other.draw(["two red hearts"], [0]), changed) > 1e-3


def test_likelihoods_take_what_sessions_take_and_refuse_what_they_refuse(joint, tmp_path):
    image = joint.draw(["two red hearts"], [0])[0]
    save_png(to_pil(image), tmp_path / "hearts.png", {})
    shown = read_picture(tmp_path / "hearts.png", image.shape[-1])
    assert joint.score([tmp_path / "hearts.png"], ["a star"]) == joint.score([shown], ["a star"])
    assert torch.equal(joint.invert(tmp_path / "hearts.png").z, joint.invert(shown).z)
    for refused in (lambda: joint.score(["a zebra"], ["red"]), lambda: joint.invert(shown, "a zebra")):
        with pytest.raises(PromptError, match="zebra"):
            refused()
    with pytest.raises(ShapeError, match="code has shape"):
        joint.from_code(replace(joint.invert(shown), z=torch.zeros(1, 4)))
    code = joint.invert(shown)
    for z in (code.z.int(), torch.full_like(code.z, torch.nan), torch.full_like(code.z, torch.inf)):
        with pytest.raises(DataError, match="code has NaN or infinite numbers, or whole ones"):
            joint.from_code(replace(code, z=z))
    with pytest.raises(ConfigError, match="noise_level is 0; expected one that was trained"):
        score(joint.sampler(), [], [shown], noise_level=0)


def test_closed_skips_are_a_setting_that_no_other_setting_reopens(joint):
    """The comparison of paper table 4 used to close them through a cache that held one setting."""
    closed = StarFlow2(joint.components, DrawConfig.for_model(joint.components, skips=()))
    assert closed.sampler().pretzel.skips == frozenset()
    closed.sampler(ON)
    assert closed.sampler().pretzel.skips == frozenset() and joint.sampler().pretzel.skips == {"visual", "text"}
    assert gap(closed.draw(PROMPTS[:1], [0]), joint.draw(PROMPTS[:1], [0])) > 1e-3
    with torch.no_grad():
        open_ended = copy.deepcopy(joint.components)
        open_ended.joints.visual_skip.weight.zero_()
    assert gap(closed.draw(PROMPTS[:1], [0]), StarFlow2(open_ended).draw(PROMPTS[:1], [0])) <= 1e-4
    with pytest.raises(ConfigError, match=r"skips\[0\] is 'both'; expected one of visual, text"):
        DrawConfig(skips=("both",))


def test_a_sampler_with_a_code_refuses_guidance_and_can_be_pickled(joint):
    deep = joint.components.cfg.flow.deep
    fixed = joint.sampler().with_code(torch.zeros(deep.num_latents, deep.dim))
    with pytest.raises(ConfigError, match=r"guidance is 2\.0"):
        fixed.changed(guidance=2.0)
    again = pickle.loads(pickle.dumps(fixed.changed(batch=2)))
    assert torch.equal(again.prior((1, 1), torch.Generator()), fixed.start)


def test_the_shipped_model_draws_what_a_conversation_with_it_draws_bit_for_bit():
    nano = StarFlow2.from_pretrained("nano", device="cpu")
    (picture,) = nano.generate("two red hearts", seed=3)
    assert nano.is_joint and same_picture(picture.image, nano.session(seed=3).add("two red hearts").draw().image)


def test_the_shipped_flow_without_its_joints_draws_what_it_samples():
    """A model of stage 1 draws through both streams with closed skips, and by hand through the flow library alone."""
    nano = StarFlow2.from_pretrained("nano", device="cpu")
    nano.components.finished_stages = STAGES[:4]
    config = DrawConfig.for_model(nano.components, precision="float64")
    (picture,) = nano.generate("two red hearts", seed=3, config=config)
    x = sampled_by_the_flow(nano.components, ["two red hearts"], [3], config)
    assert same_picture(picture.image, to_pil(nano.components.codec.decode(x)[0]))  # one grey level: two computations


# -- files and Hub


@pytest.fixture
def saved(model: StarFlow2, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_saved_model_comes_back_by_folder_and_draws_the_same_bits(model, saved):
    again = StarFlow2.from_pretrained(saved, device="cpu")
    assert torch.equal(model.draw(PROMPTS, [0, 1, 2], ON), again.draw(PROMPTS, [0, 1, 2], ON))
    assert again.device == torch.device("cpu")
    assert torch.equal(
        again.draw(PROMPTS, [0, 1, 2], ON), StarFlow2.from_pretrained(str(saved)).draw(PROMPTS, [0, 1, 2], ON)
    )


def test_what_is_saved_is_a_model_folder_with_a_card_for_the_hub(saved):
    assert {p.name for p in saved.iterdir()} == {
        "README.md", "config.json", "features", "lexicon.txt", "model.safetensors", "tokenizer.json", "vlm",
    }  # fmt: skip
    card = ModelCard.load(saved / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("starflow2", "any-to-any")
    assert {"normalizing-flow", "arxiv:2605.08029"} <= set(card.data.tags)
    assert "Finished stages: features" in card.text and "{{" not in card.text
    config = json.loads((saved / "config.json").read_text())
    assert config.keys() == {"model_type", "format", "stages", "model", "digests"}


def test_saving_again_keeps_a_card_that_somebody_wrote(model, saved):
    (saved / "README.md").write_text("my card")
    model.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "my card"
    StarFlow2.from_pretrained(saved)


def test_a_disk_that_fills_up_in_save_pretrained_leaves_a_model_that_still_loads(model, saved, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            model.save_pretrained(saved)
    assert torch.equal(
        StarFlow2.from_pretrained(saved).draw(PROMPTS, [0, 1, 2], ON), model.draw(PROMPTS, [0, 1, 2], ON)
    )


def test_saving_over_something_that_is_no_model_is_refused(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a model folder"):
        model.save_pretrained(tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_push_to_hub_uploads_what_save_pretrained_writes(model, monkeypatch):
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: str | Path, **options: Any) -> str:
            sent["names"] = {p.name for p in Path(folder_path).iterdir()}
            sent["model"] = StarFlow2.from_pretrained(folder_path)
            return "url"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert model.push_to_hub("somebody/drawings") == "url"
    assert {"config.json", "model.safetensors", "README.md", "vlm"} <= sent["names"]
    assert torch.equal(sent["model"].draw(PROMPTS, [0, 1, 2], ON), model.draw(PROMPTS, [0, 1, 2], ON))


@pytest.mark.parametrize(
    "name", ["nanoo", "no/such/folder", "./here", "~/models", "/nowhere", "a b/c d", "nobody/nothing", "x" * 300, ""]
)
def test_names_of_no_model_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        StarFlow2.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nearly_nano_says_so():
    with pytest.raises(CheckpointError, match='Did you mean "nano"'):
        StarFlow2.from_pretrained("nanno")


def test_an_unknown_option_of_from_pretrained_is_refused_with_the_nearest_name(saved):
    with pytest.raises(ConfigError, match=r'devise.*Did you mean "device"'):
        StarFlow2.from_pretrained(saved, devise="cpu")
    with pytest.raises(ConfigError, match=r'revison.*Did you mean "revision"'):
        StarFlow2.from_pretrained("somebody/drawings", revison="main")


def test_a_hub_id_is_fetched_with_the_options_given_and_loaded_from_where_it_lies(saved, monkeypatch):
    asked: list[tuple[Any, ...]] = []

    def fetched(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(saved)

    fetched.__signature__ = inspect.signature(snapshot_download)  # type: ignore[attr-defined]
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    loaded = StarFlow2.from_pretrained("somebody/drawings", revision="v1", device="cpu")
    assert asked == [("somebody/drawings", {"revision": "v1"})]
    assert loaded.components.cfg.name == "tiny"


def test_a_broken_folder_is_refused_before_anything_is_drawn(saved):
    shutil.rmtree(saved / "vlm")
    with pytest.raises(CheckpointError, match="vlm"):
        StarFlow2.from_pretrained(saved)


def test_a_model_that_went_through_every_stage_draws_from_its_folder(smoke_model):
    (picture,) = StarFlow2.from_pretrained(smoke_model, device="cpu").generate("two red hearts")
    assert picture.image.size == (64, 64) and picture.settings["model"] == "nano"
