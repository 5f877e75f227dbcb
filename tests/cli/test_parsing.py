"""Command lines into dataclasses: types, defaults, nested settings, help and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest

from starflow2.cli.app import COMMANDS, command
from starflow2.cli.parsing import Option, Positional, flags, help_text, parse, refuse_repeated
from starflow2.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Settings inside."""

    rate: float = 0.1  # learning rate, 50 % of it at the end
    # above the field
    kind: Literal["fast", "exact"] = "fast"
    is_shared: bool = True

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"rate is {self.rate}; expected at least 0.")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One line about it.

    A second paragraph.
    """

    words: Positional[Annotated[tuple[str, ...], Option("what to say", metavar="WORD")]] = ()
    count: Annotated[int, Option("how often", short="-n")] = 1
    output: Annotated[Path | None, Option("where to", metavar="FILE", default="nowhere")] = None
    sizes: Annotated[tuple[int, ...], Option("of each")] = (1, 2)
    loud: Annotated[bool, Option("shout")] = False
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class Strict:
    name: Positional[Annotated[str, Option("required", metavar="NAME")]]
    place: Positional[Annotated[str, Option("optional", metavar="PLACE")]] = "here"
    size: Annotated[int, Option("required, too")]


def test_nothing_on_the_command_line_is_every_default():
    assert parse(Command, [], "program") == (Command(), [])


def test_values_are_converted_to_the_types_of_their_fields():
    line = ["a", "b", "-n", "3", "--output", "x.png", "--sizes", "4", "5", "6", "--loud", "--inner.rate=3e-4"]
    line += ["--inner.kind", "exact", "--inner.no-is-shared"]
    inner = Inner(rate=3e-4, kind="exact", is_shared=False)
    wanted = Command(words=("a", "b"), count=3, output=Path("x.png"), sizes=(4, 5, 6), loud=True, inner=inner)
    assert parse(Command, line, "program") == (wanted, [])


def test_required_and_optional_arguments_are_told_apart():
    assert parse(Strict, ["x", "--size", "2"], "program")[0] == Strict(name="x", size=2)
    assert parse(Strict, ["x", "y", "--size", "2"], "program")[0] == Strict(name="x", place="y", size=2)


def test_an_instance_gives_the_defaults_and_fixed_fields_cannot_be_set():
    now = Inner(rate=0.5, kind="exact")
    assert parse(Inner, ["--rate", "0.2"], "program", now) == (Inner(rate=0.2, kind="exact"), [])
    changed, unknown = parse(Inner, ["--rate", "0.2", "--kind", "fast"], "program", now, fixed=("kind",))
    assert changed == Inner(rate=0.2, kind="exact") and unknown == ["--kind", "fast"]
    assert flags(Inner, now, fixed=("kind",)) == ["--rate", "--no-is-shared"]


def test_underscores_in_options_are_hyphens_and_values_are_left_alone():
    parsed, unknown = parse(Command, ["a_b", "--inner.no_is_shared", "--output=my_file"], "program")
    assert not parsed.inner.is_shared and parsed.output == Path("my_file") and parsed.words == ("a_b",) and not unknown


def test_negative_numbers_are_values():
    assert parse(Command, ["-n", "-3", "--sizes", "-1", "2"], "program")[0] == Command(count=-3, sizes=(-1, 2))


def test_arguments_that_belong_to_no_field_are_handed_back_in_order():
    assert parse(Inner, ["--rate", "1", "--other", "2", "word"], "program")[1] == ["--other", "2", "word"]
    assert parse(Inner, ["--rat", "1"], "program")[1] == ["--rat", "1"], "no abbreviations"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["-n", "x"], "-n/--count: expected a whole number, got 'x'. See program --help."),
        (["--inner.rate", "fast"], "--inner.rate: expected a number, got 'fast'. See program --help."),
        (["--inner.kind", "exakt"], "--inner.kind: expected fast or exact, got 'exakt'. Did you mean \"exact\"? See"),
        (["--output"], "--output: expected one argument. See program --help."),
        (["--loud=yes"], "--loud: ignored explicit argument 'yes'. See"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_was_expected(line, message):
    with pytest.raises(UsageError) as caught:
        parse(Command, line, "program")
    assert str(caught.value).startswith(message)


def _names_of_places(kind: type[Any]) -> Iterator[tuple[str, list[str]]]:
    """Options and arguments of a command that are names of files or folders, with a line that gives each ""."""
    marked, given = get_type_hints(kind, include_extras=True), list[str]()
    for name, hint in get_type_hints(kind).items():
        is_place = Path in (hint, *get_args(hint))
        if "positional" in get_args(marked[name]):
            if is_place:
                yield name.upper(), [*given, ""]
            given.append("1" if not get_args(hint) else get_args(hint)[0])
        elif is_place:
            yield f"--{name.replace('_', '-')}", [f"--{name.replace('_', '-')}", ""]


def test_no_command_takes_an_empty_name_for_the_current_folder():
    seen = 0
    for verb in COMMANDS:
        for name, line in _names_of_places(command(verb)):
            with pytest.raises(UsageError, match=r"expected the name of a file or folder, got ''; \./ is the current"):
                parse(command(verb), line, verb)
            seen += 1
            assert name
    assert seen > 40 and parse(Command, ["--output", "."], "program")[0].output == Path()


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match=r"required: NAME, --size\. See program --help\."):
        parse(Strict, [], "program")


def test_a_value_that_the_dataclass_refuses_keeps_its_own_error():
    with pytest.raises(ConfigError, match="rate is -1"):
        parse(Command, ["--inner.rate", "-1"], "program")


def test_help_shows_options_defaults_and_comments_of_the_source(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = help_text(Command, "program verb")
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert lines[0] == "usage: program verb [options] [WORD ...]"
    for line in (
        "One line about it.",
        "A second paragraph.",
        "WORD what to say",
        "-n INT, --count INT how often (default: 1)",
        "--output FILE where to (default: nowhere)",
        "--loud shout",
        "Settings inside.",
        "--inner.rate FLOAT learning rate, 50 % of it at the end (default: 0.1)",
        "above the field (default: fast)",
    ):
        assert line in lines, line
    assert "(default: 1 2)" in page and "--inner.no-is-shared" in page


def test_an_option_given_twice_is_refused_in_either_spelling():
    with pytest.raises(UsageError, match="--prior-scale is given 2 times"):
        refuse_repeated(["x", "--prior-scale", "1", "--prior_scale=2"], "program", Command)
    for short in ("-n", "-n2"):
        with pytest.raises(UsageError, match="--count is given 2 times"):
            refuse_repeated(["x", "--count=1", short, "2"], "program", Command)
    refuse_repeated(["x", "x", "-", "-", "--", "--one", "1", "-n", "2"], "program", Command)
