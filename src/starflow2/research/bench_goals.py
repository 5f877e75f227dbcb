"""Goals of the engine, and what the rows of a benchmark say about each of them (docs/choices.md#goals-of-the-engine).

A goal is a number that is computed from rows: how many times one unit costs another, a count, or a second. Bounds that
rest on times hold on a quiet machine only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from starflow2.core.serialize import JsonObject

__all__ = ["GOALS", "Goal", "goals"]

Rows = Sequence[JsonObject]
Found = Callable[[Rows], float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that has to be at least, or at most, `bound`. find: it from rows, None where they do not say."""

    text: str
    find: Found
    bound: float
    is_least: bool = False

    def line(self, rows: Rows) -> str:
        """A line of the table: what, the bound, what was found, and whether it is met."""
        found, sign = self.find(rows), "≥" if self.is_least else "≤"
        if found is None:
            return f"| {self.text} | {sign} {self.bound:g} | not measured | |"
        met = found >= self.bound if self.is_least else found <= self.bound
        return f"| {self.text} | {sign} {self.bound:g} | {found:.3g} | {'yes' if met else '**no**'} |"


def goals(rows: Rows) -> list[str]:
    """Lines of a table of all goals."""
    lines = ["| goal | bound | measured | met |", "|---|---|---|---|"]
    return lines + [goal.line(rows) for goal in GOALS]


# -- rows and numbers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """A row: its bench, the end of its variant's name, or all of it, and settings that it has."""

    bench: str
    variant: str
    batch: int | None = None
    guided: bool | None = None

    def fits(self, row: JsonObject) -> bool:
        name = str(row["variant"])
        is_named = name == self.variant or name.endswith(f", {self.variant}")
        wanted = {"batch": self.batch, "guided": self.guided}
        is_set = all(value is None or row.get(name) == value for name, value in wanted.items())
        return row["bench"] == self.bench and is_named and is_set


def _row(rows: Rows, key: Key) -> JsonObject | None:
    return next((row for row in rows if key.fits(row)), None)


def number(name: str, key: Key) -> Found:
    """A number that a row has."""

    def find(rows: Rows) -> float | None:
        row = _row(rows, key)
        return None if row is None or row.get(name) is None else float(row[name])

    return find


def times(dear: Key, cheap: Key) -> Found:
    """How many times a unit of one row costs that of another, in CPU seconds."""

    def find(rows: Rows) -> float | None:
        seconds = [row["median"] / row["units"] for key in (dear, cheap) if (row := _row(rows, key)) and row.get("n")]
        return seconds[0] / seconds[1] if len(seconds) == 2 else None

    return find


def most(found: Sequence[Found]) -> Found:
    """The largest of several numbers; None unless all are there."""

    def find(rows: Rows) -> float | None:
        numbers = [number for one in found if (number := one(rows)) is not None]
        return max(numbers) if len(numbers) == len(found) else None

    return find


def share_of_same_bits(bench: str, variant: str) -> Found:
    """Share of rows whose results are equal to the last bit."""

    def find(rows: Rows) -> float | None:
        same = [bool(row["check"]["bitwise"]) for row in rows if row["bench"] == bench and row["variant"] == variant]
        return sum(same) / len(same) if same else None

    return find


# -- the goals --------------------------------------------------------------------------------------------------------


def _of_images() -> Iterator[Goal]:
    reference, native = Key("picture", "reference", 1, True), Key("picture", "native", 1, True)
    loop = times(Key("latent", "reference", guided=True), Key("latent", "native", guided=True))
    apple = Key("apple", "apple/ml-starflow")
    yield Goal("a guided image, prompt to pixels: reference to compiled", times(reference, native), 20, True)
    yield Goal("its latents and shallow inverse: reference to compiled", loop, 30, True)
    yield Goal("without a compiler: reference to lean", times(reference, Key("picture", "lean", 1, True)), 3, True)
    for batch, bound in ((1, 20), (8, 10), (32, 8)):
        pair = (Key("before", f"draw, {who}", batch) for who in ("before", "now"))
        yield Goal(f"{batch} side by side: before this engine to now, an image", times(*pair), bound, True)
    guided = [
        times(Key("guidance", "native", batch, True), Key("guidance", "native", batch, False)) for batch in (1, 8)
    ]
    yield Goal("guidance: with to without, alone or eight", most(guided), 1.3)
    yield Goal("Apple's sampler to compiled", times(apple, Key("apple", "native")), 12, True)
    yield Goal("Apple's sampler to lean", times(apple, Key("apple", "lean")), 2.5, True)
    yield Goal("share of batches of 1, 2, 8, 32 with equal bits", share_of_same_bits("picture", "native"), 1, True)
    equality = Key("equality", "native")
    yield Goal("80 conversations against float64: largest difference of u", number("u", equality), 2e-3)
    yield Goal("80 conversations against float64: largest difference of a pixel", number("pixels", equality), 1e-3)


def _of_rows() -> Iterator[Goal]:
    one, idle = Key("many", "one row"), Key("many", "one of 16 rows, the others idle")
    crowd = Key("many", "1000 mixed requests")
    yield Goal("an image among 16 rows to one alone", times(Key("many", "16 rows"), one), 1 / 6)
    yield Goal("one client of an engine of 16 rows to a session", times(idle, Key("many", "a session")), 1.15)
    yield Goal("1,000 mixed requests: positions beyond the longest conversation", number("beyond", crowd), 64)
    yield Goal("1,000 mixed requests: bytes more than after 100", number("more", crowd), 0)
    later = [times(Key("turns", f"turn {turn}"), Key("turns", "turn 2")) for turn in range(3, 9)]
    yield Goal("a turn of 8 to turn 2, a position", most(later), 1.15)


def _of_counts() -> Iterator[Goal]:
    paper, nano = Key("paper", "lean", guided=True), Key("latent", "lean", guided=True)
    yield Goal("operations of a guided latent of nano, shallow blocks included", number("ops", nano), 600)
    yield Goal("kernels of a guided latent at the paper's size", number("kernels", paper), 700)
    yield Goal("waits of the host, likewise", number("syncs", paper), 0)
    yield Goal("breaks of its graph, likewise", number("graph_breaks", paper), 0)
    yield Goal("passes over the weights, likewise", number("passes", paper), 1)


def _of_the_rest() -> Iterator[Goal]:
    torch, pipeline = Key("start", "import torch"), Key("start", "import starflow2.pipeline")
    yield Goal("CPU seconds to a first image", number("median", Key("start", "first image")), 2.5)
    yield Goal("importing the library to importing torch", times(pipeline, torch), 1.6)
    ours, theirs = Key("flow", "density((32, 4))"), Key("flow", "normflows MAF")
    yield Goal("inverse of a small flow to that of normflows", times(ours, theirs), 1)
    for stage in ("t2i", "joint"):
        pair = (Key("train", f"{stage}, {dtype}, step") for dtype in ("float32", "bfloat16"))
        yield Goal(f"a step of {stage} in float32 to one in bfloat16", times(*pair), 1.9, True)


GOALS = (*_of_images(), *_of_rows(), *_of_counts(), *_of_the_rest())
