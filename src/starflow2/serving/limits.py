"""Limits of a service: how much is computed at once, waits, is kept, and is accepted in one request."""

from __future__ import annotations

from dataclasses import dataclass

from starflow2.core.fields import Config, Count, Natural, Positive

__all__ = ["ServeLimits"]

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeLimits(Config):
    """Bounds of a service; `docs/serving.md` says how to choose it for a machine."""

    # work
    rows: Count = 16  # replies that are computed at once
    queue: Natural = 128  # replies that wait
    queue_of_key: Count = 64  # of one key
    deadline_s: Positive = 120.0  # from the arrival of a request to its end; a request may ask for less
    drain_s: Positive = 30.0  # that replies have to finish in when the service stops
    # one request
    body_bytes: Count = 32 * MIB
    body_s: Positive = 30.0  # for a request to arrive
    send_s: Positive = 60.0  # for a client to take an event
    pixels: Count = 2**24  # of one image, before it is decoded
    pictures: Count = 16  # in one request
    images: Count = 10  # drawn for one request
    tokens: Count = 1024  # written for one request
    turns: Count = 200  # of a conversation that is given whole
    guidance: Positive = 20.0
    tries: Count = 8
    # sessions
    memory_bytes: Count = 512 * MIB  # of sessions in memory
    disk_bytes: Count = 4096 * MIB  # of sessions in the folder; the oldest go first
    idle_s: Positive = 900.0  # after which a stored session leaves memory
    kept_s: Positive = 30 * 86400.0  # after which a stored session is deleted
