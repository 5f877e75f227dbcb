"""Clients on docs/serving.md: each block is run against a server of nano, and what it draws is judged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed; it comes with the serve extra")
pytest.importorskip("openai", reason="openai is not installed; it comes with the dev extra")

from serving_cases import Live
from starflow2.core.images import read_picture, to_pil
from starflow2.evals.examples import faults_of
from starflow2.world.captions import GenEvalObject
from starflow2.world.examples import Example, shown

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"
HEARTS = shown("two pink hearts")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def seen(file: Path, *shows: GenEvalObject) -> str:
    """Faults of a picture that a client saved."""
    return faults_of(Example(task="draw", what="", text=file.name, shows=shows), to_pil(read_picture(file, 64)))


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def output(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def address(live: Live) -> Iterator[str]:
    yield live.url


def test_the_python_client_draws_edits_asks_and_scores(address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block.replace(ADDRESS, address), names)
    answer, colour, scores = capsys.readouterr().out.split(maxsplit=2)
    assert (answer, colour) == ("blue", "red") and float(scores.strip().strip("[]"))
    hearts = {f"hearts-{seed}.png": seen(tmp_path / f"hearts-{seed}.png", HEARTS) for seed in range(2)}
    assert hearts == dict.fromkeys(hearts, "")
    assert not seen(tmp_path / "star.png", shown("a red star")) and not seen(
        tmp_path / "blue.png", shown("a blue star")
    )
    assert (tmp_path / "draft-0.png").exists() and (tmp_path / "draft-1.png").exists()


def test_the_javascript_client_draws_and_streams(address, tmp_path):
    node = program("node")
    modules = Path(os.environ.get("STARFLOW2_NODE_MODULES", ROOT / "node_modules"))
    if not (modules / "openai").is_dir():
        pytest.skip("the package openai of npm is not installed: npm install openai")
    (tmp_path / "node_modules").symlink_to(modules)
    (code,) = blocks("javascript")
    (tmp_path / "star.mjs").write_text(code.replace(ADDRESS, address))
    assert output([node, "star.mjs"], tmp_path).strip() == "red"
    assert not seen(tmp_path / "hearts-js.png", HEARTS)


def test_curl_draws_edits_and_streams(address, tmp_path):
    program("curl")
    (code,) = [block for block in blocks("bash") if "curl" in block]
    said = output(["bash", "-euo", "pipefail", "-c", code.replace(ADDRESS, address)], tmp_path)
    assert not seen(tmp_path / "hearts-curl.png", HEARTS)
    assert "output_tokens" in said and "data: [DONE]" in said


def test_curl_says_what_was_wrong(address, tmp_path):
    """-f hides it; without, the body is OpenAI's error object."""
    command = [program("curl"), "-s", f"{address}/v1/images/generations", "-H", "Content-Type: application/json"]
    said = output([*command, "-d", '{"prompt": "a red elephant"}'], tmp_path)
    assert '"invalid_prompt"' in said and "elephant" in said
