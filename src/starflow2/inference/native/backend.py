"""The compiled form of sampling: the arithmetic of `lean.LeanBackend` in C++, for the models that it takes.

Weights are copied; lanes are shared with the lean form and written in place. Every lane has the same bits alone, in any
batch and on any number of threads, whatever the order in which lanes come and go.
Letters: P images, N latents, D latent dim, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from starflow2.errors import ShapeError
from starflow2.flow.solver import SEQUENTIAL, Solver
from starflow2.inference.backend import Chunk, Pair
from starflow2.inference.lanes import Lanes
from starflow2.inference.lean import LeanBackend, Pictures, Rows
from starflow2.inference.native.build import Unavailable, library
from starflow2.inference.native.facts import Fact, array, check_facts, stack_sizes, whole, width_facts
from starflow2.inference.native.pixels import CompiledDecoder, fae_of
from starflow2.inference.packed import BlockWeights, FlowLayer, LanguageLayer, PackedWeights, key_by_key
from starflow2.models.config import LanguageConfig
from starflow2.models.fae import Fae
from starflow2.models.protocols import Codec

__all__ = ["NativeBackend", "native_backend"]


def native_backend(weights: PackedWeights) -> tuple[NativeBackend | None, str]:
    """The compiled form for a model and where it is; or None, and why there is none."""
    try:
        return NativeBackend(weights), library()._name
    except Unavailable as error:
        return None, str(error)


# -- which models it takes --------------------------------------------------------------------------------------------


def _facts(weights: PackedWeights) -> Iterator[Fact]:
    language = weights.language_cfg
    yield "device of the weights", weights.embed.device.type, "cpu"
    yield "dtype of the weights", weights.dtype, torch.float32
    yield "dtype of the language model", weights.embed.dtype, torch.float32
    yield from width_facts("vlm", language.width, language.width // language.heads)
    yield whole("vlm.mlp_width", language.mlp_width)
    yield whole("joints.adapter_width", weights.cfg.adapter_width)
    yield from _block_facts("flow.deep", weights.deep)
    for i, block in enumerate(weights.shallow):
        yield f"flow.shallow[{i}].clip", block.cfg.clip, weights.deep.cfg.clip
        yield f"flow.shallow[{i}].stencil", block.cfg.stencil, weights.shallow[0].cfg.stencil
        yield from _block_facts(f"flow.shallow[{i}]", block)


def _block_facts(name: str, block: BlockWeights) -> Iterator[Fact]:
    yield f"{name}.scale", block.cfg.scale, "exp"
    yield f"{name}.clips_mean", block.cfg.clips_mean, False
    yield f"{name}.stack.activation", block.cfg.stack.activation, "relu2"
    yield from width_facts(f"{name}.stack", block.cfg.stack.width, block.cfg.stack.head_dim)


# -- what the C++ reads -----------------------------------------------------------------------------------------------


def _sizes(weights: PackedWeights) -> list[int]:
    """Integers as `starflow_create` in streams.cpp names them."""
    language, deep = weights.language_cfg, weights.deep
    inputs = [block.proj_in.shape[1] for block in (deep, *weights.shallow)]
    adapter = [weights.adapter_in.shape[1], weights.adapter_in.shape[0]]
    sizes = [deep.cfg.num_latents, deep.cfg.dim, len(weights.embed), inputs[0], inputs[-1], *adapter]
    sizes += [weights.context_in.shape[1], language.width, language.depth, language.heads, language.kv_heads]
    sizes += [language.width // language.heads, language.mlp_width]
    return sizes + [n for block in (deep, *weights.shallow) for n in stack_sizes(block.cfg.stack)]


def _tensors(weights: PackedWeights) -> Iterator[Tensor]:
    """Weights in the order in which streams.cpp takes them."""
    for layer in weights.language:
        yield from _of_layer(_key_by_key(layer, weights.language_cfg))
    yield weights.language_norm
    for block in (weights.deep, *weights.shallow):
        yield from (block.proj_in, block.head, block.head_bias)
        for flow_layer in block.layers:
            yield from _of_layer(flow_layer)
        yield block.final_norm
    yield from (weights.context_in, weights.context_in_bias, weights.adapter_in, weights.adapter_in_bias)
    yield from (weights.adapter_out, weights.adapter_out_bias)
    language, flow = weights.language_cfg.width, weights.deep.cfg.stack.width
    yield weights.embed.new_zeros(flow, language) if weights.visual_skip is None else weights.visual_skip
    yield weights.embed.new_zeros(language, flow) if weights.text_skip is None else weights.text_skip
    yield weights.lm_head


def _key_by_key(layer: LanguageLayer, cfg: LanguageConfig) -> LanguageLayer:
    """A layer whose query heads stand in the model's own order, by which the C++ finds the key of each."""
    width, dim = cfg.width, cfg.width // cfg.heads

    def ordered(x: Tensor) -> Tensor:
        return torch.cat([key_by_key(x[:width], cfg.kv_heads, dim), x[width:]])

    return replace(layer, qkv=ordered(layer.qkv), qkv_bias=ordered(layer.qkv_bias), out=ordered(layer.out.T).T)


def _of_layer(layer: LanguageLayer | FlowLayer) -> list[Tensor]:
    return [getattr(layer, field.name) for field in fields(layer)]


class _Cache(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("layer", "side", "lane", "head"))]


def _pointers(names: Iterable[str]) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


_OF_LANES = ("length", "drawn", "h", "g", "u", "z", "raw", "added", "language_rotation", "flow_rotation", "strength")
_OF_ROWS = ("x", "base", "is_latent", "language_rotation", "flow_rotation")


class _Lanes(ctypes.Structure):
    _fields_ = [("language", _Cache), ("flow", _Cache), *_pointers(_OF_LANES)]


class _Rows(ctypes.Structure):
    _fields_ = [*_pointers(_OF_ROWS), ("lanes", ctypes.c_void_p), ("count", ctypes.c_int64)]


class _Drawing(ctypes.Structure):
    _fields_ = [*_pointers(("main", "blank", "is_extrapolated")), ("images", ctypes.c_int32)]


def _struct(lanes: Lanes) -> _Lanes:
    caches = (_Cache(cache.buffer.data_ptr(), *cache.buffer.stride()[:4]) for cache in (lanes.language, lanes.flow))
    return _Lanes(*caches, *(getattr(lanes, name).data_ptr() for name in _OF_LANES))


# -- the operations ---------------------------------------------------------------------------------------------------


class _Model:
    """A model's weights as the C++ holds them."""

    def __init__(self, weights: PackedWeights) -> None:
        check_facts(_facts(weights))
        self.library = _declared(library())
        tensors = [tensor.contiguous() for tensor in _tensors(weights)]
        reverse = [int(block.cfg.direction == "r2l") for block in weights.shallow]
        self.pointer = self.library.starflow_create(
            array(ctypes.c_int32, _sizes(weights)),
            len(reverse),
            array(ctypes.c_int32, reverse),
            array(ctypes.c_int32, weights.near.flatten().tolist()),
            weights.deep.cfg.clip,
            array(ctypes.c_void_p, [tensor.data_ptr() for tensor in tensors]),
        )

        self._decoder: CompiledDecoder | None = None

    def decoder(self, fae: Fae) -> CompiledDecoder | None:
        """The compiled decoders of the FAE that belongs to this model, with the weights of the first call."""
        if self._decoder is None or self._decoder.fae is not fae:
            try:
                self._decoder = CompiledDecoder(fae)
            except Unavailable:
                return None
        return self._decoder

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self.library.starflow_free(self.pointer)


_MODELS: WeakKeyDictionary[PackedWeights, _Model] = WeakKeyDictionary()  # shared by the backends of the same weights


class NativeBackend(LeanBackend):
    """The lean form with its arithmetic in C++: passes over both streams, the loop over latents, the shallow inverse.

    threads: how many share the images of a call, by default torch's number. Raises Unavailable where nothing can be
    compiled, and for models that the C++ does not compute.
    """

    name = "native"

    def __init__(self, weights: PackedWeights, threads: int | None = None) -> None:
        if weights not in _MODELS:
            _MODELS[weights] = _Model(weights)
        self._compiled = _MODELS[weights]
        self._library, self._model = self._compiled.library, self._compiled.pointer
        super().__init__(weights)
        self._threads = threads

    def arrange(self, drawing: Sequence[Pair], writing: Sequence[int]) -> None:
        """Nothing: lanes are read and drawn wherever they are."""

    def _read(self, rows: Rows) -> None:
        self._read_at(rows, range(rows.first, rows.first + rows.lanes), [len(rows.x) // rows.lanes] * rows.lanes)

    @torch.no_grad()
    def append_each(self, lanes: Sequence[int], chunks: Sequence[Chunk]) -> None:
        slots = [self.lanes.slot_of[lane] for lane in lanes]
        self._read_at(self._rows(0, len(chunks), chunks), slots, [len(chunk) for chunk in chunks])

    def _read_at(self, rows: Rows, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Read rows that are new positions of lanes at `slots`, `counts` of each, in one pass whatever their number."""
        lanes = self.lanes
        self._check_room(lanes.lengths[slot] + count for slot, count in zip(slots, counts, strict=True))
        kept = [None if x is None else x.contiguous() for x in (getattr(rows, name) for name in _OF_ROWS)]
        pointers = (None if x is None else x.data_ptr() for x in kept)
        slot_of_row = array(
            ctypes.c_int64, [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
        )
        address = ctypes.addressof(slot_of_row)
        self._library.starflow_read(self._model, _struct(lanes), _Rows(*pointers, address, len(slot_of_row)))
        for slot, count in zip(slots, counts, strict=True):
            lanes.lengths[slot] += count

    def _draw_latents(self, pictures: Pictures, count: int) -> None:
        lanes, all_of_it, slots = self.lanes, self.weights.deep.cfg.num_latents, pictures.slots.tolist()
        done = [lanes.counts[slot] for slot in slots]
        lengths = [lanes.lengths[slot] + min(n + count, all_of_it - 1) - n for slot, n in zip(slots, done, strict=True)]
        self._check_room(lengths)  # the last latent is only sampled, not read
        norm, struct, images = self.weights.at(pictures.level), _struct(lanes), len(pictures.main)
        rule = None if pictures.is_tarflow is None else pictures.is_tarflow.data_ptr()
        main, blank = pictures.main.data_ptr(), pictures.blank.data_ptr()

        def run(first: int, last: int) -> None:
            at = first * pictures.main.element_size()
            drawing = _Drawing(main + at, blank + at, None if rule is None else rule + first, last - first)
            vectors = norm.adapter_norm.data_ptr(), norm.adapter_norm_bias.data_ptr()
            self._library.starflow_draw(self._model, struct, drawing, count, *vectors)

        self._share(run, images)
        for slot, n, length in zip(slots, done, lengths, strict=True):
            lanes.counts[slot], lanes.lengths[slot] = n + count, length

    def _check_room(self, lengths: Iterable[int]) -> None:
        """Raise ShapeError where a lane has no room for so many: the C++ would write beyond its memory."""
        longest = max(lengths)
        if longest > self.lanes.capacity:
            raise ShapeError(
                f"a lane would hold {longest} positions; expected at most {self.lanes.capacity}: reserve more."
            )

    def unshallow(self, u: Tensor, level: float, solver: Solver = SEQUENTIAL) -> Tensor:
        if solver != SEQUENTIAL:
            return super().unshallow(u, level, solver)
        x = u.to(self.lanes.u).contiguous().clone()
        added = array(ctypes.c_void_p, [slots.data_ptr() for slots in self.weights.at(level).shallow_slots])
        turns = [self.weights.shallow_rotation(i) for i in range(len(self.weights.shallow))]
        rotations = array(ctypes.c_void_p, [turn.data_ptr() for turn in turns])

        def run(first: int, last: int) -> None:
            self._library.starflow_unshallow(self._model, added, rotations, x[first].data_ptr(), last - first)

        self._share(run, len(x))
        return x

    def pixels(self, codec: Codec, x: Tensor) -> Tensor:
        fae = fae_of(codec)
        decoder = None if fae is None or x.dtype != torch.float32 else self._compiled.decoder(fae)
        if decoder is None:
            return super().pixels(codec, x)
        x, images = x.contiguous(), decoder.new_images(len(x))
        self._share(lambda first, last: decoder.decode(x[first:last], images[first:last]), len(x))
        return images

    def logits(self, lanes: Sequence[int]) -> Tensor:
        out = self.lanes.h.new_empty(len(lanes), len(self.weights.embed))
        slots = array(ctypes.c_int64, [self.lanes.slot_of[lane] for lane in lanes])
        self._library.starflow_logits(self._model, _struct(self.lanes), slots, len(lanes), out.data_ptr())
        return out

    def _share(self, run: Callable[[int, int], None], images: int) -> None:
        """Call `run` with ranges of the images, one for each thread."""
        workers = min(self._threads or torch.get_num_threads(), images)
        if workers < 2:
            run(0, images)
            return
        bounds = [images * i // workers for i in range(workers + 1)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, bounds[:-1], bounds[1:]))


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    pointer, integer, lanes = ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Lanes)
    lib.starflow_create.restype = pointer
    lib.starflow_create.argtypes = [pointer, integer, pointer, pointer, ctypes.c_float, pointer]
    lib.starflow_free.argtypes = [pointer]
    lib.starflow_read.argtypes = [pointer, lanes, ctypes.POINTER(_Rows)]
    lib.starflow_draw.argtypes = [pointer, lanes, ctypes.POINTER(_Drawing), integer, pointer, pointer]
    lib.starflow_unshallow.argtypes = [pointer, pointer, pointer, pointer, integer]
    lib.starflow_logits.argtypes = [pointer, lanes, pointer, integer, pointer]
    for name in ("free", "read", "draw", "unshallow", "logits"):
        getattr(lib, f"starflow_{name}").restype = None
    return lib
