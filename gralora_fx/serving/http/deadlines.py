"""How long a request may take, and work for a client that may go away before."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from gralora_fx.errors import ServingError, shown

HEADER = "X-Request-Timeout"
_CLIENT_CLOSED = 499  # nginx's status; nobody reads it


class DeadlineError(ServingError):
    """A request was right, and took longer than it may."""

    def __init__(self, seconds: float | None) -> None:
        """Say how long it may take, in seconds."""
        super().__init__(
            f"the request was not answered within {seconds:g} s, and was given up; give it more time with {HEADER}, or "
            "ask for fewer tokens"
        )


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


async def unless_disconnected(request: Request, work: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
    """The response of some work, which is cancelled if the client goes away first, or its time is over.

    Args:
        request: The request, whose body was read.
        work: Makes the response.

    Raises:
        DeadlineError: Its time is over.
        ServingError: It names a time that is not one.
    """
    seconds = timeout_of(request)
    working, leaving = asyncio.ensure_future(work()), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if not leaving.done():
            raise DeadlineError(seconds)
        return Response(status_code=_CLIENT_CLOSED)
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
