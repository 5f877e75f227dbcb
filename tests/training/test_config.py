"""Settings of a run: no field takes what is no number, out of range or of another type."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from starflow2.errors import ConfigError
from starflow2.training.config import (
    CaptionConfig,
    CorpusConfig,
    MixConfig,
    OptimConfig,
    ShardConfig,
    StageConfig,
    WarmupMixConfig,
)
from starflow2.training.finetune import FinetuneConfig

MADE: tuple[Any, ...] = (
    OptimConfig(), CaptionConfig(), MixConfig(), WarmupMixConfig(), ShardConfig(), CorpusConfig(), FinetuneConfig(),
    StageConfig(name="joint", steps=1, batch=1),
)  # fmt: skip
FIELDS = [(made, field.name) for made in MADE for field in dataclasses.fields(made)]


@pytest.mark.parametrize(("made", "name"), FIELDS, ids=[f"{type(made).__name__}.{name}" for made, name in FIELDS])
def test_no_field_takes_a_value_of_another_type_or_out_of_range(made, name):
    usual = getattr(made, name)
    wrong: list[Any] = [object(), [usual], {"a": 1}, b"x"]
    if isinstance(usual, int | float) and not isinstance(usual, bool):
        wrong += [math.nan, math.inf, -1, "1", True, None]
    if type(usual) is int:
        wrong += [1.5]
    for value in wrong:
        if name == "seed" and value == -1:
            continue
        with pytest.raises(ConfigError, match=name if isinstance(value, float) else None):
            dataclasses.replace(made, **{name: value})
