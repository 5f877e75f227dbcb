"""The auto-encoder: standardised deterministic latents, images in range, losses that reach the encoder."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from helpers import wake
from model_cases import LATENT, WIDTH, tiny_components, tiny_model
from starflow2.errors import ConfigError, ShapeError
from starflow2.models.fae import Fae, FaeCodec
from starflow2.models.protocols import Codec, FeatureExtractor
from starflow2.training.codec_tasks import FaeTask
from starflow2.training.config import StageConfig
from starflow2.training.datasets import to_images
from starflow2.world.captions import caption_task


def pictures(count: int, first: int = 0) -> torch.Tensor:
    return to_images([caption_task(0, first + i).scene for i in range(count)])


def without_posterior_noise(fae: Fae) -> Fae:
    """Make an FAE certain of its latents: log-variance at its lower bound."""
    with torch.no_grad():
        fae.encoder.head.weight[LATENT:] = 0
        fae.encoder.head.bias[LATENT:] = -12
    return fae


def adapted(fae: Fae, feats: torch.Tensor, images: torch.Tensor, rounds: int = 12) -> Fae:
    """Running statistics that have seen training batches, faster than in a real run; no weight changes."""
    fae.train()
    fae.standardize.momentum = 0.5
    with torch.no_grad():
        for i in range(rounds):
            fae.losses(images, feats, torch.Generator().manual_seed(i))
    return fae.eval()


def test_the_codec_and_the_extractor_satisfy_their_protocols():
    components = tiny_components()
    codec = components.codec
    assert isinstance(codec, Codec) and isinstance(components.features, FeatureExtractor)
    assert (codec.dim, codec.grid, codec.image_size) == (LATENT, (8, 8), 64)


def test_latents_have_zero_mean_and_unit_variance_per_channel_once_statistics_adapted():
    components = tiny_components()
    wake(components.fae.encoder, 0.3, seed=1)
    images = pictures(24)
    with torch.no_grad():
        feats = components.features.features(images)
    adapted(without_posterior_noise(components.fae), feats, images)
    latents = components.codec.encode(images)
    assert latents.shape == (24, 64, LATENT) and latents.dtype == torch.float32
    assert latents.flatten(0, 1).mean(0).abs().max() < 0.05
    assert (latents.flatten(0, 1).std(0) - 1).abs().max() < 0.05
    fresh = components.codec.encode(pictures(24, first=1000)).flatten(0, 1)
    assert (fresh.std(0) - 1).abs().max() < 0.25


def test_encoding_is_deterministic_and_each_image_is_on_its_own():
    codec = tiny_components().codec
    images = pictures(4)
    latents = codec.encode(images)
    assert torch.equal(latents, codec.encode(images))
    alone = torch.cat([codec.encode(images[i : i + 1]) for i in range(4)])
    assert (latents - alone).abs().max() <= 1e-5
    assert (latents[0] - latents[1]).abs().max() > 1e-2


def test_decoding_gives_images_in_range_even_from_wild_latents():
    codec = tiny_components().codec
    images = codec.decode(30 * torch.randn(3, 64, LATENT))
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.1


def test_every_part_of_the_loss_is_positive_they_add_up_and_their_gradient_reaches_the_encoder():
    components = tiny_components()
    fae, images = components.fae.train(), pictures(3)
    with torch.no_grad():
        feats = components.features.features(images)
    losses = fae.losses(images, feats, torch.Generator().manual_seed(0))
    named = [losses.pixel, losses.edge, losses.feature, losses.kl]
    assert min(term.item() for term in named) > 0
    cfg = fae.cfg
    weights = (1.0, cfg.edge_weight, cfg.feature_weight, cfg.kl_weight)
    total = sum(w * term.item() for w, term in zip(weights, named, strict=True))
    assert losses.total.item() == pytest.approx(total, rel=1e-6)
    for term in named:
        grads = torch.autograd.grad(term, list(fae.encoder.parameters()), retain_graph=True, allow_unused=True)
        assert max(g.abs().max().item() for g in grads if g is not None) > 0


def test_noise_of_the_losses_comes_from_the_generator_alone():
    components = tiny_components()
    images = pictures(2)
    with torch.no_grad():
        feats = components.features.features(images)
        drawn = []
        for seed in (1, 1, 2):
            torch.randn(3)
            drawn.append(components.fae.losses(images, feats, torch.Generator().manual_seed(seed)).total.item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_any_noise_the_pixel_loss_is_the_distance_of_a_round_trip_through_the_codec():
    components = tiny_components()
    quiet = Fae(replace(components.cfg.fae, noise_max=0.0)).eval()
    quiet.load_state_dict(components.fae.state_dict())
    components.fae = without_posterior_noise(quiet)
    images = pictures(3)
    with torch.no_grad():
        losses = components.fae.losses(images, components.features.features(images), torch.Generator())
    drawn = components.codec.decode(components.codec.encode(images))
    assert drawn.abs().max() < 1, "a clamped picture would hide a difference"
    assert losses.pixel.item() == pytest.approx((drawn - images).abs().mean().item(), abs=2e-3)


def test_the_extractor_stays_out_of_the_parameters_that_the_fae_stage_trains():
    components = tiny_components()
    mine = {id(p) for p in components.fae.parameters()}
    assert not mine & {id(p) for p in components.features.parameters()}
    codec = FaeCodec(components.fae, components.features)
    assert not codec.encode(pictures(1)).requires_grad and not codec.decode(torch.zeros(1, 64, LATENT)).requires_grad


def test_tensors_of_another_shape_are_refused_by_name():
    components = tiny_components()
    with pytest.raises(ShapeError, match="images"):
        components.codec.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ShapeError, match="latents"):
        components.codec.decode(torch.zeros(1, 64, LATENT + 1))
    with pytest.raises(ShapeError, match="feats"):
        Fae(tiny_model().fae).encode_features(torch.zeros(1, 64, WIDTH + 1))


# -- losses that look through another network


def test_perceptual_and_adversarial_weights_move_the_decoder_and_zero_ones_cost_nothing():
    components = tiny_components()
    moved = {}
    for name, stage in (
        ("plain", StageConfig(name="fae", steps=1, batch=4)),
        ("both", StageConfig(name="fae", steps=1, batch=4, perceptual=0.5, adversarial=0.1)),
    ):
        torch.manual_seed(0)
        task = FaeTask(components, stage, 0)
        components.fae.eval()
        loss, extra = task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1))
        (moved[name],) = torch.autograd.grad(loss, components.fae.pixel_decoder.out.weight)
        assert ("judge" in task.trained) == ("judge" in extra) == ("perceptual" in extra) == (name == "both")
    assert (moved["plain"] - moved["both"]).abs().max() > 1e-6


def test_lpips_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match="perceptual"):
        FaeTask(tiny_components(), StageConfig(name="fae", steps=1, batch=4, lpips=1.0), 0)
