"""Counts of `starflow2 info` against the real things: modules, files and caches."""

from __future__ import annotations

import pytest
import torch

from model_cases import tiny_folder, tiny_model
from starflow2.errors import CheckpointError, ConfigError
from starflow2.models.components import build
from starflow2.models.joint_stream import PretzelCache, Slots
from starflow2.models.sequence import text_mrope
from starflow2.models.summary import describe
from starflow2.nn import Cache
from starflow2.training.recipes import find_config


def test_every_parameter_is_counted_once_and_in_one_component():
    counts = describe(tiny_model()).parameters
    components = build(tiny_model())
    assert counts.total == sum(p.numel() for p in components.parameters()) == sum(counts.by_component.values())
    trained = [*components.flow.parameters(), *components.joints.parameters()]
    assert counts.trainable == sum(p.numel() for p in trained)
    assert counts.by_component["adapter"] == sum(p.numel() for p in components.joints.adapter.parameters())
    assert counts.by_component["features"] == sum(p.numel() for p in components.features.parameters())


def test_bytes_follow_from_the_number_format():
    summary = describe(tiny_model())
    total = summary.parameters.total
    assert summary.bytes == {"float32": 4 * total, "bfloat16": 2 * total}


def test_a_position_costs_what_the_real_caches_grow_by():
    cfg = tiny_model()
    components, count = build(cfg), 5
    cost = describe(cfg).kv_bytes_per_token

    cache = PretzelCache(*(Cache(depth, capacity=count) for depth in (cfg.vlm.depth, cfg.flow.deep.stack.depth)))
    ids, places = torch.zeros(1, count, dtype=torch.long), torch.zeros(1, count, 3)
    components.pretzel.read(Slots(ids, text_mrope(1, count), places), cache)
    assert cache.flow.nbytes == count * cost["flow"]["float32"]
    assert cache.vlm.nbytes == count * cost["language"]["float32"]
    assert cache.nbytes == cache.flow.nbytes + cache.vlm.nbytes and cache.length == count


def test_a_recipe_a_function_and_a_folder_name_the_same_model(tmp_path):
    folder = tiny_folder(tmp_path) / "model"
    assert find_config(str(folder)) == find_config("model_cases:tiny_run") == tiny_model()
    assert find_config("nano").name == "nano"


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='Did you mean "nano"'):
        find_config("nanoo")
    with pytest.raises(CheckpointError, match="no config"):
        find_config(str(tmp_path))
