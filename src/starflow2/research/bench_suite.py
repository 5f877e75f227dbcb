"""The benchmarks of `starflow2 bench` by name, and running some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from starflow2.core.serialize import JsonObject
from starflow2.errors import UsageError, nearest
from starflow2.models.components import Components
from starflow2.research.bench import Variant, measured
from starflow2.research.bench_before import of_before
from starflow2.research.bench_calls import calls, equality
from starflow2.research.bench_cases import deep, latent, picture, shallow, text
from starflow2.research.bench_peers import flow, of_apple
from starflow2.research.bench_rows import many, turns
from starflow2.research.bench_shapes import at_nano_size, at_paper_size
from starflow2.research.bench_work import ceiling, data, start, train

__all__ = ["ALL", "NAMES", "run_benches"]

Groups = Iterator[list[Variant]]
Bench = Callable[[], Groups]

OF_A_MODEL: dict[str, Callable[[Components], Groups]] = {
    "latent": latent,
    "picture": picture,
    "shallow": shallow,
    "deep": deep,
    "text": text,
    "calls": calls,
    "equality": equality,
    "many": many,
    "turns": turns,
    "train": train,
}
WITHOUT_A_MODEL: dict[str, Bench] = {
    "ceil": ceiling,
    "nano": at_nano_size,
    "paper": at_paper_size,
    "flow": flow,
    "data": data,
    "start": start,
}
PEERS: dict[str, Callable[[Path], Callable[[Components], Groups]]] = {"apple": of_apple, "before": of_before}
NAMES = (*OF_A_MODEL, *WITHOUT_A_MODEL)
ALL = "all"


def run_benches(
    components: Callable[[], Components],
    names: Sequence[str],
    rounds: int,
    *,
    times: bool,
    peers: Mapping[str, Path] | None = None,
) -> Iterator[JsonObject]:
    """Rows of the benches with these names, "all": of every one, as soon as each group is measured.

    components: called once, where a bench is of a model. peers: folders of other people's samplers by name, which are
    measured, too. Raises UsageError for other names.
    """
    for bench in _benches(cache(components), names, peers or {}):
        for group in bench():
            yield from measured(group, rounds, times=times)


def _benches(model: Callable[[], Components], names: Sequence[str], peers: Mapping[str, Path]) -> list[Bench]:
    for name in names:
        if name not in (*NAMES, ALL):
            known = [*NAMES, ALL]
            raise UsageError(f"there is no benchmark {name!r}; expected {', '.join(known)}.{nearest(name, known)}")
    for name in peers:
        if name not in PEERS:
            raise UsageError(f"--peer names {name!r}; expected {', '.join(PEERS)}.{nearest(name, PEERS)}")

    def of_the_model(bench: Callable[[Components], Groups]) -> Bench:
        return lambda: bench(model())

    wanted = NAMES if ALL in names else names
    own = [WITHOUT_A_MODEL.get(name) or of_the_model(OF_A_MODEL[name]) for name in wanted]
    return own + [of_the_model(PEERS[name](folder)) for name, folder in peers.items()]
