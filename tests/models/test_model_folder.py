"""Model folders under kills, second savers, damage and foreign content: one whole model of ours, or a refusal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crashes import crashes
from model_cases import tiny_components
from starflow2.core.folders import WAITING, replacing_content, whole
from starflow2.errors import CheckpointError, ConfigError
from starflow2.models.checkpoint import load_components, load_words, save_components
from starflow2.models.components import Components
from starflow2.nn import StackConfig
from starflow2.pipeline import StarFlow2
from starflow2.training.recipes import nano_model

MAY_DIFFER = {
    *("guidance", "edit_guidance", "prior_scale", "max_prompt_tokens", "max_positions", "latent_penalty", "clip"),
    *("noise_min", "noise_max", "max_share", "kl_weight", "feature_weight", "edge_weight", "rope_theta"),
}  # numbers of a config that no tensor shows
READERS = ("models/checkpoint.py", "core/files.py")
FILES = ("model.safetensors", "vlm/model.safetensors", "features/model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_components(tiny_components(), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_components(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1200
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of the files that are not hidden."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".") and "/." not in name}


def is_same(one: Components, other: Components) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_save_killed_at_any_operation_leaves_one_whole_model_under_its_name(saved, folder):
    new = tiny_components(scale=0.2)
    contents = [content(folder), content(save_components(new, folder.with_name("new")))]
    assert contents[0] != contents[1]
    seen, loaded = [], []
    for _ in crashes(lambda: save_components(new, folder), {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}):
        seen.append(contents.index(content(whole(folder))))
        if seen[-1] and (not loaded or (folder / WAITING).exists() != loaded[-1][0]):
            loaded.append(((folder / WAITING).exists(), load_components(folder), load_words(folder).cfg))
        if seen[-1]:  # the next save begins with the old model again
            shutil.rmtree(folder)
            shutil.copytree(saved, folder)
    assert len(seen) > 20 and seen == sorted(seen) and set(seen) == {0, 1}
    assert [waiting for waiting, *_ in loaded] == [True, False]
    assert all(is_same(model, new) and cfg == new.cfg for _, model, cfg in loaded)
    assert is_same(load_components(folder), new) and not (folder / WAITING).exists()


def test_who_reads_while_others_save_always_finds_one_whole_model(folder):
    one, other = tiny_components(), tiny_components(scale=0.2)
    child = os.fork()
    if not child:
        for i in range(6):
            save_components((one, other)[i % 2], folder)
            time.sleep(0.1)
        os._exit(0)
    found = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        read = load_components(folder)
        assert is_same(read, one) or is_same(read, other)
        found += 1
    assert found


class At:
    """Does something once while it is entered: when the n-th function of the files that read models is first called."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self.left, self.act, self.known = number, act, set[str]()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_qualname
        if event == "call" and name not in self.known and frame.f_code.co_filename.endswith(READERS):
            self.known.add(name)
            self.left -= 1
            if not self.left:
                self.act()

    def __enter__(self) -> At:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def end_save(folder: Path) -> None:
    """Put a waiting content in place, as the next save does before it writes; that one fails."""
    with contextlib.suppress(ZeroDivisionError), replacing_content(folder, CheckpointError, "saving"):
        raise ZeroDivisionError


@pytest.mark.parametrize("load", [load_components, load_words])
def test_a_save_that_ends_at_any_moment_of_a_reading_is_read_whole(saved, folder, tmp_path, load):
    old = save_components(tiny_components(scale=0.2), tmp_path / "old")
    number, is_over = 0, False
    while not is_over:
        number += 1
        shutil.rmtree(folder)
        shutil.copytree(old, folder)
        shutil.copytree(saved, folder / WAITING)
        with At(number, lambda: end_save(folder)) as ended:
            read = load(folder)
        is_over = ended.left > 0
        assert load is load_words or is_same(read, load_components(saved))
    assert number > 5


@pytest.mark.parametrize("name", ["tokenizer.json", "vlm/model.safetensors"])
def test_a_file_that_vanishes_at_any_moment_of_a_reading_is_refused_by_name(saved, folder, name):
    number, refused, is_over = 0, 0, False
    while not is_over:
        number += 1
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        with At(number, (folder / name).unlink) as vanishing:
            try:
                load_components(folder)
            except CheckpointError as error:
                refused += 1
                assert name.split("/")[0] in str(error)
        is_over = vanishing.left > 0
    assert 2 < refused < number


def test_a_second_saver_is_told_who_saves(folder):
    class Slow:
        """Components whose tokenizer, which is written late, saves a second time."""

        def __init__(self, components: Components) -> None:
            self.components, self.message = components, ""

        def save(self, path: Path) -> None:
            with pytest.raises(CheckpointError) as caught:
                save_components(self.components, folder)
            self.message = str(caught.value)
            tiny_components().tokenizer.save(path)

    components = tiny_components(scale=0.2)
    slow = Slow(tiny_components())
    components._tokenizer = slow  # type: ignore[assignment]
    save_components(components, folder)
    assert f"process {os.getpid()} on" in slow.message and "saving a model" in slow.message
    assert is_same(load_components(folder), components)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(folder, value):
    components = tiny_components()
    with torch.no_grad():
        components.flow.deep.head.bias[0] = value
    with pytest.raises(CheckpointError, match=r"flow\.deep\.head\.bias holds NaN or infinity"):
        save_components(components, folder)
    assert is_same(load_components(folder), tiny_components())
    for name in FILES:
        tensors = load_file(folder / name)
        key = next(k for k in sorted(tensors) if tensors[k].ndim == 2)
        save_file(tensors | {key: tensors[key].clone().fill_(value)}, folder / name, metadata={"format": "pt"})
        assert "NaN" in refusal(folder)
        save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("name", FILES)
def test_weights_in_whole_numbers_are_refused(folder, name):
    tensors = load_file(folder / name)
    key = next(k for k in sorted(tensors) if tensors[k].ndim == 2)
    save_file(tensors | {key: tensors[key].int()}, folder / name, metadata={"format": "pt"})
    assert "expected" in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_weights_is_noticed(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-7] ^= 1
    (folder / name).write_bytes(data)
    assert f"{name} is damaged" in refusal(folder)


def test_a_folder_of_another_library_is_never_replaced(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "format": 1}))
    (tmp_path / "model.safetensors").write_bytes(b"theirs")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for save in (save_components, lambda c, folder: StarFlow2(c).save_pretrained(folder)):
        with pytest.raises(CheckpointError, match="is not a model folder"):
            save(tiny_components(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_every_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        StarFlow2(tiny_components()).save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "model").rglob("*") if p.is_file()]
    assert len(files) > 8 and {p.stat().st_mode & 0o777 for p in files} == {0o640}
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "model").rglob("*") if p.is_dir()} == {0o750}


def test_a_model_can_be_saved_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        StarFlow2(tiny_components()).save_pretrained(".")
        assert Path.cwd() == tmp_path and (tmp_path / "README.md").is_file()
    assert is_same(load_components("."), tiny_components())


def test_words_of_any_alphabet_are_saved_as_utf_8(tmp_path):
    components = tiny_components()
    components.vocabulary = frozenset({"würfel", "心"})
    folder = save_components(components, tmp_path / "model")
    assert (folder / "lexicon.txt").read_bytes().split() == sorted(["würfel".encode(), "心".encode()])
    assert load_components(folder).vocabulary == components.vocabulary
    (folder / "lexicon.txt").write_bytes(b"\xff\xfe")
    assert "lexicon.txt" in refusal(folder)


def test_a_save_that_an_earlier_version_was_killed_in_is_pointed_to(folder):
    folder.rename(folder.with_name(".model.old"))
    assert ".model.old" in refusal(folder)


CONFIGS = ('{"format": ' + "[" * 100_000, '{"format": 6, "format": 6}', '{"format": NaN}', '{"format": true}')


@pytest.mark.parametrize("text", CONFIGS, ids=["nested", "doubled", "nan", "cut off"])
def test_a_config_that_is_no_json_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", True), ("format", "6"), ("format", 6.0), ("extra", 1), ("digests", [1]), ("fingerprints", {"vlm": 1})],
)
def test_keys_of_a_config_that_are_of_another_kind_are_refused(folder, key, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert key in refusal(folder)


def numbers(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all numbers in a config."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if type(value) in (int, float):
            yield (*path, key)
        yield from numbers(value, (*path, key))


@pytest.mark.parametrize("value", [-1, 0, 10**11, 3], ids=str)
def test_a_config_with_a_number_that_cannot_be_is_refused_before_anything_is_built(folder, value):
    """Only changes that show in no tensor and may be so are taken: settings of sampling and of losses."""
    path = folder / "config.json"
    whole_config = json.loads(path.read_text())
    taken, other = set(), []
    for place in numbers(whole_config["model"]):
        config = json.loads(json.dumps(whole_config))
        parent = config["model"]
        for step in place[:-1]:
            parent = parent[step]
        if parent[place[-1]] == value:
            continue
        parent[place[-1]] = value
        path.write_text(json.dumps(config))
        try:
            load_components(folder)
            taken.add(place[-1])
        except (CheckpointError, ConfigError) as error:
            assert str(error).isprintable(), place
        except Exception as error:
            other.append((place, error))
    assert not other and taken <= MAY_DIFFER, (other, taken - MAY_DIFFER)


def test_layers_are_counted_before_one_is_built():
    with pytest.raises(ConfigError, match=r"depth is 5,?000; expected at least 0 and at most 4,?096"):
        StackConfig(width=8, depth=5000)
    with pytest.raises(ConfigError, match="mlp_ratio is 100000000000; expected"):
        StackConfig(width=8, depth=1, mlp_ratio=10**11)


def test_special_tokens_lie_within_the_vocabulary():
    vlm = nano_model().vlm
    with pytest.raises(ConfigError, match="special has the id 512; expected ids below vocab, which is 512"):
        replace(vlm, special=replace(vlm.special, end=512))


def test_a_folder_does_not_decide_what_is_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for stream in ("theirs:Stream", "antigravity:Stream", "subprocess:Popen", "starflow2.models.qwen:patchify", "x"):
        config["model"]["vlm"]["stream"] = stream
        path.write_text(json.dumps(config))
        assert stream in refusal(folder)
    assert "theirs" not in sys.modules and "antigravity" not in sys.modules


def test_a_config_of_an_older_format_that_does_not_fit_it_is_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"]["joints"]["reference"] = "x"
    path.write_text(json.dumps(config | {"format": 4}))
    assert "format" in refusal(folder)


def test_a_folder_in_the_place_of_a_file_is_a_refusal_and_no_traceback(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "config.json" in refusal(folder)
