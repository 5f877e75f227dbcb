"""Benchmarks beside other people's code: zuko and normflows where they are installed, Apple's sampler by its path.

Weights are random and differ, so every variant has to undo itself: rows are taken to their code by the model's own
density pass, and what is timed has to bring them back.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from starflow2.core.serialize import JsonObject
from starflow2.errors import ConfigError, UsageError
from starflow2.flow import BlockConfig, Flow, FlowConfig, StackConfig, density
from starflow2.models.components import Components
from starflow2.nn import num_parameters
from starflow2.research.bench import Variant
from starflow2.research.bench_cases import LATENT, Drawing, forms

__all__ = ["flow", "of_apple"]

ROWS, LATENTS, DIM = 8, 32, 4  # rows of vectors of 128 numbers
NORMFLOWS, ZUKO = 256, 296  # hidden widths with about as many parameters as our block has
LAYERS, NARROW = 4, 100  # of a flow with about as many parameters as density(128) has
WORDS = 24  # of a prompt


Module = TypeVar("Module", bound=nn.Module)


def _wake(module: Module, spread: float = 0.02) -> Module:
    """Give every weight that a fresh flow keeps at zero a value."""
    generator = torch.Generator().manual_seed(0)
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return module


# -- flows of vectors -------------------------------------------------------------------------------------------------


def flow() -> Iterator[list[Variant]]:
    """The inverse of rows of 128 numbers by one affine autoregressive flow each, at equal numbers of parameters."""
    x = torch.randn(ROWS, LATENTS * DIM, generator=torch.Generator().manual_seed(0))
    group = []
    for name, (module, forward, inverse) in _flows().items():
        with torch.no_grad():
            z = forward(x)
        settings: JsonObject = {"batch": ROWS, "parameters": num_parameters(module)}
        run = torch.no_grad()(lambda inverse=inverse, z=z: inverse(z))
        group.append(
            Variant(bench="flow", name=name, run=run, units=ROWS, expected=x, tolerance=1e-3, settings=settings)
        )
    yield group


_Flow = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # with x -> z and z -> x


def _flows() -> dict[str, _Flow]:
    """Ours and those of peers that are installed."""
    torch.manual_seed(0)
    stack = StackConfig(width=64, depth=4, head_dim=32)
    block = _wake(Flow(FlowConfig(deep=BlockConfig(dim=DIM, grid=(1, LATENTS), stack=stack))))
    table, numbers = _wake(density((LATENTS, DIM)).flow), _wake(density(LATENTS * DIM).flow)
    found: dict[str, _Flow] = {
        "a block of four layers": (block, lambda x: block(x)[0], block.inverse),
        "density((32, 4))": (table, lambda x: table(x)[0], table.inverse),
        "density(128)": (numbers, lambda x: numbers(x)[0], numbers.inverse),
    }
    if importlib.util.find_spec("zuko"):
        zuko: Any = importlib.import_module("zuko.flows")
        model: Any = _wake(zuko.MAF(LATENTS * DIM, 0, transforms=1, hidden_features=(ZUKO, ZUKO)))
        transform = model().transform
        found["zuko MAF"] = model, transform, transform.inv
    if importlib.util.find_spec("normflows"):
        nf: Any = importlib.import_module("normflows")
        layer: Any = _wake(nf.flows.MaskedAffineAutoregressive(LATENTS * DIM, NORMFLOWS, num_blocks=1))
        found["normflows MAF"] = layer, lambda x: layer(x)[0], lambda z: layer.inverse(z)[0]
        found["normflows MAF of four layers"] = _normflows_of_layers(nf)
    return found


def _normflows_of_layers(nf: Any) -> _Flow:
    """Several affine layers, the features turned round between them, as our blocks alternate in direction."""
    layers = [nf.flows.MaskedAffineAutoregressive(LATENTS * DIM, NARROW, num_blocks=1) for _ in range(LAYERS)]
    stack = _wake(nn.ModuleList(layers))

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)[0].flip(1)
        return x

    def inverse(z: Tensor) -> Tensor:
        for layer in reversed(layers):
            z = layer.inverse(z.flip(1))[0]
        return z

    return stack, forward, inverse


# -- Apple's sampler --------------------------------------------------------------------------------------------------


def of_apple(folder: Path) -> Callable[[Components], Iterator[list[Variant]]]:
    """The benchmark against Apple's released sampler, from a checkout of apple/ml-starflow in `folder`."""

    def apple(components: Components) -> Iterator[list[Variant]]:
        """An image by Apple's sampler and by this model, with blocks of the same sizes, latents and words.

        Both read 24 words and draw with guidance in float32. Ours runs its language model at every latent besides.
        """
        cfg = components.cfg
        settings: JsonObject = {"shape": f"flow of {cfg.name}", "batch": 1, "guided": True, "dtype": "torch.float32"}
        run, expected = _apple_sampler(_apple_module(folder), components)
        units = cfg.flow.deep.num_latents
        group = [
            Variant(
                bench="apple",
                name="apple/ml-starflow",
                run=run,
                units=units,
                expected=expected,
                tolerance=1e-3,
                settings=settings,
            )
        ]
        ours = forms(components)
        exact = Drawing(ours["reference"], cfg, guided=True, words=WORDS).whole()
        for name in [name for name in ours if name not in ("reference", "lean float64")]:
            drawing = Drawing(ours[name], cfg, guided=True, words=WORDS)
            variant = Variant(
                bench="apple",
                name=name,
                run=drawing.whole,
                units=units,
                expected=exact,
                tolerance=LATENT,
                settings=settings,
            )
            group.append(variant)
        yield group

    return apple


def _apple_module(folder: Path) -> Any:
    """transformer_flow.py of a checkout. Raises UsageError where there is none, ConfigError for a failed import."""
    path = folder / "transformer_flow.py"
    if not path.is_file():
        raise UsageError(f"--peer apple={folder}: there is no transformer_flow.py; expected a checkout of ml-starflow.")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(path.stem)
    except ImportError as error:
        raise ConfigError(f"--peer apple={folder} cannot be imported: {error}.") from error
    finally:
        sys.path.remove(str(folder))


def _apple_sampler(module: Any, components: Components) -> tuple[Callable[[], Tensor], Tensor]:
    """Its guided sampler with random weights in the sizes of this model's flow, and what it has to find."""
    deep, first = components.cfg.flow.deep, components.cfg.flow.shallow[0]
    torch.manual_seed(0)
    depths = [*(block.stack.depth for block in components.cfg.flow.shallow), deep.stack.depth]
    model = module.Model(
        in_channels=deep.dim,
        img_size=deep.grid[0],
        patch_size=1,
        channels=first.stack.width,
        top_block_channels=deep.stack.width,
        num_blocks=len(depths),
        layers_per_block=depths,
        head_dim=deep.stack.head_dim,
        rope=True,
        sos=True,
        txt_size=WORDS,
        txt_dim=deep.stack.width,
        cond_top_only=True,
        use_softplus=True,
        use_final_norm=True,
        soft_clip=4.0,
        seq_order="L2R",
    )
    _wake(model)
    x = torch.randn(1, deep.dim, *deep.grid, generator=torch.Generator().manual_seed(0))
    words = torch.randn(2, WORDS, deep.stack.width, generator=torch.Generator().manual_seed(1))
    strength = components.cfg.guidance

    @torch.no_grad()
    def run() -> Tensor:
        found: Tensor = model(z, words, reverse=True, guidance=strength)
        return found

    with torch.no_grad():
        z = model(torch.cat([x, x]), words, guidance=strength)[0][:1]
    return run, x
