"""Files of sessions come from elsewhere: what was changed, is damaged or does not fit together is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model_cases import STAGES, tiny_components
from starflow2.errors import CheckpointError
from starflow2.inference.config import DrawConfig
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.tensor_file import load_signed, save_tensors

SIDE = 2
Tensors = dict[str, Tensor]
Metadata = dict[str, str]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny_components(STAGES, side=SIDE), DrawConfig(guidance=1.0))


@pytest.fixture(scope="module")
def saved(sampler: Sampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session with words and an image of the user's, words that it replied with if any, and an image that it drew."""
    path = tmp_path_factory.mktemp("saved") / "talk"
    session = Session(sampler, 3).add("a red circle", torch.linspace(-1, 1, 768).view(3, 16, 16))
    session.add("a green ring").draw()
    session.save(path)
    return path


def refusal(sampler: Sampler, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Session.load(path, sampler)
    message = str(caught.value)
    assert path.name in message and message.isprintable() and len(message) < 1200
    return message


def tampered(saved: Path, path: Path, change: Callable[[Tensors, Metadata], None]) -> Path:
    """A copy that was changed by somebody who knows how to renew its digest."""
    tensors, metadata = load_signed(saved)
    change(tensors, metadata)
    save_tensors(tensors, path, metadata)
    return path


# -- tensors

NAMES = (
    *("h", "g", "previous", "vlm.0.k", "vlm.0.v", "vlm.1.k", "flow.0.k", "flow.0.v"),
    *("picture.1.x", "picture.1.u", "picture.1.image", "picture.3.x", "picture.3.u", "picture.3.image"),
)


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "nan": spoilt(torch.nan),
    "infinity": spoilt(-torch.inf),
    "gone": lambda tensor: None,
    "half precision": lambda tensor: tensor.half(),
    "whole numbers": lambda tensor: tensor.int(),
    "truth": lambda tensor: tensor.bool(),
    "two of it": lambda tensor: torch.cat([tensor, tensor]),
    "one dimension more": lambda tensor: tensor[None],
    "a number": lambda tensor: tensor.sum(),
    "empty": lambda tensor: tensor[:0],
    "shorter": lambda tensor: tensor[..., :-1].contiguous(),
}


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_not_the_models_is_refused_by_its_name(sampler, saved, tmp_path, name, change):
    def exchange(tensors: Tensors, _: Metadata) -> None:
        new = TENSORS[change](tensors.pop(name))
        if new is not None:
            tensors[name] = new.contiguous()

    message = refusal(sampler, tampered(saved, tmp_path / "talk", exchange))
    assert name in message or name.split(".")[0] in message


def cut(tensors: Tensors, only: str = "") -> None:
    for name in [k for k in tensors if k.startswith((only,) if only else ("vlm.", "flow."))]:
        tensors[name] = tensors[name][:, :, :-2].contiguous()


TOGETHER: dict[str, Callable[[Tensors, Metadata], Any]] = {
    "all caches cut by two positions": lambda t, m: cut(t),
    "one cache shorter": lambda t, m: cut(t, "vlm."),
    "one layer shorter": lambda t, m: cut(t, "vlm.1."),
    "a layer too many": lambda t, m: t.update({"flow.1.k": t["flow.0.k"].clone(), "flow.1.v": t["flow.0.v"].clone()}),
    "a layer too few": lambda t, m: [t.pop("vlm.1.k"), t.pop("vlm.1.v")],
    "no caches": lambda t, m: [t.pop(k) for k in list(t) if k.startswith(("vlm.", "flow."))],
    "a tensor more": lambda t, m: t.update(extra=torch.zeros(2)),
    "an image more": lambda t, m: t.update(
        {f"picture.0.{k}": t[f"picture.1.{k}"].clone() for k in ("x", "u", "image")}
    ),
    "has_previous as a float": lambda t, m: t.update(has_previous=t["has_previous"].float()),
    "has_previous of two rows": lambda t, m: t.update(has_previous=torch.ones(2, dtype=torch.bool)),
    "no previous image": lambda t, m: t.update(has_previous=torch.zeros(1, dtype=torch.bool)),
    "another previous image": lambda t, m: t["previous"].add_(1),
    "previous of another shape": lambda t, m: t.update(previous=t["previous"][:, :2, :2].contiguous()),
    "pixels up to 255": lambda t, m: t["picture.1.image"].mul_(255),
    "the last image's latents changed": lambda t, m: t["picture.3.u"].mul_(1.5),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_tensors_that_do_not_belong_together_are_refused(sampler, saved, tmp_path, case):
    refusal(sampler, tampered(saved, tmp_path / "talk", TOGETHER[case]))


# -- settings

WRONG: dict[str, tuple[Any, ...]] = {
    "state.mrope": (None, "7", 1.5, True, -1, 0, 10**30, [1]),
    "state.step": (None, "7", 1.5, True, -1, 0, 10**30, [1]),
    "state.seed": (None, "7", 1.5, True, 2**64, -(2**63) - 1),
    "state.replies": (None, "7", 1.5, True, -1, 10**6),
    "state.is_open": (None, 0, 1, "no", [], 1.0),
    "state.encode_calls": (None, "1", 1.5, -1, 0),
    "sampling.guidance": (None, "1", -1.0, True, [1.0]),
    "sampling.edit_guidance": ("1", -1.0, True),
    "sampling.prior_scale": (None, 0.0, -1.0, "x"),
    "sampling.rule": (None, "none", 1),
    "sampling.schedule": (None, "steep", 0),
    "sampling.skips": ("visual", ["audio"], [1], 0),
    "pieces.0.who": (None, "nobody", 1.5, ""),
    "pieces.0.text": (None, 7, ["a"]),
    "pieces.0.noise_level": (0.1, "x", -1.0),
    "pieces.0.nats": (-1, None, [1.0, 2.0], [None], ["a", "b"]),
    "pieces.1.text": ("words", 7),
    "pieces.1.noise_level": (None, "x", -1.0, 1e9, True),
    "pieces.1.nats": (-1, [1.0, None], [None, None, None], {}),
    "pieces.3.nats": (-1, [True, None], ["1", None]),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=str)
def test_a_setting_of_another_type_or_out_of_range_is_refused(sampler, saved, tmp_path, key, value):
    def exchange(_: Tensors, metadata: Metadata) -> None:
        name, *path, last = key.split(".")
        whole = parent = json.loads(metadata[name])
        for step in path:
            parent = parent[int(step)]
        parent[last] = value
        metadata[name] = json.dumps(whole)

    refusal(sampler, tampered(saved, tmp_path / "talk", exchange))


TEXTS = ("", "null", "5", "[]", "{}", "[[]]", "{", "NaN", '{"a": 1, "a": 2}', "[" * 100_000)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("key", ["pieces", "sampling", "state"])
def test_settings_that_are_no_settings_are_refused(sampler, saved, tmp_path, key, text):
    refusal(sampler, tampered(saved, tmp_path / "talk", lambda _, metadata: metadata.update({key: text})))


@pytest.mark.parametrize("key", ["model", "pieces", "sampling", "state"])
@pytest.mark.parametrize("change", ["gone", "renamed", "of another"])
def test_metadata_that_is_missing_or_of_another_model_is_refused(sampler, saved, tmp_path, key, change):
    def exchange(_: Tensors, metadata: Metadata) -> None:
        value = metadata.pop(key)
        if change != "gone":
            metadata[key[::-1] if change == "renamed" else key] = value[::-1]

    refusal(sampler, tampered(saved, tmp_path / "talk", exchange))


@pytest.mark.parametrize("key", ["mrope", "seed", "who", "guidance"])
def test_a_setting_that_is_missing_or_unknown_is_refused(sampler, saved, tmp_path, key):
    for new in (f'"{key}s"', f'"{key}", "extra"'):
        text = new.replace(", ", ": 1, ")

        def exchange(_: Tensors, metadata: Metadata, text: str = text) -> None:
            for name in ("pieces", "sampling", "state"):
                metadata[name] = metadata[name].replace(f'"{key}"', text)

        refusal(sampler, tampered(saved, tmp_path / "talk", exchange))


# -- the file


@pytest.mark.parametrize("place", range(16))
def test_a_flipped_bit_is_noticed_wherever_it_is(sampler, saved, tmp_path, place):
    data = bytearray(saved.read_bytes())
    data[int((place + 0.5) / 16 * len(data))] ^= 1
    (tmp_path / "talk").write_bytes(data)
    refusal(sampler, tmp_path / "talk")


def test_a_file_whose_digest_was_taken_away_or_not_renewed_is_refused(sampler, saved, tmp_path):
    tensors, metadata = load_signed(saved)
    save_file(tensors, tmp_path / "talk", metadata=metadata)
    assert "no digest" in refusal(sampler, tmp_path / "talk")
    save_file(tensors, tmp_path / "talk", metadata=metadata | {"digest": "0" * 32})
    assert "damaged" in refusal(sampler, tmp_path / "talk")


def test_the_file_itself_loads(sampler, saved, tmp_path):
    again = Session.load(tampered(saved, tmp_path / "talk", lambda *_: None), sampler)
    assert [piece.who for piece in again.pieces] == ["user", "user", "user", "model"] and again.seed == 3
