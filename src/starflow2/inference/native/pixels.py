"""The compiled form of an FAE's decoders: the arithmetic of `Fae.decode` in C++, for the configs that it takes.

Weights are copied. Images are decoded one after the other, so that each has the same bits in any company.
Letters: P images, N latents, D latent dim, C channels, s pixels a side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from starflow2.inference.native.build import library
from starflow2.inference.native.facts import Fact, array, check_facts, stack_sizes, width_facts
from starflow2.inference.packed import flow_layer
from starflow2.models.fae import Fae
from starflow2.models.protocols import Codec
from starflow2.nn import StackConfig

__all__ = ["CompiledDecoder", "fae_of"]


def fae_of(codec: Codec) -> Fae | None:
    """The FAE whose decoders a codec is, None for another kind of codec."""
    fae = getattr(codec, "fae", None)
    return fae if type(fae) is Fae else None


class CompiledDecoder:
    """The decoders of an FAE as the C++ holds them. Raises Unavailable for those that it does not compute."""

    def __init__(self, fae: Fae) -> None:
        check_facts(_facts(fae))
        self.fae, self._library = fae, _declared(library())
        tensors, channels = [tensor.detach().contiguous() for tensor in _tensors(fae)], fae.cfg.pixel_channels
        self._pointer = self._library.starflow_decoder_create(
            array(ctypes.c_int32, _sizes(fae)),
            len(channels),
            array(ctypes.c_int32, channels),
            array(ctypes.c_void_p, [tensor.data_ptr() for tensor in tensors]),
        )

    def __del__(self) -> None:
        if hasattr(self, "_pointer"):
            self._library.starflow_decoder_free(self._pointer)

    def new_images(self, count: int) -> Tensor:
        """Room for images (P, 3, s, s)."""
        return torch.empty(count, 3, self.fae.image_size, self.fae.image_size)

    def decode(self, x: Tensor, images: Tensor) -> None:
        """Latents x (P, N, D) -> images (P, 3, s, s) in [-1, 1]; both are float32 and contiguous."""
        self._library.starflow_decode(self._pointer, x.data_ptr(), images.data_ptr(), len(x))


def _facts(fae: Fae) -> Iterator[Fact]:
    weight = fae.pixel_decoder.out.weight
    yield "device of the FAE", weight.device.type, "cpu"
    yield "dtype of the FAE", weight.dtype, torch.float32
    yield "fae.grid", fae.grid, (fae.grid[0],) * 2
    for name in ("feature_decoder", "pixel_decoder"):
        stack = getattr(fae.cfg, name)
        for field, value in {"activation": "relu2", "rope": False, "final_norm": True, "causal": False}.items():
            yield f"fae.{name}.{field}", getattr(stack, field), value
        yield from width_facts(f"fae.{name}", stack.width, stack.head_dim)


def _sizes(fae: Fae) -> list[int]:
    """Integers as `starflow_decoder_create` in streams.cpp names them."""
    cfg = fae.cfg
    sizes = [*cfg.grid, cfg.latent_dim, cfg.pixels_per_step, cfg.feature_dim]
    return [*sizes, *stack_sizes(cfg.feature_decoder), *stack_sizes(cfg.pixel_decoder)]


def _tensors(fae: Fae) -> Iterator[Tensor]:
    """Weights in the order in which pixels.h takes them."""
    pixels = fae.pixel_decoder
    yield from _of_tower(fae.feature_decoder.stack, fae.cfg.feature_decoder)
    yield from _of_linear(fae.feature_decoder.head)
    yield from _of_tower(pixels.stack, fae.cfg.pixel_decoder)
    for up in pixels.upsample:
        weight, bias = (x.detach().flatten(1) if x.ndim > 1 else x.detach() for x in _of_linear(up.expand))
        yield weight.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)  # the four pixels of a square, then channels
        yield bias.unflatten(0, (-1, 4)).T.flatten()
        if up.mix is not None:
            yield from _of_convolution(up.mix)
    yield from _of_convolution(pixels.out)


def _of_tower(tower: Any, cfg: StackConfig) -> Iterator[Tensor]:
    yield from _of_linear(tower.proj_in)
    yield tower.position_table
    for layer in tower.body.layers:
        packed = flow_layer(layer, None)
        yield from (getattr(packed, name) for name in packed.__slots__)
    yield 1 + tower.body.final_norm.weight


def _of_linear(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def _of_convolution(layer: Any) -> tuple[Tensor, Tensor]:
    """Its weight (out, in, k, k) as (out, k k in), and its bias."""
    return layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    lib.starflow_decoder_create.restype = pointer
    lib.starflow_decoder_create.argtypes = [pointer, integer, pointer, pointer]
    for name, arguments in (("decoder_free", [pointer]), ("decode", [pointer, pointer, pointer, integer])):
        function = getattr(lib, f"starflow_{name}")
        function.restype, function.argtypes = None, arguments
    return lib
