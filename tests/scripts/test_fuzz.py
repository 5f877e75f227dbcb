"""scripts/fuzz: its cases are the same every time, it counts what it says, and a few hundred inputs find nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
from fuzz.cases import Bench, Case
from fuzz.harness import MAKERS, SHARES, Ended, case_of, ended, plan, summary

from starflow2.errors import ConfigError

QUICK = {
    "flows": 60,
    "pictures": 60,
    "configs": 80,
    "records": 40,
    "mixtures": 30,
    "results": 20,
    "commands": 20,
    "prompts": 20,
    "modules": 20,
    "benchmarks": 40,
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def refuse(message: str, kind: type[ConfigError] = ConfigError) -> Callable[[], object]:
    def call() -> object:
        raise kind(message)

    return call


class Raw(ConfigError):
    """An error whose message is printed as it came."""

    def __str__(self) -> str:
        return str(self.args[0])


def crash() -> object:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (Case("", refuse("x is 3; expected 4.")), "clear"),
        (Case("", refuse("x is \x1b[2J", Raw)), "other"),
        (Case("", refuse("two\nlines", Raw)), "other"),
        (Case("", refuse("")), "other"),
        (Case("", crash), "other"),
        (Case("", lambda: sys.exit(2)), "other"),
        (Case("", lambda: 3), "silent"),
        (Case("", lambda: 3, lambda value: value == 3), "taken"),
        (Case("", lambda: 3, lambda value: value == 4), "silent"),
        (Case("", lambda: bytearray(2**62)), "memory"),
    ],
)
def test_every_outcome_is_told_from_the_others(case: Case, outcome: str) -> None:
    assert ended(case)[0] == outcome


def test_a_child_that_a_case_starts_is_a_failure() -> None:
    children: list[str] = []

    def start() -> object:
        children.append("subprocess.Popen")
        return None

    assert ended(Case("", start, lambda value: True), children) == ("other", "a child was started: subprocess.Popen")


def test_a_plan_has_every_category_and_is_the_same_for_the_same_seed() -> None:
    cases = plan(10_000, 0)
    assert len(cases) >= 10_000 and {name for name, _ in cases} == set(MAKERS) == set(SHARES)
    assert plan(10_000, 0) == cases != plan(10_000, 1)


def test_the_last_line_counts_all_outcomes() -> None:
    found = [Ended("flows", i, "x", outcome) for i, outcome in enumerate(["clear", "clear", "taken", "silent"])]
    assert summary(found)[-1] == "fuzz: 4 inputs, 2 clear, 1 taken rightly, 0 other, 1 silent, 0 hang, 0 memory"


@pytest.mark.parametrize(("category", "count"), QUICK.items())
def test_a_few_hundred_inputs_are_refused_clearly_or_taken_rightly(category: str, count: int, bench: Bench) -> None:
    for number in range(count):
        case = case_of(category, number, 0, bench)
        assert ended(case)[0] in ("clear", "taken"), f"python -m fuzz --only {category}:{number}"
