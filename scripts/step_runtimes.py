"""CPU time of one guided latent of nano in several runtimes: what `inference/native` was chosen against.

    PYTHONPATH=src python scripts/step_runtimes.py --json runtimes.json    # a quiet core, about five minutes

One latent means a step of both streams at one position of two rows (with the words and without), over static caches
of 96 positions, 40 of them filled. All variants compute the same step from the same inputs in float32 on one thread;
each is compared with the eager step in float64 before it is timed. ONNX Runtime and OpenVINO take part where they are
installed (`pip install onnx onnxscript onnxruntime openvino`). Rounds alternate; medians of process CPU time are
printed. The compiled streams write their keys and values into the caches; the others hand them back to be written.
Letters: R rows, T positions of a cache, E language width, C flow width, H heads, h key heads, K head dim.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.inference.lean import LeanBackend, Rows
from starflow2.inference.native import NativeBackend
from starflow2.inference.packed import FlowLayer, LanguageLayer, PackedWeights, pack
from starflow2.models.checkpoint import load_components
from starflow2.models.hub import NANO

ROWS, LENGTH, FILLED = 2, 96, 40
TOLERANCE = 1e-4  # of float32 against float64, for states of about unit size
CALLS = 20  # of a variant in one round

Inputs = dict[str, Tensor]
Layers = Sequence[Sequence[Tensor]]
Step = Callable[[], tuple[Tensor, Tensor]]


# -- the step ---------------------------------------------------------------------------------------------------------


class StaticStep(nn.Module):
    """Both streams at one new position of every row, over caches of fixed size that it only reads.

    x: (R, E), base: (R, C); language_turn, flow_turn: cosines, then sines (2, R, K / 2); caches: keys and values of all
    layers (layers, 2, R, h, T, K); mask: (T,) zero where a position is filled, else very negative. Returns h (R, E),
    g (R, C), and the new keys and values (layers, 2, R, h, K) of both streams.
    """

    def __init__(self, weights: PackedWeights) -> None:
        super().__init__()
        self.language, self.flow = weights.language_cfg, weights.deep.cfg.stack
        self.language_layers = nn.ModuleList(_parameters(layer) for layer in weights.language)
        self.flow_layers = nn.ModuleList(_parameters(layer) for layer in weights.deep.layers)
        self.language_norm, self.flow_norm = nn.Parameter(weights.language_norm), nn.Parameter(weights.deep.final_norm)
        assert weights.visual_skip is not None
        self.visual_skip = nn.Parameter(weights.visual_skip)

    def forward(
        self,
        x: Tensor,
        base: Tensor,
        language_turn: Tensor,
        flow_turn: Tensor,
        language_cache: Tensor,
        flow_cache: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, language_new = self._language(x, language_turn, language_cache, mask)
        g, flow_new = self._flow(base + F.linear(h, self.visual_skip), flow_turn, flow_cache, mask)
        return h, g, language_new, flow_new

    def _language(self, x: Tensor, turn: Tensor, cache: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        cfg, new = self.language, []
        heads = (cfg.heads, cfg.kv_heads, cfg.kv_heads)
        for i, (n1, wq, bq, wo, n2, wg, wd) in enumerate(cast(Layers, self.language_layers)):
            q, k, v = F.linear(_rms(x, n1), wq, bq).view(ROWS, sum(heads), -1).split(heads, dim=1)
            q, k = _turned(q, turn), _turned(k, turn)
            new.append(torch.stack([k, v]))
            x = x + F.linear(_attend(q, k, v, cache[i], mask), wo)
            gate, up = F.linear(_rms(x, n2), wg).split(cfg.mlp_width, dim=-1)
            x = x + F.linear(F.silu(gate) * up, wd)
        return _rms(x, self.language_norm), torch.stack(new)

    def _flow(self, x: Tensor, turn: Tensor, cache: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        cfg, new = self.flow, []
        for i, (w1, b1, wq, bq, wo, bo, w2, b2, wu, bu, wd, bd) in enumerate(cast(Layers, self.flow_layers)):
            qkv = F.linear(F.layer_norm(x, (cfg.width,), w1, b1), wq, bq)
            q, k, v = qkv.view(ROWS, 3, cfg.heads, cfg.head_dim).unbind(1)
            q, k = _turned(q, turn), _turned(k, turn)
            new.append(torch.stack([k, v]))
            x = x + F.linear(_attend(q, k, v, cache[i], mask), wo, bo)
            hidden = F.linear(F.layer_norm(x, (cfg.width,), w2, b2), wu, bu).relu()
            x = x + F.linear(hidden * hidden, wd, bd)
        return _rms(x, self.flow_norm), torch.stack(new)


def _parameters(layer: LanguageLayer | FlowLayer) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(getattr(layer, field.name)) for field in fields(layer))


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = turn[:, :, None]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
    """Attention of one position to the cached ones and itself: q (R, H, K), k, v (R, h, K) -> (R, H K).

    Query heads stand in the order (H / h, h).
    """
    rows, heads, dim = q.shape
    groups = q.view(rows, -1, k.shape[1], dim).transpose(1, 2) * dim**-0.5  # (R, h, H / h, K)
    past = groups @ cache[0].transpose(-1, -2) + mask  # (R, h, H / h, T)
    own = (groups * k[:, :, None]).sum(-1, keepdim=True)
    share = torch.cat([past, own], dim=-1).softmax(-1)
    out = share[..., :-1] @ cache[1] + share[..., -1:] * v[:, :, None]
    return out.transpose(1, 2).reshape(rows, heads * dim)


def random_inputs(weights: PackedWeights) -> Inputs:
    """Inputs of `StaticStep`, float32, of the size that they have in a picture."""
    language, flow = weights.language_cfg, weights.deep.cfg.stack
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dim, positions = language.width // language.heads, torch.full((3, ROWS), FILLED)
    turns = weights.language_rotation(positions), weights.flow_rotation(positions.T)
    mask = torch.zeros(LENGTH)
    mask[FILLED:] = -1e9
    return {
        "x": random(ROWS, language.width),
        "base": random(ROWS, flow.width),
        "language_turn": torch.stack([turns[0].real, turns[0].imag]),
        "flow_turn": torch.stack([turns[1].real, turns[1].imag]),
        "language_cache": random(language.depth, 2, ROWS, language.kv_heads, LENGTH, dim),
        "flow_cache": random(flow.depth, 2, ROWS, flow.heads, LENGTH, flow.head_dim),
        "mask": mask,
    }


# -- its variants: each returns a function that computes h and g, already compiled ------------------------------------


def eager(step: StaticStep, inputs: Inputs) -> Step:
    return lambda: step(**inputs)[:2]


def compiled(step: StaticStep, inputs: Inputs) -> Step:
    fast = torch.compile(step, fullgraph=True, options={"freezing": True})
    return lambda: fast(**inputs)[:2]


def ahead_of_time(step: StaticStep, inputs: Inputs, folder: Path) -> Step:
    program = torch.export.export(step, (), inputs)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "step.pt2"), inductor_configs={"freezing": True}
    )
    fast = torch._inductor.aoti_load_package(path)
    return lambda: fast(**inputs)[:2]


def exported(step: StaticStep, inputs: Inputs, folder: Path) -> Path:
    """The step as ONNX."""
    path = folder / "step.onnx"
    torch.onnx.export(step, (), path, kwargs=inputs, dynamo=True, output_names=["h", "g", "k", "v"], verbose=False)
    return path


def onnx_runtime(path: Path, inputs: Inputs) -> Step:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    wanted = {value.name for value in session.get_inputs()}
    kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()) for name, x in inputs.items() if name in wanted}
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    for value in session.get_outputs():
        binding.bind_output(value.name)

    def run() -> tuple[Tensor, Tensor]:
        session.run_with_iobinding(binding)
        h, g = (torch.from_numpy(value.numpy()) for value in binding.get_outputs()[:2])
        return h, g

    return run


def open_vino(path: Path, inputs: Inputs) -> Step:
    openvino = import_module("openvino")
    core = openvino.Core()
    hints = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = core.compile_model(core.read_model(path), "CPU", hints)
    request = model.create_infer_request()
    for port in model.inputs:
        request.set_tensor(port, openvino.Tensor(inputs[port.any_name].numpy(), shared_memory=True))

    def run() -> tuple[Tensor, Tensor]:
        request.infer()
        h, g = (torch.from_numpy(request.get_output_tensor(i).data) for i in range(2))
        return h, g

    return run


def over_lanes(backend: LeanBackend, inputs: Inputs) -> Step:
    """A step of a backend in lanes that hold the inputs' keys and values, always at the same position."""
    lanes = backend.lanes
    for _ in range(ROWS):
        backend.reserve(backend.open(), LENGTH)
    for cache, name in ((lanes.language, "language_cache"), (lanes.flow, "flow_cache")):
        cache.buffer[..., :LENGTH, :] = inputs[name]
    language, flow = (torch.complex(*inputs[name]) for name in ("language_turn", "flow_turn"))
    is_latent = torch.ones(ROWS, dtype=torch.bool)
    rows = Rows(0, ROWS, inputs["x"], inputs["base"], is_latent, language, flow, all_latents=True)

    def run() -> tuple[Tensor, Tensor]:
        lanes.lengths[:] = [FILLED] * ROWS
        lanes.length.fill_(FILLED)
        backend._read(rows)
        return lanes.h, lanes.g

    return run


# -- the comparison ---------------------------------------------------------------------------------------------------


def variants(weights: PackedWeights, double: PackedWeights, inputs: Inputs, folder: Path) -> Iterator[tuple[str, Step]]:
    """Every variant that is installed here, by name; the first is the reference."""
    step = StaticStep(weights).eval()
    yield "torch, float64", eager(StaticStep(double), {name: x.double() for name, x in inputs.items()})
    yield "torch", eager(step, inputs)
    yield "torch.compile, frozen", compiled(step, inputs)
    yield "AOTInductor", ahead_of_time(step, inputs, folder)
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        path = exported(step, inputs, folder)
        yield "ONNX Runtime", onnx_runtime(path, inputs)
        if find_spec("openvino"):
            yield "OpenVINO", open_vino(path, inputs)
    yield "inference/lean.py", over_lanes(LeanBackend(weights), inputs)
    yield "inference/native", over_lanes(NativeBackend(weights), inputs)


def rounds(steps: dict[str, Step], count: int) -> dict[str, list[float]]:
    """CPU milliseconds of one step, by variant and round."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(CALLS):
                step()
            taken[name].append(1e3 * (time.process_time() - start) / CALLS)
    return taken


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stream = load_components(NANO).pretzel
    weights, double = pack(stream, torch.float32), pack(stream, torch.float64)
    steps, rows = dict[str, Step](), list[dict[str, object]]()
    with tempfile.TemporaryDirectory() as folder:
        made = variants(weights, double, random_inputs(weights), Path(folder))
        name, reference = next(made)
        steps[name], wanted = reference, [x.clone() for x in reference()]
        start = time.process_time()
        for name, step in made:
            gap = float(torch.stack([(a - b).abs().max() for a, b in zip(step(), wanted, strict=True)]).max())
            rows.append({"variant": name, "gap": gap, "ok": gap <= TOLERANCE, "made_s": time.process_time() - start})
            print(
                f"{name:24s} gap to float64 {gap:.1e}, made in {time.process_time() - start:.1f} s of CPU", flush=True
            )
            if gap <= TOLERANCE:
                steps[name] = step
            start = time.process_time()
        taken = rounds(steps, options.rounds)
    for name, times in taken.items():
        ratio = median(a / b for a, b in zip(times, taken["inference/native"], strict=True))
        rows.append({"variant": name, "cpu_ms": median(times), "ratio_to_native": ratio})
        print(f"{name:24s} {median(times):7.3f} ms, {ratio:5.2f} x inference/native", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
