"""Files, folders, ledgers and locks: whole after a crash at any instruction, and one writer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crashes import crashes
from starflow2.core.files import TEMPORARY, check_writable, replacing
from starflow2.core.folders import WAITING, replacing_content, whole
from starflow2.core.json_reader import parse_json, parse_record
from starflow2.core.ledger import append_line
from starflow2.core.locks import LOCK, folder_lock
from starflow2.errors import CheckpointError, ConfigError, OutputError, TrainingError


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# -- single files


def test_threads_that_write_one_file_at_once_all_succeed_and_leave_a_whole_one(tmp_path):
    errors: list[Exception] = []

    def write(letter: str) -> None:
        try:
            for _ in range(40):
                with replacing(tmp_path / "file") as temp:
                    temp.write_text(letter * 1000)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(set((tmp_path / "file").read_text())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_temporary_file_has_a_new_name_every_time_and_never_follows_a_link_laid_in_its_place(tmp_path, monkeypatch):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "file") as temp:
            names.add(temp.name)
            temp.write_text("x")
    assert len(names) == 3
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".trap").symlink_to(tmp_path / "victim")
    monkeypatch.setattr("starflow2.core.files.temporary_name", lambda: ".trap")
    with pytest.raises(OutputError, match="File exists"), replacing(tmp_path / "file") as temp:
        temp.write_text("overwritten")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_file_has_the_permissions_that_the_umask_leaves_whoever_wrote_it(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as temp:
            temp.unlink()
            os.close(os.open(temp, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o640


def test_temporary_files_of_killed_processes_go_after_a_day(tmp_path):
    old, young = tmp_path / f"{TEMPORARY}0.tmp", tmp_path / f"{TEMPORARY}1.tmp"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (time.time() - 90_000,) * 2)
    with replacing(tmp_path / "file") as temp:
        temp.write_text("x")
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused_in_one_printable_line(tmp_path, name):
    for door in (check_writable, lambda path: replacing(path).__enter__()):
        with pytest.raises(OutputError, match="give another name") as caught:
            door(f"{tmp_path}/{name}")
        assert str(caught.value).isprintable()


def test_a_long_name_can_be_written(tmp_path):
    with replacing(tmp_path / ("x" * 250)) as temp:
        temp.write_text("x")


def test_a_file_killed_at_any_operation_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "file"

    def write() -> None:
        with replacing(path) as temp:
            temp.write_text("new")

    path.write_text("old")
    found = [path.read_text() for _ in crashes(write)]
    assert len(found) >= 2 and set(found) <= {"old", "new"}


# -- folders

OLD = {"config": "old", "sub/weights": "old weights", "sub/only old": "x", "flat": "was a folder"}
NEW = {"config": "new", "sub/weights": "new weights", "flat/inner": "is a folder", "extra": "more"}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_text() for name, path in files.items() if not name.startswith(".") and "/." not in name}


def save(folder: Path, new: dict[str, str] = NEW) -> None:
    with replacing_content(folder, CheckpointError, "saving") as temp:
        fill(temp, new)


def test_a_folder_is_replaced_but_for_what_others_put_into_it(tmp_path):
    fill(tmp_path, OLD | {"card": "by somebody"})
    here = tmp_path.stat().st_ino
    save(tmp_path)
    assert content(tmp_path) == NEW | {"card": "by somebody"}
    assert tmp_path.stat().st_ino == here, "somebody may stand in the folder, or it may be a mount"
    assert {p.name for p in tmp_path.rglob(".*")} == set()


def test_a_folder_killed_at_any_operation_reads_as_the_old_or_the_new_one_and_the_next_save_finishes_it(tmp_path):
    seen, folder = [], tmp_path / "folder"
    for _ in crashes(lambda: save(folder)):
        seen.append(content(whole(folder)))
        save(folder, {"config": "third"})
        assert content(whole(folder))["config"] == "third" and not (folder / WAITING).exists()
        assert not [p for p in folder.rglob(f"{TEMPORARY}*")]
        subprocess.run(["rm", "-r", folder], check=True)
        fill(folder, OLD)
    news = [found == NEW for found in seen[1:]]
    assert all(found in (OLD, NEW) for found in seen[1:]) and len(seen) > 20
    assert news == sorted(news) and any(news) and not all(news)


def test_a_failure_inside_leaves_the_folder_as_it_was_and_a_new_one_away(tmp_path):
    fill(tmp_path / "old", OLD)
    for name, left in (("old", OLD), ("new", None)):
        with pytest.raises(RuntimeError), replacing_content(tmp_path / name, CheckpointError, "saving") as temp:
            fill(temp, NEW)
            raise RuntimeError
        assert (content(tmp_path / name) if left else (tmp_path / name).exists() or None) == left
    assert not [p for p in tmp_path.rglob(".*")]


def test_a_link_inside_is_replaced_and_what_it_leads_to_stays(tmp_path):
    fill(tmp_path / "elsewhere", {"weights": "of others"})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "sub").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "folder")
    assert content(tmp_path / "folder") == NEW and content(tmp_path / "elsewhere") == {"weights": "of others"}


def test_files_without_second_names_are_copied(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    fill(tmp_path, OLD)
    save(tmp_path)
    assert content(tmp_path) == NEW


# -- locks

HOLDER = """
import sys
from pathlib import Path
from starflow2.core.locks import folder_lock
from starflow2.errors import TrainingError
with folder_lock(Path(sys.argv[1]), TrainingError, "training stage t2i"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_a_folder_and_gets_it_when_that_one_was_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=f"process {holder.pid} on .* training stage t2i since 20.*"):
            folder_lock(tmp_path, TrainingError, "saving").__enter__()
        holder.kill()
        holder.wait()
        with folder_lock(tmp_path, TrainingError, "saving"):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_of_this_process_is_refused_too(tmp_path):
    with (
        replacing_content(tmp_path, CheckpointError, "saving a model"),
        pytest.raises(CheckpointError, match=f"is in use: process {os.getpid()}"),
        replacing_content(tmp_path, CheckpointError, "saving a model"),
    ):
        pass


# -- ledgers


def test_half_a_line_is_removed_before_the_next_one_and_a_whole_one_without_its_end_is_kept(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b"')
    append_line(path, {"a": 3, "name": "würfel"})
    path.write_bytes(path.read_bytes()[:-1])
    append_line(path, {"a": 4})
    assert [json.loads(line)["a"] for line in path.read_text("utf-8").splitlines()] == [1, 3, 4]


FULL_DISK = """
import resource, sys
from starflow2.core.ledger import append_line
from starflow2.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    append_line(sys.argv[1], {"text": "x" * 200})
except OutputError as error:
    print(error)
"""


def test_a_full_disk_leaves_a_ledger_as_it_was(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append_line(path, {"a": 1})
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout and path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "  ", "\t", None, 3])
def test_an_empty_name_is_no_place_to_write_to(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    doors = (check_writable, lambda path: replacing(path).__enter__(), lambda path: append_line(path, {}))
    for door in doors:
        with pytest.raises(OutputError, match=r"cannot write .*: expected the name of a file\."):
            door(name)
    assert not list(tmp_path.iterdir())


# -- JSON


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": 1, "a": 2}', "[NaN]", "[-Infinity]", "[1e999]", b"\xff", "", "{", "1" * 5000],
    ids=["nested", "doubled", "nan", "infinity", "overflow", "no utf-8", "empty", "cut off", "long number"],
)
def test_json_that_python_would_take_or_choke_on_is_refused(text):
    with pytest.raises(ConfigError, match="settings is not JSON"):
        parse_json(text, "settings")


def test_records_of_others_may_hold_nan_but_are_not_nested_without_end():
    assert parse_record('{"score": NaN}')["score"] != 0
    with pytest.raises(ValueError, match="nested"):
        parse_record("[" * 100_000)
