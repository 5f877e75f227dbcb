"""Where the weights of a run in shards are: cut straight from their files, whole nowhere, in their own format."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from placing_program import write_run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own account of memory"),
]
FROZEN = ("sharded", "replicated")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two steps of stage 3 by two processes, with the language model in shards and without."""
    base = tmp_path_factory.mktemp("placing")
    write_run(base / "start", base / "upstream")
    for frozen in FROZEN:
        shutil.copytree(base / "start", base / frozen, copy_function=os.link)  # a run replaces files and changes none
    program = Path(__file__).parents[1] / "placing_program.py"
    subprocess.run([sys.executable, str(program), str(base), *FROZEN], check=True)
    yield base
    shutil.rmtree(base)  # half a gigabyte


def found(base: Path, frozen: str) -> list[dict[str, Any]]:
    return [json.loads((base / frozen / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("frozen", FROZEN)
def test_every_process_begins_with_the_values_that_the_files_hold(base, frozen):
    assert [f["wrong"] for f in found(base, frozen)] == [[], []]


def test_no_process_ever_holds_all_of_what_is_cut(base):
    """130 MB of layers: each keeps half of them, for a moment one whole layer, and all that is not cut.

    85 MB in all; where the flow is loaded before it is cut, 118.
    """
    for process in found(base, "sharded"):
        assert process["whole"] > 120e6 and process["here"] == process["whole"] // 2
        assert process["here"] < process["peak"] < 0.75 * process["whole"]


def test_a_frozen_language_model_stays_in_bfloat16_beside_float32_masters(base):
    for frozen, placed in zip(FROZEN, ("cut", "whole"), strict=True):
        assert [f["dtypes"] for f in found(base, frozen)] == 2 * [["flow float32 cut", f"vlm bfloat16 {placed}"]]


def test_a_language_model_in_shards_gives_the_losses_of_a_whole_one(base):
    def losses(frozen: str) -> list[list[float]]:
        lines = (base / frozen / "metrics-joint.jsonl").read_text().splitlines()
        return [[json.loads(line)[k] for k in ("loss", "flow", "text")] for line in lines]

    assert len(losses("sharded")) == 2 and losses("sharded")[0] != losses("sharded")[1]
    assert losses("sharded") == losses("replicated")
