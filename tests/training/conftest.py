"""Run folders of the tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model_cases import tiny_folder
from run_cases import RUN
from starflow2.training.loop import fit


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that is ready for t2i."""
    return tiny_folder(tmp_path_factory.mktemp("ready"))


@pytest.fixture
def folder(ready: Path, tmp_path: Path) -> Path:
    """A copy that a test may train in."""
    shutil.copytree(ready, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def whole(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder after an uninterrupted t2i run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(ready, folder)
    fit(RUN, "t2i", folder)
    return folder
