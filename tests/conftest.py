"""Fixtures for every test: seeds, threads, no network, a device, stored values, shared material.

A worker of pytest-xdist computes with one thread; STARFLOW2_TEST_THREADS sets another number.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read once, when torch loads its thread library
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    # torch 2.13 asks oneDNN whether there is a matrix unit, then fails in bfloat16 attention without AVX-512 kernels of
    # its own; no processor has the first without the second
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

import gc
import random
import socket
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from helpers import wake

__all__ = ["wake"]

LOCAL = ("127.", "::1", "localhost")
# files that take longest come first, so that no worker of pytest-xdist is left alone with one of them at the end
LONG = ("test_sharded_training.py", "test_notebooks.py", "test_own_size.py", "test_placing.py", "test_distributed.py")
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests that take the device fixture run: cpu, cuda, mps")


def pytest_configure(config: pytest.Config) -> None:
    # a worker has one core; a number that is set explicitly also keeps MKL from choosing one on its own
    usual = 1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("STARFLOW2_TEST_THREADS", usual)))
    config.option.loadscopereorder = False  # of pytest-xdist; the order is made below


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the garbage collector from looking at imported modules again and again: they live until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # files of many tests before files of few, as pytest-xdist would have it
        sizes, places = Counter(item.path for item in items), {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: (places.get(item.path.name, len(LONG)), -sizes[item.path]))
    if config.getoption("--device") == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an accelerator: pytest -m gpu --device cuda"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family != getattr(socket, "AF_UNIX", None) and not str(address[0]).startswith(LOCAL):
                raise RuntimeError(f"a test tried to reach {address}: tests run without a network.")
            return connect(self, address)

        return call

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def shared_dir() -> Path:
    """Reference numbers and prompts that do not travel with this repository; tests that want them skip without."""
    path = ROOT / os.environ.get("STARFLOW2_SHARED", "../shared")
    if not path.is_dir():
        pytest.skip(f"no reference material at {path}: set STARFLOW2_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def smoke_model(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of a nano model that took a step of every stage: whole, loadable, and untrained.

    Made once for all workers; its run folder is the parent. Copy it before changing anything in it.
    """
    from starflow2.training.loop import fit
    from starflow2.training.recipes import (  # only here: most tests do without the seconds that this import takes
        nano,
        smoke,
    )

    base = tmp_path_factory.getbasetemp()
    run = (base if worker_id == "master" else base.parent) / "smoke-run"
    with FileLock(f"{run}.lock"):
        if not (run / "done").is_file():
            recipe = smoke(nano())  # fewer captions than usual are read before the first step of stage t2i
            stages = (replace(s, steps=1, batch=2, whitening_captions=64) for s in recipe.stages)
            recipe = replace(recipe, stages=tuple(stages), precision="float32")  # "auto" would measure at every stage
            for stage in recipe.stages:
                fit(recipe, stage.name, run)
            (run / "done").touch()
    return run / "model"
