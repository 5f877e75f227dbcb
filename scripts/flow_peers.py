"""Our flow beside zuko's and normflows' on digits and three tables, at equal numbers of parameters: a Markdown table.

    python scripts/flow_peers.py digits wine breast_cancer diabetes

Needs scikit-learn for the data; a peer that is not installed is left out. Everybody gets the same standardised rows,
steps, batches and schedule, the better of two learning rates by held-out rows, and keeps the weights that are best on
these. Numbers are means over seeds; nats of test rows per dimension, in units of the standardised data, less is better.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from starflow2.flow import density
from starflow2.nn import num_parameters

__all__ = ["Data", "Peer", "load", "main", "peers", "train"]

STEPS, BATCH, RATES, CHECKS = 400, 128, (1e-3, 4e-3), 20
TABLES = ("wine", "breast_cancer", "diabetes")


@dataclass(frozen=True, slots=True)
class Data:
    """Standardised rows (n, D), divided; `noise`: width of the uniform noise that fills discrete values."""

    name: str
    train: Tensor
    held_out: Tensor
    test: Tensor
    noise: Tensor  # (D,)


class Peer(nn.Module):
    """A model of vectors by the names that this script uses."""

    def __init__(self, model: nn.Module, log_prob: Callable[[Tensor], Tensor], sample: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.model, self.log_prob, self.sample = model, log_prob, sample


def load(name: str, seed: int) -> Data:
    """Rows of scikit-learn in random order: 64 % to train, 16 % held out, 20 % to test."""
    found = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")()
    x = torch.tensor(found.data, dtype=torch.float64)
    if name == "diabetes":
        x = x[:, [i for i in range(x.shape[1]) if i != 1]]  # the sex of a patient has two values
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    test, held = len(x) // 5, len(x) * 4 // 25
    width = 1.0 if name == "digits" else 0.0
    known = x[test:] + width * (torch.rand(x[test:].shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    scale, mean = torch.std_mean(known, dim=0)
    test_x = x[:test] + width * (torch.rand(x[:test].shape, generator=torch.Generator().manual_seed(2)) - 0.5)
    rows = ((x - mean) / scale).float()
    held_out = ((known[:held] - mean) / scale).float()
    return Data(name, rows[test + held :], held_out, ((test_x - mean) / scale).float(), (width / scale).float())


def _ours(data: Data, seed: int) -> Peer:
    if data.name == "digits":
        model = density((8, 8), patch=2, width=48, blocks=4, seed=seed)
        return Peer(model, lambda x: model.log_prob(x.view(-1, 8, 8)), lambda n: model.sample(n).flatten(1))
    table = density(data.train.shape[1], width=32, blocks=4, seed=seed)
    return Peer(table, table.log_prob, table.sample)


def _zuko(kind: str, transforms: int) -> Callable[[Data, int, int], Peer]:
    def build(data: Data, seed: int, hidden: int) -> Peer:
        flows: Any = importlib.import_module("zuko.flows")
        torch.manual_seed(seed)
        dim = data.train.shape[1]
        model = getattr(flows, kind)(dim, 0, transforms=transforms, hidden_features=(hidden, hidden))
        return Peer(model, lambda x: model().log_prob(x), lambda n: model().sample((n,)))

    return build


def _normflows(data: Data, seed: int, hidden: int) -> Peer:
    nf: Any = importlib.import_module("normflows")
    torch.manual_seed(seed)
    dim = data.train.shape[1]
    steps = list[Any]()
    for _ in range(4):  # turned round, as MAF is meant: density in one pass, samples one feature after the other
        steps += [nf.flows.Reverse(nf.flows.MaskedAffineAutoregressive(dim, hidden, num_blocks=1))]
        steps += [nf.flows.LULinearPermute(dim)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), steps)
    return Peer(model, model.log_prob, lambda n: model.sample(n)[0])


def peers() -> dict[str, Callable[[Data, int, int], Peer]]:
    """Those that are installed, by name: from data, seed and hidden width."""
    found: dict[str, Callable[[Data, int, int], Peer]] = {"ours": lambda data, seed, hidden: _ours(data, seed)}
    if importlib.util.find_spec("zuko"):
        found |= {"zuko MAF": _zuko("MAF", 4), "zuko NSF": _zuko("NSF", 3)}
    if importlib.util.find_spec("normflows"):
        found["normflows MAF"] = _normflows
    return found


def width_for(build: Callable[[Data, int, int], Peer], data: Data, parameters: int) -> int:
    """The hidden width at which a peer has as many parameters as ours, as nearly as it can."""
    return min(range(8, 400, 4), key=lambda width: abs(num_parameters(build(data, 0, width).model) - parameters))


def train(peer: Peer, data: Data, rate: float, seed: int) -> float:
    """Train with an early stop; mean nats per dimension of the held-out rows with the weights that are kept."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(peer.model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS + 1)
    best, kept = nats(peer, data.held_out), copy.deepcopy(peer.model.state_dict())
    for step in range(1, STEPS + 1):
        x = data.train[torch.randint(len(data.train), (BATCH,), generator=generator)]
        x = x + data.noise * (torch.rand(x.shape, generator=generator) - 0.5)
        loss = -peer.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(peer.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (STEPS // CHECKS) == 0 and (now := nats(peer, data.held_out)) < best:
            best, kept = now, copy.deepcopy(peer.model.state_dict())
    peer.model.load_state_dict(kept)
    return best


@torch.no_grad()
def nats(peer: Peer, rows: Tensor) -> float:
    """Mean negative log-likelihood per dimension."""
    return float(-peer.log_prob(rows).mean() / rows.shape[1])


@dataclass(frozen=True, slots=True)
class Row:
    """Measured of one peer on one set."""

    parameters: int
    test: float  # nats per dimension
    seconds: float  # CPU, of a fit
    milliseconds: float  # CPU, to draw 100 rows


def measure(build: Callable[[Data, int, int], Peer], data: Data, seed: int, hidden: int) -> Row:
    """Fit with each rate, keep the better one by held-out rows, and score the test rows."""
    fits = []
    start = time.process_time()
    for rate in RATES:
        peer = build(data, seed, hidden)
        fits.append((train(peer, data, rate, seed), peer))
    seconds = (time.process_time() - start) / len(RATES)
    peer = min(fits, key=lambda pair: pair[0])[1]
    times = []
    with torch.no_grad():
        for _ in range(5):
            start = time.process_time()
            peer.sample(100)
            times.append(1000 * (time.process_time() - start))
    return Row(num_parameters(peer.model), nats(peer, data.test), seconds, sorted(times)[2])


def line(name: str, peer: str, rows: Sequence[Row]) -> str:
    """A row of the table: means over seeds, the spread of the test score beside it."""
    scores = torch.tensor([row.test for row in rows])
    spread = f" ± {float(scores.std()):.3f}" if len(rows) > 1 else ""
    seconds, draws = (sum(getattr(row, key) for row in rows) / len(rows) for key in ("seconds", "milliseconds"))
    score = f"{float(scores.mean()):.3f}{spread}"
    return f"| {name} | {peer} | {rows[0].parameters:,} | {score} | {seconds:.1f} | {draws:.0f} |"


def main() -> None:
    """Print the table, line by line as it is measured."""
    parser = argparse.ArgumentParser(prog="flow_peers", description=__doc__)
    parser.add_argument("sets", nargs="*", default=["digits", *TABLES], choices=["digits", *TABLES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer", action="append", choices=list(peers()), help="only this one; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| data | flow | parameters | nats per dimension | fit, CPU s | draw 100, CPU ms |")
    print("|---|---|---|---|---|---|")
    for name in options.sets:
        sets = [load(name, seed) for seed in range(options.seeds)]
        wanted = num_parameters(_ours(sets[0], 0).model)
        for peer, build in ((peer, build) for peer, build in peers().items() if peer in (options.peer or peers())):
            hidden = 0 if peer == "ours" else width_for(build, sets[0], wanted)
            rows = [measure(build, data, seed, hidden) for seed, data in enumerate(sets)]
            print(line(name, peer, rows), flush=True)


if __name__ == "__main__":
    main()
