"""Tiny corpora with invented content, written to a folder exactly as the real ones are published."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from starflow2.core.dialogue import Turn
from starflow2.core.images import to_tensor
from starflow2.data.records import Photo
from starflow2.models.sequence import Image as Picture
from starflow2.models.sequence import Layout, Segment, Text

SIDE = 24  # pixels of a side of every image
LAYOUT = Layout(grid=(2, 2), begin=1, end=2, latent=3, pad=0)


class Letters:
    """A tokenizer whose tokens are characters; 4, 5 and 6 stand for user, assistant and end."""

    def document(self, turns: Sequence[Turn[Photo]]) -> list[Segment]:
        segments: list[Segment] = []
        for turn in turns:
            segments += [Text((4,)), *self._parts(turn.user, False)]
            segments += [Text((5,)), *self._parts(turn.assistant, True), Text((6,), is_target=True)]
        return segments

    @staticmethod
    def _parts(parts: Iterable[object], is_target: bool) -> list[Segment]:
        return [
            Text(tuple(10 + ord(c) for c in part), is_target) if isinstance(part, str) else Picture(is_target)
            for part in parts
        ]


def pixels(number: int) -> np.ndarray:
    """An invented image, another one for every number: a gradient, so that JPEG keeps it recognisable."""
    ramp = np.linspace(0, 1, SIDE)
    colour = np.random.default_rng(number).uniform(60, 255, 3)
    return (ramp[:, None, None] * ramp[None, :, None] * colour).astype(np.uint8)


def encoded(number: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, format=format, quality=95)
    return buffer.getvalue()


def image_of(number: int) -> Tensor:
    """The tensor that a model reads of an image that was written without loss."""
    return to_tensor(pixels(number))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def write_picture(path: Path, number: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))
    return path.name


def captioned(path: Path, count: int, first: int = 0, words: Callable[[int], str] = "picture {}".format) -> Path:
    """A tar of `count` good pairs."""
    return write_tar(
        path,
        (
            member
            for i in range(first, first + count)
            for member in ((f"{i:06d}.png", encoded(i)), (f"{i:06d}.txt", words(i).encode()))
        ),
    )


# -- the eight --------------------------------------------------------------------------------------------------------

Expected = list[
    tuple[str, list[tuple[list[Any], list[Any]]]]
]  # (kind, turns of (user, assistant)); a number is an image


def cc12m(folder: Path) -> tuple[str, Expected]:
    meta = json.dumps({"url": "https://example.org/a", "caption": "not this one", "key": "000000"}).encode()
    write_tar(
        folder / "cc12m-train-0000.tar",
        [
            ("000000000.jpg", encoded(1)),  # pixels kept by PNG, whatever the name says: PIL looks at the bytes
            ("000000000.json", meta),
            ("000000000.txt", b"a hand-made kite over the sea"),
            ("000000001.jpg", encoded(2)),
            ("000000001.json", meta),
            ("000000001.txt", "ein Café, zwei Tische\n".encode()),
        ],
    )
    write_tar(folder / "cc12m-train-0001.tar", [("000010000.jpg", encoded(3)), ("000010000.txt", b"three boats")])
    words = ["a hand-made kite over the sea", "ein Café, zwei Tische", "three boats"]
    return str(folder / "cc12m-train-{0000..0001}.tar"), [("draw", [([w], [i + 1])]) for i, w in enumerate(words)]


def blip3o(folder: Path) -> tuple[str, Expected]:
    write_tar(
        folder / "geneval_train.tar",
        [("0.jpg", encoded(1)), ("0.txt", b"a photo of two clocks"), ("1.jpg", encoded(2)), ("1.txt", b"a red bench")],
    )
    expected: Expected = [("draw", [(["a photo of two clocks"], [1])]), ("draw", [(["a red bench"], [2])])]
    return str(folder), expected


def journeydb(folder: Path) -> tuple[str, Expected]:
    for i in (1, 2):
        write_picture(folder / "imgs" / "000" / f"{i}.jpg", i)
    questions = {"Style Relevant Questions and Answers": [], "Content Relevant Questions and Answers": []}
    style = {"Style": [], "Content": [], "Atmosphere": [], "Others": []}
    lines = [
        {
            "img_path": "./000/1.jpg",
            "prompt": "a fox, ukiyo-e --ar 3:2 --v 4",
            "Task1": style,
            "Task2": {"Caption": "A fox in the manner of a woodcut."},
            "Task3": questions,
        },
        {"img_path": "./000/2.jpg", "prompt": "an owl made of glass --ar 3:2 --v 4", "Task1": style, "Task2": {}},
    ]
    url = write_lines(folder / "train_anno_realease_repath.jsonl", lines)
    return str(url), [
        ("draw", [(["A fox in the manner of a woodcut."], [1])]),
        ("draw", [(["an owl made of glass"], [2])]),
    ]


def cambrian(folder: Path) -> tuple[str, Expected]:
    write_picture(folder / "coco" / "train2017" / "1.jpg", 1)
    write_picture(folder / "gqa" / "2.jpg", 2)
    lines = [
        {
            "id": "0",
            "image": "coco/train2017/1.jpg",
            "source": "llava_665k",
            "conversations": [
                {"from": "human", "value": "<image>\nHow many dogs?\nAnswer with a number."},
                {"from": "gpt", "value": "Two"},
                {"from": "human", "value": "And cats?"},
                {"from": "gpt", "value": "None"},
            ],
        },
        {
            "id": "1",
            "image": "gqa/2.jpg",
            "conversations": [{"from": "human", "value": "Name it.\n<image>"}, {"from": "gpt", "value": "A spoon."}],
        },
        {"id": "2", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ]
    return str(write_lines(folder / "Cambrian7M_withsystemprompt.jsonl", lines)), [
        ("understand", [([1, "How many dogs?\nAnswer with a number."], ["Two"]), (["And cats?"], ["None"])]),
        ("understand", [(["Name it.", 2], ["A spoon."])]),
        ("understand", [(["2 + 2?"], ["4"])]),
    ]


def comm(folder: Path) -> tuple[str, Expected]:
    for i in (1, 2):
        write_picture(folder / "wikihow" / f"{i}.jpg", i)
    lines = [
        {
            "data_id": "wikihow_1",
            "dataset_type": "wikihow",
            "title": "How to Fold a Boat",
            "summary_info": [{"type": "text", "content": "In short."}],
            "step_info": [
                [
                    {"type": "text", "content": " Fold it once. \n"},
                    {"type": "image", "url": "https://example.org/1.jpg", "image_path": "wikihow/1.jpg"},
                ],
                [
                    {"type": "text", "content": "Fold it again."},
                    {"type": "text", "content": "  "},
                    {"type": "image", "url": "https://example.org/2.jpg", "image_path": "wikihow/2.jpg"},
                ],
            ],
        },
        {
            "data_id": "story_2",
            "dataset_type": "storybird",
            "title": None,
            "summary_info": [],
            "step_info": [[{"type": "image", "url": None, "image_path": "wikihow/2.jpg"}]],
        },
    ]
    return str(write_lines(folder / "comm_train.jsonl", lines)), [
        ("story", [(["How to Fold a Boat"], ["Fold it once.", 1, "Fold it again.", 2])]),
        ("story", [([], [2])]),
    ]


def pico_banana(folder: Path) -> tuple[str, Expected]:
    write_picture(folder / "openimages" / "train_0" / "a.jpg", 1)
    write_picture(folder / "9423_o.jpg", 2)
    for i, name in enumerate(("positive-edit/1.png", "positive-edit/2.png", "multi-turn/7_turn1.png"), 3):
        write_picture(folder / "images" / name, i)
    write_picture(folder / "images" / "multi-turn" / "7_turn2.png", 6)
    lines = [
        {
            "open_image_input_url": "https://example.org/7404/9423_o.jpg",
            "text": "Remove the red flag from the pole on the left.",
            "output_image": "images/positive-edit/1.png",
            "edit_type": "Remove an existing object",
            "summarized_text": "Remove the flag",
            "local_input_image": str(folder / "openimages" / "train_0" / "a.jpg"),
        },
        {
            "open_image_input_url": "https://example.org/7404/9423_o.jpg",
            "text": "Make it dusk.",
            "output_image": "images/positive-edit/2.png",
            "edit_type": "Lighting",
            "summarized_text": "Dusk",
        },
        {
            "files": [
                {"id": "edit_turn1", "url": "images/multi-turn/7_turn1.png"},
                {"id": "final_image", "url": "images/multi-turn/7_turn2.png"},
                {"id": "original_input_image", "url": "https://example.org/2915/9423_o.jpg"},
            ],
            "metadata_edit_turn_prompts": ["Warm the colours", "Zoom in on the car"],
        },
    ]
    return str(write_lines(folder / "sft.jsonl", lines)), [
        ("edit", [([1, "Remove the red flag from the pole on the left."], [3])]),
        ("edit", [([2, "Make it dusk."], [4])]),
        ("edit", [([2, "Warm the colours"], [5]), (["Zoom in on the car"], [6])]),
    ]


def omniedit(folder: Path) -> tuple[str, Expected]:
    def row(name: str, source: int, edited: int, prompts: list[str]) -> dict[str, Any]:
        return {
            "omni_edit_id": name,
            "task": "removal",
            "src_img": {"bytes": encoded(source), "path": f"{name}_src.png"},
            "edited_img": {"bytes": encoded(edited), "path": None},
            "edited_prompt_list": prompts,
            "height": SIDE,
            "width": SIDE,
            "sc_score_1": 9,
            "o_score": 8.5,
        }

    rows = [row("task_removal_1", 1, 2, ["Take the cup away."]), row("task_swap_2", 3, 4, ["Make it blue.", " "])]
    write_rows(folder / "data" / "train-00000-of-00001.parquet", rows)
    expected: Expected = [("edit", [([1, "Take the cup away."], [2])]), ("edit", [([3, "Make it blue."], [4])])]
    return str(folder), expected


def zebra_cot(folder: Path) -> tuple[str, Expected]:
    def image(number: int) -> dict[str, Any]:
        return {"bytes": encoded(number), "path": None}

    rows = [
        {
            "Question": "Which piece fits? <image_start>[problem_image_1]<image_end>",
            "Text Reasoning Trace": "THOUGHT 0: I try it.\n<image_start>[reasoning_image_1]<image_end>\n"
            "THOUGHT 1: No.\n<image_start>[reasoning_image_2]<image_end>",
            "Final Answer": "B",
            "problem_image_1": image(1),
            "problem_image_2": None,
            "reasoning_image_1": image(2),
            "reasoning_image_2": image(3),
        },
        {
            "Question": "Who wins?",
            "Text Reasoning Trace": "THOUGHT 0: In <image_start>[problem_image_1]<image_end> white moves.\n"
            "<image_start>[reasoning_image_1]<image_end>",
            "Final Answer": "White",
            "problem_image_1": image(4),
            "problem_image_2": image(5),
            "reasoning_image_1": image(6),
            "reasoning_image_2": None,
        },
    ]
    write_rows(folder / "2D Visual Reasoning - Visual Jigsaw" / "train-00000-of-00001.parquet", rows)
    return str(folder / "*" / "train-*.parquet"), [
        ("reason", [(["Which piece fits?", 1], ["THOUGHT 0: I try it.", 2, "THOUGHT 1: No.", 3, "B"])]),
        ("reason", [([4, 5, "Who wins?"], ["THOUGHT 0: In", "white moves.", 6, "White"])]),
    ]


PUBLISHED: dict[str, Callable[[Path], tuple[str, Expected]]] = {
    "cc12m": cc12m,
    "journeydb": journeydb,
    "blip3o": blip3o,
    "cambrian": cambrian,
    "comm": comm,
    "pico-banana": pico_banana,
    "omniedit": omniedit,
    "zebra-cot": zebra_cot,
}


def numbered(parts: Iterable[str | Photo], numbers: Mapping[bytes, int]) -> list[Any]:
    """The parts with images replaced by their numbers."""
    return [part if isinstance(part, str) else numbers[part.data] for part in parts]
