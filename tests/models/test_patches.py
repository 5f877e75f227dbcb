"""Native patches: an exact codec without weights, and a model without FAE and features that does what others do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from helpers import wake
from model_cases import tiny_model, tiny_run, tiny_tokenizer
from starflow2.errors import CheckpointError, ConfigError, ShapeError
from starflow2.evals.codec import codec_table, evaluate_codec
from starflow2.flow import Context
from starflow2.inference.config import DrawConfig
from starflow2.inference.likelihood import decode_code
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.config import PatchConfig
from starflow2.models.config_file import FORMAT
from starflow2.models.patches import PatchCodec
from starflow2.models.protocols import Codec
from starflow2.models.summary import LatentShape, describe
from starflow2.pipeline import StarFlow2
from starflow2.training.config import StageConfig
from starflow2.training.datasets import to_images
from starflow2.training.dry_run import dry_run
from starflow2.training.loop import fit
from starflow2.training.recipes import nano, nano_patches, smoke, with_patches
from starflow2.training.tasks import TASKS
from starflow2.world.captions import caption_task
from starflow2.world.questions import known_words

PATCHES = PatchConfig(image_size=64, patch_size=8, mean=(0.73, 0.75, 0.70), std=(0.32, 0.35, 0.39))
DONE = ("vlm", "t2i", "adapter", "joint")


def pictures(count: int, first: int = 0) -> torch.Tensor:
    return to_images([caption_task(0, first + i).scene for i in range(count)])


def patch_parts(stages: tuple[str, ...] = DONE, side: int = 8) -> Components:
    """The tiny model of `tiny_components` over patches, woken."""
    torch.manual_seed(3)
    components = wake(Components(with_patches(tiny_model(side)), tiny_tokenizer()), 0.05)
    components.vocabulary, components.finished_stages = known_words(), stages
    return components.eval()


# -- the codec


def test_images_come_back_as_they_were_and_latents_are_standardised():
    codec, images = PatchCodec(PATCHES), pictures(64)
    assert isinstance(codec, Codec) and not codec.state_dict()
    latents = codec.encode(images)
    assert latents.shape == (64, 64, 192) and latents.dtype == torch.float32
    assert (codec.decode(latents) - images).abs().max() <= 1e-6
    colours = latents.view(64, 64, 3, 64).transpose(0, 2).flatten(1)
    assert colours.mean(1).abs().max() < 0.2 and (colours.std(1) - 1).abs().max() < 0.1


def test_a_latent_is_the_patch_that_unfolding_finds_there():
    images, codec = torch.rand(2, 3, 64, 64) * 2 - 1, PatchCodec(PATCHES)
    unfolded = F.unfold(images, 8, stride=8).transpose(1, 2).view(2, 64, 3, 64)
    plain = (unfolded - torch.tensor(PATCHES.mean)[:, None]) / torch.tensor(PATCHES.std)[:, None]
    assert (codec.encode(images) - plain.flatten(2)).abs().max() <= 1e-6


def test_what_lies_outside_the_range_of_pixels_is_clipped():
    images = PatchCodec(PATCHES).decode(30 * torch.randn(2, 64, 192))
    assert images.min() == -1 and images.max() == 1


def test_an_image_that_is_not_made_of_whole_patches_is_refused():
    with pytest.raises(ConfigError, match="image_size is 64 and patch_size 7"):
        replace(PATCHES, patch_size=7)
    with pytest.raises(ConfigError, match=r"std\[1\] is 0.0; expected above 0"):
        replace(PATCHES, std=(0.3, 0.0, 0.3))
    codec = PatchCodec(PATCHES)
    with pytest.raises(ShapeError, match="images"):
        codec.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ShapeError, match="latents"):
        codec.decode(torch.zeros(1, 64, 191))


# -- the model


def test_codec_flow_and_features_of_a_model_fit_together_or_are_refused():
    model = nano_patches().model
    with pytest.raises(ConfigError, match=r"latents of 768 channels.*of 192"):
        replace(model, fae=replace(PATCHES, patch_size=16))
    with pytest.raises(ConfigError, match="features are given but fae is a PatchConfig"):
        replace(model, features=nano().model.features)
    with pytest.raises(ConfigError, match="features is None but fae is a FaeConfig"):
        replace(nano().model, features=None)


def test_a_model_of_patches_has_no_fae_no_features_and_says_so():
    summary = describe(nano_patches().model)
    counts = summary.parameters.by_component
    assert counts["fae"] == counts["features"] == 0 and summary.latents == LatentShape(count=64, dim=192)
    components = patch_parts()
    assert {name for name, _ in components.named_children()} == {"vlm", "patches", "flow", "joints"}
    assert describe(components.cfg).parameters.total == sum(p.numel() for p in components.parameters())


def test_the_density_of_pixels_is_exact():
    """Against the Jacobian of the whole way from pixels to the prior, codec included."""
    components = patch_parts(side=2).double()
    image, level = pictures(1)[:, :, 20:36, 20:36].double(), torch.tensor([0.1], dtype=torch.float64)
    flow = components.flow
    context = Context(torch.randn(1, 1, flow.cfg.deep.context_dim, dtype=torch.float64))
    jacobian = torch.autograd.functional.jacobian(
        lambda x: flow(components.codec.encode(x), context, level)[0].flatten(), image, vectorize=True
    ).view(768, 768)
    _, logdet = flow(components.codec.encode(image), context, level)
    scales = 256 * torch.tensor(components.cfg.fae.std, dtype=torch.float64).log().sum()
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - (logdet[0] - scales)) <= 1e-6
    assert logdet.abs() > 0.1, "an identity would prove nothing"


def test_a_model_of_patches_is_saved_and_loaded_strictly(tmp_path):
    before = patch_parts()
    folder = save_components(before, tmp_path / "model")
    assert not (folder / "features").exists() and json.loads((folder / "config.json").read_text())["format"] == FORMAT
    after = load_components(folder)
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    assert after.cfg == before.cfg and torch.equal(before.codec.encode(pictures(1)), after.codec.encode(pictures(1)))
    tensors = load_file(folder / "model.safetensors")
    assert not any(name.startswith("fae.") for name in tensors)
    save_file({**tensors, "fae.encoder.head.bias": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unknown \['fae.encoder.head.bias'\]"):
        load_components(folder)


def test_a_wrong_key_of_patches_is_named(tmp_path):
    folder = save_components(patch_parts(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["fae"]["patch_sise"] = config["model"]["fae"].pop("patch_size")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"fae.patch_sise: unknown key.*patch_size"):
        load_components(folder)


@pytest.mark.parametrize("cleanup", ["none", "tweedie"])
def test_a_model_of_patches_draws(cleanup):
    model = StarFlow2(patch_parts(("vlm", "t2i")))
    config = DrawConfig.for_model(model.components, cleanup=cleanup)
    images = model.draw(["a red circle", "two hearts"], [0, 1], config)
    assert images.shape == (2, 3, 64, 64) and (images[0] - images[1]).abs().max() > 0.1
    alone = model.draw(["two hearts"], [1], config)
    assert (alone[0] - images[1]).abs().max() <= 1e-4


def test_a_joint_model_of_patches_talks_scores_and_never_encodes_what_it_drew():
    model, image = StarFlow2(patch_parts()), pictures(1)[0]
    (found,) = model.score(["a red circle"], [image]).pictures
    assert found.dims == 64 * 192
    assert abs(float(found.patches.sum()) + found.shallow_logdet - found.log_prob) / found.dims <= 1e-6
    calls: list[None] = []
    hook = model.components.codec.encoder.register_forward_hook(lambda *_: calls.append(None))
    session = model.session().add(image, "a blue square")
    made = session.draw().picture
    session.add("a red circle").draw()
    hook.remove()
    assert len(calls) == 1 and made.x.shape == (64, 192)
    assert torch.allclose(made.image, model.components.codec.decode(made.x.float()[None])[0])


def test_a_code_of_patches_gives_the_image_back():
    model, image = StarFlow2(patch_parts()), pictures(1)[0]
    sampler = model.sampler()
    noisy = sampler.noisy(image[None], torch.tensor([sampler.noise_level]))
    code = model.invert(image, "a red circle")
    again = decode_code(sampler, code.z, "a red circle").image
    assert (again - model.components.codec.decode(noisy.float())[0]).abs().max() <= 1e-4


def test_round_trips_of_patches_are_measured_without_features():
    pytest.importorskip("torchmetrics")
    components = patch_parts()
    report = evaluate_codec(components.codec, components.codec.extractor, pictures(4), (0.0, 0.15))
    clean, noisy = report.rows
    assert clean.psnr > 60 and 25 < noisy.psnr < 40, "noise of 0.05 in [-1, 1] is 32 dB"
    assert clean.feature_fd is None and codec_table(report).row_count == 2


# -- training


@pytest.mark.parametrize("name", ["features", "fae"])
def test_stages_of_the_fae_are_refused_where_there_is_none(name):
    with pytest.raises(ConfigError, match=f"stage {name} .*native patches"):
        TASKS[name](patch_parts(), StageConfig(name=name, steps=1, batch=2), 0)


def test_patches_have_no_codec_to_train_end_to_end():
    stage = StageConfig(name="t2i", steps=1, batch=2, codec_weight=1.0)
    with pytest.raises(ConfigError, match=r"codec_weight .*native patches"):
        TASKS["t2i"](patch_parts(), stage, 0)


def test_patches_go_through_their_stages(tmp_path):
    save_components(patch_parts(("vlm",)), tmp_path / "model")
    run = tiny_run(steps=1, save_every=1)
    stages = tuple(replace(s, batch=2) for s in run.stages if s.name in DONE)
    run, losses = replace(run, model=with_patches(tiny_model()), stages=stages), []
    for stage in stages[1:]:
        fit(run, stage.name, tmp_path, report=lambda progress: losses.append(progress.metrics["loss"]))
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())
    assert load_components(tmp_path / "model").finished_stages == DONE


def test_the_recipe_takes_a_step_in_miniature():
    run = smoke(nano_patches())
    assert run.model == nano_patches().model and [s.name for s in run.stages] == [*DONE, "end", "final"]
    facts = dry_run(run, "t2i", "cpu")
    assert torch.tensor([facts["loss"], facts["grad_norm"]]).isfinite().all() and facts["grad_norm"] > 0
