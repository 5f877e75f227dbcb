"""Two replicas of a server under Ray Serve, one of which is killed in the middle of 200 requests.

    pip install 'starflow2[serve,ray]' openai
    OMP_NUM_THREADS=1 python scripts/two_replicas.py                      # conversations in memory
    OMP_NUM_THREADS=1 python scripts/two_replicas.py --sessions FOLDER    # and in a folder that both replicas share

Half of the requests follow a response that one of the replicas keeps, the others begin anew. Nothing may happen to what
the other replica keeps; what was kept by the one that is killed goes on from the folder, or is refused by name; all
else is answered. One JSON object is printed, and the exit status says whether that held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai
import ray
from ray import serve
from ray.exceptions import RayError

from starflow2.serving.ray_app import build
from starflow2.serving.routing import number_of

__all__ = ["Found", "main", "trial"]

KEPT = 12  # conversations before the others begin
BY_NAME = {"replica_gone", "not_found"}  # codes of the refusals that are allowed, of conversations that were lost
VICTIM = 0
ASK: Any = {"model": "nano", "input": "how many objects are there?", "tool_choice": "none"}
DRAW: Any = {"model": "nano", "input": "two red hearts", "tool_choice": "required"}


@dataclass(slots=True)
class Found:
    """How each request ended: the replica that keeps its past (None: it has none), and "ok" or a code."""

    ends: list[tuple[int | None, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, keeper: int | None, end: str) -> None:
        with self.lock:
            self.ends.append((keeper, end))

    def of(self, keeper: int | None) -> dict[str, int]:
        """How often each end came, of requests whose past that replica keeps."""
        return dict(Counter(end for kept_by, end in self.ends if kept_by == keeper))


@contextlib.contextmanager
def cluster(sessions: str | None) -> Iterator[str]:
    """The address of two replicas of nano that run inside the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {"replicas": "2"} | ({} if sessions is None else {"sessions": sessions})
        serve.run(build(arguments), route_prefix="/")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.shutdown()
        ray.shutdown()


def process_of(number: int) -> int | None:
    """The process of a replica; None while there is none."""
    handle = serve.get_deployment_handle(f"replica-{number}", "default")
    try:
        found: int = handle.process.remote().result(timeout_s=5)
    except (RayError, TimeoutError):
        return None
    return found


def trial(requests: int = 200, clients: int = 8, sessions: str | None = None) -> dict[str, Any]:
    """Send the requests, kill a replica when half of them are answered, and say what became of them."""
    with cluster(sessions) as address, openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        kept = sorted(client.responses.create(**DRAW, extra_body={"seed": i}).id for i in range(KEPT))
        keepers = {name: number_of(name) for name in kept}
        before, after = Found(), Found()
        killed = threading.Event()

        def one(i: int) -> None:
            name, found = (kept[i // 2 * 5 % KEPT] if i % 2 else None), after if killed.is_set() else before
            more = {"previous_response_id": name} if name else {}
            try:
                client.responses.create(**(ASK if name or i % 4 else DRAW), **more)
                found.note(keepers.get(name or ""), "ok")
            except openai.APIStatusError as error:
                body = error.body if isinstance(error.body, dict) else {}
                found.note(keepers.get(name or ""), str(body.get("code") or error.status_code))
            except openai.APIConnectionError as error:
                found.note(keepers.get(name or ""), f"connection: {error}")

        with ThreadPoolExecutor(clients) as pool:
            futures = [pool.submit(one, i) for i in range(requests)]
            while len(before.ends) < requests // 2:
                time.sleep(0.01)
            pid = process_of(VICTIM)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            killed.set()
            start = time.monotonic()
            for future in futures:
                future.result()
            back_s = _until_back(pid, start)
            again = client.responses.create(**DRAW, extra_body={"seed": 0})
    return _summary(before, after, keepers, sessions is not None) | {"back_after_s": back_s, "answers": bool(again.id)}


def _until_back(pid: int, start: float) -> float | None:
    """Seconds from `start` until the replica runs in another process; None if it does not within a minute."""
    while time.monotonic() - start < 120:
        if process_of(VICTIM) not in (None, pid):
            return time.monotonic() - start
        time.sleep(0.2)
    return None


def _summary(before: Found, after: Found, keepers: dict[str, int | None], is_shared: bool) -> dict[str, Any]:
    ends = Found([*before.ends, *after.ends])
    unharmed = set(ends.of(1 - VICTIM)) <= {"ok"} and set(ends.of(None)) <= {"ok"}
    of_victim = set(ends.of(VICTIM)) <= ({"ok"} if is_shared else {"ok", *BY_NAME})
    both = set(keepers.values()) == {0, 1}
    return {
        "requests": len(ends.ends),
        "in_flight_or_later": len(after.ends),
        "kept_by_the_other": ends.of(1 - VICTIM),
        "kept_by_the_killed_before": before.of(VICTIM),
        "kept_by_the_killed_after": after.of(VICTIM),
        "without_a_past": ends.of(None),
        "ok": unharmed and of_victim and both and bool(ends.of(VICTIM)),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sessions", help="a folder that both replicas share")
    args = parser.parse_args(arguments)
    found = trial(args.requests, args.clients, args.sessions)
    print(json.dumps(found, indent=1))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
