"""Why requests are rejected, in few words that metrics can count by."""

from __future__ import annotations

from typing import Any

from starlette.types import Scope

from gralora_fx.serving.scheduling.queue import QueueFullError, StoppedError
from gralora_fx.serving.too_large import TooLargeError

_KEY = "gralora_fx.rejection"
_BY_ERROR: tuple[tuple[type[Exception], str], ...] = (
    (QueueFullError, "queue_full"),
    (StoppedError, "stopping"),
    (TooLargeError, "too_large"),
)
_BY_STATUS = {
    401: "unauthorized",
    404: "not_found",
    405: "not_found",
    408: "timeout",
    413: "too_large",
    429: "queue_full",
    503: "stopping",
    504: "timeout",
}
REASONS = ("invalid", *sorted({reason for _, reason in _BY_ERROR} | set(_BY_STATUS.values())))


def note_rejection(scope: Any, error: Exception) -> None:
    """Remember with a request why it is rejected, where its status says less than the error."""
    reason = next((reason for kind, reason in _BY_ERROR if isinstance(error, kind)), None)
    if reason is not None:
        scope[_KEY] = reason


def rejection(scope: Scope, status: int) -> str | None:
    """Why a request was rejected; None if it was not.

    Args:
        scope: The request's scope.
        status: The status that it was answered with.
    """
    if _KEY in scope:
        return str(scope[_KEY])
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return "invalid" if 400 <= status < 499 else None  # 499: its client went away
