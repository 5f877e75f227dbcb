"""The command line: what it makes, and that bad input costs one clear line and leaves nothing behind."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from model_cases import tiny_components, tiny_folder
from pretrained_cases import write_upstream
from starflow2 import __version__
from starflow2.cli import evaluate, generate
from starflow2.cli.app import COMMANDS, command, main
from starflow2.cli.options import printable
from starflow2.cli.parsing import flags
from starflow2.core.heatmap import heat_map
from starflow2.core.images import read_metadata, read_picture, to_pil
from starflow2.evals.edit import PER_OPERATION
from starflow2.evals.geneval import PARTS
from starflow2.evals.statistics import Score, Scores
from starflow2.evals.suite import Report
from starflow2.inference import self_check, session
from starflow2.inference.config import DrawConfig
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.checkpoint import save_components
from starflow2.models.config import SelfCheckConfig
from starflow2.pipeline import StarFlow2

ROOT = Path(__file__).resolve().parents[2]
JOINT = ("features", "fae", "vlm", "t2i", "adapter", "joint")
HEAVY = ("torch", "transformers", "numpy", "PIL", "rich")
HELP = f"""
import sys
from starflow2.cli.app import COMMANDS, main
codes = [main(["--help"]), *(main([*verb.split(), "--help"]) for verb in COMMANDS)]
print(codes, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


class Scripted(StarFlow2):
    """A model that replies with the words and images (None) of `script`, where that is set."""

    script: tuple[str | None, ...] = ()

    def sampler(self, config: DrawConfig | None = None) -> Sampler:
        sampler = super().sampler(config)
        if self.script:
            sampler.adjust_logits = self._scripted()
        return sampler

    def _scripted(self) -> Callable[[torch.Tensor], torch.Tensor]:
        layout, tokenizer = self.components.layout, self.components.tokenizer
        ids = [i for block in self.script for i in ([layout.begin] if block is None else tokenizer.encode(block))]
        tokens = iter([*ids, tokenizer.special.end])
        return lambda logits: torch.eye(logits.shape[-1], dtype=torch.float64)[[next(tokens)] * len(logits)]


@pytest.fixture(scope="module")
def tiny() -> StarFlow2:
    return StarFlow2(tiny_components())


@pytest.fixture(scope="module")
def tiny_joint() -> Scripted:
    return Scripted(tiny_components(JOINT))


@pytest.fixture
def load_instead(monkeypatch) -> Callable[[StarFlow2], StarFlow2]:
    """Let every command load this model, whatever name it is given."""

    def install(model: StarFlow2) -> StarFlow2:
        monkeypatch.setattr(StarFlow2, "from_pretrained", lambda *_, **__: model)
        return model

    return install


@pytest.fixture
def model(tiny, load_instead) -> StarFlow2:
    """The tiny model before stage joint, which every command now loads."""
    return load_instead(tiny)


@pytest.fixture
def joint(tiny_joint, load_instead) -> Scripted:
    """The tiny model with all of its stages, which every command now loads."""
    tiny_joint.script = ()
    return load_instead(tiny_joint)


@pytest.fixture
def photo() -> str:
    """A picture to look at, with an upper half unlike the lower."""
    image = Image.new("RGB", (80, 64), (200, 30, 40))
    image.paste((20, 60, 220), (0, 32, 80, 64))
    image.save("photo.png")
    return "photo.png"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def files() -> list[Path]:
    """Everything in the current folder but what Python keeps of modules that it compiled."""
    return sorted(path for path in Path.cwd().rglob("*") if "__pycache__" not in path.parts)


def refused(capsys, *argv: str) -> str:
    """The one line that a command line is refused with; nothing else may be printed or written."""
    before = files()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("starflow2: error: ") and err.count("\n") == 1
    assert files() == before
    return err


# -- help, and words that are no commands or options ------------------------------------------------------------------


def test_help_of_everything_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == f"{[0] * (len(COMMANDS) + 1)} []"
    assert all(f"\n  {verb} " in done.stdout for verb in COMMANDS)  # those of two words on the page of the first


def test_the_package_can_be_run_as_a_module():
    done = subprocess.run([sys.executable, "-m", "starflow2", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"starflow2 {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["genrate"], 'Did you mean "generate"?'),
        (["generate", "x", "--sede", "3"], 'no option --sede. Did you mean "--seed"?'),
        (["eval", "world", "--qick"], 'Did you mean "--quick"?'),
        (["info", "nano", "mini"], "no argument mini"),
        (["check", "--josn=f"], 'no option --josn. Did you mean "--json"?'),
        (["generate", "x", "--seed", "three"], "--seed: expected a whole number, got 'three'. See starflow2 generate"),
        (["generate", "x", "--guidance", "much"], "--guidance: expected a number, got 'much'."),
        (
            ["generate", "x", "--cleanup", "twedie"],
            "expected none, tweedie or iterative, got 'twedie'. Did you mean \"tweedie\"?",
        ),
        (["generate", "x", "-n"], "-n/--n: expected one argument."),
        (["eval"], "the following arguments are required: SUITE. See starflow2 eval --help."),
        (["eval", "wrold"], "got 'wrold'. Did you mean \"world\"?"),
        (["eval", "--quick", "geneval"], "geneval has options of its own, behind its name"),
        (["train"], "RECIPE"),
        (["ask", "x.png"], "QUESTION"),
        (["edit", "x.png", "make it red", "-O", "x.png"], "no option -O"),
        (["invert"], "IMAGE"),
        (["chat", "--sav-dir", "x"], 'Did you mean "--save-dir"?'),
        (["generate", "x", "--mode", "most"], "expected image or interleaved, got 'most'"),
        (["generate", "\udcff"], "'\\udcff' is not UTF-8 text"),
    ],
)
def test_a_word_that_nothing_takes_is_refused_with_the_nearest_one(argv, says, capsys):
    assert says in refused(capsys, *argv)


def test_choices_on_the_command_line_are_those_of_the_library():
    parts, *_ = get_args(get_type_hints(evaluate.Eval)["part"])
    assert set(get_args(parts)) == {*PARTS, *dict(PER_OPERATION)}
    assert get_type_hints(generate.Generate)["cleanup"] == get_type_hints(DrawConfig)["cleanup"]


def test_the_page_of_commands_names_every_option_and_no_other():
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    found = re.findall(r"^##+ ([\w ,]+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    sections = {verb: text for heading, text in found for verb in heading.split(", ")}
    for verb in COMMANDS:
        documented = set(re.findall(r"^\| [^|]*?`(--[a-z-]+)", sections[verb], re.MULTILINE))
        assert documented == set(flags(command(verb))), verb


# -- generate ---------------------------------------------------------------------------------------------------------


def test_one_picture_goes_to_its_file_and_says_how_it_was_made(model, capsys):
    argv = ["generate", "two red hearts", "--seed", "3", "--guidance", "0", "-o", "hearts.png", "--json"]
    assert main(argv) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert set(row) == {"file", "prompt", "seed", "settings", "seconds"}
    assert (row["file"], row["prompt"], row["seed"]) == ("hearts.png", "two red hearts", 3)
    assert row["settings"]["guidance"] == 0 and row["seconds"] > 0
    record = read_metadata("hearts.png")
    assert (record["prompt"], record["seed"], record["version"]) == ("two red hearts", "3", __version__)
    assert json.loads(record["settings"]) == row["settings"] and record["model"] == row["settings"]["model"]
    assert [path.name for path in Path.cwd().iterdir()] == ["hearts.png"]


def test_several_pictures_go_to_one_contact_sheet(model, capsys):
    assert main(["generate", "two red hearts", "-n", "2", "-o", "hearts.png"]) == 0
    assert capsys.readouterr().out == "hearts.png\n"
    record = read_metadata("hearts.png")
    assert (record["prompt"], record["seed"]) == ("two red hearts", "0")
    assert [picture["seed"] for picture in json.loads(record["pictures"])] == [0, 1]


def test_a_folder_gets_one_file_for_each_picture_and_a_sheet(model, capsys):
    Path("prompts.txt").write_text("a blue star\n\n  two red hearts \n")
    assert main(["generate", "two red hearts", "--prompts", "prompts.txt", "-o", "new/", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = ["two-red-hearts-0", "a-blue-star-0", "two-red-hearts-0-2"]
    assert [row["file"] for row in rows] == [f"new/{name}.png" for name in names]
    assert sorted(path.stem for path in Path("new").iterdir()) == sorted([*names, "sheet"])
    assert read_metadata("new/a-blue-star-0.png")["prompt"] == "a blue star"
    first, again = (np.asarray(Image.open(rows[i]["file"]), dtype=int) for i in (0, 2))
    assert np.abs(first - again).max() <= 1, "a prompt and a seed give one image; two rows of a batch may round apart"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([""], "the prompt is empty"),
        ([" ".join(["red"] * 10_000)], "tokens; this model reads up to"),
        (["a zebra above a unicorn"], "never learnt 'zebra', 'unicorn'"),
        (["a red blue circle"], "'red blue circle' says two things of one object that exclude each other"),
        ([], "nothing to draw"),
        (["x", "-n", "0"], "-n is 0"),
        (["x", "-n", "-3"], "-n is -3"),
        (["x", "--seed", "-1"], "--seed is -1"),
        (["x", "--seed", str(2**64)], "expected 0 to 2^63 - 1"),
        (["a star", "--guidance", "-1"], "guidance is -1"),
        (["a star", "--prior-scale", "0"], "prior_scale is 0"),
        (["a star", "--batch", "0"], "batch is 0"),
        (["x", "-o", "x.jpg"], "expected a name that ends in .png"),
        (["--prompts", "none.txt"], "cannot read 'none.txt': No such file"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(argv, says, model, capsys):
    assert says in refused(capsys, "generate", *argv)


@pytest.mark.parametrize("output", ["file.txt/x.png", "file.txt/", "/proc/nowhere/x.png", "folder.png"])
def test_a_place_that_cannot_be_written_is_found_before_the_model_is_looked_for(output, capsys):
    Path("file.txt").write_text("")
    Path("folder.png", "sheet.png").mkdir(parents=True)
    Path("folder.png", "x-0.png").mkdir()
    assert "cannot write" in refused(capsys, "generate", "x", "-o", output, "--model", "none")


@pytest.mark.parametrize("output", ["", "  "])
def test_an_empty_name_is_no_place_for_pictures(output, capsys):
    assert "--output is" in refused(capsys, "generate", "x", "-o", output, "--model", "none")


def test_a_full_disk_leaves_the_picture_that_was_there(model, monkeypatch, capsys):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("old.png").write_bytes(b"old")
    monkeypatch.setattr("starflow2.core.files.os.fsync", full)
    assert "cannot write old.png: No space left on device" in refused(capsys, "generate", "a star", "-o", "old.png")
    assert Path("old.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "nanno"], 'Did you mean "nano"?'),
        (["--model", "folder"], "folder has no config.json"),
        (["--device", "cuad"], 'Did you mean "cuda"?'),
        (["--device", "mps"], "this machine has none"),
    ],
)
def test_a_model_or_device_that_is_not_there_is_refused(argv, says, capsys):
    Path("folder").mkdir()
    assert says in refused(capsys, "generate", "a star", *argv)


def test_control_c_ends_with_130_and_no_traceback(capsys):
    Path("stopped.py").write_text("def recipe():\n    raise KeyboardInterrupt\n")
    assert main(["info", "stopped:recipe"]) == 130
    assert capsys.readouterr().err.endswith("starflow2: interrupted\n")


# -- the terminal -----------------------------------------------------------------------------------------------------


def shell(line: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Outcome of a shell line in which `starflow2` is this program."""
    program = f'starflow2() {{ "{sys.executable}" -m starflow2 "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, env={**os.environ, **environ})


def test_a_reader_that_leaves_or_a_full_disk_costs_no_traceback():
    done = shell("starflow2 --help | true")
    assert done.returncode in (0, 141) and done.stderr == ""
    done = shell("starflow2 --help > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "starflow2: error: cannot use standard output: No space left on device.\n"
    assert shell("starflow2 --help >&-").stderr == shell("starflow2 nothing 2>&-").stderr == ""


def test_help_stays_readable_in_narrow_columns_and_without_docstrings():
    done = shell("starflow2 generate --help", COLUMNS="20")
    assert "images per prompt" in done.stdout and max(map(len, done.stdout.splitlines())) <= 60
    plain = subprocess.run(
        [sys.executable, "-OO", "-m", "starflow2", "generate", "--help"], capture_output=True, text=True
    )
    assert plain.returncode == 0 and "Generate(" not in plain.stdout and "--prior-scale" in plain.stdout


def test_another_locale_is_named_and_costs_no_traceback(tmp_path):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell("starflow2 generate 'a red circle' -o na\u00efve.png", **locale)
    assert done.returncode == 2 and "locale's encoding, ascii; set PYTHONUTF8=1" in done.stderr
    done = shell("starflow2 wuerfel", **locale)
    assert done.returncode == 2 and done.stderr.startswith("starflow2: error: there is no command 'wuerfel'")


ESCAPES = "a\x1b]0;owned\x07\x9b2J"


@pytest.mark.parametrize(
    "argv",
    [
        [ESCAPES], ["generate", ESCAPES], ["generate", "x", f"--{ESCAPES}"], ["generate", "x", "-o", f"{ESCAPES}.jpg"],
        ["generate", "--prompts", ESCAPES], ["generate", "x", "--mode", ESCAPES], ["generate", "x", "--seed", ESCAPES],
        ["generate", "x", "--model", ESCAPES], ["generate", "x", "--device", ESCAPES], ["ask", ESCAPES, "what"],
        ["score", f"{ESCAPES}.png"], ["eval", ESCAPES], ["train", ESCAPES], ["info", ESCAPES], ["finetune", ESCAPES],
        ["data", "check", ESCAPES], ["demo", ESCAPES], ["edit", "x.png", "y", "-o", ESCAPES], ["analyze", ESCAPES],
    ],
)  # fmt: skip
def test_no_refusal_writes_escape_codes_to_the_terminal(argv, joint, capsys):
    assert refused(capsys, *argv).removesuffix("\n").isprintable()


def test_the_name_of_a_file_writes_no_escape_codes_either(model, capsys):
    assert main(["generate", "a star", "-o", "a\x1b[2J.png"]) == 0
    assert capsys.readouterr().out == "a\\x1b[2J.png\n" and Path("a\x1b[2J.png").is_file()


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "Permission denied", "config.json")])
def test_what_the_system_refuses_is_one_line(error, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("starflow2.cli.app._dispatch", broken)
    assert main(["info"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and ("memory" in err or "config.json: Permission denied" in err)


def test_prompts_of_a_file_are_its_lines_and_have_no_byte_order_mark(model, capsys):
    Path("prompts.txt").write_bytes("\ufefftwo red\u2028hearts\r\n\na star\n".encode())
    assert main(["generate", "--prompts", "prompts.txt", "-o", "out/"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["a-star-0.png", "sheet.png", "two-red-hearts-0.png"]


# -- train ------------------------------------------------------------------------------------------------------------


def test_settings_of_a_stage_are_typed_options(capsys):
    argv = ["train", "nano", "--stage", "t2i", "--optim.lr", "3e-4", "--save-every", "7", "--smoke", "--dry-run"]
    assert main(argv) == 0
    plan = json.loads(capsys.readouterr().out)
    (stage,) = plan["stages"]
    assert (stage["name"], stage["optim"]["lr"], stage["save_every"], stage["steps"]) == ("t2i", 3e-4, 7, 4)
    assert plan["output"] == "runs/nano-smoke" and not list(Path.cwd().iterdir())


def test_all_stages_are_the_default(capsys):
    assert main(["train", "nano", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in plan["stages"]] == [*JOINT, "end", "final"]
    assert plan["output"] == "runs/nano"


def test_help_of_a_stage_lists_its_settings(capsys):
    assert main(["train", "nano", "--stage", "vlm", "--help"]) == 0
    page = capsys.readouterr().out
    assert "--optim.matrix-lr" in page and "--resume" in page and "--name" not in page


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["nanno"],
            "no recipe 'nanno'; expected nano, nano-end-to-end, nano-final, nano-grown, nano-patches, mini, paper, "
            'paper-siglip or module:function. Did you mean "nano"?',
        ),
        (["no_such_module:recipe"], "cannot use 'no_such_module:recipe' as a recipe: No module named"),
        (["json:dumps"], "as a recipe: missing a required argument"),
        (["os:getcwd"], "gave str; expected a function that returns RunConfig"),
        (["nano", "--stage", "t2j"], 'Did you mean "t2i"?'),
        (["nano", "--stage", "t2i", "--optim.lrr", "1"], 'no option --optim.lrr. Did you mean "--optim.lr"?'),
        (
            ["nano", "--stage", "t2i", "--optim.lr", "fast"],
            "--optim.lr: expected a number, got 'fast'. See starflow2 train nano --stage t2i --help.",
        ),
        (["nano", "--stage", "t2i", "--steps", "0"], "--steps is 0"),
        (["nano", "--stage", "t2i", "--name", "fae"], "--name"),
        (["nano", "--steps", "5"], "need --stage to say which"),
        (["nano", "--stage", "t2i", "-o", "file.txt"], "cannot write"),
        (["nano", "--stage", "t2i", "--device", "cuad"], 'Did you mean "cuda"?'),
        (["nano", "--stage", "t2i"], "run --stage features first"),
    ],
)
def test_a_run_that_cannot_be_is_refused(argv, says, capsys):
    Path("file.txt").write_text("")
    assert says in refused(capsys, "train", *argv)


@pytest.mark.parametrize(("place", "source"), {"import": "{}", "call": "def mine():\n    {}"}.items())
def test_a_recipe_that_exits_is_one_refusal(place, source, capsys):
    Path(f"exits_at_{place}.py").write_text("import sys\n\n" + source.format("sys.exit(0)\n"))
    said = refused(capsys, "train", f"exits_at_{place}:mine")
    assert f"as a recipe: it calls sys.exit(0) at {Path.cwd()}/exits_at_{place}.py:" in said


@pytest.mark.parametrize("option", [("--evaluate", "now"), ("--log", "now"), ("--log", "later")], ids="-".join)
def test_measurements_and_listeners_that_exit_are_refusals_too(option, capsys):
    tiny_folder(Path("run"))
    Path("my_run.py").write_text("from model_cases import tiny_run\n\ndef mine():\n    return tiny_run(steps=1)\n")
    Path("leaving.py").write_text("import sys\n\ndef now(*_):\n    sys.exit(4)\n\ndef later(*_):\n    return now\n")
    argv = ["train", "my_run:mine", "--stage", "t2i", "-o", "run", "--device", "cpu"]
    assert main([*argv, option[0], f"leaving:{option[1]}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("starflow2: error: cannot use 'leaving:") and "it calls sys.exit(4) at" in last


def test_a_recipe_of_ones_own_trains_resumes_and_reports(capsys):
    tiny_folder(Path("run"))
    Path("my_recipes.py").write_text("from model_cases import tiny_run\n\ndef mine():\n    return tiny_run(steps=2)\n")
    argv = ["train", "my_recipes:mine", "--stage", "t2i", "-o", "run", "--device", "cpu"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out == "run/model\n"
    assert re.search(r"t2i 2/2 loss -?\d+\.\d+ · [\d,]+ images/s · [\d,]+ latents/s · 0 s left", err)
    assert main([*argv, "--steps", "3"]) == 0
    steps = [json.loads(line)["step"] for line in Path("run", "metrics-t2i.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


# -- eval, info, check ------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(model, monkeypatch) -> list[dict[str, object]]:
    """Calls of score_geneval, which is not run: it returns a report with every score one half."""
    calls: list[dict[str, object]] = []

    def score(_: object, split: str, *, quick: bool, samples: int, parts: Sequence[str], **options: object) -> Report:
        calls.append({"split": split, "quick": quick, "samples": samples, **options})
        return half_right(split, quick, samples, parts)

    monkeypatch.setattr("starflow2.evals.geneval.score_geneval", score)
    return calls


def half_right(split: str, quick: bool, samples: int, parts: Sequence[str]) -> Report:
    """A report of W-GenEval with every score one half."""
    half = {rule: Score(0.5, 0.4, 0.6) for rule in ("lenient", "strict")}
    part = Scores(2, 2, half, {"colors": Scores(2, 2, half)})
    part = part.with_columns(template_iou=0.9, unknown_share=0.0, empty_share=0.0, twins=0.0)
    scores = dict.fromkeys(parts, part)
    return Report(
        suite="geneval",
        split=split,
        quick=quick,
        n=2,
        settings={"samples": samples},
        parts=scores,
        bounds={"floor": scores, "clean": {"id": part}},
    )


def test_eval_prints_a_table_and_writes_the_report(scored, capsys):
    assert main(["eval", "world", "--quick", "--part", "id", "paraphrase", "--samples", "1", "--json", "r.json"]) == 0
    out, err = capsys.readouterr()
    assert "W-GenEval" in out and "not recorded" not in out + err
    report = json.loads(Path("r.json").read_text())
    assert list(report["parts"]) == ["id", "paraphrase"] and report["model"] == "tiny"
    (call,) = scored
    assert (call["split"], call["quick"], call["samples"]) == ("dev", True, 1)


def test_a_full_test_run_adds_a_line_to_the_ledger_it_is_given(scored, model):
    for _ in range(2):
        assert main(["eval", "world", "--split", "test", "--ledger", "results/ledger.jsonl"]) == 0
        with torch.no_grad():
            model.components.joints.text_skip.weight[0, 0] += 1  # other weights under the same name
    lines = [json.loads(line) for line in Path("results/ledger.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["model"] == "tiny" and lines[0]["id"]["lenient"] == 0.5
    assert lines[0]["weights"] != lines[1]["weights"]


def test_a_full_test_run_without_a_ledger_writes_nothing_and_says_so(scored, capsys):
    before = set(Path().rglob("*"))
    assert main(["eval", "world", "--split", "test"]) == 0
    assert "not recorded; --ledger FILE" in capsys.readouterr().err
    assert set(Path().rglob("*")) == before


@pytest.mark.parametrize("stages", [(), ("final",)])
def test_a_model_that_has_seen_what_is_held_out_is_told_from_one_that_has_not(
    scored, model, stages, capsys, monkeypatch
):
    monkeypatch.setattr(model.components, "finished_stages", (*model.components.finished_stages, *stages))
    assert main(["eval", "world", "--quick"]) == 0
    assert ("has seen what is held out" in capsys.readouterr().err) == bool(stages)


@pytest.mark.parametrize("argv", [["world"], ["world", "--split", "test", "--quick"], ["fae", "--split", "test"]])
def test_a_ledger_is_for_full_test_runs_only(argv, capsys):
    assert "--ledger records full test runs" in refused(capsys, "eval", *argv, "--ledger", "ledger.jsonl")


def test_info_writes_what_it_prints(capsys):
    assert main(["info", "nano", "--json", "info.json"]) == 0
    facts = json.loads(Path("info.json").read_text())
    assert f"{facts['parameters']['total']:,}" in capsys.readouterr().out


def test_info_plans_the_training_of_every_stage_on_so_many_gpus(capsys):
    assert main(["info", "nano", "--gpus", "2", "--gpu-memory", "24", "--json", "plan.json"]) == 0
    planned = json.loads(Path("plan.json").read_text())["plan"]
    assert planned["hardware"]["gpus"] == 2 and [row["stage"] for row in planned["stages"]] == [*JOINT, "end", "final"]
    shown = capsys.readouterr().out
    assert "2 GPUs of 24 GiB" in shown and "calculated" in shown


def test_a_plan_of_a_folder_or_of_no_gpus_is_refused(capsys):
    folder = tiny_folder(Path.cwd()) / "model"
    assert "is a model folder" in refused(capsys, "info", str(folder), "--gpus", "1")
    assert "gpus is 0; expected at least 1" in refused(capsys, "info", "nano", "--gpus", "0")


RECIPE = """
from dataclasses import replace
from pathlib import Path
from pretrained_cases import paper_in_miniature
from starflow2.training.recipes import paper, smoke
def run():
    short = smoke(paper())
    stages = tuple(replace(s, steps=1, batch=2, whitening_captions=64) for s in short.stages)
    return replace(short, model=paper_in_miniature(Path("up"), 64), stages=stages, precision="float32")
"""


def test_a_prepared_run_over_pretrained_folders_trains_its_first_stages(capsys):
    write_upstream(Path("up"))
    Path("mine.py").write_text(RECIPE)
    assert main(["prepare", "mine:run", "-o", "work", "--json", "facts.json"]) == 0
    prints = json.loads(Path("facts.json").read_text())["fingerprints"]
    assert set(prints) == {"vlm", "features"}
    for stage in ("fae", "t2i"):
        assert main(["train", "mine:run", "--stage", stage, "-o", "work", "--device", "cpu"]) == 0
    config = json.loads(Path("work/model/config.json").read_text())
    assert config["stages"] == ["fae", "t2i"] and config["fingerprints"] == prints
    assert not Path("work/model/vlm").exists()
    capsys.readouterr()
    assert "exists already" in refused(capsys, "prepare", "mine:run", "-o", "work")


def test_a_run_is_prepared_from_whole_files_of_a_recipe_with_references_only(capsys):
    assert "vlm_from of model nano is None" in refused(capsys, "prepare", "nano", "-o", "work")
    Path("flow.pth").write_bytes(b"pickled")
    assert "only safetensors are read" in refused(capsys, "prepare", "nano", "-o", "work", "--flow", "flow.pth")
    assert not Path("work").exists()


def test_info_of_nothing_is_refused(capsys):
    Path("empty").mkdir()
    assert "has no config.json" in refused(capsys, "info", "empty")
    assert 'Did you mean "nano"?' in refused(capsys, "info", "nani")


@pytest.mark.parametrize("is_well", [True, False])
def test_check_writes_its_checks_and_says_by_its_status_whether_all_hold(is_well, model, monkeypatch, capsys):
    from starflow2.selfcheck import Check

    checks = [Check("a", 0.0, 1.0), Check("b", 0.0 if is_well else float("nan"), 1.0)]
    monkeypatch.setattr("starflow2.selfcheck.check_model", lambda *_: checks)
    assert main(["check", "--json", "check.json"]) == (0 if is_well else 1)
    rows = json.loads(Path("check.json").read_text())["checks"]
    assert [set(row) for row in rows] == [{"name", "value", "bound", "ok"}] * 2
    out = capsys.readouterr().out
    assert rows[1]["ok"] is is_well and ("FAILS" in out) is not is_well
    assert out.splitlines()[-1].startswith("sampling runs: lean (")


def test_demo_says_where_its_page_is(monkeypatch, model, capsys):
    made = SimpleNamespace(
        scores=half_right("test", True, 1, ("id", "cg")),
        shown=(SimpleNamespace(verdict=SimpleNamespace(correct=True)),),
        seconds_per_image=0.25,
        summary=dict,
        page=Path("out/demo/index.html"),
    )
    monkeypatch.setattr("starflow2.cli.demo_page.make_demo", lambda *_, **__: made)
    assert main(["demo"]) == 0
    assert "1 of 1 images show what was asked for, 0.25 s each. The page: out/demo/index" in capsys.readouterr().out


def test_an_option_given_twice_is_refused_instead_of_dropping_the_first(capsys):
    assert "--part is given 2 times" in refused(capsys, "eval", "world", "--part", "id", "--part", "cg")


# -- generate: the best of several, and replies -----------------------------------------------------------------------


@pytest.fixture
def checking(joint, monkeypatch):
    """The joint model with questions by which it checks its images."""
    questions = SelfCheckConfig(shows="is there {}?", done="is {} there now?", tries=2)
    monkeypatch.setattr(joint.components, "cfg", replace(joint.components.cfg, self_check=questions))
    return joint


def test_tries_keep_the_image_that_the_model_confirms(checking, capsys):
    argv = ["generate", "two red hearts", "a blue star", "--tries", "3", "-o", "new/", "--json"]
    assert main(argv) == 0
    rows = json.loads(capsys.readouterr().out)
    mine = checking.generate(["two red hearts", "a blue star"], tries=3)
    for row, drawing in zip(rows, mine, strict=True):
        assert (row["prompt"], row["seed"]) == (drawing.prompt, drawing.seed)
        assert row["confidence"] == pytest.approx(drawing.confidence, abs=1e-4)
        (again,) = checking.generate(drawing.prompt, seed=drawing.seed, tries=1)
        assert np.abs(np.asarray(again.image, int) - np.asarray(drawing.image, int)).max() <= 1
    assert [row["file"] for row in rows] == ["new/two-red-hearts-0.png", "new/a-blue-star-0.png"]


def test_the_models_own_number_of_tries_is_the_default(checking):
    assert checking.generate("a blue star")[0].confidence is not None
    assert checking.generate("a blue star", tries=1)[0].confidence is None


def test_tries_that_the_model_confirms_none_of_are_told(checking, photo, monkeypatch, capsys):
    for sure, says in ((0.25, "it confirms none; the likeliest was kept (25%)"), (0.75, "")):
        monkeypatch.setattr(session, "confidences", lambda engine, rows, questions, sure=sure: [sure for _ in rows])
        monkeypatch.setattr(self_check, "confidence", lambda engine, row, question, sure=sure: sure)
        assert main(["generate", "a blue star", "--tries", "2"]) == 0
        assert says in capsys.readouterr().err
        assert main(["edit", photo, "make it red", "--tries", "2"]) == 0
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--tries", "0"], "--tries is 0; expected at least 1"),
        (["--tries", "two"], "--tries"),
        (["--tries", "9999"], "tries is 9999; expected at least 1 and at most 1,024"),
        (["--tries", "2"], "has not learnt to check its images; use tries=1"),
        (["--tries", "2", "--mode", "interleaved"], "--tries belongs to --mode image"),
        (["--mode", "interleaved", "-n", "2"], "replies once to one prompt"),
        (["--mode", "interleaved", "--batch", "2"], "--batch belongs to --mode image"),
        (["a blue star", "--mode", "interleaved"], "starflow2 chat takes several turns"),
        (["--mode", "interleaved", "--cleanup", "tweedie"], "it works for models before stage joint"),
        (["--mode", "interleaved", "-o", "x.jpg"], "ends in .png"),
        (["--mode", "interleaved", "-o", "folder.png"], "cannot write folder-2.png"),
    ],
)
def test_what_cannot_be_chosen_from_or_replied_is_refused(argv, says, joint, capsys):
    Path("folder-2.png").mkdir()
    assert says in refused(capsys, "generate", "two red hearts", *argv)


def test_an_interleaved_reply_is_printed_in_order_and_its_images_are_numbered(joint, capsys):
    argv = ["generate", "two red hearts", "--mode", "interleaved", "--seed", "4", "-o", "reply.png"]
    joint.script = ("a star", None, None, "two \x1b[31m stars")
    assert main(argv) == 0
    assert capsys.readouterr().out == "a star\nreply-1.png\nreply-2.png\ntwo [31m stars\n"
    record = read_metadata("reply-1.png")
    assert (record["prompt"], record["seed"]) == ("two red hearts", "4")
    joint.script = (None, "a star")
    assert main([*argv[:-1], "new/", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [{"file": "new/two-red-hearts-1.png"}, {"text": "a star"}]


# -- ask and edit -----------------------------------------------------------------------------------------------------


def test_ask_prints_the_answer_and_writes_it_down(photo, joint, capsys):
    joint.script = ("red and blue",)
    assert main(["ask", photo, "what color is it?", "--json", "answer.json"]) == 0
    assert capsys.readouterr().out == "red and blue\n"
    facts = json.loads(Path("answer.json").read_text())
    assert facts == {"image": photo, "question": "what color is it?", "answer": "red and blue", "model": "tiny"}


def test_a_command_loads_the_model_of_a_folder(photo, tmp_path, capsys):
    save_components(tiny_components(JOINT), tmp_path / "model")
    argv = ["ask", photo, "what color is it?", "--model", str(tmp_path / "model")]
    assert main(argv) == 0
    answer = StarFlow2.from_pretrained(tmp_path / "model").ask(photo, "what color is it?")
    assert capsys.readouterr().out == f"{printable(answer)}\n"


def test_edit_writes_the_edited_picture_with_its_story(joint, photo, capsys):
    argv = ["edit", photo, "make the heart blue", "--seed", "3", "--guidance", "1.5", "--prior-scale", "0.7"]
    assert main([*argv, "-o", "new/edited.png", "--json", "edit.json"]) == 0
    assert capsys.readouterr().out == "new/edited.png\n"
    config = DrawConfig.for_model(joint.components, guidance=1.5, prior_scale=0.7)
    edited = joint.edit(photo, "make the heart blue", seed=3, config=config)
    assert np.array_equal(np.asarray(Image.open("new/edited.png")), np.asarray(edited.image))
    record, facts = read_metadata("new/edited.png"), json.loads(Path("edit.json").read_text())
    assert (record["prompt"], record["seed"], record["source"]) == ("make the heart blue", "3", photo)
    assert json.loads(record["settings"]) == facts["settings"] == edited.settings
    assert (facts["file"], facts["image"], facts["gain"]) == ("new/edited.png", photo, pytest.approx(edited.gain))


def bad_pictures() -> dict[str, str]:
    """Image files that no command may guess about, with a part of the error about each."""
    opaque = Image.new("RGB", (64, 64), (200, 30, 40))
    opaque.save("whole.png")
    Path("half.png").write_bytes(Path("whole.png").read_bytes()[:80])
    Path("words.png").write_text("two red hearts")
    opaque.save("moving.gif", save_all=True, append_images=[Image.new("RGB", (64, 64))])
    opaque.convert("CMYK").save("print.jpg")
    Image.fromarray(np.zeros((64, 64), dtype=np.uint16)).save("deep.png")
    Image.new("RGBA", (64, 64), (200, 30, 40, 90)).save("glass.png")
    Image.new("RGB", (8, 64)).save("tiny.png")
    return {
        "half.png": "cannot read half.png",
        "words.png": "cannot read words.png",
        "none.png": "cannot read none.png",
        "moving.gif": "several frames",
        "print.jpg": "CMYK",
        "deep.png": "deep.png has",
        "glass.png": "transparent",
        "tiny.png": "8 x 64 pixels",
    }


@pytest.mark.parametrize("verb", ["ask", "edit", "invert", "score"])
def test_a_picture_that_would_have_to_be_guessed_about_is_refused_by_name(verb, joint, capsys):
    for name, says in bad_pictures().items():
        argv = [name] if verb == "score" else [name, "two red hearts"]
        assert says in refused(capsys, verb, *argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ask", "photo.png", "is it a zebra?"], "never learnt 'zebra'"),
        (["ask", "photo.png", ""], "the prompt is empty"),
        (["ask", "photo.png", "red?", "--json", "file/x.json"], "cannot write file/x.json"),
        (["edit", "photo.png", "make it a zebra"], "never learnt 'zebra'"),
        (["edit", "photo.png", "make it a red blue star"], "'red blue star' says two things of one object"),
        (["edit", "photo.png", "make it red", "-o", "x.jpg"], "--output is x.jpg; expected a name that ends in .png"),
        (["edit", "photo.png", "make it red", "-o", "file/x.png"], "cannot write file/x.png"),
        (["edit", "photo.png", "make it red", "-o", "/proc/x.png"], "cannot write /proc/x.png"),
        (["edit", "photo.png", "make it red", "--seed", "-1"], "--seed is -1"),
        (["edit", "photo.png", "make it red", "--guidance", "-1"], "guidance is -1"),
        (["edit", "photo.png", "make it red", "--prior-scale", "nan"], "--prior-scale: expected a finite number"),
        (["invert", "photo.png", "a zebra"], "never learnt 'zebra'"),
        (["invert", "photo.png", "a star", "--swap", "a zebra"], "never learnt 'zebra'"),
        (["invert", "photo.png", "a star", "-o", "file/x.png"], "cannot write file/x.png"),
        (["invert", "photo.png", "a star", "-o", "used.png", "--swap", "a ring"], "cannot write used-swap.png"),
        (["score"], "there is nothing to score"),
        (["score", "a zebra"], "never learnt 'zebra'"),
        (["score", "a zebra", "a star"], "never learnt 'zebra'"),
        (["score", "red " * 5000], "tokens; this model reads up to"),
        (["score", "phoot.png"], "cannot read phoot.png as an image: there is no such file"),
        (["score", "a star", "--map", "m.png"], "--map needs an image as the reply, the last PART; it is 'a star'"),
        (["score", "photo.png", "--map", "m.jpg"], "--map is m.jpg; expected a name that ends in .png"),
        (["score", "photo.png", "--json", "file/x.json"], "cannot write file/x.json"),
        (["chat", "--save-dir", "file"], "cannot write file/picture-001.png"),
        (["chat", "--load", "none.safetensors"], "not a whole session file"),
        (["chat", "--load", "x", "--seed", "1"], "--seed and --load are both given"),
        (["chat", "--load", "x", "--guidance", "0"], "--load continues with the saved guidance"),
    ],
)
def test_what_a_conversation_cannot_take_is_refused_and_nothing_is_written(argv, says, joint, photo, capsys):
    Path("file").write_text("")
    Path("used-swap.png").mkdir()
    assert says in refused(capsys, *argv)


@pytest.mark.parametrize("verb", ["ask", "edit", "invert", "score", "chat", "generate"])
def test_a_model_without_the_joint_stage_is_refused_by_name(verb, model, photo, capsys):
    words = {"score": ["a star"], "chat": [], "generate": ["a star", "--mode", "interleaved"]}
    err = refused(capsys, verb, *words.get(verb, [photo, "a star"]))
    assert "needs a model that has finished stage joint; nano has finished features, fae, vlm, t2i." in err


# -- chat -------------------------------------------------------------------------------------------------------------


def typed(monkeypatch, lines: str) -> None:
    """Let the next command read these lines from its standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))


def test_chat_takes_turns_from_a_pipe_and_ends_with_it(joint, monkeypatch, capsys):
    typed(monkeypatch, "a zebra\n/draw two red hearts\n/save talk.safetensors\n")
    assert main(["chat", "--save-dir", "album", "--seed", "3", "--guidance", "1.5"]) == 0
    out, err = capsys.readouterr()
    assert out == "[album/picture-001.png]\n" and "never learnt 'zebra'" in err.splitlines()[0]
    record = read_metadata("album/picture-001.png")
    assert (record["prompt"], record["seed"], json.loads(record["settings"])["guidance"]) == (
        "two red hearts",
        "3",
        1.5,
    )
    assert json.loads(record["settings"])["edit_guidance"] == 1.5, "edits are guided as requested, and record it"
    assert len(Session.load("talk.safetensors", joint.sampler()).pieces) == 2
    typed(monkeypatch, "/quit\n")
    assert main(["chat", "--save-dir", "album", "--load", "talk.safetensors"]) == 0
    assert capsys.readouterr().out == "> two red hearts\n[an image]\n"


# -- score and invert -------------------------------------------------------------------------------------------------


def test_score_of_words_adds_up_and_is_the_librarys(joint, photo, capsys):
    assert main(["score", photo, "What color  is it?", "RED", "--json", "score.json"]) == 0
    facts = json.loads(Path("score.json").read_text())
    scored = joint.score([read_picture(photo, 64), "what color is it?"], ["red"])
    assert facts["log_prob"] == pytest.approx(scored.log_prob, abs=1e-6)
    assert facts["log_prob"] == pytest.approx(sum(token["log_prob"] for token in facts["tokens"]))
    assert facts["bits"] == pytest.approx(facts["log_prob"] / math.log(2)) and facts["pictures"] == []
    assert (facts["asked"], facts["reply"]) == ([photo, "What color  is it?"], "RED")
    assert f"{scored.log_prob:.3f}" in capsys.readouterr().out


def test_score_of_a_picture_maps_its_patches(joint, photo, capsys):
    assert main(["score", "two red hearts", photo, "--map", "map.png", "--json", "score.json"]) == 0
    facts = json.loads(Path("score.json").read_text())
    (picture,) = facts["pictures"]
    patches = np.array(picture["patches"])
    assert patches.shape == (8, 8) and picture["dims"] == 64 * 4
    assert patches.sum() + picture["shallow_logdet"] == pytest.approx(picture["log_prob"], rel=1e-6)
    assert picture["nats_per_dim"] == pytest.approx(-picture["log_prob"] / 256)
    out = capsys.readouterr().out
    assert all(f"{number:.4f}" in out for number in (picture["nats_per_dim"],)) and "map.png: blue" in out
    shown = np.asarray(Image.open("map.png"))
    expected = heat_map(read_picture(photo, 64), -torch.from_numpy(patches))
    assert shown.shape == (512, 512, 3)
    assert np.abs(shown.astype(int) - np.asarray(to_pil(expected))).max() <= 1  # in float64 here, in float32 there
    assert read_metadata("map.png")["unlikeliest"] == f"{patches.min():.3f}"


def test_a_map_is_coloured_by_its_values_patch_by_patch():
    grey, values = torch.zeros(3, 64, 64), torch.zeros(8, 8)
    values[2, 5] = 3.0
    shown = heat_map(grey, values, strength=1.0)
    hot = (shown[0] == 1.0).nonzero()
    assert hot.min(0).values.tolist() == [2 * 64, 5 * 64] and hot.max(0).values.tolist() == [3 * 64 - 1, 6 * 64 - 1]
    assert torch.equal(heat_map(grey, values, strength=0.0), torch.zeros(3, 512, 512))
    assert len(heat_map(grey, torch.ones(8, 8)).flatten(1).unique(dim=1).T) == 1, "equal values have one colour"


def test_invert_draws_the_picture_again_and_another_from_the_same_code(joint, photo, capsys):
    argv = ["invert", photo, "two red hearts", "--swap", "a blue star", "-o", "again.png", "--json", "invert.json"]
    assert main(argv) == 0
    facts = json.loads(Path("invert.json").read_text())
    assert facts["files"] == ["again.png", "again-swap.png"]
    code = joint.invert(read_picture(photo, 64), "two red hearts")
    assert facts["log_prob"] == pytest.approx(code.log_prob)
    assert facts["nats_per_dim"] == pytest.approx(-code.log_prob / 256)
    again, swapped = (np.asarray(Image.open(name), dtype=int) for name in facts["files"])
    noise = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    x = joint.components.codec.encode(read_picture(photo, 64)[None])
    with torch.no_grad():
        direct = joint.components.fae.decode(x + joint.sampling_noise * noise)[0]
    assert np.abs(again - np.asarray(to_pil(direct), dtype=int)).max() <= 1, "exactly the picture that was inverted"
    assert np.abs(again - swapped).max() > 1
    assert (read_metadata("again.png")["prompt"], read_metadata("again-swap.png")["prompt"]) == tuple(argv[2:5:2])
    out = capsys.readouterr().out
    assert f"{code.log_prob:.3f} nats" in out and out.endswith("again.png\nagain-swap.png\n")
    assert main(["invert", photo, "", "-o", "wordless.png"]) == 0
    assert sorted(path.name for path in Path.cwd().glob("wordless*")) == ["wordless.png"]
