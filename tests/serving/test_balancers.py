"""Load balancers of docs/serving.md: a conversation reaches the server that holds it; events come as they are made."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from serving_cases import Live, listening, openai
from starflow2.pipeline import StarFlow2
from starflow2.serving.app import build_app
from starflow2.serving.guard import Policy
from starflow2.serving.keys import Keys
from starflow2.serving.limits import ServeLimits
from starflow2.serving.routing import number_of
from starflow2.serving.service import Service

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text("utf-8")
KEYS = [f"key-of-visitor-{number:02}" for number in range(12)]
ASK = {"model": "nano", "input": "how many objects are there?", "tool_choice": "none"}


@pytest.fixture(scope="module")
def pair(model: StarFlow2) -> Iterator[list[Live]]:
    """Two servers, numbers 0 and 1, whose conversations are in memory alone; each computes two replies at once."""
    with ExitStack() as stack:
        found = []
        for number in range(2):
            service = Service(model, ServeLimits(rows=2), number=number)
            found.append(stack.enter_context(listening(build_app(service, policy=Policy(keys=Keys(KEYS))), service)))
        yield found


def port_of(live: Live) -> str:
    return live.url.rpartition(":")[2]


def settings(language: str, pair: Sequence[Live]) -> tuple[str, str]:
    """A block of the page with the ports of two servers and a free one, and the address of that."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for documented, real in zip(("8000", "8001", "8002"), (port, *map(port_of, pair)), strict=True):
        assert f"127.0.0.1:{documented}" in text
        text = text.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{real}")
    return text, f"http://127.0.0.1:{port}/v1"


@contextmanager
def running(command: Sequence[str], address: str, folder: Path) -> Iterator[str]:
    """A balancer that runs inside the block, and its address."""
    log = folder / "log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=folder) as process:
        try:
            _wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(20)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, port = re.findall(r"//([\d.]+):(\d+)", address)[0]
    until = time.monotonic() + 20
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    pytest.fail(f"the balancer does not listen: {log.read_text('utf-8')}")


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture
def haproxy(pair: list[Live], tmp_path: Path) -> Iterator[str]:
    text, address = settings("haproxy", pair)
    (tmp_path / "haproxy.cfg").write_text(text)
    command = [program("haproxy"), "-f", "haproxy.cfg"]
    checked = subprocess.run([*command, "-c"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and "[WARNING]" not in checked.stderr, checked.stderr
    with running([*command, "-db"], address, tmp_path) as found:
        yield found


@pytest.fixture
def nginx(pair: list[Live], tmp_path: Path) -> Iterator[str]:
    text, address = settings("nginx", pair)
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    temporary = " ".join(f"{name}_temp_path {name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    whole = f"{user} pid pid; events {{}} http {{ access_log off; {temporary}\n{text} }}"
    (tmp_path / "nginx.conf").write_text(whole)
    command = [program("nginx"), "-p", str(tmp_path), "-e", "stderr", "-c", "nginx.conf"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and "[warn]" not in checked.stderr, checked.stderr
    with running([*command, "-g", "daemon off;"], address, tmp_path) as found:
        yield found


def client_of(address: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=key, max_retries=0)


def test_without_a_choice_a_conversation_is_not_found(pair):
    with client_of(f"{pair[0].url}/v1", KEYS[0]) as here, client_of(f"{pair[1].url}/v1", KEYS[0]) as there:
        kept = here.responses.create(**ASK)
        with pytest.raises(openai.NotFoundError):
            there.responses.create(**ASK, previous_response_id=kept.id)
        assert number_of(kept.id) == 0


def test_haproxy_sends_a_conversation_where_its_id_says(haproxy):
    with client_of(haproxy, KEYS[0]) as client:
        kept = [client.responses.create(**ASK).id for _ in range(6)]
        assert {number_of(name) for name in kept} == {0, 1}, "what follows nothing goes to both"
        later = [client.responses.create(**ASK, previous_response_id=name) for name in (*kept, *kept[::-1])]
        assert [number_of(each.id) for each in later] == [number_of(name) for name in (*kept, *kept[::-1])]
        client.post("/responses", body={"previous_response_id": kept[0], **ASK}, cast_to=dict)
        for name in kept:
            client.responses.delete(name)


def test_nginx_sends_all_of_a_key_to_one_server(nginx):
    numbers = []
    for key in KEYS:
        with client_of(nginx, key) as client:
            first = client.responses.create(**ASK)
            later = client.responses.create(**ASK, previous_response_id=first.id)
            assert number_of(later.id) == number_of(first.id)
            numbers.append(number_of(first.id))
    assert set(numbers) == {0, 1}, "keys are spread"


@pytest.mark.parametrize("balancer", ["haproxy", "nginx"])
def test_events_come_through_as_they_are_made(balancer, pair, request):
    with client_of(request.getfixturevalue(balancer), KEYS[1]) as client:
        long = {"seed": 0, "tries": 2}  # 16 images, two at a time
        events = client.images.generate(prompt="two red hearts", n=8, stream=True, extra_body=long)
        first = next(iter(events))
        left = [live.service.stats() for live in pair]
        assert sum(stats.waiting + stats.replying for stats in left) > 0, "the first image came while others were drawn"
        assert [event.type for event in (first, *events)] == ["image_generation.completed"] * 8
