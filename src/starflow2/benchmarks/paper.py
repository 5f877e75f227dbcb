"""Numbers that the paper prints, by benchmark and column, in the units of its tables (256 x 256, version 1).

The text of the paper says 84.14 for DPG-Bench and both of its tables 84.94; the tables are quoted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["FROZEN", "OURS", "PAPER", "PaperRow"]


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row of one of the paper's tables."""

    name: str
    columns: Mapping[str, float]


def _row(name: str, columns: str, values: str) -> PaperRow:
    return PaperRow(name, MappingProxyType(dict(zip(columns.split(), map(float, values.split()), strict=True))))


_GENEVAL: Final = "single_object two_object counting colors position color_attr overall"
_DPG: Final = "global entity attribute relation other overall"
OURS, FROZEN = "paper, STARFlow2", "paper, Qwen2.5-VL-7B frozen"

PAPER: Final[Mapping[str, tuple[PaperRow, ...]]] = MappingProxyType(
    {
        "geneval": (
            _row(OURS, _GENEVAL, ".99 .89 .84 .80 .86 .56 .82"),
            _row("paper, stage 1", "overall", ".51"),
        ),
        "dpg": (
            _row(OURS, _DPG, "91.45 91.83 88.91 91.09 88.61 84.94"),
            _row("paper, stage 1", "overall", "82.02"),
        ),
        "mme": (
            _row(OURS, "perception", "1528.8"),
            _row(FROZEN, "perception", "1677.9"),
            _row("paper, MoT with a finetuned language model", "perception", "800"),
        ),
        "gqa": (_row(OURS, "accuracy", "55.8"), _row(FROZEN, "accuracy", "60.7")),
        "seed": (_row(OURS, "accuracy", "71.1"), _row(FROZEN, "accuracy", "75.5")),
        "mmbench": (_row(OURS, "accuracy", "71.5"), _row(FROZEN, "accuracy", "83.8")),
        "mmmu": (_row(OURS, "accuracy", "44.7"), _row(FROZEN, "accuracy", "50.6")),
        "ai2d": (_row(OURS, "accuracy", "67.7"), _row(FROZEN, "accuracy", "82.3")),
    }
)
