"""Every door of the library: what comes in passes one gate, and what is computed does not depend on the caller."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model_cases import STAGES, tiny_components
from starflow2 import StarFlow2
from starflow2.core.images import read_metadata, read_picture, save_png, to_pil
from starflow2.core.serialize import read_json
from starflow2.core.text import read_text
from starflow2.core.torch_defaults import inference_defaults, torch_defaults
from starflow2.data.mixture import read_mixture
from starflow2.data.shards import Samples
from starflow2.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    OutputError,
    PromptError,
    ShapeError,
    StarFlowError,
    StateError,
)
from starflow2.inference.config import DrawConfig
from starflow2.inference.engine import Engine
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.hub import pick_device
from starflow2.models.tokenizer import load_tokenizer
from starflow2.research.paper_claims import write_claims
from starflow2.training.finetune import read_album

SIDE = 16  # pixels
WORDS = "a red circle"


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return StarFlow2(tiny_components(STAGES, side=2), DrawConfig(guidance=1.0))


def photo() -> torch.Tensor:
    noise = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return noise * 2 - 1


# -- pictures

Door = Callable[[StarFlow2, Any], object]
PICTURE_DOORS: dict[str, Door] = {
    "ask": lambda m, x: m.ask(x, WORDS),
    "edit": lambda m, x: m.edit(x, WORDS),
    "score": lambda m, x: m.score([WORDS], [x]).log_prob,
    "score before": lambda m, x: m.score([x], [WORDS]).log_prob,
    "invert": lambda m, x: m.invert(x, WORDS).z,
    "session": lambda m, x: m.session().add(x),
    "answers": lambda m, x: m.answers([[x]], [WORDS], tokens=2),
    "answers_after": lambda m, x: m.answers_after([[([x, WORDS], [WORDS])]], [WORDS]),
    "edits": lambda m, x: m.edits([x], [WORDS], [0]),  # type: ignore[arg-type]
}
BATCH_DOORS: dict[str, Door] = {
    "roundtrip": lambda m, x: m.roundtrip(x[None]),
    "tower_answers": lambda m, x: m.tower_answers(x[None].expand(1, -1, -1, -1), [WORDS]),
}
BAD_PIXELS = {
    "int64": photo().mul(127).long(),
    "bool": photo() > 0,
    "0 to 255": (photo() + 1) * 127.5,
    "nan": photo() * torch.nan,
    "1e30": photo() * 1e30,
    "meta": photo().to("meta"),
}


@pytest.mark.parametrize("case", BAD_PIXELS)
@pytest.mark.parametrize("door", [*PICTURE_DOORS, *BATCH_DOORS])
def test_no_door_takes_pixels_of_another_type_or_range(model, door, case):
    with pytest.raises((ShapeError, DataError), match=r"image"):
        (PICTURE_DOORS | BATCH_DOORS)[door](model, BAD_PIXELS[case])


@pytest.mark.parametrize("door", PICTURE_DOORS)
@pytest.mark.parametrize("source", [None, 3, np.zeros((SIDE, SIDE, 3)), b"<html>", [1, 2]], ids=str)
def test_no_door_takes_what_is_no_image(model, door, source):
    with pytest.raises(StarFlowError):
        PICTURE_DOORS[door](model, source)


def test_every_form_of_one_picture_has_one_score_and_one_code(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    raw = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), pixels, raw, raw.float() / 127.5 - 1]
    scores = [model.score([WORDS], [form]).log_prob for form in forms]
    assert max(scores) - min(scores) <= 1e-3 and np.isfinite(scores).all()
    assert (model.roundtrip(raw[None]) - model.roundtrip(forms[-1][None])).abs().max() <= 1e-5


# -- words

WORD_DOORS: dict[str, Door] = {
    "generate": lambda m, x: m.generate(x),
    "generate several": lambda m, x: m.generate([WORDS, x]),
    "check_prompt": lambda m, x: m.check_prompt(x),
    "ask": lambda m, x: m.ask(photo(), x),
    "edit": lambda m, x: m.edit(photo(), x),
    "score": lambda m, x: m.score([x], [photo()]),
    "reply": lambda m, x: m.score([WORDS], [x]),
    "invert": lambda m, x: m.invert(photo(), x),
    "session": lambda m, x: m.session().add(x),
    "answers": lambda m, x: m.answers([[photo()]], [x], tokens=2),
    "tell": lambda m, x: m.tell([[x]], [0]),
    "tower_answers": lambda m, x: m.tower_answers(photo()[None], [x]),
}


@pytest.mark.parametrize("door", WORD_DOORS)
@pytest.mark.parametrize("text", ["a red\ud800circle", "a \x1b[31mred circle", "a \u202ered circle", None, b"red", 3])
def test_no_door_takes_hidden_signs_or_what_is_no_text(model, door, text):
    with pytest.raises((PromptError, DataError)) as caught:
        WORD_DOORS[door](model, text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text", ["\ufeffa red circle", "A\u00a0red \u200bcircle\u2028", "\uff41 red circle", "a re\u00add circle"]
)
def test_one_text_in_other_signs_is_that_text(model, text):
    ours, theirs = (model.session().add(words).pieces[0].text for words in (WORDS, text))
    assert ours == theirs == WORDS


def test_a_word_with_a_sign_that_does_not_print_is_shown_with_it(model):
    with pytest.raises(PromptError, match=r"\\u200d"):
        model.generate("a red circle\u200d")


@pytest.mark.parametrize("prompts", [{"a": 1}, {WORDS}, b"a red circle", 7, iter([WORDS])])
def test_prompts_are_text_or_a_list(model, prompts):
    with pytest.raises(PromptError, match=r"prompts is .*; expected text, or a list"):
        model.generate(prompts)


@pytest.mark.parametrize("side", [WORDS, None, {"a": 1}, photo()])
def test_the_sides_of_a_score_are_lists(model, side):
    with pytest.raises(ConfigError, match=r"^prompt is"):
        model.score(side, [photo()])


# -- numbers and devices

NUMBER_DOORS: dict[str, Door] = {
    "n": lambda m, x: m.generate(WORDS, n=x),
    "seed": lambda m, x: m.generate(WORDS, seed=x),
    "draw": lambda m, x: m.draw([WORDS], [x]),
    "session seed": lambda m, x: m.session(seed=x),
    "edit seed": lambda m, x: m.edit(photo(), WORDS, seed=x),
    "edits": lambda m, x: m.edits(photo()[None], [WORDS], [x]),
    "tell": lambda m, x: m.tell([[WORDS]], [x]),
    "roundtrip": lambda m, x: m.roundtrip(photo()[None], seed=x),
    "tokens": lambda m, x: m.session().add(WORDS).write(tokens=x),
    "pictures": lambda m, x: list(m.session().add(WORDS).run(pictures=x)),
    "batch": lambda m, x: DrawConfig(batch=x),
}


@pytest.mark.parametrize("door", NUMBER_DOORS)
@pytest.mark.parametrize("value", [1.5, 2.0, "3", True, float("nan"), 2**64, -(2**64), [1]], ids=str)
def test_no_door_takes_a_count_or_seed_that_is_no_whole_number_in_range(model, door, value):
    with pytest.raises(ConfigError, match=r"(n|seed|tokens|pictures|batch) is .*; expected"):
        NUMBER_DOORS[door](model, value)


FLOAT_DOORS: dict[str, Door] = {
    "temperature": lambda m, x: m.session().add(WORDS).write(tokens=2, temperature=x),
    "guidance": lambda m, x: DrawConfig(guidance=x),
    "edit_guidance": lambda m, x: DrawConfig(edit_guidance=x),
    "prior_scale": lambda m, x: DrawConfig(prior_scale=x),
    "noise_level": lambda m, x: m.roundtrip(photo()[None], noise_level=x),
}


@pytest.mark.parametrize("door", FLOAT_DOORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1", True, 1j, [1.0]], ids=str)
def test_no_door_takes_a_number_that_is_not_finite_or_out_of_range(model, door, value):
    with pytest.raises(ConfigError, match=rf"^{door} is .*; expected"):
        FLOAT_DOORS[door](model, value)


def test_numbers_of_numpy_are_numbers(model):
    drawn = model.generate(WORDS, n=np.int64(1), seed=np.int64(3))[0]  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(drawn.image), np.asarray(model.generate(WORDS, seed=3)[0].image))
    assert drawn.seed == 3 and type(drawn.seed) is int
    assert DrawConfig(guidance=np.float32(1)) == DrawConfig(guidance=1.0)  # type: ignore[arg-type]


def test_a_device_has_several_names():
    for name in ("cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)):
        assert pick_device(name) == torch.device("cpu")
    assert pick_device(None) == pick_device("auto")


@pytest.mark.parametrize("name", ["", "cpu:7", "cpu:x", "xla", "gqu", True, 1.5, ["cpu"], b"cpu", "cuda:-1", 99, -1])
def test_what_is_no_device_of_this_machine_is_refused(name):
    with pytest.raises(DeviceError, match="device is"):
        pick_device(name)


@pytest.mark.parametrize("place", [None, True, 3, b"x", (), {}, 1j, "", "a\0b"], ids=str)
def test_a_model_is_saved_to_the_name_of_a_folder_only(model, place):
    with pytest.raises(OutputError, match="save_directory is"):
        model.save_pretrained(place)


@pytest.mark.parametrize("kind", [StarFlowError, *StarFlowError.__subclasses__()])
def test_every_message_is_one_printable_line(kind):
    given = {"status": 400, "code": "x"} if kind.__name__ == "Refusal" else {}  # where the server has been imported
    error = kind("cannot read a\x1b[2J\ud800.png:\n  no\u202e such file", **given)
    assert str(error) == r"cannot read a\x1b[2J\ud800.png: no\u202e such file"


ARGUMENTS: dict[str, Door] = {
    "no settings": lambda m, x: m.generate(WORDS, config={"guidance": 1.0}),  # type: ignore[arg-type]
    "settings of draw": lambda m, x: m.draw([WORDS], [0], config="x"),  # type: ignore[arg-type]
    "settings of a model": lambda m, x: StarFlow2(m.components, config="x"),  # type: ignore[arg-type]
    "progress": lambda m, x: m.generate(WORDS, progress="x"),  # type: ignore[arg-type]
    "one prompt": lambda m, x: m.draw(WORDS, range(len(WORDS))),
    "no prompts": lambda m, x: m.draw(None, [0]),  # type: ignore[arg-type]
    "fewer questions": lambda m, x: m.answers([[x], [x]], [WORDS]),
    "images in no list": lambda m, x: m.answers([x[0, 0, 0]], [WORDS]),  # type: ignore[list-item]
    "a past of numbers": lambda m, x: m.answers_after([[1]], [WORDS]),  # type: ignore[list-item]
    "fewer pasts": lambda m, x: m.answers_after([], [WORDS]),
    "fewer instructions": lambda m, x: m.edits(x[None], [], [0]),
    "nothing to edit": lambda m, x: m.edits(x[:0], [], []),
    "a talk": lambda m, x: m.tell("ab", [0, 1]),
    "more images": lambda m, x: m.tower_answers(x[None].expand(2, -1, -1, -1), [WORDS]),
    "one image": lambda m, x: m.roundtrip(x),
    "no images": lambda m, x: m.roundtrip(None),  # type: ignore[arg-type]
    "facts for a card": lambda m, x: m.save_pretrained("never", model_card_kwargs="x"),  # type: ignore[arg-type]
    "a code": lambda m, x: m.from_code(x),  # type: ignore[arg-type]
    "a mark": lambda m, x: m.session().rewind(3),  # type: ignore[arg-type]
    "a sampler": lambda m, x: Session(m),  # type: ignore[arg-type]
    "a model by its name": lambda m, x: StarFlow2("x"),  # type: ignore[arg-type]
    "a model of a model": lambda m, x: StarFlow2(m),  # type: ignore[arg-type]
    "a model with a dictionary": lambda m, x: StarFlow2(m.components, {}),  # type: ignore[arg-type]
    "a sampler of a model": lambda m, x: Sampler(m),  # type: ignore[arg-type]
    "a sampler with a dictionary": lambda m, x: Sampler(m.components, {}),  # type: ignore[arg-type]
    "an engine": lambda m, x: Engine(m),  # type: ignore[arg-type]
    "components": lambda m, x: Components({"name": "x"}),  # type: ignore[arg-type]
    "a tokenizer": lambda m, x: Components(m.components.cfg, "x"),  # type: ignore[arg-type]
    "no place for a model": lambda m, x: save_components(m.components, ""),
    "no place for an image": lambda m, x: save_png(to_pil(x), " "),
    "no place for results": lambda m, x: write_claims(""),
    "the name of a session": lambda m, x: Session.load(None, m.sampler()),  # type: ignore[arg-type]
    "the place of a session": lambda m, x: m.session().save(" "),
    "the name of a model": lambda m, x: StarFlow2.from_pretrained(""),
    "a folder of images": lambda m, x: read_album(None, SIDE),  # type: ignore[arg-type]
    "no position": lambda m, x: Samples(str(Path(__file__).parent), "folder").load_state_dict({}),
    "a corpus": lambda m, x: Samples(3),  # type: ignore[arg-type]
    "a number for a file": lambda m, x: read_json(0),  # type: ignore[arg-type]
    "more files than there can be": lambda m, x: Samples("x-{0..999}-{0..999}-{0..999}.tar"),
    "more words than it reads": lambda m, x: m.score([WORDS] * 3000, [WORDS]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_another_kind_are_refused_before_anything_is_computed(model, case):
    with pytest.raises(StarFlowError) as caught:
        ARGUMENTS[case](model, photo())
    assert " is " in str(caught.value) or "expected" in str(caught.value) or "this model reads" in str(caught.value)


@pytest.mark.parametrize("temperature", [1e-300, 1e308])
def test_any_finite_temperature_gives_words(model, temperature):
    assert isinstance(model.session().add(WORDS).write(tokens=2, temperature=temperature), str)


# -- files that are none

FILE_DOORS: dict[str, Callable[[StarFlow2, Path], object]] = {
    "picture": lambda m, path: read_picture(path, SIDE),
    "metadata": lambda m, path: read_metadata(path),
    "text": lambda m, path: read_text(path),
    "json": lambda m, path: read_json(path),
    "session": lambda m, path: Session.load(path, m.sampler()),
    "mixture": lambda m, path: read_mixture(path),
    "tokenizer": lambda m, path: load_tokenizer(path),
    "samples": lambda m, path: next(iter(Samples(str(path), "jsonl"))),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("door", FILE_DOORS)
def test_no_door_waits_at_a_pipe_or_reads_a_device(model, tmp_path, door, kind):
    path = tmp_path / "a.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises((StarFlowError, OSError), match=r"regular file|there is no|hold your data"):
        FILE_DOORS[door](model, path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "lexicon.txt", "model.safetensors"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.timeout(60)
def test_a_model_folder_with_a_pipe_in_it_is_refused(model, tmp_path, name):
    folder = save_components(model.components, tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises((CheckpointError, ConfigError), match=name):
        load_components(folder)


# -- the caller's settings


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype, "the caller's setting comes back"
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
        assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def product_precision(name: str) -> Iterator[None]:
    """The newer way of setting it, after which the older one cannot be read."""
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, products.fp32_precision = products.fp32_precision, name
    try:
        yield
        assert products.fp32_precision == name
    finally:
        products.fp32_precision = before


@contextmanager
def train_mode(model: StarFlow2) -> Iterator[None]:
    model.components.train()
    try:
        yield
    finally:
        model.components.eval()


SETTINGS: dict[str, Callable[[StarFlow2], Any]] = {
    "autocast bfloat16": lambda m: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda m: torch.autocast("cpu", dtype=torch.float16),
    "default float64": lambda m: default_dtype(torch.float64),
    "default bfloat16": lambda m: default_dtype(torch.bfloat16),
    "default device meta": lambda m: default_device("meta"),
    "device context": lambda m: torch.device("meta"),
    "inference mode": lambda m: torch.inference_mode(),
    "gradients": lambda m: torch.enable_grad(),
    "train mode": train_mode,
    "2 threads": lambda m: threads(2),
    "4 threads": lambda m: threads(4),
    "medium precision": lambda m: matmul_precision("medium"),
    "bfloat16 products": lambda m: product_precision("bf16"),
}


def everything(model: StarFlow2) -> dict[str, Any]:
    """Numbers of every public call that computes."""
    image = read = photo()
    session = model.session(seed=5).add(WORDS)
    drawn = session.draw().picture
    code = model.invert(image, WORDS)
    return {
        "score": model.score([WORDS], [image]).log_prob,
        "words": model.score([image], [WORDS]).log_prob,
        "drawn": model.draw([WORDS], [3]),
        "session": drawn.x,
        "code": code.z,
        "roundtrip": model.roundtrip(read[None], noise_level=0.1),
        "edit": model.edits(image[None], [WORDS], [1]),
        "from code": np.asarray(model.from_code(code, WORDS)).astype(float).mean(),
        "tower": model.tower_answers(torch.ones(1, 3, 64, 64, dtype=torch.float32, device="cpu"), [WORDS]),
    }


@pytest.fixture(scope="module")
def usual(model) -> dict[str, Any]:
    return everything(model)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_settings_change_no_number_and_no_call_changes_a_weight(model, usual, setting):
    before = {name: value.clone() for name, value in model.components.state_dict().items()}
    with SETTINGS[setting](model):
        found = everything(model)
    assert all(torch.equal(value, before[name]) for name, value in model.components.state_dict().items())
    assert found.pop("tower") == usual["tower"]
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == usual[name].dtype and not value.is_inference()
        # images are sampled in float32, whose sums depend on how many threads share them
        is_sampled = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and "threads" in setting
        bound = 1e-4 if is_sampled else 1e-6
        torch.testing.assert_close(value, usual[name], atol=bound, rtol=0, msg=f"{name} under {setting}")


@pytest.mark.parametrize("setting", ["default float64", "default bfloat16", "inference mode", "default device meta"])
def test_a_model_that_is_loaded_under_other_settings_is_the_same_model(model, usual, tmp_path, setting):
    save_components(model.components, tmp_path / "model")
    with SETTINGS[setting](model):
        loaded = StarFlow2.from_pretrained(tmp_path / "model", device="cpu")
    loaded.config = model.config
    assert {p.dtype for p in loaded.components.parameters()} == {torch.float32}
    assert loaded.score([WORDS], [photo()]).log_prob == usual["score"]
    assert load_components(tmp_path / "model").flow.deep.head.weight.requires_grad


def test_a_session_goes_on_outside_of_the_settings_it_was_begun_under(model):
    plain = model.session(seed=2).add(WORDS)
    with torch.inference_mode():
        session = model.session(seed=2).add(WORDS)
        assert not model.session().add(WORDS).draw().picture.x.is_inference()  # which no gradient could follow later
    assert torch.equal(session.draw().picture.x, plain.draw().picture.x)
    assert session.add(photo()).fork().write(tokens=2) == plain.add(photo()).write(tokens=2)


def test_between_two_events_of_a_reply_the_callers_settings_hold(model):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        for _ in model.session().add(WORDS).run(tokens=3):
            assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_weights_of_half_precision_are_refused_by_name_and_double_ones_are_taken(model):
    score = model.score([WORDS], [photo()]).log_prob
    for dtype in (torch.bfloat16, torch.float16):
        half = StarFlow2(deepcopy(model.components).to(dtype), model.config)
        with pytest.raises(StateError, match=rf"has weights of {dtype}; expected float32"):
            half.score([WORDS], [photo()])
    double = StarFlow2(deepcopy(model.components).double(), model.config)
    assert abs(double.score([WORDS], [photo()]).log_prob - score) <= 1e-2


def test_settings_of_the_process_come_back_behind_the_last_of_several_calls():
    with default_dtype(torch.float64):
        outer, inner = torch_defaults(), inference_defaults()
        with outer:
            with inner:
                assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64
        with torch_defaults():
            torch.set_default_dtype(torch.float16)  # by another thread of the caller's
        assert torch.get_default_dtype() == torch.float16
        torch.set_default_dtype(torch.float64)


# -- threads


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Outcome of every call, each in a thread of its own: its value, or the error it raised."""
    found: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        try:
            found[i] = calls[i]()
        except Exception as error:
            found[i] = error

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


def test_one_model_from_four_threads_gives_the_numbers_of_one(model, usual):
    with default_dtype(torch.float64):
        scores = in_threads(*[lambda: model.score([WORDS], [photo()]).log_prob] * 4)
        drawn = in_threads(*[lambda: model.draw([WORDS], [3])] * 4)
    assert all(abs(score - usual["score"]) <= 1e-6 for score in scores)
    assert all((image - usual["drawn"]).abs().max() <= 1e-6 for image in drawn)


def test_a_session_that_is_in_use_says_so_and_is_unharmed(model):
    session, alone = model.session(seed=1).add(WORDS), model.session(seed=1).add(WORDS)
    events = session.run(tokens=4)
    next(events)
    doors: list[Callable[[], Any]] = [
        lambda: session.add(WORDS), session.draw, session.write, session.mark, session.fork, lambda: next(events),
        lambda: session.save("never"), lambda: session.rewind(None), lambda: next(session.run()),  # type: ignore[arg-type]
    ]  # fmt: skip
    with session.in_use.claimed():
        refused = in_threads(*doors)
    assert all(isinstance(error, StateError) and "in use by another thread" in str(error) for error in refused)
    list(events)
    list(alone.run(tokens=4))
    assert [p.text for p in session.pieces] == [p.text for p in alone.pieces] and session.length == alone.length


def test_threads_that_fight_over_a_session_get_refusals_and_leave_it_whole(model):
    session = model.session()
    found = in_threads(*[lambda: session.add(WORDS)] * 6)
    added = [outcome for outcome in found if isinstance(outcome, Session)]
    assert added and all(isinstance(outcome, Session | StateError) for outcome in found)
    assert len(session.pieces) == len(added)
    assert session.length == 1 + len(added) * len(model.components.tokenizer.encode(WORDS))
    session.write(tokens=2)


def test_copies_of_a_session_are_free_while_it_is_in_use(model):
    session = model.session().add(WORDS)
    twins = [session.fork(), deepcopy(session), pickle.loads(pickle.dumps(session))]
    with session.in_use.claimed():
        assert all(isinstance(outcome, str) for outcome in in_threads(*[t.write for t in twins]))
