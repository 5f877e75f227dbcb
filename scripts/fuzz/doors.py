"""Wrong arguments at every public call, files that are none, and data and settings of densities."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzz.cases import ALIENS, Bench, Case, Maker, anything, is_number
from starflow2.core.images import read_metadata, read_picture
from starflow2.core.serialize import read_json
from starflow2.core.text import read_lines, read_text
from starflow2.data.mixture import read_mixture
from starflow2.data.shards import Samples
from starflow2.flow import FitConfig, density
from starflow2.inference.config import DrawConfig
from starflow2.inference.session import Session
from starflow2.models.checkpoint import load_components
from starflow2.models.config import CodecConfig, ExtractorConfig
from starflow2.models.huggingface import stream_class
from starflow2.models.own_codec import build_codec, build_extractor
from starflow2.pipeline import StarFlow2
from starflow2.training.finetune import read_album
from starflow2.training.recipes import find

__all__ = ["arguments", "densities", "modules", "places"]

WORDS, QUESTION = "a red circle", "what color is the circle?"
ODD: tuple[object, ...] = (
    *ALIENS,
    [None],
    [WORDS],
    {WORDS},
    (x for x in WORDS),
    np.array([WORDS]),
    np.bool_(True),
    torch.tensor(True),
    torch.tensor([3]),
    torch.empty((), dtype=torch.int64, device="meta"),
    DrawConfig,
    DrawConfig(),
)


# -- arguments of calls -------------------------------------------------------------------------------------------


def _calls(bench: Bench) -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """Public calls with right arguments, by name."""
    model, image = bench.model, bench.image
    batch = image[None]

    def session(*parts: Any) -> Session:
        return model.session().add(*(parts or (WORDS,)))

    return {
        "generate": (
            model.generate,
            {"prompts": WORDS, "n": 1, "seed": 0, "tries": 1, "config": None, "progress": None},
        ),
        "draw": (model.draw, {"prompts": [WORDS], "seeds": [0], "config": None, "progress": None}),
        "session": (model.session, {"seed": 0, "config": None}),
        "sampler": (model.sampler, {"config": None}),
        "ask": (model.ask, {"image": image, "question": QUESTION}),
        "edit": (model.edit, {"image": image, "instruction": WORDS, "seed": 0, "tries": 1, "config": None}),
        "answers": (model.answers, {"images": [[image]], "questions": [QUESTION], "tokens": 2}),
        "answers_after": (model.answers_after, {"pasts": [[([image, WORDS], [WORDS])]], "questions": [QUESTION]}),
        "tower_answers": (model.tower_answers, {"images": batch, "questions": [QUESTION]}),
        "edits": (model.edits, {"images": batch, "instructions": [WORDS], "seeds": [0]}),
        "tell": (model.tell, {"talks": [[WORDS]], "seeds": [0]}),
        "score": (model.score, {"prompt": [WORDS], "reply": [image]}),
        "invert": (model.invert, {"image": image, "prompt": WORDS}),
        "from_code": (model.from_code, {"code": bench.code, "prompt": WORDS}),
        "roundtrip": (model.roundtrip, {"images": batch, "noise_level": 0.1, "seed": 0}),
        "check_prompt": (model.check_prompt, {"prompt": WORDS}),
        "add": (lambda part: session(part), {"part": WORDS}),
        "run": (
            lambda **settings: list(session().run(**settings)),
            {"tokens": 2, "pictures": 1, "temperature": 0.0, "tries": 1},
        ),
        "write": (lambda **settings: session().write(**settings), {"tokens": 2, "temperature": 0.0}),
        "session.draw": (lambda tries: session().draw(tries=tries), {"tries": 1}),
        "rewind": (lambda mark: session().rewind(mark), {"mark": model.session().mark()}),
        "load": (Session.load, {"path": bench.session_file, "sampler": model.sampler()}),
        "Session": (Session, {"sampler": model.sampler(), "seed": 0}),
    }


def arguments(rng: random.Random, bench: Bench) -> Case:
    """One public call with one argument of another kind."""
    calls = _calls(bench)
    name = rng.choice(list(calls))
    call, right = calls[name]
    argument, value = rng.choice(list(right)), rng.choice(ODD)
    if argument in ("n", "tokens", "pictures", "tries") and is_number(value) and float(value) > 2:  # type: ignore[arg-type]
        value = 2  # more would be right as well, and take as long as it takes
    what = f"{name}({argument}={type(value).__name__})"
    judge = anything if _may_be(argument, value, right[argument]) else None
    return Case(what, lambda: call(**(right | {argument: value})), judge)


def _may_be(argument: str, value: object, right: object) -> bool:
    """True for values that may be right in their place, or make the call one of no rows."""
    if isinstance(value, str) or type(value) is type(right) or value is None:
        return True
    if argument == "progress":
        return callable(value)
    if argument == "prompts" and isinstance(value, list | tuple):
        return all(isinstance(item, str) for item in value)
    if isinstance(value, list | tuple | Tensor) and isinstance(right, list | tuple):
        return True
    if argument == "config":
        return isinstance(value, DrawConfig)
    return is_number(value) and isinstance(right, int | float) and (isinstance(right, float) or _is_whole(value))


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer)


# -- files that are none ------------------------------------------------------------------------------------------


def places(rng: random.Random, bench: Bench) -> Case:
    """A reader that is given the name of something else than a file, or a folder with such a thing in it."""
    kind = rng.choice(["pipe", "device", "loop", "folder", "nothing", "huge"])
    readers: Mapping[str, Callable[[Path], object]] = {
        "picture": lambda path: read_picture(path, 32),
        "metadata": read_metadata,
        "text": read_text,
        "lines": read_lines,
        "json": read_json,
        "session": lambda path: Session.load(path, bench.model.sampler()),
        "mixture": read_mixture,
        "model": StarFlow2.from_pretrained,
        "album": lambda path: read_album(path, 32),
        "jsonl": lambda path: list(Samples(str(path), "jsonl")),
        "tar": lambda path: list(Samples(str(path), "tar")),
    }
    if rng.random() < 0.5:
        name = rng.choice(list(readers))
        if name in ("jsonl", "tar") and kind == "huge":  # zeros are an empty tar, and one line that is too long
            kind = "pipe"
        path = bench.home / "places" / f"{kind}.{'tar' if name == 'tar' else 'jsonl' if name == 'jsonl' else 'png'}"
        return Case(f"{name} of a {kind}", lambda: readers[name](_put(path, kind)))
    if rng.random() < 0.5:
        return _model_with(rng, bench, kind)
    return _corpus_with(rng, bench, kind)


def _model_with(rng: random.Random, bench: Bench, kind: str) -> Case:
    """A model folder one file of which is such a thing."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "lexicon.txt", "vlm/model.safetensors")
    name = rng.choice(names)

    def call() -> object:
        folder = bench.copy_of_folder()
        _put(folder / name, kind)
        return load_components(folder)

    return Case(
        f"model with a {kind} as {name}", call, anything if (name, kind) == ("lexicon.txt", "nothing") else None
    )


def _corpus_with(rng: random.Random, bench: Bench, kind: str) -> Case:
    """A folder of images with such a thing in it, read to its end; it counts as damaged, or not at all."""
    name = rng.choice(["a.png", "a.txt", "a.jsonl", "a.tar", "a.parquet", "metadata.jsonl"])

    def call() -> object:
        folder = bench.home / "corpus of places"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(bench.image_file, folder / "b.png")
        (folder / "b.txt").write_text(WORDS, encoding="utf-8")
        _put(folder / name, kind if kind != "huge" else "pipe")
        return list(Samples(str(folder)))

    return Case(f"corpus with a {kind} as {name}", call, anything)


def _put(path: Path, kind: str) -> Path:
    """Let `path` be a thing of this kind and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "folder":
            path.mkdir()
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 30)
    return path


# -- modules of users ---------------------------------------------------------------------------------------------

LINES = (
    "import sys; sys.exit(1)",
    "raise SystemExit('away')",
    "1 / 0",
    "def (",
    "import no_such_package",
    "raise ValueError('two\\nlines \\x1b[2J')",
    "import os; os._no_such_thing",
    "recipe = 3",
    "def recipe(): raise SystemExit",
    "def recipe(): return {}",
    "def recipe(name): return name",
    "recipe = __import__('starflow2.errors').errors.ConfigError",
)


def modules(rng: random.Random, bench: Bench) -> Case:
    """A module of a user by its name, at every door that takes one: it fails, exits, or is something else."""
    name = rng.choice(
        ["fuzzed_recipe:recipe"] * 6 + ["fuzzed_recipe:", ":recipe", "..x:recipe", "a b:c", "\ud800:x", "os:"]
    )
    source = rng.choice(LINES)
    cfg = bench.model.components.cfg
    readers: dict[str, Callable[[], object]] = {
        "recipe": lambda: find(name),
        "codec": lambda: build_codec(CodecConfig(codec=name, latent_dim=4, grid=(2, 2), image_size=32)),
        "extractor": lambda: build_extractor(ExtractorConfig(extractor=name, feature_dim=4, grid=(2, 2))),
        "stream": lambda: stream_class(replace(cfg.vlm, stream=name)),
    }
    door = rng.choice(list(readers))

    def call() -> object:
        (bench.home / "fuzzed_recipe.py").write_text(source + "\n", encoding="utf-8")
        sys.modules.pop("fuzzed_recipe", None)
        importlib.invalidate_caches()
        with contextlib.chdir(bench.home):
            return readers[door]()

    return Case(f"{door} of a module", call)


# -- densities ----------------------------------------------------------------------------------------------------


def densities(rng: random.Random, bench: Bench) -> Case:
    """The facade of the flow library with one wrong thing: a setting, data, a context, a count."""
    makers: tuple[Maker, ...] = (_setting, _data, _data, _context, _count)
    return rng.choice(makers)(rng, bench)


def _setting(rng: random.Random, bench: Bench) -> Case:
    right: dict[str, Any] = {"shape": 3, "context": 0, "spacing": None, "width": 32, "blocks": 2, "depth": 1, "seed": 0}
    name, value = rng.choice(list(right)), rng.choice(ODD)
    is_right = is_number(value) or (name in ("context", "spacing") and value is None)
    is_right = is_right or (name == "shape" and isinstance(value, list | tuple) and bool(value))
    what = f"density({name}={type(value).__name__})"
    return Case(what, lambda: density(**(right | {name: value})), anything if is_right else None)


def _rows(count: int = 24) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


def _data(rng: random.Random, bench: Bench) -> Case:
    """Rows that no density can have, to `fit` and to `log_prob`."""
    x = _rows()
    spoilt = x.clone()
    spoilt[rng.randrange(24), rng.randrange(3)] = rng.choice([math.nan, math.inf, -math.inf])
    wrong: tuple[object, ...] = (
        *(a for a in ALIENS if not isinstance(a, list)),
        spoilt,
        x[:, :2],
        x[0],
        x[None],
        x.to(torch.complex64),
        x.to("meta"),
        x.to_sparse(),
        [[1.0, 2.0, 3.0], [1.0]],
        {"a": [1.0]},
    )
    no_data = (torch.ones(24, 3), x.round(), x > 0, x[:1], x[:0], x[:1].expand(24, -1))
    steps = FitConfig(steps=2, batch=8)
    if rng.random() < 0.5:
        value = rng.choice(wrong)
        return Case(f"log_prob({type(value).__name__})", lambda: density(3, width=32, blocks=2).log_prob(value))  # type: ignore[arg-type]
    bad: Any = rng.choice([*wrong, *no_data])
    return Case(f"fit({type(bad).__name__})", lambda: density(3, width=32, blocks=2).fit(bad, config=steps))


def _context(rng: random.Random, bench: Bench) -> Case:
    x = _rows()
    wrong: Any = rng.choice(
        [
            None,
            "x",
            4,
            -1,
            10**30,
            {},
            object(),
            torch.zeros(7, dtype=torch.int64),
            torch.full((24,), 9),
            torch.zeros(24, 5),
            torch.full((24, 4), math.nan),
            torch.zeros(24, 1, 1, 4),
            torch.zeros(24, 4, dtype=torch.complex64),
            torch.zeros(24),
        ]
    )
    model = density(3, context=4, width=32, blocks=2)
    calls: dict[str, Callable[[], object]] = {
        "log_prob": lambda: model.log_prob(x, wrong),
        "sample": lambda: model.sample(24, wrong),
        "fit": lambda: model.fit(x, wrong, FitConfig(steps=2, batch=8)),
    }
    name = rng.choice(list(calls))
    return Case(f"{name} with context {type(wrong).__name__}", calls[name])


def _count(rng: random.Random, bench: Bench) -> Case:
    model = density(3, width=32, blocks=2)
    value: Any = rng.choice([a for a in ODD if not (is_number(a) and 0 < float(a) < 100)])  # type: ignore[arg-type]
    if rng.random() < 0.5 and value is not None:
        return Case(f"generator {type(value).__name__}", lambda: model.sample(2, generator=value))
    return Case(f"sample {type(value).__name__}", lambda: model.sample(value))
