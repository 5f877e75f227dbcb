"""Pretrained parts: loaded from upstream folders as transformers itself loads them, referred to, never copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Model, SiglipModel
from transformers import SiglipConfig as HfSiglipConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers import wake
from pretrained_cases import SIZE, SPECIAL, write_upstream
from starflow2.core.dialogue import Turn
from starflow2.errors import CheckpointError, ConfigError
from starflow2.models.checkpoint import load_components, save_components, start_components
from starflow2.models.components import Components
from starflow2.models.config import DinoConfig, ModelConfig, SiglipConfig
from starflow2.models.joint_stream import read_documents
from starflow2.models.pretrained import INDEX, Pretrained, fingerprint, inventory, locate
from starflow2.models.sequence import image_mrope, pack, text_mrope
from starflow2.models.vision import DinoFeatures, SiglipFeatures
from starflow2.training.recipes import nano_model, paper_siglip, smoke
from upstream import theirs


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("upstream")
    return folder, write_upstream(folder)


@pytest.fixture(scope="module")
def components(upstream: tuple[Path, ModelConfig]) -> Components:
    torch.manual_seed(0)
    return start_components(upstream[1])


@pytest.fixture
def copy(upstream: tuple[Path, ModelConfig], tmp_path: Path) -> ModelConfig:
    """Config of the model over a copy of both folders, which a test may damage."""
    folder, cfg = upstream
    shutil.copytree(folder, tmp_path / "up")
    vlm, features = (tmp_path / "up" / name for name in ("vlm", "dino"))
    return replace(
        cfg,
        vlm_from=Pretrained(source=str(vlm), precision="float32"),
        features_from=Pretrained(source=str(features), precision="float32"),
    )


def vlm_folder(cfg: ModelConfig) -> Path:
    assert cfg.vlm_from is not None
    return Path(cfg.vlm_from.source)


def pictures(count: int) -> np.ndarray:
    """(count, SIZE, SIZE, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def as_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# -- equal to transformers' own -----------------------------------------------------------------------------


def a_document(components: Components) -> tuple[Tensor, Tensor, Tensor]:
    """Images (2, 3, s, s), ids (2, T) with the image after two tokens, M-RoPE positions (3, 2, T)."""
    grid = components.vlm.cfg.image_grid
    count = grid[0] * grid[1]
    head = torch.tensor([[SPECIAL.user, SPECIAL.vision_start], [SPECIAL.user, SPECIAL.vision_start]])
    image, end = torch.full((2, count), SPECIAL.image_pad), torch.full((2, 1), SPECIAL.vision_end)
    ids = torch.cat([head, image, end, torch.randint(6, 300, (2, 9))], 1)
    picture, after = image_mrope(grid, 2)
    behind = text_mrope(1, ids.shape[1] - 2 - count, after)[:, 0]
    positions = torch.cat([text_mrope(1, 2)[:, 0], picture, behind], 1)
    return as_images(pictures(2)), ids, positions[:, None].expand(-1, 2, -1)


def our_embeds(components: Components, images: Tensor, ids: Tensor) -> Tensor:
    embeds = components.vlm.embed(ids)
    embeds[ids == SPECIAL.image_pad] = components.vlm.see(images).flatten(0, 1)
    return embeds


@pytest.mark.parametrize("sha256", ["x", "F" * 64, "f" * 63, "\n"])
def test_a_fingerprint_that_is_none_is_refused(sha256):
    with pytest.raises(ConfigError, match=r"sha256 is .*; expected 64 hexadecimal digits"):
        Pretrained(source="x", sha256=sha256)


@torch.no_grad()
def test_states_of_words_and_an_image_equal_those_of_the_folder_loaded_by_transformers(upstream, components):
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(upstream[0] / "vlm", dtype=torch.float32).eval()
    images, ids, positions = a_document(components)
    processor = Qwen2VLImageProcessorPil(do_resize=False, patch_size=14)  # with the mean and deviation it comes with
    patches = processor(list(pictures(2)), return_tensors="pt")
    types = (ids == SPECIAL.image_pad).int()
    out = loaded.model(
        input_ids=ids,
        pixel_values=patches["pixel_values"],
        image_grid_thw=patches["image_grid_thw"],
        mm_token_type_ids=types,
    )
    ours = components.vlm.states(our_embeds(components, images, ids), positions)
    assert (ours - out.last_hidden_state).abs().max() <= 1e-5
    bound = 1e-5 * loaded.lm_head.weight.abs().sum(1).max()  # a logit adds up what the states are apart by
    assert (components.vlm.logits(ours) - loaded.lm_head(out.last_hidden_state)).abs().max() <= bound


@torch.no_grad()
def test_one_dimensional_positions_would_give_other_states(components):
    images, ids, positions = a_document(components)
    embeds = our_embeds(components, images, ids)
    flat = components.vlm.states(embeds, text_mrope(*ids.shape))
    assert (components.vlm.states(embeds, positions) - flat).abs().max() > 1e-2


@torch.no_grad()
def test_steps_through_the_cache_equal_the_full_pass(components):
    images, ids, positions = a_document(components)
    embeds, cache = our_embeds(components, images, ids), components.vlm.new_cache()
    full = components.vlm.states(embeds, positions)
    steps = [components.vlm.states(embeds[:, i : i + 1], positions[..., i : i + 1], cache) for i in range(ids.shape[1])]
    assert (torch.cat(steps, 1) - full).abs().max() <= 1e-5


@torch.no_grad()
def test_features_equal_those_of_the_folder_loaded_by_transformers(upstream, components):
    theirs = Dinov2Model.from_pretrained(upstream[0] / "dino", dtype=torch.float32).eval()
    images = as_images(pictures(2))
    small = torch.nn.functional.interpolate(images, (56, 56), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    states = theirs(((small + 1) / 2 - mean) / std).last_hidden_state
    feats = components.features.features(images)
    assert feats.shape == (2, 16, 64) and theirs.embeddings.position_embeddings.shape[1] == 1 + 6 * 6
    assert (feats - states[:, 1:]).abs().max() <= 1e-5


@torch.no_grad()
def test_the_vision_half_of_a_whole_siglip_gives_its_own_patch_states(tmp_path):
    cfg = smoke(paper_siglip()).model.features
    assert isinstance(cfg, SiglipConfig)
    ours = SiglipFeatures(cfg)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = wake(SiglipModel(HfSiglipConfig(vision_config=ours.model.config.to_dict(), text_config=text)), 0.2).eval()
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    ours.check_settings(tmp_path)
    ours.load(tmp_path)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    theirs = whole.vision_model(images).last_hidden_state
    assert ours.features(images).shape == (2, 16, 64)
    assert (ours.features(images) - theirs).abs().max() <= 1e-5
    with pytest.raises(ConfigError, match="hidden patches"):
        ours.features(images, torch.zeros(2, 16, dtype=torch.bool))


@torch.no_grad()
def test_weights_in_bfloat16_give_states_and_losses_in_float32(upstream):
    cfg = upstream[1]
    refs = {f"{name}_from": replace(ref, precision="bfloat16") for name, ref in cfg.references.items()}
    components = start_components(replace(cfg, **refs))
    assert components.vlm.dtype == components.features.dtype == torch.bfloat16
    turns = components.vlm.model.model.language_model.turns(text_mrope(1, 2))
    assert turns.dtype == torch.complex64 and turns[0, 1, 0, 0].real == torch.tensor(1.0).cos()
    tokenizer = components.tokenizer
    batch = pack([tokenizer.document([Turn(("two cats",), (as_images(pictures(1))[0],))])], components.layout)  # type: ignore[arg-type]
    x = torch.randn(1, 16, 8)
    out = read_documents(components.pretzel, batch, x, torch.full((1,), 0.3))
    assert out.log_prob.dtype == torch.float32 and bool(out.log_prob.isfinite().all())
    assert components.codec.encode(as_images(pictures(1))).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own account of memory")
def test_weights_in_the_format_they_are_held_in_are_not_copied_into_memory(tmp_path):
    def anonymous() -> int:
        """Bytes of memory that no file backs."""
        (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    cfg = DinoConfig(image_size=56, patch_size=14, width=512, depth=6, heads=8, swiglu=True)
    theirs(DinoFeatures(cfg)).save_pretrained(tmp_path, max_shard_size="20MB")
    size = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    with torch.device("meta"):
        dino = DinoFeatures(cfg)
    before = anonymous()
    dino.load(tmp_path)
    assert size > 60e6 and anonymous() - before < size / 4
    assert dino.features(torch.zeros(1, 3, 56, 56)).isfinite().all()


# -- referred to, not copied -------------------------------------------------------------------------------------


def test_a_saved_model_holds_fingerprints_in_place_of_the_weights_and_comes_back_whole(components, upstream, tmp_path):
    folder = save_components(components, tmp_path / "model")
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "lexicon.txt"}
    config = json.loads((folder / "config.json").read_text())
    assert config["fingerprints"] == {
        "vlm": fingerprint(upstream[0] / "vlm"),
        "features": fingerprint(upstream[0] / "dino"),
    }
    again = load_components(folder)
    assert again.cfg == components.cfg
    old, new = components.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    buffers = dict(components.named_buffers())
    assert all(torch.equal(b, buffers[k]) for k, b in again.named_buffers())


def test_a_model_whose_pretrained_weights_changed_is_refused_with_both_fingerprints(copy, tmp_path):
    folder = save_components(start_components(copy), tmp_path / "model")
    before = fingerprint(vlm_folder(copy))
    spoil(vlm_folder(copy), lambda tensors: tensors[next(iter(tensors))].add_(1))
    after = fingerprint(vlm_folder(copy))
    with pytest.raises(CheckpointError) as error:
        load_components(folder)
    assert before in str(error.value) and after in str(error.value) and before != after


def test_a_config_may_ask_for_a_fingerprint(copy):
    assert copy.vlm_from is not None
    with pytest.raises(CheckpointError, match="f" * 64):
        start_components(replace(copy, vlm_from=replace(copy.vlm_from, sha256="f" * 64)))
    start_components(replace(copy, vlm_from=replace(copy.vlm_from, sha256=fingerprint(vlm_folder(copy)))))


def test_weights_that_moved_are_found_through_a_link_in_the_model_folder_and_the_link_survives_a_save(copy, tmp_path):
    components = start_components(copy)
    folder = save_components(components, tmp_path / "model")
    vlm_folder(copy).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is not a folder here"):
        load_components(folder)
    (folder / "vlm").symlink_to(tmp_path / "elsewhere")
    load_components(save_components(load_components(folder), folder))
    assert (folder / "vlm").is_symlink() and not (folder / "features").exists()


def test_a_fingerprint_does_not_depend_on_shards_and_tells_fine_tunings_apart(upstream, components, tmp_path):
    components.vlm.save(tmp_path / "one")
    assert not (tmp_path / "one" / INDEX).exists() and (upstream[0] / "vlm" / INDEX).exists()
    assert len({e.file for e in inventory(upstream[0] / "vlm").values()}) > 3
    assert fingerprint(tmp_path / "one") == fingerprint(upstream[0] / "vlm")
    spoil(tmp_path / "one", lambda tensors: tensors[sorted(tensors)[-1]].view(-1)[-1:].add_(0.1))
    assert fingerprint(tmp_path / "one") != fingerprint(upstream[0] / "vlm")


def test_a_model_of_its_own_parts_only_does_not_start_from_pretrained_ones():
    with pytest.raises(ConfigError, match="vlm_from"):
        start_components(nano_model())


# -- what is refused ---------------------------------------------------------------------------------------------


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's first file."""
    path = min(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def in_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def cut_a_shard(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def put_a_stranger_into_a_shard(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.update(stranger=torch.zeros(3)))


def put_a_stranger_everywhere(folder: Path) -> None:
    put_a_stranger_into_a_shard(folder)
    first = min(folder.glob("*.safetensors")).name
    in_index(folder, lambda names: names.update(stranger=first))


def lose_a_tensor(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    name = sorted(load_file(path))[0]
    spoil(folder, lambda tensors: tensors.pop(name))
    in_index(folder, lambda names: names.pop(name))


def lose_a_tensor_of_the_index(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.pop(sorted(tensors)[0]))


def change_a_shape(folder: Path) -> None:
    spoil(folder, lambda tensors: tensors.update({sorted(tensors)[0]: torch.zeros(7, 7)}))


def leave_only_a_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def lead_out_of_the_folder(folder: Path) -> None:
    in_index(folder, lambda names: names.update({next(iter(names)): "../model.safetensors"}))


def turn_faster(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 1234.0
    (folder / "config.json").write_text(json.dumps(config))


def spoil_a_value(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        middle = max(tensors.values(), key=Tensor.numel).view(-1)
        middle[len(middle) // 2] = torch.nan  # between the bytes that enter the fingerprint

    spoil(folder, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil_a_value, "cannot load vlm from .* holds NaN or infinity"),
        (lose_a_shard, "lacks 1 of its .* shards: model-0"),
        (cut_a_shard, "truncated"),
        (put_a_stranger_into_a_shard, "has stranger, which is not in its index"),
        (put_a_stranger_everywhere, "unexpected keys .'stranger'"),
        (lose_a_tensor, "missing keys"),
        (lose_a_tensor_of_the_index, "has no such tensor"),
        (change_a_shape, "cannot load"),
        (leave_only_a_pickle, "pytorch_model.bin is a pickle, which is never opened"),
        (lead_out_of_the_folder, "is not an index"),
        (turn_faster, r"rope_theta is 1234\.0"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_folder_that_is_broken_or_of_another_model_is_refused_by_name(copy, change, message):
    change(vlm_folder(copy))
    with pytest.raises(CheckpointError, match=message) as error:
        start_components(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["nobody/has-this-model", "not a name", "/nowhere/at/all"])
def test_a_source_that_is_neither_a_folder_nor_on_the_hub_is_named_with_a_remedy(source):
    with pytest.raises(CheckpointError, match="give its folder as the source") as error:
        locate(Pretrained(source=source))
    assert source in str(error.value)


def test_a_source_in_the_hubs_cache_is_found_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "a" * 40
    snapshot = tmp_path / "models--someone--model" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert locate(Pretrained(source="someone/model", revision=revision)).samefile(snapshot)
