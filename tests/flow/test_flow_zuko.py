"""flow/ against zuko: our block's predictions inside zuko's autoregressive transform give our forward and inverse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import AffineTransform, Transform

from flow_cases import BLOCKS, Case, gap
from starflow2.flow import AffineBlock
from starflow2.flow.block import scan

zuko = pytest.importorskip("zuko", reason="zuko is not installed; it comes with the dev extra")


def autoregressive(case: Case) -> Transform:
    """zuko's transform around `predict`: it owns the sign, the log-determinant and the fixed-point inverse."""
    block = case.piece
    assert isinstance(block, AffineBlock)
    count, direction = block.cfg.num_latents, block.cfg.direction

    def meta(x: Tensor) -> Transform:
        run = block.begin(len(x), case.context, case.noise_level)
        affine = block.predict(F.pad(scan(x, direction), (0, 0, 0, 1)), (0, count), run)
        mu, scale = scan(affine.mu, direction), scan(affine.log_scale, direction).exp()
        return zuko.transforms.DependentTransform(AffineTransform(-mu / scale, 1 / scale), 2)

    return zuko.transforms.AutoregressiveTransform(meta, passes=count)


@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS.keys())
def test_zuko_gives_the_same_forward_logdet_and_inverse_in_float64(build: Callable[..., Case]) -> None:
    case = build(dtype=torch.float64)
    transform = autoregressive(case)
    with torch.no_grad():
        z, logdet = case.forward()
        theirs = transform(case.x)
        assert gap(z, theirs) <= 1e-10
        assert gap(logdet, transform.log_abs_det_jacobian(case.x, theirs)) <= 1e-10
        assert gap(case.inverse(case.x), transform.inv(case.x)) <= 1e-10
        assert gap(transform.inv(z), case.x) <= 1e-10
