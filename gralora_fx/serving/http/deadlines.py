"""How long a request may take."""

from __future__ import annotations

import math

from fastapi import Request

from gralora_fx.errors import ServingError, shown

HEADER = "X-Request-Timeout"


class DeadlineError(ServingError):
    """A request was right, and took longer than it may."""


def timeout_of(request: Request) -> float | None:
    """Seconds that a request may take: what its header says, or the service's own limit if that is less.

    Args:
        request: The request.

    Raises:
        ServingError: The header is not a number of seconds.
    """
    limit: float | None = request.app.state.timeout
    given = request.headers.get(HEADER)
    if given is None:
        return limit
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ServingError(f"{HEADER} must be a number of seconds above 0, but got {shown(given)}")
    return seconds if limit is None else min(seconds, limit)


def too_late(seconds: float | None) -> DeadlineError:
    """The error of a request that took longer than it may."""
    return DeadlineError(
        f"the request was not answered within {seconds:g} s, and was given up; give it more time with {HEADER}, or ask "
        "for fewer tokens"
    )
