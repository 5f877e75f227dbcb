"""Counts of what a service did, and a picture of what it is doing."""

from __future__ import annotations

from dataclasses import dataclass

from starflow2.serving.jobs import Usage

__all__ = ["Counts", "Stats"]


@dataclass(slots=True)
class Counts:
    """Numbers that only grow; each is written by one thread."""

    submitted: int = 0
    joined: int = 0  # requests that reached the engine
    finished: int = 0
    failed: int = 0  # by our fault
    refused: int = 0  # for want of room
    rejected: int = 0  # by the client's fault, found while reading
    cancelled: int = 0
    expired: int = 0
    unstored: int = 0  # replies whose session could not be written
    scores: int = 0
    drafts: int = 0
    encoded: int = 0  # images from outside
    input_positions: int = 0
    cached_positions: int = 0
    output_positions: int = 0
    images: int = 0

    def add(self, usage: Usage, images: int) -> None:
        """Count a reply that is over."""
        self.finished += 1
        self.images += images
        self.input_positions += usage.input
        self.cached_positions += usage.cached
        self.output_positions += usage.output


@dataclass(frozen=True, slots=True)
class Stats:
    """A service at one moment, and its counts until then."""

    counts: Counts
    waiting: int
    replying: int  # rows
    engine_bytes: int
    engine_positions: int  # for which each row has room
    in_memory: tuple[int, int]  # sessions and their bytes
    on_disk: tuple[int, int]
    path: str  # the code that computes
    is_closing: bool
