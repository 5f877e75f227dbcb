"""Spoiled corpora: files of mixtures, records of each corpus, shards; and spoiled results of suites."""

from __future__ import annotations

import copy
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
from PIL import Image

from fuzz.cases import ALIENS, Bench, Case, anything, flipped, shortened
from starflow2.core.dialogue import Dialogue
from starflow2.core.ledger import append_line
from starflow2.data.corpora import to_dialogue
from starflow2.data.mixture import read_mixture
from starflow2.data.shards import Format, Sample, Samples
from starflow2.evals.report import KeptRows
from starflow2.evals.suite import check_lock, lock_text
from starflow2.research.paper_claims import write_claims
from starflow2.training.finetune import read_album

__all__ = ["albums", "mixtures", "records", "results", "shards", "spoil_tree", "spoiled_json"]


def _png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((24, 24, 3), 90, np.uint8)).save(out, format="PNG")
    return out.getvalue()


PNG = _png()


def spoiled_json(text: bytes, rng: random.Random) -> bytes:
    """JSON that is none, or has no one reading."""
    return rng.choice(
        [
            shortened(text, rng),
            b"",
            b"null",
            b"5",
            b'"x"',
            b"[" * 100_000,
            b'{"a":' * 50_000,
            text + b"}",
            text.replace(b":", b";", 1),
            b"\xff\xfe" + text,
            text.replace(b'"', b"'"),
            b"\x00" * 50,
            b"NaN",
            b"[Infinity]",
            b'{"a": 1, "a": 2}',
            b"1" * 5000,
        ]
    )


# -- mixtures -----------------------------------------------------------------------------------------------------


def mixtures(rng: random.Random, bench: Bench) -> Case:
    """One mixture file, read."""
    entry: dict[str, Any] = {"corpus": "cc12m", "url": "a/*.tar", "weight": 3.0, "format": "auto", "pictures": ""}
    sources = [dict(entry) for _ in range(rng.choice([1, 2, 3]))]
    kind = rng.choice(["right", "field", "field", "field", "missing", "extra", "shape", "text"])
    place = sources[-1]
    name = rng.choice(list(entry))
    judge: Callable[[Any], bool] | None = None
    if kind == "right":
        judge = lambda got: len(got) == len(sources)  # noqa: E731
    elif kind == "field":
        place[name] = rng.choice([-1, 0, "x", None, [], {}, True, float("nan"), float("inf"), 1e400, "\ud800", 10**400])
        judge = anything if name in ("url", "pictures") and isinstance(place[name], str) else None
    elif kind == "missing":
        del place[name]
        judge = anything if name in ("format", "pictures") else None
    elif kind == "extra":
        place[rng.choice(["wieght", "\x1b[2J", "url "])] = 1
    text = json.dumps(sources).encode()
    if kind == "shape":
        text = json.dumps(rng.choice([[], {}, [1], [[]], sources[0], "x"])).encode()
    if kind == "text":
        text = spoiled_json(text, rng)
    return Case(
        f"mixture {kind} {name if kind == 'field' else ''}", lambda: read_mixture(bench.file("mix.json", text)), judge
    )


# -- records of corpora -------------------------------------------------------------------------------------------

HUMAN, GPT = {"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a fox"}
RECORDS: dict[str, dict[str, Any]] = {
    "captions": {"png": PNG, "txt": b"a kite"},
    "cc12m": {"jpg": PNG, "txt": b"a kite"},
    "blip3o": {"jpg": PNG, "txt": b"a kite"},
    "journeydb": {"json": {"img_path": "a.png", "prompt": "a fox --ar 3:2", "Task2": {"Caption": "a fox"}}},
    "cambrian": {"json": {"image": "a.png", "conversations": [HUMAN, GPT]}},
    "omniedit": {
        "omni_edit_id": "1",
        "src_img": {"bytes": PNG, "path": None},
        "edited_img": {"bytes": PNG, "path": None},
        "edited_prompt_list": ["make it red"],
    },
    "pico-banana": {"json": {"local_input_image": "a.png", "text": "make it red", "output_image": "a.png"}},
    "comm": {
        "json": {
            "title": "tea",
            "step_info": [[{"type": "text", "content": "boil"}, {"type": "image", "image_path": "a.png"}]],
        }
    },
    "zebra-cot": {
        "Question": "what? <image_start>[problem_image_1]<image_end>",
        "Text Reasoning Trace": "so [reasoning_image_1]",
        "Final Answer": "tea",
        "problem_image_1": {"bytes": PNG, "path": None},
        "reasoning_image_1": {"bytes": PNG, "path": None},
    },
}


def records(rng: random.Random, bench: Bench) -> Case:
    """One record of a corpus with a wrong value in some field, as a conversation."""
    corpus = rng.choice(list(RECORDS))
    fields = copy.deepcopy(RECORDS[corpus])
    bench.file("a.png", PNG)
    kind = rng.choice(["right", "value", "value", "value", "value", "missing", "bytes"])
    if kind in ("value", "missing"):
        spoil_tree(fields, rng, drops=kind == "missing")
    if isinstance(fields.get("json"), dict):
        text = json.dumps(fields["json"], default=str).encode()
        fields["json"] = spoiled_json(text, rng) if kind == "bytes" else text
    elif kind == "bytes":
        name = rng.choice(list(fields))
        fields[name] = rng.choice([b"", b"\xff\xfe\x00", PNG[:20], "\ud800", b"\x00" * 10])
    sample = Sample(str(bench.home / "files" / "a.jsonl"), "1", fields)
    # a field may be one that the corpus does not need, so that taking the record is right as well
    return Case(f"{corpus} {kind}", lambda: to_dialogue(corpus, sample), lambda got: isinstance(got, Dialogue))


def spoil_tree(tree: Any, rng: random.Random, *, drops: bool) -> None:
    """Put a wrong value, or none, in one place of nested dictionaries and lists."""
    places = list(_places(tree))
    holder, key = rng.choice(places)
    if drops:
        del holder[key]
        return
    wrong = [a for a in ALIENS if isinstance(a, str | int | float | list | dict | type(None) | bytes)]
    holder[key] = rng.choice(
        [
            *wrong,
            "../../etc/passwd",
            "/etc/passwd",
            "http://example.org/a.png",
            "a\x00.png",
            "<image>" * 50,
            [None],
            {"bytes": 5},
        ]
    )


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in pairs:
        yield tree, key
        yield from _places(value)


# -- files of samples ---------------------------------------------------------------------------------------------


def shards(rng: random.Random, bench: Bench) -> Case:
    """One file of samples, whole or spoiled, read through to its end; what cannot be read becomes a damaged sample."""
    kind = rng.choice(["tar", "tar", "jsonl", "parquet", "folder", "name"])
    format = rng.choice(get_args(Format)) if rng.random() < 0.1 else "auto"
    if kind == "name":
        url: Any = rng.choice(
            [
                "",
                "~",
                "nowhere",
                "./nowhere/*.tar",
                "a\x00b",
                "http://",
                "s3://x/y",
                "[",
                "***",
                "{1..",
                "\ud800",
                "/dev/zero",
                "/proc/**",
                "/proc",
                "/sys/*/*.tar",
                "/",
                "/**/*.parquet",
                "file:///proc/self/**",
                ".",
            ]
        )
        return Case("shards name", lambda: _all(url, format), anything if url in (".", "~") else None)
    name, data = _shard(kind, rng)
    spoiled = [data, shortened(data, rng), flipped(data, rng), b"", data + rng.randbytes(600)]
    path = bench.file(name, rng.choice(spoiled))
    return Case(f"shards {kind}", lambda: _all(str(path), format), anything)


def _all(url: str, format: Any) -> list[Sample]:
    return list(Samples(url, format))


def _shard(kind: str, rng: random.Random) -> tuple[str, bytes]:
    if kind == "jsonl":
        lines = [json.dumps({"text": f"picture {i}", "image": "a.png"}) for i in range(5)]
        lines.insert(
            rng.randrange(5), rng.choice(["", "{", "null", "[" * 9999, "\ufeff{}", '{"a":' * 9999, "5", "x" * 10**6])
        )
        return "lines.jsonl", "\n".join(lines).encode()
    if kind == "parquet":
        return "rows.parquet", b"PAR1" + rng.randbytes(rng.randrange(200)) + b"PAR1"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        names = [
            "0.png",
            "0.txt",
            "1.png",
            "1.txt",
            "2.txt",
            rng.choice(["../x.png", "/x.png", "._0.png", "a b.png", "\u202e.txt", "x" * 200 + ".txt"]),
        ]
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            info.type = rng.choice([tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.LNKTYPE])
            tar.addfile(info, io.BytesIO(PNG))
    return rng.choice(["pairs.tar", "pairs.tar", "pairs.tar.gz", "pairs.TAR"]), out.getvalue()


def albums(rng: random.Random, bench: Bench) -> Case:
    """A folder of images with words beside them, as fine-tuning reads it."""
    folder = bench.home / f"album{rng.randrange(8)}"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    caption = rng.choice(
        [
            b"a red circle",
            b"",
            b"\xef\xbb\xbfa red circle",
            b"\xff\xfea\x00",
            b"\x00",
            "würfel".encode(),
            b"a\nb",
            b"\x1b[2J",
        ]
    )
    picture = rng.choice([PNG, PNG, b"", PNG[:40], flipped(PNG, rng), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
    (folder / "a.png").write_bytes(picture)
    if rng.random() < 0.8:
        (folder / "a.txt").write_bytes(caption)
    if rng.random() < 0.2:
        (folder / rng.choice(["._a.png", "A.PNG", "b.gif", ".DS_Store"])).write_bytes(b"\x00\x05\x16\x07")

    def right(album: Any) -> bool:
        return all(w.isprintable() and "\ufeff" not in w for w in album.words) and bool((album.images.abs() <= 1).all())

    return Case("album", lambda: read_album(folder, 32), right)


# -- results ------------------------------------------------------------------------------------------------------


def results(rng: random.Random, bench: Bench) -> Case:
    """Files that suites and analyses keep: the lock of frozen items, kept rows, ledgers, results for the claims."""
    kinds = (_lock, _lock, _claims, _rows, _ledger)
    return rng.choice(kinds)(rng, bench)


def _lock(rng: random.Random, bench: Bench) -> Case:
    right = json.loads(lock_text())
    spoiled = copy.deepcopy(right)
    spoil_tree(spoiled, rng, drops=rng.random() < 0.3)
    if rng.random() < 0.1:
        spoiled = rng.choice([[], None, 5, "x", {}])
    judge = anything if spoiled == right else None
    return Case("lock", lambda: check_lock(spoiled, right), judge)


def _claims(rng: random.Random, bench: Bench) -> Case:
    folder = bench.home / "claims"
    folder.mkdir(exist_ok=True)
    for name in ("compare.json", "skips.json", "turns.json", "world.json"):
        tree: Any = rng.choice(
            [{}, [], 5, None, {"arms": []}, {"rows": {}}, {"mean": "x"}, {"visual": {"ratio": None}}]
        )
        text = json.dumps(tree).encode()
        (folder / name).write_bytes(spoiled_json(text, rng) if rng.random() < 0.4 else text)
    return Case("claims", lambda: write_claims(folder))


def _rows(rng: random.Random, bench: Bench) -> Case:
    text = b'{"config": {"a": 1}, "rows": [{"x": 2}]}'
    rows = json.dumps({"config": {"a": 1}, "rows": rng.choice([None, 5, "x", [5], {"a": 1}, [None]])}).encode()
    path = bench.file("rows.json", spoiled_json(text, rng) if rng.random() < 0.5 else rows)
    return Case("kept rows", lambda: KeptRows(path, {"a": 1}).read())


def _ledger(rng: random.Random, bench: Bench) -> Case:
    record: Any = rng.choice([{"a": float("nan")}, {"a": "\ud800"}, {"a": "\x1b[2J"}, {"a": "x" * 10**6}])
    path = rng.choice([bench.home / "ledger.jsonl", bench.home / "no\x00name", bench.image_file / "ledger"])
    return Case("ledger", lambda: append_line(path, record), None if path.name != "ledger.jsonl" else anything)
