"""Command lines into dataclasses, by argparse; every refusal is a UsageError on one line.

A field is an option: `steps: Annotated[int, Option("training steps")] = 300` is --steps INT. Marked `Positional`, it is
an argument by its place. A field that is a dataclass itself gives options with a dot (--optim.lr). Fields without an
`Option` take the comment beside them in the source as their help. Not here: the meaning of any option.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from starflow2.core.text import shown
from starflow2.errors import UsageError, nearest

__all__ = [
    "Option",
    "Positional",
    "docstring_of",
    "flags",
    "help_text",
    "parse",
    "refuse_repeated",
]

T = TypeVar("T")
POSITIONAL = "positional"
Positional = Annotated[T, POSITIONAL]
MIN_WIDTH, WIDTH = 50, 100  # of help


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line.

    metavar: stands for the value in help, by default its type. short: a second name, such as "-o". default: words for
    the default in help, by default its value; "" hides it.
    """

    help: str
    _: dataclasses.KW_ONLY
    metavar: str = ""
    short: str = ""
    default: str | None = None


@dataclass(frozen=True, slots=True)
class _Setting:
    """A field that takes a value, possibly of a nested dataclass. kind: its type, without None and annotations."""

    owner: type[Any]  # the dataclass that has it
    dotted: str  # "optim.lr"
    kind: Any
    default: Any  # MISSING if it is required
    option: Option
    is_positional: bool

    @property
    def flag(self) -> str:
        group, dot, name = self.dotted.rpartition(".")
        return f"--{group}{dot}{'no-' if self.default is True else ''}{name}".replace("_", "-")


# -- the command line -------------------------------------------------------------------------------------------------


def parse(
    kind: type[T], arguments: Sequence[str], program: str, default: T | None = None, fixed: Sequence[str] = ()
) -> tuple[T, list[str]]:
    """An instance of the dataclass `kind`, and the arguments that belong to none of its fields.

    default: an instance whose values are the defaults. fixed: fields of it that no option changes.
    Raises UsageError with the option, its value and what was expected.
    """
    try:
        found, unknown = _parser(kind, program, default, fixed).parse_known_args(_hyphened(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(f"{_sentence(str(error).removeprefix('argument '))} See {program} --help.") from None
    return _built(kind, vars(found), default, fixed), unknown


def help_text(kind: type[T], program: str, default: T | None = None, fixed: Sequence[str] = ()) -> str:
    """The help page that `parse` with these arguments follows."""
    return _parser(kind, program, default, fixed).format_help()


def refuse_repeated(arguments: Sequence[str], program: str, kind: type[Any]) -> None:
    """Raise UsageError for an option of `kind` given twice, by either name: only the last would count, silently."""
    whole = {setting.option.short: setting.flag for setting in _settings(kind, None) if setting.option.short}
    names = [whole.get(a[:2], a.split("=")[0]) for a in _hyphened(arguments) if a.startswith("-") and len(a) > 1]
    for name in (name for name in names if name.startswith("--") and len(name) > 2):
        if names.count(name) > 1:
            raise UsageError(
                f"{name} is given {names.count(name)} times; give it once, followed by all of its values. "
                f"See {program} --help."
            )


def docstring_of(kind: type[Any]) -> str:
    """The docstring of a dataclass; "" where it has none, as under `python -OO`, and holds its signature instead."""
    text = inspect.getdoc(kind) or ""
    return "" if text.startswith(f"{kind.__name__}(") else text


def flags(kind: type[T], default: T | None = None, fixed: Sequence[str] = ()) -> list[str]:
    """Long options of a dataclass: --steps, --optim.lr, --shard.no-reshards for a setting that is on by default."""
    found = [setting for setting in _settings(kind, default) if setting.dotted not in fixed]
    return [setting.flag for setting in found if not setting.is_positional]


def _hyphened(arguments: Sequence[str]) -> list[str]:
    """--prior_scale=1 becomes --prior-scale=1; values are left alone."""
    return [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), argument) for argument in arguments]


# -- dataclasses ------------------------------------------------------------------------------------------------------


def _settings(kind: Any, default: Any, prefix: str = "") -> Iterator[_Setting]:
    """Fields of a dataclass and of those inside it, in order."""
    hints, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        value, bare = _default(field, default), _unwrapped(hints[field.name])
        marks = get_args(marked[field.name])[1:] if get_origin(marked[field.name]) is Annotated else ()
        if dataclasses.is_dataclass(bare):
            yield from _settings(bare, None if value is dataclasses.MISSING else value, f"{prefix}{field.name}.")
            continue
        option = next((mark for mark in marks if isinstance(mark, Option)), None)
        option = option or Option(_comments(kind).get(field.name, ""))
        yield _Setting(kind, f"{prefix}{field.name}", bare, value, option, POSITIONAL in marks)


def _default(field: dataclasses.Field[Any], default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _unwrapped(hint: Any) -> Any:
    """A type without None."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = [option for option in get_args(hint) if option is not NoneType]
    return hint


@cache
def _comments(kind: Hashable) -> dict[str, str]:
    """The comment beside, or above, each field of a dataclass in its source."""
    found: dict[str, str] = {}
    for base in reversed(inspect.getmro(cast("type[Any]", kind))[:-1]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            if comment := re.fullmatch(r" {4}# (.*)", line):
                above.append(comment[1])
                continue
            if field := re.fullmatch(r" {4}(\w+): [^#]*(?:# (.*))?", line):
                found[field[1]] = " ".join(filter(None, [*above, field[2]]))
            above = []
    return found


def _built(kind: Any, values: Mapping[str, Any], default: Any, fixed: Sequence[str], prefix: str = "") -> Any:
    """The instance whose leaves are in `values` by their dotted names."""
    hints, made = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        name, bare = f"{prefix}{field.name}", _unwrapped(hints[field.name])
        if name in fixed:
            made[field.name] = getattr(default, field.name)
        elif dataclasses.is_dataclass(bare):
            made[field.name] = _built(bare, values, None, (), f"{name}.")
        else:
            made[field.name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return kind(**made)


# -- argparse ---------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{_sentence(message)} See {self.prog} --help.")


def _parser(kind: type[Any], program: str, default: Any, fixed: Sequence[str]) -> _Parser:
    settings = [setting for setting in _settings(kind, default) if setting.dotted not in fixed]
    places = [_place(setting) for setting in settings if setting.is_positional]
    width = max(MIN_WIDTH, min(shutil.get_terminal_size().columns, WIDTH))
    parser = _Parser(
        prog=program,
        usage=_plain(" ".join([program, "[options]", *places])),
        description=_plain(_filled(docstring_of(kind), width)),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=28),
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups: dict[str, Any] = {"": parser}
    for setting in settings:
        title = setting.dotted.rpartition(".")[0]
        if title not in groups:
            about = _plain(_filled(docstring_of(setting.owner), width - 2))
            groups[title] = parser.add_argument_group(f"--{title}".replace("_", "-"), about)
        _add(groups[title], setting)
    return parser


def _add(group: Any, setting: _Setting) -> None:
    option, takes_many = setting.option, get_origin(setting.kind) is tuple
    named: dict[str, Any] = {"help": _plain(_help(setting)), "default": setting.default}
    if setting.kind is bool:
        named["action"] = "store_false" if setting.default is True else "store_true"
    else:
        kind = get_args(setting.kind)[0] if takes_many else setting.kind
        named |= {"type": partial(_value, kind), "metavar": option.metavar or _metavar(kind)}
        if takes_many:
            named["nargs"] = "*"
    if not setting.is_positional:
        required = {"required": True} if setting.default is dataclasses.MISSING else {}
        names = [name for name in (option.short, setting.flag) if name]
        group.add_argument(*names, dest=setting.dotted, **named, **required)
        return
    if setting.default is not dataclasses.MISSING and not takes_many:
        named["nargs"] = "?"
    group.add_argument(setting.dotted, **named)


def _value(kind: Any, text: str) -> Any:
    """`text` as a value of that type. Raises ArgumentTypeError with what was expected."""
    if get_origin(kind) is Literal:
        known = get_args(kind)
        if text in known:
            return text
        raise argparse.ArgumentTypeError(f"expected {_listed(known)}, got {shown(text)}.{nearest(text[:60], known)}")
    if kind is Path and not text.strip():  # which pathlib takes for the current folder
        raise argparse.ArgumentTypeError(
            f"expected the name of a file or folder, got {shown(text)}; ./ is the current folder"
        )
    convert: Callable[[str], Any] = kind
    try:
        value = convert(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {shown(text)}") from None
    if kind is float and not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _metavar(kind: Any) -> str:
    return f"{{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else kind.__name__.upper()


def _place(setting: _Setting) -> str:
    name = setting.option.metavar or setting.dotted.upper()
    if get_origin(setting.kind) is tuple:
        return f"[{name} ...]"
    return name if setting.default is dataclasses.MISSING else f"[{name}]"


def _help(setting: _Setting) -> str:
    shown = setting.option.default
    if shown is None:
        value = setting.default
        hidden = value is None or isinstance(value, bool) or value in (dataclasses.MISSING, (), "")
        shown = "" if hidden else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{setting.option.help} (default: {shown})".lstrip() if shown else setting.option.help


def _listed(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _plain(text: str) -> str:
    """Text as argparse takes it, where % stands for a value."""
    return text.replace("%", "%%")


def _filled(text: str, width: int) -> str:
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n"))
