"""Model folders: bit-equal on the way back, refused in one line when they are not whole, never half-written."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model_cases import STAGES, tiny_components, tiny_model, tiny_tokenizer
from starflow2.errors import CheckpointError, ConfigError, StarFlowError
from starflow2.inference.config import DrawConfig
from starflow2.models import checkpoint
from starflow2.models.checkpoint import load_components, read_config, save_components
from starflow2.models.components import Components
from starflow2.models.config_file import FORMAT
from starflow2.models.hub import NANO, SHIPPED, find_model
from starflow2.pipeline import StarFlow2
from starflow2.training.datasets import to_images
from starflow2.world.captions import caption_task

FILES = ("model.safetensors", "vlm/model.safetensors", "features/model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_components(tiny_components(), tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_model_is_found_by_its_name_and_checks_its_images(name: str) -> None:
    model = read_config(find_model(name)).model
    assert model.name == name and model.self_check is not None and model.self_check.tries == 4
    assert model.far_nats is not None


@pytest.mark.parametrize("name", SHIPPED)
def test_where_only_the_code_is_installed_the_package_of_weights_is_named(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("starflow2.models.hub.NANO", tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"the weights of {name} are a package of their own: pip install"):
        find_model(name)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None takes one away."""
    path = folder / "config.json"
    new = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in new.items() if value is not None or key == "stages"}))


def refusal(folder: Path, error: type[Exception] = CheckpointError) -> str:
    """The message with which a folder is refused: one line, and of ours."""
    with pytest.raises(error) as caught:
        load_components(folder)
    assert isinstance(caught.value, StarFlowError)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1200
    return message


# -- there and back


def test_a_model_comes_back_bit_for_bit_with_everything_beside_its_weights(saved):
    before, after = tiny_components(), load_components(saved)
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    assert (after.cfg, after.finished_stages, after.vocabulary) == (
        before.cfg,
        before.finished_stages,
        before.vocabulary,
    )
    assert after.tokenizer.encode("two red hearts") == before.tokenizer.encode("two red hearts")
    buffers = dict(before.named_buffers())
    assert all(torch.equal(b, buffers[k]) for k, b in after.named_buffers())
    assert not any(module.training for module in after.modules())


def test_a_loaded_model_draws_and_encodes_the_same_bits(saved):
    before, after = tiny_components(), load_components(saved)
    ask = (["two red hearts", "a blue star"], [0, 1], DrawConfig(guidance=1.0))
    assert torch.equal(StarFlow2(before).draw(*ask), StarFlow2(after).draw(*ask))
    images = to_images([caption_task(0, 0).scene])
    assert torch.equal(before.codec.encode(images), after.codec.encode(images))


def test_saving_what_was_loaded_writes_the_same_bytes_but_for_transformers_own_notes(saved, tmp_path):
    again, first = content(save_components(load_components(saved), tmp_path / "again")), content(saved)
    assert again.keys() == first.keys()
    assert [name for name in first if again[name] != first[name]] in ([], ["vlm/config.json"])


def test_loading_leaves_the_weights_of_a_file_that_no_later_save_can_reach(saved, folder):
    components = load_components(folder)
    before = {k: v.clone() for k, v in components.state_dict().items()}
    save_components(tiny_components(scale=0.2), folder)
    assert all(torch.equal(v, before[k]) for k, v in components.state_dict().items())


# -- what is refused


def test_a_folder_that_is_not_there_or_is_something_else_is_refused(tmp_path):
    assert "no config.json" in refusal(tmp_path / "nothing")
    (tmp_path / "file").write_text("hello")
    assert "no config.json" in refusal(tmp_path / "file")


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.6, 0.001, 0.0])
def test_truncated_weights_are_refused(folder, name, keep):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert name.split("/")[0] in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_under_the_name_of_safetensors_is_never_opened(folder, name):
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (folder / "exploded",))

    (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert name.split("/")[0] in refusal(folder)
    torch.save({"weights": torch.zeros(3)}, folder / name)
    refusal(folder)
    assert not (folder / "exploded").exists()


def test_a_pickle_beside_missing_safetensors_is_not_used_in_their_place(folder):
    for name in ("vlm", "features"):
        tensors = load_file(folder / name / "model.safetensors")
        torch.save(tensors, folder / name / "pytorch_model.bin")
        (folder / name / "model.safetensors").unlink()
        assert "model.safetensors" in refusal(folder)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    load_components(folder)


@pytest.mark.parametrize("name", FILES)
def test_foreign_safetensors_are_refused_with_the_names_that_do_not_fit(folder, name):
    save_file({"some.weight": torch.zeros(3, 3)}, folder / name, metadata={"format": "pt"})
    message = refusal(folder)
    assert "some.weight" in message and name.split("/")[0] in message


@pytest.mark.parametrize("name", FILES)
def test_one_missing_tensor_is_an_error_and_never_random_weights(folder, name):
    tensors = load_file(folder / name)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, folder / name, metadata={"format": "pt"})
    assert gone.split(".")[-2] in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_tensor_of_another_shape_is_an_error(folder, name):
    tensors = load_file(folder / name)
    gone = next(k for k in sorted(tensors) if tensors[k].ndim == 2)
    tensors[gone] = tensors[gone][:-1].contiguous()
    save_file(tensors, folder / name, metadata={"format": "pt"})
    assert name.split("/")[0] in refusal(folder)


def test_a_backbone_of_another_size_is_refused_although_its_own_config_fits_its_weights(folder, tmp_path):
    from dataclasses import replace

    from starflow2.models.vision import DinoFeatures

    DinoFeatures(replace(tiny_model().features, width=60, heads=3)).save(tmp_path / "other")
    shutil.rmtree(folder / "features")
    shutil.copytree(tmp_path / "other", folder / "features")
    assert "features" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    ['{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}', "[1, 2]", "not json", "", "\x00\x01\ufffd"],
    ids=["transformers", "list", "text", "empty", "binary"],
)
def test_a_foreign_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_a_config_of_another_encoding_is_refused(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x9d")
    assert "config.json" in refusal(folder)


def test_a_newer_format_is_refused_with_both_numbers(folder):
    edit(folder, format=FORMAT + 1)
    message = refusal(folder)
    assert str(FORMAT + 1) in message and str(FORMAT) in message


@pytest.mark.parametrize("stages", ["t2i", None, [1], {"t2i": True}])
def test_stages_that_are_no_list_of_names_are_refused(folder, stages):
    edit(folder, stages=stages)
    assert "stages" in refusal(folder)


def test_an_unknown_config_key_is_refused_with_the_nearest_name(folder):
    model = json.loads((folder / "config.json").read_text())["model"]
    edit(folder, model={**model, "guidence": model.pop("guidance")})
    message = refusal(folder, ConfigError)
    assert "guidence" in message and 'Did you mean "guidance"?' in message


def test_a_config_that_leaves_a_key_out_is_refused(folder):
    model = json.loads((folder / "config.json").read_text())["model"]
    del model["flow"]["deep"]["clip"]
    edit(folder, model=model)
    assert "flow.deep.clip: missing" in refusal(folder, ConfigError)


def test_a_config_that_does_not_fit_the_weights_is_refused(folder):
    model = json.loads((folder / "config.json").read_text())["model"]
    model["fae"]["pixel_channels"] = [12, 8, 8]
    edit(folder, model=model)
    assert "pixel_decoder" in refusal(folder)


@pytest.mark.parametrize("text", ["{", '{"version": "1.0"}', ""])
def test_a_broken_tokenizer_is_refused(folder, text):
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in refusal(folder)


def test_a_tokenizer_whose_special_tokens_are_missing_is_refused(folder):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    assert "tokenizer.json" in refusal(folder)


# -- joints, and models from before there were any


def without_joints(folder: Path, stages: tuple[str, ...] = STAGES[:4], number: int = 1, left: int = 0) -> None:
    """Make a folder what format 1 was: no joints in config and weights, but for the first `left` tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in sorted(k for k in tensors if k.startswith("joints."))[left:]:
        del tensors[name]
    enter, deep = "flow.deep.context_in.weight", tiny_model().flow.deep
    tensors[enter] = tensors[enter][:, : deep.context_dim // 2].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    model = json.loads((folder / "config.json").read_text())["model"]
    model["flow"]["deep"]["context_dim"] = deep.context_dim // 2  # states alone
    if number == 1:
        del model["joints"], model["max_positions"]
    if number == 2:
        del model["joints"]["words"]
        model["joints"]["reference"] = True
    edit(folder, format=number, stages=list(stages), model=model, digests=None)  # of which older folders have none


def test_a_folder_says_its_format_and_holds_the_joints(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == FORMAT == 9 and config["model"]["joints"]["adapter_width"] == 192
    names = {k for k in load_file(saved / "model.safetensors") if k.startswith("joints.")}
    assert names == {f"joints.{k}" for k in tiny_components().joints.state_dict()} and len(names) > 8


def test_a_folder_from_before_there_were_families_holds_a_qwen25(folder):
    model = json.loads((folder / "config.json").read_text())["model"]
    for name in ("stream", "head_dim", "vision_deepstack"):
        del model["vlm"][name]
    edit(folder, format=6, model=model)
    assert load_components(folder).cfg == tiny_components().cfg


def test_a_joint_model_comes_back_with_woken_joints(tmp_path):
    before = tiny_components(STAGES)
    after = load_components(save_components(before, tmp_path / "model"))
    assert after.finished_stages == STAGES and before.joints.text_skip.weight.any()
    old, new = before.joints.state_dict(), after.joints.state_dict()
    assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("number", [1, 2])
def test_a_model_from_before_there_were_joints_gets_fresh_ones_the_same_every_time(folder, number):
    without_joints(folder, number=number)
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded.append(load_components(folder))
    one, other = (components.joints.state_dict() for components in loaded)
    assert all(torch.equal(one[k], other[k]) and bool(one[k].isfinite().all()) for k in one)
    for skip in (loaded[0].joints.visual_skip, loaded[0].joints.text_skip, loaded[0].joints.reference):
        assert not skip.weight.any(), "nothing of what it could do before may change"
    assert one["adapter.mlp.0.weight"].std() > 0.01
    then, now = loaded[0], tiny_components()
    assert then.cfg.fae == now.cfg.fae and then.cfg.joints == replace(now.cfg.joints, words=False, reference=1)
    assert torch.equal(then.flow.deep.head.weight, now.flow.deep.head.weight)


def test_a_model_from_before_guidance_had_a_course_is_guided_constantly(tmp_path):
    before = Components(replace(tiny_model(), guidance_schedule="linear", edit_guidance=0.5), tiny_tokenizer())
    folder = save_components(before, tmp_path / "model")
    assert load_components(folder).cfg == before.cfg
    model = json.loads((folder / "config.json").read_text())["model"]
    del model["guidance_schedule"], model["edit_guidance"]
    edit(folder, format=5, model=model)
    assert load_components(folder).cfg == replace(before.cfg, guidance_schedule="constant", edit_guidance=None)


@pytest.mark.parametrize("reads", [True, False])
def test_a_model_from_before_the_window_reads_the_same_place_or_nothing(tmp_path, reads):
    cfg = tiny_model()
    before = Components(replace(cfg, joints=replace(cfg.joints, reference=int(reads))), tiny_tokenizer())
    folder = save_components(before, tmp_path / "model")
    model = json.loads((folder / "config.json").read_text())["model"]
    model["joints"]["reference"] = reads
    edit(folder, format=4, model=model)
    after = load_components(folder)
    assert after.cfg == before.cfg and hasattr(after.joints, "reference") == reads
    if reads:
        assert torch.equal(after.joints.reference.weight, before.joints.reference.weight)


def test_the_shipped_model_is_joint_and_keeps_every_value_when_it_is_saved_again(tmp_path):
    config = json.loads((NANO / "config.json").read_text())
    assert config["format"] == FORMAT and tuple(config["stages"]) == (*STAGES, "end", "final")
    assert any(name.startswith("joints.") for name in load_file(NANO / "model.safetensors"))
    assert_kept(load_components(NANO), tmp_path)


def test_a_model_of_stage_1_without_joints_gets_fresh_ones_that_are_saved(folder, tmp_path):
    path = folder / "model.safetensors"
    bare = {k: v for k, v in load_file(path).items() if not k.startswith("joints.")}
    save_file(bare, path, metadata={"format": "pt"})
    edit(folder, stages=list(STAGES[:4]), digests=None)
    assert_kept(load_components(folder), tmp_path)


def assert_kept(before: Components, tmp_path: Path) -> None:
    old, new = before.state_dict(), load_components(save_components(before, tmp_path / "again")).state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("stages", [STAGES[:5], STAGES], ids=["adapter", "joint"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_model_that_claims_trained_joints_and_has_none_is_refused(folder, stages, number):
    without_joints(folder, stages, number)
    assert "joints." in refusal(folder)


@pytest.mark.parametrize("left", [1, 5])
@pytest.mark.parametrize("number", [1, 2])
def test_joints_that_are_there_in_part_are_refused_and_never_filled_up(folder, number, left):
    without_joints(folder, number=number, left=left)
    message = refusal(folder)
    assert "missing" in message and "joints." in message


@pytest.mark.parametrize("model", [[1], "nano", None], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_a_config_whose_model_is_no_set_of_keys_is_refused(folder, number, model):
    edit(folder, format=number, model=model)
    refusal(folder, StarFlowError)


# -- saving


def test_saving_replaces_an_older_model_and_keeps_what_others_put_beside_it(folder):
    (folder / "README.md").write_text("a card")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    save_components(tiny_components(scale=0.2), folder)
    assert torch.equal(load_components(folder).flow.deep.head.weight, tiny_components(scale=0.2).flow.deep.head.weight)
    assert (folder / "README.md").read_text() == "a card" and (folder / "notes" / "a.txt").read_text() == "kept"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_saving_never_takes_the_place_of_a_folder_or_file_that_is_no_model(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("hello")
    for name in ("thesis", "file"):
        with pytest.raises(CheckpointError, match=name):
            save_components(tiny_components(), tmp_path / name)
    assert content(tmp_path) == {"file": b"hello", "thesis/chapter.tex": b"years of work"}


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/model"):
        load_components(save_components(tiny_components(), tmp_path / name))


FAILURES = {
    "safetensors' own": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "the system's": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("failure", FILES)
@pytest.mark.parametrize("error", FAILURES.values(), ids=list(FAILURES))
def test_a_disk_that_fills_up_while_saving_leaves_the_old_model_and_no_rubbish(folder, monkeypatch, failure, error):
    before = content(folder)

    def full(tensors: object, path: object, *args: object, **kwargs: object) -> None:
        if str(path).endswith(f"{failure.split('/')[0]}") or failure.split("/")[0] in str(path):
            Path(path).write_bytes(b"half of it")
            raise error
        save_file(tensors, path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr("starflow2.models.own_backbone.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot save to .*No space left.*untouched"):
        save_components(tiny_components(scale=0.2), folder)
    assert content(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_last_step_that_fails_leaves_the_old_model(folder, monkeypatch):
    before, rename = content(folder), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="untouched"):
        save_components(tiny_components(scale=0.2), folder)
    assert content(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot save to"):
        save_components(tiny_components(), tmp_path / "file" / "model")


def test_components_without_a_tokenizer_are_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer"):
        save_components(Components(tiny_model()), tmp_path / "model")
    assert not (tmp_path / "model").exists()
