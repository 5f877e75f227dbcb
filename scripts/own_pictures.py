"""The emoji of docs/own-pictures.md as data of a model, and a judge of what the model draws of them.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python scripts/own_pictures.py write package data/emoji
    python scripts/own_pictures.py judge data/emoji out/emoji --json out/emoji/judged.json
    python scripts/own_pictures.py sheet data/emoji out/emoji out/sheet.png
    python scripts/own_pictures.py losses runs/emoji

`write` puts the pictures on white, a tenth of the names aside in held/, and writes captions, questions, edits and the
mixture files that name them. `judge` compares every PNG of a folder that `starflow2 generate` wrote with all training
pictures: its share counts those whose nearest one, by mean square of the difference, bears the name that was asked for.
`sheet` puts drawn pictures above the true ones, `losses` prints the held-out loss of every stage at every evaluation.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from starflow2.core.images import read_metadata, to_tensor

TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark",
}  # fmt: skip
HELD = 10  # one name in ten is set aside, with all of its pictures
PROMPTS = 100  # names that are drawn to be judged
WHAT, GROUP = "What is this?", "What kind of thing is it?"


@dataclass(frozen=True, slots=True)
class Emoji:
    """One picture: its file, its name without and with the tones of skin, and the group it belongs to."""

    file: str
    name: str
    tones: tuple[str, ...]
    group: str

    @property
    def caption(self) -> str:
        return f"{self.name}, {' and '.join(self.tones)} skin" if self.tones else self.name

    @property
    def is_held(self) -> bool:
        return zlib.crc32(self.name.encode()) % HELD == 0


def read_package(folder: Path) -> Iterator[Emoji]:
    """Every picture that the npm package lists for Google's set."""
    for entry in json.loads((folder / "emoji.json").read_text("utf-8")):
        name, group = entry["name"].lower(), entry["category"].lower()
        variants = {"": entry, **entry.get("skin_variations", {})}
        for key, picture in variants.items():
            if picture["has_img_google"]:
                tones = tuple(dict.fromkeys(TONES[tone] for tone in key.split("-"))) if key else ()
                yield Emoji(picture["image"], name, tones, group)


# -- writing ------------------------------------------------------------------------------------------------------


def write(package: Path, folder: Path) -> None:
    """Write pictures, captions, conversations and mixtures of both parts, and the prompts to judge."""
    emoji = list(read_package(package))
    for part, chosen in (("train", [e for e in emoji if not e.is_held]), ("held", [e for e in emoji if e.is_held])):
        target = folder / part
        target.mkdir(parents=True, exist_ok=True)
        for one in chosen:
            on_white(Image.open(package / "img" / "google" / "64" / one.file)).save(target / one.file)
        write_lines(
            target / "metadata.jsonl", ({"file_name": e.file, "text": e.caption, "name": e.name} for e in chosen)
        )
        write_lines(folder / f"{part}-questions.jsonl", map(question, chosen))
        write_lines(folder / f"{part}-edits.jsonl", edits(chosen))
        write_mixtures(folder, part)
    plain = sorted({e.name for e in emoji if not e.is_held and not e.tones}, key=lambda name: zlib.crc32(name.encode()))
    (folder / "prompts.txt").write_text("\n".join(plain[:PROMPTS]) + "\n", "utf-8")


def on_white(image: Image.Image) -> Image.Image:
    page = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")


def write_lines(path: Path, records: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def question(emoji: Emoji) -> dict[str, Any]:
    shown = [{"type": "image", "image": emoji.file}, {"type": "text", "text": WHAT}]
    said = [shown, emoji.caption, GROUP, emoji.group]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(said)]}


def edits(emoji: list[Emoji]) -> Iterator[dict[str, Any]]:
    """From every picture of a person to the next tone of skin, and from the last one back to the first."""
    for name in sorted({e.name for e in emoji if e.tones}):
        same = [e for e in emoji if e.name == name and len(e.tones) < 2]
        for before, after in zip(same, same[1:] + same[:1], strict=True):
            words = f"make the skin {after.tones[0]}" if after.tones else "make the skin yellow"
            shown = [{"type": "image", "image": before.file}, {"type": "text", "text": words}]
            drawn = [{"type": "image", "image": after.file}]
            yield {"messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": drawn}]}


def write_mixtures(folder: Path, part: str) -> None:
    """PART-draw.json, PART-look.json and PART-joint.json."""
    pictures = str(folder / part)
    draw = {"corpus": "captions", "url": pictures, "weight": 3}
    look = {"corpus": "captions", "url": pictures, "weight": 1, "task": "describe", "question": WHAT}
    asked, edited = (
        {"corpus": "dialogue", "url": str(folder / f"{part}-{name}.jsonl"), "pictures": pictures, "weight": 1}
        for name in ("questions", "edits")
    )
    for name, sources in {"draw": [draw], "look": [look, asked], "joint": [draw, look, asked, edited]}.items():
        (folder / f"{part}-{name}.json").write_text(json.dumps(sources, indent=1) + "\n", "utf-8")


# -- judging ------------------------------------------------------------------------------------------------------


def judge(data: Path, drawn: Path) -> dict[str, Any]:
    """The share of drawn pictures whose nearest training picture bears the name asked for, and that of chance."""
    records = [json.loads(line) for line in (data / "train" / "metadata.jsonl").read_text("utf-8").splitlines()]
    names = [record["name"] for record in records]
    known = np.stack([pixels(data / "train" / record["file_name"]) for record in records])
    rows = []
    for file in sorted(drawn.rglob("*.png")):
        asked = read_metadata(file).get("prompt", "")
        if asked in names:  # a contact sheet has no prompt of its own
            distance = np.square(known - pixels(file)).mean(1)
            rows.append({"file": file.name, "asked": asked, "nearest": names[int(distance.argmin())]})
    if not rows:
        raise SystemExit(f"{drawn} holds no picture whose prompt is the name of a training picture.")
    right = sum(row["asked"] == row["nearest"] for row in rows)
    chance = sum(names.count(row["asked"]) for row in rows) / len(rows) / len(names)
    return {"pictures": len(rows), "right": right / len(rows), "chance": chance, "rows": rows}


def sheet(data: Path, drawn: Path, columns: int = 12, rows: int = 4) -> Image.Image:
    """Drawn pictures, each above the one that the prompt names; the first ones by file name."""
    true = dict[str, Path]()
    for line in (data / "train" / "metadata.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        true.setdefault(record["text"], data / "train" / record["file_name"])
    asked = ((file, read_metadata(file).get("prompt", "")) for file in sorted(drawn.rglob("*.png")))
    pairs = [(file, true[prompt]) for file, prompt in asked if prompt in true][: columns * rows]
    side, gap = Image.open(pairs[0][0]).width, 4
    page = Image.new("RGB", (columns * (side + gap) - gap, rows * (2 * side + 3 * gap) - 3 * gap), "white")
    for i, pair in enumerate(pairs):
        x, y = i % columns * (side + gap), i // columns * (2 * side + 3 * gap)
        for j, file in enumerate(pair):
            page.paste(Image.open(file), (x, y + j * side))
    return page


def losses(run: Path) -> Iterator[str]:
    """A line for every stage: its held-out loss at every evaluation, from before the first step on."""
    for file in sorted(run.glob("metrics-*.jsonl"), key=lambda path: path.stat().st_mtime):
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        found = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
        shown = ", ".join(f"{loss:.4f} at {step}" for step, loss in found)
        yield f"{file.stem.removeprefix('metrics-')}: {shown}"


def pixels(file: Path) -> np.ndarray:
    return to_tensor(Image.open(file)).flatten().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing = verbs.add_parser("write", help="make training data of the npm package")
    writing.add_argument("package", type=Path)
    writing.add_argument("folder", type=Path)
    judging = verbs.add_parser("judge", help="compare drawn pictures with those of training")
    judging.add_argument("folder", type=Path)
    judging.add_argument("drawn", type=Path)
    judging.add_argument("--json", type=Path)
    showing = verbs.add_parser("sheet", help="put drawn pictures above the true ones")
    showing.add_argument("folder", type=Path)
    showing.add_argument("drawn", type=Path)
    showing.add_argument("file", type=Path)
    listing = verbs.add_parser("losses", help="print the held-out losses of a run")
    listing.add_argument("run", type=Path)
    given = parser.parse_args()
    if given.verb == "write":
        write(given.package, given.folder)
    elif given.verb == "sheet":
        sheet(given.folder, given.drawn).save(given.file, optimize=True)
    elif given.verb == "losses":
        print(*losses(given.run), sep="\n")
    else:
        _judge(given)


def _judge(given: argparse.Namespace) -> None:
    found = judge(given.folder, given.drawn)
    print(f"{found['right']:.0%} of {found['pictures']} pictures; by chance {found['chance']:.2%}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
