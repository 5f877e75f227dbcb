"""Standalone normalizing flows: autoregressive affine blocks, deep-shallow stacks, exact likelihoods.

Needs torch only. docs/flows.md has an example on vectors of your own.
"""

from __future__ import annotations

from starflow2.flow.affine import Affine, standard_normal_log_prob
from starflow2.flow.block import AffineBlock, BlockConfig
from starflow2.flow.context import Context, Guide
from starflow2.flow.estimator import Density, FitConfig, Fitted, density
from starflow2.flow.model import Flow, FlowConfig, SampleConfig, ShallowFlow
from starflow2.flow.noise import NoiseConfig, NoiseEmbedding
from starflow2.flow.solver import SEQUENTIAL, BlockJacobi, Jacobi, Sequential, Solution, Solver, solve
from starflow2.flow.standardize import Standardize
from starflow2.nn import StackConfig

__all__ = [
    "SEQUENTIAL",
    "Affine",
    "AffineBlock",
    "BlockConfig",
    "BlockJacobi",
    "Context",
    "Density",
    "FitConfig",
    "Fitted",
    "Flow",
    "FlowConfig",
    "Guide",
    "Jacobi",
    "NoiseConfig",
    "NoiseEmbedding",
    "SampleConfig",
    "Sequential",
    "ShallowFlow",
    "Solution",
    "Solver",
    "StackConfig",
    "Standardize",
    "density",
    "solve",
    "standard_normal_log_prob",
]
