"""flow/ against numbers from the released flows: TARFlow, STARFlow and iTARFlow with random woken weights, float32.

The numbers do not travel with this repository; without them these tests skip and say so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flow_cases import gap
from flow_keys import block_state, load_reference, starflow_config, tarflow_block
from starflow2.flow import (
    AffineBlock,
    BlockJacobi,
    Context,
    Flow,
    FlowConfig,
    Jacobi,
    SampleConfig,
    Sequential,
    Solver,
)

BOUND = 1e-5
SIDE, TEXT = 4, 5  # latents per side, states of the text prefix


def reference(shared_dir: Path, name: str) -> dict[str, Tensor]:
    path = shared_dir / "fixtures" / f"{name}_ref_f32.npz"
    if not path.is_file():
        pytest.skip(f"no reference numbers at {path}")
    return load_reference(path)


# -- TARFlow and iTARFlow: pixels ---------------------------------------------------------------


def patches(images: Tensor) -> Tensor:
    """(B, 3, 8, 8) -> (B, 16, 12), each patch in (channel, row, column) order."""
    return F.unfold(images, kernel_size=2, stride=2).transpose(1, 2)


@pytest.fixture(params=["tarflow", "itarflow"])
def pixel_flow(request: pytest.FixtureRequest, shared_dir: Path) -> tuple[dict[str, Tensor], list[list[AffineBlock]]]:
    """The reference, and for each of its images the blocks of that image's class."""
    ref = reference(shared_dir, request.param)
    depth = 4 if request.param == "tarflow" else 3
    return ref, [[tarflow_block(ref, b, label, head_dim=64) for b in range(depth)] for label in ref["y"].tolist()]


def level_of(ref: dict[str, Tensor], row: int) -> Tensor | None:
    return ref["t"][row] if "t" in ref else None  # (1,)


def test_tarflow_and_itarflow_blocks_latents_and_logdets_agree(
    pixel_flow: tuple[dict[str, Tensor], list[list[AffineBlock]]],
) -> None:
    ref, flows = pixel_flow
    for row, flow in enumerate(flows):
        x = patches(ref["x"])[row : row + 1]
        total = torch.zeros(1)
        for index, block in enumerate(flow):
            x, logdet = block(x, None, level_of(ref, row))
            total = total + logdet
            assert gap(x[0], ref[f"out{index}"][row]) <= BOUND
        assert gap(x[0], ref["z"][row]) <= BOUND
        assert gap(total[0] / x[0].numel(), ref["logdet"][row]) <= BOUND  # theirs is a mean over dimensions
        assert ref["logdet"][row].abs() > 1e-3


@pytest.mark.parametrize("solver", [Sequential(), Jacobi()], ids=["sequential", "jacobi"])
def test_tarflow_and_itarflow_latents_go_back_to_the_pixels(
    pixel_flow: tuple[dict[str, Tensor], list[list[AffineBlock]]], solver: Solver
) -> None:
    ref, flows = pixel_flow
    for row, flow in enumerate(flows):
        x = ref["z"][row : row + 1]
        for block in reversed(flow):
            x = block.inverse(x, None, level_of(ref, row), solver=solver)
        assert gap(x, patches(ref["x"])[row : row + 1]) <= BOUND


def test_the_noise_level_of_itarflow_matters(shared_dir: Path) -> None:
    ref = reference(shared_dir, "itarflow")
    block = tarflow_block(ref, 2, int(ref["y"][0]), head_dim=64)
    x = ref["out1"][:1]
    assert gap(block(x, None, ref["t"][0])[0], block(x, None, ref["t"][0] * 2)[0]) > 1e-3


# -- STARFlow: latents with a text prefix -------------------------------------------------------


@pytest.fixture
def starflow(shared_dir: Path) -> tuple[dict[str, Tensor], Flow]:
    ref = reference(shared_dir, "starflow")
    configs = [starflow_config(ref, index) for index in range(3)]
    flow = Flow(FlowConfig(deep=configs[2], shallow=tuple(configs[:2])))
    for index, block in enumerate([*flow.shallow.blocks, flow.deep]):
        block.load_state_dict(block_state(ref, index, flipped=index == 1))
    return ref, flow.eval()


def raster(images: Tensor) -> Tensor:
    """(B, D, rows, columns) -> (B, N, D)."""
    return images.flatten(2).transpose(1, 2)


def text(states: Tensor) -> Context:
    """STARFlow's places: state j of L at third coordinate j / L * side, all latents at 0."""
    positions = torch.zeros(len(states), TEXT, 3)
    positions[..., 2] = torch.arange(TEXT) / TEXT * SIDE
    return Context(states, positions, step=torch.zeros(len(states)))


def test_starflow_blocks_latents_and_logdets_agree(starflow: tuple[dict[str, Tensor], Flow]) -> None:
    ref, flow = starflow
    x = raster(ref["x"])
    for index, block in enumerate([*flow.shallow.blocks, flow.deep]):
        assert gap(x, ref[f"out{index}"].flatten(1, 2)) <= BOUND
        x, logdet = block(x, text(ref["y"]) if index == 2 else None)
        assert gap(logdet, ref[f"logdet{index}"].sum((1, 2))) <= BOUND
        assert logdet.abs().min() > 0.5
    assert gap(x, ref["out3"].flatten(1, 2)) <= BOUND
    assert gap(x, raster(ref["z"])) <= BOUND


def test_starflow_logdets_agree_latent_by_latent_in_scan_order(starflow: tuple[dict[str, Tensor], Flow]) -> None:
    ref, flow = starflow
    for index, block in enumerate([*flow.shallow.blocks, flow.deep]):
        assert isinstance(block, AffineBlock)
        x = ref[f"out{index}"].flatten(1, 2)
        x = x.flip(1) if index == 1 else x
        run = block.begin(2, text(ref["y"]) if index == 2 else None, None)
        affine = block.predict(F.pad(x, (0, 0, 0, 1)), (0, SIDE * SIDE), run)
        assert gap(-affine.log_scale, ref[f"logdet{index}"]) <= BOUND


def test_the_whole_starflow_agrees(starflow: tuple[dict[str, Tensor], Flow]) -> None:
    ref, flow = starflow
    z, logdet = flow(raster(ref["x"]), text(ref["y"]))
    assert gap(z, raster(ref["z"])) <= BOUND
    assert gap(logdet, sum(ref[f"logdet{b}"].sum((1, 2)) for b in range(3))) <= BOUND  # type: ignore[arg-type]
    assert gap(flow.inverse(z, text(ref["y"])), raster(ref["x"])) <= BOUND


@pytest.mark.parametrize(
    "solver",
    [Sequential(), Jacobi(tolerance=1e-6), BlockJacobi(chunk=5, tolerance=1e-6)],
    ids=["sequential", "jacobi", "chunks"],
)
def test_starflow_samples_agree_with_and_without_guidance(
    starflow: tuple[dict[str, Tensor], Flow], solver: Solver
) -> None:
    ref, flow = starflow
    z, context, empty = raster(ref["eps"]), text(ref["y"]), text(ref["yn"])
    plain = SampleConfig(deep_solver=solver, shallow_solver=solver)
    guided = SampleConfig(guidance=2.0, deep_solver=solver, shallow_solver=solver)
    assert gap(flow.sample(z, context, config=plain), raster(ref["sample"])) <= BOUND
    assert gap(flow.sample(z, context, empty, config=guided), raster(ref["sample_cfg2"])) <= BOUND
    assert gap(ref["sample"], ref["sample_cfg2"]) > 0.05
