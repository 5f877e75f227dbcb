"""lmms-eval as a program of its own environment: the command line, and results read from the JSON that it writes.

Its exit status is not looked at: it is 0 after errors. Not here: the plug-in that it loads there (`lmms`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, get_args

from starflow2.benchmarks.answering import Frozen
from starflow2.benchmarks.results import Result
from starflow2.core.fields import Range, whole
from starflow2.core.files import replacing
from starflow2.core.json_reader import JsonObject
from starflow2.core.places import check_walk
from starflow2.core.serialize import read_json
from starflow2.errors import ConfigError, DataError, OutputError, printable_line
from starflow2.evals.report import commit
from starflow2.evals.statistics import Score

__all__ = ["SUITES", "HarnessRun", "SuiteName", "find_python", "newest_results", "read_results", "run_suite"]

SuiteName = Literal["mme", "gqa", "seed", "mmbench", "mmmu", "ai2d"]
WRITTEN: Final = "[0-9]*_results.json"  # a date, a time; other files of tasks end alike
PARQUET: Final = b"PAR1"  # how such a file begins
OURS: Final = "starflow2_"  # how the names of tasks over local data begin
ROWS: Final = MappingProxyType({"no": "", "native": ", language model alone", "256": ", language model alone at 256"})


@dataclass(frozen=True, slots=True)
class Suite:
    """A task of lmms-eval. columns: by our name, its metric, and what it is multiplied by.

    file: of the task, below lmms_eval/tasks. split: of its data.
    """

    task: str
    file: str
    split: str
    columns: dict[str, tuple[str, float]]


SUITES: Final = MappingProxyType(
    {
        "mme": Suite(
            "mme", "mme/mme.yaml", "test",
            {"perception": ("mme_perception_score,none", 1.0), "cognition": ("mme_cognition_score,none", 1.0)},
        ),
        "gqa": Suite("gqa", "gqa/gqa.yaml", "testdev", {"accuracy": ("exact_match,none", 100.0)}),
        "seed": Suite(
            "seedbench", "seedbench/seedbench.yaml", "test",
            {"accuracy": ("seed_image,none", 100.0), "all, video too": ("seed_all,none", 100.0)},
        ),
        "mmbench": Suite(
            "mmbench_en_dev_static", "mmbench/mmbench_en_dev_static.yaml", "dev",
            {"accuracy": ("gpt_eval_score,none", 1.0)},
        ),
        "mmmu": Suite("mmmu_val", "mmmu/mmmu_val.yaml", "validation", {"accuracy": ("mmmu_acc,none", 100.0)}),
        "ai2d": Suite("ai2d", "ai2d/ai2d.yaml", "test", {"accuracy": ("exact_match,flexible-extract", 100.0)}),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessRun:
    """One run of the harness. python: of its environment. task: another one than the suite's own; "" for that one.

    data: a Parquet file with the columns of the published dataset, instead of a download. limit: of questions, 0 for
    all. seconds: after which it is stopped.
    """

    python: Path
    model: str
    device: str = "auto"
    batch: int = 16
    frozen: Frozen = "no"
    fit: str = "stretch"
    task: str = ""
    include: Path | None = None
    data: Path | None = None
    limit: int = 0
    seconds: float = 7 * 24 * 3600.0


def find_python(given: Path | None = None) -> Path:
    """The interpreter of an environment with lmms-eval: given, of `make lmms`, or this one.

    Raises ConfigError where there is none.
    """
    if given is None and find_spec("lmms_eval") is not None:
        return Path(sys.executable)
    found = given or Path(os.environ.get("STARFLOW2_LMMS_PYTHON", ".venv-lmms/bin/python"))
    if not found.is_file():
        raise ConfigError(
            f"there is no interpreter at {found}: lmms-eval needs an environment of its own. Make one with make lmms, "
            "and give it with --python."
        )
    return found


def run_suite(suite: SuiteName, run: HarnessRun, out: Path) -> Result:
    """Ask a model a benchmark's questions through lmms-eval, in `out`.

    Raises DataError, with the last line that it wrote, if it wrote no results.
    """
    if suite not in get_args(SuiteName):
        raise ConfigError(f"suite is {suite!r}; expected one of {', '.join(get_args(SuiteName))}.")
    check_walk(out, "out", OutputError)
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.rglob(WRITTEN))
    output = _call(_command(suite, run, out), run.seconds)
    written = sorted(set(out.rglob(WRITTEN)) - before)
    if not written:
        task = _task(suite, run)
        raise DataError(f"lmms-eval wrote no results of task {task}: {_last_words(output)}")
    return _with_notes(read_results(suite, written[-1], _task(suite, run)), run, out)


def _task(suite: SuiteName, run: HarnessRun) -> str:
    name = run.task or SUITES[suite].task
    return OURS + name if run.data is not None else name


def _command(suite: SuiteName, run: HarnessRun, out: Path) -> list[str]:
    """The command line. Over local data it includes a task file that it writes first."""
    notes = out / "notes.json"
    notes.unlink(missing_ok=True)
    settings = {"pretrained": run.model, "device": run.device, "frozen": run.frozen, "fit": run.fit, "notes": notes}
    words = ["-m", "lmms_eval", "--model", "starflow2", "--tasks", _task(suite, run), "--output_path", str(out)]
    words += ["--log_samples"]  # every answer, so that anyone can count again
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    words += ["--batch_size", str(run.batch), *(["--limit", str(run.limit)] if run.limit else [])]
    include = run.include
    if run.data is not None:
        include = out / "tasks"
        _write_task(suite, run, run.data, include)
    return [str(run.python), *words, *(["--include_path", str(include)] if include is not None else [])]


def _write_task(suite: SuiteName, run: HarnessRun, path: Path, folder: Path) -> None:
    """A task file over a local Parquet file; all else is that of the published task. YAML takes JSON."""
    if not path.is_file():
        raise DataError(f"{path} is not there; expected a Parquet file with the published dataset's columns.")
    with path.open("rb") as file:
        if file.read(len(PARQUET)) != PARQUET:
            raise DataError(f"{path} is no Parquet file; expected one with the published dataset's columns.")
    inner = "import lmms_eval, pathlib; print(pathlib.Path(lmms_eval.__file__).parent / 'tasks')"
    tasks = Path(_call([str(run.python), "-c", inner], 600.0).strip().splitlines()[-1])
    about = SUITES[suite]
    fields = {
        "include": str(tasks / about.file),
        "task": _task(suite, run),
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {about.split: str(path.resolve())}},
        "process_docs": None,
    }
    with replacing(folder / f"{_task(suite, run)}.yaml") as temp:
        temp.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()), encoding="utf-8")


def _call(command: Sequence[str], seconds: float) -> str:
    """All that a program writes, up to a time limit; what it wrote before that counts too."""
    try:
        environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False, env=environ)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"") + (late.stderr or b"")
    except OSError as error:
        raise ConfigError(f"cannot run {command[0]}: {error.strerror or error}.") from error
    return output.decode("utf-8", "replace")


def _last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    errors = [line for line in errors if "RetryError" not in line] or errors or lines or ["it wrote nothing at all"]
    return printable_line(errors[-1])[:300]


def newest_results(folder: Path) -> Path:
    """The newest results of lmms-eval below a folder. Raises DataError where there are none."""
    found = sorted(folder.rglob(WRITTEN), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not found:
        raise DataError(f"{folder} has no results; expected a folder that lmms-eval wrote to.")
    return found[-1]


def read_results(suite: SuiteName, path: Path, task: str = "") -> Result:
    """The scores of a suite in lmms-eval's JSON, in the units of the paper's tables.

    lmms-eval leaves out a metric of which it asked no question: that column is empty. task: of lmms-eval; "" for the
    suite's own. Raises DataError for a file without any of them.
    """
    about = SUITES[suite]
    task = task or about.task
    try:
        data = read_json(path)
        scores = data["results"][task]
        if scores.keys().isdisjoint(metric for metric, _ in about.columns.values()):
            raise KeyError(next(iter(about.columns.values()))[0])
        columns = {name: Score(_scaled(scores.get(metric), by)) for name, (metric, by) in about.columns.items()}
        counts = _counts(data, task)
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(f"{path} has no scores of task {task}: {error!r}; expected lmms-eval's results.") from error
    return Result(
        benchmark=suite,
        model=str(data.get("model_name") or "starflow2"),
        judge="lmms-eval",
        columns=columns,
        counts=counts,
        made={"task": task, "lmms-eval": str(data.get("lmms_eval_version") or data.get("git_hash") or "unknown")},
        notes=("As lmms-eval scores it; scores of other harnesses do not compare.",),
    )


def _scaled(value: object, by: float) -> float | None:
    """A metric in our unit; lmms-eval writes [] or "N/A" where it had nothing to average."""
    return float(value) * by if isinstance(value, int | float) and not isinstance(value, bool) else None


def _counts(data: JsonObject, task: str) -> dict[str, int]:
    found = data.get("n-samples", {}).get(task, {})
    if not isinstance(found, dict) or "effective" not in found:
        return {}
    return {"questions": whole(found["effective"], "effective", Range(least=0))}


def _with_notes(result: Result, run: HarnessRun, out: Path) -> Result:
    """The result with what the plug-in counted, and whose row it is."""
    path = out / "notes.json"
    found = read_json(path) if path.is_file() else {}
    words, sentences = found.get("unknown words in all", 0), sum(found.get("reworded sentences", {}).values())
    notes = [f"{sentences} sentences of the harness were reworded for a small vocabulary."] if sentences else []
    notes += [f"{words} words of the questions were never learnt."] if words else []
    return Result(
        benchmark=result.benchmark,
        model=f"{run.model}{ROWS[run.frozen]}",
        judge=result.judge,
        columns=result.columns,
        counts=result.counts,
        made=result.made | {"commit": commit(), "fit": run.fit} | ({"limit": run.limit} if run.limit else {}),
        notes=(*result.notes, *notes),
    )
