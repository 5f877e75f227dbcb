"""config.py and files.py: configs survive the round trip, anything odd is named, a failed write changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from starflow2.core.files import replacing
from starflow2.core.serialize import from_dict, load_json, save_json, to_dict
from starflow2.errors import ConfigError, OutputError, StarFlowError, StateError, nearest


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = True

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr is {self.lr}, expected a positive number.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    steps: int = 10
    trains: tuple[str, ...] = ()
    schedule: Literal["cosine", "constant"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class Run:
    optim: Optim = field(default_factory=Optim)
    stages: tuple[Stage, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    clip: float | None = None
    start: int | str = 0
    extra: Stage | None = None


RUN = Run(
    stages=(Stage(name="fae", trains=("fae", "decoder")), Stage(name="t2i", steps=3, schedule="constant")),
    weights={"captions": 0.5, "answers": 2.0},
    clip=1.0,
    start="latest",
    extra=Stage(name="joint"),
)


@pytest.mark.parametrize("cfg", [Run(), RUN])
def test_a_config_survives_the_way_through_json(cfg):
    assert from_dict(Run, json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_a_config_file_reads_back_equal_and_keeps_its_types(tmp_path):
    save_json(RUN, tmp_path / "deep" / "config.json")
    back = load_json(Run, tmp_path / "deep" / "config.json")
    assert back == RUN
    assert isinstance(back.stages, tuple) and isinstance(back.stages[0].trains, tuple)


def test_a_whole_number_is_taken_for_a_float_and_becomes_one():
    clip = from_dict(Run, {**to_dict(Run()), "clip": 2}).clip
    assert clip == 2.0 and type(clip) is float


BAD = {
    "unknown key": (lambda d: d["optim"].update(lrr=1), "Run.optim.lrr: unknown key (value 1)", 'Did you mean "lr"?'),
    "missing key": (lambda d: d["optim"].pop("lr"), "Run.optim.lr: missing", "expected float"),
    "missing optional": (lambda d: d.pop("clip"), "Run.clip: missing", "float | None"),
    "text for a number": (lambda d: d["optim"].update(lr="1e-3"), "Run.optim.lr: got '1e-3' (str)", "expected float"),
    "bool for a number": (lambda d: d["stages"][0].update(steps=True), "Run.stages[0].steps: got True", "expected int"),
    "number for a bool": (lambda d: d["optim"].update(fused=1), "Run.optim.fused: got 1 (int)", "expected bool"),
    "float for an int": (lambda d: d["stages"][1].update(steps=3.0), "Run.stages[1].steps: got 3.0", "expected int"),
    "none for required": (lambda d: d["stages"][0].update(name=None), "Run.stages[0].name: got None", "expected str"),
    "not in the literal": (lambda d: d["stages"][0].update(schedule="cosin"), "one of 'cosine'", 'mean "cosine"?'),
    "wrong length": (lambda d: d["optim"].update(betas=[0.9]), "Run.optim.betas: got [0.9]", "length 2, not 1"),
    "text for a tuple": (lambda d: d["stages"][0].update(trains="fae"), "Run.stages[0].trains", "expected a list"),
    "list for a dict": (lambda d: d.update(weights=[1.0]), "Run.weights: got [1.0]", "a dictionary"),
    "wrong in a dict": (lambda d: d["weights"].update(captions="x"), 'Run.weights["captions"]', "expected float"),
    "list for a config": (lambda d: d.update(optim=[]), "Run.optim: got [] (list)", "keys of Optim"),
    "no member of a union": (lambda d: d.update(start=1.5), "Run.start: got 1.5", "int or str"),
    "not finite": (lambda d: d["optim"].update(lr=float("nan")), "Run.optim.lr: got nan", "finite"),
    "refused by the class": (lambda d: d["optim"].update(lr=-1.0), "Run.optim: lr is -1.0", "positive"),
    "inside an optional config": (lambda d: d["extra"].update(step=1), "Run.extra.step: unknown key", '"steps"'),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_path_value_and_expectation(case):
    change, place, expectation = BAD[case]
    data = to_dict(RUN)
    change(data)
    with pytest.raises(ConfigError) as caught:
        from_dict(Run, data)
    assert place in str(caught.value) and expectation in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_json_cannot_hold_is_refused_when_writing(tmp_path):
    with pytest.raises(ConfigError, match=r"Run\.clip: inf"):
        save_json(replace(RUN, clip=float("inf")), tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"Run\.start"):
        to_dict(replace(RUN, start=Path("x")))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dataclass instance"):
        to_dict({"optim": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "", "[1, 2", b"\xff\xfe\x00", '{"optim": 1, "optim": 2}', "[" * 100_000])
def test_a_file_that_is_not_a_config_gives_one_line_naming_it(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        load_json(Run, path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_json(Run, tmp_path / "absent.json")


def test_an_annotation_that_cannot_be_read_is_our_own_mistake():
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        names: set[str]

    with pytest.raises(TypeError, match=r"Odd\.names"):
        from_dict(Odd, {"names": []})


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temp:
        temp.write_text("half")
        raise RuntimeError
    with pytest.raises(OutputError, match="no such thing"), replacing(path) as temp:
        temp.write_text("half")
        raise OSError("no such thing")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, sys
from starflow2.errors import OutputError
from starflow2.core.files import replacing
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with replacing(sys.argv[1]) as temp:
        temp.write_bytes(bytes(5000))
except OutputError as error:
    print(error)
"""


def test_a_write_that_the_system_cuts_short_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {path}: File too large")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_a_device_and_an_impossible_place_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, Path(os.devnull), tmp_path / "file" / "config.json"):
        with pytest.raises(OutputError, match="cannot write"), replacing(path) as temp:
            temp.write_text("y")
    assert Path(os.devnull).is_char_device()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_gives_a_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        save_json(RUN, tmp_path / "config.json")


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    save_json(Optim(), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and load_json(Optim, tmp_path / "real.json") == Optim()


def test_the_errors_are_also_what_callers_already_catch():
    assert (
        issubclass(ConfigError, ValueError)
        and issubclass(StateError, RuntimeError)
        and issubclass(OutputError, OSError)
    )
    assert all(issubclass(e, StarFlowError) for e in (ConfigError, OutputError, StateError))
    assert nearest("guidence", ["guidance", "seed"]) == ' Did you mean "guidance"?'
