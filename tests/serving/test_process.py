"""A server in a process of its own: it drains when it is asked to stop, and a kill costs no stored conversation."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
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
def test_two_replicas_keep_their_conversations_and_one_survives_the_others_death(tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed; it comes with the extra ray")
    from ray import serve
    from ray.util.state import list_actors

    from starflow2.serving.ray_app import build
    from starflow2.serving.routing import number_of

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 18765})
        serve.run(build({"replicas": "2"}), route_prefix="/")
        _two_replicas(18765, list_actors, number_of)
    finally:
        serve.shutdown()
        ray.shutdown()


def _two_replicas(port: int, list_actors: Any, number_of: Any) -> None:
    """200 requests to two replicas, one of which is killed in the middle."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    fields = {"model": "nano", "input": "two red hearts", "tool_choice": "required"}
    kept = [client.responses.create(**fields, extra_body={"seed": i}).id for i in range(12)]
    numbers = {name: number_of(name) for name in kept}
    assert set(numbers.values()) == {0, 1}
    refused: list[tuple[int | None, str, str]] = []
    good: list[int | None] = []

    def one(i: int) -> None:
        name = kept[i % len(kept)] if i % 2 else None
        more = {"previous_response_id": name} if name else {}
        try:
            client.responses.create(model="nano", input="how many objects are there?", tool_choice="none", **more)
            good.append(numbers.get(name or ""))
        except openai.APIStatusError as error:
            refused.append((numbers.get(name or ""), str(error.status_code), error.body["code"]))

    for i in range(100):
        one(i)
    assert not refused
    victim = next(a for a in list_actors(filters=[("state", "=", "ALIVE")]) if "replica-0" in (a.name or a.class_name))
    threads = [threading.Thread(target=one, args=(i,)) for i in range(100, 200)]
    for number, thread in enumerate(threads):
        thread.start()
        if number == 20:
            os.kill(victim.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(180)
    client.close()
    assert all(number == 0 and code in ("replica_gone", "not_found") for number, _, code in refused), refused
    pinned = [numbers[kept[i % len(kept)]] for i in range(1, 200, 2)]
    assert good.count(1) == pinned.count(1), "conversations of the other replica were not harmed"
