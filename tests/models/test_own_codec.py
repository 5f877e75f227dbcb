"""A codec and an extractor named by their classes: through stages, model folder and pipeline, the package unchanged."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import wake
from model_cases import tiny_model, tiny_run, tiny_tokenizer
from starflow2.errors import ConfigError
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.config import CodecConfig, ExtractorConfig, ModelConfig
from starflow2.models.summary import describe
from starflow2.pipeline import StarFlow2
from starflow2.training.loop import fit
from starflow2.training.recipes import smoke, with_patches
from starflow2.training.work import Sizes

CODEC = '''
import torch
import torch.nn.functional as F
from torch import nn


class Pooled(nn.Module):
    """Four by four pixels averaged, two by two of them a latent of 12 channels."""

    dim, grid, image_size, extractor = 12, (8, 8), 64, None

    def __init__(self, start=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(start))
        self.register_buffer("factor", torch.tensor(2.0), persistent=False)

    @property
    def encoder(self):
        return self

    def forward(self, images):
        small = F.pixel_unshuffle(F.avg_pool2d(images, 4), 2)
        return small.flatten(2).transpose(1, 2) * self.scale

    def encode(self, images):
        return self(images)

    def decode(self, latents):
        small = (latents / self.scale).transpose(1, 2).unflatten(2, (8, 8))
        return F.interpolate(F.pixel_shuffle(small, int(self.factor)), scale_factor=4)


class Useless(nn.Module):
    pass


class Projected(nn.Module):
    """Patches of eight pixels under a fixed random projection, as the features of an FAE."""

    def __init__(self, width=40):
        super().__init__()
        self.grid, self.feature_dim = (8, 8), width
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(192, width, generator=generator) / 14)

    def features(self, images):
        return F.unfold(images, 8, stride=8).transpose(1, 2) @ self.matrix
'''


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the module that holds the codec."""
    (tmp_path / "my_codec.py").write_text(CODEC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_codec", raising=False)
    return tmp_path


def model_over(**changes: Any) -> ModelConfig:
    """The tiny model over the codec."""
    usual = {"codec": "my_codec:Pooled", "latent_dim": 12, "grid": (8, 8), "image_size": 64, "settings": {"start": 2.0}}
    codec = CodecConfig(**{**usual, **changes})
    patches = with_patches(tiny_model())
    deep, *shallow = (replace(block, dim=12) for block in (patches.flow.deep, *patches.flow.shallow))
    return replace(patches, fae=codec, flow=replace(patches.flow, deep=deep, shallow=tuple(shallow)))


def test_a_codec_of_ones_own_goes_through_every_stage_and_draws(folder):
    run = replace(tiny_run(1, 1), model=model_over())
    components = wake(Components(run.model, tiny_tokenizer()), 0.05)
    components.finished_stages = ("vlm",)
    save_components(components, folder / "model")
    assert load_file(folder / "model" / "model.safetensors")["own_codec.scale"] == components.own_codec.scale
    stages = tuple(stage for stage in run.stages if stage.name in ("vlm", "t2i", "adapter", "joint"))
    for name in ("t2i", "adapter", "joint"):
        fit(replace(run, stages=stages), name, folder)
    loaded = load_components(folder / "model")
    assert loaded.own_codec.scale == components.own_codec.scale and loaded.finished_stages[-1] == "joint"
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded.codec.encode(images), components.codec.encode(images))
    (drawing,) = StarFlow2(loaded).generate("two red hearts")
    assert drawing.image.size == (64, 64)
    assert describe(run.model).parameters.by_component["fae"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"codec": "os:system"}, "derives from torch.nn.Module"),
        ({"codec": "my_codec:Gone"}, "cannot use 'my_codec:Gone' as fae.codec"),
        ({"codec": "my_codec:Useless", "settings": {}}, "lacks members of starflow2.models.protocols.Codec"),
        ({"settings": {"stop": 1.0}}, "fae.settings do not fit my_codec:Pooled"),
        ({"image_size": 32}, r"has \(channels, grid, image_size\) \(12, \(8, 8\), 64\), its config"),
    ],
)
def test_what_is_no_codec_of_these_sizes_is_refused(folder, changes, says):
    with pytest.raises(ConfigError, match=says):
        Components(model_over(**changes), tiny_tokenizer())


# -- feature extractors -----------------------------------------------------------------------------------------------


def model_on(**changes: Any) -> ModelConfig:
    """The tiny model whose FAE reads features of the class."""
    usual: dict[str, Any] = {"extractor": "my_codec:Projected", "feature_dim": 40, "grid": (8, 8)}
    return replace(tiny_model(), features=ExtractorConfig(**{**usual, **changes}))


def test_an_extractor_of_ones_own_goes_through_every_stage_and_draws(folder):
    run = replace(tiny_run(1, 1), model=model_on(settings={"width": 40}))
    stages = tuple(stage for stage in run.stages if stage.name != "features")
    run = replace(run, stages=tuple(replace(s, perceptual=0.1, adversarial=0.1) for s in stages))
    before: torch.Tensor | None = None
    for stage in run.stages:
        fit(run, stage.name, folder)
        matrix = load_file(folder / "model" / "model.safetensors")["features.matrix"]
        assert before is None or torch.equal(matrix, before), "no stage trains it"
        before = matrix
    loaded = load_components(folder / "model")
    assert isinstance(before, torch.Tensor) and torch.equal(loaded.features.state_dict()["matrix"], before)
    assert not (folder / "model" / "features").exists()
    (drawing,) = StarFlow2(loaded).generate("two red hearts")
    assert drawing.image.size == (64, 64)
    assert describe(run.model).parameters.by_component["features"] == 192 * 40
    assert Sizes.of(run.model).weights["features"] == 192 * 40 and "features" not in Sizes.of(run.model).trained("fae")
    assert smoke(run).model.features == run.model.features


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extractor": "os:system"}, "features.extractor is 'os:system'; expected a class that derives"),
        ({"extractor": "my_codec:Useless"}, "lacks members of starflow2.models.protocols.FeatureExtractor"),
        ({"settings": {"depth": 1}}, "features.settings do not fit my_codec:Projected"),
        ({"settings": {"width": 20}}, r"has \(feature_dim, grid\) \(20, \(8, 8\)\), its config \(40"),
        ({"grid": (4, 4)}, r"features has \(feature_dim, grid\) \(40, \(4, 4\)\).* expected those of fae"),
    ],
)
def test_what_is_no_extractor_of_these_sizes_is_refused(folder, changes, says):
    with pytest.raises(ConfigError, match=says):
        Components(model_on(**changes), tiny_tokenizer())


def test_stage_features_trains_no_extractor_of_a_users_class(folder):
    run = replace(tiny_run(1, 1), model=model_on())
    with pytest.raises(ConfigError, match="which stays as it is; leave the stage out"):
        fit(run, "features", folder)
