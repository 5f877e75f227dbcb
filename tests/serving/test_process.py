"""A server in a process of its own: it drains when it is asked to stop, and a kill costs no stored conversation."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import script
from serving_cases import openai

load = script("load_serving")


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A process that serves, and a client of it."""
    command = [sys.executable, "-m", "starflow2", "serve", "--port", "0", "--sessions", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http\S+/v1", process.stdout.readline())
        assert found is not None
        with openai.OpenAI(base_url=found[0], api_key="none", max_retries=5) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_server_drains_on_sigterm_and_restores_what_it_stored_after_a_kill(tmp_path):
    fields = {"model": "nano", "tool_choice": {"type": "image_generation"}, "extra_body": {"seed": 1}}
    with server(tmp_path) as (process, client):
        kept = client.responses.create(input="two red hearts", **fields)
        stream = client.images.generate(prompt="two red hearts", n=10, stream=True, partial_images=3)
        events = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        events += list(stream)
        assert [event.type for event in events].count("image_generation.completed") == 10
        assert process.wait(60) == 0
    follow = {"input": "make the hearts blue", "previous_response_id": kept.id, **fields}
    with server(tmp_path) as (process, client):
        before = client.responses.create(**follow)
        process.kill()
    with server(tmp_path) as (_, client):
        after = client.responses.create(**follow)
        later = client.responses.create(
            input="how many objects are there?", model="nano", previous_response_id=before.id
        )
    assert after.output[0].result == before.output[0].result and later.output


@pytest.mark.slow
def test_many_clients_at_once_are_served_or_told_to_come_back():
    found = load.mixed(8, 60, 0, [])
    assert found["ok"], json.dumps(found)


@pytest.mark.slow
def test_hostile_requests_cause_no_failure_of_ours_and_half_of_them_reach_the_engine():
    found = load.generated(8, 300, 0, [])
    assert found["ok"], json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize("is_shared", [False, True], ids=["in memory", "in a folder that both share"])
def test_two_replicas_keep_their_conversations_and_one_survives_the_others_death(tmp_path, is_shared):
    pytest.importorskip("ray", reason="ray is not installed; it comes with the extra ray")
    found = script("two_replicas").trial(200, sessions=str(tmp_path) if is_shared else None)
    assert found["ok"] and found["back_after_s"], json.dumps(found)
