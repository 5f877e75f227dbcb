"""Spoiled models: configs, weights, tokenizers, saved sessions, states of training runs, adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fuzz.cases import Bench, Case, anything, flipped, shortened, spoiled_number
from starflow2.core.serialize import from_dict
from starflow2.data.mixture import BatchConfig
from starflow2.flow import Jacobi, SampleConfig
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.session import Session
from starflow2.models.checkpoint import load_components, load_words
from starflow2.models.config_file import read_config
from starflow2.models.lora import LoraConfig
from starflow2.training.finetune import FinetuneConfig
from starflow2.training.loop import fit
from starflow2.training.recipes import nano, paper

__all__ = [
    "configs",
    "metadata_of",
    "saved_configs",
    "sessions",
    "spoil_bytes",
    "spoil_metadata",
    "spoil_tensors",
    "states",
    "tokenizers",
    "weights",
]


# -- configs as objects -------------------------------------------------------------------------------------------


@cache
def _configs() -> tuple[Any, ...]:
    """Every config object below two recipes, and those of sampling and fine-tuning."""
    roots = (
        nano(),
        paper(),
        DrawConfig(),
        SampleConfig(),
        ReplyLimits(),
        FinetuneConfig(),
        LoraConfig(),
        Jacobi(),
        BatchConfig(rows=2, width=9),
    )
    return tuple(config for root in roots for config in _below(root))


def _below(value: object) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from _below(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _below(item)


def configs(rng: random.Random, bench: Bench) -> Case:
    """One config with a value that no field of its type can have, made by its constructor or read from a dictionary."""
    config = rng.choice(_configs())
    field = rng.choice(dataclasses.fields(config))
    value = getattr(config, field.name)
    bad = _bad_for(value, rng)
    what = f"{type(config).__name__}.{field.name}: {type(bad).__name__}"
    is_text = isinstance(value, str) and isinstance(bad, str)
    judge = anything if is_text or (field.name == "seed" and isinstance(bad, int)) else None
    if rng.random() < 0.25:
        tree = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)} | {field.name: bad}
        return Case(f"dict {what}", lambda: from_dict(type(config), tree), judge)
    return Case(what, lambda: dataclasses.replace(config, **{field.name: bad}), judge)


def _bad_for(value: object, rng: random.Random) -> object:
    """A value that cannot stand where `value` stands."""
    if isinstance(value, bool):
        return rng.choice([1.5, "yes", [], 7, math.nan, b"1"])
    if isinstance(value, int | float):
        wrong = spoiled_number(rng)
        while wrong is None:  # "not set" is a reading of its own
            wrong = spoiled_number(rng)
        return wrong
    if isinstance(value, str):
        return rng.choice([5, 1.5, [], {}, b"x", math.nan, True, "\x00", "nonsense"])
    return rng.choice([5, "nonsense", math.nan, [None], {"a": 1}, b"x", object()])


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# -- configs in files ---------------------------------------------------------------------------------------------


def saved_configs(rng: random.Random, bench: Bench) -> Case:
    """A model folder whose config.json has something wrong in it, read, or loaded whole."""
    folder = bench.copy_of_folder() if rng.random() < 0.3 else bench.home / "config only"
    folder.mkdir(exist_ok=True)
    whole = (bench.folder / "config.json").read_bytes()
    what, text, is_wrong = _config_text(whole, rng)
    (folder / "config.json").write_bytes(text)
    loads = (folder / "model.safetensors").exists()
    call: Callable[[], object] = (lambda: load_components(folder)) if loads else (lambda: read_config(folder))
    return Case(f"{'load' if loads else 'read'}: {what}", call, None if is_wrong else anything)


def _config_text(whole: bytes, rng: random.Random) -> tuple[str, bytes, bool]:
    """A change, the text of the file after it, and True if it must be refused."""
    kind = rng.choice(["leaf", "leaf", "leaf", "leaf", "missing", "extra", "format", "bytes"])
    tree = json.loads(whole)
    places = [(holder, key, path) for holder, key, path in _leaves(tree) if not path.startswith("weights")]
    holder, key, path = rng.choice(places)
    if kind == "leaf":
        bad = _bad_leaf(holder[key], rng)
        is_wrong = not (bad is None or (isinstance(holder[key], str) and isinstance(bad, str)))
        holder[key] = bad
        return f"leaf {path.split('.')[0]} {type(bad).__name__}", json.dumps(tree).encode(), is_wrong
    if kind == "missing":
        if isinstance(holder, dict):
            del holder[key]
        return "missing", json.dumps(tree).encode(), isinstance(holder, dict) and not path.startswith("digests")
    if kind == "extra":
        inner = tree["model"]
        inner[rng.choice(["wdith", "\x1b]0;owned\x07", "", "a" * 1000])] = 1
        return "extra", json.dumps(tree).encode(), True
    if kind == "format":
        tree["format"] = rng.choice([99, "6", -1, None, 1.5, "\x1b[2J", True, [], 10**30])
        return "format", json.dumps(tree).encode(), True
    return "bytes", _spoiled_text(whole, rng), True


def _spoiled_text(text: bytes, rng: random.Random) -> bytes:
    brackets = b'{"format": 6, "model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    doubled = text.replace(b'"name"', b'"name": "x", "name"', 1)
    return rng.choice(
        [
            text[: len(text) // 2],
            b"",
            b"null",
            b"[]",
            brackets,
            doubled,
            b"\xff\xfe\x00",
            text + b",",
            b"NaN",
            text.replace(b"1", b"NaN", 1),
        ]
    )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in pairs:
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list):
            yield from _leaves(value, here)
        else:
            yield tree, key, here


def _bad_leaf(value: object, rng: random.Random) -> object:
    if isinstance(value, bool):
        return rng.choice([1, "yes", [], 2.5])
    if isinstance(value, int):
        return rng.choice([-1, 10**11, 10**30, "3", 1.5, [], {}, "x", True])
    if isinstance(value, float):
        return rng.choice(["x", [], {}, -(10.0**30), True, "nan"])
    if isinstance(value, str):
        return rng.choice([5, [], {}, True, 1.5])
    return rng.choice(["x", [], -1, True, {"a": 1}])


# -- weights ------------------------------------------------------------------------------------------------------


def weights(rng: random.Random, bench: Bench) -> Case:
    """A model folder with a spoiled file of weights or words, loaded."""
    folder = bench.copy_of_folder()
    if rng.random() < 0.12:
        name = rng.choice(
            ["model.safetensors", "tokenizer.json", "config.json", "vlm/model.safetensors", "lexicon.txt"]
        )
        return _spoiled_place(folder, name, rng)
    name = rng.choice(["model.safetensors", "vlm/model.safetensors", "features/model.safetensors"])
    what = spoil_tensors(folder / name, rng)
    return Case(f"{name}: {what}", lambda: load_components(folder))


def _spoiled_place(folder: Path, name: str, rng: random.Random) -> Case:
    path = folder / name
    how = rng.choice(["gone", "empty", "folder", "junk"])
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(b"" if how == "empty" else rng.randbytes(300))
    judge = anything if name == "lexicon.txt" and how == "gone" else None
    return Case(f"{name}: {how}", lambda: load_components(folder), judge)


def spoil_tensors(path: Path, rng: random.Random) -> str:
    """Change one thing of a safetensors file; returns what."""
    kind = rng.choice(["nan", "inf", "int", "shape", "gone", "more", "cut", "header", "payload", "scalar", "name"])
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    if kind in ("cut", "header", "payload"):
        path.write_bytes(
            {
                "cut": shortened(data, rng),
                "header": flipped(data[:head], rng) + data[head:],
                "payload": _payload_flip(data, head, rng),
            }[kind]
        )
        return kind
    tensors, meta = load_file(path), metadata_of(path)
    _change(tensors, kind, rng)
    save_file(tensors, path, meta)
    return kind


def _payload_flip(data: bytes, head: int, rng: random.Random) -> bytes:
    return flipped(data, rng, head)


def metadata_of(path: Path) -> dict[str, str] | None:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] | None = file.metadata()
    return found


def _change(tensors: dict[str, Tensor], kind: str, rng: random.Random) -> None:
    """Spoil one tensor in place of the dictionary."""
    floats = [name for name, value in tensors.items() if value.is_floating_point() and value.numel() > 1]
    name = rng.choice(sorted(floats))
    value = tensors[name]
    match kind:
        case "nan" | "inf":
            spoiled = value.clone()
            spoiled.view(-1)[rng.randrange(value.numel())] = (
                math.nan if kind == "nan" else rng.choice([math.inf, -math.inf])
            )
            tensors[name] = spoiled
        case "int":
            tensors[name] = value.to(rng.choice([torch.int32, torch.int64, torch.uint8, torch.bool]))
        case "shape":
            flat = value.reshape(-1)
            tensors[name] = rng.choice(
                [flat[:-1].clone(), flat.clone() if value.ndim > 1 else flat[None].clone(), value[None].clone()]
            )
        case "gone":
            del tensors[name]
        case "more":
            tensors[rng.choice(["extra", "flow.extra.weight", "\x1b[2J"])] = torch.zeros(3)
        case "scalar":
            tensors[name] = torch.tensor(0.5)
        case _:
            tensors[name + "x"] = tensors.pop(name)


def tokenizers(rng: random.Random, bench: Bench) -> Case:
    """A tokenizer.json with something wrong in it, loaded with the config beside it."""
    folder = bench.home / "tokenizer only"
    folder.mkdir(exist_ok=True)
    shutil.copy(bench.folder / "config.json", folder)
    whole = (bench.folder / "tokenizer.json").read_bytes()
    kind = rng.choice(["cut", "flipped", "leaf", "leaf", "dropped", "junk"])
    if kind in ("leaf", "dropped"):
        tree = json.loads(whole)
        holder, key, _ = rng.choice([p for p in _leaves(tree) if isinstance(p[0], dict)])
        if kind == "leaf":
            holder[key] = rng.choice([None, -1, 10**11, "x", [], {}, 1.5])
        else:
            del holder[key]
        text = json.dumps(tree).encode()
    else:
        text = {
            "cut": shortened(whole, rng),
            "flipped": flipped(whole, rng),
            "junk": rng.choice([b"", b"null", b"[]", b"{}", b"[" * 99_999]),
        }[kind]
    (folder / "tokenizer.json").write_bytes(text)
    # letters of an entry may be others without any trace of it
    return Case(f"tokenizer {kind}", lambda: load_words(folder), None if kind in ("cut", "junk") else anything)


# -- sessions -----------------------------------------------------------------------------------------------------


def sessions(rng: random.Random, bench: Bench) -> Case:
    """A saved conversation with something changed, loaded."""
    path = bench.home / "changed.safetensors"
    shutil.copy(bench.session_file, path)
    sampler = bench.model.sampler
    kind = rng.choice(["meta", "meta", "tensor", "tensor", "tensor", "bytes"])
    if kind != "meta":
        what = spoil_tensors(path, rng) if kind == "tensor" else spoil_bytes(path, rng)
        return Case(f"session {what}", lambda: Session.load(path, sampler()))
    tensors, meta = load_file(path), dict(metadata_of(path) or {})
    what = spoil_metadata(meta, rng)
    save_file(tensors, path, meta)
    return Case(f"session {what}", lambda: Session.load(path, sampler()))


def spoil_bytes(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    kind, spoiled = rng.choice(
        [("cut", shortened(data, rng)), ("flip", flipped(data, rng)), ("empty", b""), ("junk", rng.randbytes(500))]
    )
    path.write_bytes(spoiled)
    return kind


def spoil_metadata(meta: dict[str, str], rng: random.Random) -> str:
    """Change one value of the metadata, or drop it; returns which."""
    name = rng.choice(sorted(meta))
    if rng.random() < 0.2:
        del meta[name]
        return f"without {name}"
    try:
        tree = json.loads(meta[name])
    except ValueError:
        tree = None
    if not isinstance(tree, dict | list) or rng.random() < 0.2:
        meta[name] = rng.choice(["", "x", "[]", "null", "{", "[" * 99_999, "\x1b[2J", "5"])
        return f"text of {name}"
    holder, key, path = rng.choice(list(_leaves(tree)))
    old = copy.copy(holder[key])
    wrong: list[Any] = [-1, 1.5, "x", [], {}, 10**11, True, -(2**70)]
    holder[key] = rng.choice([value for value in wrong if value != old])
    meta[name] = json.dumps(tree)
    return f"{name} {path.split('.')[-1]}"


# -- states of training -------------------------------------------------------------------------------------------


@cache
def _run_folder(bench: Bench) -> tuple[Path, Any]:
    """A training run stopped half-way, and its settings for going on."""
    folder = bench.home / "run"
    run = bench.cases.tiny_run(2, 1)
    bench.cases.tiny_folder(folder)
    fit(_of_steps(run, 2), "t2i", folder)
    return folder, _of_steps(run, 3)


def _of_steps(run: Any, steps: int) -> Any:
    stages = tuple(dataclasses.replace(s, steps=steps) if s.name == "t2i" else s for s in run.stages)
    return dataclasses.replace(run, stages=stages)


def states(rng: random.Random, bench: Bench) -> Case:
    """A training run that is to go on from a spoiled state."""
    source, run = _run_folder(bench)
    folder = bench.home / "spoiled run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = folder / "state-t2i.safetensors"
    kind = rng.choice(["tensor", "tensor", "tensor", "meta", "meta", "bytes", "group"])
    if kind == "tensor":
        what = spoil_tensors(path, rng)
    elif kind == "bytes":
        what = spoil_bytes(path, rng)
    else:
        tensors, meta = load_file(path), dict(metadata_of(path) or {})
        if kind == "group":
            what = rng.choice(["ema/", "optim/", "weights/"])
            tensors = {name: value for name, value in tensors.items() if not name.startswith(what)}
        else:
            name = rng.choice(["step", "skipped", "seed", "stage", "precision"])
            what, meta[name] = name, rng.choice(["-1", "x", "", "1.5", "[]", "null", "99", "{", "nan", "9" * 400])
        save_file(tensors, path, meta)
        if what == "skipped" and meta[what] == "99":  # a count of its own, which nothing contradicts
            return Case("state skipped", lambda: fit(run, "t2i", folder), anything)
    return Case(f"state {what}", lambda: fit(run, "t2i", folder))
