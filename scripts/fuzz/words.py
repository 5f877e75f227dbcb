"""Spoiled words, numbers, devices and command lines, and the doors that take them."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fuzz.cases import ALIENS, Bench, Case, anything, is_number
from starflow2.cli.app import main
from starflow2.errors import StarFlowError
from starflow2.inference.config import DrawConfig
from starflow2.pipeline import StarFlow2

__all__ = ["CommandRefused", "commands", "numbers", "prompts"]

PROMPTS = ("a red circle", "two red hearts", "a blue square left of a green star", "three yellow triangles")
UNKNOWN = ("zebra", "quantum", "xqzt", "аpple", "żółw", "<|im_start|>", "</s>", "{prompt}", "%s", "$(id)", "`id`")
UNSEEN = ("\x00", "\x1b[2J", "\x07", "\x08", "\x7f", "\x9b31m", "\ud800", "\udfff")
SOFT = (
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u00ad",
    "\u202e",
    "\u2066",
    "\u0301",
    "\u2028",
    "\u00a0",
    "\t",
    "\n",
    "\r\n",
    "  ",
)


# -- words --------------------------------------------------------------------------------------------------------


def prompts(rng: random.Random, bench: Bench) -> Case:
    """One text, shown to a door of the model that reads words."""
    kind = rng.choice(
        ["right", "unknown", "unseen", "unseen", "soft", "form", "empty", "long", "alien", "alien", "mixed"]
    )
    text, judge = _text(kind, rng)
    doors: dict[str, Callable[[], object]] = {
        "check_prompt": lambda: bench.model.check_prompt(text),
        "add": lambda: bench.model.session().add(text),
        "score": lambda: bench.model.score([text], ["a red circle"]),
        "score as reply": lambda: bench.model.score(["a red circle"], [text]),
    }
    if judge is None:
        doors["generate"] = lambda: bench.model.generate([text])
        doors["ask"] = lambda: bench.model.ask(bench.image, text)
        doors["edit"] = lambda: bench.model.edit(bench.image, text)
        if kind != "empty" and not (
            isinstance(text, str | list | tuple | dict) and not text
        ):  # an inversion takes no words as well
            doors["invert"] = lambda: bench.model.invert(bench.image, text)
    door = rng.choice(list(doors))
    label = f"alien {type(text).__name__}" if kind == "alien" else kind
    if kind == "alien" and door in ("add", "score", "score as reply") and isinstance(text, torch.Tensor):
        label += " (as an image)"
    return Case(f"{door}: {label}", doors[door], judge)


def _text(kind: str, rng: random.Random) -> tuple[Any, Callable[[Any], bool] | None]:
    """A text of this kind, and its judge: None where it must be refused."""
    prompt = rng.choice(PROMPTS)
    at = rng.randrange(len(prompt) + 1)
    match kind:
        case "right":
            return prompt, anything
        case "unknown":
            return f"{prompt} {rng.choice(UNKNOWN)}", None
        case "unseen":
            return prompt[:at] + rng.choice(UNSEEN) + prompt[at:], None
        case "soft":  # taken as what a reader sees, or refused
            return prompt[:at] + rng.choice(SOFT) + prompt[at:], anything
        case "form":
            full = "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in prompt)
            return rng.choice(
                [prompt.upper(), f'"{prompt}"', f"({prompt})", prompt + "!!", full, prompt.title()]
            ), anything
        case "empty":
            return rng.choice(["", " ", "\n\t", "...", "!?", "\u3000", "\u200b"]), None
        case "long":
            return " ".join([prompt] * rng.choice([200, 2000])), None
        case "alien":
            return rng.choice(
                [a for a in ALIENS if not isinstance(a, str)] + [b"a red circle", [prompt], (prompt, None)]
            ), None
        case _:
            return "".join(
                chr(rng.choice([rng.randrange(32, 0x250), rng.randrange(0x3040, 0xD7FF)])) for _ in range(12)
            ), anything


# -- numbers ------------------------------------------------------------------------------------------------------


def _whole(low: int, high: int) -> Callable[[object], bool]:
    def fits(value: object) -> bool:
        return is_number(value) and isinstance(value, int | np.integer) and low <= int(value) <= high

    return fits


def _real(low: float, high: float = math.inf) -> Callable[[object], bool]:
    return lambda value: is_number(value) and low <= float(value) <= high  # type: ignore[arg-type]


def numbers(rng: random.Random, bench: Bench) -> Case:
    """One setting of a public call, with a value that is or is no such number."""
    prompt = "a red circle"
    doors: dict[str, tuple[Callable[[Any], object], Callable[[object], bool]]] = {
        "generate seed": (lambda v: bench.model.generate(prompt, seed=v), _whole(-(2**63), 2**63 - 1)),
        "generate n": (lambda v: bench.model.generate(prompt, n=v), _whole(1, 4)),
        "session seed": (lambda v: bench.model.session(seed=v), _whole(-(2**63), 2**63 - 1)),
        "edit seed": (
            lambda v: bench.model.edit(bench.image, "make the circle blue", seed=v),
            _whole(-(2**63), 2**63 - 1),
        ),
        "generate tries": (lambda v: bench.model.generate(prompt, tries=v), lambda v: v is None or _whole(1, 2)(v)),
        "edit tries": (
            lambda v: bench.model.edit(bench.image, "make the circle blue", tries=v),
            lambda v: v is None or _whole(1, 2)(v),
        ),
        "run tries": (
            lambda v: list(bench.model.session().add(prompt).run(tokens=2, pictures=1, tries=v)),
            lambda v: v is None or _whole(1, 2)(v),
        ),
        "write tokens": (lambda v: bench.model.session().add(prompt).write(tokens=v), _whole(1, 2**62)),
        "write temperature": (lambda v: bench.model.session().add(prompt).write(tokens=2, temperature=v), _real(0)),
        "run pictures": (lambda v: list(bench.model.session().add(prompt).run(tokens=2, pictures=v)), _whole(0, 2**62)),
        "guidance": (lambda v: DrawConfig(guidance=v), _real(0)),
        "edit_guidance": (lambda v: DrawConfig(edit_guidance=v), lambda v: v is None or _real(0)(v)),
        "prior_scale": (lambda v: DrawConfig(prior_scale=v), lambda v: _real(0)(v) and v != 0),
        "batch": (lambda v: DrawConfig(batch=v), _whole(1, 2**62)),
        "rule": (lambda v: DrawConfig(rule=v), lambda v: v in ("starflow", "tarflow") if isinstance(v, str) else False),
        "skips": (lambda v: DrawConfig(skips=v), lambda v: v is None or (isinstance(v, tuple) and v == ())),
        "device": (lambda v: StarFlow2.from_pretrained(bench.folder, device=v), _is_device),
        "from_pretrained": (lambda v: StarFlow2.from_pretrained(v), lambda v: False),
        "save_pretrained": (lambda v: bench.model.save_pretrained(v), lambda v: False),
    }
    name = rng.choice(list(doors))
    call, fits = doors[name]
    odd = [a for a in ALIENS if not (name == "save_pretrained" and isinstance(a, str | os.PathLike))]
    usual: list[Any] = [
        3,
        np.int64(2),
        1,
        0.5,
        "auto",
        "cpu",
        "gpu",
        "cuda:99",
        "meta",
        torch.device("cpu"),
        10**6,
        np.float32(0.5),
    ]
    if name in ("save_pretrained", "from_pretrained"):
        usual = ["\x00", b"x", 3]
    value = rng.choice(odd if rng.random() < 0.7 else usual)
    if (
        name in ("run pictures", "generate n", "write tokens", "generate tries", "edit tries", "run tries")
        and isinstance(value, int | np.integer)
        and int(value) > 2
    ):
        value = 2  # more would be right as well, and take as long as it takes
    # a count that is right in kind may still be more than fits: refused or taken, but no more than that
    judge = anything if fits(value) or _may_be(name, value) else None
    return Case(f"{name}: {type(value).__name__}", lambda: call(value), judge)


def _is_device(value: object) -> bool:
    return (
        value in ("auto", "cpu") if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cpu"
    )


def _may_be(name: str, value: object) -> bool:
    """True for values of which the documentation does not say that they are wrong."""
    if type(value) is int or isinstance(value, np.integer):
        return (name in ("device", "generate n") and int(value) > 0) or (name == "write tokens" and int(value) == 0)
    if name == "skips":
        return value is None or (isinstance(value, str | list | tuple) and not value)
    return name == "device" and value is None


# -- command lines ------------------------------------------------------------------------------------------------


class CommandRefused(StarFlowError):
    """A command line that ended with status 2 and what it wrote to stderr."""


def _run(argv: list[str]) -> tuple[int, str]:
    """Status and output of a command line. Raises CommandRefused for status 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    if status == 2:
        message = err.getvalue()
        raise CommandRefused(message.removesuffix("\n"))
    return status, out.getvalue()


def _printable(result: tuple[int, str]) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in result[1])


# each ends before it computes: the model, the folder or the place to write to is not there
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("generate", "a red circle", "--model", "./nowhere"),
    ("ask", "nowhere.png", "what color is it?", "--model", "./nowhere"),
    ("edit", "nowhere.png", "make it blue", "--model", "./nowhere"),
    ("score", "a red circle", "--model", "./nowhere"),
    ("invert", "nowhere.png", "a red circle", "--model", "./nowhere"),
    ("train", "nano", "--output", "/dev/null/x"),
    ("finetune", "./nowhere", "-o", "/dev/null/x"),
    ("eval", "world", "--quick", "--model", "./nowhere"),
    ("analyze", "paper"),
    ("data", "check", "./nowhere"),
    ("check", "--model", "./nowhere"),
    ("demo", "--model", "./nowhere"),
    ("chat", "--model", "./nowhere"),
    ("prepare", "nowhere", "--output", "/dev/null/x"),
)
OPTIONS = (
    *("-n", "--seed", "--guidance", "--prior-scale", "--mode", "--device", "--json", "--optim.lr", "--optim.clip"),
    *("--steps", "--batch", "--suite", "--split", "--stage", "--cleanup", "-o", "--prompts", "--resume", "--mix.edit"),
    *("--nonsense", "--SEED", "--seed="),
)
VALUES = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e309",
    "x",
    "",
    " ",
    "None",
    "True",
    "[]",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "../..",
    "/",
    "/dev/full/x",
    "nowhere/nano",
    "~",
    "--",
    "-",
    "\u202e",
)
ODD_VALUES = ("0", "1.5", "0x10", "\uff11", "99999999999999999999")  # right in one reading


def commands(rng: random.Random, bench: Bench) -> Case:
    """One command line with something wrong in it, or none at all."""
    kind = rng.choice(
        ["right", "plan", "plan", "value", "value", "value", "value", "no verb", "no value", "twice", "positional"]
    )
    if kind == "right":
        argv = rng.choice(
            [["--help"], ["--version"], ["info", "nano"], ["generate", "--help"], ["info", "paper", "--gpus", "8"]]
        )
        return Case("right: " + " ".join(argv), lambda: _run(list(argv)), _printable)
    if kind == "plan":
        option, value = rng.choice(["--gpus", "--gpu-memory", "--gpu-tflops"]), rng.choice([*VALUES, *ODD_VALUES])
        judge = _printable if value in ODD_VALUES else None
        return Case(
            f"info {option}",
            lambda: _run(["info", "paper", *([] if option == "--gpus" else ["--gpus", "8"]), option, value]),
            judge,
        )
    argv = _spoiled_line(kind, list(rng.choice(COMMANDS)), rng)
    return Case(f"{argv[0][:12]!a} {kind}", lambda: _run(argv))


def _spoiled_line(kind: str, argv: list[str], rng: random.Random) -> list[str]:
    option, value = rng.choice(OPTIONS), rng.choice([*VALUES, *ODD_VALUES])
    match kind:
        case "value":
            return [*argv, option, value]
        case "no verb":
            return [rng.choice(["", "genrate", "-", "--", "\x1b[2J", "\ud800", "help", "GENERATE"]), *argv[1:]]
        case "no value":
            return [*argv, option]
        case "twice":
            return [*argv, "--seed", "1", "--seed", "2"]
        case _:
            return [argv[0], value, *argv[2:]]
