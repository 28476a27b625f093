"""Work for a client that may go away, or that may not take longer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from gralora_fx.errors import ServingError
from gralora_fx.serving.http.deadlines import timeout_of, too_late

_CLIENT_CLOSED = 499  # nginx's status; nobody reads it


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of some work, which is cancelled if the client goes away first, or its time is over.

    Args:
        request: The request, whose body was read.
        work: Makes the response.

    Raises:
        DeadlineError: Its time is over.
        ServingError: It names a time that is not one.
    """
    try:
        seconds = timeout_of(request)
    except ServingError:
        work.close()
        raise
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if not leaving.done():
            raise too_late(seconds)
        return Response(status_code=_CLIENT_CLOSED)
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
