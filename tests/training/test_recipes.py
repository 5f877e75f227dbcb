"""Recipes: the sizes they claim, every one of them trainable in miniature, and what may not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grow_nano import main as grow_nano

from model_cases import tiny_tokenizer
from run_cases import with_stage
from starflow2.core.dialogue import Dialogue
from starflow2.core.serialize import from_dict, to_dict
from starflow2.errors import ConfigError, TrainingError
from starflow2.flow.noise import NoiseEmbedding
from starflow2.models.checkpoint import read_config, save_components
from starflow2.models.components import Components, build
from starflow2.models.config import SelfCheckConfig
from starflow2.models.fae import Fae
from starflow2.models.summary import describe
from starflow2.training.config import CorpusConfig, RunConfig
from starflow2.training.datasets import Documents
from starflow2.training.loop import fit
from starflow2.training.losses import latent_penalty
from starflow2.training.recipes import RECIPES, find, mini, nano, nano_final, nano_grown, paper, paper_siglip, smoke
from starflow2.training.start import start_stage, unfinished_stages

LARGE = ("mini", "paper", "paper-siglip")


def test_paper_has_the_parameters_that_the_paper_and_the_releases_report():
    counts = describe(paper().model).parameters
    by = counts.by_component
    assert 3.60e9 <= counts.trainable <= 3.72e9
    assert by["vlm.language"] == 7_615_616_512 and by["vlm.vision"] == 676_550_144  # Qwen2.5-VL-7B: 8.29 B
    assert by["features"] == 1_136_480_768  # DINOv2-g
    assert abs(by["vlm.language"] - 545.0e6 + counts.trainable - 10.6e9) < 0.2e9  # 10.6 B in the paper's tables
    assert by["flow.deep"] > 24 * 113_286_144 and by["flow.shallow"] > 8 * 113_286_144  # STARFlow's layers


def test_the_auto_encoder_of_paper_has_the_sizes_of_the_fae_paper():
    with torch.device("meta"):
        fae = Fae(paper().model.fae)
    counts = [sum(p.numel() for p in m.parameters()) for m in (fae.encoder, fae.feature_decoder, fae.pixel_decoder)]
    assert counts[0] == 38_166_592  # 38.17 M
    assert abs(counts[1] - 170.4e6) < 3e6 and abs(counts[2] - 305.4e6) < 2e6


def test_what_we_added_for_nano_is_off_in_paper():
    model = paper().model
    assert not (model.joints.adapter_stencil or model.joints.reference or model.joints.words)
    for block in (model.flow.deep, *model.flow.shallow):
        assert not (block.stencil or block.learned_positions) and block.stack.final_norm and block.stack.rope
        assert (block.scale, block.clip, block.clips_mean) == ("softplus", 4.0, True)
        assert block.stack.heads == 48 and block.stack.mlp_ratio == 4 and block.stack.activation == "gelu"
    assert model.vlm.image_grid == model.flow.deep.grid == model.fae.grid == (16, 16)


def test_the_stages_of_paper_see_as_many_documents_as_the_paper_says():
    run = paper()
    documents = {s.name: s.steps * s.batch for s in run.stages}
    assert documents["t2i"] == 800_000_000
    assert abs(documents["adapter"] - 200e6) < 1024 and documents["joint"] == 80_000_000
    assert all(s.batch == 1024 for s in run.stages if s.name != "fae")


def test_paper_trains_as_the_paper_says_where_it_says_it():
    run = paper()
    for stage in run.stages:
        optim = stage.optim
        assert (optim.matrix_lr, optim.weight_decay, optim.decay, optim.min_lr) == (0.0, 1e-4, "cosine", 1e-6)
        assert optim.lr * optim.rate(stage.steps, stage.steps) == pytest.approx(1e-6)
        assert stage.distill == 0
    assert {s.text_mean for s in run.stages if s.name in ("adapter", "joint")} == {"token"}
    assert {s.text_mean for s in nano().stages} == {"reply"}


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_over_pretrained_weights_names_prepare_before_anything_is_built(name, tmp_path):
    with pytest.raises(TrainingError, match="starflow2 prepare"):
        fit(with_stage("fae", find(name), corpus=CorpusConfig(mixture="mix.json")), "fae", tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_the_way_through_json(name):
    run = find(name)
    assert from_dict(RunConfig, to_dict(run)) == run


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_in_miniature_is_small_and_of_the_same_kind(name):
    large, small = find(name), smoke(find(name))
    assert describe(small.model).parameters.total < 2e6 and not small.model.references
    assert [s.name for s in small.stages] == [s.name for s in large.stages]
    a, b = build(large.model, "meta"), build(small.model, "meta")
    assert {type(m) for m in a.modules()} == {type(m) for m in b.modules()}


def test_nano_in_miniature_keeps_its_sizes():
    assert smoke(nano()).model == nano().model


@pytest.mark.parametrize(("name", "count"), [("paper", 4), ("paper-siglip", 1)])
def test_a_large_recipe_in_miniature_goes_through_its_stages(name, count, tmp_path):
    run = smoke(find(name))
    short = tuple(replace(s, steps=1, batch=2, save_every=1, whitening_captions=64) for s in run.stages[:count])
    run, losses = replace(run, stages=short, precision="float32"), []
    save_components(Components(run.model, tiny_tokenizer()), tmp_path / "model")
    for stage in run.stages:
        fit(run, stage.name, tmp_path, report=lambda line: losses.append(line.metrics["loss"]))
    assert len(losses) == count and all(torch.tensor(losses).isfinite())


def test_an_embedding_of_few_waves_is_small_and_still_tells_levels_apart():
    wide, narrow = NoiseEmbedding(512), NoiseEmbedding(512, 32)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in wide.parameters()) / 20
    out = narrow(torch.tensor([0.01, 0.1, 0.5]))
    assert out.shape == (3, 512) and torch.pdist(out).min() > 1e-2


def test_the_penalty_on_latents_is_their_mean_square_and_off_in_nano():
    small = build(smoke(paper()).model)
    u = torch.randn(3, 16, 8)
    assert torch.isclose(latent_penalty(small.flow, u), 1e-4 * (u**2).mean())
    assert latent_penalty(build(nano().model).flow, u) == 0


def test_upsamplings_that_do_not_fit_the_picture_are_refused():
    with pytest.raises(ConfigError, match="image_size is 64"):
        replace(nano().model.fae, pixel_channels=(48, 24, 12, 6))


def test_siglip_differs_from_paper_in_features_and_their_auto_encoder_alone():
    one, other = to_dict(paper()), to_dict(paper_siglip())
    assert {k for k in one if one[k] != other[k]} == {"model"}
    assert {k for k in one["model"] if one["model"][k] != other["model"][k]} == {
        "name", "features", "features_from", "fae",
    }  # fmt: skip


def test_mini_is_in_between():
    sizes = [describe(run().model).parameters.trainable for run in (nano, mini, paper)]
    assert sizes == sorted(sizes) and 0.4e9 < sizes[1] < 0.6e9


def test_nano_is_trained_on_from_the_shipped_weights(tmp_path) -> None:
    grow_nano(str(tmp_path / "run"))
    run = nano_grown()
    assert unfinished_stages(run, tmp_path / "run") == ["vlm", "adapter", "joint", "final"]
    components = start_stage(run, "vlm", tmp_path / "run", "cpu")
    assert components.cfg == replace(run.model, name=components.cfg.name) and components.cfg.self_check is not None
    assert {s.name for s in run.stages} == {s.name for s in nano().stages} - {"end"}
    with pytest.raises(SystemExit, match="exists"):
        grow_nano(str(tmp_path / "run"))
    with pytest.raises(SystemExit, match="no way to start recipe 'nano'; expected nano-grown or nano-final"):
        grow_nano(str(tmp_path / "other"), "nano")


def test_the_last_stages_of_nano_read_only_words_that_the_language_model_has_learnt(tmp_path) -> None:
    grow_nano(str(tmp_path), "nano-final")
    run = nano_final()
    assert unfinished_stages(run, tmp_path) == ["end", "final"]
    assert [s.keep_as for s in run.stages[-2:]] == ["", "nano"] and run.stages[-1].everything
    assert read_config(tmp_path / "nano-heldout").model.name == "nano-heldout"
    known = set((tmp_path / "model" / "lexicon.txt").read_text("utf-8").split())
    components = start_stage(run, "end", tmp_path, "cpu")
    assert components.vocabulary == known and components.cfg.self_check == SelfCheckConfig()
    assert Documents.of(components, lambda i: Dialogue((), "none")).vocabulary == known
