"""Refusals of a service: whose fault a failure is, the status that says so, and when to come back.

Errors of the library keep their classes; `refusal_of` gives each a status. A message of ours never holds a traceback,
a path of this machine or a key.
"""

from __future__ import annotations

from starflow2.errors import (
    ConfigError,
    DataError,
    PromptError,
    ShapeError,
    StarFlowError,
    StateError,
    UsageError,
)

__all__ = ["CLIENTS_FAULT", "Refusal", "busy", "cancelled", "closing", "late", "refusal_of", "unknown_session"]

CLIENTS_FAULT = (PromptError, DataError, ShapeError, ConfigError, UsageError)  # raised while a request is read
OURS = "the server could not finish this reply; nothing was kept of it. Ask again, with another seed if it persists."


class Refusal(StarFlowError):
    """A request that is not carried out. status: of HTTP; code: for programs; param: the field that is at fault."""

    def __init__(
        self, message: str, *, status: int, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


def busy(waiting: int, retry_after: int) -> Refusal:
    """The queue is full."""
    text = f"{waiting} requests are waiting and the queue is full; ask again in {retry_after} s."
    return Refusal(text, status=429, code="queue_full", retry_after=retry_after)


def closing() -> Refusal:
    """The service takes no more requests."""
    text = "the server is shutting down and takes no new requests; ask again in a moment."
    return Refusal(text, status=503, code="shutting_down", retry_after=5)


def late(seconds: float, *, has_begun: bool) -> Refusal:
    """The deadline of a request has passed."""
    state = "was not finished" if has_begun else "could not be begun"
    text = f"the request {state} within its {seconds:g} s; allow it more time, or ask again when there is less to do."
    return Refusal(text, status=408, code="deadline_exceeded", param="timeout_s")


def cancelled() -> Refusal:
    """Nobody waits for the reply any more."""
    return Refusal("the request was cancelled; nothing of it is kept.", status=499, code="cancelled")


def unknown_session(name: str, param: str) -> Refusal:
    """There is no such session, or it is another key's: which of the two is nobody's business."""
    text = f"there is no response {name!r}: it was never stored, was deleted, or is too old. Begin a new conversation."
    return Refusal(text, status=404, code="not_found", param=param)


def refusal_of(error: Exception, *, of_request: bool = True) -> Refusal:
    """The refusal by which a client hears of an error.

    of_request: it was met while the request was read, not while it was computed.
    """
    if isinstance(error, Refusal):
        return error
    if of_request and isinstance(error, CLIENTS_FAULT):
        return Refusal(str(error), status=400, code=_code(error))
    if isinstance(error, StateError) and not of_request:
        text = "the server has no memory left for this reply; ask again in a moment."
        return Refusal(text, status=503, code="out_of_memory", retry_after=5)
    return Refusal(OURS, status=500, code="internal_error")


def _code(error: Exception) -> str:
    if isinstance(error, PromptError):
        return "invalid_prompt"
    return "invalid_image" if isinstance(error, DataError | ShapeError) else "invalid_value"
